"""The command line: ``python -m fastforward_optim doctor``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from . import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastforward_optim", description="Fast Forward for LoRA fine-tuning."
    )
    parser.add_argument("--version", action="version", version=f"fastforward_optim {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command")
    doctor = commands.add_parser(
        "doctor",
        help="report versions and devices, which extras import, and whether a stage works",
        description="Report versions and devices, which extras import, and whether a stage works "
        "on each device. Exit status: 1 if anything that is installed fails.",
    )
    doctor.add_argument("--json", action="store_true", help="for bug reports")
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    from .doctor import has_failed, report, to_text

    found = report()
    print(json.dumps(found, indent=1) if options.json else to_text(found))
    return int(has_failed(found))


if __name__ == "__main__":
    sys.exit(main())
