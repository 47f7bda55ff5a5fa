"""Faults of ranks and nodes: they are found, named, and lead to an orderly end."""
