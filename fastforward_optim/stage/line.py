"""The line through the values of some tensors before and after they moved.

There are two implementations of one interface: one with torch's multi-tensor operations, for all
tensors, and one with a Triton kernel, for GPU tensors where it can be compiled
(``triton_line.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Line(Protocol):
    """Holds a start and an end copy of some tensors, and writes points between and beyond them.

    Points are computed in float32 for bfloat16 and float16 tensors, and rounded once.
    """

    def set_end(self) -> bool:
        """Take the present values as the end; return True if any differs from the start."""
        ...

    def end(self) -> list[Tensor]:
        """Return the end copies; they do not keep the start alive."""
        ...

    def write(self, weight: float) -> None:
        """Write ``start + weight * (end - start)`` into the tensors, in place.

        Weight 0 is the start and weight 1 is the end, bit for bit.
        """
        ...


def line_of(tensors: list[Tensor], start: Sequence[Tensor] | None = None) -> Line:
    """Return the line of tensors of one device and one dtype.

    Args:
        tensors: the tensors to read and write.
        start: copies of their values to start from; default: the present values.
    """
    if start is not None:  # the model may have been moved or cast since the copies
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
    """A :class:`Line` with torch's multi-tensor operations: two for each point.

    Tensors that share memory, such as weights tied by ``.data``, are written one by one. Otherwise
    both in-place operations would be applied to them twice.
    """

    def __init__(self, tensors: list[Tensor], start: Sequence[Tensor] | None = None) -> None:
        self._tensors = tensors
        self._share = len({t.untyped_storage().data_ptr() for t in tensors}) < len(tensors)
        self._start = copies_of(tensors) if start is None else list(start)
        self._end: list[Tensor] = []

    def set_end(self) -> bool:
        """Take the present values as the end; return True if any differs from the start."""
        self._end = copies_of(self._tensors)
        return any(map(_differ, self._start, self._end))

    def end(self) -> list[Tensor]:
        """Return the end copies."""
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
    """Copy tensors of one device and dtype, without gradients."""
    with torch.no_grad():
        copies = list(map(torch.empty_like, tensors))
        torch._foreach_copy_(copies, list(tensors))
    return copies


def _differ(first: Tensor, second: Tensor) -> bool:
    return not torch.equal(first, second)
