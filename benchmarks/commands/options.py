"""Options that several commands share, and the errors for wrong values."""

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
    """Data types, by torch's names."""

    float32 = "float32"
    bfloat16 = "bfloat16"


TaskName = Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")]
BatchSize = Annotated[int, typer.Option(help="Blocks in a step.", min=1)]
Rank = Annotated[int, typer.Option(help="Rank of the LoRA adapter.", min=1)]
Block = Annotated[int, typer.Option(help="Tokens in a block.", min=2)]
BudgetSteps = Annotated[float, typer.Option(help="Budget of each run in plain steps.", min=1)]
Interval = Annotated[int, typer.Option(help="Real steps between stages.", min=1)]
Test = Annotated[int, typer.Option(help="Blocks in the test set.", min=1)]
FrozenDtype = Annotated[
    Dtype, typer.Option(help="Data type of the frozen weights; the adapter is float32.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Tf32 = Annotated[bool, typer.Option(help="Matrix products in TF32.")]


def check_pool(pool: int, validation: int) -> None:
    """Raise BadParameter unless the pool is a whole number of trials."""
    if pool % validation:
        raise typer.BadParameter(
            f"must be a multiple of --validation ({validation}), got {pool}", param_hint="--pool"
        )


def choose(option: str, table: Mapping[str, Any], name: str) -> Any:
    """Return the entry with this name; raise BadParameter with all names if there is none."""
    if name not in table:
        raise typer.BadParameter(
            f"expected one of {', '.join(table)}, got {name!r}", param_hint=option
        )
    return table[name]


def parse(option: str, reader: Any, text: str) -> Any:
    """Return ``reader(text)``; turn its ValueError into BadParameter of the option."""
    try:
        return reader(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


POOL = 256
"""Blocks in the pool, or slightly fewer so that they make whole trials."""


Tasks = Annotated[str, typer.Option(help=f"Tasks, comma-separated: {', '.join(ALL_TASKS)}.")]


Model = Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")]


TrainBlocks = Annotated[int, typer.Option(help="Largest number of blocks to train on.", min=1)]


def parse_methods(text: str) -> list[MethodRequest]:
    """Parse a comma-separated list of methods such as ``adamw/linear+cosine,loraplus@1e-4+3e-4``.

    Raises:
        ValueError: a method is unknown or does not support a schedule, or a rate is not a positive
            number.
    """
    words = [word.partition("@") for word in _words(text)]
    named = [(*name.partition("/"), own, rates) for name, own, rates in words]
    unknown = [name for name, *_ in named if name not in METHODS]
    if unknown or not named:
        raise ValueError(
            f"expected methods out of {', '.join(METHODS)}, got {', '.join(unknown) or 'none'}"
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
        raise ValueError(
            f"{method.name} supports the schedules {', '.join(method.schedules)}, got {text}"
        )
    return asked


def parse_schedules(text: str) -> list[str]:
    """Parse a comma-separated list of schedules; raise ValueError if one is unknown."""
    names = _words(text)
    if not names or not set(names) <= set(SCHEDULES):
        raise ValueError(f"expected schedules out of {', '.join(SCHEDULES)}, got {text!r}")
    return names


def parse_tasks(text: str) -> list[str]:
    """Parse a comma-separated list of tasks; raise ValueError if one is unknown."""
    names = _words(text)
    unknown = [name for name in names if name not in ALL_TASKS]
    if unknown or not names:
        raise ValueError(
            f"expected tasks out of {', '.join(ALL_TASKS)}, got {(unknown or [text])[0]!r}"
        )
    return names


def parse_rates(text: str) -> list[float]:
    """Parse learning rates; raise ValueError unless all are positive numbers."""
    return _numbers(
        text, float, lambda rate: 0 < rate < math.inf, "learning rates such as 1e-4,3e-3"
    )


def parse_seeds(text: str) -> list[int]:
    """Parse seeds; raise ValueError unless all are non-negative integers."""
    return _numbers(text, int, lambda seed: seed >= 0, "seeds such as 0,1,2")


def parse_steps(text: str) -> list[float]:
    """Parse lengths of runs; raise ValueError unless all are at least one step."""
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
