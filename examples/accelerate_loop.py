"""Fast Forward in a loop of accelerate: prepared, accumulated, saved and loaded as any optimizer.

A tiny Llama with random weights learns to count, so that nothing is downloaded.

    pip install 'fastforward-optim[peft,transformers]'
    python examples/accelerate_loop.py
"""

import argparse
import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from fastforward_optim import FastForward, ValidationLoss, lora_parameters

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
steps = parser.parse_args().steps

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
)
adapter = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"])
model = get_peft_model(LlamaForCausalLM(config), adapter)


def count_up(rows):
    """Rows that count up in steps of their own."""
    start, by = torch.randint(64, (rows, 1)), torch.randint(1, 8, (rows, 1))
    return [{"input_ids": row, "labels": row} for row in (start + by * torch.arange(16)) % 64]


accelerator = Accelerator(gradient_accumulation_steps=2)
loader = DataLoader(count_up(2048), batch_size=16, shuffle=True)
# On the device before the optimizer is made, so that both hold the same tensors.
model.to(accelerator.device)
val_fn = ValidationLoss(model, DataLoader(count_up(256), batch_size=32), batches_per_stage=1)
optimizer = FastForward(
    torch.optim.AdamW(lora_parameters(model), lr=2e-4), val_fn, calibrate_lr=True
)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps)
model, wrapped, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

losses = []
while len(losses) < 2 * steps:
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            wrapped.step()
            scheduler.step()
            wrapped.zero_grad()
        losses.append(loss.item())
        if len(losses) == 2 * steps:
            break
optimizer.finish()

with tempfile.TemporaryDirectory() as folder:
    (folder,) = broadcast_object_list([folder])  # the first rank's, on all of them
    accelerator.save_state(folder)  # the stages, the multiplier and all else are in it
    accelerator.wait_for_everyone()  # until the first rank has written
    accelerator.load_state(folder)
    accelerator.wait_for_everyone()  # until all have read

print(optimizer.history)
print(f"training loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps")
