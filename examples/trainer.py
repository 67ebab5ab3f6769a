"""Fast Forward in the transformers Trainer: one line, and each stage is in the log.

A tiny Llama with random weights learns to count, so that nothing is downloaded.

    pip install 'fastforward-optim[peft,transformers]'
    python examples/trainer.py
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fastforward_optim.integrations.transformers import FastForwardCallback

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


train, validation, test = count_up(2048), count_up(256), count_up(256)

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            learning_rate=2e-4,
            label_names=["labels"],  # transformers 4 does not find them in a PEFT model
            logging_steps=20,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=train,
        eval_dataset=test,
    )
    # Without calibrate_lr, 32 examples are enough.
    fast_forward = FastForwardCallback(validation, calibrate_lr=True).attach(trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]

print(fast_forward.optimizer.history)
print(f"test loss {before:.3f} before, {after:.3f} after {steps} steps; ", end="")
print(f"learning rate times {fast_forward.optimizer.lr_scale:.3g}")
