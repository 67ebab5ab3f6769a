"""Faster forwards of the same model: attention without a mask, compiled layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WITHOUT_MASK = "causal_sdpa"
"""Name of the attention of :func:`attend_without_mask`."""


def attend_without_mask(model: Any) -> None:
    """Attend to all earlier tokens of a row, in place, and to nothing else: rows are full blocks.

    Left alone, transformers asks the device in each forward whether rows are packed, and waits for
    the answer. While a CUDA graph is recorded it cannot ask: it would then build a mask, take
    slower kernels, and have compiled layers compiled again.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # A mask is built for the names that transformers knows.
    AttentionInterface.register(WITHOUT_MASK, sdpa_attention_forward)
    model.config._attn_implementation = WITHOUT_MASK


def compile_layers(model: Any) -> None:
    """Compile each decoder layer and the loss, in place; of a Llama, a GPT-NeoX or their like.

    Raises:
        SystemExit: the model keeps its layers elsewhere.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = getattr(base.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise SystemExit(
            f"{type(base).__name__} does not have its layers where Llama and GPT-NeoX have them, "
            "so that they cannot be compiled one by one: leave compiling out"
        )
    # One for each shape and mode: training, validation and test batches, with and without grads.
    torch._dynamo.config.recompile_limit = 64
    for layer in layers:
        layer.compile(dynamic=False)
    # Of a small model, the logits are the largest tensors: one pass over them instead of several.
    base.loss_function = torch.compile(base.loss_function, dynamic=False)
