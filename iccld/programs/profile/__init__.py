"""`iccld profile`."""
