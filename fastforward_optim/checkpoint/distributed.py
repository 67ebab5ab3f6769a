"""Save and load all of a ``FastForward`` with ``torch.distributed.checkpoint``, on any ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.optim import Optimizer

from ..calibration.iterates import TENSORS
from .state import KEY


@runtime_checkable
class _Resumable(Protocol):
    """The methods of ``FastForward`` used here, which is in a higher layer."""

    def _saved_state(self) -> dict[str, Any]: ...

    def _loading(self, state_dict: Mapping[str, Any]) -> AbstractContextManager[Any]: ...


class OptimizerState:
    """All of a ``FastForward`` as a ``Stateful`` for ``torch.distributed.checkpoint``.

    ``get_optimizer_state_dict`` alone keeps the wrapped optimizer's state and the step counters.
    This class also keeps the history, the iterates of a calibrated run and the position of
    ``val_fn``. A checkpoint can be loaded on more or fewer ranks than it was saved on, or in one
    process. Saving and loading are collective, like torch's own functions.

    Args:
        model: the model whose parameters the optimizer holds, as torch's functions take it: wrapped
            by DDP, sharded by ``fully_shard``, or plain.
        optimizer: the ``FastForward``.
        options: torch's ``StateDictOptions``, or None.

    Examples:
        >>> import torch.distributed.checkpoint as dcp
        >>> state = {"optimizer": OptimizerState(model, optimizer)}
        >>> state["model"] = get_model_state_dict(model)
        >>> dcp.save(state, checkpoint_id="checkpoint")
        >>> # ... and in another run, on any number of ranks:
        >>> dcp.load(state, checkpoint_id="checkpoint")
        >>> set_model_state_dict(model, state["model"])
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, options: Any = None) -> None:
        if not isinstance(optimizer, _Resumable):
            raise TypeError(f"optimizer must be a FastForward, got {type(optimizer).__name__}")
        self.model = model
        self.optimizer: Any = optimizer
        self.options = options

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state by parameter name, and our part."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        wrapped = get_optimizer_state_dict(self.model, self.optimizer, options=self.options)
        part = self.optimizer._saved_state()
        tensors = {
            f"{name}.{index}": tensor
            for name in TENSORS
            for index, tensor in enumerate((part.get("iterates") or {}).pop(name, ()))
        }
        # One string, because the saved and the present history may differ in length.
        return {"wrapped": wrapped, "fast_forward": json.dumps(part), "iterates": tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict returned by :meth:`state_dict`.

        Raises:
            ValueError: the state dict is damaged, of another optimizer, or of a newer version. The
                optimizer is then unchanged, except for tensors that ``dcp.load`` has written into.
        """
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        try:
            wrapped, part = state_dict["wrapped"], json.loads(state_dict["fast_forward"])
            part.pop("shapes", None)  # parameters are matched by name, whatever their order
            if part.get("iterates") is not None:
                for name in TENSORS:
                    found = (key for key in state_dict["iterates"] if key.startswith(f"{name}."))
                    ordered = sorted(found, key=lambda key: int(key.partition(".")[2]))
                    part["iterates"][name] = [state_dict["iterates"][key] for key in ordered]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the state of the optimizer is damaged: {error!r}") from error
        with self.optimizer._loading({**wrapped, KEY: part}):
            set_optimizer_state_dict(self.model, self.optimizer, wrapped, options=self.options)
