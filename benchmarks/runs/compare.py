"""The grid of methods, schedules, learning rates, seeds, lengths and tasks.

What is to be run, and what is there already: each finished run is one file, so that a command that
was interrupted goes on where it was. How runs are shared out is in ``workers.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from fastforward_optim.integrations.shared import examples_for

from ..comparison.comparison import Comparison
from ..methods.registry import METHODS
from ..methods.trainer import Method, Result
from ..support.files import finite


@dataclass(frozen=True)
class Plan:
    """All that the runs of one folder share; see the options of ``compare``."""

    task: str
    model: str
    rank: int
    batch_size: int
    block: int
    budget_steps: float
    interval: int
    validation: int
    pool: int
    test: int
    train_blocks: int
    dtype: str
    evaluations: int
    test_stages: bool
    compile: bool
    graphs: bool
    tf32: bool

    @property
    def family(self) -> str:
        """What the folders of all lengths have in common."""
        return f"{self.task}-{self.model}-r{self.rank}-b{self.batch_size}-t{self.block}"

    def folder(self, output: Path) -> Path:
        """Where the runs are kept."""
        return output / f"{self.family}-n{self.budget_steps:g}"


class Job(NamedTuple):
    """One run that is asked for."""

    plan: Plan
    method: str
    schedule: str
    lr: float
    seed: int

    def path(self, output: Path) -> Path:
        """Of the run's record."""
        name = f"{self.method}-{self.schedule}-lr{self.lr:g}-seed{self.seed}.json"
        return self.plan.folder(output) / name

    @property
    def label(self) -> str:
        """For a person."""
        return (
            f"{self.plan.task} {self.plan.budget_steps:g}: {self.method}, {self.schedule}, "
            f"lr {self.lr:g}, seed {self.seed}"
        )


class Asked(NamedTuple):
    """A method, with schedules and learning rates of its own if it has been given some."""

    method: Method
    schedules: list[str] | None = None
    rates: list[float] | None = None


def default_validation(batch_size: int, block: int) -> int:
    """Blocks that a trial measures: as many as the callbacks take."""
    return examples_for(batch_size, block)


def plans(base: Plan, tasks: Sequence[str], steps: Sequence[float]) -> list[Plan]:
    """One for each task and length."""
    return [replace(base, task=task, budget_steps=length) for task in tasks for length in steps]


def grid(
    plans: Sequence[Plan],
    methods: Sequence[Asked],
    schedules: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
) -> list[Job]:
    """All runs: task by task, length by length, seed by seed.

    A method with schedules of its own is run under these; another under those of ``schedules`` that
    it can have, and if there is none under its first one. Methods that ignore the rate run once.
    """
    jobs = [
        Job(plan, asked.method.name, schedule, lr, seed)
        for plan in plans
        for seed in seeds
        for asked in methods
        for schedule in _chosen(asked, schedules)
        for lr in ((asked.rates or rates) if asked.method.has_rate else (1.0,))
    ]
    return list(dict.fromkeys(jobs))


def _chosen(asked: Asked, schedules: Sequence[str]) -> Sequence[str]:
    possible = asked.method.schedules
    return asked.schedules or [name for name in schedules if name in possible] or possible[:1]


def is_finished(job: Job, output: Path) -> bool:
    """Whether the run's file is there.

    Raises:
        SystemExit: it is, but of another setting, or it cannot be read.
    """
    path = job.path(output)
    if not path.exists():
        return False
    own = {"method": job.method, "schedule": job.schedule, "lr": job.lr, "seed": job.seed}
    try:
        found = json.loads(path.read_text())
        found = found["setting"] | {name: found[name] for name in own}
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is no record of a run: move it away ({error!r})") from None
    wanted = asdict(job.plan) | own
    names = sorted(found.keys() | wanted.keys())
    other = [
        f"{name} {found.get(name)!r} instead of {wanted.get(name)!r}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]
    if other:
        raise SystemExit(
            f"{path} is of another setting ({'; '.join(other)}): choose another --output, or move "
            "it away"
        )
    return True


def record(
    plan: Plan, result: Result, comparison: Comparison, about: dict[str, str]
) -> dict[str, Any]:
    """What the run's file holds; a number that is not finite is null."""
    document = {
        "setting": asdict(plan),
        **asdict(result),
        "test_loss": result.test_loss,
        "diverged": result.diverged,
        "initial_test_loss": comparison.initial_test_loss,
        "epochs": comparison.epochs(result.steps, with_pool=METHODS[result.method].trains_on_pool),
        "costs": asdict(comparison.costs),
        "about": about,
    }
    cleaned: dict[str, Any] = finite(document)
    return cleaned
