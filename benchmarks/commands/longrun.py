"""``longrun``: memory, drift and speed over 10,000 steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..measurements import longrun
from ..support.environment import environment, pick_device
from ..support.files import write_json
from .options import Device, Interval


def longrun_command(
    steps: Annotated[int, typer.Option(help="Real steps in each run.", min=100)] = 10000,
    interval: Interval = 6,
    device: Device = "auto",
    output: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("results/longrun"),
) -> None:
    """Check that memory and weights do not drift in a long run of a small model.

    It fails if the memory of tensors grows, if a stage that rolls back leaves a trace, or if a
    committed candidate is off by more than rounding. Times and the memory of the process are only
    reported.
    """
    where = pick_device(device)
    rows, passed = longrun.report(where, steps, interval)
    about = environment(where)
    write_json(output / f"{where.type}-{steps}.json", {"about": about, "rows": rows})
    if not passed:
        print("Memory or weights drifted: see the table.", file=sys.stderr)
        raise typer.Exit(1)
