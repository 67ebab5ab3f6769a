"""What a run under Lightning measures, and what is refused before it begins."""

import importlib
import logging
import sys

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.utils.data import DataLoader

from fastforward_optim import ValidationLoss, lora_parameters
from fastforward_optim.integrations.lightning import FastForwardCallback

from .conftest import LOWEST, fixed, same, tiny_lora, token_batch
from .lightning_runs import (
    TRAIN,
    VALIDATION,
    Manual,
    Module,
    by_hand,
    fit,
    loader,
    outcome,
    rows,
    steps,
    trainer_of,
)


def lengths(callback):
    return [held.rows for held in callback.optimizer.val_fn.batches]


def test_no_more_batches_are_read_than_are_needed(tmp_path):
    read = []

    def endless():
        while True:
            batch = next(iter(VALIDATION))
            read.append(batch)
            yield batch

    callback = FastForwardCallback(endless(), num_examples=20)
    fit(tmp_path, callbacks=[callback])
    assert lengths(callback) == [8, 8, 8]
    assert len(read) == 3


def test_the_checks_of_a_calibrated_run_measure_other_examples_than_its_probe(tmp_path):
    callback = FastForwardCallback(
        loader(72, seed=2), interval=2, num_examples=10, calibrate_lr=True, max_interval=2
    )
    fit(tmp_path, callbacks=[callback])
    # A set is of two batches; sixty examples, for six sets of ten, are eight of them.
    assert lengths(callback) == 8 * [8]
    assert callback.optimizer.val_fn.batches_per_stage == 2
    assert callback.optimizer.val_fn.state_dict() == {"stages": 2}


def test_batches_are_the_units_of_a_training_step_and_rows_of_a_forward_that_gives_them(tmp_path):
    def forward(module, batch):
        inputs, targets = batch
        losses = (module.net(inputs) - targets).square().mean(1)
        return losses.mean(), len(losses), (losses, torch.ones_like(losses))

    for options, units in (({}, 2), ({"forward": forward}, 16)):
        callback = FastForwardCallback(VALIDATION, interval=2, num_examples=16, **options)
        fit(tmp_path, callbacks=[callback])
        measured = callback.optimizer.val_fn.measure()
        assert len(measured.rows.sums) == units
        assert sum(measured.rows.sums) / measured.weight == pytest.approx(measured.loss, rel=1e-5)


class Data(LightningDataModule):
    def train_dataloader(self):
        return TRAIN

    def val_dataloader(self):
        return VALIDATION


class WithValidation(Module):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))


def test_without_data_the_first_batches_of_the_validation_loader_are_taken(tmp_path, caplog):
    callback = FastForwardCallback(interval=2, num_examples=16)
    trainer = trainer_of(tmp_path, [callback])
    with caplog.at_level(logging.WARNING, "fastforward_optim"):
        trainer.fit(WithValidation(), datamodule=Data())
    assert "the first 16 examples of the validation loader: do not report" in caplog.text
    assert lengths(callback) == [8, 8]
    assert "val_loss" in trainer.callback_metrics


class Llama(LightningModule):
    """A training step of one argument, that takes its batch to pieces and returns a dict."""

    def __init__(self):
        super().__init__()
        self.model = tiny_lora()

    def training_step(self, batch):
        labels = batch.pop("labels")
        loss = self.model(**batch, labels=labels).loss
        return {"loss": loss, "rows": len(labels)}

    def configure_optimizers(self):
        return torch.optim.AdamW(lora_parameters(self.model), lr=1e-3)


def token_batches(seeds):
    return DataLoader([token_batch(4, 9, seed=seed) for seed in seeds], batch_size=None)


def test_lora_on_a_language_model_in_mixed_precision(tmp_path):
    held_out = token_batches([100, 101])
    callback = FastForwardCallback(held_out, line_search=LOWEST, **fixed(2))
    _, module = fit(tmp_path, Llama(), [callback], token_batches(range(8)), precision="bf16-mixed")
    history = callback.optimizer.history
    assert steps(callback.optimizer) == [2, 4, 6, 8]
    assert any(record.tau for record in history)
    loss = ValidationLoss(module.model, held_out, autocast=torch.bfloat16)()
    assert history[-1].loss_after == pytest.approx(loss, rel=1e-6)


def test_validation_batches_pass_the_modules_own_hooks(tmp_path):
    class Scaling(Module):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 1, batch[1]]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [2 * batch[0], batch[1]]

    callback = FastForwardCallback(VALIDATION)
    fit(tmp_path, Scaling(), [callback])
    held = callback.optimizer.val_fn.batches[0].batch
    assert same([held[0]], [2 * (next(iter(VALIDATION))[0] + 1)])


def test_a_forward_of_ones_own_measures_and_weights_the_batches(tmp_path):
    batches = [TRAIN.collate_fn(rows(size, seed=5)) for size in (8, 4)]

    def pair(module, batch):
        return module.loss(batch), 1.0 if len(batch[0]) == 8 else 3.0

    def alone(module, batch):
        return module.loss(batch)

    measured = {}
    for forward in (alone, pair):
        callback = FastForwardCallback(batches, num_examples=12, forward=forward)
        _, module = fit(tmp_path, callbacks=[callback])
        with torch.no_grad():
            losses = [float(module.loss(batch)) for batch in batches]
        measured[forward] = callback.optimizer.val_fn(), losses
    value, (first, second) = measured[alone]
    assert value == pytest.approx((8 * first + 4 * second) / 12, rel=1e-6)
    value, (first, second) = measured[pair]
    assert value == pytest.approx((first + 3 * second) / 4, rel=1e-6)


def test_manual_optimization_with_a_forward(tmp_path):
    callback = FastForwardCallback(
        VALIDATION, interval=2, forward=lambda module, batch: module.loss(batch)
    )
    _, module = fit(tmp_path, Manual(), [callback])
    _, hand = fit(tmp_path, Module(configure=by_hand()))
    assert outcome(callback.optimizer) == outcome(hand.fast_forward)
    assert same(module.weights(), hand.weights())


def test_fitting_again_begins_anew_as_lightning_does(tmp_path):
    callback = FastForwardCallback(VALIDATION, **fixed(2))
    trainer, module = fit(tmp_path, callbacks=[callback], max_steps=-1, max_epochs=1)
    first = callback.optimizer
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, TRAIN)
    assert callback.optimizer is not first
    assert steps(callback.optimizer) == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"intervall": 2}, TypeError, "intervall"),
        ({"interval": 0}, ValueError, "interval must be at least 1"),
        ({"num_examples": 0}, ValueError, "num_examples must be at least 1"),
        ({"forward": 3}, TypeError, "forward"),
        ({"val_data_or_fn": {"x": 1}}, TypeError, "must be a DataLoader"),
        ({"val_data_or_fn": print, "forward": print}, ValueError, "pass one of the two"),
    ],
)
def test_wrong_options_are_refused_at_once(options, error, words):
    with pytest.raises(error, match=words):
        FastForwardCallback(**options)


class TwoOptimizers(Manual):
    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


class NoLoss(Module):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if self.training else None


def forward(module, batch):
    return module.loss(batch)


@pytest.mark.parametrize(
    ("module", "callbacks", "words"),
    [
        (Module, [FastForwardCallback()], "no validation in this fit: pass val_data_or_fn"),
        (Module, [FastForwardCallback([])], "val_data_or_fn is empty"),
        (Manual, [FastForwardCallback(VALIDATION)], "optimizes manually.*pass forward="),
        (
            lambda: Module(configure=by_hand()),
            [FastForwardCallback(VALIDATION)],
            "a FastForward already: leave it out of configure_optimizers",
        ),
        (
            TwoOptimizers,
            [FastForwardCallback(VALIDATION, forward=forward)],
            "returned 2 optimizers: wrap the ones that you mean there",
        ),
    ],
    ids=["no data", "empty", "manual", "returned", "two optimizers"],
)
def test_what_cannot_work_is_said_before_the_training(tmp_path, module, callbacks, words):
    module = module()
    weights = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=words):
        fit(tmp_path, module, callbacks)
    assert same(weights, module.weights())


def test_several_validation_loaders_are_refused(tmp_path):
    class Several(WithValidation):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    with pytest.raises(ValueError, match="several validation loaders: pass val_data_or_fn"):
        fit(tmp_path, Several(), [FastForwardCallback()], val_data=[VALIDATION, TRAIN])


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    callback, module = FastForwardCallback(VALIDATION), Module()
    trainer = trainer_of(tmp_path, [callback])
    strategy = object.__new__(DeepSpeedStrategy)  # DeepSpeed itself is not needed for that
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", strategy)
    with pytest.raises(ValueError, match="DeepSpeed is not supported: its engine"):
        callback.setup(trainer, module, "fit")


def test_a_training_step_without_a_loss_in_eval_mode_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"training_step of NoLoss returned no loss.*pass forward="):
        fit(tmp_path, NoLoss(), [FastForwardCallback(VALIDATION)])


def test_without_lightning_the_error_says_what_to_install(monkeypatch):
    name = "fastforward_optim.integrations.lightning"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'fastforward-optim\[lightning\]'"):
        importlib.import_module(name)
