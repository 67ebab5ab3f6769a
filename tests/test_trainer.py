"""``FastForwardCallback`` in the transformers ``Trainer``."""

import json
import logging

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from fastforward_optim import FastForward, RepeatSearch, ValidationLoss, lora_parameters
from fastforward_optim.integrations.transformers import FastForwardCallback, TrainerLoss

from .conftest import LOWEST, fixed, same, tiny_lora, token_batch


def rows(count, seed, length=9):
    """Examples as a dataset has them; those at odd places are shorter."""
    batch = token_batch(count, length, seed=seed)
    return [
        {name: value[row][: length - 3 * (row % 2)].tolist() for name, value in batch.items()}
        for row in range(count)
    ]


def pad(examples):
    """A collator of one's own: rows of unequal length, padded."""
    length = max(len(example["input_ids"]) for example in examples)
    tokens = [e["input_ids"] + [0] * (length - len(e["input_ids"])) for e in examples]
    labels = [e["labels"] + [-100] * (length - len(e["labels"])) for e in examples]
    return {"input_ids": torch.tensor(tokens), "labels": torch.tensor(labels)}


# Its name in newer and in older versions of transformers.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)

TRAIN, VALIDATION = rows(48, seed=1), rows(12, seed=2)


def trainer_of(folder, model=None, kind=Trainer, **options):
    data = {name: options.pop(name) for name in ("eval_dataset", "optimizers") if name in options}
    arguments = TrainingArguments(
        str(folder),
        **{
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )
    model = tiny_lora() if model is None else model
    return kind(model, arguments, train_dataset=TRAIN, data_collator=pad, **data)


def outcome(optimizer):
    """Where stages led: the first check after resuming measures once more, to the same end."""
    return [(r.step, r.loss_before, r.loss_after, r.lr_scale) for r in optimizer.history]


def stages(trainer):
    """What the trainer's log says of the stages, by step."""
    return {
        entry["step"]: {k: v for k, v in entry.items() if k.startswith("fast_forward/")}
        for entry in trainer.state.log_history
        if "fast_forward/tau" in entry
    }


def test_it_does_what_an_optimizer_wrapped_by_hand_does(tmp_path):
    trainer = trainer_of(tmp_path)
    options = {"line_search": LOWEST, **fixed(2)}
    callback = FastForwardCallback(VALIDATION, **options).attach(trainer)
    trainer.train()

    by_hand = trainer_of(tmp_path)
    val_fn = ValidationLoss(by_hand.model, [pad(VALIDATION[:4]), pad(VALIDATION[4:8])])
    optimizer = by_hand.optimizer = FastForward(by_hand.create_optimizer(), val_fn, **options)
    by_hand.train()
    assert [record.step for record in callback.optimizer.history] == [2, 4, 6, 8]
    assert any(record.tau for record in optimizer.history)
    assert outcome(callback.optimizer) == outcome(optimizer)
    assert same(lora_parameters(trainer.model), lora_parameters(by_hand.model))


def test_each_stage_is_in_the_log_at_its_step(tmp_path):
    trainer = trainer_of(tmp_path, logging_steps=4)
    callback = FastForwardCallback(VALIDATION, **fixed(2)).attach(trainer)
    trainer.train()
    history = {record.step: record for record in callback.optimizer.history}
    assert stages(trainer) == {
        step: {
            "fast_forward/tau": record.tau,
            "fast_forward/trials": record.passes,
            "fast_forward/loss": record.loss_after,
            "fast_forward/lr_scale": 1.0,
            "fast_forward/learning_rate": pytest.approx(1e-3 * (1 - step / 8)),
        }
        for step, record in history.items()
    }
    json.dumps(trainer.state.log_history)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [4, 8]


def test_stages_reach_tensorboard(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = trainer_of(tmp_path, report_to=["tensorboard"])
    callback = FastForwardCallback(VALIDATION, interval=4).attach(trainer)
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    seen = [(event.step, event.value) for event in events.Scalars("train/fast_forward/tau")]
    assert seen == [(r.step, pytest.approx(r.tau)) for r in callback.optimizer.history]


@pytest.mark.parametrize("calibrate_lr", [False, True])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, calibrate_lr):
    def train(folder, resume=None):
        trainer = trainer_of(folder, max_steps=12, save_strategy="steps", save_steps=6)
        options = {"num_examples": 4, "calibrate_lr": calibrate_lr, **fixed(2)}
        callback = FastForwardCallback(VALIDATION, **options).attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, callback.optimizer

    whole, first = train(tmp_path / "whole")
    resumed, second = train(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-6"))
    assert outcome(second) == outcome(first)
    assert len(first.history) >= 3
    assert same(lora_parameters(whole.model), lora_parameters(resumed.model))
    for name in ("tau", "loss", "lr_scale", "learning_rate"):
        assert [entry[f"fast_forward/{name}"] for entry in stages(resumed).values()] == [
            entry[f"fast_forward/{name}"] for entry in stages(whole).values()
        ]


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.01},
        # The reentrant kind, which was the default, needs inputs that require gradients.
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
        {"optim": "sgd", "learning_rate": 0.1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_it_works_with_the_trainers_options(tmp_path, options):
    trainer = trainer_of(tmp_path, **options)
    callback = FastForwardCallback(VALIDATION, line_search=LOWEST, **fixed(2)).attach(trainer)
    trainer.train()
    history = callback.optimizer.history
    assert [record.step for record in history] == [2, 4, 6, 8]
    assert all(record.loss_after <= record.loss_before for record in history)
    assert any(record.tau for record in history)


def test_labels_of_a_classifier_are_not_shifted(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_labels=3,
    )  # fmt: skip
    examples = [
        {"input_ids": row["input_ids"][:6], "labels": row["labels"][0] % 3} for row in TRAIN
    ]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_eval_batch_size=5, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(BertForSequenceClassification(config), arguments, train_dataset=examples)
    callback = FastForwardCallback(examples[:12], **fixed(2)).attach(trainer)
    whole = {name: torch.tensor([e[name] for e in examples[:12]]) for name in examples[0]}
    expected = ValidationLoss(trainer.model, [whole])()
    assert TrainerLoss(trainer, examples[:12], 12, False)() == pytest.approx(expected, rel=1e-6)
    trainer.train()
    assert len(callback.optimizer.history) == 2


def test_the_losses_of_the_rows_are_those_of_the_model(tmp_path):
    trainer = trainer_of(tmp_path, per_device_eval_batch_size=5)
    found = TrainerLoss(trainer, VALIDATION, 12, False).measure()
    parts = [pad(VALIDATION[at : at + 5]) for at in (0, 5, 10)]
    assert found.rows == ValidationLoss(trainer.model, parts).measure().rows
    assert len(found.rows.sums) == 12
    assert not trainer.model._forward_hooks


def test_a_trainer_whose_compute_loss_gives_the_loss_alone_has_rows_too(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs):
            return model(**inputs).loss

    trainer = trainer_of(tmp_path, kind=Own)
    assert len(TrainerLoss(trainer, VALIDATION, 12, False).measure().rows.sums) == 12

    class Weighted(Trainer):
        def compute_loss(self, model, inputs):
            return 2 * model(**inputs).loss

    trainer = trainer_of(tmp_path, kind=Weighted)
    assert len(TrainerLoss(trainer, VALIDATION, 12, False).measure().rows.sums) == 3


def test_without_data_the_first_examples_of_the_eval_set_are_taken(tmp_path, caplog):
    trainer = trainer_of(tmp_path, eval_dataset=VALIDATION)
    callback = FastForwardCallback(num_examples=4).attach(trainer)
    with caplog.at_level(logging.WARNING, "fastforward_optim"):
        trainer.train()
    assert "the first 4 examples of eval_dataset: do not report on them" in caplog.text
    (batch,) = callback.optimizer.val_fn.batches
    assert same(list(batch.values()), list(pad(VALIDATION[:4]).values()))


@pytest.mark.parametrize("given", [True, False])
def test_several_data_sets_are_measured_in_equal_parts(tmp_path, given):
    several = {"a": VALIDATION, "b": rows(8, seed=5)}
    trainer = trainer_of(tmp_path, eval_dataset=several, max_steps=4, per_device_eval_batch_size=3)
    data = {name: list(part) for name, part in several.items()} if given else None
    callback = FastForwardCallback(data, num_examples=8, **fixed(2)).attach(trainer)
    trainer.train()
    val_fn = callback.optimizer.val_fn
    assert [len(batch["labels"]) for batch in val_fn.batches] == [3, 1, 3, 1]
    reports = trainer.evaluate({name: part[:4] for name, part in several.items()})
    expected = (reports["eval_a_loss"] + reports["eval_b_loss"]) / 2
    assert val_fn() == pytest.approx(expected, rel=1e-6)


def test_the_checks_of_a_calibrated_run_measure_other_examples_than_its_probe(tmp_path):
    trainer = trainer_of(tmp_path)
    callback = FastForwardCallback(
        VALIDATION, interval=2, num_examples=5, calibrate_lr=True, max_interval=2
    ).attach(trainer)
    trainer.train()
    val_fn = callback.optimizer.val_fn
    # Two whole sets of five, each in batches of four and one; the last two examples are left out.
    assert [len(batch["labels"]) for batch in val_fn.batches] == [4, 1, 4, 1]
    assert val_fn.batches_per_stage == 2
    assert [record.step for record in callback.optimizer.history] == [2, 4, 6, 8, 8]
    assert val_fn.state_dict() == {"stages": 2}
    assert trainer.get_eval_dataloader(VALIDATION) is not None


def test_the_last_stage_comes_before_the_last_evaluation_and_checkpoint(tmp_path):
    trainer = trainer_of(
        tmp_path, max_steps=7, save_strategy="steps", save_steps=7, eval_strategy="steps",
        eval_steps=7, eval_dataset=rows(8, seed=5),
    )  # fmt: skip
    callback = FastForwardCallback(VALIDATION, interval=4, calibrate_lr=True).attach(trainer)
    trainer.train()
    assert [record.step for record in callback.optimizer.history] == [4, 7]
    saved = torch.load(tmp_path / "checkpoint-7" / "optimizer.pt", weights_only=True)
    assert len(saved["fast_forward"]["history"]) == 2
    order = [
        "stage" if "fast_forward/tau" in entry else "evaluation"
        for entry in trainer.state.log_history
        if entry["step"] == 7 and ("fast_forward/tau" in entry or "eval_loss" in entry)
    ]
    assert order == ["stage", "evaluation"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        next(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e), rel=1e-6
    )


def test_the_best_model_is_left_as_it_was_loaded(tmp_path):
    trainer = trainer_of(
        tmp_path, max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, eval_dataset=rows(8, seed=5), load_best_model_at_end=True, learning_rate=0.5,
    )  # fmt: skip
    FastForwardCallback(VALIDATION, interval=4, calibrate_lr=True).attach(trainer)
    trainer.train()
    best = min(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(
    ("given", "steps", "warmup"),
    [
        ({"warmup_steps": 3}, 8, 3),
        ({"warmup_steps": 3, "lr_scheduler_type": "cosine"}, 8, 3),
        ({"warmup_steps": 3, "lr_scheduler_type": "constant"}, 8, 0),
        ({"warmup_steps": 3, "lr_scheduler_type": "constant_with_warmup"}, 8, 3),
        ({"max_steps": -1, "num_train_epochs": 1}, 12, 0),
    ],
    ids=str,
)
def test_the_runs_length_and_warm_up_are_the_trainers(tmp_path, given, steps, warmup):
    trainer = trainer_of(tmp_path, **given)
    callback = FastForwardCallback(VALIDATION, **fixed(2)).attach(trainer)
    trainer.train()
    optimizer = callback.optimizer
    assert (optimizer.total_steps, optimizer.warmup) == (steps, warmup)
    stages_at = [record.step for record in optimizer.history]
    assert stages_at == list(range(warmup + 2, steps + 1, 2))


def test_what_the_callback_is_told_of_the_run_holds(tmp_path):
    trainer = trainer_of(tmp_path, warmup_steps=3)
    callback = FastForwardCallback(VALIDATION, total_steps=20, warmup=1, **fixed(2))
    callback.attach(trainer)
    trainer.train()
    assert (callback.optimizer.total_steps, callback.optimizer.warmup) == (20, 1)
    assert [record.step for record in callback.optimizer.history] == [3, 5, 7]


def test_the_learning_rate_in_the_log_is_the_one_that_the_next_step_is_taken_at(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=10, warmup_steps=5)
    callback = FastForwardCallback(VALIDATION, calibrate_lr=True, **fixed(2)).attach(trainer)
    create, used = trainer.create_optimizer, []

    def create_optimizer(*args, **kwargs):
        optimizer = create(*args, **kwargs)
        optimizer.optimizer.register_step_pre_hook(
            lambda owner, *_: used.append(owner.param_groups[0]["lr"])
        )
        return optimizer

    trainer.create_optimizer = create_optimizer
    trainer.train()
    rates = {step: entry["fast_forward/learning_rate"] for step, entry in stages(trainer).items()}
    assert list(rates)[-1] == 10
    assert len(callback.optimizer.history) > 3
    for step in list(rates)[:-1]:
        assert rates[step] == pytest.approx(used[step]), step  # used[0] is the first step's


@pytest.mark.parametrize(("rows_a_step", "examples"), [(1, 8), (12, 12), (64, 32)])
@pytest.mark.filterwarnings("ignore:no stage will run in 1 steps")
def test_a_trial_measures_as_many_examples_as_a_step_trains_on_within_limits(
    tmp_path, rows_a_step, examples
):
    trainer = trainer_of(
        tmp_path, per_device_train_batch_size=min(rows_a_step, 4),
        gradient_accumulation_steps=max(rows_a_step // 4, 1), max_steps=1,
    )  # fmt: skip
    callback = FastForwardCallback(rows(40, seed=3)).attach(trainer)
    trainer.train()
    assert sum(len(batch["labels"]) for batch in callback.optimizer.val_fn.batches) == examples


def test_a_function_of_ones_own_is_used_as_it_is(tmp_path):
    trainer = trainer_of(tmp_path)
    val_fn = ValidationLoss(trainer.model, [pad(VALIDATION)])
    seen = []
    callback = FastForwardCallback(
        val_fn, interval=4, line_search=RepeatSearch(), on_stage=seen.append
    ).attach(trainer)
    trainer.train()
    assert callback.optimizer.val_fn is val_fn
    assert seen == list(callback.optimizer.history)


def test_training_again_goes_on_with_the_same_optimizer(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=4)
    callback = FastForwardCallback(VALIDATION, **fixed(2)).attach(trainer)
    trainer.train()
    first = callback.optimizer
    trainer.train()
    assert callback.optimizer is first
    assert [record.step for record in first.history] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"intervall": 2}, TypeError, "intervall"),
        ({"interval": 0}, ValueError, "interval must be at least 1"),
        ({"num_examples": 0}, ValueError, "num_examples must be at least 1"),
        ({"val_data_or_fn": 3}, TypeError, "val_data_or_fn must be a dataset"),
    ],
)
def test_wrong_options_are_refused_at_once(options, error, words):
    with pytest.raises(error, match=words):
        FastForwardCallback(**options)


def test_what_cannot_work_is_said_before_the_training(tmp_path):
    with pytest.raises(ValueError, match="has no eval_dataset: pass val_data_or_fn"):
        FastForwardCallback().attach(trainer_of(tmp_path))
    trainer = trainer_of(tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="DeepSpeed is not supported: its engine"):
        FastForwardCallback(VALIDATION).attach(trainer)
    trainer = trainer_of(tmp_path)
    FastForwardCallback([]).attach(trainer)
    with pytest.raises(ValueError, match="val_data_or_fn is empty"):
        trainer.train()
    trainer = trainer_of(tmp_path)
    callback = FastForwardCallback(VALIDATION).attach(trainer)
    with pytest.raises(ValueError, match="attached already"):
        callback.attach(trainer)
    with pytest.raises(ValueError, match="has a FastForward already"):
        FastForwardCallback(VALIDATION).attach(trainer)
    model = tiny_lora()
    wrapped = FastForward(torch.optim.AdamW(lora_parameters(model)), lambda: 0.0)
    with pytest.raises(ValueError, match="has a FastForward already"):
        FastForwardCallback(VALIDATION).attach(
            trainer_of(tmp_path, model=model, optimizers=(wrapped, None))
        )


def test_passed_in_callbacks_alone_it_says_what_to_call(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.add_callback(FastForwardCallback(VALIDATION))
    with pytest.raises(RuntimeError, match=r"call FastForwardCallback\(...\).attach\(trainer\)"):
        trainer.train()
