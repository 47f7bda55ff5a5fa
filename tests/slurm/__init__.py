"""A real SLURM on this machine, and what a job survives on it."""
