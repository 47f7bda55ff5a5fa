"""Whether this machine fits a run."""
