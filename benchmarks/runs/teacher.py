"""``teacher``: a fine-tuning problem with steps of milliseconds and no repeated examples.

A small network has been trained to imitate a teacher. The teacher then changes by a matrix of low
rank, and LoRA follows it. Labels are sampled from the teacher's predictions, so that the loss has a
floor above zero, and smaller batches have noisier gradients. On a CPU, many lengths, batch sizes
and learning rates take no longer than one run of a language model.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn
from tqdm import tqdm

from fastforward_optim import Calibration, FastForward, ValidationLoss

from ..methods.schedules import CONSTANT, scheduler, warmup_steps

SIZES = (32, 64, 64, 10)
RANK, SCALE, SHARPNESS = 4, 4.0, 1.5
POOL, TEST, TRIAL = 1024, 8192, 16
Batch = tuple[Tensor, Tensor]


class Lora(nn.Module):
    """A linear layer with a low-rank update."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.lora_A = nn.Parameter(torch.zeros(RANK, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, inputs) to (rows, outputs)."""
        return self.base(x) + SCALE * F.linear(F.linear(x, self.lora_A), self.lora_B)


def _net() -> nn.Sequential:
    layers = [Lora(*pair) for pair in itertools.pairwise(SIZES)]
    return nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])


def _layers(net: nn.Sequential) -> list[Lora]:
    return [layer for layer in net if isinstance(layer, Lora)]


def draw(teacher: nn.Module, rows: int, generator: torch.Generator) -> Batch:
    """Draw inputs of shape (rows, 32), and labels sampled from the teacher's predictions."""
    x = torch.randn(rows, SIZES[0], generator=generator)
    with torch.no_grad():
        probabilities = (SHARPNESS * teacher(x)).softmax(-1)
    return x, torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


class Problem(NamedTuple):
    """The network before fine-tuning, the teacher to follow, and the test examples."""

    net: nn.Sequential
    teacher: nn.Module
    test: Batch


@functools.cache
def problem(number: int) -> Problem:
    """Make the problem with this number, in about two seconds."""
    generator = torch.Generator().manual_seed(100 + number)
    old, new = _net(), _net()
    with torch.no_grad():
        for before, after in zip(_layers(old), _layers(new), strict=True):
            weight = before.base.weight
            outputs, inputs = weight.shape
            weight.copy_(torch.randn(weight.shape, generator=generator) * 2 / inputs**0.5)
            change = torch.randn(outputs, 3, generator=generator) @ torch.randn(
                3, inputs, generator=generator
            )
            after.base.weight.copy_(weight + 1.2 / (3 * inputs) ** 0.5 * change)
            before.base.bias.zero_()
            after.base.bias.zero_()
    torch.manual_seed(number)
    net = _net()
    optimizer = torch.optim.AdamW([p for layer in _layers(net) for p in layer.base.parameters()])
    steps = 1500
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        x, y = draw(old, 128, generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    for layer in _layers(net):
        layer.base.requires_grad_(False)
    return Problem(net, new, draw(new, TEST, generator))


@dataclass(frozen=True)
class Run:
    """The settings of one run.

    Attributes:
        method: ``adamw``, ``default`` (Fast Forward) or ``calibrated``.
        problem: the number of the problem.
        batch: rows in a step.
        steps: the budget in plain steps; a row of a trial costs half as much as a row of a step.
        lr: the learning rate.
        schedule: ``linear``, ``cosine`` or ``constant``.
        seed: of adapter, batches and validation examples.
        law: constants of the calibration that replace the defaults.
        epochs: how often the run sees each example; 0 for new examples in every step.
    """

    method: str
    problem: int
    batch: int
    steps: int
    lr: float
    schedule: str = "linear"
    seed: int = 0
    law: tuple[tuple[str, float], ...] = ()
    epochs: int = 0


class Outcome(NamedTuple):
    """The result of a run.

    Attributes:
        loss: final loss on the test set.
        rate: the learning rate at the peak of the schedule, with its multiplier.
        part: the fraction of the budget that trials took.
    """

    loss: float
    rate: float
    part: float


def train(run: Run) -> Outcome:
    """Train at the cost of ``run.steps`` plain steps; all trials are charged."""
    torch.set_num_threads(1)
    base, teacher, test = problem(run.problem)
    net = copy.deepcopy(base)
    torch.manual_seed(run.seed)
    for layer in _layers(net):
        nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
    generator = torch.Generator().manual_seed(1000 + run.seed)
    pool = draw(teacher, POOL, torch.Generator().manual_seed(5000 + run.seed))
    batches = list(zip(*(part.split(TRIAL) for part in pool), strict=True))
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(params, lr=run.lr)
    spent = passes = 0

    def forward(model: nn.Module, batch: Batch) -> tuple[Any, ...]:
        nonlocal spent, passes
        spent += TRIAL
        passes += 1
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses.mean(), TRIAL, (losses, torch.ones(TRIAL))

    if run.method != "adamw":
        options: dict[str, Any] = {"warmup": warmup_steps(run.schedule, run.steps)}
        if run.method == "calibrated":
            options["calibrate_lr"] = Calibration(**dict(run.law))
            options["total_steps"] = None if run.schedule == CONSTANT else run.steps
        val_fn = ValidationLoss(net, batches, forward=forward, batches_per_stage=1)
        optimizer = FastForward(optimizer, val_fn, **options)
    step_cost, budget = 2 * run.batch, 2 * run.batch * run.steps
    schedule = scheduler(run.schedule, optimizer, run.steps, lambda: spent / step_cost)
    examples = _examples(run, teacher, generator)
    while spent + step_cost <= budget:
        x, y = next(examples)
        F.cross_entropy(net(x), y).backward()
        spent += step_cost
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    rate = run.lr
    if run.method != "adamw":
        optimizer.finish()
        rate *= optimizer.history[-1].lr_scale if optimizer.history else 1.0
    with torch.no_grad():
        loss = float(F.cross_entropy(net(test[0]), test[1]))
    return Outcome(loss, rate, passes * TRIAL / budget)


def _examples(run: Run, teacher: nn.Module, generator: torch.Generator) -> Iterator[Batch]:
    """Yield batches without end."""
    if not run.epochs:
        while True:
            yield draw(teacher, run.batch, generator)
    x, y = draw(teacher, run.batch * max(1, run.steps // run.epochs), generator)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(run.batch):
            yield x[rows], y[rows]


def train_all(runs: Sequence[Run], workers: int) -> Iterator[tuple[Run, Outcome]]:
    """Train in several processes; yield each run when it has finished."""
    # The longest run first, so that no process is left with a long one at the end.
    runs = sorted(set(runs), key=lambda run: -run.steps * (run.batch + 16))
    with multiprocessing.get_context("spawn").Pool(workers) as processes:
        yield from processes.imap_unordered(_labelled, runs)


def _labelled(run: Run) -> tuple[Run, Outcome]:
    return run, train(run)


SWEEP = (2e-3, 4e-3, 6e-3, 1e-2, 1.5e-2, 2e-2, 4e-2)
SWEEP_OF_EPOCHS = (2e-4, 5e-4, 1e-3, *SWEEP)
"""The rates of AdamW's sweep; with repeated examples also lower ones, because of overfitting."""


def excess(found: dict[Run, Outcome], run: Run, seeds: Sequence[int]) -> float:
    """Return by how many percent a run ends above the best of AdamW's linearly decayed sweep."""

    def mean(lr: float) -> float:
        return sum(found[plain(run, lr, seed)].loss for seed in seeds) / len(seeds)

    return 100 * (found[run].loss / min(map(mean, sweep(run))) - 1)


def sweep(run: Run) -> Sequence[float]:
    """Return the rates of the sweep with which a run is compared."""
    return SWEEP_OF_EPOCHS if run.epochs else SWEEP


def plain(run: Run, lr: float, seed: int) -> Run:
    """Return the run of AdamW's sweep with the same settings."""
    setting = run.problem, run.batch, run.steps
    return Run("adamw", *setting, lr, seed=seed, epochs=run.epochs)


def train_and_keep(
    runs: Sequence[Run], sweep: Sequence[Run], workers: int, output: Path
) -> dict[Run, Outcome]:
    """Train all runs; those of the sweep are kept in the folder, as they do not use the library."""
    path = output / "sweep.jsonl"
    output.mkdir(parents=True, exist_ok=True)
    found = {}
    if path.exists():
        for line in path.read_text().splitlines():
            run, outcome = json.loads(line)
            found[Run(**run | {"law": ()})] = Outcome(*outcome)
    left = list(dict.fromkeys(run for run in (*sweep, *runs) if run not in found))
    with tqdm(total=len(left)) as bar, path.open("a") as file:
        for run, outcome in train_all(left, workers):
            found[run] = outcome
            if run.method == "adamw":
                file.write(json.dumps([asdict(run), outcome]) + "\n")
                file.flush()
            bar.update()
    return found
