"""The options that every bench here has; what it reports is ``kvhybrid.report``'s."""

import argparse

from kvhybrid.report import machine, versions, write_report

__all__ = ["arguments", "machine", "versions", "write_report"]


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser that already knows ``--quick`` and ``--json``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick", action="store_true", help="fewer repetitions: a smoke test, not a measurement"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write one JSON object to FILE; - is stdout, and then nothing else is"
    )
    return parser
