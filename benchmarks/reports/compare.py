"""The report of ``compare`` on one folder, which has a task and a length: table, JSON and plots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..methods.registry import METHODS
from ..methods.schedules import CONSTANT, SCHEDULES
from ..support.files import write_json
from ..support.tables import Row, markdown_table, print_table
from .axes import tidy
from .savings import savings
from .watched_stages import plot_watched_stages, watched_stages

SUMMARY = "results.json"
BASELINE = "adamw"
MARKERS = "osD^v<>PX*hp"
LINES = dict(zip(SCHEDULES, (":", "-", "--"), strict=True))
"""The line style of each schedule."""

DIVERGED = 1.1
"""A run has diverged if its final loss is above this multiple of the loss before training."""

CELL = ["method", "schedule", "lr"]
COLUMNS = (
    *CELL,
    "seeds",
    "test loss",
    "min to max",
    "vs best decay",
    "last iterate",
    "steps",
    "epochs",
    "trials",
    "in stages",
    "seconds",
)
ON_TERMINAL = [
    COLUMNS.index(name) for name in (*CELL, "test loss", "vs best decay", "in stages", "seconds")
]
"""The columns that fit into 80 characters."""


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Read the files of the finished runs in a folder."""
    return [
        json.loads(path.read_text())
        for path in sorted(folder.glob("*.json"))
        if path.name != SUMMARY
    ]


def report(folder: Path, command: str) -> None:
    """Write ``table.md``, ``results.json`` and plots of the runs in ``folder``; print the table.

    Raises:
        SystemExit: there is no finished run.
    """
    runs = read_runs(folder)
    if not runs:
        raise SystemExit(f"there is no finished run in {folder}")
    cells = summarize(runs)
    about = describe(runs, command)
    rows, note = table_rows(cells), "\n".join(about["notes"])
    write_json(folder / SUMMARY, {"about": about, "runs": runs})
    (folder / "table.md").write_text(
        markdown_table(COLUMNS, rows) + f"\n{note}\n" + _savings_table(runs)
    )
    plot_cost(runs, cells, folder / "loss-vs-cost.png")
    stages = watched_stages(runs)
    if len(stages):
        plot_watched_stages(stages, folder / "stages.png")
        worse = (stages["test"] > 1e-3).sum()
        print(
            f"{len(stages)} stages that moved the weights were evaluated: {worse} raised the test "
            f"loss by more than 0.1 %, the worst by {100 * stages['test'].max():.2f} %."
        )
    shown = [tuple(_for_terminal(row[place]) for place in ON_TERMINAL) for row in rows]
    names = tuple(COLUMNS[place] for place in ON_TERMINAL)
    print_table(names, shown, f"Equal cost: {folder.name}", note)
    print(f"Wrote table.md, {SUMMARY} and loss-vs-cost.png into {folder}.")


def _savings_table(runs: list[dict[str, Any]]) -> str:
    """Format the cost saved in reaching AdamW's loss; empty without a baseline."""
    saved = savings(runs)
    if not len(saved):
        return ""
    columns = (*CELL, "to AdamW's loss at lr", "cost saved", "seeds that reached it")
    rows = [
        (
            row.method,
            row.schedule,
            f"{row.lr:g}" if METHODS[row.method].has_rate else "-",
            f"{row.baseline:g}",
            f"{row.saved:.1f} %" if row.reached else "-",
            f"{row.reached} of {row.seeds}",
        )
        for row in saved.itertuples()
    ]
    return "\n" + markdown_table(columns, rows)


def frame_of(runs: list[dict[str, Any]]) -> pd.DataFrame:
    """Return a row for each run. The loss of a run that diverged is NaN."""
    return pd.DataFrame(
        {
            **{name: run[name] for name in (*CELL, "seed", "steps", "trials", "seconds", "epochs")},
            "loss": run["test_loss"] if _has_learned(run) else np.nan,
            "last_loss": np.nan if run["last_loss"] is None else run["last_loss"],
            "in_stages": run["trials"] * run["costs"]["trial"] / run["flops"],
        }
        for run in runs
    )


def _has_learned(run: dict[str, Any]) -> bool:
    loss = run["test_loss"]
    return loss is not None and loss <= DIVERGED * run["initial_test_loss"]


def summarize(runs: list[dict[str, Any]]) -> pd.DataFrame:
    """Return a row for each method, schedule and learning rate, with means over the seeds."""
    means = ("steps", "epochs", "trials", "in_stages", "seconds")
    cells = (
        frame_of(runs)
        .groupby(CELL, as_index=False)
        .agg(
            seeds=("loss", "size"),
            # If one seed diverged, the mean is NaN.
            loss=("loss", lambda losses: losses.mean(skipna=False)),
            low=("loss", "min"),
            high=("loss", "max"),
            diverged=("loss", lambda losses: int(losses.isna().sum())),
            last_loss=("last_loss", lambda losses: losses.mean(skipna=False)),
            **{name: (name, "mean") for name in means},
        )
    )
    for column, known in (("method", tuple(METHODS)), ("schedule", SCHEDULES)):
        cells[f"{column}_place"] = cells[column].map({name: i for i, name in enumerate(known)})
    cells = cells.sort_values(["method_place", "schedule_place", "lr"]).reset_index(drop=True)
    best = cells.groupby(["method", "schedule"])["loss"].transform("min")
    cells["best"] = cells["loss"] == best
    return cells


def _for_terminal(text: str) -> str:
    """Convert bold text from Markdown to rich."""
    return f"[bold]{text.strip('*')}[/bold]" if text.startswith("**") else text


def best_baseline(cells: pd.DataFrame) -> float:
    """Return the loss of AdamW at the best rate and decay; NaN if no decay has been run."""
    decayed = (cells["method"] == BASELINE) & (cells["schedule"] != CONSTANT)
    return float(cells.loc[decayed, "loss"].min())


def table_rows(cells: pd.DataFrame) -> list[Row]:
    """Format rows in the order of ``COLUMNS``; best rates of methods and schedules are bold."""
    baseline = best_baseline(cells)

    def row(cell: Any) -> Row:
        loss = f"**{cell.loss:.4f}**" if cell.best else f"{cell.loss:.4f}"
        relative = 100 * (cell.loss / baseline - 1)
        return (
            cell.method,
            cell.schedule,
            f"{cell.lr:g}" if METHODS[cell.method].has_rate else "-",
            str(cell.seeds),
            f"diverged ({cell.diverged} of {cell.seeds})" if cell.diverged else loss,
            "-" if np.isnan(cell.low) else f"{cell.low:.4f} to {cell.high:.4f}",
            "-" if np.isnan(relative) else f"{relative:+.2f} %",
            "-" if np.isnan(cell.last_loss) else f"{cell.last_loss:.4f}",
            f"{cell.steps:.1f}",
            f"{cell.epochs:.1f}",
            f"{cell.trials:.1f}" if cell.trials else "-",
            f"{100 * cell.in_stages:.1f} %" if cell.trials else "-",
            f"{cell.seconds:.1f}",
        )

    return [row(cell) for cell in cells.itertuples()]


def describe(runs: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """Return the conditions and notes that belong to the table."""
    setting, costs = runs[0]["setting"], runs[0]["costs"]

    def all_of(name: str) -> list[str]:
        return sorted({run["about"][name] for run in runs})

    return {
        "date": date.today().isoformat(),
        "command": command,
        **{name: all_of(name) for name in ("device", "versions", "source")},
        "setting": setting,
        "costs": costs,
        "notes": [
            f"Task {setting['task']}, test loss in nats per token on {setting['test']} blocks: "
            f"{runs[0]['initial_test_loss']:.4f} before training; mean over the seeds.",
            "The best decay is AdamW at its best rate under a linear or cosine schedule. A run "
            "has diverged if its final loss is more than a tenth above the loss before training. "
            "The last iterate is given for methods whose test loss is that of a mean of iterates.",
            f"The budget of a run is {setting['budget_steps']:g} plain steps of "
            f"{setting['batch_size']} x {setting['block']} tokens. A trial, the loss on "
            f"{setting['validation']} blocks, costs {costs['trial'] / costs['step']:.2f} steps; "
            "all trials are charged. Seconds do not include test evaluations.",
            f"Methods with trials measure blocks from a pool of {setting['pool']} blocks; the "
            "others train on the pool too.",
            f"Hardware: {'; '.join(all_of('device'))}.",
        ],
    }


def style(method: str, schedule: str) -> dict[str, Any]:
    """Return colour, line and marker of a method, the same in every plot."""
    place = list(METHODS).index(method)
    return {
        "color": "black" if method == BASELINE else mpl.colormaps["tab10"](place - 1),
        "linestyle": LINES[schedule],
        "marker": MARKERS[place],
    }


def curves_of(cells: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield the rows of each method and schedule, in order."""
    for (method, schedule), part in cells.groupby(["method", "schedule"], sort=False):
        yield str(method), str(schedule), part


def plot_cost(runs: list[dict[str, Any]], cells: pd.DataFrame, path: Path) -> None:
    """Plot the mean test loss against cost at the best rate of each method and schedule."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    shown: list[float] = []
    for method, schedule, part in curves_of(cells[(cells["diverged"] == 0) & cells["best"]]):
        lr = part["lr"].iloc[0]
        curves = [r["curve"] for r in runs if [r[name] for name in CELL] == [method, schedule, lr]]
        # The stages of the seeds cost differently, so their evaluations are not at the same cost.
        flops = np.array([point[0] for point in curves[0]])
        points = [list(zip(*curve, strict=True)) for curve in curves]
        loss = np.mean([np.interp(flops, costs, losses) for costs, _, losses in points], axis=0)
        label = f"{method}, {schedule}" + (f", lr {lr:g}" if METHODS[method].has_rate else "")
        axes.plot(flops / 1e12, loss, label=label, **style(method, schedule))
        shown += list(loss[1:])
    axes.set_xlabel("cost (TFLOPs, validation included)")
    axes.set_ylabel("test loss (nats per token)")
    # With the loss before training, the differences would be too small to see.
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    margin = 0.05 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)
    tidy(axes)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    figure.savefig(path, dpi=150)
