"""Fast Forward under DistributedDataParallel: nothing to add, every rank takes the same decision.

A tiny Llama with random weights learns to count, so that nothing is downloaded. Each rank measures
its share of the validation batches.

    pip install 'fastforward-optim[peft,transformers]'
    torchrun --nproc-per-node 2 examples/ddp.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

from fastforward_optim import FastForward, ValidationLoss, lora_parameters

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=60, help="real steps (default: 60)")
steps = parser.parse_args().steps

# Alone, as any script, it is a run of one process.
for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("MASTER_PORT", "0")
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
)
adapter = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"])
model = get_peft_model(LlamaForCausalLM(config), adapter).to(device)


def count_up(rows):
    """Rows that count up in steps of their own, the same ones on every rank."""
    start, by = torch.randint(64, (rows, 1)), torch.randint(1, 8, (rows, 1))
    return [{"input_ids": row, "labels": row} for row in (start + by * torch.arange(16)) % 64]


train, validation = count_up(2048), count_up(256)
loader = DataLoader(train, batch_size=16, sampler=DistributedSampler(train))
net = DistributedDataParallel(model)
# All ranks pass the same batches, and the stage splits them.
val_fn = ValidationLoss(net, DataLoader(validation, batch_size=8), batches_per_stage=4)
optimizer = FastForward(
    torch.optim.AdamW(lora_parameters(model), lr=2e-4), val_fn, calibrate_lr=True
)

losses = []
while len(losses) < steps:
    loader.sampler.set_epoch(len(losses))
    for batch in loader:
        loss = net(**{name: value.to(device) for name, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) == steps:
            break
optimizer.finish()  # on every rank

if dist.get_rank() == 0:
    print(optimizer.history)
    print(f"training loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps")
dist.destroy_process_group()
