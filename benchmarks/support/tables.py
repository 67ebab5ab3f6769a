"""Tables, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

Row = tuple[str, ...]
"""The text of a row, cell by cell."""


def print_table(columns: Row, rows: Sequence[Row], title: str, note: str) -> None:
    """Print a table. The first column is aligned left, the others right."""
    table = Table(
        title=title,
        caption=note,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def markdown_table(columns: Row, rows: Sequence[Row]) -> str:
    """Format a table in Markdown, aligned as in :func:`print_table`."""
    lines = [columns, ("---", *("---:" for _ in columns[1:])), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
