"""Models of published shapes with random weights, for timing without a download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _pythia(hidden: int, *, layers: int, heads: int, vocabulary: int = 50304) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.25,
        },
    }


SHAPES: dict[str, dict[str, Any]] = {
    "pythia-1.4b": _pythia(2048, layers=24, heads=16),
    "pythia-2.8b": _pythia(2560, layers=32, heads=32),
    "pythia-6.9b": _pythia(4096, layers=32, heads=32, vocabulary=50432),
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    },
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
}
"""The published configurations by name."""


def random_model(name: str, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Build a model with the shapes of one of ``SHAPES`` and random weights, on the device.

    Raises:
        SystemExit: there are no such shapes.
    """
    from transformers import AutoConfig

    if name not in SHAPES:
        raise SystemExit(f"unknown shapes {name!r}: expected one of {', '.join(SHAPES)}")
    return untrained(AutoConfig.for_model(**SHAPES[name]), dtype, device)


def untrained(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Build a causal language model with newly initialized weights."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.use_cache = False
    return model
