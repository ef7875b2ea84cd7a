"""Latent diffusion: a small autoencoder, a denoiser told what to draw by an encoder and a class, LoRA."""
