"""The interval from one stage to the next.

The functions are pure functions of numbers.
"""

from __future__ import annotations


def next_interval(interval: int, useful: bool, shortest: int, longest: int | None) -> int:
    """Return the interval after a stage: half as long if it was useful, else twice as long.

    Args:
        interval: number of real steps from the previous stage to this one.
        useful: whether the stage was worth its cost.
        shortest: lower limit.
        longest: upper limit; None for no limit.
    """
    following = interval // 2 if useful else 2 * interval
    return max(shortest, following if longest is None else min(longest, following))
