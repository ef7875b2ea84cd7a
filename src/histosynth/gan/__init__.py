"""A compact class-conditional StyleGAN2 with adaptive augmentation, in plain PyTorch: no compiled plug-in.

Written from the papers: StyleGAN (arXiv 1812.04948), StyleGAN2 (1912.04958), ADA (2006.06676), the
projection discriminator (1802.05637).
"""
