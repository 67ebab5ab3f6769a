"""A stage's loss is what ``trainer.evaluate()`` reports, and measuring it leaves no trace."""

import contextlib
import random
from collections import defaultdict
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from fastforward_optim.integrations.transformers import FastForwardCallback, TrainerLoss

from .conftest import LOWEST, fixed, tiny_lora
from .test_trainer import TRAIN, VALIDATION, pad, rows, trainer_of


def total(outputs, labels):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")


def divided(outputs, labels, num_items_in_batch):
    return total(outputs, labels) / num_items_in_batch


def divided_if_known(outputs, labels, num_items_in_batch=None):
    return total(outputs, labels) / (1 if num_items_in_batch is None else num_items_in_batch)


class WithLoss(Trainer):
    """Its loss function is a class attribute, since ``trainer_of`` passes arguments only."""

    function = staticmethod(divided)

    def __init__(self, *args, **options):
        super().__init__(*args, compute_loss_func=self.function, **options)


class IfKnown(WithLoss):
    function = staticmethod(divided_if_known)


class Counting(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = 2 * divided(outputs, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class WithoutOutputs(Trainer):
    """Trains, but has no ``evaluate``."""

    def compute_loss(self, model, inputs, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return divided(model(**inputs), labels, num_items_in_batch)


class Summed(Trainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        loss = total(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


KINDS = {
    "plain": {},
    "divided": {"kind": WithLoss},
    "divided-if-known": {"kind": IfKnown},
    "counting": {"kind": Counting},
    "smoothed": {"label_smoothing_factor": 0.1},
    "accumulating": {"kind": WithLoss, "gradient_accumulation_steps": 4},
    "autocast": {"bf16": True},
    "dropping": {"dataloader_drop_last": True},
    "by-length": {"train_sampling_strategy": "group_by_length"},
    "keeping-workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stages_loss_is_what_evaluate_reports_of_the_same_examples(tmp_path, kind):
    trainer = trainer_of(tmp_path, per_device_eval_batch_size=5, max_steps=4, **KINDS[kind])
    options = {"num_examples": 12, **fixed(2)}
    callback = FastForwardCallback(VALIDATION, **options).attach(trainer)
    before = trainer.evaluate(VALIDATION)["eval_loss"]
    assert TrainerLoss(trainer, VALIDATION, 12, False)() == pytest.approx(before, rel=1e-6)
    if kind == "keeping-workers":  # evaluate keeps its workers, and their examples
        trainer._eval_dataloaders.clear()
        trainer.args.dataloader_num_workers = 0
        trainer.args.dataloader_persistent_workers = False
    trainer.train()
    after = trainer.evaluate(VALIDATION)["eval_loss"]
    assert callback.optimizer.history[-1].loss_after == pytest.approx(after, rel=1e-6)
    assert after != before


@pytest.mark.parametrize("form", [list, Dataset.from_list])
def test_a_set_of_either_kind_is_measured_as_evaluate_does(tmp_path, form):
    trainer = trainer_of(tmp_path)
    expected = trainer.evaluate(form(VALIDATION))["eval_loss"]
    assert TrainerLoss(trainer, form(VALIDATION), 12, False)() == pytest.approx(expected, rel=1e-6)


def test_a_compute_loss_without_outputs_is_measured_as_it_trains(tmp_path):
    trainer = trainer_of(tmp_path, kind=WithoutOutputs, max_steps=2)
    plain = trainer_of(tmp_path)
    expected = plain.evaluate(VALIDATION)["eval_loss"]
    assert TrainerLoss(trainer, VALIDATION, 12, False)() == pytest.approx(expected, rel=1e-6)
    callback = FastForwardCallback(VALIDATION, **fixed(2)).attach(trainer)
    trainer.train()
    assert len(callback.optimizer.history) == 1


def test_a_sequence_to_sequence_trainer_is_measured_without_generating(tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, predict_with_generate=True, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=TRAIN, data_collator=pad)
    callback = FastForwardCallback(VALIDATION[:8], **fixed(2)).attach(trainer)
    trainer.train()
    (record,) = callback.optimizer.history
    expected = trainer.evaluate(VALIDATION[:8])["eval_loss"]
    assert record.loss_after == pytest.approx(expected, rel=1e-6)


def test_what_evaluate_of_the_users_own_prepares_is_prepared(tmp_path):
    class Words(Trainer):
        def evaluate(self, eval_dataset=None, *args, **options):
            rows = [{"input_ids": r["words"], "labels": r["words"]} for r in eval_dataset]
            return super().evaluate(rows, *args, **options)

    trainer = trainer_of(tmp_path, kind=Words)
    raw = [{"words": row["input_ids"]} for row in VALIDATION]
    expected = trainer.evaluate(raw)["eval_loss"]
    assert TrainerLoss(trainer, raw, 12, False)() == pytest.approx(expected, rel=1e-6)


def test_a_loader_that_takes_another_set_is_used_for_its_collator_alone(tmp_path):
    class Fixed(Trainer):
        def get_eval_dataloader(self, eval_dataset=None):
            return DataLoader(rows(20, seed=9), batch_size=4, collate_fn=pad)

    trainer = trainer_of(tmp_path, kind=Fixed)
    expected = trainer_of(tmp_path).evaluate(VALIDATION)["eval_loss"]
    assert TrainerLoss(trainer, VALIDATION, 12, False)() == pytest.approx(expected, rel=1e-6)


def test_evaluate_goes_on_with_its_own_set_where_workers_are_kept(tmp_path):
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = trainer_of(tmp_path, eval_dataset=TRAIN[:8], **options)
    TrainerLoss(trainer, VALIDATION, 8, False)()
    expected = trainer_of(tmp_path).evaluate(TRAIN[:8])["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    trainer._eval_dataloaders.clear()


def test_a_summed_loss_leads_to_the_same_stages_in_batches_of_any_one_size(tmp_path):
    def taus(size):
        trainer = trainer_of(
            tmp_path, kind=Summed, max_steps=4, per_device_eval_batch_size=size, optim="sgd",
            learning_rate=1e-4,
        )  # fmt: skip
        options = {"num_examples": 12, "line_search": LOWEST, **fixed(2)}
        callback = FastForwardCallback(VALIDATION, **options).attach(trainer)
        trainer.train()
        expected = trainer.evaluate(VALIDATION)["eval_loss"]
        assert callback.optimizer.history[-1].loss_after == pytest.approx(expected, rel=1e-6)
        return [record.tau for record in callback.optimizer.history]

    assert taus(12) == taus(6) == taus(4)
    assert any(taus(12))


def test_a_summed_loss_in_batches_of_several_sizes_is_refused_before_the_first_step(tmp_path):
    trainer = trainer_of(tmp_path, kind=Summed, per_device_eval_batch_size=5)
    FastForwardCallback(VALIDATION, num_examples=12).attach(trainer)
    with pytest.raises(ValueError, match=r"is a sum over the batch.*5 and 2.*make num_examples"):
        trainer.train()
    assert trainer.state.global_step == 0


class Noted:
    def __init__(self):
        self.values = [1.0]
        self.count = 0


class Busy(Trainer):
    """Leaves a trace in everything that it can reach."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.calls = 0
        self.names = "none"
        self.losses = []
        self.alias = self.losses
        self.nested = {"train": defaultdict(list), "eval": {"deep": [[1]]}}
        self.seen = {1}
        self.total = torch.zeros(())
        self.pair = ([], {})
        self.noted = Noted()
        self.space = SimpleNamespace(calls=0, items=[])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not self.model.training:
            self.calls += 1
            self.names = "evaluated"
            self.losses.append(result[0])
            self.nested["eval"]["deep"][0].append(2)
            self.nested["train"]["more"].append(3)
            self.seen.add(2)
            self.total += 1
            self.pair[0].append(1)
            self.noted.values.append(2.0)
            self.noted.count += 1
            self.space.items.append(1)
            self.space.calls += 1
            self.new = 1
            self.state.trace = 1
            self.state.log_history.append({"trace": 1})
            self.control.should_log = True
            self.log({"trace": 1.0})
            result = (result[0] * (1 + 0 * random.random() + 0 * numpy.random.rand()), result[1])
        return result if return_outputs else result[0]


def traces(trainer):
    return repr(
        [
            trainer.calls, trainer.names, trainer.losses, trainer.nested, trainer.seen,
            trainer.total, trainer.pair, vars(trainer.noted), trainer.space,
            hasattr(trainer, "new"), hasattr(trainer.state, "trace"), trainer.state.log_history,
            trainer.control,
        ]
    )  # fmt: skip


def test_a_trial_leaves_no_trace_in_the_trainer(tmp_path, capsys):
    trainer = trainer_of(tmp_path, kind=Busy)
    val_fn = TrainerLoss(trainer, VALIDATION, 12, False)
    before, names = traces(trainer), set(vars(trainer))
    draws = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    val_fn.check()
    first = val_fn()
    with val_fn.measuring():
        assert val_fn() == val_fn() == first
    assert traces(trainer) == before
    assert set(vars(trainer)) == names
    assert trainer.alias is trainer.losses
    assert random.getstate() == draws[0]
    assert numpy.random.get_state()[1].tolist() == draws[1]
    assert torch.equal(torch.get_rng_state(), draws[2])
    assert "trace" not in capsys.readouterr().out
    trainer.evaluate(VALIDATION)
    assert trainer.calls == 3, "evaluate is as it was"


def test_a_trial_that_fails_leaves_no_trace_either(tmp_path):
    class Failing(Busy):
        def compute_loss(self, *args, **options):
            super().compute_loss(*args, **options)
            raise OSError("the disk is full")

    trainer = trainer_of(tmp_path, kind=Failing)
    val_fn = TrainerLoss(trainer, VALIDATION, 12, False)
    before = traces(trainer)
    with contextlib.suppress(OSError):
        val_fn()
    assert traces(trainer) == before
    assert "log" not in vars(trainer)


def test_each_trial_finds_the_trainer_as_the_first_one_did(tmp_path):
    class Annealed(Trainer):
        calls = 0

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            result = super().compute_loss(model, inputs, True, num_items_in_batch)
            self.calls += not self.model.training
            loss = result[0] * (1 + self.calls + random.random() + numpy.random.rand())
            return (loss, result[1]) if return_outputs else loss

    val_fn = TrainerLoss(trainer_of(tmp_path, kind=Annealed), VALIDATION, 12, False)
    with val_fn.measuring():
        assert val_fn() == val_fn()


def test_stages_that_find_nothing_leave_the_run_as_it_was(tmp_path):
    def stay(evaluate, last_tau):
        evaluate(0.0)
        return 0.0

    def run(attach):
        trainer = trainer_of(tmp_path, model=tiny_lora(lora_dropout=0.1), kind=Busy)
        if attach:
            FastForwardCallback(VALIDATION, line_search=stay, **fixed(2)).attach(trainer)
        random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
        trainer.train()
        log = [
            {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
            for entry in trainer.state.log_history
            if "fast_forward/tau" not in entry
        ]
        trainer.state.log_history.clear()
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        return log, traces(trainer), weights, (random.random(), numpy.random.rand())

    plain, staged = run(False), run(True)
    assert staged[:2] == plain[:2]
    assert staged[3] == plain[3]
    assert all(map(torch.equal, staged[2], plain[2]))


def test_what_the_trainer_cannot_measure_is_said_before_the_first_step(tmp_path):
    class Keyed(Trainer):
        def compute_loss(self, model, inputs, **options):
            weight = inputs.pop("weight") if self.model.training else inputs.pop("wait")
            return weight * super().compute_loss(model, inputs, **options)

    trainer = trainer_of(tmp_path, kind=Keyed)
    FastForwardCallback(VALIDATION).attach(trainer)
    with pytest.raises(ValueError, match=r"examples in val_data_or_fn \(KeyError: 'wait'\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_the_collator_cannot_take_is_said_when_it_is_given(tmp_path):
    raw = [{"text": "one two"}] * 4
    for form in (raw, Dataset.from_list(raw), iter(raw)):
        with pytest.raises(ValueError, match=r"val_data_or_fn of \['text'\]"):
            FastForwardCallback(form).attach(trainer_of(tmp_path))


def test_the_arguments_are_as_they_were(tmp_path):
    trainer = trainer_of(tmp_path, dataloader_num_workers=1, dataloader_drop_last=True)
    before = trainer.args.to_dict()
    assert isinstance(trainer.args, TrainingArguments)
    TrainerLoss(trainer, VALIDATION, 12, False)()
    assert trainer.args.to_dict() == before
