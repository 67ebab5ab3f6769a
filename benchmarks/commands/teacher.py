"""``teacher``: a fast problem, and the effect of the calibration's constants on it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastforward_optim import Calibration

from ..methods.schedules import SCHEDULES
from ..reports.teacher import constants_table, main_table
from ..runs.teacher import Run, plain, sweep, train_and_keep
from ..support.environment import environment, pick_device
from .options import parse, parse_rates, parse_schedules, parse_seeds, parse_steps

METHODS = ("calibrated", "default", "adamw")


def teacher_command(
    problems: Annotated[str, typer.Option(help="Numbers of the problems.")] = "0,1,2",
    batch_sizes: Annotated[str, typer.Option(help="Rows in a step.")] = "8,32,128",
    steps: Annotated[str, typer.Option(help="Costs of a run in plain steps.")] = "150,600,2400",
    seeds: Annotated[str, typer.Option(help="Seeds of adapter, batches and trials.")] = "0,1",
    methods: Annotated[str, typer.Option(help=f"Some of {', '.join(METHODS)}.")] = "calibrated",
    schedule: Annotated[str, typer.Option(help=f"One of {', '.join(SCHEDULES)}.")] = "linear",
    lrs: Annotated[str, typer.Option(help="Learning rates.")] = "1e-5,1e-4,1e-3,1e-2",
    constants: Annotated[
        str,
        typer.Option("--set", help="Constants to set: excess=1.5,slope=0.3."),
    ] = "",
    vary: Annotated[
        str, typer.Option(help="Constants to halve and double, one at a time; `all` for all.")
    ] = "",
    epochs: Annotated[
        int,
        typer.Option(
            help="How often a run sees each example; 0 for new examples in every step.", min=0
        ),
    ] = 0,
    workers: Annotated[int, typer.Option(help="Number of processes.", min=1)] = os.cpu_count() or 1,
    output: Annotated[Path, typer.Option(help="Output folder.")] = Path("results/teacher"),
) -> None:
    """Compare runs of a small, fast problem with the best of AdamW's decayed sweep.

    The sweep is run once and kept in the folder. All trials are charged.
    """
    law = parse("--set", _constants, constants)
    varied = parse("--vary", _names, vary)
    names = methods.split(",")
    if not set(names) <= set(METHODS):
        raise typer.BadParameter(
            f"expected some of {', '.join(METHODS)}, got {methods!r}", param_hint="--methods"
        )
    parse("--schedule", parse_schedules, schedule)
    every_seed = parse("--seeds", parse_seeds, seeds)
    base = [
        Run(method, *setting, lr, schedule, seed, law if method == "calibrated" else (), epochs)
        for method in names
        for setting in itertools.product(
            parse("--problems", parse_seeds, problems),
            parse("--batch-sizes", parse_seeds, batch_sizes),
            [int(length) for length in parse("--steps", parse_steps, steps)],
        )
        for lr in parse("--lrs", parse_rates, lrs)
        for seed in every_seed
    ]
    changed = {
        (name, times): [replace(run, law=_with(law, name, times)) for run in base]
        for name in varied
        for times in (0.5, 2.0)
        if _is_allowed(_with(law, name, times))
    }
    others = [plain(run, lr, run.seed) for run in base for lr in sweep(run)]
    found = train_and_keep([*base, *itertools.chain(*changed.values())], others, workers, output)
    tables = [main_table(found, base, name, every_seed) for name in names]
    if changed:
        tables.append(constants_table(found, base, changed, every_seed))
    about = ", ".join(f"{key}: {value}" for key, value in environment(pick_device("cpu")).items())
    (output / "table.md").write_text("\n".join([*tables, about]) + "\n")
    Console().print((output / "table.md").read_text(), markup=False)


def _constants(text: str) -> tuple[tuple[str, float], ...]:
    """Parse pairs ``name=value``.

    Raises:
        ValueError: a name is unknown or a value is not allowed.
    """
    pairs = [word.partition("=") for word in text.split(",") if word]
    law = tuple((_known(name.strip()), float(value)) for name, _, value in pairs)
    Calibration(**_typed(law))
    return law


def _names(text: str) -> list[str]:
    if text == "all":
        return [field.name for field in fields(Calibration)]
    return [_known(name.strip()) for name in text.split(",") if name]


def _known(name: str) -> str:
    names = [field.name for field in fields(Calibration)]
    if name not in names:
        raise ValueError(f"expected one of {', '.join(names)}, got {name!r}")
    return name


def _typed(law: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Convert values to the types of the constants."""
    defaults = asdict(Calibration())
    return {name: type(defaults[name])(value) for name, value in law}


def _with(
    law: tuple[tuple[str, float], ...], name: str, times: float
) -> tuple[tuple[str, float], ...]:
    values = asdict(Calibration()) | dict(law)
    return tuple(_typed((dict(law) | {name: values[name] * times}).items()).items())


def _is_allowed(law: tuple[tuple[str, float], ...]) -> bool:
    try:
        Calibration(**dict(law))
    except ValueError:
        return False
    return True
