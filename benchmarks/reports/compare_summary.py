"""The report of ``compare`` over all lengths and tasks: a table, and a figure for each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ..methods.registry import METHODS
from ..methods.schedules import CONSTANT, SCHEDULES
from ..runs.compare import Plan
from ..support.tables import Row, markdown_table, print_table
from .axes import tidy
from .compare import BASELINE, best_baseline, curves_of, frame_of, read_runs, style, summarize

OURS = "calibrated"
COLUMNS = (
    "schedule",
    "steps",
    "task",
    "runs",
    "mean vs best decay",
    "worst",
    "diverged",
    "in stages",
)
ALL = "all"
"""In the column of tasks: all tasks together."""

BEST = "best of decayed AdamW"
"""The label of the line with which all methods are compared."""

BEYOND = "diverged, or beyond the axis"

ABOVE = 0.12
"""The upper end of the axis: this fraction above the best loss."""

Folder = tuple[Plan, list[dict[str, Any]]]
"""The plan of a folder and its runs."""


def report(plans: Sequence[Plan], output: Path) -> None:
    """Write and print the summary of the folders with runs, and plot each task."""
    found = [(plan, runs) for plan in plans if (runs := read_runs(plan.folder(output)))]
    rows = summary_rows(found)
    if rows:
        note = (
            f"Final test loss of {OURS}, over starting rates and seeds, in % above AdamW at its "
            "best rate with a linear or cosine decay (mean over its seeds); and the fraction of "
            "the budget that stages took."
        )
        (output / "summary.md").write_text(markdown_table(COLUMNS, rows) + f"\n{note}\n")
        print_table(COLUMNS, rows, f"{OURS} from any rate", note)
    for family in dict.fromkeys(plan.family for plan, _ in found):
        path = output / f"{family}.png"
        plot([one for one in found if one[0].family == family], path)
        print(f"Wrote {path}.")


def summary_rows(found: Sequence[Folder]) -> list[Row]:
    """Compare each schedule and length with the best decay, by task and over all tasks."""
    frames = []
    for plan, runs in found:
        frame = frame_of(runs)
        frame = frame[frame["method"] == OURS].copy()
        frame["above"] = 100 * (frame["loss"] / best_baseline(summarize(runs)) - 1)
        frame["task"], frame["length"] = plan.task, plan.budget_steps
        frames.append(frame)
    ours = pd.concat(frames) if frames else pd.DataFrame()
    if not len(ours):
        return []
    rows = []
    for (schedule, length), part in ours.groupby(["schedule", "length"], sort=False):
        tasks = list(dict.fromkeys(part["task"]))
        groups = [(task, part[part["task"] == task]) for task in tasks]
        if len(tasks) > 1:
            groups.append((ALL, part))
        rows += [_summary_row(str(schedule), float(length), *group) for group in groups]
    return rows


def _summary_row(schedule: str, length: float, task: str, part: pd.DataFrame) -> Row:
    """Runs that diverged are counted, but not part of the mean and the worst."""
    above = part["above"].dropna()
    return (
        schedule,
        f"{length:g}",
        task,
        str(len(part)),
        f"{above.mean():+.2f} %" if len(above) else "-",
        f"{above.max():+.2f} %" if len(above) else "-",
        str(int(part["loss"].isna().sum())),
        f"{100 * part['in_stages'].mean():.1f} %",
    )


def plot(found: Sequence[Folder], path: Path) -> None:
    """Plot the final test loss against the starting rate, with a panel for each length.

    Decayed AdamW is black. Runs that diverged or are too far above its best are crosses at the
    upper edge.
    """
    figure = Figure(figsize=(3.0 + 4.0 * len(found), 4.6), layout="constrained")
    panels = figure.subplots(1, len(found), sharex=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    order = [BEST, *(_label(name, schedule) for name in METHODS for schedule in SCHEDULES), BEYOND]
    for axes, (plan, runs) in zip(panels, found, strict=True):
        cells = summarize(runs)
        _panel(axes, cells)
        epochs = frame_of(runs)["epochs"].max()
        axes.set_title(f"{plan.budget_steps:g} steps ({epochs:.1f} epochs)", fontsize="medium")
        handles |= {
            text: line for line, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    panels[0].set_ylabel(f"{found[0][0].task}: final test loss (nats per token)")
    # In the order of the tables; by default, error bars would come after lines.
    names = sorted(handles, key=order.index)
    figure.legend(
        [handles[name] for name in names],
        names,
        frameon=False,
        loc="outside right upper",
        handlelength=3.5,
        fontsize="small",
    )
    figure.savefig(path, dpi=150)


def _label(method: str, schedule: str) -> str:
    return f"{method}, {schedule}" + ("" if METHODS[method].has_rate else " (has no rate)")


def _panel(axes: Axes, cells: pd.DataFrame) -> None:
    best = best_baseline(cells)
    lowest = cells["loss"].min()
    low = lowest if np.isnan(best) else min(best, lowest)
    high = low * (1 + ABOVE)
    for method, schedule, part in curves_of(cells):
        look = style(method, schedule)
        if not METHODS[method].has_rate:
            loss = part["loss"].iloc[0]
            look.pop("marker")
            axes.axhline(loss, label=_label(method, schedule), **look)
            continue
        # Highlight our method and its baseline.
        bold = method == OURS or (method == BASELINE and schedule != CONSTANT)
        shown = part[part["loss"] <= high]
        axes.errorbar(
            shown["lr"],
            shown["loss"],
            [shown["loss"] - shown["low"], shown["high"] - shown["loss"]],
            label=_label(method, schedule),
            capsize=2,
            markersize=5 if bold else 3.5,
            linewidth=2.2 if bold else 1.0,
            zorder=3 if bold else 2,
            **look,
        )
        beyond = part[~(part["loss"] <= high)]
        if len(beyond):  # an empty plot without clipping would break the layout
            axes.plot(
                beyond["lr"],
                [high] * len(beyond),
                "x",
                color=look["color"],
                clip_on=False,
                label=BEYOND,
            )
    if np.isfinite(best):
        axes.axhline(best, color="black", linewidth=0.8, label=BEST)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())  # they would overlap in a narrow panel
    axes.set_xlabel("starting learning rate")
    axes.set_ylim(low - 0.05 * (high - low), high)
    tidy(axes)
