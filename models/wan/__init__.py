"""Wan 2.2: the diffusion transformer, its UMT5 text encoder, its VAE, and how they become pipeline layers."""
