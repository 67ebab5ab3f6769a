"""Stages of ``compare --test-stages``: how each changed the validation and the test loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from .axes import tidy

LOSSES = ("validation_loss", "test_loss")
"""The columns with the losses after a stage."""


def watched_stages(runs: list[dict[str, Any]]) -> pd.DataFrame:
    """Select the stages that moved the weights and were evaluated on the test set.

    Returns:
        A row for each stage, with the relative changes of the loss on its validation examples and
        on the test set, and both losses after it.
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
    """Plot the validation and the test loss after each stage, and how each stage changed them.

    On the left, a validation loss that keeps falling while the test loss does not shows
    overfitting; with new examples at each stage it scatters. On the right, a stage above the line
    has raised the loss.
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
    left.set_ylabel("loss after the stage (nats per token)")
    right.set_ylabel("change of the loss by the stage (%)")
    for axes in (left, right):
        axes.set_xlabel("optimizer steps")
        axes.legend(frameon=False, fontsize="small")
        tidy(axes)
    figure.savefig(path, dpi=150)
