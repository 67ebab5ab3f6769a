"""Sharded tensors: each rank's own part of them, and modules that hold gathered copies.

Knows ``DTensor`` and FSDP2 (``fully_shard``). Knows nothing of stages, optimizers or agreement.
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
    """Whether this rank holds a part of the tensor only, or may do so (a ``DTensor``)."""
    # Asked for at every step: without importing what a plain run does not need.
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a ``DTensor``, sharing its memory; another tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """``part``, which is this rank's, as a tensor that is sharded as ``tensor`` is."""
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
    """Of a whole ``value``, or one that is sharded, what this rank holds of ``tensor``.

    Every rank has to call it, unless the two are sharded alike.
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
    """FSDP2's modules, which go on computing with the parameters that they have gathered.

    After a forward without gradients the root module's parameters stay gathered, and what is
    written into the shards is not seen by the next forward: every trial would measure the same
    weights, and so would the next step of training.

    Args:
        tensors: what is to be moved, as far as it is known yet.

    Raises:
        ImportError: some are sharded, and this torch has no ``FSDPModule`` to look for. So does
            :meth:`drop`.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._of: list[int] = []
        self._modules: list[weakref.ref[Any]] = []
        if any(map(is_sharded, tensors)):
            _fsdp_module()

    def drop(self, tensors: Sequence[Tensor]) -> None:
        """Have the modules gather anew, if there are any such tensors: sharded ones."""
        if not tensors:
            return
        sharded = list(map(id, tensors))
        if sharded != self._of:
            self._of, self._modules = sharded, [weakref.ref(module) for module in _fsdp_modules()]
        for reference in self._modules:
            module = reference()
            if module is not None:
                module.reshard()


def _fsdp_modules() -> list[Any]:
    """All of them: no parameter knows its module, and ``val_fn`` may hide the model.

    To gather a module once more that has nothing to do with it costs one all-gather.
    """
    kind = _fsdp_module()
    # By type: isinstance would ask proxies what they stand for.
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]


def _fsdp_module() -> type:
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError as error:
        raise ImportError(
            "sharded parameters need torch.distributed.fsdp.FSDPModule, which torch "
            f"{torch.__version__} does not have: each trial would measure the same weights"
        ) from error
    return FSDPModule
