"""Strides of the maps in pixels of the image: how many times fewer rows and columns a map has."""

FEATURE_STRIDES = (4, 8, 16, 32)
LATENT_STRIDE = 8
LOGITS_STRIDE = LATENT_STRIDE // 2  # of what the decoder returns
COARSEST_STRIDE = FEATURE_STRIDES[-1]
