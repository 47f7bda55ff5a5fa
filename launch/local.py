"""Deprecated: use `iccld launch`. Kept for scripts that call this path."""

import os
import sys

os.execv(sys.executable, [sys.executable, "-m", "iccld", "launch", *sys.argv[1:]])
