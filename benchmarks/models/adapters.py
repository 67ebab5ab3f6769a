"""Which weights of a model are trained: a LoRA or DoRA adapter, or all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


TARGETS = {"gpt_neox": ("query_key_value",)}
"""The layers that LoRA adapts, by model type, for models that do not use ``ATTENTION``."""


def with_lora(
    model: Any,
    *,
    rank: int,
    alpha: int = 16,
    dropout: float = 0.0,
    dora: bool = False,
    targets: Sequence[str] | None = None,
    seed: int = 0,
) -> PeftModel:
    """Freeze a model and add a LoRA adapter, in place; a seed always gives the same adapter.

    Args:
        model: a model of transformers.
        rank: of the adapter.
        alpha: the adapter's output is scaled by ``alpha / rank``.
        dropout: applied to the adapter's input.
        dora: also decompose the weights into magnitude and direction (DoRA).
        targets: names of the linear layers to adapt. Default: the attention projections of
            GPT-NeoX, Llama and similar models; in other models all linear layers but the output.
        seed: of the adapter.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=dora,
        target_modules=_default_targets(model) if targets is None else list(targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _default_targets(model: Any) -> list[str] | str:
    targets = TARGETS.get(model.config.model_type, ATTENTION)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return list(targets) if names.issuperset(targets) else "all-linear"


def unfreeze(model: Any) -> Any:
    """Make all parameters trainable, in place, for full fine-tuning.

    They are converted to float32: in bfloat16, rounding would swallow AdamW's steps.
    """
    return model.float().requires_grad_(True)


def reset_lora(model: Any, seed: int) -> None:
    """Reinitialize a model's LoRA or DoRA adapter, in place.

    This is PEFT's default initialization: A random, B zero, and DoRA's magnitudes the norms of the
    frozen weights. It is drawn on the CPU, so that a seed gives the same adapter on every device.

    Raises:
        ValueError: the model has other trainable tensors.
    """
    from peft.tuners.lora import LoraLayer

    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parts = ("lora_A", "lora_B", "lora_magnitude_vector")
    for name, _ in trainable:
        if not any(part in name.split(".") for part in parts):
            raise ValueError(
                f"reset_lora can reinitialize {', '.join(parts)}, not {name}: load the model "
                "again, or keep copies of its trainable tensors"
            )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainable:
        fresh = torch.zeros(parameter.shape)
        if "lora_A" in name:
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
        parameter.data.copy_(fresh)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for dora in layer.lora_magnitude_vector.values():
                if dora.weight.requires_grad:
                    # B A is zero; use the data type in which PEFT takes the norm.
                    norm = dora.get_weight_norm(layer.get_base_layer().weight, 0, scaling=1)
                    dora.weight.data.copy_(norm)
