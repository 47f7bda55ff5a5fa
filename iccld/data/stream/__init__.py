"""Training batches, each a function of its number."""
