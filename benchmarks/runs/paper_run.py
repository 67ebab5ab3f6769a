"""One run of ``paper``: train until a test loss is reached, with a log and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.checkpoint_file import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)

from ..comparison.comparison import Comparison
from ..comparison.costs import Spent
from ..methods.trainer import Method, Result, Trainer
from ..support.files import Log, finite, write_json
from .training import take_step

LOG, SUMMARY, CHECKPOINT = "log.jsonl", "result.json", "checkpoint.pt"

CLOSE = 1e-4
"""A run has reached the baseline when its test loss is within this of the baseline's."""

Progress = Callable[[int, float], None]
"""Called after each step with the number of steps so far and the latest test loss."""


@dataclass(frozen=True)
class Until:
    """When a run ends: at the latest when the comparison's budget is spent.

    Attributes:
        steps: the largest number of real steps.
        target: a test loss to come within 1e-4 of; None for no target.
        idle_stages: the number of consecutive stages without progress; None for no limit.
    """

    steps: int
    target: float | None = None
    idle_stages: int | None = None


class Run:
    """A run of one method with its folder, which gets a log, checkpoints and a summary.

    Args:
        comparison: model, data and costs.
        method: what trains.
        lr: its learning rate.
        until: when the run ends.
        folder: the folder to write to. A checkpoint there is continued.
        evaluate_every: real steps between evaluations on the test set, each with a checkpoint. A
            run with a target is also evaluated after each stage.
    """

    def __init__(
        self,
        comparison: Comparison,
        method: Method,
        lr: float,
        until: Until,
        folder: Path,
        evaluate_every: int,
    ) -> None:
        self.comparison = comparison
        self.until = until
        self.folder = folder
        self.evaluate_every = evaluate_every
        self.trained = sum(p.numel() for p in comparison.parameters)
        comparison.restart()
        self.result = Result(method.name, lr, comparison.seed)
        self.trainer: Trainer = method.build(comparison, self.result)
        self.testing = 0.0
        self.idle = 0
        # Lines to log later: reading a loss at once would make the host wait for the device.
        self._pending: list[tuple[str, dict[str, Any]]] = []
        path = folder / CHECKPOINT
        self._kept = self._load(path) if path.exists() else 0

    def train(self, progress: Progress) -> dict[str, Any]:
        """Train to the end, write the summary and return it."""
        with Log(self.folder / LOG, self._kept) as self.log:
            self._train(progress)
        summary = self._summary()
        write_json(self.folder / SUMMARY, summary)
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return summary

    def _train(self, progress: Progress) -> None:
        comparison, result = self.comparison, self.result
        if not result.curve:
            self._evaluate()
        size = comparison.setting.accumulation
        batches = islice(comparison.training_batches(), result.steps * size, None)
        started = comparison.now()
        while not self._over():
            seen = len(result.stages)
            loss = take_step(comparison, self.trainer, batches, result)
            self._pending.append(("step", {"step": result.steps, "loss": loss}))
            stages = result.stages[seen:]
            for stage in stages:
                found = stage["tau"] or stage.get("averaged")
                self.idle = 0 if found else self.idle + 1
                self._pending.append(("stage", stage))
            regular = result.steps % self.evaluate_every == 0
            if regular or self._spent_all() or (stages and self.until.target is not None):
                result.seconds += comparison.now() - started
                self._evaluate()
                if regular and not self._over():
                    self._save()
                started = comparison.now()
            progress(result.steps, result.test_loss)

    def _over(self) -> bool:
        return self._reached() or self._spent_all() or self.result.diverged

    def _spent_all(self) -> bool:
        """Whether the budget is spent, or stages no longer make progress."""
        most = self.until.idle_stages
        return (
            self.result.steps >= self.until.steps
            or self.result.flops + self.comparison.costs.step > self.comparison.budget
            or (most is not None and self.idle >= most)
        )

    def _reached(self) -> bool:
        target = self.until.target
        return target is not None and self.result.test_loss <= target + CLOSE

    def _spent(self) -> Spent:
        result = self.result
        return Spent.of(
            self.comparison.costs,
            steps=result.steps,
            trials=result.trials,
            trained=self.trained,
            seconds=result.seconds,
            testing=self.testing,
        )

    def _evaluate(self) -> None:
        """Measure the test loss, and log what has happened since the last evaluation."""
        started = self.comparison.now()
        with self.trainer.evaluating():
            loss = self.comparison.test()
        self.testing += self.comparison.now() - started
        result = self.result
        result.curve.append((result.flops, result.seconds, loss))
        for kind, values in self._pending:
            plain = {name: _number(value) for name, value in values.items()}
            if "kind" in plain:  # that of a stage; the log uses the word for the kind of line
                plain["stage"] = plain.pop("kind")
            self.log.write(kind, **plain)
        self._pending.clear()
        self.log.write(
            "evaluation",
            step=result.steps,
            trials=result.trials,
            test_loss=loss,
            **asdict(self._spent()),
        )

    def _summary(self) -> dict[str, Any]:
        result = self.result
        stages = result.stages
        document = {
            "method": result.method,
            "lr": result.lr,
            "target": self.until.target,
            "reached": self._reached() if self.until.target is not None else None,
            "initial_test_loss": result.curve[0][2],
            "test_loss": result.test_loss,
            "steps": result.steps,
            "stages": len(stages),
            "trials": result.trials,
            "idle_stages": self.idle,
            "lr_scale": float(getattr(self.trainer.optimizer, "lr_scale", 1.0)),
            **asdict(self._spent()),
            "costs": asdict(self.comparison.costs),
        }
        cleaned: dict[str, Any] = finite(document)
        return cleaned

    def _save(self) -> None:
        state = {
            "parameters": [p.detach() for p in self.comparison.parameters],
            "trainer": self.trainer.state_dict(),
            "random": random_state(),
            "result": asdict(self.result),
            "testing": self.testing,
            "idle": self.idle,
            "log": self.log.sync(),
        }
        save_checkpoint(self.folder / CHECKPOINT, state)

    def _load(self, path: Path) -> int:
        """Load a checkpoint; return the size that the log had."""
        state = load_checkpoint(path)
        with torch.no_grad():
            for parameter, saved in zip(
                self.comparison.parameters, state["parameters"], strict=True
            ):
                parameter.copy_(saved)
        self.trainer.load_state_dict(state["trainer"])
        set_random_state(state["random"])
        for name, value in state["result"].items():
            setattr(self.result, name, value)
        self.testing, self.idle = state["testing"], state["idle"]
        return int(state["log"])


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
