"""``longrun``: whether anything grows or drifts in 10,000 steps."""

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
    steps: Annotated[int, typer.Option(help="Real steps of each run.", min=100)] = 10000,
    interval: Interval = 6,
    device: Device = "auto",
    output: Annotated[Path, typer.Option(help="Folder of the JSON.")] = Path("results/longrun"),
) -> None:
    """Whether memory grows, weights drift or stages get slower in a long run of a small model.

    It fails if tensors grow, if stages that roll back leave a trace, or if a committed candidate
    is off by more than rounding. Times and the process's memory are reported only.
    """
    where = pick_device(device)
    rows, held = longrun.report(where, steps, interval)
    about = environment(where)
    write_json(output / f"{where.type}-{steps}.json", {"about": about, "rows": rows})
    if not held:
        print("A promise was broken: see the table.", file=sys.stderr)
        raise typer.Exit(1)
