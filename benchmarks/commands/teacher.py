"""``teacher``: tables of the fast problem, and of what the calibration's constants do to it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console
from tqdm import tqdm

from fastforward_optim import Calibration

from ..methods.schedules import SCHEDULES
from ..runs.teacher import Outcome, Run, excess, plain, sweep, train_all
from ..support.environment import environment, pick_device
from ..support.tables import markdown_table
from .options import parse, parse_rates, parse_schedules, parse_seeds, parse_steps

METHODS = ("calibrated", "default", "adamw")


def teacher_command(
    problems: Annotated[str, typer.Option(help="Their numbers.")] = "0,1,2",
    batch_sizes: Annotated[str, typer.Option(help="Rows of a step.")] = "8,32,128",
    steps: Annotated[str, typer.Option(help="Lengths: cost in plain steps.")] = "150,600,2400",
    seeds: Annotated[str, typer.Option(help="Of adapter, batches and trials.")] = "0,1",
    methods: Annotated[str, typer.Option(help=f"Of {', '.join(METHODS)}.")] = "calibrated",
    schedule: Annotated[str, typer.Option(help=f"Of {', '.join(SCHEDULES)}.")] = "linear",
    lrs: Annotated[str, typer.Option(help="Learning rates.")] = "1e-5,1e-4,1e-3,1e-2",
    constants: Annotated[
        str, typer.Option("--set", help="Constants of the calibration: excess=1.5,slope=0.3.")
    ] = "",
    vary: Annotated[
        str, typer.Option(help="Constants to halve and to double, one at a time; or `all`.")
    ] = "",
    epochs: Annotated[
        int,
        typer.Option(
            help="How often a run sees each example; 0 for examples that come once.", min=0
        ),
    ] = 0,
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = os.cpu_count() or 1,
    output: Annotated[Path, typer.Option(help="Folder.")] = Path("results/teacher"),
) -> None:
    """How far runs of a small, fast problem end above the best rate of AdamW's decayed sweep.

    The sweep is run once and kept in the folder. All trials are charged.
    """
    law = parse("--set", _constants, constants)
    varied = parse("--vary", _names, vary)
    names = methods.split(",")
    if not set(names) <= set(METHODS):
        raise typer.BadParameter(f"choose of {', '.join(METHODS)}", param_hint="--methods")
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
        if _is_possible(_with(law, name, times))
    }
    others = [plain(run, lr, run.seed) for run in base for lr in sweep(run)]
    found = _run([*base, *itertools.chain(*changed.values())], others, workers, output)
    tables = [_main_table(found, base, name, every_seed) for name in names]
    if changed:
        tables.append(_varied_table(found, base, changed, every_seed))
    about = ", ".join(f"{key}: {value}" for key, value in environment(pick_device("cpu")).items())
    (output / "table.md").write_text("\n".join([*tables, about]) + "\n")
    Console().print((output / "table.md").read_text(), markup=False)


def _run(
    runs: Sequence[Run], sweep: Sequence[Run], workers: int, output: Path
) -> dict[Run, Outcome]:
    """Train what is not there; the sweep's runs are kept, for they do not depend on the library."""
    path = output / "sweep.jsonl"
    output.mkdir(parents=True, exist_ok=True)
    found = {}
    if path.exists():
        for line in path.read_text().splitlines():
            run, outcome = json.loads(line)
            found[Run(**run | {"law": ()})] = Outcome(*outcome)
    left = list(dict.fromkeys(run for run in (*sweep, *runs) if run not in found))
    with tqdm(total=len(left)) as bar, path.open("a") as kept:
        for run, outcome in train_all(left, workers):
            found[run] = outcome
            if run.method == "adamw":
                kept.write(json.dumps([asdict(run), outcome]) + "\n")
                kept.flush()
            bar.update()
    return found


def _main_table(
    found: dict[Run, Outcome], runs: Sequence[Run], method: str, seeds: Sequence[int]
) -> str:
    """Mean and worst, a row for each length and a column for each batch size."""
    runs = [run for run in runs if run.method == method]
    batches = sorted({run.batch for run in runs})
    rows = []
    for length in sorted({run.steps for run in runs}):
        cells = []
        for batch in batches:
            these = [run for run in runs if (run.steps, run.batch) == (length, batch)]
            values = [excess(found, run, seeds) for run in these]
            part = fmean(found[run].part for run in these)
            cells.append(f"{fmean(values):+.1f} / {max(values):+.1f} ({part:.1%})")
        rows.append((f"{length}", *cells))
    title = f"{method}: % above the best decayed AdamW, mean / worst (trials' part of the budget)\n"
    return f"{title}\n{markdown_table(('steps', *(f'batch {b}' for b in batches)), rows)}"


def _varied_table(
    found: dict[Run, Outcome],
    base: Sequence[Run],
    changed: dict[tuple[str, float], list[Run]],
    seeds: Sequence[int],
) -> str:
    """By how much the mean over all runs changes."""

    def mean(runs: Sequence[Run]) -> float:
        return fmean(excess(found, run, seeds) for run in runs)

    rows = [
        (name, *(_change(changed.get((name, times)), mean, mean(base)) for times in (0.5, 2.0)))
        for name in dict.fromkeys(name for name, _ in changed)
    ]
    title = f"constants: change of the mean, {mean(base):+.2f} %, in points\n"
    return f"{title}\n{markdown_table(('constant', 'halved', 'doubled'), rows)}"


def _change(runs: list[Run] | None, mean: Callable[[Sequence[Run]], float], before: float) -> str:
    return "-" if runs is None else f"{mean(runs) - before:+.2f}"


def _constants(text: str) -> tuple[tuple[str, float], ...]:
    """``name=value`` pairs; ``ValueError`` if a name or a value cannot be."""
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
        raise ValueError(f"{name!r} is none of {', '.join(names)}")
    return name


def _typed(law: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Whole numbers where the constants are."""
    defaults = asdict(Calibration())
    return {name: type(defaults[name])(value) for name, value in law}


def _with(
    law: tuple[tuple[str, float], ...], name: str, times: float
) -> tuple[tuple[str, float], ...]:
    values = asdict(Calibration()) | dict(law)
    return tuple(_typed((dict(law) | {name: values[name] * times}).items()).items())


def _is_possible(law: tuple[tuple[str, float], ...]) -> bool:
    try:
        Calibration(**dict(law))
    except ValueError:
        return False
    return True
