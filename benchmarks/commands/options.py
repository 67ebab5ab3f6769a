"""Options that several commands share, and how a wrong one is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from ..data.tasks import ALL_TASKS, TASKS
from ..methods.registry import METHODS
from ..methods.schedules import SCHEDULES
from ..methods.trainer import Method
from ..models.pretrained import MODELS
from ..runs.compare import MethodRequest


class Dtype(StrEnum):
    """Data types of the frozen weights, by torch's names."""

    float32 = "float32"
    bfloat16 = "bfloat16"


# Options that several commands share.
TaskName = Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")]
BatchSize = Annotated[int, typer.Option(help="Blocks in a step.", min=1)]
Rank = Annotated[int, typer.Option(help="Of the LoRA adapter.", min=1)]
Block = Annotated[int, typer.Option(help="Tokens in a block.", min=2)]
BudgetSteps = Annotated[float, typer.Option(help="Cost of each run, in plain steps.", min=1)]
Interval = Annotated[int, typer.Option(help="Real steps between stages.", min=1)]
Test = Annotated[int, typer.Option(help="Blocks to report on.", min=1)]
FrozenDtype = Annotated[Dtype, typer.Option(help="Of the frozen weights; the adapter is float32.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Tf32 = Annotated[bool, typer.Option(help="Matrix products in TF32.")]


def check_pool(pool: int, validation: int) -> None:
    """Refuse a pool of which a last part would be smaller than what a trial measures."""
    if pool % validation:
        raise typer.BadParameter(
            f"must be a multiple of --validation ({validation}), got {pool}", param_hint="--pool"
        )


def choose(option: str, table: Mapping[str, Any], name: str) -> Any:
    """The entry of a name; an unknown one is refused with the names that there are."""
    if name not in table:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(table)}", param_hint=option)
    return table[name]


def parse(option: str, reader: Any, text: str) -> Any:
    """What ``reader(text)`` returns; its ``ValueError`` is the option's."""
    try:
        return reader(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


POOL = 256
"""Blocks that trials are taken from, or a little less to have whole sets of them."""


Tasks = Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(ALL_TASKS)}.")]


Model = Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")]


TrainBlocks = Annotated[int, typer.Option(help="At most, to train on.", min=1)]


def parse_methods(text: str) -> list[MethodRequest]:
    """The methods of a comma-separated list, such as ``adamw/linear+cosine,loraplus@1e-4+3e-4``.

    Raises:
        ValueError: one is unknown, cannot have the schedule that is given with it, or has a rate
            that is no positive number.
    """
    words = [word.partition("@") for word in _words(text)]
    named = [(*name.partition("/"), own, rates) for name, own, rates in words]
    unknown = [name for name, *_ in named if name not in METHODS]
    if unknown or not named:
        raise ValueError(
            f"unknown: {', '.join(unknown) or 'nothing'}; choose of {', '.join(METHODS)}"
        )
    return [
        MethodRequest(
            METHODS[name],
            _schedules_of(METHODS[name], schedules) if slash else None,
            parse_rates(rates.replace("+", ",")) if at else None,
        )
        for name, slash, schedules, at, rates in named
    ]


def _schedules_of(method: Method, text: str) -> list[str]:
    asked = parse_schedules(text.replace("+", ","))
    if not set(asked) <= set(method.schedules):
        raise ValueError(f"{method.name} is run under {' or '.join(method.schedules)}, not {text}")
    return asked


def parse_schedules(text: str) -> list[str]:
    """Schedules, comma-separated; ``ValueError`` if one is unknown."""
    names = _words(text)
    if not names or not set(names) <= set(SCHEDULES):
        raise ValueError(f"expected schedules out of {', '.join(SCHEDULES)}, got {text!r}")
    return names


def parse_tasks(text: str) -> list[str]:
    """Tasks, comma-separated; ``ValueError`` if one is unknown."""
    names = _words(text)
    unknown = [name for name in names if name not in ALL_TASKS]
    if unknown or not names:
        raise ValueError(f"{(unknown or [text])[0]!r} is none of {', '.join(ALL_TASKS)}")
    return names


def parse_rates(text: str) -> list[float]:
    """Learning rates, comma-separated; ``ValueError`` if one is no positive number."""
    return _numbers(
        text, float, lambda rate: 0 < rate < math.inf, "learning rates such as 1e-4,3e-3"
    )


def parse_seeds(text: str) -> list[int]:
    """Seeds, comma-separated; ``ValueError`` if one is no number."""
    return _numbers(text, int, lambda seed: seed >= 0, "seeds such as 0,1,2")


def parse_steps(text: str) -> list[float]:
    """Lengths of runs, comma-separated; ``ValueError`` if one is not at least a step."""
    return _numbers(text, float, lambda steps: 1 <= steps < math.inf, "steps such as 120,480")


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _numbers(text: str, kind: type, fits: Callable[[Any], bool], expected: str) -> list[Any]:
    try:
        numbers = [kind(word) for word in _words(text)]
    except ValueError:
        numbers = []
    if not numbers or not all(map(fits, numbers)):
        raise ValueError(f"expected {expected}, got {text!r}")
    return list(dict.fromkeys(numbers))
