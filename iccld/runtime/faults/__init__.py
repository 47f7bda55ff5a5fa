"""What goes wrong on ranks and nodes: found, said, and ended in order."""
