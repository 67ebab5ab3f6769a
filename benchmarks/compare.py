"""The grid of methods, learning rates and seeds: what is to be run, what is there already.

Each finished run is one file, so that a command that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .compare_report import report
from .files import finite, write_whole
from .methods import METHODS
from .runner import Comparison, Method, Result
from .terminal import run_with_bar


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
    tf32: bool

    def folder(self, output: Path) -> Path:
        """Where the runs are kept."""
        return output / (
            f"{self.task}-{self.model}-r{self.rank}-b{self.batch_size}-t{self.block}"
            f"-n{self.budget_steps:g}"
        )


class Job(NamedTuple):
    """One run that is asked for."""

    method: Method
    lr: float
    seed: int

    @property
    def file_name(self) -> str:
        """Of the run's record."""
        return f"{self.method.name}-lr{self.lr:g}-seed{self.seed}.json"

    @property
    def label(self) -> str:
        """For a person."""
        return f"{self.method.name}, lr {self.lr:g}, seed {self.seed}"


Asked = list[tuple[Method, list[float] | None]]
"""Methods, with their own learning rates if they have some."""


def parse_methods(text: str) -> Asked:
    """The methods of a comma-separated list, such as ``adamw,loraplus@1e-4+3e-4``.

    Raises:
        ValueError: one is unknown, or a rate of its own is no positive number.
    """
    asked = [word.partition("@") for word in _words(text)]
    unknown = [name for name, _, _ in asked if name not in METHODS]
    if unknown or not asked:
        raise ValueError(
            f"unknown: {', '.join(unknown) or 'nothing'}; choose of {', '.join(METHODS)}"
        )
    return [
        (METHODS[name], parse_rates(own.replace("+", ",")) if at else None)
        for name, at, own in asked
    ]


def parse_rates(text: str) -> list[float]:
    """Learning rates, comma-separated; ``ValueError`` if one is no positive number."""
    return _numbers(
        text, float, lambda rate: 0 < rate < math.inf, "learning rates such as 1e-4,3e-3"
    )


def parse_seeds(text: str) -> list[int]:
    """Seeds, comma-separated; ``ValueError`` if one is no number."""
    return _numbers(text, int, lambda seed: seed >= 0, "seeds such as 0,1,2")


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


def grid(methods: Asked, rates: Sequence[float], seeds: Sequence[int]) -> list[Job]:
    """All runs, seed by seed; methods that ignore the rate run once a seed."""
    jobs = [
        Job(method, lr, seed)
        for seed in seeds
        for method, own in methods
        for lr in ((own or rates) if method.has_rate else (1.0,))
    ]
    return list(dict.fromkeys(jobs))


def is_finished(job: Job, plan: Plan, folder: Path) -> bool:
    """Whether the run's file is there.

    Raises:
        SystemExit: it is, but of another setting, or it cannot be read.
    """
    path = folder / job.file_name
    if not path.exists():
        return False
    try:
        found = json.loads(path.read_text())
        found = found["setting"] | {"method": found["method"], "lr": found["lr"]}
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is no record of a run: move it away ({error!r})") from None
    wanted = asdict(plan) | {"method": job.method.name, "lr": job.lr}
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
        "costs": asdict(comparison.costs),
        "about": about,
    }
    cleaned: dict[str, Any] = finite(document)
    return cleaned


class Clock:
    """Says whether another run fits into some minutes, by what the runs so far took."""

    def __init__(self, minutes: float | None, started: float) -> None:
        self.end = math.inf if minutes is None else started + 60 * minutes
        self.took: dict[str, float] = {}

    def fits(self, method: str) -> bool:
        """Whether a run of ``method`` would be over in time; the first one is tried anyhow."""
        now = time.perf_counter()
        longest = self.took.get(method, max(self.took.values(), default=0.0))
        return now < self.end and now + longest <= self.end

    def note(self, method: str, seconds: float) -> None:
        """A run of ``method`` took so long, its test evaluations included."""
        self.took[method] = max(seconds, self.took.get(method, 0.0))


def run_jobs(
    jobs: Sequence[Job],
    plan: Plan,
    folder: Path,
    load: Callable[[], tuple[Comparison, dict[str, str]]],
    clock: Clock,
) -> int:
    """Run what is not there yet.

    Args:
        jobs: all runs that are asked for.
        plan: what they share.
        folder: of the runs' files.
        load: loads model and data, and says where; called once, and only if there is a run to do.
        clock: when to stop.

    Returns:
        How many runs are left.
    """
    open_jobs = [job for job in jobs if not is_finished(job, plan, folder)]
    done = len(jobs) - len(open_jobs)
    if not open_jobs:
        return 0
    comparison, about = load()
    for number, job in enumerate(open_jobs):
        if not clock.fits(job.method.name):
            return len(open_jobs) - number
        started = time.perf_counter()
        comparison.reseed(job.seed)
        label = f"{done + number + 1}/{len(jobs)} {job.label}"
        result = run_with_bar(comparison, job.method, job.lr, label)
        write_whole(folder / job.file_name, record(plan, result, comparison, about))
        clock.note(job.method.name, time.perf_counter() - started)
    return 0


def main(
    jobs: Sequence[Job],
    plan: Plan,
    output: Path,
    load: Callable[[], tuple[Comparison, dict[str, str]]],
    clock: Clock,
    *,
    run: bool,
) -> None:
    """Run the jobs, unless ``run`` is false, and report on all the runs in the folder.

    Raises:
        SystemExit: it was interrupted (code 130), or the folder is not as it has to be.
    """
    folder = plan.folder(output)
    left = 0
    if run:
        try:
            left = run_jobs(jobs, plan, folder, load, clock)
        except KeyboardInterrupt:
            finished = sum((folder / job.file_name).exists() for job in jobs)
            message = f"Interrupted: {finished} of {len(jobs)} runs are finished and kept. "
            print(f"\n{message}The same command goes on from there.", file=sys.stderr)
            raise SystemExit(130) from None
    if not left or any(folder.glob("*.json")):
        report(folder, " ".join(["python -m benchmarks", *sys.argv[1:]]))
    if left:
        print(f"Out of time: {left} of {len(jobs)} runs are left. The same command goes on.")
