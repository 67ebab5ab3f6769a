"""Find the adapter tensors of a PEFT model."""

from __future__ import annotations

from torch import nn


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable adapter tensors of a PEFT model, in ``model.parameters()`` order.

    These are LoRA's A and B, DoRA's magnitude vectors, and everything else that PEFT trains as an
    adapter: IA3 vectors, prompt embeddings, the copies of ``modules_to_save``, X-LoRA's classifier.
    Tensors of the base model are left out even if they are trainable (biases, for example).

    Args:
        model: a ``PeftModel``, or a model with an injected PEFT adapter
            (``inject_adapter_in_model``, or ``add_adapter`` of transformers).

    Raises:
        ImportError: peft is not installed, or is older than 0.15.
        ValueError: the model has no adapter, or no adapter tensor is trainable.

    Examples:
        >>> optimizer = torch.optim.AdamW(lora_parameters(model), lr=2e-4)
    """
    try:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError as error:
        raise ImportError(
            f"lora_parameters needs peft 0.15 or newer ({error}): "
            "pip install -U 'fastforward-optim[peft]', or pass the tensors that you train to the "
            "optimizer yourself"
        ) from error

    adapter: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name in module.adapter_layer_names:
                part = getattr(module, name, None)
                if isinstance(part, nn.Parameter):
                    adapter.add(part)
                elif isinstance(part, nn.Module):
                    adapter.update(part.parameters())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            original = set(module.original_module.parameters())
            adapter.update(set(module.parameters()) - original)
        elif isinstance(module, PeftModel):
            for encoder in getattr(module, "prompt_encoder", {}).values():
                adapter.update(encoder.parameters())
        elif isinstance(module, BaseTuner):
            # Modules next to the base model, such as X-LoRA's classifier.
            for name, child in module.named_children():
                if name not in ("model", "lora_model"):
                    adapter.update(child.parameters())
        elif hasattr(module, "adaption_prompt"):  # these layers share no public class
            adapter.update(module.parameters(recurse=False))
    if not adapter:
        raise ValueError(
            f"{type(model).__name__} has no PEFT adapter; wrap it with peft.get_peft_model(model, "
            "LoraConfig(...)), or pass the tensors that you train to the optimizer yourself"
        )
    trainable = [p for p in model.parameters() if p in adapter and p.requires_grad]
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has a PEFT adapter, but none of its tensors is trainable; "
            "load it with PeftModel.from_pretrained(..., is_trainable=True)"
        )
    return trainable
