"""``FastForwardCallback`` in TRL's trainers, which are built on the transformers ``Trainer``."""

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastforward_optim import ValidationLoss
from fastforward_optim.integrations.transformers import FastForwardCallback, TrainerLoss

from .conftest import LOWEST, fixed, tiny_llama

pytest.importorskip("trl")
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

OPTIONS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 2,
    "logging_steps": 4,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "max_length": 12,
}


def tokenizer():
    """Words that are numbers."""
    words = {str(number): number for number in range(95)} | {"<pad>": 95, "<eos>": 96}
    model = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>"
    )


def text(seed, count):
    numbers = torch.randint(0, 95, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(map(str, numbers.tolist()))


def sft(folder, **options):
    data = Dataset.from_dict({"text": [text(row, 6 + row % 4) for row in range(24)]})
    return SFTTrainer(
        tiny_llama(),
        SFTConfig(str(folder), **OPTIONS, **options),
        train_dataset=data.select(range(16)),
        eval_dataset=data.select(range(16, 24)),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )


def dpo(folder, **options):
    data = Dataset.from_dict(
        {
            "prompt": [text(row, 3) + " " for row in range(24)],
            "chosen": [text(100 + row, 4) for row in range(24)],
            "rejected": [text(200 + row, 2 + row % 4) for row in range(24)],
        }
    )
    return DPOTrainer(
        tiny_llama(),
        args=DPOConfig(str(folder), **OPTIONS, **options),
        train_dataset=data.select(range(16)),
        eval_dataset=data.select(range(16, 24)),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )


@pytest.mark.parametrize("build", [sft, dpo])
def test_stages_lower_the_trainers_own_loss_on_validation_examples(tmp_path, build):
    trainer = build(tmp_path, learning_rate=1e-3)
    options = {"num_examples": 8, "line_search": LOWEST, **fixed(2)}
    callback = FastForwardCallback(**options).attach(trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    history = callback.optimizer.history
    assert [record.step for record in history] == [2, 4]
    assert all(record.loss_after <= record.loss_before for record in history)
    assert any(record.tau for record in history)
    assert history[-1].loss_after < before
    assert trainer.evaluate()["eval_loss"] == pytest.approx(history[-1].loss_after, rel=1e-6)


def forwards_of(trainer, call):
    calls = []
    hook = trainer.model.register_forward_hook(lambda *_: calls.append(1))
    result = call()
    hook.remove()
    return len(calls), result


def test_sft_gives_the_losses_of_the_rows_without_a_forward_more(tmp_path):
    trainer = sft(tmp_path)
    val_fn = TrainerLoss(trainer, trainer.eval_dataset, 8, False)
    forwards, measured = forwards_of(trainer, val_fn.measure)
    assert forwards == len(val_fn.batches) == 4
    expected = ValidationLoss(trainer.model, val_fn.batches).measure()
    assert len(measured.rows.sums) == 8
    assert measured.rows.weights == expected.rows.weights
    assert measured.rows.sums == pytest.approx(expected.rows.sums, rel=1e-5)
    assert measured.loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_batches_are_the_units_of_a_loss_of_pairs(tmp_path):
    trainer = dpo(tmp_path)
    val_fn = TrainerLoss(trainer, trainer.eval_dataset, 8, False)
    assert len(val_fn.measure().rows.sums) == len(val_fn.batches)


@pytest.mark.parametrize("build", [sft, dpo])
def test_what_the_trainer_gathers_for_its_logs_is_left_alone(tmp_path, build):
    def stay(evaluate, last_tau):
        """A line search that looks and leaves the weights where they are."""
        evaluate(0.0)
        return 0.0

    def logged(attach):
        trainer = build(tmp_path, eval_strategy="steps", eval_steps=4, learning_rate=1e-3)
        if attach:
            data, options = list(trainer.eval_dataset)[:3], {"line_search": stay, **fixed(2)}
            callback = FastForwardCallback(data, **options).attach(trainer)
        trainer.train()
        assert not attach or len(callback.optimizer.history) == 2
        return [
            {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
            for entry in trainer.state.log_history
            if "fast_forward/tau" not in entry
        ]

    plain, with_stages = logged(False), logged(True)
    assert any("mean_token_accuracy" in entry for entry in plain)
    assert with_stages == plain
