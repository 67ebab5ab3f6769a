"""The paper's measure, for the runs of ``compare``: the cost saved in reaching AdamW's loss."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from ..methods.schedules import CONSTANT
from ..runs.paper_run import CLOSE

Run = dict[str, Any]


def savings(runs: list[Run], rates: tuple[float, ...] = (2e-5, 1e-4)) -> pd.DataFrame:
    """Find the cost at which each run reaches the final loss of AdamW.

    The first evaluation counts at which the test loss is within 1e-4, so the resolution depends on
    ``--evaluations``.

    Args:
        runs: the files of finished runs.
        rates: the baselines: AdamW at these constant rates, if they have been run.

    Returns:
        A row for each method, schedule, rate and baseline, with the mean of the cost saved, in
        percent of the baseline's cost, over the seeds that reached its loss; the number of these
        seeds, and of all seeds.
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
