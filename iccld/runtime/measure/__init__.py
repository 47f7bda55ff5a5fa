"""Measurements of a run: what it writes down, and where its time and memory go."""
