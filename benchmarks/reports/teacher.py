"""The tables of ``teacher``: excess loss by length and batch size, and the effect of constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from ..runs.teacher import Outcome, Run, excess
from ..support.tables import markdown_table


def main_table(
    found: dict[Run, Outcome], runs: Sequence[Run], method: str, seeds: Sequence[int]
) -> str:
    """Tabulate the mean and worst excess by length and batch size."""
    runs = [run for run in runs if run.method == method]
    batches = sorted({run.batch for run in runs})
    rows = []
    for length in sorted({run.steps for run in runs}):
        cells = []
        for batch in batches:
            cell = [run for run in runs if (run.steps, run.batch) == (length, batch)]
            values = [excess(found, run, seeds) for run in cell]
            part = fmean(found[run].part for run in cell)
            cells.append(f"{fmean(values):+.1f} / {max(values):+.1f} ({part:.1%})")
        rows.append((f"{length}", *cells))
    title = f"{method}: % above the best decayed AdamW, mean / worst (trials' part of the budget)\n"
    return f"{title}\n{markdown_table(('steps', *(f'batch {b}' for b in batches)), rows)}"


def constants_table(
    found: dict[Run, Outcome],
    base: Sequence[Run],
    changed: dict[tuple[str, float], list[Run]],
    seeds: Sequence[int],
) -> str:
    """Tabulate by how much each constant changes the mean excess over all runs."""

    def mean(runs: Sequence[Run]) -> float:
        return fmean(excess(found, run, seeds) for run in runs)

    rows = [
        (name, *(_change(changed.get((name, times)), mean, mean(base)) for times in (0.5, 2.0)))
        for name in dict.fromkeys(name for name, _ in changed)
    ]
    title = f"constants: change of the mean, {mean(base):+.2f} %, in points\n"
    return f"{title}\n{markdown_table(('constant', 'halved', 'doubled'), rows)}"


def _change(runs: list[Run] | None, mean: Callable[[Sequence[Run]], float], before: float) -> str:
    return "-" if runs is None else f"{mean(runs) - before:+.2f}"
