"""Random small training problems, and all that a validation function can do.

A :class:`Case` is plain data, which hypothesis draws and shrinks; the rest is made from it, the
same each time.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .conftest import bits

OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "SGD, Nesterov": lambda p, lr: torch.optim.SGD(
        p, lr=lr, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "SGD, fused": lambda p, lr: torch.optim.SGD(p, lr=lr, fused=True),
    "SGD, maximize": lambda p, lr: torch.optim.SGD(p, lr=lr, maximize=True, foreach=True),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "Adam, fused": lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True),
    "AdamW, amsgrad": lambda p, lr: torch.optim.AdamW(p, lr=lr, amsgrad=True),
    "AdamW, foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True),
    "AdamW, tensor lr": lambda p, lr: torch.optim.AdamW(p, lr=torch.tensor(lr), foreach=False),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, centered=True, momentum=0.5),
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=lr),
    "Adagrad, fused": lambda p, lr: torch.optim.Adagrad(p, lr=lr, fused=True),
    "Adadelta": lambda p, lr: torch.optim.Adadelta(p, lr=lr),
    "Adamax": lambda p, lr: torch.optim.Adamax(p, lr=lr),
    "NAdam": lambda p, lr: torch.optim.NAdam(p, lr=lr),
    "RAdam": lambda p, lr: torch.optim.RAdam(p, lr=lr),
    "ASGD": lambda p, lr: torch.optim.ASGD(p, lr=lr),
    "Rprop": lambda p, lr: torch.optim.Rprop(p, lr=lr),
    "Adafactor": lambda p, lr: torch.optim.Adafactor(p, lr=lr),
}
# torch casts what these keep in float32 to the weights' dtype on loading, except for "step".
NOT_RESUMED_EXACTLY = {"NAdam", "ASGD"}

SHAPES_OF_LOSS = ["model", "bowl", "far", "noise", "tiny noise", "flat", "zero", "stairs"]
SHAPES_OF_LOSS += ["rising", "falling", "cliff", "worst", "huge"]
HOLES = (math.nan, math.inf, -math.inf)


class Stop(BaseException):
    """What no ``except Exception`` catches."""


ERRORS: list[type[BaseException]] = [ValueError, RuntimeError, KeyboardInterrupt, Stop]


@dataclass(frozen=True)
class UserSearch:
    """A line search as a user might write it: random trials, then one of them, or "stay".

    Attributes:
        seed: of the trials.
        count: how many there are, tau = 0 included, which is not always the first or there at all.
        choice: "lowest" of the finite losses, "any" of the trials, or "stay".
        back: how far back it looks, in steps.
    """

    seed: int
    count: int
    choice: str
    back: float

    def __call__(self, evaluate: Callable[[float], float], last_tau: float, /) -> float:
        draw = random.Random(repr((self.seed, last_tau)))
        taus: list[float] = [
            draw.choice([0, 0.0, 1, 0.25, 2.5, 7, 40.0]) for _ in range(self.count)
        ]
        taus = [draw.uniform(-self.back, 3) if draw.random() < 0.3 else tau for tau in taus]
        losses = [(evaluate(tau), tau) for tau in taus]
        if self.choice == "stay" or not losses:
            return 0.0
        if self.choice == "any":
            return draw.choice(losses)[1]
        finite = [pair for pair in losses if math.isfinite(pair[0])]
        return min(finite)[1] if finite else 0.0


@dataclass(frozen=True)
class Case:
    """A run: the model, its optimizer, the stages and the validation function.

    Attributes:
        dtypes: one layer of each.
        frozen: index of a tensor that is not trained; -1 for none.
        freeze_at: step before which the first tensor is frozen; 0 for never.
        chosen: whether ``params`` is left out ("all"), or lists "some" tensors, or one "twice".
        loss: shape of the validation loss, one of ``SHAPES_OF_LOSS``.
        holes: part of the weights' values at which it is not finite.
        draws: whether the validation function draws random numbers, and adds them to the loss.
        form: what it returns: a float, a tensor, ...
        raise_at: call that raises ``error``, counted from 1 over all stages; 0 for none.
    """

    seed: int = 0
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    transposed: bool = False
    dropout: float = 0.0
    optimizer: str = "SGD"
    lr: float = 0.1
    groups: bool = False
    frozen: int = -1
    freeze_at: int = 0
    chosen: str = "all"
    interval: int = 1
    warmup: int = 0
    longer: int | None = None
    calibrate_lr: bool = False
    search: Any = None
    loss: str = "bowl"
    holes: float = 0.0
    draws: bool = False
    form: str = "float"
    raise_at: int = 0
    error: type[BaseException] = ValueError
    closure: bool = False
    steps: int = 6


class Net(nn.Module):
    """Layers of different dtypes, a tensor without dimensions and one without elements."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        sizes = [3, *(4 for _ in case.dtypes[1:]), 2]
        self.layers = nn.ModuleList(
            nn.Linear(size, next_size, dtype=dtype)
            for size, next_size, dtype in zip(sizes, sizes[1:], case.dtypes, strict=False)
        )
        if case.transposed:
            for layer in self.layers:
                layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
        self.gain = nn.Parameter(torch.ones((), dtype=case.dtypes[-1]))
        # torch's Adafactor divides by the number of elements.
        rows = 1 if case.optimizer == "Adafactor" else 0
        self.empty = nn.Parameter(torch.ones(rows, 2, dtype=case.dtypes[0]))
        self.dropout = nn.Dropout(case.dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = self.dropout(layer(inputs.to(layer.weight.dtype)).tanh())
        return (inputs * self.gain).float() + self.empty.sum().float()


class Problem:
    """A model of a case, its data and its optimizer; twice the same for the same case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(case.seed)
        self.net = Net(case)
        self.inputs, self.targets = torch.randn(12, 3), torch.randn(12, 2)
        self.params = list(self.net.parameters())
        self.first = [p.detach().clone() for p in self.params]
        if case.frozen >= 0:
            self.params[case.frozen % len(self.params)].requires_grad_(False)
        groups: Any = self.params
        if case.groups:
            groups = [{"params": self.params[1:]}, {"params": self.params[:1], "lr": 3 * case.lr}]
            if case.optimizer == "AdamW, tensor lr":
                groups[1]["lr"] = torch.tensor(3 * case.lr)
        self.optimizer = OPTIMIZERS[case.optimizer](groups, case.lr)

    def loss(self, rows: slice) -> Tensor:
        return nn.functional.mse_loss(self.net(self.inputs[rows]), self.targets[rows])

    def val_loss(self) -> Tensor:
        """On the last rows; the modes are put back, as ``ValidationLoss`` does it."""
        self.net.eval()
        try:
            return self.loss(slice(8, 12))
        finally:
            self.net.train()

    def freeze(self, number: int) -> None:
        """Freeze what is frozen from the step of that number on."""
        if 0 < self.case.freeze_at <= number:
            self.params[0].requires_grad_(False)
            self.params[0].grad = None

    def step(self, optimizer: torch.optim.Optimizer, number: int) -> None:
        """One real step on the batch of that number."""
        self.freeze(number)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(slice(4 * (number % 2), 4 * (number % 2) + 4))
            loss.backward()
            return loss

        if self.case.closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    def tracked(self, chosen: list[Tensor] | None) -> list[int]:
        """Indices of the tensors that a stage may move, by the documentation of ``params``."""
        names = set(map(id, self.params if chosen is None else chosen))
        return [i for i, p in enumerate(self.params) if p.requires_grad and id(p) in names]


@dataclass
class Call:
    """One call of the validation function: what it saw and what it returned."""

    values: list[Tensor]
    loss: float
    drawn: float | None = None


class ValFn:
    """The validation function of a case, which writes down its calls.

    It is a function of the weights' bits and of the place in the stage; the number of stages and
    calls is its state, as a checkpoint keeps it.
    """

    def __init__(self, problem: Problem) -> None:
        self.case, self.problem = problem.case, problem
        self.count = self.stages = 0
        self.calls: list[Call] = []  # of the present step
        self.error = problem.case.error("no data")
        self.keep = True  # copies of the weights

    def new_stage(self) -> None:
        self.stages += 1

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count, "stages": self.stages}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count, self.stages = state["count"], state["stages"]

    def check(self) -> None:
        """Calls are of stages only."""

    def __call__(self) -> Any:
        assert not torch.is_grad_enabled()
        self.count += 1
        if self.count == self.case.raise_at:
            torch.rand(2)
            raise self.error
        drawn = torch.rand(()).item() if self.case.draws else None
        loss = self._loss() + (0.01 * drawn if drawn else 0.0)
        kept = self.problem.values() if self.keep else []
        self.calls.append(Call(kept, loss, drawn))
        return _as_form(loss, self.case.form)

    def _loss(self) -> float:
        values = [p.detach() for p in self.problem.params]
        seed = zlib.crc32(b"".join(map(bits, values)), self.case.seed + self.stages)
        noise = random.Random(seed)
        if noise.random() < self.case.holes:
            return noise.choice(HOLES)
        return self._shape(values, noise.gauss(0, 1))

    def _shape(self, values: list[Tensor], noise: float) -> float:
        name = self.case.loss
        if name == "model":
            return self.problem.val_loss().item()
        place = len(self.calls)
        fixed = {"noise": noise, "tiny noise": 3 + 1e-4 * noise, "flat": 3.0, "zero": 0.0}
        fixed |= {"rising": 3.0 + place, "falling": 3.0 - place, "worst": HOLES[place % 3]}
        if name in fixed:
            return fixed[name]
        distance = sum(
            float((value.double() - first.double()).square().sum())
            for value, first in zip(values, self.problem.first, strict=True)
        )
        length = math.sqrt(distance) if distance >= 0 else math.nan
        if name == "cliff":
            return 3.0 - length if length < 1 else math.inf
        if name == "stairs":
            return 3.0 - 0.25 * math.floor(8 * length) if length < 1 else 3.0 + length
        if name == "huge":
            return 1e308 * (1 - length)
        return (length - (100.0 if name == "far" else 0.5)) ** 2 - 1


def _as_form(loss: float, form: str) -> Any:
    # In the dtypes that hold a Python float.
    forms: dict[str, Callable[[float], Any]] = {
        "float": float,
        "tensor": lambda x: torch.tensor(x, dtype=torch.float64),
        "matrix": lambda x: torch.tensor([[x]], dtype=torch.float64),
        "numpy": np.float64,
        "weighted": lambda x: (x, 2.0),
    }
    return forms[form](loss)


FORMS = ["float", "tensor", "matrix", "numpy", "weighted"]
