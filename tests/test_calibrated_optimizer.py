"""The optimizer with calibration: what others see of it, memory and faults."""

import math

import pytest
import torch
from fastforward_optim.learning_rate import ScaledRates
from fastforward_optim.window import Window
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.overhead import live_tensor_bytes
from fastforward_optim import FastForward
from fastforward_optim.calibration import LOWEST

from .conftest import DEVICES, NoisyRegression, Regression, same


def make(problem, optimizer=None, **options):
    optimizer = optimizer or torch.optim.AdamW(problem.parameters, lr=1e-4)
    options = {"interval": 3, "max_interval": 6, "calibrate_lr": True, **options}
    return FastForward(optimizer, problem.val_loss, **options)


def test_the_multiplier_can_be_read_and_is_in_the_history(problem):
    optimizer = make(problem)
    assert optimizer.lr_scale == 1.0
    problem.train(optimizer, 30)
    assert optimizer.lr_scale == optimizer.history[-1].lr_scale > 10
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert make(Regression(), calibrate_lr=False).lr_scale == 1.0


def test_by_default_nothing_is_calibrated_and_the_interval_is_fixed(problem):
    optimizer = FastForward(
        torch.optim.AdamW(problem.parameters, lr=1e-4), problem.val_loss, interval=3
    )
    problem.train(optimizer, 20)
    assert [record.step for record in optimizer.history] == [3, 6, 9, 12, 15, 18]
    assert {record.lr_scale for record in optimizer.history} == {1.0}
    assert optimizer.finish() is None
    names = set(optimizer.param_groups[0])
    assert not {name for name in names if "lr_" in name or "interval" in name}


def test_without_calibration_max_interval_adapts_the_interval(problem):
    found = iter([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])

    def search(evaluate, last_tau):
        evaluate(0.0)
        tau = next(found)
        evaluate(tau)
        return tau

    optimizer = FastForward(
        torch.optim.SGD(problem.parameters, lr=0.01),
        problem.val_loss,
        interval=2,
        max_interval=6,
        line_search=search,
    )
    problem.train(optimizer, 24)
    assert [record.step for record in optimizer.history] == [2, 4, 8, 14, 20, 23]


def test_schedulers_and_hooks_on_the_wrapper_never_see_the_scaled_rate(problem):
    optimizer = make(problem)
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    seen, inside = [], []
    optimizer.register_step_post_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    optimizer.optimizer.register_step_pre_hook(
        lambda o, *_: inside.append(o.param_groups[0]["lr"] / optimizer.lr_scale)
    )
    for step in range(20):
        problem.train(optimizer, 1, first=step)
        scheduler.step()
    assert optimizer.lr_scale > 2
    expected = [1e-4 * 0.9**step for step in range(20)]
    assert seen == pytest.approx(expected, rel=1e-12)
    assert inside == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_the_rate_is_put_back_bit_for_bit_also_if_the_step_fails(lr):
    other = torch.tensor(0.2)
    groups = [{"lr": lr}, {"lr": lr}, {"lr": other}]

    def step():
        rates = ScaledRates(groups, 3.0)
        try:
            rates.scale()
            assert [float(group["lr"]) for group in groups] == pytest.approx([0.3, 0.3, 0.6])
            raise RuntimeError("no step")
        finally:
            rates.put_back()

    with pytest.raises(RuntimeError, match="no step"):
        step()
    assert groups[0]["lr"] is lr
    assert groups[2]["lr"] is other
    assert [float(group["lr"]) for group in groups] == [float(lr), float(lr), float(other)]


def test_a_tensor_rate_stays_the_same_tensor(problem):
    lr = torch.tensor(1e-4)
    optimizer = make(problem, torch.optim.AdamW(problem.parameters, lr=lr, foreach=False))
    problem.train(optimizer, 20)
    assert optimizer.lr_scale > 2
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 1e-4


def test_two_groups_keep_the_ratio_of_their_rates(problem):
    first, *rest = problem.parameters
    inside = []
    base = torch.optim.SGD([{"params": [first], "lr": 1e-4}, {"params": rest, "lr": 4e-4}])
    base.register_step_pre_hook(lambda o, *_: inside.append([g["lr"] for g in o.param_groups]))
    problem.train(make(problem, base), 20)
    assert max(one for one, _ in inside) > 2e-4
    assert all(four == pytest.approx(4 * one) for one, four in inside)


def test_finish_leaves_the_mean_of_the_iterates_where_it_is_better():
    problem = NoisyRegression()
    adam = torch.optim.Adam(problem.model.parameters(), lr=0.1)
    optimizer = FastForward(adam, problem, interval=500, calibrate_lr=True)
    problem.train(optimizer, 100)
    assert not optimizer.history
    before = problem.test_loss()
    record = optimizer.finish()
    assert record is optimizer.history[-1]
    assert record.averaged
    with torch.no_grad():
        assert record.loss_after == record.mean_loss == float(problem()) < record.loss_before
    assert problem.test_loss() < 0.95 * before
    assert optimizer.finish() is None


def test_a_run_that_blows_up_is_put_back_and_its_rate_lowered(problem):
    """The step before the stage throws the weights far away: no mean is worth much then."""
    base = torch.optim.SGD(problem.parameters, lr=0.01)
    optimizer = make(problem, base, interval=4)
    problem.train(optimizer, 4)
    start, scale = problem.weights(), optimizer.lr_scale
    problem.train(optimizer, optimizer._interval_now() - 1, first=4)
    optimizer.param_groups[0]["lr"] = 1e4
    problem.train(optimizer, 1, first=11)
    record = optimizer.history[-1]
    assert record.step > 4
    assert record.tau == -record.steps
    assert same(problem.weights(), start)
    assert optimizer.lr_scale <= LOWEST * scale


def test_weights_that_are_not_finite_are_put_back(problem):
    optimizer = make(problem, torch.optim.SGD(problem.parameters, lr=0.01), interval=4)
    start = problem.weights()
    problem.train(optimizer, 3)
    problem.backward(3)
    problem.parameters[0].grad.fill_(math.nan)
    optimizer.step()
    assert optimizer.history[0].tau == -4
    assert same(problem.weights(), start)
    problem.train(optimizer, 12)
    assert all(torch.isfinite(p).all() for p in problem.parameters)
    assert math.isfinite(optimizer.history[-1].loss_after)


def test_an_error_in_val_fn_leaves_the_anchor_and_the_next_window_begins(problem):
    failing = [True]

    def val_fn():
        if failing[0]:
            raise ValueError("no data")
        return problem.val_loss()

    optimizer = FastForward(
        torch.optim.SGD(problem.parameters, lr=0.01), val_fn, interval=3, calibrate_lr=True
    )
    problem.train(optimizer, 2)
    problem.backward(2)
    expected = Regression()
    expected.train(torch.optim.SGD(expected.parameters, lr=0.01), 3)
    with pytest.raises(ValueError, match="no data"):
        optimizer.step()
    assert same(problem.weights(), expected.weights())
    failing[0] = False
    problem.train(optimizer, 2, first=3)
    assert not optimizer.history
    problem.train(optimizer, 1, first=5)
    assert [(record.step, record.steps) for record in optimizer.history] == [(6, 3)]


def test_new_stage_is_called_once_before_each_stage(problem):
    calls = []

    class Validation:
        def new_stage(self):
            calls.append("stage")

        def __call__(self):
            calls.append("loss")
            return problem.val_loss()

    optimizer = FastForward(
        torch.optim.AdamW(problem.parameters, lr=1e-3), Validation(), interval=3, calibrate_lr=True
    )
    problem.train(optimizer, 20)
    optimizer.finish()
    assert calls == [
        call for record in optimizer.history for call in ["stage", *["loss"] * record.passes]
    ]


def test_warmup_passes_before_the_first_window(problem):
    optimizer = make(problem, warmup=5)
    problem.train(optimizer, 8)
    assert [(record.step, record.steps) for record in optimizer.history] == [(8, 3)]


def test_tensors_frozen_or_unfrozen_start_a_new_window(problem):
    optimizer = make(problem, interval=4)
    frozen = problem.parameters[0]
    problem.train(optimizer, 2)
    frozen.requires_grad_(False)
    frozen.grad = None
    before = frozen.clone()
    problem.train(optimizer, 4, first=2)
    assert [(record.step, record.steps) for record in optimizer.history] == [(6, 4)]
    assert torch.equal(frozen, before)


# Memory and the mean.


@pytest.mark.parametrize("device", DEVICES)
def test_it_holds_two_copies_between_stages_and_three_during_one(device):
    weights = [nn.Parameter(torch.randn(40, 50, device=device)) for _ in range(3)]
    size = sum(p.numel() * p.element_size() for p in weights)
    held = []

    def val_fn():
        held.append(live_tensor_bytes())
        return sum(float(p.detach().square().sum()) for p in weights)

    optimizer = FastForward(
        torch.optim.SGD(weights, lr=0.01), val_fn, interval=2, calibrate_lr=True
    )
    for p in weights:
        p.grad = torch.randn_like(p)
    before = live_tensor_bytes()
    optimizer.step()
    between = live_tensor_bytes()
    assert between - before <= 2 * size
    optimizer.step()
    # The CPU's generator is kept together with the device's too.
    random_states = (1 if device == "cpu" else 2) * torch.get_rng_state().numel()
    assert max(held) - before <= 3 * size + random_states + 64
    assert live_tensor_bytes() <= between


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mean_is_over_the_recent_iterates_also_in_bfloat16(dtype):
    tensor = torch.zeros(3, dtype=dtype)
    window = Window()
    window.open([tensor])
    expected, values = 0.0, torch.linspace(1, 2, 300).to(dtype)
    for count, value in enumerate(values, 1):
        tensor.fill_(value)
        window.add()
        weight = max(8 / (count + 7), 1 / 32)
        expected += weight * (float(value) - expected)
    assert window._mean[0][0].dtype == torch.float32
    assert window._mean[0][0].tolist() == pytest.approx([expected] * 3, rel=1e-5)


def test_the_mean_moves_along_with_a_short_jump_and_is_forgotten_after_a_long_one():
    tensor = torch.zeros(1)
    window = Window()
    window.open([tensor])
    for value in (1.0, 2.0, 3.0, 4.0):
        tensor.fill_(value)
        window.add()
    mean = float(window._mean[0][0])
    tensor.fill_(6.0)  # a stage with tau = 2 has added two mean steps of 1
    window.restart(2.0)
    assert float(window._mean[0][0]) == pytest.approx(mean + 2)
    tensor.fill_(7.0)
    window.add()
    tensor.fill_(107.0)
    window.restart(100.0)
    tensor.fill_(108.0)
    window.add()
    assert float(window._mean[0][0]) == 108.0
