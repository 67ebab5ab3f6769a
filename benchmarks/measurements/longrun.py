"""``longrun``: memory, drift and time per stage over ten thousand steps of a small model.

There are three runs. In the first, every stage rolls back, and the run must equal a plain run bit
for bit. In the second, stages commit freely, and each committed point is recomputed in float64. The
third calibrates the learning rate.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastforward_optim import FastForward
from fastforward_optim.record import StageRecord
from fastforward_optim.search.line_search import Evaluate

from ..support.environment import environment
from ..support.memory import live_tensor_bytes
from .rows import MeasuredRow, print_rows


class Student(nn.Module):
    """Two layers, the second in bfloat16, with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 64)
        self.dropout = nn.Dropout(0.1)
        self.second = nn.Linear(64, 4, dtype=torch.bfloat16)

    def forward(self, inputs: Tensor) -> Tensor:
        """Predictions of shape (rows, 4), in float32."""
        hidden = self.dropout(self.first(inputs).tanh())
        out: Tensor = self.second(hidden.bfloat16()).float()
        return out


class Run:
    """A deterministic run in which a student learns from a teacher's noisy answers.

    Args:
        device: the device to use.
        options: of ``FastForward``; None for a run without it.
    """

    def __init__(self, device: torch.device, options: dict[str, Any] | None) -> None:
        torch.manual_seed(0)
        self.inputs = torch.randn(1024, 16).to(device)
        teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(device)
        with torch.no_grad():
            self.targets = teacher(self.inputs) + 0.1 * torch.randn(1024, 4).to(device)
        self.model = Student().to(device)
        self.adamw = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.optimizer: torch.optim.Optimizer = self.adamw
        if options is not None:
            self.optimizer = FastForward(self.adamw, self.val_loss, **options)
        torch.manual_seed(1)

    def loss(self, rows: slice) -> Tensor:
        """Return the mean squared error on rows of the data."""
        return nn.functional.mse_loss(self.model(self.inputs[rows]), self.targets[rows])

    def val_loss(self) -> Tensor:
        """Return the loss on the last rows, with dropout: stages must restore the generators."""
        return self.loss(slice(960, None))

    def step(self, number: int) -> None:
        """Train on the batch with this number."""
        start = 64 * (number % 15)
        self.loss(slice(start, start + 64)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bits(self) -> bytes:
        """Return weights, moments and the states of the generators as bytes."""
        states = [value for state in self.adamw.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *states, torch.get_rng_state()]
        if self.inputs.is_cuda:
            tensors.append(torch.cuda.get_rng_state(self.inputs.device))
        return b"".join(
            t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors
        )


def roll_back(evaluate: Evaluate, last_tau: float, /) -> float:
    """A line search that measures several points and returns to the start."""
    for tau in (0.0, 1.0, 50.0, 0.3):
        evaluate(tau)
    return 0.0


@dataclass
class Memory:
    """The memory in use, sampled after a tenth of a run and at its end.

    Attributes:
        tensors: bytes of the tensors' storages at each sample.
        process: resident bytes of the process; empty if the system does not report them.
        peak: on a GPU, the peak in bytes since the previous sample.
    """

    device: torch.device
    tensors: list[int] = field(default_factory=list)
    process: list[int] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)

    def sample(self) -> None:
        """Record the memory in use."""
        if self.device.type == "cuda":
            self.tensors.append(torch.cuda.memory_allocated(self.device))
            self.peak.append(torch.cuda.max_memory_allocated(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.tensors.append(live_tensor_bytes())
        status = Path("/proc/self/statm")
        if status.exists():
            pages = int(status.read_text().split()[1])
            self.process.append(pages * 4096)

    def rows(self, name: str) -> list[MeasuredRow]:
        """Return the growth from the first sample to the last."""
        samples = {"tensors": self.tensors, "process": self.process, "peak on the GPU": self.peak}
        return [
            _row(f"{name}: {what}, growth after the first tenth", values[-1] - values[0], "bytes")
            for what, values in samples.items()
            if values
        ]


class Candidates:
    """Compares committed points with ``anchor + tau * (anchor - before)`` in float64.

    Attributes:
        worst: the largest error so far, divided by the allowed rounding error: half a unit in the
            last place of the tensor's type, plus u * (1 + 4 * tau) * |anchor - before|, where u is
            half a unit of float32.
        committed: the number of stages that moved the weights.
    """

    def __init__(self, run: Run) -> None:
        self.tensors = list(run.model.parameters())
        self.before = [torch.empty_like(p, requires_grad=False) for p in self.tensors]
        self.anchor = [torch.empty_like(p, requires_grad=False) for p in self.tensors]
        self.worst, self.committed = 0.0, 0
        run.adamw.register_step_pre_hook(lambda *_: self._copy(self.before))
        run.adamw.register_step_post_hook(lambda *_: self._copy(self.anchor))

    @torch.no_grad()
    def _copy(self, into: list[Tensor]) -> None:
        torch._foreach_copy_(into, self.tensors)

    @torch.no_grad()
    def check(self, record: StageRecord) -> None:
        """Check the point that a stage has committed."""
        self.committed += record.tau != 0
        for tensor, before, anchor in zip(self.tensors, self.before, self.anchor, strict=True):
            step = anchor.double() - before.double()
            exact = anchor.double() + record.tau * step
            u = torch.finfo(torch.float32).eps / 2
            half = torch.finfo(tensor.dtype).eps / 2 * exact.abs()
            allowed = half + u * (exact.abs() + (1 + 4 * abs(record.tau)) * step.abs())
            error = (tensor.double() - exact).abs()
            worst = float((error / allowed.clamp(min=torch.finfo(torch.float32).tiny)).max())
            self.worst = max(self.worst, worst if math.isfinite(worst) else math.inf)


def report(device: torch.device, steps: int, interval: int) -> tuple[list[MeasuredRow], bool]:
    """Run all three and print a table.

    Returns:
        The measured values, and whether no promise about memory and weights was broken.
    """
    plain = Run(device, None)
    _train(plain, steps, "plain")
    fixed = {"interval": interval, "max_interval": interval}
    back = Run(device, fixed | {"line_search": roll_back})
    back_memory = _train(back, steps, "stages that roll back")
    same = plain.bits() == back.bits()

    checks: list[Callable[[StageRecord], None]] = []
    forward = Run(device, fixed | {"on_stage": lambda record: checks[0](record)})
    candidates = Candidates(forward)
    checks.append(candidates.check)
    forward_memory = _train(forward, steps, "stages that go on")

    calibrated = Run(device, fixed | {"calibrate_lr": True})
    calibrated_memory = _train(calibrated, steps, "calibrated")

    rows = [
        _row("rolled back: weights, moments, generators as in the plain run", same, "1 is yes"),
        _row("committed: stages that moved the weights", candidates.committed, "stages"),
        _row("committed: largest error / rounding allowed", candidates.worst, "at most 1"),
    ]
    flat = True
    for name, run, memory in (
        ("rolled back", back, back_memory),
        ("committed", forward, forward_memory),
        ("calibrated", calibrated, calibrated_memory),
    ):
        assert isinstance(run.optimizer, FastForward)
        rows += [*memory.rows(name), *_history_rows(name, list(run.optimizer.history))]
        flat = flat and memory.tensors[-1] <= memory.tensors[0]
    title = f"{steps} steps, a stage after every {interval}: does anything grow or drift?"
    print_rows(rows, title, environment(device))
    return rows, same and flat and candidates.worst <= 1


def _train(run: Run, steps: int, label: str) -> Memory:
    memory = Memory(run.inputs.device)
    for number in tqdm(range(1, steps + 1), desc=label, file=sys.stderr, mininterval=1):
        run.step(number)
        if number in (steps // 10, steps):
            memory.sample()
    return memory


def _history_rows(name: str, history: list[StageRecord]) -> list[MeasuredRow]:
    """Measure the first and the last stages, and the memory of their records."""
    tenth = max(len(history) // 10, 1)
    seconds = [record.seconds / max(record.passes, 1) for record in history]
    return [
        _row(f"{name}: stages", len(history), ""),
        _row(f"{name}: first tenth, per trial", 1e3 * statistics.median(seconds[:tenth]), "ms"),
        _row(f"{name}: last tenth, per trial", 1e3 * statistics.median(seconds[-tenth:]), "ms"),
        _row(f"{name}: history, per stage", _size(history) / len(history), "bytes"),
    ]


def _size(value: Any) -> int:
    """Return the bytes of an object and everything it holds."""
    size = sys.getsizeof(value)
    if isinstance(value, StageRecord):
        return size + _size(vars(value))
    if isinstance(value, dict):
        return size + sum(map(_size, value.values()))
    if isinstance(value, list | tuple):
        return size + sum(map(_size, value))
    return size


def _row(what: str, value: float, unit: str) -> MeasuredRow:
    return {"what": what, "value": float(value), "unit": unit}
