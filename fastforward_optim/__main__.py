"""The command line: ``python -m fastforward_optim doctor``."""

from __future__ import annotations

import argparse
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
        help="say what is installed here, try it, and say what to do about what does not work",
        description="Versions and devices, each part of the library tried on them, and what to do "
        "about what does not work. Exit status: 0 if all that is installed works, 1 if not; what "
        "is not installed is no failure.",
    )
    doctor.add_argument("--json", action="store_true", help="for bug reports")
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    from .doctor import examine, to_json, to_text

    report = examine()
    print(to_json(report) if options.json else to_text(report))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
