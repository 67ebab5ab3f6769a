"""Faster forwards of the same model: attention without a mask, compiled layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WITHOUT_MASK = "causal_sdpa"
"""The name under which :func:`attend_without_mask` registers its attention."""


def attend_without_mask(model: Any) -> None:
    """Use causal attention without a mask, in place. Rows must be full blocks.

    By default, transformers checks in each forward whether rows are packed, which waits for the
    device. While a CUDA graph is recorded it cannot check: it would build a mask, use slower
    kernels, and recompile compiled layers.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # transformers builds masks only for the names that it knows.
    AttentionInterface.register(WITHOUT_MASK, sdpa_attention_forward)
    model.config._attn_implementation = WITHOUT_MASK


def compile_layers(model: Any) -> None:
    """Compile each decoder layer and the loss of a Llama, GPT-NeoX or similar model, in place.

    Raises:
        SystemExit: the model keeps its layers elsewhere.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = getattr(base.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise SystemExit(
            f"the layers of {type(base).__name__} are not where those of Llama and GPT-NeoX are, "
            "so they cannot be compiled one by one: do not pass --compile"
        )
    # Each shape and mode is compiled: training, validation and test, with and without gradients.
    torch._dynamo.config.recompile_limit = 64
    for layer in layers:
        layer.compile(dynamic=False)
    # In a small model the logits are the largest tensors; compiled, the loss reads them once.
    base.loss_function = torch.compile(base.loss_function, dynamic=False)
