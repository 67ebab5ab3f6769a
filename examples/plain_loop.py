"""A plain training loop with all that belongs to one, around a tiny Llama with random weights.

LoRA, gradient accumulation, clipping, a warm-up, checkpoints: nothing is downloaded, and it takes
some seconds on a CPU. Stop it half-way, go on with ``--resume``, and it ends as it would have:

    python examples/plain_loop.py --stop 30
    python examples/plain_loop.py --resume

It needs ``pip install 'fastforward-optim[peft,transformers]'``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastforward_optim import (
    FastForward,
    ValidationLoss,
    lora_parameters,
)

STEPS, WARMUP, ACCUMULATE, ROWS = 60, 6, 2, 16


def make_model() -> nn.Module:
    """A Llama with a LoRA adapter, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), adapter)


def batch(seed: int) -> dict[str, Tensor]:
    """Rows that count up by 1, 2 or 3 from somewhere: something to learn."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 64, (ROWS, 1), generator=generator)
    stride = torch.randint(1, 4, (ROWS, 1), generator=generator)
    tokens = (start + stride * torch.arange(12)) % 64
    return {"input_ids": tokens, "labels": tokens}


def main(arguments: Sequence[str] | None = None) -> FastForward:
    """Train to the end, or from one checkpoint to the next."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the whole run")
    parser.add_argument("--stop", type=int, help="stop after this many steps (default: --steps)")
    options = parser.parse_args(arguments)
    stop = options.steps if options.stop is None else options.stop

    model = make_model()
    params = lora_parameters(model)
    # Held out: neither trained nor reported on.
    val_fn = ValidationLoss(model, [batch(seed) for seed in range(10_000, 10_002)])
    optimizer = FastForward(
        torch.optim.AdamW(params, lr=3e-4),
        val_fn,
        interval=6,
        warmup=WARMUP,  # no stage repeats steps that are short by design
        on_stage=lambda stage: print(
            f"step {stage.step:2}: {stage.tau:5.1f} steps further, "
            f"validation loss {stage.loss_before:.4f} to {stage.loss_after:.4f}"
        ),
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=WARMUP)

    first = 0
    if options.resume:
        saved = torch.load(options.checkpoint, weights_only=True)
        model.load_state_dict(saved["adapter"], strict=False)  # the base model is as it was
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["random"])
        first = saved["step"]

    model.train()
    for step in range(first, stop):
        for part in range(ACCUMULATE):
            loss = model(**batch(step * ACCUMULATE + part)).loss / ACCUMULATE
            loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    adapter = {name: p for name, p in model.state_dict().items() if "lora_" in name}
    checkpoint = {
        "adapter": adapter,
        "optimizer": optimizer.state_dict(),  # the history and the place in the schedule too
        "scheduler": scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "step": stop,
    }
    torch.save(checkpoint, options.checkpoint)
    print(optimizer.history)
    return optimizer


if __name__ == "__main__":
    main()
