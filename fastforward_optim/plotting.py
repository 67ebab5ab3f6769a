"""Plot a history: tau, loss and learning rate over the steps. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from .record import StageRecord

# From Okabe and Ito's palette, which colour-blind readers can tell apart.
_ORANGE, _BLUE, _GREEN = "#D55E00", "#0072B2", "#009E73"


def plot(history: Sequence[StageRecord]) -> Figure:
    """Draw a history; see ``History.plot``."""
    calibrated = any(record.lr_scale != 1 for record in history)
    # Large text keeps the figure readable at half its size.
    with rc_context({"font.size": 12, "axes.axisbelow": True, "legend.frameon": False}):
        figure = Figure(figsize=(8, 7.5 if calibrated else 5.5), layout="constrained")
        panels = figure.subplots(3 if calibrated else 2, 1, sharex=True)
        _plot_tau(history, panels[0])
        _plot_loss(history, panels[1])
        if calibrated:
            _plot_rate(history, panels[2])
        panels[-1].set_xlabel("optimizer steps")
        for axes in panels:
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    return figure


def _plot_tau(history: Sequence[StageRecord], axes: Axes) -> None:
    steps = [record.step for record in history]
    taus = [record.tau for record in history]
    axes.bar(steps, taus, width=_bar_width(steps), color=_BLUE)
    unmoved = [record for record in history if not record.useful]
    for label, marker, color, at in (
        ("nothing found", "x", _ORANGE, [r.step for r in unmoved if r.kind != "check"]),
        ("checked: sound", "|", "k", [r.step for r in unmoved if r.kind == "check"]),
        ("left at the mean of the iterates", "D", _GREEN, [r.step for r in history if r.averaged]),
    ):
        if at:
            marks: dict[str, Any] = {"marker": marker, "color": color, "label": label}
            axes.plot(at, [0] * len(at), linestyle="none", clip_on=False, zorder=3, **marks)
            axes.legend()
    if any(abs(tau) > 10 for tau in taus):
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    of = "last" if all(record.steps == 1 for record in history) else "mean"
    axes.set_ylabel(f"tau (repeats of\nthe {of} step)")
    useful = sum(record.useful for record in history)
    stages = "1 stage" if len(history) == 1 else f"{len(history)} stages"
    axes.set_title(f"Fast Forward: {stages}, {useful} useful", loc="left")


def _plot_loss(history: Sequence[StageRecord], axes: Axes) -> None:
    steps = [record.step for record in history]
    before = [record.loss_before for record in history]
    after = [record.loss_after for record in history]
    for step, start, end in zip(steps, before, after, strict=True):
        axes.plot([step, step], [start, end], color="#999999", linewidth=1, zorder=1)
    # A large hollow marker and a small filled one stay distinct where they overlap.
    hollow: Any = {"markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.8}
    axes.plot(steps, before, "o", color=_ORANGE, label="before the stage", **hollow)
    axes.plot(steps, after, "s", color=_BLUE, markersize=5, label="after the stage")
    axes.set_ylabel("validation loss")
    axes.legend()


def _plot_rate(history: Sequence[StageRecord], axes: Axes) -> None:
    steps = [0, *(record.step for record in history)]
    scales = [1.0, *(record.lr_scale for record in history)]
    axes.step(steps, scales, where="post", color="k", marker=".")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,g}")
    low, high = axes.get_ylim()
    if high / low > 10:  # a shorter axis may contain no decade, and so no major label
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_minor_formatter("{x:,g}")
    axes.set_ylabel("learning rate\nmultiplied by")


def _bar_width(steps: list[int]) -> float:
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    # After the interval has doubled a few times, bars for the shortest gap would be invisible.
    return max(0.6 * min(gaps, default=1), 0.015 * sum(gaps))
