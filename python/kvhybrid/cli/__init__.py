"""The command line: one file per command. Needs the ``cli`` extra; says so when it is missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Run ``kvhybrid``."""
    try:
        from kvhybrid.cli.app import app
    except ImportError as error:
        if error.name not in {"typer", "rich", "transformers"}:
            raise
        sys.exit(f"kvhybrid: {error.name} is not installed; run: pip install 'kvhybrid[cli]'")
    app()
