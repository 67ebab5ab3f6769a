"""Forwards as CUDA graphs: the kernels of one forward, recorded once and started together.

Where a model's kernels are so short that starting them one by one takes longer than running them,
as of a small model or a small validation set, a forward takes as long as its kernels then.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..stage.sharded import is_sharded
from .batches import map_tensors

# Of shapes of batches. Each graph takes some megabytes for its kernels' arguments.
_MOST = 64

# Replayed kernels are the same ones, but the libraries may choose others while they are recorded.
_TOLERANCE = 1e-3

Function = Callable[[Any], Any]


class CudaGraphs:
    """Calls a function of a batch, and replays it as a CUDA graph where it can.

    The first call with a batch of new shapes runs the function as it is, and then records it. The
    second one runs both and compares the results; from the third on the graph is replayed. The
    graph reads the model's tensors where they are, so that it sees what is written into them.
    Where recording fails or the results differ, a warning says so and the function is called.

    Args:
        model: whose tensors the function reads.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._graphs: dict[Hashable, _Graph] = {}
        self._recorded_with: list[tuple[int, int, bool]] = []
        self._pool: Any = None
        self._possible = True

    def __getstate__(self) -> dict[str, Any]:
        # A graph cannot be copied: a copy records its own.
        return vars(self) | {"_graphs": {}, "_recorded_with": [], "_pool": None}

    def check(self) -> None:
        """Forget the graphs if the model has other tensors now, or trains others."""
        if not self._possible:
            return
        tensors = _tensors_of(self._model)
        if any(map(is_sharded, tensors)):
            self._give_up("the model's tensors are sharded")
            return
        here = [(id(t), t.data_ptr(), t.requires_grad) for t in tensors]
        if here != self._recorded_with:
            self._forget()
            self._recorded_with = here

    def __call__(self, function: Function, batch: Any) -> Any:
        """What the function returns for ``batch``; it is the same function each time.

        Tensors, numbers, None, and tuples of these.
        """
        shapes = _key(batch)
        graph = self._graphs.get(shapes)
        if graph is not None:
            replayed = graph.replay(batch)
            if graph.is_checked:
                return replayed
            result = function(batch)
            graph.is_checked = _is_close(result, replayed)
            if not graph.is_checked:
                self._give_up("a replayed forward gave another loss than the model does")
            return result
        result = function(batch)
        self.record(function, batch)
        return result

    def record(self, function: Function, batch: Any) -> None:
        """Record the call, so that the next one with a batch of these shapes can be compared."""
        shapes = _key(batch)
        if self._possible and shapes is not None and len(self._graphs) < _MOST:
            self._record(shapes, function, batch)

    def _record(self, shapes: Hashable, function: Function, batch: Any) -> None:
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[shapes] = _Graph(function, batch, self._pool)
        except Exception as error:
            self._give_up(f"the model's forward cannot be recorded ({_first_line(error)})")

    def _give_up(self, reason: str) -> None:
        self._possible = False
        self._forget()
        warnings.warn(
            f"ValidationLoss goes on without CUDA graphs: {reason}; leave cuda_graphs out",
            stacklevel=2,
        )

    def _forget(self) -> None:
        self._graphs.clear()
        self._pool = None


class _Graph:
    """One recorded call, with the memory that it reads the batch from."""

    def __init__(self, function: Function, batch: Any, pool: Any) -> None:
        self.is_checked = False
        own = map_tensors(torch.clone, batch)
        self._inputs = _tensors_in(own)
        self._graph = torch.cuda.CUDAGraph()
        device = self._inputs[0].device
        generator = torch.cuda.default_generators[device.index]
        state = generator.get_state()
        # Copies of weights that autocast keeps would be read when they are long out of date.
        torch.clear_autocast_cache()
        try:
            with (
                torch.cuda.device(device),
                # Other threads, a DataLoader's say, may go on allocating.
                torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"),
            ):
                self._output = function(own)
        except BaseException:
            # It still takes itself to be recorded, and would refuse to draw; a copy does not.
            generator.graphsafe_set_state(generator.clone_state())
            generator.set_state(state)
            raise
        finally:
            torch.clear_autocast_cache()

    def replay(self, batch: Any) -> Any:
        torch._foreach_copy_(self._inputs, _tensors_in(batch))
        self._graph.replay()
        # The next replay writes over it.
        return map_tensors(torch.clone, self._output)


def _tensors_of(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers; in a fraction of the time that ``named_parameters`` takes."""
    found: list[Tensor] = []
    modules, seen = [model], set()
    while modules:
        module = modules.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found += [t for t in module._parameters.values() if t is not None]
        found += [t for t in module._buffers.values() if t is not None]
        modules += [child for child in module._modules.values() if child is not None]
    return found


def _tensors_in(value: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    map_tensors(tensors.append, value)
    return tensors


def _key(batch: Any) -> Hashable:
    """What two calls have in common that can share a graph; None if a call can have none."""
    shapes = _shapes(batch)
    if shapes is None or not _tensors_in(batch):
        return None
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return shapes, autocast


def _shapes(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device) if value.is_cuda else None
    if isinstance(value, dict):
        parts = [(name, _shapes(item)) for name, item in value.items()]
        return None if any(shapes is None for _, shapes in parts) else tuple(parts)
    if isinstance(value, list | tuple):
        items = [_shapes(item) for item in value]
        return None if None in items else (type(value), *items)
    if value is None or isinstance(value, str | bool | int | float):
        return type(value), value
    return None


def _is_close(result: Any, replayed: Any) -> bool:
    pairs = zip(_numbers(result), _numbers(replayed), strict=True)
    return all(
        math.isclose(first, second, rel_tol=_TOLERANCE, abs_tol=1e-6)
        or (math.isnan(first) and math.isnan(second))
        for first, second in pairs
    )


def _numbers(result: Any) -> list[float]:
    """Each number and tensor in it; of a tensor with several elements their sum."""
    if isinstance(result, tuple):
        return [number for part in result for number in _numbers(part)]
    if isinstance(result, Tensor):
        return [float(result.sum())]
    return [] if result is None else [float(result)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
