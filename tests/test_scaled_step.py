"""A step at a scaled rate: the rate is put back, and a closure inside never notices."""

import pytest
import torch

from fastforward_optim import FastForward
from fastforward_optim.calibration.scaled_step import step_scaled

from .conftest import Regression, same


def make(problem, lr=1e-4, **options):
    base = torch.optim.AdamW(problem.parameters, lr=lr, **options)
    return FastForward(base, problem.val_loss, 3, max_interval=6, calibrate_lr=True)


RATES = pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])


def rate(tensor):
    return {"lr": torch.tensor(1e-4), "foreach": False} if tensor else {"lr": 1e-4}


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("scale", [3.0, 1.0, 1 / 64])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_rate_is_put_back_bit_for_bit_also_if_the_step_fails(lr, scale, error):
    other = torch.tensor(0.2)
    groups = [{"lr": lr}, {"lr": lr}, {"lr": other}]

    def step(closure):
        assert closure is None
        expected = pytest.approx([0.1 * scale, 0.1 * scale, 0.2 * scale])
        assert [float(group["lr"]) for group in groups] == expected
        if error is not None:
            raise error
        return 7.0

    before = [float(group["lr"]) for group in groups]
    if error is None:
        assert step_scaled(step, None, groups, scale) == 7.0
    else:
        with pytest.raises(error):
            step_scaled(step, None, groups, scale)
    assert groups[0]["lr"] is lr
    assert groups[2]["lr"] is other
    assert [float(group["lr"]) for group in groups] == before


@RATES
def test_a_closure_sees_the_rate_that_was_set(problem, tensor):
    optimizer = make(problem, **rate(tensor))
    lr = optimizer.param_groups[0]["lr"]
    seen = []

    def closure(step):
        assert optimizer.param_groups[0]["lr"] is lr
        seen.append(float(lr))
        return problem.backward(step)

    for step in range(20):
        optimizer.step(lambda step=step: closure(step))
    assert optimizer.lr_scale > 2
    assert set(seen) == {float(lr)}
    assert float(lr) == pytest.approx(1e-4)


@RATES
def test_the_rate_that_a_closure_sets_is_used_and_kept(problem, tensor):
    base = torch.optim.SGD(problem.parameters, **rate(tensor))
    optimizer = FastForward(base, problem.val_loss, 3, max_interval=6, calibrate_lr=True)
    moved = []
    base.register_step_post_hook(lambda *_: moved.append(problem.weights()))

    def closure(step):
        group = optimizer.param_groups[0]
        if tensor:
            group["lr"].fill_(1e-4 / (1 + step))
        else:
            group["lr"] = 1e-4 / (1 + step)
        return problem.backward(step)

    for step in range(20):
        before, scale = problem.weights(), optimizer.lr_scale
        optimizer.step(lambda step=step: closure(step))
        lr = 1e-4 / (1 + step)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(lr)
        for old, new, p in zip(before, moved[-1], problem.parameters, strict=True):
            torch.testing.assert_close(new, old - scale * lr * p.grad, rtol=1e-5, atol=1e-7)
    assert scale > 2


def test_with_a_closure_the_steps_are_those_without(problem):
    other = Regression()
    with_closure, without = make(problem), make(other)
    for step in range(20):
        with_closure.step(lambda step=step: problem.backward(step))
        other.train(without, 1, first=step)
    assert with_closure.lr_scale == without.lr_scale > 2
    assert same(problem.weights(), other.weights())


def test_a_closure_of_lbfgs_sees_the_rate_that_was_set_each_time(problem):
    base = torch.optim.LBFGS(problem.parameters, lr=1e-3, max_iter=4)
    optimizer = FastForward(base, problem.val_loss, 2, max_interval=2, calibrate_lr=True)
    seen = []

    def closure():
        seen.append(optimizer.param_groups[0]["lr"])
        return problem.backward(0)

    for _ in range(6):
        optimizer.step(closure)
    assert optimizer.lr_scale != 1
    assert len(seen) > 6
    assert set(seen) == {1e-3}


def test_a_param_group_that_a_closure_adds_is_scaled_too(problem):
    extra = torch.nn.Parameter(torch.ones(1))
    base = torch.optim.SGD(problem.parameters, lr=1e-4)
    optimizer = FastForward(base, problem.val_loss, 3, max_interval=6, calibrate_lr=True)
    problem.train(optimizer, 10)
    scale = optimizer.lr_scale

    def closure():
        optimizer.add_param_group({"params": [extra], "lr": 1e-3})
        extra.grad = torch.ones(1)
        return problem.backward(10)

    optimizer.step(closure)
    assert optimizer.param_groups[1]["lr"] == 1e-3
    assert float(extra.detach()) == pytest.approx(1 - scale * 1e-3)
    assert scale > 2
