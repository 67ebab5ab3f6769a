"""Run forwards as CUDA graphs: record the kernels of a forward once, then launch them together.

With a small model or a small validation set, launching the kernels one by one takes longer than
running them. A graph removes that overhead.
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

# Maximum number of graphs, one for each shape of batch. Each takes a few megabytes for the
# arguments of its kernels.
_MAX_GRAPHS = 64

# Relative difference allowed between a replay and the model: while recording, the libraries may
# choose other kernels than usual.
_TOLERANCE = 1e-3

Function = Callable[[Any], Any]


class CudaGraphs:
    """Calls a function of a batch, and replays it as a CUDA graph if possible.

    The first call with a new batch shape runs the function and then records it. The second call
    runs both and compares the results. Later calls replay the graph. The graph reads the model's
    tensors in place, so it sees changes to the weights. If recording fails or the results differ,
    a warning says so, and from then on the function is called directly.

    Args:
        model: the model whose tensors the function reads.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._graphs: dict[Hashable, _Graph] = {}
        self._recorded_with: list[tuple[int, int, bool]] = []
        self._pool: Any = None
        self._possible = True

    def __getstate__(self) -> dict[str, Any]:
        # A graph cannot be copied, so a copy of this object records its own.
        return vars(self) | {"_graphs": {}, "_recorded_with": [], "_pool": None}

    def check(self) -> None:
        """Discard the graphs if the model's tensors, or which of them it trains, have changed."""
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
        """Return ``function(batch)``, by replay if possible.

        Args:
            function: the same function at each call. It may return tensors, numbers, None, and
                tuples of these.
            batch: the batch.
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
        """Record the call, so that the next one with a batch of this shape can be compared."""
        shapes = _key(batch)
        if self._possible and shapes is not None and len(self._graphs) < _MAX_GRAPHS:
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
    """One recorded call, with the tensors from which it reads the batch."""

    def __init__(self, function: Function, batch: Any, pool: Any) -> None:
        self.is_checked = False
        own = map_tensors(torch.clone, batch)
        self._inputs = _tensors_in(own)
        self._graph = torch.cuda.CUDAGraph()
        device = self._inputs[0].device
        generator = torch.cuda.default_generators[device.index]
        state = generator.get_state()
        # Otherwise the graph would read autocast's cached copies of old weights.
        torch.clear_autocast_cache()
        try:
            with (
                torch.cuda.device(device),
                # Let other threads, such as a DataLoader's, allocate memory meanwhile.
                torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"),
            ):
                self._output = function(own)
        except BaseException:
            # After a failed recording the generator still believes that it is being recorded, and
            # refuses to draw numbers. A copy of its state does not.
            generator.graphsafe_set_state(generator.clone_state())
            generator.set_state(state)
            raise
        finally:
            torch.clear_autocast_cache()

    def replay(self, batch: Any) -> Any:
        torch._foreach_copy_(self._inputs, _tensors_in(batch))
        self._graph.replay()
        # Clone, since the next replay overwrites the output.
        return map_tensors(torch.clone, self._output)


def _tensors_of(model: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers, much faster than ``named_parameters`` does."""
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
    """Return the key under which calls share a graph; None if the batch rules a graph out."""
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
    """Return the numbers in a result; a tensor counts as the sum of its elements."""
    if isinstance(result, tuple):
        return [number for part in result for number in _numbers(part)]
    if isinstance(result, Tensor):
        return [float(result.sum())]
    return [] if result is None else [float(result)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
