"""Trainers whose loss is no measure of progress are refused by name, and work with a function."""

import os

import pytest
from transformers import Trainer

from fastforward_optim import ValidationLoss
from fastforward_optim.integrations.trainer_kinds import check_trainer
from fastforward_optim.integrations.transformers import FastForwardCallback

from .conftest import fixed, tiny_llama, token_batch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytest.importorskip("trl")
from datasets import Dataset
from trl import (
    DistillationConfig,
    DistillationTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.experimental.a2po import A2POTrainer
from trl.experimental.async_distillation import AsyncDistillationTrainer
from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl.experimental.gmpo import GMPOTrainer
from trl.experimental.online_dpo import OnlineDPOTrainer
from trl.experimental.sdft import SDFTTrainer
from trl.experimental.sdpo import SDPOTrainer

from .test_trainer import VALIDATION, trainer_of
from .test_trl import OPTIONS, dpo, sft, text, tokenizer

PROMPTS = Dataset.from_dict({"prompt": [text(row, 3) for row in range(16)]})


def reward(completions, **_):
    return [float(len(completion)) for completion in completions]


def generating(kind, config, folder, **options):
    words = tokenizer()
    words.padding_side = "left"
    common = {name: value for name, value in OPTIONS.items() if name != "max_length"}
    arguments = config(str(folder), **{**common, "max_completion_length": 4, **options})
    others = (
        {"teacher_model": tiny_llama()} if kind is DistillationTrainer else {"reward_funcs": reward}
    )
    return kind(
        model=tiny_llama(), args=arguments, train_dataset=PROMPTS, eval_dataset=PROMPTS,
        processing_class=words, **others,
    )  # fmt: skip


KINDS = {
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 2, "num_generations_eval": 2}),
    "rloo": (
        RLOOTrainer,
        RLOOConfig,
        {"beta": 0.0, "num_generations": 2, "num_generations_eval": 2},
    ),
    "distillation": (DistillationTrainer, DistillationConfig, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_that_generates_is_refused_at_once(tmp_path, kind):
    cls, config, options = KINDS[kind]
    trainer = generating(cls, config, tmp_path, **options)
    words = f"{cls.__name__} is of completions that it generates.*pass val_data_or_fn a function"
    for data in (None, list(PROMPTS)):
        with pytest.raises(ValueError, match=words):
            FastForwardCallback(data).attach(trainer)
    assert not any(isinstance(c, FastForwardCallback) for c in trainer.callback_handler.callbacks)


def test_with_a_function_it_works(tmp_path):
    cls, config, options = KINDS["grpo"]
    trainer = generating(cls, config, tmp_path, **options)
    val_fn = ValidationLoss(trainer.model, [token_batch(4, 8)])
    callback = FastForwardCallback(val_fn, **fixed(2)).attach(trainer)
    trainer.train()
    assert [record.step for record in callback.optimizer.history] == [2, 4]


GENERATING = (
    A2POTrainer, AsyncDistillationTrainer, AsyncGRPOTrainer, GMPOTrainer, OnlineDPOTrainer,
    SDFTTrainer, SDPOTrainer,
)  # fmt: skip


@pytest.mark.parametrize("kind", GENERATING, ids=lambda kind: kind.__name__)
def test_those_that_need_a_server_or_more_are_refused_by_their_class(kind):
    class Own(kind):
        def __init__(self):
            """Nothing of what the trainer needs."""

    with pytest.raises(ValueError, match="is of completions that it generates"):
        check_trainer(Own())


def test_a_compute_loss_that_generates_is_refused_before_the_first_step(tmp_path):
    class Sampling(Trainer):
        def compute_loss(self, model, inputs, **options):
            model.generate(inputs["input_ids"], max_new_tokens=1)
            return super().compute_loss(model, inputs, **options)

    trainer = trainer_of(tmp_path, kind=Sampling)
    FastForwardCallback(VALIDATION).attach(trainer)
    with pytest.raises(ValueError, match=r"is of what its model generates.*a function"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert "generate" not in vars(trainer.model)


@pytest.mark.parametrize(
    ("build", "option"), [(sft, {"loss_type": "dft"}), (dpo, {"use_weighting": True})]
)
def test_a_loss_that_the_model_itself_weights_is_refused_by_its_option(tmp_path, build, option):
    trainer = build(tmp_path, **option)
    ((name, value),) = option.items()
    words = f"{name}={value!r} is no measure of progress.*pass val_data_or_fn a function"
    for data in (None, trainer.eval_dataset):
        with pytest.raises(ValueError, match=words):
            FastForwardCallback(data).attach(trainer)
    val_fn = ValidationLoss(trainer.model, [token_batch(4, 8)])
    callback = FastForwardCallback(val_fn, **fixed(2)).attach(trainer)
    trainer.train()
    assert [record.step for record in callback.optimizer.history] == [2, 4]


def test_the_other_losses_of_dpo_are_measured(tmp_path):
    FastForwardCallback().attach(dpo(tmp_path, loss_type=["sigmoid", "sft"]))
