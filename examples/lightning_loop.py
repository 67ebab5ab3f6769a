"""Fast Forward in the Lightning Trainer: one callback, and the module knows nothing of it.

A tiny Llama with random weights learns to count, so that nothing is downloaded.

    pip install 'fastforward-optim[lightning,peft,transformers]'
    python examples/lightning_loop.py
"""

import argparse
import logging
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from fastforward_optim import lora_parameters
from fastforward_optim.integrations.lightning import FastForwardCallback

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=60, help="real steps (default: 60)")
steps = parser.parse_args().steps

# Which devices there are, and tips: not the point here.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # of torch, for lightning 2.6
warnings.filterwarnings("ignore", ".*does not have many workers")
seed_everything(0, verbose=False)


class Counting(LightningModule):
    """A Llama with a LoRA adapter, as one writes it for Lightning."""

    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        adapter = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"])
        self.model = get_peft_model(LlamaForCausalLM(config), adapter)

    def training_step(self, batch, batch_idx):
        """The loss that is trained with, and that Fast Forward measures on other examples."""
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        """The loss that is reported."""
        self.log("test_loss", self.model(input_ids=batch, labels=batch).loss)

    def configure_optimizers(self):
        """Any optimizer, and a scheduler if there is one."""
        return torch.optim.AdamW(lora_parameters(self.model), lr=2e-4)


def count_up(rows, shuffle=False):
    """Rows that count up in steps of their own."""
    start, by = torch.randint(64, (rows, 1)), torch.randint(1, 8, (rows, 1))
    return DataLoader((start + by * torch.arange(16)) % 64, batch_size=32, shuffle=shuffle)


module = Counting()
train, validation, test = count_up(2048, shuffle=True), count_up(256), count_up(256)
# Without calibrate_lr, 32 examples are enough.
fast_forward = FastForwardCallback(validation, calibrate_lr=True)
trainer = Trainer(
    max_steps=steps,
    callbacks=[fast_forward],
    gradient_clip_val=1.0,
    logger=False,  # or any: each stage goes there
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
before = trainer.test(module, test, verbose=False)[0]["test_loss"]
trainer.fit(module, train)
after = trainer.test(module, test, verbose=False)[0]["test_loss"]

print(fast_forward.optimizer.history)
print(f"test loss {before:.3f} before, {after:.3f} after {steps} steps; ", end="")
print(f"learning rate times {fast_forward.optimizer.lr_scale:.3g}")
