"""A Triton kernel that copies any number of GPU tensors, or writes a point on their line.

Torch's multi-tensor kernels take the addresses of a few dozen tensors as arguments, so the hundreds
of tensors of an adapter need several launches. None of these kernels writes a function of two lists
into a third list, so a candidate needs two of them, and five passes over the bytes. This kernel
reads the addresses from a table on the device: one launch, three passes.
"""

from __future__ import annotations

import functools
import itertools
import logging
from array import array
from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# The fastest on an H100 of _BLOCK = 1024 to 8192 and _PROGRAMS = 8 to 256.
_BLOCK = 8192
_PROGRAMS = 64  # per multiprocessor
# If addresses and sizes are multiples of this, memory can be read in units of 16 bytes.
_ALIGNMENT = 16
# Elements in a row of the table. A much larger tensor, such as an embedding, takes several rows, so
# that all of the GPU works on it.
_ROW = 2**20
_MAX_ROWS = 2**16  # programs in the second dimension of a grid
_PIECES = 32
_WRITE, _COPY_TO_START, _COPY_TO_END = range(3)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]
    table,
    weight,
    DTYPE: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = table + 4 * tl.program_id(1)
    target = tl.load(row).to(tl.pointer_type(DTYPE))
    start = tl.load(row + 1).to(tl.pointer_type(DTYPE))
    end = tl.load(row + 2).to(tl.pointer_type(DTYPE))
    size = tl.load(row + 3)
    if ALIGNED:  # reads memory in units of 16 bytes
        target = tl.multiple_of(target, 16)
        start = tl.multiple_of(start, 16)
        end = tl.multiple_of(end, 16)
        size = tl.multiple_of(size, 16)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for begin in range(first, size, tl.num_programs(0) * BLOCK):
        place = begin + tl.arange(0, BLOCK)
        inside = place < size
        if weight == 1:
            tl.store(target + place, tl.load(end + place, inside), inside)
        elif weight == 0:
            tl.store(target + place, tl.load(start + place, inside), inside)
        else:
            high = tl.load(end + place, inside).to(tl.float32)
            low = tl.load(start + place, inside).to(tl.float32)
            if weight < 0.5:  # as torch.lerp computes it
                point = low + weight * (high - low)
            else:
                point = high - (high - low) * (1 - weight)
            tl.store(target + place, point.to(DTYPE), inside)


class KernelLine:
    """A :class:`~fastforward_optim.stage.line.Line` with the kernel: one launch per point or copy.

    The copies are slices of one block of memory: allocating hundreds of tensors takes the host
    longer than all of a stage's work takes the GPU.

    It works with addresses, so :func:`can_write` must accept the tensors.
    """

    def __init__(self, tensors: list[Tensor], start: Sequence[Tensor] | None = None) -> None:
        self._tensors = tensors
        self._device, self._dtype = tensors[0].device, tensors[0].dtype
        self._sizes = [tensor.numel() for tensor in tensors]
        # Each copy begins at a multiple of 16 numbers: see ALIGNED.
        lengths = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in self._sizes]
        self._offsets = [0, *itertools.accumulate(lengths)]
        self._start = self._memory() if start is None else list(start)
        self._end = self._memory()
        self._addresses: list[int] = []
        processors = torch.cuda.get_device_properties(self._device).multi_processor_count
        rows = sum(max(1, triton.cdiv(size, _ROW)) for size in self._sizes)
        share = triton.cdiv(_PROGRAMS * processors, rows)
        blocks = triton.cdiv(min(max(self._sizes), _ROW), _BLOCK)
        self._grid = max(1, min(blocks, share)), rows
        if start is None:
            self._launch(_COPY_TO_START, 1.0)

    def _memory(self) -> Tensor:
        # Zeros, because the gaps between the copies are compared too.
        total = self._offsets[-1]
        gaps = total - sum(self._sizes)
        make = torch.zeros if gaps else torch.empty
        return make(total, dtype=self._dtype, device=self._device)

    def set_end(self) -> bool:
        """Take the present values as the end; return True if any differs from the start."""
        self._launch(_COPY_TO_END, 1.0)
        if not isinstance(self._start, Tensor):
            places = zip(self._offsets[:-1], self._sizes, strict=True)
            ends = (self._end[at : at + size] for at, size in places)
            return not all(map(torch.equal, map(torch.flatten, self._start), ends))
        # A comparison allocates a byte per element, so compare piece by piece; the first piece
        # usually differs.
        length = max(1, -(-len(self._end) // _PIECES))
        pieces = (slice(at, at + length) for at in range(0, len(self._end), length))
        return not all(torch.equal(self._start[piece], self._end[piece]) for piece in pieces)

    def end(self) -> list[Tensor]:
        """Return the end copies, which share one block of memory."""
        places = zip(self._offsets[:-1], self._tensors, strict=True)
        return [self._end[at : at + of.numel()].view(of.shape) for at, of in places]

    def write(self, weight: float) -> None:
        """Write a point in place."""
        self._launch(_WRITE, weight)
        # Like every in-place operation: autograd and caches rely on the version.
        torch.autograd.graph.increment_version(self._tensors)

    def _launch(self, what: int, weight: float) -> None:
        addresses = list(map(Tensor.data_ptr, self._tensors))
        if addresses != self._addresses:  # the first time, and if memory has been replaced since
            self._prepare(addresses)
        dtype = _TYPES[self._dtype]
        with torch.cuda.device(self._device):
            _write[self._grid](self._tables[what], float(weight), dtype, self._aligned, _BLOCK)

    def _prepare(self, addresses: list[int]) -> None:
        exchanged = self._addresses != []
        if exchanged and not all(map(self._is_unchanged, self._tensors, self._sizes)):
            raise RuntimeError(
                "tensors were given other sizes, dtypes or devices while a stage moved them; "
                "val_fn must leave the memory of the weights as it is"
            )
        starts, ends = self._copies_at(self._start), self._copies_at(self._end)
        columns = self._in_rows(torch.stack((_numbers(addresses), starts, ends)))
        self._aligned = not bool((columns % _ALIGNMENT).any())
        write, copy_to_start, copy_to_end = (0, 1, 2, 3), (1, 1, 0, 3), (2, 2, 0, 3)
        tables = columns[[*write, *copy_to_start, *copy_to_end]].view(3, 4, -1).transpose(1, 2)
        # A copy from pinned memory does not block.
        self._tables = tables.contiguous().pin_memory().to(self._device, non_blocking=True).unbind()
        self._addresses = addresses

    def _is_unchanged(self, tensor: Tensor, size: int) -> bool:
        found = tensor.numel(), tensor.dtype, tensor.device
        return found == (size, self._dtype, self._device) and tensor.is_contiguous()

    def _in_rows(self, addresses: Tensor) -> Tensor:
        """Split the addresses of whole tensors into addresses and sizes of rows."""
        sizes = _numbers(self._sizes)
        pieces = sizes.add(_ROW - 1).div(_ROW, rounding_mode="floor").clamp(min=1)
        of = torch.repeat_interleave(pieces)  # the tensor of each row
        done = _ROW * (torch.arange(len(of)) - (pieces.cumsum(0) - pieces)[of])
        size = (sizes[of] - done).clamp(max=_ROW)
        return torch.cat((addresses[:, of] + self._dtype.itemsize * done, size[None]))

    def _copies_at(self, copies: Tensor | list[Tensor]) -> Tensor:
        if not isinstance(copies, Tensor):
            return _numbers(map(Tensor.data_ptr, copies))
        return copies.data_ptr() + self._dtype.itemsize * _numbers(self._offsets[:-1])


def _numbers(values: Iterable[int]) -> Tensor:
    # Much faster than torch.tensor on a list.
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def can_write(tensors: Sequence[Tensor], start: Sequence[Tensor] | None = None) -> bool:
    """Return True if a :class:`KernelLine` supports these GPU tensors: plain ones, without gaps."""
    return (
        len(tensors) + sum(map(Tensor.numel, tensors)) // _ROW < _MAX_ROWS
        and {Tensor, nn.Parameter}.issuperset(map(type, tensors))
        and all(map(Tensor.is_contiguous, itertools.chain(tensors, start or ())))
        and _works(tensors[0].device, tensors[0].dtype)
    )


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if the kernel compiles here, which needs a C compiler, and is correct."""
    if dtype not in _TYPES:
        return False
    try:
        return _is_right(4096, device, dtype) and _is_right(4099, device, dtype)  # see ALIGNED
    except torch.OutOfMemoryError:  # says nothing about the kernel
        raise
    except Exception as error:
        logger.info("Fast Forward writes candidates with torch's kernels, Triton failed: %s", error)
        return False


def _is_right(size: int, device: torch.device, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, size, generator=generator).to(device, dtype).unbind()
    tensor = end.clone()
    line = KernelLine([tensor], [start])
    line.set_end()
    line.write(1.75)
    expected = torch.lerp(start, end, 1.75)
    return torch.allclose(tensor, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
