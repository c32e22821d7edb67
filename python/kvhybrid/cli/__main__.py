"""``python -m kvhybrid.cli``."""

from kvhybrid.cli import main

main()
