"""The grid of ``compare``: methods, schedules, learning rates, seeds, lengths and tasks.

Each finished run is one file, so that an interrupted command can be resumed. ``workers.py`` runs
the grid.
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


@dataclass(frozen=True)
class Plan:
    """The settings that all runs in a folder share; see the options of ``compare``."""

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
        """The common part of the names of the folders of all lengths."""
        return f"{self.task}-{self.model}-r{self.rank}-b{self.batch_size}-t{self.block}"

    def folder(self, output: Path) -> Path:
        """The folder of the runs."""
        return output / f"{self.family}-n{self.budget_steps:g}"


class Job(NamedTuple):
    """One run of the grid."""

    plan: Plan
    method: str
    schedule: str
    lr: float
    seed: int

    def path(self, output: Path) -> Path:
        """The file of the run."""
        name = f"{self.method}-{self.schedule}-lr{self.lr:g}-seed{self.seed}.json"
        return self.plan.folder(output) / name

    @property
    def label(self) -> str:
        """The description in progress bars."""
        return (
            f"{self.plan.task} {self.plan.budget_steps:g}: {self.method}, {self.schedule}, "
            f"lr {self.lr:g}, seed {self.seed}"
        )


class MethodRequest(NamedTuple):
    """A method, and the schedules and learning rates that the command line gives for it alone."""

    method: Method
    schedules: list[str] | None = None
    rates: list[float] | None = None


def default_validation(batch_size: int, block: int) -> int:
    """Return the number of blocks in a trial: as many as the callbacks use."""
    return examples_for(batch_size, block)


def plans(base: Plan, tasks: Sequence[str], steps: Sequence[float]) -> list[Plan]:
    """Make a plan for each task and length."""
    return [replace(base, task=task, budget_steps=length) for task in tasks for length in steps]


def grid(
    plans: Sequence[Plan],
    methods: Sequence[MethodRequest],
    schedules: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
) -> list[Job]:
    """List all runs, ordered by task, length and seed.

    A method runs under its own schedules if it has them. Otherwise it runs under those of
    ``schedules`` that it supports, or under its first one if it supports none of them. Methods
    that ignore the learning rate run once for each schedule.
    """
    jobs = [
        Job(plan, asked.method.name, schedule, lr, seed)
        for plan in plans
        for seed in seeds
        for asked in methods
        for schedule in _schedules_of(asked, schedules)
        for lr in ((asked.rates or rates) if asked.method.has_rate else (1.0,))
    ]
    return list(dict.fromkeys(jobs))


def _schedules_of(asked: MethodRequest, schedules: Sequence[str]) -> Sequence[str]:
    possible = asked.method.schedules
    return asked.schedules or [name for name in schedules if name in possible] or possible[:1]


def is_finished(job: Job, output: Path) -> bool:
    """Return whether the file of the run exists.

    Raises:
        SystemExit: the file cannot be read, or was written with other settings.
    """
    path = job.path(output)
    if not path.exists():
        return False
    own = {"method": job.method, "schedule": job.schedule, "lr": job.lr, "seed": job.seed}
    try:
        found = json.loads(path.read_text())
        found = found["setting"] | {name: found[name] for name in own}
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is not the file of a run: move it away ({error!r})") from None
    expected = asdict(job.plan) | own
    differences = [
        f"{name} {found.get(name)!r} instead of {expected.get(name)!r}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise SystemExit(
            f"{path} was written with other settings: {'; '.join(differences)}. Choose another "
            "--output, or move it away"
        )
    return True


def record(
    plan: Plan, result: Result, comparison: Comparison, about: dict[str, str]
) -> dict[str, Any]:
    """Return the content of the file of a run."""
    return {
        "setting": asdict(plan),
        **asdict(result),
        "test_loss": result.test_loss,
        "diverged": result.diverged,
        "initial_test_loss": comparison.initial_test_loss,
        "epochs": comparison.epochs(result.steps, with_pool=METHODS[result.method].trains_on_pool),
        "costs": asdict(comparison.costs),
        "about": about,
    }
