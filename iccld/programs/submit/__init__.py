"""`iccld submit`."""
