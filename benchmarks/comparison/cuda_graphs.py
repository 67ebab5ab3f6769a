"""Forward and backward of a training step as one CUDA graph.

A small model's kernels are shorter than it takes to start them from Python; replayed as a graph
they follow each other without a gap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

TOLERANCE = 0.02
"""How far replayed gradients may be from computed ones, by their norm: rounding in bfloat16."""

_WARM_UP = 3

Batch = Mapping[str, Tensor]


class GraphedBackward:
    """Computes the gradients of a batch by replaying what was recorded for another.

    The gradients stay where they are from one replay to the next, and each replay writes them
    anew: nothing has to set them to zero. The parameters may change in place only.

    Args:
        loss: the loss of a batch, whose gradients are taken.
        parameters: leaves of the gradients.
        batch: an example; all batches have its shapes.

    Raises:
        RuntimeError: a replay does not give the gradients that the model gives.
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
        # Without gradients to add to, the recorded backward takes new ones out of the graph's own
        # memory, and writes those at each replay.
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
        """Make the replayed gradients those of the parameters, in place of any others."""
        self._set(self._gradients)

    def __call__(self, batch: Batch) -> Tensor:
        """Write the gradients of a batch; return its loss."""
        for name, value in self._inputs.items():
            value.copy_(batch[name])
        self._graph.replay()
        return self._loss.clone()

    def _set(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _check(self, expected: Sequence[Tensor | None]) -> None:
        pairs = [
            (found, wanted)
            for found, wanted in zip(self._gradients, expected, strict=True)
            if found is not None and wanted is not None
        ]
        off = sum(float((found - wanted).square().sum()) for found, wanted in pairs) ** 0.5
        norm = sum(float(wanted.square().sum()) for _, wanted in pairs) ** 0.5
        if not off <= TOLERANCE * norm:
            raise RuntimeError(
                f"gradients that a CUDA graph replays differ from computed ones by {off / norm:.1%}"
                " of their norm: leave --graphs out"
            )


def _copied(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.clone()
