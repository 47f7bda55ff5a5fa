"""The parts of gpu.py: what only a GPU can show, each a function that returns its figures as plain values."""
