"""Refuse trainers whose loss cannot be measured on examples and compared.

Recognises the trainers of TRL by their attributes and by their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .attributes import replaced

# These trainers generate completions, but not in a method named _generate, or in other processes.
_GENERATING = (
    "A2POTrainer",
    "AsyncDistillationTrainer",
    "AsyncGRPOTrainer",
    "NashMDTrainer",
    "OnlineDPOTrainer",
    "PPOTrainer",
    "XPOTrainer",
)

_FUNCTION = (
    "pass val_data_or_fn a function without arguments that returns a loss of its own, such as the "
    "mean negative log-likelihood of given texts: ValidationLoss(trainer.model, batches)"
)


def check_trainer(trainer: Any) -> None:
    """Check that the trainer's loss on given examples measures progress.

    Raises:
        ValueError: the loss is computed on generated completions, or can rise while training works.
    """
    kind = type(trainer).__name__
    if hasattr(trainer, "_generate") or any(
        parent.__name__ in _GENERATING for parent in type(trainer).__mro__
    ):
        raise ValueError(
            f"the loss of {kind} is of completions that it generates, which differ from trial to "
            f"trial: {_FUNCTION}, or the mean reward of greedy completions with a minus sign"
        )
    option = _option_without_progress(trainer)
    if option is not None:
        raise ValueError(
            f"the loss of {kind} with {option} is no measure of progress: its weights follow the "
            "model and have no gradient, so that it can rise while training works; " + _FUNCTION
        )


def _option_without_progress(trainer: Any) -> str | None:
    """Return the option, if any, that weights the loss by the model's own detached probabilities.

    A detached baseline is fine: KTO's shifts its losses, but they stay bounded, and they are the
    losses that users report.
    """
    args = trainer.args
    loss_types = getattr(args, "loss_type", None)
    if "dft" in ([loss_types] if isinstance(loss_types, str) else loss_types or []):
        return "loss_type='dft'"
    if getattr(args, "use_weighting", False):
        return "use_weighting=True"
    if getattr(args, "distillation_objective", None) == "iw_opd":
        return "distillation_objective='iw_opd'"
    return None


@contextmanager
def no_generation(trainer: Any) -> Iterator[None]:
    """Make ``generate`` of the trainer's model raise an error with a remedy inside this context."""

    def generate(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"the loss of {type(trainer).__name__} is of what its model generates, which differs "
            f"from trial to trial: {_FUNCTION}"
        )

    model = trainer.model
    if not hasattr(model, "generate"):
        yield
        return
    with replaced(model, generate=generate):
        yield
