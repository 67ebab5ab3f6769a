"""Sharded tensors: the local part on each rank, and modules that hold gathered copies.

This module handles ``DTensor`` and FSDP2 (``fully_shard``). It does not depend on stages,
optimizers or agreement between ranks.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Return True for a ``DTensor``, of which this rank may hold only a part."""
    # This runs at every step, so it imports nothing that a plain run does not need.
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a ``DTensor``, sharing its memory; other tensors unchanged."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """Return ``part``, this rank's local part, as a tensor sharded like ``tensor``."""
    if not is_sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor

    whole: Any = tensor
    return DTensor.from_local(
        part,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def part_of(value: Tensor, tensor: Tensor) -> Tensor:
    """Return the part of ``value``, whole or sharded, that this rank holds of ``tensor``.

    Every rank must call it, unless both are sharded alike.
    """
    if is_sharded(value):
        whole: Any = value
        if is_sharded(tensor):
            of: Any = tensor
            return local(whole.redistribute(of.device_mesh, of.placements))
        return whole.full_tensor()  # type: ignore[no-any-return]
    if not is_sharded(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    of = tensor
    value = value.to(of.device_mesh.device_type)
    return local(distribute_tensor(value, of.device_mesh, of.placements))


class Gathered:
    """FSDP2 modules that go on computing with their gathered parameters.

    After a forward without gradients the root module's parameters stay gathered. The next forward
    does not see what is written into the shards: every trial would measure the same weights, and
    the next training step would use them too.

    Args:
        tensors: the tensors to be moved, as far as they are known.

    Raises:
        ImportError: some tensors are sharded, and this torch has no ``FSDPModule`` to look for.
            :meth:`drop` raises it too.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._ids: list[int] = []
        self._modules: list[weakref.ref[Any]] = []
        if any(map(is_sharded, tensors)):
            _fsdp_module()

    def drop(self, tensors: Sequence[Tensor]) -> None:
        """Make the modules gather again, if any sharded ``tensors`` are given."""
        if not tensors:
            return
        sharded = list(map(id, tensors))
        if sharded != self._ids:
            self._ids, self._modules = sharded, [weakref.ref(module) for module in _fsdp_modules()]
        for reference in self._modules:
            module = reference()
            if module is not None:
                module.reshard()


def _fsdp_modules() -> list[Any]:
    """Return all FSDP modules: no parameter knows its module, and ``val_fn`` may hide the model.

    Resharding an unrelated module costs one all-gather.
    """
    kind = _fsdp_module()
    # Not isinstance, which would make proxies resolve the object that they represent.
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]


def _fsdp_module() -> type:
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError as error:
        raise ImportError(
            "sharded parameters need torch.distributed.fsdp.FSDPModule, which torch "
            f"{torch.__version__} does not have: each trial would measure the same weights; "
            "install a torch that is built with torch.distributed"
        ) from error
    return FSDPModule
