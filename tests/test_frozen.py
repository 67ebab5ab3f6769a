"""An optimizer whose tensors are all frozen at first, as where a model is thawed in stages."""

import pytest
import torch

from fastforward_optim import FastForward

from .conftest import LOWEST, Regression, fixed, same, through_a_file


def frozen(caplog):
    return [record.message for record in caplog.records if "requires a gradient" in record.message]


def make(problem, calibrate_lr, **options):
    base = torch.optim.AdamW(problem.parameters, lr=1e-4)
    search = {} if calibrate_lr else {"line_search": LOWEST}
    options = {"calibrate_lr": calibrate_lr, **search, **fixed(3), **options}
    return FastForward(base, problem.val_loss, **options)


def steps(problem, optimizer, count, first=0):
    for step in range(first, first + count):
        if any(p.requires_grad for p in problem.parameters):
            problem.backward(step)
        optimizer.step()


@pytest.mark.parametrize("calibrate_lr", [False, True])
def test_the_first_step_that_could_have_had_a_stage_says_what_is_missing(caplog, calibrate_lr):
    problem = Regression()
    problem.model.requires_grad_(False)
    optimizer = make(problem, calibrate_lr)
    before = problem.weights()
    steps(problem, optimizer, 2)
    assert frozen(caplog) == []
    steps(problem, optimizer, 10)
    (message,) = frozen(caplog)
    assert message.startswith("no stage runs as long as no tensor of the optimizer requires a grad")
    assert "call requires_grad_() on the tensors that you train" in message
    assert len(optimizer.history) == 0
    assert same(problem.weights(), before)


def test_the_first_step_of_thawed_tensors_has_the_stage_that_was_due():
    problem = Regression()
    problem.model.requires_grad_(False)
    optimizer = make(problem, False)
    steps(problem, optimizer, 5)
    problem.model.requires_grad_(True)
    steps(problem, optimizer, 7)
    assert [record.step for record in optimizer.history] == [6, 9, 12]
    assert any(record.useful for record in optimizer.history)


def test_thawed_tensors_are_calibrated_as_if_they_had_never_been_frozen():
    problem, plain = Regression(), Regression()
    optimizer, expected = make(problem, True), make(plain, True)
    problem.model.requires_grad_(False)
    scale = optimizer.lr_scale
    steps(problem, optimizer, 5)
    assert optimizer.lr_scale == scale
    problem.model.requires_grad_(True)
    steps(problem, optimizer, 7)
    steps(plain, expected, 7)
    assert [r.trials for r in optimizer.history] == [r.trials for r in expected.history]
    assert [r.step for r in optimizer.history] == [r.step + 5 for r in expected.history]
    assert same(problem.weights(), plain.weights())


@pytest.mark.parametrize("calibrate_lr", [False, True])
def test_a_part_of_the_tensors_is_thawed_and_then_the_rest(calibrate_lr):
    problem = Regression()
    problem.model.requires_grad_(False)
    optimizer = make(problem, calibrate_lr)
    before = problem.weights()
    steps(problem, optimizer, 4)
    for thawed in (2, 4):
        for p in problem.parameters[-thawed:]:
            p.requires_grad_(True)
        stages = len(optimizer.history)
        steps(problem, optimizer, 6)
        assert len(optimizer.history) > stages
        moved = [not torch.equal(p, old) for p, old in zip(problem.parameters, before, strict=True)]
        assert moved == [False] * (4 - thawed) + [True] * thawed


@pytest.mark.parametrize("calibrate_lr", [False, True])
def test_a_checkpoint_of_frozen_tensors_is_resumed_bit_for_bit(calibrate_lr):
    problem, second = Regression(), Regression()
    problem.model.requires_grad_(False)
    second.model.requires_grad_(False)
    optimizer = make(problem, calibrate_lr)
    steps(problem, optimizer, 4)
    saved = through_a_file(optimizer.state_dict())
    resumed = make(second, calibrate_lr)
    resumed.load_state_dict(saved)
    assert optimizer.finish() is None
    if calibrate_lr:
        with optimizer.averaged():
            pass
    for of, taker in ((problem, optimizer), (second, resumed)):
        of.model.requires_grad_(True)
        steps(of, taker, 7, first=4)
    assert resumed.history == optimizer.history
    assert len(resumed.history) >= 2
    assert same(problem.weights(), second.weights())
