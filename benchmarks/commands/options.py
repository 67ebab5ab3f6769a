"""Options that several commands share, and how a wrong one is refused."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from ..data.tasks import TASKS


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
