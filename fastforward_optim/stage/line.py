"""The line through the values of some tensors before and after they moved.

Two implementations of one interface: with torch's multi-tensor operations, for all tensors, and
with one Triton kernel, for those of a GPU where it can be compiled (``triton_line.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Line(Protocol):
    """Holds two copies of some tensors, start and end, and writes points between and beyond.

    Points are computed in float32 for bfloat16 and float16 tensors, and rounded once.
    """

    def set_end(self) -> bool:
        """Take the tensors' present values as the end; whether any differs from the start."""
        ...

    def end(self) -> list[Tensor]:
        """The copies that are the end; without them the start may be freed."""
        ...

    def write(self, weight: float) -> None:
        """Write ``start + weight * (end - start)`` into the tensors, in place.

        Weight 0 is the start and weight 1 is the end, bit for bit.
        """
        ...


def line_of(tensors: list[Tensor], start: Sequence[Tensor] | None = None) -> Line:
    """The line of tensors that are of one device and one dtype.

    Args:
        tensors: whose values are taken, and which are written into.
        start: copies of them to begin at; default: the present values.
    """
    if start is not None:  # the model may have been moved or cast since they were taken
        start = [copy.to(of.device, of.dtype) for copy, of in zip(start, tensors, strict=True)]
    if tensors[0].is_cuda:
        try:
            from . import triton_line
        except ImportError:  # torch comes without Triton on some platforms
            pass
        else:
            if triton_line.can_write(tensors, start):
                return triton_line.KernelLine(tensors, start)
    return MultiTensorLine(tensors, start)


class MultiTensorLine:
    """A :class:`Line` by torch's multi-tensor operations: two of them a point.

    Tensors that share memory, as of weights that were tied by ``.data``, are written one by one:
    of two operations in place each would be applied to it twice.
    """

    def __init__(self, tensors: list[Tensor], start: Sequence[Tensor] | None = None) -> None:
        self._tensors = tensors
        self._share = len({t.untyped_storage().data_ptr() for t in tensors}) < len(tensors)
        self._start = copies_of(tensors) if start is None else list(start)
        self._end: list[Tensor] = []

    def set_end(self) -> bool:
        """Take the tensors' present values as the end; whether any differs from the start."""
        self._end = copies_of(self._tensors)
        return any(map(_differ, self._start, self._end))

    def end(self) -> list[Tensor]:
        """The copies that are the end."""
        return self._end

    @torch.no_grad()
    def write(self, weight: float) -> None:
        """Write a point in place."""
        if weight in (0, 1):  # also where the other end is not finite
            torch._foreach_copy_(self._tensors, self._end if weight else self._start)
        elif self._share:
            for tensor, start, end in zip(self._tensors, self._start, self._end, strict=True):
                torch.lerp(start, end, weight, out=tensor)
        else:
            # lerp(start, end, weight) is computed as end - (end - start) * (1 - weight) for
            # weight > 1/2 and as start + (end - start) * weight below.
            torch._foreach_copy_(self._tensors, self._start)
            torch._foreach_lerp_(self._tensors, self._end, weight)


def copies_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors of one device and dtype, without gradients."""
    with torch.no_grad():
        copies = list(map(torch.empty_like, tensors))
        torch._foreach_copy_(copies, list(tensors))
    return copies


def _differ(first: Tensor, second: Tensor) -> bool:
    return not torch.equal(first, second)
