"""Check of this machine, and of what a run needs of it."""
