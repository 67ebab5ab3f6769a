"""Checks of the wrapped optimizer and its tensors, for the constructor of ``FastForward``."""

from __future__ import annotations

import numbers
from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

from .pull_back import held_by, pulls_back


def check_params(params: Iterable[Tensor], optimizer: Optimizer) -> list[Tensor]:
    """Return ``params`` as a list, after checking that ``optimizer`` updates them.

    Raises:
        TypeError: ``params`` is not an iterable of tensors.
        ValueError: ``params`` is empty, or ``optimizer`` does not update all of its tensors.
    """
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, got one tensor; pass [tensor]")
    if not isinstance(params, Iterable):
        raise TypeError(f"params must be an iterable of tensors, got {params!r}")
    chosen = list(params)
    if not chosen:
        raise ValueError(
            "params is empty, so there is nothing to fast-forward; leave it out to move all the "
            "tensors that optimizer updates"
        )
    wrong = [value for value in chosen if not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(
            f"params must be an iterable of tensors, got a {type(wrong[0]).__name__} in it "
            f"({wrong[0]!r}); pass model.parameters(), not named_parameters() or param groups"
        )
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    unknown = [value for value in chosen if id(value) not in known]
    if unknown:
        raise ValueError(
            f"params holds {len(unknown)} of {len(chosen)} tensors that optimizer does not update "
            f"(the first has shape {tuple(unknown[0].shape)}); choose among those in "
            "optimizer.param_groups"
        )
    return chosen


def check_optimizer(optimizer: object, wrapper: type) -> None:
    """Check that ``optimizer`` can be wrapped and is not wrapped in ``wrapper`` already.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or lacks a required attribute.
        ValueError: stages do not work with ``optimizer``, or it is already wrapped.
    """
    if isinstance(optimizer, type):
        raise TypeError(
            f"optimizer must be an instance, got the class {optimizer.__name__}; construct it "
            f"first: FastForward({optimizer.__name__}(params, lr=...), val_fn)"
        )
    _check_one_sequence(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "optimizer must be an instance of torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}; pass the optimizer itself"
        )
    inner: object = optimizer
    while isinstance(inner, Optimizer):  # look through other wrappers, such as accelerate's
        if isinstance(inner, wrapper):
            raise ValueError(
                "optimizer is wrapped in FastForward already; wrap it once, or pass "
                "optimizer.optimizer, the wrapped one"
            )
        inner = getattr(inner, "optimizer", None)
    needed = ("param_groups", "state", "defaults")
    lacking = [name for name in needed if not hasattr(optimizer, name)]
    if lacking:
        raise TypeError(
            f"optimizer must have param_groups, state and defaults, as torch's have, but "
            f"{type(optimizer).__name__} lacks {' and '.join(lacking)}; wrap the optimizer in it"
        )
    _check_steps_itself(optimizer)
    _check_leaves_jumps(optimizer)


def _check_one_sequence(optimizer: object) -> None:
    # The Schedule-Free optimizers of all packages have the option that weights their average. The
    # methods train and eval do not identify them: accelerate's wrapper has both for any optimizer,
    # and the Schedule-Free optimizers that take a closure have neither. Schedule-Free's own wrapper
    # is not an Optimizer, so this check comes before the one for the type.
    groups = getattr(optimizer, "param_groups", None) or []
    if hasattr(optimizer, "weight_lr_power") or any("weight_lr_power" in g for g in groups):
        named = optimizer
        while not hasattr(named, "weight_lr_power") and isinstance(
            getattr(named, "optimizer", None), Optimizer
        ):
            named = named.optimizer  # type: ignore[attr-defined]
        name = type(named).__name__
        raise ValueError(
            f"optimizer is Schedule-Free ({name}): it keeps a second sequence of weights, from "
            "which a stage would part the first; wrap an optimizer with one sequence, such as "
            f"torch.optim.AdamW, or train with {name} alone"
        )


def _check_leaves_jumps(optimizer: Optimizer) -> None:
    found = pulls_back(optimizer)
    if found is None:
        return
    name = type(found).__name__
    inner = next(iter(held_by(found).values()), None)
    if inner is None:
        remedy = "wrap an optimizer that goes on from the weights, such as torch.optim.AdamW"
    else:
        kind = type(inner).__name__
        remedy = f"wrap the {kind} that {name} holds in FastForward, and leave {name} out"
    raise ValueError(
        f"optimizer takes jumps of the weights back ({name}): it goes on from weights that it "
        "keeps itself, such as slow ones, an average, or those where it started, so that its next "
        f"steps would undo what a stage does; {remedy}, or train with {name} alone"
    )


def _check_steps_itself(optimizer: Optimizer) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    stepped = [p for p in params if getattr(p, "_in_backward_optimizers", None)]
    if stepped:
        raise ValueError(
            f"optimizer holds {len(stepped)} of {len(params)} tensors that other optimizers step "
            f"in backward (the first has shape {tuple(stepped[0].shape)}), and drop the gradient "
            "of: its own step would not move them; leave out _apply_optimizer_in_backward, or "
            "leave these tensors out of optimizer"
        )


def check_learning_rates(optimizer: Optimizer) -> None:
    """Raise ``ValueError`` if a param group has no learning rate that can be scaled."""
    for index, group in enumerate(optimizer.param_groups):
        rate = group.get("lr")
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real | Tensor):
            raise ValueError(
                f"calibrate_lr=True needs a learning rate in every param group, group {index} of "
                f"{type(optimizer).__name__} has lr = {rate!r}; pass lr=, or calibrate_lr=False"
            )
        if group.get("safeguard_warmup"):
            # Prodigy's estimate is a ratio; this option removes the rate from its denominator.
            raise ValueError(
                f"calibrate_lr=True does not go with safeguard_warmup=True, which group {index} of "
                f"{type(optimizer).__name__} has: its estimate of the step size would grow with "
                "the rate; pass safeguard_warmup=False, or calibrate_lr=False"
            )
