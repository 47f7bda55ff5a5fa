"""Deprecated: use `python -m iccld.demo.draw`. Kept for scripts that call this path."""

import os
import sys

os.execv(sys.executable, [sys.executable, "-m", "iccld.demo.draw", *sys.argv[1:]])
