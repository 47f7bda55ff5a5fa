"""Checkpoints: their pieces, their manifest, and the folder that holds them."""
