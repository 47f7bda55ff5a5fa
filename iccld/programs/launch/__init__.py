"""`iccld launch`."""
