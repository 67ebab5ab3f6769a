"""Fast Forward in sentence-transformers: the same line, whatever the loss.

A tiny BERT with random weights learns which numbers have as many digits, so that nothing is
downloaded.

    pip install 'fastforward-optim[transformers]' 'sentence-transformers[train]'
    python examples/sentence_transformers_trainer.py
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fastforward_optim.integrations.transformers import FastForwardCallback

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
steps = parser.parse_args().steps

torch.manual_seed(0)
words = {word: number for number, word in enumerate(["<pad>", *"0123456789"])}
characters = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
bert = BertConfig(
    vocab_size=len(words),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
)
numbers = [str(10 ** (row % 4) + row % 9) for row in range(2560)]
others = [numbers[place] for place in torch.randperm(2560)]
data = Dataset.from_dict(
    {
        "first": numbers,
        "second": others,
        "label": [float(len(a) == len(b)) for a, b in zip(numbers, others, strict=True)],
    }
)

with tempfile.TemporaryDirectory() as folder:
    PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>").save_pretrained(folder)
    BertModel(bert).save_pretrained(folder)
    model = SentenceTransformer(modules=[Transformer(folder), Pooling(64)])
    trainer = SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=8,
            learning_rate=2e-4,
            logging_steps=20,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=data.select(range(2048)),
        eval_dataset=data.select(range(2048, 2304)),
        loss=CosineSimilarityLoss(model),
    )
    validation = data.select(range(2304, 2560))
    fast_forward = FastForwardCallback(validation, calibrate_lr=True).attach(trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]

print(fast_forward.optimizer.history)
print(f"test loss {before:.3f} before, {after:.3f} after {steps} steps; ", end="")
print(f"learning rate times {fast_forward.optimizer.lr_scale:.3g}")
