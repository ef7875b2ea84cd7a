"""Latent diffusion: a small autoencoder, a transformer told what to draw by an encoder and a class, LoRA."""
