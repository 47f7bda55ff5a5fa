"""`python -m iccld`, for launchers that start modules."""

from iccld.cli import run

run()
