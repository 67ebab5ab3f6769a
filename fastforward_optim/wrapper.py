"""A torch optimizer that stands in for another one everywhere.

Knows ``torch.optim.Optimizer`` and its contracts. Knows nothing of Fast Forward.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

# Methods of optimizers that take or undo a part of a step have one of these words in their names,
# unless they begin with one of the others; or they are named below.
_MOVES = {"step", "perturb", "unperturb", "ascent", "descent", "swap", "backup", "restore"}
_TELLS = {"get", "set", "is", "has", "can", "should", "on", "compute", "validate", "num"}
_ALSO_MOVE = {"update", "update_params", "fuse_update", "fuse_update_zero3", "fused_backward"}


class OptimizerWrapper(Optimizer):
    """An ``Optimizer`` whose ``param_groups``, ``state`` and ``defaults`` are the wrapped one's.

    Other attributes of the wrapped optimizer can be read from the wrapper too, except methods that
    take a part of a step. Set them on ``optimizer``.

    Args:
        optimizer: the optimizer to wrap.

    Attributes:
        optimizer: the wrapped optimizer.
    """

    # GradScaler must unscale the gradients itself: it hands its scale to optimizers that take it
    # (the fused ones), and the wrapped one would never see it.
    _step_supports_amp_scaling = False

    optimizer: Optimizer

    def __init__(self, optimizer: Optimizer) -> None:
        # Optimizer.__init__ fills torch's hook tables, but through the properties below it would
        # replace the wrapped optimizer's own param_groups: let it write into a stand-in.
        self.__dict__["optimizer"] = SimpleNamespace(add_param_group=lambda group: None)
        super().__init__([torch.empty(0)], {})

        self.optimizer = optimizer

    def __init_subclass__(cls, **options: Any) -> None:
        """Make classes that imitate ours delegate to the wrapper.

        Lightning, and Fabric, make a class of their wrapper's and ours, so that ``isinstance`` is
        true. Its objects hold ours as ``optimizer``, which our methods would take for the wrapped
        optimizer.
        """
        super().__init_subclass__(**options)
        if not isinstance(inspect.getattr_static(cls, "optimizer", None), property):
            return
        kinds = [kind for kind in cls.__mro__[1:] if issubclass(kind, OptimizerWrapper)]
        for name in {name for kind in kinds for name in vars(kind)}:
            found = next(kind for kind in cls.__mro__ if name in vars(kind))
            special = name.startswith("__") and name != "__repr__"
            if found in kinds and not special:
                setattr(cls, name, _of_the_wrapper(name))

    if not TYPE_CHECKING:  # a misspelt name stays an error to a type checker

        def __getattr__(self, name: str) -> Any:
            """What only the wrapped optimizer has.

            Raises:
                AttributeError: it has none of that name, or it would take a step past the wrapper.
            """
            inner = self.__dict__.get("optimizer")  # not there yet while a copy is made
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

    # The wrapped optimizer's own objects, never copies: schedulers and users write into them.

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
        """Reset the gradients, as the wrapped optimizer does it."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def _is_checkpoint_probe(self) -> bool:
        """Whether this step belongs to a checkpoint, not to training.

        ``torch.distributed.checkpoint`` takes one with empty state, learning rates and gradients
        all zero, to make the wrapped optimizer create its state. A warm-up's first step has
        learning rate zero too, but gradients.
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

    # Pickling and copying: torch's way drops the hook tables and what a scheduler patched in.

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name != "step" and not name.startswith("_optimizer_")
        }


def _of_the_wrapper(name: str) -> property:
    """An attribute that is read from, and set on, the wrapper that an imitation holds."""

    def read(self: Any) -> Any:
        return getattr(self.optimizer, name)

    def write(self: Any, value: Any) -> None:
        setattr(self.optimizer, name, value)

    return property(read, write)


def _takes_a_step(name: str) -> bool:
    first, *rest = name.strip("_").split("_")
    moves = first not in _TELLS and not _MOVES.isdisjoint((first, *rest))
    return moves or name.rstrip("_") in _ALSO_MOVE
