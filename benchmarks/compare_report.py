"""Table, JSON and plots of all the runs in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import write_whole
from .methods import METHODS
from .savings import plot_watched_stages, savings, watched_stages
from .terminal import Row, markdown_table, print_table

SUMMARY = "results.json"
BASELINE = "adamw"
MARKERS = "osD^v<>PX*hp"
COLUMNS = (
    "method",
    "lr",
    "seeds",
    "test loss",
    "min to max",
    "vs best AdamW",
    "steps",
    "trials",
    "a stage",
    "TFLOPs",
    "seconds",
)
ON_TERMINAL = [
    COLUMNS.index(name)
    for name in ("method", "lr", "test loss", "vs best AdamW", "a stage", "seconds")
]
"""The columns that fit into 80 characters."""


def report(folder: Path, command: str) -> None:
    """Write ``table.md``, ``results.json`` and two plots of the runs in ``folder``, and print them.

    Raises:
        SystemExit: there is no run.
    """
    runs = [
        json.loads(path.read_text())
        for path in sorted(folder.glob("*.json"))
        if path.name != SUMMARY
    ]
    if not runs:
        raise SystemExit(f"there is no finished run in {folder}")
    cells = summarize(runs)
    about = describe(runs, command)
    rows, note = table_rows(cells), "\n".join(about["notes"])
    write_whole(folder / SUMMARY, {"about": about, "runs": runs})
    (folder / "table.md").write_text(
        markdown_table(COLUMNS, rows) + f"\n{note}\n" + _savings_table(runs)
    )
    plot_cost(runs, cells, folder / "loss-vs-cost.png")
    plot_rates(cells, runs[0]["initial_test_loss"], folder / "loss-vs-lr.png")
    stages = watched_stages(runs)
    if len(stages):
        plot_watched_stages(stages, folder / "stages.png")
        worse = (stages["test"] > 1e-3).sum()
        print(
            f"{len(stages)} stages moved the weights and were put to the test: {worse} raised the "
            f"test loss by more than 0.1 %, the worst by {100 * stages['test'].max():.2f} %."
        )
    shown = [tuple(_for_terminal(row[place]) for place in ON_TERMINAL) for row in rows]
    names = tuple(COLUMNS[place] for place in ON_TERMINAL)
    print_table(names, shown, f"Equal cost: {folder.name}", note)
    print(f"Wrote table.md, {SUMMARY}, loss-vs-cost.png and loss-vs-lr.png into {folder}.")


def _savings_table(runs: list[dict[str, Any]]) -> str:
    """Cost saved in reaching AdamW's loss, in Markdown; nothing without a baseline."""
    saved = savings(runs)
    if not len(saved):
        return ""
    columns = ("method", "lr", "to AdamW's loss at lr", "cost saved", "seeds that reached it")
    rows = [
        (
            row.method,
            f"{row.lr:g}" if METHODS[row.method].has_rate else "-",
            f"{row.baseline:g}",
            f"{row.saved:.1f} %" if row.reached else "-",
            f"{row.reached} of {row.seeds}",
        )
        for row in saved.itertuples()
    ]
    return "\n" + markdown_table(columns, rows)


def summarize(runs: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each method and learning rate, with means over the seeds."""
    frame = pd.DataFrame(
        {
            "method": run["method"],
            "lr": run["lr"],
            "loss": np.nan if run["test_loss"] is None else run["test_loss"],
            "steps": run["steps"],
            "trials": run["trials"],
            "stages": len(run["stages"]),
            "flops": run["flops"],
            "seconds": run["seconds"],
        }
        for run in runs
    )
    cells = frame.groupby(["method", "lr"], as_index=False).agg(
        seeds=("loss", "size"),
        # One seed that diverged makes the mean no number.
        loss=("loss", lambda losses: losses.mean(skipna=False)),
        low=("loss", "min"),
        high=("loss", "max"),
        diverged=("loss", lambda losses: int(losses.isna().sum())),
        **{name: (name, "mean") for name in ("steps", "trials", "stages", "flops", "seconds")},
    )
    order = {name: place for place, name in enumerate(METHODS)}
    cells["place"] = cells["method"].map(order)
    cells = cells.sort_values(["place", "lr"]).reset_index(drop=True)
    best = cells.groupby("method")["loss"].transform("min")
    cells["best"] = cells["loss"] == best
    return cells


def _for_terminal(text: str) -> str:
    """Bold as rich marks it."""
    return f"[bold]{text.strip('*')}[/bold]" if text.startswith("**") else text


def best_baseline(cells: pd.DataFrame) -> float:
    """The loss at the best constant rate of AdamW; NaN if it has not been run."""
    return float(cells.loc[cells["method"] == BASELINE, "loss"].min())


def table_rows(cells: pd.DataFrame) -> list[Row]:
    """Text in the order of ``COLUMNS``; each method's best learning rate is in bold."""
    baseline = best_baseline(cells)

    def row(cell: Any) -> Row:
        loss = f"**{cell.loss:.4f}**" if cell.best else f"{cell.loss:.4f}"
        relative = 100 * (cell.loss / baseline - 1)
        return (
            cell.method,
            f"{cell.lr:g}" if METHODS[cell.method].has_rate else "-",
            str(cell.seeds),
            f"diverged ({cell.diverged} of {cell.seeds})" if cell.diverged else loss,
            "-" if np.isnan(cell.low) else f"{cell.low:.4f} to {cell.high:.4f}",
            "-" if np.isnan(relative) else f"{relative:+.2f} %",
            f"{cell.steps:.1f}",
            f"{cell.trials:.1f}" if cell.stages else "-",
            f"{cell.trials / cell.stages:.1f}" if cell.stages else "-",
            f"{cell.flops / 1e12:.2f}",
            f"{cell.seconds:.1f}",
        )

    return [row(cell) for cell in cells.itertuples()]


def describe(runs: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """What the figures have to be read with."""
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
            f"Task {setting['task']}, test loss in nats a token on {setting['test']} blocks: "
            f"{runs[0]['initial_test_loss']:.4f} before training; mean over the seeds.",
            f"Every run may cost {setting['budget_steps']:g} plain steps of "
            f"{setting['batch_size']} x {setting['block']} tokens. A trial, the loss on "
            f"{setting['validation']} blocks, costs {costs['trial'] / costs['step']:.2f} of one; "
            "all are charged. Seconds are without test evaluations.",
            f"Methods that measure trials draw on a pool of {setting['pool']} blocks; those that "
            "do not are trained on it too.",
            f"Hardware: {'; '.join(all_of('device'))}.",
        ],
    }


def _colors(names: list[str]) -> Iterator[tuple[str, Any, str]]:
    """Each method's name, colour and marker, the same whatever others are shown."""
    for place, name in enumerate(METHODS):
        if name in names:
            color = mpl.colormaps["tab20"](place if name != BASELINE else 14)
            yield name, "black" if name == BASELINE else color, MARKERS[place % len(MARKERS)]


def _finish(figure: Figure, axes: Axes, low: float, high: float, path: Path) -> None:
    margin = 0.05 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("test loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    figure.savefig(path, dpi=150)


def plot_cost(runs: list[dict[str, Any]], cells: pd.DataFrame, path: Path) -> None:
    """Test loss against cost, mean over seeds: each method's best rate bold, the others thin."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    shown: list[float] = []
    for name, color, marker in _colors(list(cells["method"])):
        for cell in cells[(cells["method"] == name) & (cells["diverged"] == 0)].itertuples():
            curves = [r["curve"] for r in runs if (r["method"], r["lr"]) == (name, cell.lr)]
            # Seeds whose stages have different costs are not evaluated at the same ones.
            flops = np.array([point[0] for point in curves[0]])
            points = [list(zip(*curve, strict=True)) for curve in curves]
            loss = np.mean([np.interp(flops, costs, losses) for costs, _, losses in points], axis=0)
            if cell.best:
                label = f"{name}, lr {cell.lr:g}" if METHODS[name].has_rate else name
                axes.plot(flops / 1e12, loss, color=color, marker=marker, label=label, linewidth=2)
                shown += list(loss[1:])
            else:
                axes.plot(flops / 1e12, loss, color=color, alpha=0.3, linewidth=0.8, zorder=1)
    axes.set_xlabel("cost (TFLOPs, validation included)")
    # The loss before training would leave the differences too small to see.
    _finish(figure, axes, min(shown, default=0.0), max(shown, default=1.0), path)


def plot_rates(cells: pd.DataFrame, initial: float, path: Path) -> None:
    """Final test loss against the learning rate, with the range over the seeds.

    What is above the upper limit, or diverged, is a cross at the upper edge.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    usable = cells["loss"].dropna()
    low = usable.min() if len(usable) else 0.0
    high = min(usable.max(), initial, low + 3 * (usable.median() - low) + 0.1) if len(usable) else 1
    for name, color, marker in _colors(list(cells["method"])):
        part = cells[cells["method"] == name]
        if not METHODS[name].has_rate:
            axes.axhline(part["loss"].iloc[0], color=color, linestyle=":", label=name)
            continue
        spread = [part["loss"] - part["low"], part["high"] - part["loss"]]
        # What the picture is about: our method and what it is measured by.
        bold = name in (BASELINE, "calibrated")
        axes.errorbar(
            *(part["lr"], part["loss"], spread),
            color=color,
            marker=marker,
            label=name,
            capsize=2,
            linewidth=2.2 if bold else 1.0,
            zorder=3 if bold else 2,
        )
        beyond = part[~(part["loss"] <= high)]
        axes.plot(beyond["lr"], [high] * len(beyond), "x", color=color, clip_on=False)
    baseline = best_baseline(cells)
    if np.isfinite(baseline):
        axes.axhline(baseline, color="black", linestyle="--", label=f"best of {BASELINE}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    _finish(figure, axes, float(low), float(high), path)
