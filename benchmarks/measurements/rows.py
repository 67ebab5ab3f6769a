"""Measured values, each a row of a table."""

from __future__ import annotations

from typing import TypedDict

from ..support.tables import print_table


class MeasuredRow(TypedDict):
    """A measured value and its unit."""

    what: str
    value: float
    unit: str


def print_rows(rows: list[MeasuredRow], title: str, about: dict[str, str]) -> None:
    """Print measured values and the conditions of the measurement."""
    print_table(
        ("what", "measured", "unit"),
        [(row["what"], f"{row['value']:.4g}", row["unit"]) for row in rows],
        title,
        "\n".join(f"{key}: {value}" for key, value in about.items()),
    )
