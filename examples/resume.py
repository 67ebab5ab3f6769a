"""A plain loop that survives being killed: start it again, and it ends as if nothing had happened.

It saves a checkpoint every few steps, and goes on from it if there is one. Kill it whenever you
like (``kill -9``, a preempted machine, on Linux a power cut), also while it saves, and run the
same command again:

    python examples/resume.py --checkpoint run.pt

The weights at the end are the same bit for bit. A checkpoint holds all that the loop goes on
with: the adapter, the optimizer (with its history, and its place in the schedule of stages), the
scheduler, the random number generators, from which dropout and the order of the data come, and
the number of the step.

The model is a tiny Llama with random weights: nothing is downloaded, and it takes some seconds on
a CPU. It needs ``pip install 'fastforward-optim[peft,transformers]'`` and ``checkpoint_file.py``
beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from checkpoint_file import load_checkpoint, random_state, save_checkpoint, set_random_state
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastforward_optim import FastForward, ValidationLoss, lora_parameters


def make_model() -> nn.Module:
    """A Llama with a LoRA adapter, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    adapter = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), adapter)


def rows(seed: int, count: int) -> Tensor:
    """Rows that count up by 1, 2 or 3 from somewhere: something to learn."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 64, (count, 1), generator=generator)
    stride = torch.randint(1, 4, (count, 1), generator=generator)
    return (start + stride * torch.arange(12)) % 64


def batch(tokens: Tensor) -> dict[str, Tensor]:
    """What the model takes."""
    return {"input_ids": tokens, "labels": tokens}


def main(arguments: Sequence[str] | None = None) -> FastForward:
    """Train to the end, from wherever the checkpoint is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
    parser.add_argument("--save-every", type=int, default=5, help="steps")
    parser.add_argument("--steps", type=int, default=60, help="of the whole run")
    parser.add_argument("--calibrate-lr", action="store_true")
    options = parser.parse_args(arguments)

    model = make_model()
    params = lora_parameters(model)
    train_set = rows(seed=1, count=256)
    # Held out: neither trained nor reported on. Each stage measures the next two batches.
    pool = [batch(part) for part in rows(seed=2, count=64).split(8)]
    val_fn = ValidationLoss(model, pool, batches_per_stage=2)
    inner = torch.optim.AdamW(params, lr=3e-4)
    optimizer = FastForward(inner, val_fn, interval=4, calibrate_lr=options.calibrate_lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps, eta_min=1e-4)

    first = 0
    if options.checkpoint.exists():
        saved = load_checkpoint(options.checkpoint)
        model.load_state_dict(saved["adapter"], strict=False)  # the base model is as it was
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        set_random_state(saved["random"])
        first = saved["step"]

    def save(step: int) -> None:
        state = model.state_dict()
        checkpoint = {
            "adapter": {name: p for name, p in state.items() if "lora_" in name},
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "random": random_state(),
            "step": step,
        }
        save_checkpoint(options.checkpoint, checkpoint)

    model.train()
    for step in range(first, options.steps):
        chosen = train_set[torch.randint(len(train_set), (16,))]
        model(**batch(chosen)).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % options.save_every == 0:
            save(step + 1)

    optimizer.finish()  # of a run with --calibrate-lr; else it does nothing
    save(max(first, options.steps))
    print(optimizer.history)
    return optimizer


if __name__ == "__main__":
    main()
