"""Inter-Coder Connected Latent Diffusion for unsupervised domain-adaptive semantic segmentation (arXiv 2412.16859)."""

__version__ = "0.1.0"
