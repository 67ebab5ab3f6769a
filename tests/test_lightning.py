"""Lightning's own Trainer, around modules that return a FastForward and ones that know of none."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from fastforward_optim.calibration import calibrator
from fastforward_optim.integrations.lightning import FastForwardCallback

from .conftest import LOWEST, fixed, same
from .lightning_runs import (
    TRAIN,
    VALIDATION,
    Manual,
    Module,
    by_hand,
    fit,
    loader,
    logged,
    outcome,
    steps,
    trainer_of,
)


def searching(calibrate_lr):
    return {} if calibrate_lr else {"line_search": LOWEST}


# A FastForward that configure_optimizers returns


@pytest.mark.parametrize("kind", [Module, Manual])
@pytest.mark.parametrize("calibrate_lr", [False, True])
def test_a_returned_optimizer_does_what_it_does_in_a_plain_loop(tmp_path, kind, calibrate_lr):
    options = {"calibrate_lr": calibrate_lr, **searching(calibrate_lr), **fixed(2)}
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
    shared = {"calibrate_lr": calibrate_lr, **searching(calibrate_lr), **fixed(2)}
    callback = FastForwardCallback(VALIDATION, **shared)
    _, module = fit(tmp_path, callbacks=[callback], **options)

    autocast = torch.bfloat16 if "precision" in options else None
    total = 10 if "max_epochs" in options else 8
    hand = Module(configure=by_hand(autocast=autocast, total_steps=total, **shared))
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
    callback = FastForwardCallback(VALIDATION, **fixed(2))
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
        "learning_rate": lambda record: 1e-3,
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

    first = FastForwardCallback(VALIDATION, **fixed(3))
    without = train("without", [])
    with_it = train("with", [first])
    assert steps(first.optimizer) == [3, 6]
    callback = FastForwardCallback(VALIDATION, **fixed(3))
    with pytest.warns(UserWarning, match="dirpath has changed"):
        train("without, with", [callback], without, epochs=2)
    assert steps(callback.optimizer) == [3, 6]
    with pytest.warns(UserWarning, match="dirpath has changed"):
        train("with, without", [], with_it, epochs=2)


class Meter:
    def __init__(self):
        self.values = []


class Untidy(Module):
    """A training step that logs, counts, gathers and draws."""

    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()
        self.calls = 0
        self.losses = []
        self.by_name = {}
        self.nested = {"deep": [[]]}
        self.meter = Meter()
        self.register_buffer("total", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch) * (1 + random.random() * np.random.rand())
        self.calls += 1
        self.last = float(loss.detach())
        self.losses.append(self.last)
        self.by_name[len(self.by_name)] = self.last
        self.nested["deep"][0].append(self.last)
        self.meter.values.append(self.last)
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
        gathered = [
            module.calls, module.losses, module.by_name, module.last, float(module.total),
            module.nested, module.meter.values,
        ]  # fmt: skip
        draws = [random.random(), np.random.rand(), float(torch.rand(()))]
        return columns, gathered, draws, module.weights()

    plain = train(tmp_path / "plain", [])
    assert seen == 16 * [True]
    shuffled = loader(64, seed=2, shuffle=True)
    callback = FastForwardCallback(shuffled, line_search=nothing, **fixed(2))
    tried = train(tmp_path / "tried", [callback])
    # Four batches of eight at each of two trials, in eval mode, and one before the first step.
    assert len(callback.optimizer.history) == 8
    assert seen.count(True) == 16
    assert seen.count(False) == 8 * 2 * 4 + 1
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
    assert module.calls == len(module.losses) == 0, "tried before the first step"
    assert "log" not in vars(module)
    assert isinstance(trainer.logger, CSVLogger)


@pytest.mark.parametrize("stop", [{"max_steps": 7}, {"max_steps": -1, "max_epochs": 1}])
def test_the_last_stage_comes_before_the_last_validation_and_checkpoint(
    tmp_path, stop, monkeypatch
):
    monkeypatch.setattr(calibrator, "_BETTER", -1e9)  # so that it moves the weights

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
    last = callback.optimizer.history[-1]
    assert last.averaged or last.tau  # to the mean, or back: the weights have moved
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


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, 8),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 5}, 10),
        ({"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 2}, 8),
        ({"max_steps": -1, "max_epochs": -1, "max_time": {"seconds": 1}}, None),
    ],
    ids=str,
)
def test_the_runs_length_is_what_lightning_knows(tmp_path, given, steps):
    class Stopping(Module):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.trainer.should_stop = steps is None

    callback = FastForwardCallback(VALIDATION, calibrate_lr=True, **fixed(2))
    fit(tmp_path, Stopping(), [callback], **given)
    assert callback.optimizer.total_steps == steps


def test_the_length_that_the_callback_is_told_holds(tmp_path):
    callback = FastForwardCallback(VALIDATION, total_steps=50, warmup=3, **fixed(2))
    fit(tmp_path, callbacks=[callback])
    assert (callback.optimizer.total_steps, callback.optimizer.warmup) == (50, 3)
    assert steps(callback.optimizer) == [5, 7]


def test_the_rate_in_the_log_is_the_one_that_is_really_used(tmp_path):
    callback = FastForwardCallback(VALIDATION, calibrate_lr=True, **fixed(2))
    logger = CSVLogger(tmp_path)
    trainer, _ = fit(tmp_path, Module(configure=scheduled), [callback], logger=logger)
    expected = {
        # The scheduler has gone on when the last stage comes.
        record.step - 1: pytest.approx(
            record.lr_scale * 1e-3 * 0.9 ** (record.step - (record.kind != "finish"))
        )
        for record in callback.optimizer.history
    }
    assert logged(trainer, "fast_forward/learning_rate") == expected
    assert any(record.lr_scale != 1 for record in callback.optimizer.history)
