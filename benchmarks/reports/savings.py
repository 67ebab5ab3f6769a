"""What the runs of ``compare`` say beyond their losses: cost saved, stages put to the test."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ..methods.schedules import CONSTANT
from ..runs.paper_run import CLOSE

LOSSES = ("validation_loss", "test_loss")
"""Columns of the losses after a stage."""

Run = dict[str, Any]


def savings(runs: list[Run], rates: tuple[float, ...] = (2e-5, 1e-4)) -> pd.DataFrame:
    """The paper's protocol: the cost at which each run reaches what AdamW ends at.

    It is as fine as the runs were evaluated (``--evaluations``): the first evaluation at which the
    test loss is within 1e-4 counts.

    Args:
        runs: records of finished runs.
        rates: constant rates of AdamW that are the baselines, where they have been run.

    Returns:
        A row for each method, schedule, rate and baseline: mean of the cost saved in percent of the
        baseline's, over the seeds that reached it, and how many of how many did.
    """
    ends = {
        (run["lr"], run["seed"]): (run["flops"], run["test_loss"])
        for run in runs
        if (run["method"], run["schedule"]) == ("adamw", CONSTANT)
        and run["lr"] in rates
        and run["test_loss"] is not None
    }
    rows = []
    cell = ["method", "schedule", "lr"]
    for run in runs:
        for (rate, seed), (flops, target) in ends.items():
            own = run["method"], run["schedule"], run["lr"]
            if run["seed"] == seed and own != ("adamw", CONSTANT, rate):
                rows.append(
                    {
                        "baseline": rate,
                        "method": run["method"],
                        "schedule": run["schedule"],
                        "lr": run["lr"],
                        "saved": 100 * (1 - _cost_to_reach(run, target) / flops),
                    }
                )
    frame = pd.DataFrame(rows, columns=["baseline", *cell, "saved"])
    groups = frame.groupby(["baseline", *cell], as_index=False)["saved"]
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
                "schedule": run["schedule"],
                "lr": run["lr"],
                "seed": run["seed"],
                "step": stage["step"],
                "validation": stage["loss_after"] / stage["loss_before"] - 1,
                "test": stage["test_after"] / stage["test_before"] - 1,
                "validation_loss": stage["loss_after"],
                "test_loss": stage["test_after"],
            }
            for run in runs
            for stage in run["stages"]
            if "test_after" in stage
            and (stage["tau"] or stage.get("averaged"))
            and None not in (stage["loss_before"], stage["loss_after"], stage["test_after"])
        ],
        columns=["method", "schedule", "lr", "seed", "step", "validation", "test", *LOSSES],
    )


def plot_watched_stages(stages: pd.DataFrame, path: Path) -> None:
    """Validation and test loss side by side over a run, and how each stage changed both.

    On the left a validation loss that falls on while the test loss does not has been overfitted
    (fresh examples at each stage scatter); on the right a stage above the line has raised the test
    loss.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = stages.groupby(["method", "schedule", "lr"])
    for place, ((method, schedule, lr), part) in enumerate(groups):
        color = f"C{place}"
        mean = part.groupby("step")[list(LOSSES)].mean()
        left.plot(mean["test_loss"], color=color, label=f"{method}, {schedule}, lr {lr:g}: test")
        left.plot(mean["validation_loss"], "x:", color=color, linewidth=0.8, label="its validation")
        right.plot(part["step"], 100 * part["test"], "o", color=color, alpha=0.7)
        right.plot(part["step"], 100 * part["validation"], "x", color=color, alpha=0.7)
    right.plot([], [], "ko", label="test set")
    right.plot([], [], "kx", label="validation examples")
    right.axhline(0, color="black", linewidth=0.8)
    left.set_ylabel("loss after the stage (nats a token)")
    right.set_ylabel("change of the loss by the stage (%)")
    for axes in (left, right):
        axes.set_xlabel("optimizer steps")
        axes.legend(frameon=False, fontsize="small")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
