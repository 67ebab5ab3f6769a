"""What is trained of a model: a LoRA or DoRA adapter, or all weights."""

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
"""What LoRA adapts, by the model type of transformers, where it is not ``ATTENTION``."""


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
    """Freeze a model and put a LoRA adapter on it, in place; the same one for the same seed.

    Args:
        model: a model of transformers.
        rank: of the adapter's matrices.
        alpha: what they add is scaled by ``alpha / rank``.
        dropout: of their input.
        dora: decompose the weights into magnitude and direction too (DoRA).
        targets: names of the linear layers to adapt. Default: the attention projections of
            GPT-NeoX and of Llama and its like; of other models, all linear layers but the output.
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

    They are float32 then, whatever they were: AdamW's steps are lost in the rounding of bfloat16.
    """
    return model.float().requires_grad_(True)


def reset_lora(model: Any, seed: int) -> None:
    """Put a model's LoRA or DoRA adapter back to its beginning, in place.

    As PEFT begins by default, but drawn on the CPU, so that a seed means the same on every device:
    A at random, B zero, and DoRA's magnitudes the norms of the frozen weights.

    Raises:
        ValueError: the model trains other tensors too, whose beginning is not known here.
    """
    from peft.tuners.lora import LoraLayer

    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parts = ("lora_A", "lora_B", "lora_magnitude_vector")
    for name, _ in trainable:
        if not any(part in name.split(".") for part in parts):
            raise ValueError(
                f"reset_lora knows how {', '.join(parts)} begin, not {name}: load the model anew, "
                "or keep copies of its trainable tensors"
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
                    # B A is zero; the norm is taken in the data type that PEFT takes it in.
                    norm = dora.get_weight_norm(layer.get_base_layer().weight, 0, scaling=1)
                    dora.weight.data.copy_(norm)
