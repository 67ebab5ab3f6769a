"""What the runs of ``compare`` say beyond their losses: cost saved, stages put to the test."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

CLOSE = 1e-4
"""The paper stops when the test loss is within this of the baseline's."""

Run = dict[str, Any]


def savings(runs: list[Run], rates: tuple[float, ...] = (2e-5, 1e-4)) -> pd.DataFrame:
    """The paper's protocol: the cost at which each run reaches what AdamW ends at.

    It is as fine as the runs were evaluated (``--evaluations``): the first evaluation at which the
    test loss is within 1e-4 counts.

    Args:
        runs: records of finished runs.
        rates: constant rates of AdamW that are the baselines, where they have been run.

    Returns:
        A row for each method, rate and baseline: mean of the cost saved in percent of the
        baseline's, over the seeds that reached it, and how many of how many did.
    """
    ends = {
        (run["lr"], run["seed"]): (run["flops"], run["test_loss"])
        for run in runs
        if run["method"] == "adamw" and run["lr"] in rates and run["test_loss"] is not None
    }
    rows = []
    for run in runs:
        for (rate, seed), (flops, target) in ends.items():
            if run["seed"] == seed and (run["method"], run["lr"]) != ("adamw", rate):
                rows.append(
                    {
                        "baseline": rate,
                        "method": run["method"],
                        "lr": run["lr"],
                        "saved": 100 * (1 - _cost_to_reach(run, target) / flops),
                    }
                )
    frame = pd.DataFrame(rows, columns=["baseline", "method", "lr", "saved"])
    groups = frame.groupby(["baseline", "method", "lr"], as_index=False)["saved"]
    return groups.agg(saved="mean", reached="count", seeds="size")


def _cost_to_reach(run: Run, target: float) -> float:
    return next(
        (cost for cost, _, loss in run["curve"] if loss is not None and loss <= target + CLOSE),
        math.nan,
    )


def watched_stages(runs: list[Run]) -> pd.DataFrame:
    """The stages that moved the weights and were put to the test (``--test-stages``).

    Returns:
        A row for each: by what part of the loss the stage's validation examples and the test set
        say that it changed.
    """
    return pd.DataFrame(
        [
            {
                "method": run["method"],
                "lr": run["lr"],
                "seed": run["seed"],
                "step": stage["step"],
                "validation": stage["loss_after"] / stage["loss_before"] - 1,
                "test": stage["test_after"] / stage["test_before"] - 1,
                "test_loss": stage["test_after"],
            }
            for run in runs
            for stage in run["stages"]
            if "test_after" in stage
            and (stage["tau"] or stage["averaged"])
            and None not in (stage["loss_before"], stage["loss_after"], stage["test_after"])
        ],
        columns=["method", "lr", "seed", "step", "validation", "test", "test_loss"],
    )


def plot_watched_stages(stages: pd.DataFrame, path: Path) -> None:
    """Change of the test loss against that of the validation loss, and both over the steps."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (method, lr), part in stages.groupby(["method", "lr"]):
        label = f"{method}, lr {lr:g}"
        (points,) = left.plot(
            100 * part["validation"], 100 * part["test"], "o", label=label, alpha=0.6
        )
        right.plot(part["step"], 100 * part["test"], "s", color=points.get_color(), alpha=0.6)
        right.plot(part["step"], 100 * part["validation"], "+", color=points.get_color())
    left.axhline(0, color="black", linewidth=0.8)
    left.set_xlabel("validation loss, changed by the stage (%)")
    left.set_ylabel("test loss, changed by it (%)")
    for scale in (left.set_xscale, left.set_yscale, right.set_yscale):
        scale("symlog", linthresh=0.1)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xlabel("optimizer steps")
    right.set_ylabel("squares: test, crosses: validation (%)")
    left.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
