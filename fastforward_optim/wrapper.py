"""A torch optimizer that wraps another one and can replace it everywhere.

Knows ``torch.optim.Optimizer`` and its contracts, and nothing of Fast Forward.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

# A method takes or undoes part of a step if its name contains a word of _STEP_WORDS and does not
# begin with a word of _QUERY_WORDS, or if its name is in _STEP_METHODS.
_STEP_WORDS = {"step", "perturb", "unperturb", "ascent", "descent", "swap", "backup", "restore"}
_QUERY_WORDS = {"get", "set", "is", "has", "can", "should", "on", "compute", "validate", "num"}
_STEP_METHODS = {"update", "update_params", "fuse_update", "fuse_update_zero3", "fused_backward"}


class OptimizerWrapper(Optimizer):
    """An ``Optimizer`` that shares ``param_groups``, ``state`` and ``defaults`` with another one.

    Other attributes of the wrapped optimizer can be read from the wrapper too, except methods that
    take or undo part of a step. To set such an attribute, set it on ``optimizer``.

    Args:
        optimizer: the optimizer to wrap.

    Attributes:
        optimizer: the wrapped optimizer.
    """

    # GradScaler must unscale the gradients itself. It would hand its scale to an optimizer that
    # supports this (a fused one), but the wrapped optimizer would never see it.
    _step_supports_amp_scaling = False

    optimizer: Optimizer

    def __init__(self, optimizer: Optimizer) -> None:
        # Optimizer.__init__ creates torch's hook tables, but through the properties below it would
        # also replace the wrapped optimizer's param_groups. Let it write to a placeholder instead.
        self.__dict__["optimizer"] = SimpleNamespace(add_param_group=lambda group: None)
        super().__init__([torch.empty(0)], {})

        self.optimizer = optimizer

    def __init_subclass__(cls, **options: Any) -> None:
        """Make classes that imitate this one delegate to the real wrapper.

        Lightning and Fabric derive a class from their own wrapper and this one, so that
        ``isinstance`` holds. Objects of that class store this wrapper as ``optimizer``, and the
        methods here would mistake it for the wrapped optimizer.
        """
        super().__init_subclass__(**options)
        if not isinstance(inspect.getattr_static(cls, "optimizer", None), property):
            return
        kinds = [kind for kind in cls.__mro__[1:] if issubclass(kind, OptimizerWrapper)]
        for name in {name for kind in kinds for name in vars(kind)}:
            found = next(kind for kind in cls.__mro__ if name in vars(kind))
            special = name.startswith("__") and name != "__repr__"
            if found in kinds and not special:
                setattr(cls, name, _delegated(name))

    if not TYPE_CHECKING:  # so that type checkers still report misspelt names

        def __getattr__(self, name: str) -> Any:
            """Return an attribute that only the wrapped optimizer has.

            Raises:
                AttributeError: there is no such attribute, or it is a method that would take a step
                    without the wrapper's knowledge.
            """
            inner = self.__dict__.get("optimizer")  # missing while a copy is being made
            if inner is None or name.startswith("__") or not hasattr(inner, name):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            value = getattr(inner, name)
            if callable(value) and _takes_a_step(name):
                raise AttributeError(
                    f"{type(inner).__name__}.{name} takes or undoes a part of a step, of which "
                    f"{type(self).__name__} would not know: give step() a closure instead, or call "
                    f"optimizer.optimizer.{name}, the wrapped optimizer's own, around which no "
                    "stage runs"
                )
            return value

    # These return the wrapped optimizer's own objects, since schedulers and users write to them.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's param groups (the same list)."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state (the same mapping)."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults (the same dict)."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call ``zero_grad`` of the wrapped optimizer."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def _is_checkpoint_probe(self) -> bool:
        """Return True if this step is part of a checkpoint, not of training.

        ``torch.distributed.checkpoint`` takes a step to make the wrapped optimizer create its
        state: the state is empty, and all learning rates and gradients are zero. The first step of
        a warm-up also has learning rate zero, but its gradients are not zero.
        """
        return (
            not self.optimizer.state
            and all(group.get("lr", 0) == 0 for group in self.param_groups)
            and not any(
                p.grad is not None and bool(p.grad.any())
                for group in self.param_groups
                for p in group["params"]
            )
        )

    # For pickling and copying: like torch, drop the hook tables and a scheduler's patched step.

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name != "step" and not name.startswith("_optimizer_")
        }


def _delegated(name: str) -> property:
    """Return a property that reads and sets an attribute of the wrapper in ``self.optimizer``."""

    def read(self: Any) -> Any:
        return getattr(self.optimizer, name)

    def write(self: Any, value: Any) -> None:
        setattr(self.optimizer, name, value)

    return property(read, write)


def _takes_a_step(name: str) -> bool:
    first, *rest = name.strip("_").split("_")
    moves = first not in _QUERY_WORDS and not _STEP_WORDS.isdisjoint((first, *rest))
    return moves or name.rstrip("_") in _STEP_METHODS
