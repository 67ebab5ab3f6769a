"""Mistakes that can be seen from how a run goes are said once, with the remedy."""

import copy
import functools
import gc
import itertools
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from fastforward_optim import FastForward, RepeatSearch, ValidationLoss
from fastforward_optim.diagnostics.notices import _say_that_finish_is_missing

from .conftest import UNCLIPPED, Regression, fixed, same, tiny_llama, tiny_lora, token_batch


def adamw(problem, val_fn, lr=1e-3, **options):
    return FastForward(torch.optim.AdamW(problem.parameters, lr=lr), val_fn, **options)


# A val_fn that does not depend on the weights.


@pytest.mark.parametrize("options", [{"calibrate_lr": True}, {}, {"line_search": RepeatSearch()}])
def test_a_val_fn_of_another_model_is_remarked_on_once_and_the_rate_left_alone(problem, options):
    other = copy.deepcopy(problem.model)

    def val_fn():
        return F.mse_loss(other(problem.inputs[64:]), problem.targets[64:])

    optimizer = adamw(problem, val_fn, max_interval=6, **options)
    with pytest.warns(UserWarning, match="does not depend on the tensors that the optim") as said:
        problem.train(optimizer, 60)
    optimizer.finish()
    assert len(said) == 1
    assert said[0].filename.endswith("regression.py"), "where step() was called"
    assert optimizer.lr_scale == 1.0
    assert not any(record.useful for record in optimizer.history)
    plain = Regression()
    if not options.get("calibrate_lr"):
        plain.train(torch.optim.AdamW(plain.parameters, lr=1e-3), 60)
        assert same(plain.weights(), problem.weights())


def test_a_calibrated_rate_that_is_left_alone_is_the_one_set_from_then_on(problem):
    """Six steps of the probe at a small part of it, then the user's own."""
    optimizer = adamw(problem, lambda: 1.0, calibrate_lr=UNCLIPPED)
    plain = Regression()
    by_hand = torch.optim.AdamW(plain.parameters, lr=1e-3 / 64)
    plain.train(by_hand, 6)
    by_hand.param_groups[0]["lr"] = 1e-3
    plain.train(by_hand, 34, first=6)
    with pytest.warns(UserWarning, match="does not depend"):
        problem.train(optimizer, 40)
    assert same(problem.weights(), plain.weights())
    assert len(optimizer.history) == 1
    assert optimizer.finish() is None


def test_a_loss_of_few_values_is_not_taken_for_one_that_does_not_depend_on_the_weights(problem):
    """As in bfloat16: neighbours are equal."""
    optimizer = adamw(problem, lambda: problem.val_loss().bfloat16(), lr=1e-3, **fixed(1))
    problem.train(optimizer, 30)
    assert len(optimizer.history) == 30


# A val_fn that is no function of the weights.


def own_generator(problem):
    generator = torch.Generator().manual_seed(0)

    def val_fn():
        noise = torch.randn(96, 6, generator=generator)
        return F.mse_loss(problem.model(problem.inputs + noise), problem.targets)

    return val_fn


def next_batch(problem):
    starts = itertools.count(0, 8)
    return lambda: problem.loss(slice(next(starts) % 64, None))


def used_up(problem):
    batches = iter([slice(64, 80), slice(80, 96)])
    return lambda: sum((problem.loss(rows) for rows in batches), torch.zeros(()))


@pytest.mark.parametrize("make", [own_generator, next_batch, used_up])
@pytest.mark.parametrize("calibrate_lr", [False, True])
def test_a_val_fn_that_differs_at_the_same_weights_is_remarked_on_at_the_first_step(
    problem, make, calibrate_lr
):
    optimizer = adamw(problem, make(problem), calibrate_lr=calibrate_lr)
    with pytest.warns(UserWarning, match=r"and then .* at the same weights") as said:
        problem.train(optimizer, 1)
    assert len(said) == 1
    problem.train(optimizer, 4, first=1)


def test_what_val_fn_raises_comes_before_the_first_step_with_a_note(problem):
    def val_fn():
        return problem.model(problem.inputs[:, :3]).sum()

    optimizer, before = adamw(problem, val_fn), problem.weights()
    problem.backward(0)
    with pytest.raises(RuntimeError, match="shapes") as caught:
        optimizer.step()
    assert (
        "raised in val_fn, which FastForward tries before the first step" in caught.value.__notes__
    )
    assert same(problem.weights(), before)


def test_a_val_fn_that_changes_the_weights_is_found_before_the_first_step(problem):
    def val_fn():
        with torch.no_grad():
            problem.parameters[0].add_(1.0)
        return problem.val_loss()

    problem.backward(0)
    before = problem.weights()
    with pytest.raises(RuntimeError, match="val_fn changed 1 of the 4 parameters"):
        adamw(problem, val_fn).step()
    assert same(problem.weights(), before)


# Modes.


class Evaluator:
    def __init__(self, problem):
        self.model, self.problem = problem.model, problem

    def __call__(self):
        self.model.eval()
        return self.problem.val_loss()

    def method(self):
        return self()

    def of(self, model):
        model.eval()
        return self.problem.val_loss()


@pytest.mark.parametrize("kind", ["closure", "decorated", "object", "method", "partial"])
def test_a_val_fn_that_leaves_the_model_in_eval_mode_is_remarked_on(kind):
    problem = Regression(dropout=0.1)
    model = problem.model

    def closure():
        model.eval()
        return problem.val_loss()

    evaluator = Evaluator(problem)
    val_fn = {
        "closure": closure,
        "decorated": torch.no_grad()(closure),
        "object": evaluator,
        "method": evaluator.method,
        "partial": functools.partial(evaluator.of, model),
    }[kind]
    problem.backward(0)
    with pytest.warns(UserWarning, match=r"leaves Sequential in eval mode.*call model.train\(\)"):
        adamw(problem, val_fn).step()
    assert all(module.training for module in model.modules())


def test_a_variable_that_val_fn_could_use_may_be_unbound(problem):
    """As one that is set in a branch only."""

    def make():
        def val_fn():
            return problem.val_loss() if problem else unbound

        if not problem:
            unbound = 0.0
        return val_fn

    problem.train(adamw(problem, make()), 1)


# Not a loss.


def test_an_accuracy_is_remarked_on(problem):
    signs = problem.targets[64:] > problem.targets[64:].median()

    def accuracy():
        return ((problem.model(problem.inputs[64:]) > 0) == signs).float().mean()

    optimizer = adamw(problem, accuracy, lr=3e-3, **fixed(2))
    with pytest.warns(UserWarning, match="looks like an accuracy or an error rate"):
        problem.train(optimizer, 24)


class Classes:
    """Learn classes; the loss with a stop-gradient rises from chance while training works."""

    def __init__(self):
        torch.manual_seed(0)
        self.inputs = torch.randn(256, 8)
        self.labels = (self.inputs @ torch.randn(8, 20)).argmax(1)
        self.model = nn.Linear(8, 20)

    def loss(self, rows, weighted=True):
        log_p = self.model(self.inputs[rows]).log_softmax(-1)
        log_p = log_p.gather(1, self.labels[rows][:, None])[:, 0]
        return -(log_p * log_p.exp().detach()).mean() if weighted else -log_p.mean()

    def train(self, optimizer, steps):
        for step in range(steps):
            optimizer.zero_grad()
            start = 32 * step % 192
            self.loss(slice(start, start + 32)).backward()
            optimizer.step()


@pytest.mark.parametrize("what", ["stop-gradient", "negative"])
def test_a_loss_that_rises_along_the_first_steps_leaves_the_rate_alone(what):
    problem = Classes()
    sign, weighted = (1, True) if what == "stop-gradient" else (-1, False)
    optimizer = FastForward(
        torch.optim.Adam(problem.model.parameters(), lr=1e-3),
        lambda: sign * problem.loss(slice(192, 256), weighted),
        calibrate_lr=True,
    )
    before = problem.loss(slice(192, 256), weighted=False).item()
    with pytest.warns(UserWarning, match="does not fall with the training loss") as said:
        problem.train(optimizer, 90)
    assert len(said) == 1
    assert optimizer.lr_scale == 1.0
    assert problem.loss(slice(192, 256), weighted=False) < before - 0.1


def test_without_calibration_steps_that_always_raise_it_are_remarked_on():
    problem = Classes()
    base = torch.optim.Adam(problem.model.parameters(), lr=1e-3)
    optimizer = FastForward(base, lambda: problem.loss(slice(192, 256)), **fixed(4))
    with pytest.warns(UserWarning, match="have raised what val_fn returns each time: val_fn does"):
        problem.train(optimizer, 24)


# Steps that change nothing, or go past the wrapper.


def test_zero_grad_before_step_is_remarked_on(problem):
    optimizer = adamw(problem, problem.val_loss, interval=2)

    def train():
        for step in range(12):
            problem.backward(step)
            optimizer.zero_grad()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"no gradients: call zero_grad\(\) after step") as said:
        train()
    assert len(said) == 1
    reason = "no stage yet: the optimizer changes no weight: its tensors have no gradients"
    assert reason in str(optimizer.history)
    assert reason in repr(optimizer)


@pytest.mark.parametrize("calibrate_lr", [False, True])
def test_an_optimizer_that_was_made_before_the_adapter_is_remarked_on(
    problem, calibrate_lr, caplog
):
    """Its tensors are the base model's, which the adapter freezes."""
    optimizer = adamw(problem, problem.val_loss, interval=2, calibrate_lr=calibrate_lr)
    model = get_peft_model(problem.model, LoraConfig(target_modules=["0"]))

    for _ in range(8):
        model(problem.inputs).square().mean().backward()
        optimizer.step()
    [message] = [record.message for record in caplog.records]
    assert "make the optimizer after get_peft_model" in message
    assert "no stage yet: none of the tensors requires a gradient" in str(optimizer.history)


def test_steps_that_go_past_the_wrapper_are_remarked_on(problem):
    base = torch.optim.AdamW(problem.parameters)
    optimizer = FastForward(base, problem.val_loss)
    assert "call step() here, not on the optimizer in it" in repr(optimizer)
    with pytest.warns(UserWarning, match=r"AdamW has taken 3 steps and FastForward none") as said:
        problem.train(base, 12)
    assert len(said) == 1
    assert "it has taken no step" in str(optimizer.history)


def test_once_the_wrapper_steps_it_leaves_no_hook_on_the_wrapped_one(problem):
    base = torch.optim.AdamW(problem.parameters)
    optimizer = FastForward(base, problem.val_loss)
    problem.train(optimizer, 1)
    assert not base._optimizer_step_post_hooks
    problem.train(base, 12)
    assert str(optimizer.history) == "Fast Forward: no stage yet: the first one comes after step 6"


@pytest.mark.parametrize("options", [{"warmup": 100}, {"interval": 70}])
def test_a_run_that_is_over_before_its_first_stage_is_remarked_on(problem, options):
    optimizer = adamw(problem, problem.val_loss, total_steps=60, **options)
    with pytest.warns(UserWarning, match="no stage will run in 60 steps"):
        problem.train(optimizer, 1)


def test_an_accumulating_wrapper_is_not_remarked_on(problem):
    """Most of its steps change nothing."""

    class Every8(torch.optim.SGD):
        count = 0

        def step(self, closure=None):
            self.count += 1
            return super().step(closure) if self.count % 8 == 0 else None

    optimizer = FastForward(Every8(problem.parameters, lr=0.01), problem.val_loss, **fixed(1))
    problem.train(optimizer, 80)
    assert len(optimizer.history) == 10


# Calibration.


def test_a_calibration_with_one_set_is_told_of_the_second():
    model, batches = tiny_lora(), [token_batch(2, 9, seed=seed) for seed in (1, 2)]
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for given in (batches, batches[:1]):
        val_fn = ValidationLoss(model, given)
        with pytest.warns(UserWarning, match="pass twice as many, in two sets"):
            FastForward(base, val_fn, calibrate_lr=True)
        FastForward(base, val_fn)
    FastForward(base, ValidationLoss(model, batches, batches_per_stage=1), calibrate_lr=True)


def test_a_finish_that_was_forgotten_is_remarked_on_when_the_optimizer_goes(problem, caplog):
    gc.collect()  # of other tests
    _say_that_finish_is_missing.cache_clear()

    def run(finish):
        caplog.clear()
        optimizer = adamw(problem, problem.val_loss, calibrate_lr=True)
        problem.train(optimizer, 20)
        if finish:
            optimizer.finish()
        del optimizer
        gc.collect()
        return [record.message for record in caplog.records if "finish()" in record.message]

    with caplog.at_level(logging.WARNING, "fastforward_optim"):
        assert not run(finish=True)
        [message] = run(finish=False)
        assert "finish() was not called after the last step of a calibrated run" in message
        assert not run(finish=False), "once"


# What is given as val_fn, and as its batches.


@pytest.mark.parametrize(
    ("val_fn", "words"),
    [
        (nn.Linear(2, 2), r"got the model itself \(Linear\): pass ValidationLoss"),
        ([token_batch(2, 9)], "got a list: pass ValidationLoss"),
        (DataLoader([1, 2]), "got a DataLoader: pass ValidationLoss"),
        (token_batch(2, 9), "got a dict: pass ValidationLoss"),
        (lambda model, batch: 0.0, r"signature \(model, batch\): pass lambda"),
    ],
    ids=["model", "list", "loader", "dict", "arguments"],
)
def test_what_is_no_val_fn_is_refused_in_few_words(problem, val_fn, words):
    with pytest.raises(TypeError, match=words) as caught:
        adamw(problem, val_fn)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda batch: {**batch, "labels": batch["labels"].int()}, r"batches\[0\]\['labels'\] has"),
        (lambda batch: {**batch, "input_ids": batch["input_ids"].float()}, "indices must be integ"),
        (lambda batch: {**batch, "labels": batch["labels"].tolist()}, "list of numbers, expected"),
        (lambda batch: {"input_ids": batch["input_ids"]}, "the output of .* has no loss"),
        (lambda batch: batch["input_ids"], "must be a mapping .* got Tensor"),
    ],
    ids=["int32 labels", "float ids", "lists", "no labels", "no mapping"],
)
def test_what_is_wrong_with_batches_is_found_when_they_are_given(change, words):
    with pytest.raises(TypeError, match=words):
        ValidationLoss(tiny_llama(), [change(token_batch(2, 9))])


def test_a_forward_that_fails_is_found_when_the_batches_are_given():
    batch = token_batch(2, 9)
    batch["input_ids"][0, 0] = 97  # one more than there are
    with pytest.raises(IndexError) as caught:
        ValidationLoss(tiny_llama(), [batch])
    [note] = caught.value.__notes__
    assert "of batches[0] with input_ids: torch.int64 (2, 9), labels: torch.int64 (2, 9)" in note


def test_the_first_look_leaves_no_trace():
    """Random numbers and modes; and it is not made again when a run is resumed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem, calls = Regression(dropout=0.5), []

        def val_fn():
            calls.append(torch.rand(()).item())
            return problem.val_loss()

        optimizer, state = adamw(problem, val_fn), torch.get_rng_state()
        problem.train(optimizer, 1)
        assert len(calls) == 2
        plain = Regression(dropout=0.5)
        torch.set_rng_state(state)
        plain.train(torch.optim.AdamW(plain.parameters, lr=1e-3), 1)
        assert same(plain.weights(), problem.weights())
        resumed = adamw(problem, val_fn)
        resumed.load_state_dict(optimizer.state_dict())
        problem.train(resumed, 1)
        assert len(calls) == 2
