"""The forward and backward of a training step as one CUDA graph.

Python takes longer to launch a small model's kernels than the GPU takes to run them. Replayed as a
graph, they run without gaps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

TOLERANCE = 0.02
"""The largest relative error of replayed gradients, in the norm: rounding in bfloat16."""

_WARM_UP = 3

Batch = Mapping[str, Tensor]


class GraphedBackward:
    """Records the forward and backward of one batch, and replays them for others.

    Each replay overwrites the gradients in place, so that they need not be set to zero. The
    parameters may be changed in place only.

    Args:
        loss: computes the loss of a batch.
        parameters: the parameters whose gradients are computed.
        batch: an example; all batches must have its shapes.

    Raises:
        RuntimeError: replayed gradients differ from computed ones.
    """

    def __init__(
        self, loss: Callable[[Batch], Tensor], parameters: Sequence[Tensor], batch: Batch
    ) -> None:
        self._parameters = list(parameters)
        self._inputs = {name: value.clone() for name, value in batch.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._set([None] * len(self._parameters))
                loss(self._inputs).backward()
            expected = [_copied(parameter.grad) for parameter in self._parameters]
        torch.cuda.current_stream().wait_stream(side)
        # Without gradients to add to, the recorded backward allocates new ones in the graph's own
        # memory, and overwrites them at each replay.
        self._set([None] * len(self._parameters))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            recorded = loss(self._inputs)
            recorded.backward()
        self._loss = recorded.detach()
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._graph.replay()
        self._check(expected)

    def attach(self) -> None:
        """Set the ``grad`` of each parameter to the gradient that replays write."""
        self._set(self._gradients)

    def __call__(self, batch: Batch) -> Tensor:
        """Compute the gradients of a batch and return its loss."""
        for name, value in self._inputs.items():
            value.copy_(batch[name])
        self._graph.replay()
        return self._loss.clone()

    def _set(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _check(self, expected: Sequence[Tensor | None]) -> None:
        pairs = [
            (replayed, computed)
            for replayed, computed in zip(self._gradients, expected, strict=True)
            if replayed is not None and computed is not None
        ]
        error = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
        norm = sum(float(computed.square().sum()) for _, computed in pairs) ** 0.5
        if not error <= TOLERANCE * norm:
            raise RuntimeError(
                "gradients replayed by a CUDA graph differ from computed ones by "
                f"{error / norm:.1%} of their norm: do not pass --graphs"
            )


def _copied(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.clone()
