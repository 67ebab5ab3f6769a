"""The pictures of the documentation, each drawn from a run that this script makes.

Every figure is the same on the same machine and versions: seeded, on the CPU, nothing downloaded.
Run it from the root of the repository; all of it takes a few minutes on two cores:

    python -m docs.figures            # all
    python -m docs.figures history    # or some, by name
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from benchmarks.data.blocks import split_and_pack
from benchmarks.data.tasks import TASKS
from benchmarks.models.adapters import with_lora
from benchmarks.models.pretrained import smollm2
from examples.plain_loop import batch, make_model
from fastforward_optim import (
    BracketSearch,
    FastForward,
    History,
    RepeatSearch,
    ValidationLoss,
    lora_parameters,
)

Trial = tuple[float, float]
BEYOND = (26.0, 29.0, 36.0, 40.0, 48.0, 56.0)

IMAGES = Path(__file__).parent / "images"
# Okabe and Ito's palette, which colour-blind readers can tell apart.
ORANGE, BLUE, GREY = "#D55E00", "#0072B2", "#999999"
STYLE = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 14,
    "legend.frameon": False,
    "savefig.dpi": 130,
}


def stage() -> Figure:
    """What one stage does: SmolLM2-135M, medical text, the first stage at a rate of 3e-4."""
    base, tokenizer = smollm2()
    model = with_lora(base, rank=8)
    data = split_and_pack(TASKS["medical"], tokenizer, block=24, validation=32, test=1, train=144)
    val_fn = ValidationLoss(model, [data.validation.batch("cpu")])
    seen: dict[str, list[Trial]] = {"default": [], "paper": [], "beyond": []}

    def search(evaluate: Callable[[float], float], last_tau: float) -> float:
        """The default search; then the paper's, and more of the curve, along the same line."""
        measured = cache(evaluate)

        def noted(name: str) -> Callable[[float], float]:
            def evaluate_and_note(tau: float) -> float:
                seen[name].append((tau, measured(tau)))
                return seen[name][-1][1]

            return evaluate_and_note

        chosen = BracketSearch()(noted("default"), last_tau)
        RepeatSearch()(noted("paper"), last_tau)
        for tau in BEYOND:
            noted("beyond")(tau)
        return chosen

    optimizer = FastForward(
        torch.optim.AdamW(lora_parameters(model), lr=3e-4), val_fn, line_search=search
    )
    for part in data.train.split(24):
        model(**part.batch("cpu")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return draw_stage(**seen)


def draw_stage(default: list[Trial], paper: list[Trial], beyond: list[Trial]) -> Figure:
    """The trials of two searches along one line, and more of the line's loss."""
    best = min(default, key=lambda trial: trial[1])
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*sorted({*default, *paper, *beyond}), strict=True), color=GREY, zorder=1)
    axes.plot(
        *zip(*default, strict=True),
        "o",
        color=BLUE,
        markersize=19,
        label=f"the default search: {len(default)} trials, in this order",
    )
    axes.plot(
        [tau for tau, _ in paper],
        [best[1] - 0.35] * len(paper),
        "|",
        color=ORANGE,
        markersize=14,
        markeredgewidth=2,
        label=f"the paper's rule: {len(paper)} trials, one after the other",
    )
    for number, point in enumerate(default, start=1):
        axes.annotate(str(number), point, color="white", ha="center", va="center_baseline")
    near = {"textcoords": "offset points", "ha": "center"}
    axes.annotate("the anchor: weights\nafter the real step", default[0], (58, -48), **near)
    axes.annotate(f"chosen: tau = {best[0]:.3g}", best, (-70, -18), color=BLUE, **near)
    axes.annotate(
        f"stops at {paper[-1][0]:g}", (paper[-1][0], best[1] - 0.35), (52, -5), color=ORANGE, **near
    )
    axes.set_title(
        f"One stage: the last step is worth {best[0]:.0f} more of its kind "
        f"(loss {default[0][1]:.2f} to {best[1]:.2f})"
    )
    # Linear up to 1, then doubling, as the search does.
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks([0, *(2**power for power in range(7))])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tau: how many times the last step is repeated")
    axes.set_ylabel("validation loss (nats a token)")
    axes.margins(0.06, 0.1)
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.98))
    return figure


def history() -> Figure:
    """``History.plot`` of a run at a rate that is too low, as in ``examples/plain_loop.py``."""
    return train(lr=3e-4, steps=60).plot()


def calibrated() -> Figure:
    """The same with ``calibrate_lr=True``, from a rate that is far too low."""
    return train(lr=1e-5, steps=300, calibrate_lr=True).plot()


def train(lr: float, steps: int, **options: Any) -> History:
    """A run of the small Llama that learns to count."""
    model = make_model()
    pool = [batch(seed) for seed in range(10_000, 10_016)]
    val_fn = ValidationLoss(model, pool, batches_per_stage=2)
    optimizer = FastForward(torch.optim.AdamW(lora_parameters(model), lr=lr), val_fn, **options)
    for seed in range(steps):
        model(**batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finish()
    return optimizer.history


FIGURES: dict[str, Callable[[], Figure]] = {
    "stage": stage,
    "history": history,
    "calibrated": calibrated,
}


def main(names: list[str]) -> None:
    """Draw the figures of these names, or all."""
    IMAGES.mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        for name in names or FIGURES:
            path = IMAGES / f"{name}.png"
            # Without the version of matplotlib the same run gives the same bytes.
            FIGURES[name]().savefig(path, metadata={"Software": None})
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
