"""The report of ``paper``: table and figures, from the files of its runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from ..methods.registry import METHODS
from ..runs.paper import BASELINE, CONFIGURATION
from ..runs.paper_run import LOG, SUMMARY
from ..support.files import read_log
from ..support.tables import Row, markdown_table, print_table
from .axes import tidy

COLUMNS = (
    "task",
    "model",
    "adapter",
    "lr",
    "method",
    "seeds",
    "test loss",
    "reached",
    "FLOPs saved",
    "the paper's way",
    "time saved",
    "with tests",
    "steps",
    "stages",
    "trials",
    "mean tau",
)
ON_TERMINAL = [
    COLUMNS.index(name)
    for name in ("task", "adapter", "method", "test loss", "reached", "FLOPs saved", "time saved")
]
CELL = ("task", "model", "adapter", "lr", "interval", "validation", "idle")
COSTS = ("flops", "flops_paper", "seconds", "seconds_with_tests")


class Cell(NamedTuple):
    """A finished run."""

    configuration: dict[str, Any]
    summary: dict[str, Any]
    log: list[dict[str, Any]]

    @property
    def model(self) -> str:
        """The name of the model, without its source."""
        return Path(self.configuration["model_name"]).name

    @property
    def trained(self) -> str:
        """A short name for what is trained."""
        c = self.configuration
        return "full" if c["full"] else f"{'DoRA' if c['use_dora'] else 'LoRA'} {c['lora_rank']}"

    def stages(self) -> list[dict[str, Any]]:
        """Return the stages in order."""
        return [line for line in self.log if line["kind"] == "stage"]

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the evaluations on the test set in order."""
        return [line for line in self.log if line["kind"] == "evaluation"]


def read(directory: Path) -> list[Cell]:
    """Read all finished runs below a directory, sorted by their settings.

    Raises:
        SystemExit: there is no finished run.
    """
    cells = []
    for path in sorted(directory.glob(f"**/{SUMMARY}")):
        configuration = path.parent.parent / CONFIGURATION
        if configuration.exists():
            cells.append(
                Cell(
                    json.loads(configuration.read_text()),
                    json.loads(path.read_text()),
                    read_log(path.with_name(LOG)),
                )
            )
    if not cells:
        raise SystemExit(f"there is no finished run below {directory}")
    return sorted(cells, key=_order)


def _order(cell: Cell) -> tuple[Any, ...]:
    c = cell.configuration
    trained = (c["full"], c["use_dora"], c["lora_rank"])
    setting = (c["lr"], c["interval"], c["validation"], c["until_idle"])
    method = list(METHODS).index(cell.summary["method"])
    return (c["task"], cell.model, trained, setting, method, c["seed"])


def frame(cells: list[Cell]) -> pd.DataFrame:
    """Return a row for each run, with its costs in percent of those of its baseline."""
    rows = []
    for cell in cells:
        c, summary = cell.configuration, cell.summary
        taus = [stage["tau"] for stage in cell.stages()]
        rows.append(
            {
                "task": c["task"],
                "model": cell.model,
                "adapter": cell.trained,
                "lr": c["lr"],
                "interval": c["interval"],
                "validation": c["validation"],
                "idle": c["until_idle"],
                "seed": c["seed"],
                "tau": float(np.mean(taus)) if taus else np.nan,
                "counted": c["flops_profiler"],
                "test_loss": np.nan if summary["test_loss"] is None else summary["test_loss"],
                **{
                    name: summary[name]
                    for name in ("method", "reached", "steps", "stages", "trials")
                },
                **{name: summary[name] for name in COSTS},
            }
        )
    table = pd.DataFrame(rows)
    baselines = table[table["method"] == BASELINE].set_index([*CELL, "seed"])[list(COSTS)]
    table = table.join(baselines.add_suffix("_baseline"), on=[*CELL, "seed"])
    for name in COSTS:
        table[f"used_{name}"] = 100 * table[name] / table[f"{name}_baseline"]
    return table


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Return means over seeds; those of costs only over seeds that reached the baseline's loss."""
    used = [f"used_{name}" for name in COSTS]
    reached = table["reached"].map(lambda value: value is True)
    table = table.assign(**{name: table[name].where(reached) for name in used})
    groups = table.groupby([*CELL, "method"], as_index=False, sort=False)
    return groups.agg(
        seeds=("seed", "size"),
        test_loss=("test_loss", "mean"),
        reached=("reached", lambda values: sum(value is True for value in values)),
        **{name: (name, "mean") for name in (*used, "steps", "stages", "trials", "tau")},
    )


def rows_of(table: pd.DataFrame) -> list[Row]:
    """Format rows in the order of ``COLUMNS``."""

    def saved(used: float) -> str:
        return "-" if np.isnan(used) else f"{100 - used:.1f} %"

    return [
        (
            cell.task + variation_of(cell.interval, cell.validation, cell.idle),
            cell.model,
            cell.adapter,
            f"{cell.lr:g}",
            cell.method,
            str(cell.seeds),
            f"{cell.test_loss:.4f}",
            "-" if cell.method == BASELINE or cell.idle else f"{cell.reached} of {cell.seeds}",
            *(saved(getattr(cell, f"used_{name}")) for name in COSTS),
            f"{cell.steps:.0f}",
            *(
                f"{value:.0f}" if cell.stages else "-"
                for value in (cell.stages, cell.trials, cell.tau)
            ),
        )
        for cell in table.itertuples()
    ]


def variation_of(interval: int, validation: int, idle: bool) -> str:
    """Name the settings that differ from the paper's."""
    parts = []
    if interval != 6:
        parts.append(f"interval {interval}")
    if validation != 32:
        parts.append(f"{validation} to validate")
    if idle:
        parts.append("until idle")
    return f" ({', '.join(parts)})" if parts else ""


def report(directory: Path) -> None:
    """Write ``table.md`` and the figures to ``directory``, and print the table."""
    cells = read(directory)
    runs = frame(cells)
    table = means(runs)
    rows = rows_of(table)
    note = describe(cells)
    (directory / "table.md").write_text(markdown_table(COLUMNS, rows) + "\n" + note + "\n")
    written = ["table.md"]
    compared = table[(table["method"] != BASELINE) & (table["reached"] > 0)]
    if len(compared):
        plot_bars(compared, directory / "cost-used.png", saved=False)
        plot_bars(compared, directory / "cost-saved.png", saved=True)
        written += ["cost-used.png", "cost-saved.png"]
    plot_curves(cells, directory / "loss-curves.png")
    written.append("loss-curves.png")
    if any(cell.stages() for cell in cells):
        plot_taus(cells, directory / "tau.png")
        written.append("tau.png")
    shown = [tuple(row[place] for place in ON_TERMINAL) for row in rows]
    names = tuple(COLUMNS[place] for place in ON_TERMINAL)
    print_table(names, shown, "Cost saved in reaching the baseline's test loss", note)
    print(f"Wrote {', '.join(written)} into {directory}.")


def describe(cells: list[Cell]) -> str:
    """Describe the conditions of the runs and the columns of the table."""
    about = [cell.configuration["about"] for cell in cells]
    lines = [
        f"Saved: the cost saved in coming within 1e-4 of the final test loss of {BASELINE}, in "
        "percent of its cost, with trials and parameter updates charged; mean over the seeds that "
        "reached it.",
        "FLOPs are counted; the paper's way counts each step as three forwards. Time does not "
        "include evaluations on the test set, `with tests` does.",
    ]
    if not all(cell.configuration["flops_profiler"] for cell in cells):
        lines.append("Some FLOPs are estimated from the number of parameters (no profiler).")
    for name in ("device", "versions", "source", "date"):
        lines.append(f"{name.capitalize()}: {'; '.join(sorted({a[name] for a in about}))}.")
    return "\n".join(lines)


def plot_bars(table: pd.DataFrame, path: Path, *, saved: bool) -> None:
    """Plot the cost used or saved, in percent of the baseline's, as in the paper's figures.

    Tasks are groups of bars, with a bar for each model, adapter, learning rate and method. FLOPs
    and time have a panel each.
    """
    labels = [_bar_label(cell, table) for cell in table.itertuples()]
    table = table.assign(bar=labels)
    bars = list(dict.fromkeys(labels))
    tasks = list(dict.fromkeys(table["task"]))
    figure = Figure(figsize=(4 + 1.4 * len(tasks) + 0.25 * len(bars), 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    width = 0.8 / len(bars)
    for axes, (name, title) in zip(
        panels, (("flops", "FLOPs"), ("seconds", "wall-clock time")), strict=True
    ):
        for place, bar in enumerate(bars):
            part = table[table["bar"] == bar].groupby("task")[f"used_{name}"].mean()
            heights = [100 - part[task] if saved else part[task] for task in tasks if task in part]
            at = [i for i, task in enumerate(tasks) if task in part]
            offset = (place - (len(bars) - 1) / 2) * width
            drawn = axes.bar(
                [i + offset for i in at], heights, width, label=bar, color=_color(place)
            )
            axes.bar_label(drawn, fmt="%.0f", fontsize="x-small", padding=1)
        axes.set_xticks(range(len(tasks)), tasks)
        axes.set_title(title)
        axes.axhline(0, color="black", linewidth=0.8)  # bars below it took longer than the baseline
        if not saved:
            axes.axhline(100, color="black", linestyle="--", linewidth=0.8)
        tidy(axes)
    bottom, top = panels[0].get_ylim()
    panels[0].set_ylim(bottom, max(105, top))
    panels[0].set_ylabel(f"cost {'saved' if saved else 'used'} (% of the baseline's)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def _bar_label(cell: Any, table: pd.DataFrame) -> str:
    """Label a bar with its method and the settings that vary between bars."""
    parts = [cell.model, cell.adapter, f"lr {cell.lr:g}"]
    names = ("model", "adapter", "lr")
    kept = [part for part, name in zip(parts, names, strict=True) if table[name].nunique() > 1]
    kept = kept or [cell.model]
    return ", ".join([*kept, cell.method]) + variation_of(cell.interval, cell.validation, cell.idle)


def plot_curves(cells: list[Cell], path: Path) -> None:
    """Plot the test loss of each run against its FLOPs."""

    def draw(axes: Axes, cell: Cell, style: dict[str, Any]) -> Any:
        points = cell.evaluations()
        cost = [point["flops"] / 1e12 for point in points]
        loss = [np.nan if p["test_loss"] is None else p["test_loss"] for p in points]
        (line,) = axes.plot(cost, loss, **style)
        if cell.summary["target"] is not None:
            axes.plot(cost[-1], loss[-1], "o", color=line.get_color(), markersize=4)
        return line

    figure, panels = _panels(cells, draw, sharey=False)
    for row in panels:
        row[0].set_ylabel("test loss (nats per token)")
    for axes in panels[-1]:
        axes.set_xlabel("cost (TFLOPs, validation included)")
    figure.savefig(path, dpi=150)


def plot_taus(cells: list[Cell], path: Path) -> None:
    """Plot how far each stage went over a run."""

    def draw(axes: Axes, cell: Cell, style: dict[str, Any]) -> Any:
        steps = [stage["step"] for stage in cell.stages()]
        taus = [stage["tau"] for stage in cell.stages()]
        (line,) = axes.plot(steps, taus, **(style | {"marker": ".", "linewidth": 0.8}))
        return line

    figure, panels = _panels([cell for cell in cells if cell.stages()], draw, sharey=True)
    for row in panels:
        row[0].set_ylabel("length of a stage (tau)")
        for axes in row:
            axes.set_yscale("symlog", linthresh=1)
            axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 3)))
            axes.yaxis.set_major_formatter("{x:g}")
    for axes in panels[-1]:
        axes.set_xlabel("optimizer steps")
    figure.savefig(path, dpi=150)


def _panels(
    cells: list[Cell], draw: Callable[[Axes, Cell, dict[str, Any]], Any], *, sharey: bool
) -> tuple[Figure, list[list[Axes]]]:
    """Make a grid of panels, tasks by learning rates, and draw each run in its panel."""
    tasks = list(dict.fromkeys(cell.configuration["task"] for cell in cells))
    rates = sorted({cell.configuration["lr"] for cell in cells})
    size = (4 * len(tasks) + 2.5, 3 * len(rates) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(rates), len(tasks), squeeze=False, sharey=sharey).tolist()
    for row, lr in zip(panels, rates, strict=True):
        for axes, task in zip(row, tasks, strict=True):
            axes.set_title(f"{task}, lr {lr:g}")
            tidy(axes)
    handles: dict[str, Any] = {}
    for cell, (label, style) in zip(cells, _lines(cells), strict=True):
        c = cell.configuration
        axes = panels[rates.index(c["lr"])][tasks.index(c["task"])]
        handles.setdefault(label, draw(axes, cell, style))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="small")
    return figure, panels


def _lines(cells: list[Cell]) -> list[tuple[str, dict[str, Any]]]:
    """Return label and style of each run: dashes show what is trained, colours the rest."""
    models = {cell.model for cell in cells}
    trained = {cell.trained for cell in cells}
    colors: dict[str, Any] = {}
    lines = []
    for cell in cells:
        c, method = cell.configuration, cell.summary["method"]
        parts = [cell.model] * (len(models) > 1) + [cell.trained] * (len(trained) > 1)
        variation = variation_of(c["interval"], c["validation"], c["until_idle"])
        label = ", ".join([method, *parts]) + variation
        key = ("" if method == BASELINE else label).replace("DoRA", "LoRA")
        color = colors.setdefault(key, _color(len(colors))) if key else "black"
        dashes = "--" if c["use_dora"] else ":" if c["full"] else "-"
        lines.append((label, {"color": color, "linestyle": dashes, "linewidth": 1.5}))
    return lines


def _color(place: int) -> Any:
    """Return one of ten strong colours, then of their ten light variants."""
    return mpl.colormaps["tab20"]((2 * place + place // 10) % 20)
