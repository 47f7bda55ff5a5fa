"""SLURM: the job script as text, the life of a job, and how its tasks become ranks."""
