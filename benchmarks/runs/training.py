"""One run at equal cost: train a method until it has spent its budget, and record the result."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from torch import Tensor
from tqdm import tqdm

from ..comparison.comparison import Comparison
from ..methods.schedules import CONSTANT
from ..methods.trainer import Method, Result, Stage, Trainer

Progress = Callable[[float, float], None]
"""Called after each step with the part of the budget spent since the last call, and the latest
test loss."""


def train(
    comparison: Comparison, method: Method, lr: float, progress: Progress, schedule: str = CONSTANT
) -> Result:
    """Train until the budget is spent or the test loss is no longer finite.

    Args:
        comparison: the model, the data and the budget.
        method: what trains.
        lr: its learning rate.
        progress: called after each step.
        schedule: of the learning rate.

    Raises:
        ValueError: the budget is too small for one step and the trials that the method reserves.
    """
    comparison.restart()
    result = Result(method.name, lr, comparison.seed, schedule=schedule)
    result.curve = [(0, 0.0, comparison.initial_test_loss)]
    trainer = method.build(comparison, result)
    budget, costs = comparison.budget, comparison.costs
    needed = costs.step + trainer.reserve * costs.trial
    if needed > budget:
        raise ValueError(
            f"budget_steps must be at least {needed / costs.step:g} for {method.name}, "
            f"got {comparison.setting.budget_steps:g}"
        )
    between = budget / comparison.setting.evaluations
    started = comparison.now()
    batches = comparison.training_batches(method.trains_on_pool)
    while True:
        spent = result.flops
        take_step(comparison, trainer, batches, result)
        done = result.flops + needed > budget
        if done:
            _charge(comparison, result, trainer.finish(_room(comparison, result)))
        if done or result.flops // between > spent // between:
            result.seconds += comparison.now() - started
            with trainer.evaluating():
                result.curve.append((result.flops, result.seconds, comparison.test()))
            started = comparison.now()
        progress((result.flops - spent) / budget, result.test_loss)
        if done or result.diverged:
            result.lr_scale = float(getattr(trainer.optimizer, "lr_scale", 1.0))
            if trainer.reports_mean:
                result.last_loss = comparison.test()
            return result


def train_with_bar(
    comparison: Comparison, method: Method, lr: float, label: str, schedule: str = CONSTANT
) -> Result:
    """Train with a progress bar that shows the test loss."""
    layout = "{desc:<42} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, desc=label, bar_format=layout) as bar:

        def progress(part: float, test_loss: float) -> None:
            bar.set_postfix_str(f"test loss {test_loss:.3f}", refresh=False)
            bar.update(min(part, bar.total - bar.n))

        result = train(comparison, method, lr, progress, schedule)
        bar.update(bar.total - bar.n)
        return result


def take_step(
    comparison: Comparison, trainer: Trainer, batches: Iterator[dict[str, Tensor]], result: Result
) -> Tensor:
    """Take one step, with the stage that may follow it, and charge both to the result.

    Returns:
        The training loss, still on the device.
    """
    loss = comparison.backward(list(itertools.islice(batches, comparison.setting.accumulation)))
    result.steps += 1
    result.flops += comparison.costs.step
    _charge(comparison, result, trainer.step(_room(comparison, result)))
    if trainer.scheduler is not None:
        trainer.scheduler.step()
    if comparison.graph is None:
        trainer.optimizer.zero_grad()
    return loss


def _room(comparison: Comparison, result: Result) -> int:
    """The number of trials that the rest of the budget pays for."""
    return (comparison.budget - result.flops) // comparison.costs.trial


def _charge(comparison: Comparison, result: Result, stages: list[Stage]) -> None:
    for stage in stages:
        result.stages.append(stage)
        result.trials += stage["passes"]
        result.flops += stage["passes"] * comparison.costs.trial
