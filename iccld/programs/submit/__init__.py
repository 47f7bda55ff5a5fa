"""`iccld submit`: jobs of SLURM."""
