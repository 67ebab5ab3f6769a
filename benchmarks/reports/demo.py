"""The report of ``demo``: table, JSON and plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..methods.trainer import Result
from ..support.files import write_json
from ..support.tables import Row, markdown_table
from .axes import tidy

# Okabe and Ito's palette, for readers with colour blindness.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7")
COLUMNS = (
    "method",
    "lr",
    "test loss",
    "steps",
    "stages",
    "trials",
    "a stage",
    "TFLOPs",
    "seconds",
)


def rows(results: Sequence[Result]) -> list[Row]:
    """Format a row for each result, in the order of ``COLUMNS``."""
    return [
        (
            result.method,
            f"{result.lr:g}",
            f"{result.test_loss:.3f}",
            str(result.steps),
            str(len(result.stages)) if result.stages else "-",
            str(result.trials) if result.stages else "-",
            f"{result.trials / len(result.stages):.1f}" if result.stages else "-",
            f"{result.flops / 1e12:.2f}",
            f"{result.seconds:.0f}",
        )
        for result in results
    ]


def save(directory: Path, results: Sequence[Result], about: dict[str, Any]) -> None:
    """Write ``results.json``, ``table.md`` and ``loss.png`` into ``directory``."""
    document = {"about": about, "results": [asdict(result) for result in results]}
    write_json(directory / "results.json", document)
    (directory / "table.md").write_text(markdown_table(COLUMNS, rows(results)))
    plot_curves(results, directory / "loss.png")


def plot_curves(results: Sequence[Result], path: Path) -> None:
    """Plot test loss against cost: a panel for each learning rate, a line for each method."""
    from matplotlib.figure import Figure

    rates = sorted({result.lr for result in results})
    methods = list(dict.fromkeys(result.method for result in results))
    figure = Figure(figsize=(4.2 * len(rates), 3.6), layout="constrained")
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    for axes, rate in zip(panels, rates, strict=True):
        for method, color, marker in zip(methods, COLORS, "os^Dv", strict=False):
            for result in results:
                if (result.method, result.lr) == (method, rate):
                    cost = [flops / 1e12 for flops, _, _ in result.curve]
                    loss = [loss for _, _, loss in result.curve]
                    axes.plot(cost, loss, color=color, marker=marker, label=method)
        axes.set_title(f"learning rate {rate:g}")
        axes.set_xlabel("cost (TFLOPs, validation included)")
        tidy(axes)
    panels[0].set_ylabel("test loss (nats per token)")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
