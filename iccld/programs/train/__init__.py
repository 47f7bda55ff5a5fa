"""`iccld train`."""
