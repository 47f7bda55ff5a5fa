"""`python -m iccld`, for launchers that start modules."""

import sys

from iccld.cli import main

sys.exit(main())
