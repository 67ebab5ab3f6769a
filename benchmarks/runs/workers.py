"""Run the grid of ``compare``, in this process or in several that share the devices.

Each worker takes the next run that no other has claimed, until all are done or time runs out.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from ..comparison.comparison import Comparison, Setting
from ..data.blocks import Splits, split_and_pack
from ..data.tasks import ALL_TASKS
from ..data.token_files import load_tokens
from ..methods.registry import METHODS, check_installed
from ..models.adapters import reset_lora, with_lora
from ..models.pretrained import MODELS
from ..models.speed import attend_without_mask, compile_layers
from ..support.environment import environment, pick_device
from ..support.files import write_json
from .compare import Job, Plan, is_finished, record
from .training import train, train_with_bar

INTERRUPTED = 130
"""Exit status of a process that Ctrl-C has ended, as in shells."""


class Clock:
    """Predicts from earlier runs whether another run would end in time.

    Args:
        end: the deadline, in the seconds of ``time.time``, which all processes share.
    """

    def __init__(self, end: float = math.inf) -> None:
        self.end = end
        self._a_step: dict[str, float] = {}

    def fits(self, method: str, steps: float) -> bool:
        """Return whether a run of ``method`` would end in time; the first run always starts."""
        now = time.time()
        longest = self._a_step.get(method, max(self._a_step.values(), default=0.0))
        return now < self.end and now + steps * longest <= self.end

    def note(self, method: str, steps: float, seconds: float) -> None:
        """Record the time of a run, including its test evaluations."""
        self._a_step[method] = max(seconds / steps, self._a_step.get(method, 0.0))


class Claims:
    """The runs that workers have taken: a file for each, in a folder that all workers share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, number: int) -> bool:
        """Claim a run; return False if another worker has claimed it."""
        try:
            (self.folder / str(number)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


@dataclass
class Bench:
    """Loads model and data when they are first needed.

    Args:
        device: the value of ``--device``.
        tokens: a folder of token files to read instead of the tasks' texts.
    """

    device: str
    tokens: Path | None = None
    _model: Any = None
    _tokenizer: Any = None
    _tasks: dict[Plan, Comparison] = field(default_factory=dict)
    _sources: dict[str, str] = field(default_factory=dict)

    def comparison(self, plan: Plan) -> Comparison:
        """Return the comparison of a plan; comparisons of one task share all but the budget."""
        any_length = replace(plan, budget_steps=1.0)
        if any_length not in self._tasks:
            self._tasks[any_length] = self._load(plan)
        return self._tasks[any_length].with_budget(plan.budget_steps)

    def about(self, plan: Plan) -> dict[str, str]:
        """Return the conditions to store with the runs of a plan."""
        return environment(pick_device(self.device)) | {"source": self._sources[plan.task]}

    def _load(self, plan: Plan) -> Comparison:
        print(f"Loading {plan.model} and the {plan.task} task ...", file=sys.stderr)
        where = pick_device(self.device)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        if plan.tf32:
            torch.set_float32_matmul_precision("high")
        if self._model is None:
            base, self._tokenizer = MODELS[plan.model](getattr(torch, plan.dtype))
            attend_without_mask(base)
            self._model = with_lora(base, rank=plan.rank).to(where)
        setting = Setting(
            plan.batch_size,
            plan.budget_steps,
            plan.interval,
            plan.validation,
            plan.evaluations,
            plan.test_stages,
            cuda_graphs=plan.graphs,
        )
        splits = self._splits(plan)
        if self._tasks:
            # The shapes are the same, and compiled layers cannot be counted.
            first = next(iter(self._tasks.values()))
            reset_lora(self._model, seed=0)
            comparison = Comparison(self._model, splits, setting, costs=first.costs)
            comparison.graph = first.graph
        else:
            comparison = Comparison(self._model, splits, setting)
            if plan.compile:
                compile_layers(self._model)
        if plan.compile or plan.graphs:
            comparison.warm_up()
        if plan.graphs and comparison.graph is None:
            comparison.capture()
        return comparison

    def _splits(self, plan: Plan) -> Splits:
        sizes = {"validation": plan.pool, "test": plan.test, "train": plan.train_blocks}
        if self.tokens is None:
            task = ALL_TASKS[plan.task]
            self._sources[task.name] = task.source
            return split_and_pack(task, self._tokenizer, block=plan.block, **sizes)
        splits, self._sources[plan.task] = load_tokens(
            self.tokens, plan.task, plan.model, block=plan.block, **sizes
        )
        return splits


@dataclass(frozen=True)
class Work:
    """What a worker needs to know. It can be pickled.

    Attributes:
        jobs: all runs of the command.
        output: the folder of the folders.
        device: the value of ``--device``.
        end: the deadline, in the seconds of ``time.time``.
        tokens: a folder of token files, or None.
    """

    jobs: Sequence[Job]
    output: Path
    device: str
    end: float = math.inf
    tokens: Path | None = None

    def left(self) -> list[Job]:
        """Return the runs that are not finished."""
        return [job for job in self.jobs if not is_finished(job, self.output)]


def run_alone(work: Work) -> None:
    """Run the unfinished jobs in this process, with progress bars."""

    def run(comparison: Comparison, job: Job, label: str) -> Any:
        return train_with_bar(comparison, METHODS[job.method], job.lr, label, job.schedule)

    _run_jobs(work, lambda number: True, run)


def run_shared(work: Work, count: int) -> None:
    """Run the unfinished jobs in ``count`` processes.

    They take the GPUs in turn unless ``--device`` names one.

    Raises:
        SystemExit: a worker failed.
        KeyboardInterrupt: the workers were interrupted.
    """
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder:
        workers = [
            context.Process(
                target=_worker, args=(replace(work, device=device), Path(folder), count)
            )
            for device in worker_devices(work.device, count)
        ]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
        except KeyboardInterrupt:
            for worker in workers:  # Ctrl-C has interrupted them too
                worker.join()
            raise
    codes = [worker.exitcode for worker in workers]
    if INTERRUPTED in codes:
        raise KeyboardInterrupt
    if any(codes):
        raise SystemExit(f"{sum(map(bool, codes))} of {count} workers failed: see above")


def worker_devices(device: str, count: int) -> list[str]:
    """Return the device of each worker."""
    if pick_device(device).type != "cuda" or ":" in device:
        return [device] * count
    return [f"cuda:{number % torch.cuda.device_count()}" for number in range(count)]


def _worker(work: Work, folder: Path, count: int) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    claims = Claims(folder)

    def run(comparison: Comparison, job: Job, label: str) -> Any:
        started = time.perf_counter()
        result = train(comparison, METHODS[job.method], job.lr, lambda *_: None, job.schedule)
        seconds = time.perf_counter() - started
        # One write: print would write the newline separately, perhaps after another worker's text.
        sys.stderr.write(f"{label}: {result.test_loss:.4f} in {seconds:.1f} s\n")
        return result

    try:
        _run_jobs(work, claims.take, run)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _run_jobs(
    work: Work, take: Callable[[int], bool], run: Callable[[Comparison, Job, str], Any]
) -> None:
    """Run the jobs that can be claimed and would end in time."""
    left = set(work.left())
    check_installed([METHODS[job.method] for job in left])
    clock, bench = Clock(work.end), Bench(work.device, work.tokens)
    parent = multiprocessing.parent_process()
    for number, job in enumerate(work.jobs):
        steps = job.plan.budget_steps
        if job not in left or not clock.fits(job.method, steps) or not take(number):
            continue
        if parent is not None and not parent.is_alive():
            return
        comparison = bench.comparison(job.plan)
        started = time.perf_counter()
        comparison.reseed(job.seed)
        result = run(comparison, job, f"{number + 1}/{len(work.jobs)} {job.label}")
        about = bench.about(job.plan)
        write_json(job.path(work.output), record(job.plan, result, comparison, about))
        clock.note(job.method, steps, time.perf_counter() - started)
