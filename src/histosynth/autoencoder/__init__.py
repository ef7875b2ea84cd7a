"""The first stage of latent models: tiles to small latents and back, its training, and latents kept on disk."""
