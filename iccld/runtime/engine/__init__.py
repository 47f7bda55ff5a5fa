"""Training of a module on all ranks: the backends, and what they share."""
