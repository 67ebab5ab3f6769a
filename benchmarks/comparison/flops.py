"""What a forward and a training step of a model cost, in floating-point operations (FLOPs).

A multiply-add counts as two. Needs fvcore, which the extra ``bench`` brings.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """FLOPs of one forward, counted by fvcore as in the paper, attention included.

    Args:
        model: a model whose output has ``logits``; its loss is not counted.
        batch: arguments of its forward; only the shapes matter. ``labels`` are left out.
    """
    with warnings.catch_warnings():
        # fvcore imports torch.jit's tracer, which is deprecated and has no successor in fvcore.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        names = [name for name in batch if name != "labels"]
        analysis = FlopCountAnalysis(_Logits(model, names), tuple(batch[name] for name in names))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_multiply_adds)
        with torch.no_grad():
            return 2 * int(analysis.total())


def step_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """FLOPs of one forward and backward, measured while they run; the update is not counted.

    With LoRA the frozen weights need no gradients, so that it is close to two forwards; full
    fine-tuning takes three. Gradients are not touched.

    Args:
        model: a model whose output has a ``loss``.
        batch: arguments of its forward, with ``labels``.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    # The counter knows matrix products, not every device's fused attention: take it apart.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(**batch).loss
        torch.autograd.grad(loss, trainable, allow_unused=True)
    return int(counter.get_total_flops())


class _Logits(nn.Module):
    """``model`` with positional arguments and one tensor as output, as tracing needs it."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *values: Tensor) -> Tensor:
        arguments = dict(zip(self.names, values, strict=True))
        logits: Tensor = self.model(**arguments, use_cache=False).logits
        return logits


def _attention_multiply_adds(inputs: list[Any], outputs: list[Any]) -> int:
    """Of softmax(q k^T) v, with q (..., L, E), k (..., S, E) and v (..., S, F)."""
    query, key, value = (node.type().sizes() for node in inputs[:3])
    *batch, length, width = query
    return int(math.prod(batch) * length * key[-2] * (width + value[-1]))
