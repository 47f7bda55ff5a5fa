"""`iccld launch`: several ranks on this machine."""
