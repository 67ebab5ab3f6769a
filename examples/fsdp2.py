"""Fast Forward on parameters that are sharded by FSDP2, with a checkpoint for any number of ranks.

A tiny Llama with random weights learns to count, so that nothing is downloaded. A stage moves each
rank's own part of the adapter; nothing is gathered but by the forwards.

    pip install 'fastforward-optim[peft,transformers]'
    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nproc-per-node 1 examples/fsdp2.py --resume checkpoint-60    # with the history
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from fastforward_optim import FastForward, OptimizerState, ValidationLoss, lora_parameters

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=60, help="real steps (default: 60)")
parser.add_argument("--resume", type=Path, help="folder of a checkpoint to go on from")
options = parser.parse_args()

# Alone, as any script, it is a run of one process.
for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("MASTER_PORT", "0")
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()

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
for layer in model.get_base_model().model.layers:
    fully_shard(layer)
fully_shard(model)


def count_up(rows, seed):
    """Rows that count up in steps of their own, the same ones on every rank."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(64, (rows, 1), generator=generator)
    by = torch.randint(1, 8, (rows, 1), generator=generator)
    tokens = ((start + by * torch.arange(16)) % 64).to(device)
    return {"input_ids": tokens, "labels": tokens}


# All ranks pass the same batches, and the stage splits them.
val_fn = ValidationLoss(model, [count_up(8, seed) for seed in range(32)], batches_per_stage=4)
optimizer = FastForward(
    torch.optim.AdamW(lora_parameters(model), lr=2e-4), val_fn, calibrate_lr=True
)
first = 0
if options.resume:
    saved = {"model": get_model_state_dict(model), "optimizer": OptimizerState(model, optimizer)}
    saved["step"] = 0
    dcp.load(saved, checkpoint_id=options.resume)
    set_model_state_dict(model, saved["model"])
    first = saved["step"]

for step in range(first, first + options.steps):
    batch = count_up(16 * size, 1000 + step)
    loss = model(**{name: rows[rank::size] for name, rows in batch.items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
optimizer.finish()  # on every rank

last = first + options.steps
saved = {"model": get_model_state_dict(model), "optimizer": OptimizerState(model, optimizer)}
dcp.save(saved | {"step": last}, checkpoint_id=Path(f"checkpoint-{last}"))
if rank == 0:
    print(optimizer.history)
    print(f"training loss {loss.item():.3f} after {last} steps")
dist.destroy_process_group()
