"""The wrapper in other people's training loops: accelerate and the transformers Trainer."""

import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

from fastforward_optim import FastForward, ValidationLoss, lora_parameters

from .conftest import LOWEST, fixed, same, tiny_lora, token_batch


def fast_forward(model):
    return FastForward(
        torch.optim.AdamW(lora_parameters(model), lr=1e-4),
        ValidationLoss(model, [token_batch(4, 9, seed=99)]),
        line_search=LOWEST,
        **fixed(2),
    )


def outcome(optimizer):
    return [(record.step, record.trials) for record in optimizer.history]


def test_accelerate_prepares_accumulates_saves_and_loads(tmp_path):
    def build():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = tiny_lora()
        optimizer = fast_forward(model)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
        return accelerator, optimizer, *accelerator.prepare(model, optimizer, scheduler)

    def train(parts, first, last):
        accelerator, _, model, optimizer, scheduler = parts
        for step in range(first, last):
            with accelerator.accumulate(model):
                accelerator.backward(model(**token_batch(4, 9, seed=step)).loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    first, second = build(), build()
    train(first, 0, 8)
    first[0].save_state(str(tmp_path))
    train(first, 8, 16)
    assert [record.step for record in first[1].history] == [2, 4, 6, 8]
    second[0].load_state(str(tmp_path))
    train(second, 8, 16)
    assert outcome(first[1]) == outcome(second[1])
    assert same(lora_parameters(first[2]), lora_parameters(second[2]))


def test_the_trainer_takes_it_and_resumes(tmp_path):
    data = [{k: v[0] for k, v in token_batch(1, 9, seed=row).items()} for row in range(32)]

    def train(folder, resume=None):
        model = tiny_lora()
        optimizer = fast_forward(model)
        arguments = TrainingArguments(
            str(folder),
            max_steps=8,
            per_device_train_batch_size=4,
            save_steps=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
        trainer.train(resume_from_checkpoint=resume)
        return model, optimizer

    model, optimizer = train(tmp_path / "one")
    assert [record.step for record in optimizer.history] == [2, 4, 6, 8]
    resumed_model, resumed = train(tmp_path / "two", str(tmp_path / "one" / "checkpoint-4"))
    assert outcome(resumed) == outcome(optimizer)
    assert same(lora_parameters(model), lora_parameters(resumed_model))
