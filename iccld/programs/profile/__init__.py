"""`iccld profile`: where a step's time and memory go."""
