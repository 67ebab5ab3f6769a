"""Fast Forward in TRL's SFTTrainer; in DPOTrainer it is the same line.

A tiny Llama with random weights learns sums as text, so that nothing is downloaded.

    pip install 'fastforward-optim[peft,transformers]' trl
    python examples/sft.py
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from fastforward_optim.integrations.transformers import FastForwardCallback

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
steps = parser.parse_args().steps

torch.manual_seed(0)
words = {word: number for number, word in enumerate(["<pad>", "<eos>", *"0123456789+="])}
characters = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
characters.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>"
)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
)
pairs = torch.randint(50, (2560, 2)).tolist()
data = Dataset.from_dict({"text": [f"{a}+{b}={a + b}" for a, b in pairs]})

with tempfile.TemporaryDirectory() as folder:
    trainer = SFTTrainer(
        model,
        SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            learning_rate=2e-4,
            logging_steps=20,
            max_length=16,
            bf16=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=data.select(range(2048)),
        eval_dataset=data.select(range(2304, 2560)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"]),
    )
    validation = data.select(range(2048, 2304))  # tokenized as TRL tokenizes the others
    fast_forward = FastForwardCallback(validation, calibrate_lr=True).attach(trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]

print(fast_forward.optimizer.history)
print(f"test loss {before:.3f} before, {after:.3f} after {steps} steps; ", end="")
print(f"learning rate times {fast_forward.optimizer.lr_scale:.3g}")
