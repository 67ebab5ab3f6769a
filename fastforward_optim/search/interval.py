"""Which steps are followed by a stage: the interval from one to the next.

Pure functions of numbers.
"""

from __future__ import annotations


def next_interval(interval: int, useful: bool, shortest: int, longest: int | None) -> int:
    """The interval after a stage: half as long after a useful one, else twice as long.

    Args:
        interval: real steps from the stage before it to this one.
        useful: whether the stage was worth its cost.
        shortest: never less than this.
        longest: never more than this; None for no limit.
    """
    following = interval // 2 if useful else 2 * interval
    return max(shortest, following if longest is None else min(longest, following))
