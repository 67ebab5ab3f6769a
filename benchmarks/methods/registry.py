"""All methods by name."""

from __future__ import annotations

import importlib.util

from fastforward_optim import BracketSearch, RepeatSearch

from .adamw import MeanTrainer, adamw, clipped_adamw
from .fast_forward import calibrated, fast_forward
from .lora_plus import loraplus
from .prodigy import prodigy
from .reference import reference
from .schedule_free import ScheduleFreeTrainer
from .schedules import CONSTANT, WARMUP
from .trainer import Method

_ALL = (
    Method("adamw", "AdamW.", adamw, trains_on_pool=True),
    Method(
        "adamw-mean",
        "AdamW, exponential mean of the iterates over the last tenth of the budget.",
        MeanTrainer,
        trains_on_pool=True,
        schedules=(CONSTANT,),
    ),
    Method("reference", "The authors' rule as their code behaves.", reference),
    Method(
        "repeat",
        "RepeatSearch at a fixed interval, the paper's rule.",
        fast_forward(fixed_interval=True, line_search=RepeatSearch()),
    ),
    Method("bracket", "BracketSearch, the default.", fast_forward(line_search=BracketSearch())),
    Method("calibrated", "calibrate_lr on fresh examples out of the pool.", calibrated),
    Method(
        "prodigy",
        "Prodigy, lr 1, without a schedule or with a cosine one, as its README advises.",
        prodigy,
        trains_on_pool=True,
        has_rate=False,
        package="prodigyopt",
        schedules=(CONSTANT, "cosine"),
    ),
    Method(
        "schedulefree",
        f"Schedule-Free AdamW, warm-up over {WARMUP:.0%} of the budget.",
        ScheduleFreeTrainer,
        trains_on_pool=True,
        package="schedulefree",
        schedules=(CONSTANT,),
    ),
    Method("loraplus", "LoRA+, ratio 16, on AdamW.", loraplus, trains_on_pool=True),
    Method(
        "adamw-clipped",
        "AdamW, gradients clipped at norm 1, the default of transformers.",
        clipped_adamw,
        trains_on_pool=True,
    ),
)
METHODS = {method.name: method for method in _ALL}


def check_installed(methods: list[Method]) -> None:
    """Raise SystemExit if a package that one of the methods needs is not installed."""
    packages = {method.package for method in methods if method.package}
    missing = sorted(p for p in packages if importlib.util.find_spec(p) is None)
    if missing:
        raise SystemExit(f"missing packages: run `pip install {' '.join(missing)}`")
