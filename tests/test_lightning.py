"""Lightning's own Trainer, around modules that return a FastForward and ones that know of none."""

import csv
import importlib
import logging
import random
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from fastforward_optim import FastForward, RepeatSearch, ValidationLoss, lora_parameters
from fastforward_optim.integrations.lightning import FastForwardCallback

from .conftest import same, tiny_lora, token_batch


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    targets = torch.stack([inputs[:, 0] ** 2, inputs.sum(1).sin()], dim=1)
    return list(zip(inputs, targets, strict=True))


def loader(count, seed, batch_size=8, **options):
    return DataLoader(rows(count, seed), batch_size=batch_size, **options)


TRAIN, VALIDATION = loader(64, seed=1), loader(32, seed=2)


class Module(LightningModule):
    """A small network, as anyone writes it: it knows nothing of Fast Forward."""

    def __init__(self, lr=1e-3, configure=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
        self.lr = lr
        self.configure = configure

    def loss(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return optimizer if self.configure is None else self.configure(self, optimizer)

    def weights(self):
        return list(self.parameters())


def by_hand(*, scheduler=None, autocast=None, **options):
    """A ``configure_optimizers`` that returns a FastForward, with the data of VALIDATION."""

    def configure(module, optimizer):
        val_fn = ValidationLoss(
            module,
            VALIDATION,
            autocast=autocast,
            forward=lambda model, batch: (model.loss(batch), len(batch[0])),
        )
        optimizer = FastForward(optimizer, val_fn, **{"interval": 2, **options})
        module.fast_forward = optimizer
        return optimizer if scheduler is None else scheduler(optimizer)

    return configure


def trainer_of(folder, callbacks=(), **options):
    return Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{
            "max_steps": 8,
            "accelerator": "cpu",
            "logger": False,
            "log_every_n_steps": 1,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        },
    )


def fit(folder, module=None, callbacks=(), data=TRAIN, val_data=None, ckpt_path=None, **options):
    module = Module() if module is None else module
    trainer = trainer_of(folder, callbacks, **options)
    trainer.fit(module, data, val_data, ckpt_path=ckpt_path)
    return trainer, module


def outcome(optimizer):
    return [(record.step, record.trials, record.lr_scale) for record in optimizer.history]


def steps(optimizer):
    return [record.step for record in optimizer.history]


def logged(trainer, name):
    """A column of the CSVLogger's file, by step; of several rows of a step the last one."""
    with open(f"{trainer.logger.log_dir}/metrics.csv") as file:
        found = {int(r["step"]): r[name] for r in csv.DictReader(file) if r.get(name)}
    return {step: float(value) for step, value in found.items()}


# A FastForward that configure_optimizers returns


class Manual(Module):
    """Manual optimization, as Lightning's documentation has it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


@pytest.mark.parametrize("kind", [Module, Manual])
@pytest.mark.parametrize("calibrate_lr", [False, True])
def test_a_returned_optimizer_does_what_it_does_in_a_plain_loop(tmp_path, kind, calibrate_lr):
    options = {"calibrate_lr": calibrate_lr, "max_interval": 2}
    _, module = fit(tmp_path, kind(configure=by_hand(**options)))

    plain = Module(configure=by_hand(**options))
    optimizer = plain.configure_optimizers()
    for batch in TRAIN:
        optimizer.zero_grad()
        plain.loss(batch).backward()
        optimizer.step()
    assert steps(module.fast_forward) == [2, 4, 6, 8]
    assert any(record.tau for record in optimizer.history)
    assert outcome(module.fast_forward) == outcome(optimizer)
    assert same(module.weights(), plain.weights())


def test_a_training_step_reads_the_rate_that_was_set_and_what_it_sets_is_kept(tmp_path):
    class Setting(Module):
        def training_step(self, batch, batch_idx):
            (group,) = self.trainer.optimizers[0].param_groups
            read.append(group["lr"])
            group["lr"] = 1e-3 / (2 + batch_idx)
            return super().training_step(batch, batch_idx)

    read = []
    _, module = fit(tmp_path, Setting(configure=by_hand(calibrate_lr=True)))
    assert module.fast_forward.lr_scale != 1
    assert read == [1e-3, *(1e-3 / (2 + step) for step in range(7))]


def test_a_scheduler_in_lightnings_dict_sets_the_rate(tmp_path):
    def scheduler(optimizer):
        schedule = LambdaLR(optimizer, lambda step: 0.9**step)
        config = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    configure = by_hand(scheduler=scheduler, calibrate_lr=True)
    trainer, module = fit(tmp_path, Module(configure=configure))
    assert trainer.optimizers == [module.fast_forward]
    assert module.fast_forward.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.9**8)


def test_manual_optimization_of_several_optimizers(tmp_path):
    class Two(Manual):
        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            first = torch.optim.SGD(self.net[0].parameters(), lr=0.01)
            second = torch.optim.SGD(self.net[2].parameters(), lr=0.01)
            by_hand()(self, second)
            return first, self.fast_forward

    _, module = fit(tmp_path, Two(), max_steps=16)
    assert steps(module.fast_forward) == [2, 4, 6, 8]


# The callback


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.01},
        {"precision": "bf16-mixed"},
        {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 5},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("calibrate_lr", [False, True])
def test_it_does_what_an_optimizer_wrapped_by_hand_does(tmp_path, options, calibrate_lr):
    shared = {"interval": 2, "calibrate_lr": calibrate_lr}
    callback = FastForwardCallback(VALIDATION, **shared)
    _, module = fit(tmp_path, callbacks=[callback], **options)

    autocast = torch.bfloat16 if "precision" in options else None
    hand = Module(configure=by_hand(autocast=autocast, **shared))
    _, hand = fit(tmp_path, hand, callbacks=[Finish()], **options)
    assert len(callback.optimizer.history) >= 3
    assert any(record.tau for record in callback.optimizer.history)
    assert outcome(callback.optimizer) == outcome(hand.fast_forward)
    assert same(module.weights(), hand.weights())


class Finish(Callback):
    """What a loop of one's own calls at its end."""

    def on_train_end(self, trainer, pl_module):
        pl_module.fast_forward.finish()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_stage_is_logged_where_the_loss_of_its_batch_is(tmp_path, accumulate):
    callback = FastForwardCallback(VALIDATION, interval=2)
    trainer, _ = fit(
        tmp_path, callbacks=[callback], logger=CSVLogger(tmp_path), log_every_n_steps=3,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    history = {record.step - 1: record for record in callback.optimizer.history}
    assert list(history) == [1, 3, 5, 7]
    for name, value in {
        "tau": lambda record: record.tau,
        "trials": lambda record: record.passes,
        "loss": lambda record: record.loss_after,
        "lr_scale": lambda record: 1.0,
    }.items():
        expected = {step: pytest.approx(value(record)) for step, record in history.items()}
        assert logged(trainer, f"fast_forward/{name}") == expected
    assert list(logged(trainer, "loss")) == [2, 5]


def scheduled(module, optimizer):
    """A scheduler of the optimizer itself, which the callback wraps."""
    schedule = LambdaLR(optimizer, lambda step: 0.9**step)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # so that both runs are kept
@pytest.mark.parametrize("calibrate_lr", [False, True])
@pytest.mark.parametrize("how", ["callback", "returned"])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, calibrate_lr, how):
    options = {"interval": 3, "calibrate_lr": calibrate_lr, "max_interval": 3}

    def train(folder, ckpt_path=None):
        checkpoints = ModelCheckpoint(folder / "saved", "{epoch}", save_top_k=-1)
        callbacks = [checkpoints]
        if how == "callback":
            module = Module(configure=scheduled)
            callbacks.append(FastForwardCallback(VALIDATION, num_examples=8, **options))
        else:
            module = Module(configure=by_hand(**options))
        trainer, _ = fit(
            folder, module, callbacks, ckpt_path=ckpt_path, max_steps=-1, max_epochs=3,
            logger=CSVLogger(folder),
        )  # fmt: skip
        return trainer, module, trainer.optimizers[0]

    trainer, whole, first = train(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "saved" / "epoch=0.ckpt"
    resumed_trainer, resumed, second = train(tmp_path / "resumed", checkpoint)
    # Step 8, where it goes on, is in the middle of an interval.
    assert steps(first)[:5] == [3, 6, 9, 12, 15]
    assert outcome(second) == outcome(first)
    assert same(whole.weights(), resumed.weights())
    if how == "callback":
        whole_taus = logged(trainer, "fast_forward/tau")
        taus = {step: tau for step, tau in whole_taus.items() if step > 7}
        assert logged(resumed_trainer, "fast_forward/tau") == taus


def test_checkpoints_of_runs_with_and_without_it_can_be_gone_on_with(tmp_path):
    def train(folder, callbacks, ckpt_path=None, epochs=1):
        saved = ModelCheckpoint(tmp_path / folder, "last")
        options = {"ckpt_path": ckpt_path, "max_steps": -1, "max_epochs": epochs}
        fit(tmp_path, callbacks=[saved, *callbacks], **options)
        return tmp_path / folder / "last.ckpt"

    first = FastForwardCallback(VALIDATION, interval=3)
    without = train("without", [])
    with_it = train("with", [first])
    assert steps(first.optimizer) == [3, 6]
    callback = FastForwardCallback(VALIDATION, interval=3)
    with pytest.warns(UserWarning, match="dirpath has changed"):
        train("without, with", [callback], without, epochs=2)
    assert steps(callback.optimizer) == [3, 6]
    with pytest.warns(UserWarning, match="dirpath has changed"):
        train("with, without", [], with_it, epochs=2)


class Untidy(Module):
    """A training step that logs, counts, gathers and draws."""

    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()
        self.calls = 0
        self.losses = []
        self.by_name = {}
        self.register_buffer("total", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch) * (1 + random.random() * np.random.rand())
        self.calls += 1
        self.last = float(loss.detach())
        self.losses.append(self.last)
        self.by_name[len(self.by_name)] = self.last
        self.total += loss.detach()
        self.mean(loss)
        seen.append(self.training)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log_dict({"loss": loss, "calls": float(self.calls)})
        self.logger.log_metrics({"own": self.last}, step=self.calls)
        return loss


seen = []


def test_trials_leave_no_trace_besides_the_weights(tmp_path):
    def nothing(evaluate, last_tau):
        evaluate(0.0)
        evaluate(1.0)
        return 0.0

    def train(folder, callbacks):
        seen.clear()
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(1)
        data = loader(64, seed=1, shuffle=True)
        trainer, module = fit(
            folder, Untidy(), callbacks, data, max_steps=16, logger=CSVLogger(folder),
        )  # fmt: skip
        columns = {
            name: logged(trainer, name)
            for name in ("mean_step", "mean_epoch", "loss", "calls", "own")
        }
        gathered = [module.calls, module.losses, module.by_name, module.last, float(module.total)]
        draws = [random.random(), np.random.rand(), float(torch.rand(()))]
        return columns, gathered, draws, module.weights()

    plain = train(tmp_path / "plain", [])
    assert seen == 16 * [True]
    shuffled = loader(64, seed=2, shuffle=True)
    callback = FastForwardCallback(shuffled, interval=2, line_search=nothing)
    tried = train(tmp_path / "tried", [callback])
    # Four batches of eight at each of two trials, in eval mode.
    assert len(callback.optimizer.history) == 8
    assert seen.count(True) == 16
    assert seen.count(False) == 8 * 2 * 4
    assert tried[:-1] == plain[:-1]
    assert same(tried[-1], plain[-1])


def test_what_a_failing_trial_changed_is_put_back(tmp_path):
    class Failing(Untidy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if not self.training:
                raise ZeroDivisionError
            return loss

    module = Failing()
    trainer = trainer_of(tmp_path, [FastForwardCallback(VALIDATION, 2)], logger=CSVLogger(tmp_path))
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, TRAIN)
    assert module.calls == len(module.losses) == 2
    assert "log" not in vars(module)
    assert isinstance(trainer.logger, CSVLogger)


@pytest.mark.parametrize("stop", [{"max_steps": 7}, {"max_steps": -1, "max_epochs": 1}])
def test_the_last_stage_comes_before_the_last_validation_and_checkpoint(tmp_path, stop):
    class Validating(Module):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch))

    callback = FastForwardCallback(VALIDATION, interval=4, max_interval=4, calibrate_lr=True)
    checkpoints = ModelCheckpoint(tmp_path / "saved", "last", monitor="val_loss")
    trainer, module = fit(
        tmp_path, Validating(), [checkpoints, callback], val_data=loader(16, seed=3),
        limit_train_batches=7, logger=CSVLogger(tmp_path), **stop,
    )  # fmt: skip
    assert steps(callback.optimizer) == [4, 7]
    assert list(logged(trainer, "fast_forward/tau")) == [3, 6]
    assert callback.optimizer.history[-1].tau or callback.optimizer.history[-1].averaged
    saved = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)
    assert same([saved["state_dict"][n] for n, _ in module.named_parameters()], module.weights())
    assert len(saved["optimizer_states"][0]["fast_forward"]["history"]) == 2
    (result,) = trainer.validate(module, loader(16, seed=3), verbose=False)
    assert float(checkpoints.best_model_score) == pytest.approx(result["val_loss"], rel=1e-6)


def test_a_run_that_is_stopped_early_has_its_last_stage_too(tmp_path):
    stop = EarlyStopping("loss", stopping_threshold=1e9, check_on_train_epoch_end=True)
    callback = FastForwardCallback(VALIDATION, interval=5, max_interval=5, calibrate_lr=True)
    trainer, _ = fit(tmp_path, callbacks=[stop, callback], max_steps=80)
    assert trainer.global_step == 8
    assert steps(callback.optimizer) == [5, 8]


def test_a_scheduler_of_the_wrapped_optimizer_goes_on_and_is_monitored(tmp_path):
    callback = FastForwardCallback(VALIDATION, interval=2, calibrate_lr=True)
    monitor = LearningRateMonitor()
    fit(
        tmp_path, Module(configure=scheduled), [callback, monitor], logger=CSVLogger(tmp_path),
    )  # fmt: skip
    assert callback.optimizer.lr_scale != 1
    assert list(monitor.lrs) == ["lr-AdamW"]
    assert monitor.lrs["lr-AdamW"] == pytest.approx([1e-3 * 0.9**step for step in range(8)])
    assert callback.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.9**8)


def test_reduce_on_plateau_goes_on(tmp_path):
    def plateau(module, optimizer):
        schedule = ReduceLROnPlateau(optimizer, threshold=1e9, threshold_mode="abs", patience=0)
        return {"optimizer": optimizer, "lr_scheduler": schedule, "monitor": "loss"}

    callback = FastForwardCallback(VALIDATION, interval=2)
    fit(tmp_path, Module(configure=plateau), [callback], max_steps=-1, max_epochs=2)
    assert callback.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_a_step_that_the_scaler_skips_neither_counts_nor_triggers_a_stage(tmp_path):
    class Overflowing(Module):
        def training_step(self, batch, batch_idx):
            factor = float("inf") if self.training and batch_idx in (1, 2) else 1.0
            return super().training_step(batch, batch_idx) * factor

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    callback = FastForwardCallback(VALIDATION, interval=2)
    trainer, _ = fit(
        tmp_path, Overflowing(), [callback], logger=CSVLogger(tmp_path), max_steps=6,
        plugins=MixedPrecision("16-mixed", "cpu", scaler),
    )  # fmt: skip
    assert steps(callback.optimizer) == [2, 4]
    assert list(logged(trainer, "fast_forward/tau")) == [3, 5]


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


def test_a_calibrated_run_measures_other_examples_at_each_stage(tmp_path):
    callback = FastForwardCallback(
        loader(72, seed=2), interval=2, num_examples=10, calibrate_lr=True, max_interval=2
    )
    fit(tmp_path, callbacks=[callback])
    # A set is of two batches; the ninth, which makes none, is left out.
    assert lengths(callback) == 8 * [8]
    assert callback.optimizer.val_fn.batches_per_stage == 2
    assert callback.optimizer.val_fn.state_dict() == {"stages": 4}


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
    callback = FastForwardCallback(held_out, interval=2)
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


def test_a_function_of_ones_own_is_used_as_it_is(tmp_path):
    module, stages = Module(), []
    val_fn = ValidationLoss(module, VALIDATION, forward=lambda m, batch: (m.loss(batch), 8))
    callback = FastForwardCallback(
        val_fn, interval=4, line_search=RepeatSearch(), on_stage=stages.append
    )
    fit(tmp_path, module, [callback])
    assert callback.optimizer.val_fn is val_fn
    assert stages == list(callback.optimizer.history)
    assert len(stages) == 2


def test_fitting_again_begins_anew_as_lightning_does(tmp_path):
    callback = FastForwardCallback(VALIDATION, interval=2)
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
        ({"max_interval": 2}, ValueError, "max_interval must be at least 6"),
        ({"on_stage": 3}, TypeError, "on_stage"),
        ({"forward": 3}, TypeError, "forward"),
        ({"val_data_or_fn": "validation"}, TypeError, "must be a DataLoader"),
        ({"val_data_or_fn": 3}, TypeError, "must be a DataLoader"),
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
    with pytest.raises(ValueError, match="DeepSpeed takes the steps"):
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
