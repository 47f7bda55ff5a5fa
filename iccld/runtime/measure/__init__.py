"""What a run writes down, and where its time and memory go."""
