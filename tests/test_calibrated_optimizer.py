"""The optimizer with calibration: where runs end, what others see of it, memory and faults."""

import gc
import math
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.support.memory import live_tensor_bytes
from fastforward_optim import Calibration, FastForward, ValidationLoss, lora_parameters
from fastforward_optim.calibration import Phase

from .conftest import DEVICES, UNCLIPPED, NoisyRegression, Regression, same, tiny_lora, token_batch

STEPS = 400


def make(problem, optimizer=None, **options):
    optimizer = optimizer or torch.optim.AdamW(problem.parameters, lr=1e-4)
    return FastForward(
        optimizer, problem.val_loss, **{"interval": 3, "calibrate_lr": True, **options}
    )


# Where runs end.


class Noisy(NoisyRegression):
    """The student and its teacher, trained for so many steps whatever they cost."""

    def run(self, lr, *, decay=True, wrapped=True, **options):
        optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)
        if wrapped:
            optimizer = FastForward(optimizer, self, calibrate_lr=True, **options)
        schedule = LambdaLR(optimizer, lambda step: 1 - step / STEPS if decay else 1.0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            self.loss(torch.randint(0, 3072, (64,), generator=generator)).backward()
            optimizer.step()
            schedule.step()
        return optimizer


@pytest.fixture(scope="module")
def sweep():
    """The test loss of a sweep over learning rates that decay, without calibration."""
    losses = {}
    for lr in (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0):
        problem = Noisy()
        problem.run(lr, wrapped=False)
        losses[lr] = problem.test_loss()
    return losses


RATES = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]


@pytest.mark.parametrize("lr", RATES)
def test_one_run_at_any_rate_ends_about_where_the_best_of_a_sweep_does(lr, sweep):
    best = min(sweep.values())
    assert sweep[1e-5] > 3 * best
    assert sweep[1.0] > 1.3 * best
    problem = Noisy()
    optimizer = problem.run(lr, total_steps=STEPS)
    assert problem.test_loss() < 1.04 * best
    assert optimizer.finish() is not None
    assert problem.test_loss() < 1.04 * best
    assert optimizer._progress.rate.phase == Phase.HOLD


@pytest.mark.parametrize("lr", RATES)
def test_without_a_decay_or_a_known_end_the_mean_of_the_iterates_ends_there_too(lr, sweep):
    best = min(sweep.values())
    problem = Noisy()
    optimizer = problem.run(lr, decay=False)
    assert optimizer._progress.rate.phase == Phase.SEARCH
    with optimizer.averaged():
        averaged = problem.test_loss()
    optimizer.finish()
    assert averaged < 1.04 * best
    assert problem.test_loss() < 1.06 * best


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
@pytest.mark.parametrize("seed", range(3))
def test_where_there_is_nothing_to_learn_it_does_not_run_away(lr, seed):
    """Random tokens: what validation examples say about them is noise."""
    model = tiny_lora()
    val_fn = ValidationLoss(
        model, [token_batch(8, 12, seed=100 + k) for k in range(8)], batches_per_stage=1
    )
    adamw = torch.optim.AdamW(lora_parameters(model), lr=lr)
    optimizer = FastForward(adamw, val_fn, calibrate_lr=True, total_steps=50)
    for step in range(50):
        model(**token_batch(16, 12, seed=1000 * seed + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finish()
    assert max(record.lr_scale for record in optimizer.history) * lr < 0.5
    assert val_fn() < 4.8  # 4.63 before training


@pytest.mark.parametrize("warmup", [0, 30])
def test_two_runs_are_the_same_bit_for_bit(warmup):
    problems, optimizers = [Regression(), Regression()], []
    for problem in problems:
        optimizers.append(make(problem, warmup=warmup, total_steps=80))
        problem.train(optimizers[-1], 80)
        optimizers[-1].finish()
    assert same(problems[0].weights(), problems[1].weights())
    assert optimizers[0]._progress.rate == optimizers[1]._progress.rate


# What a run does, in its order.


def test_the_probe_comes_first_then_checks_and_the_end(problem):
    reported = []
    optimizer = make(problem, interval=6, total_steps=200, on_stage=reported.append)
    problem.train(optimizer, 200)
    optimizer.finish()
    records = list(optimizer.history)
    assert reported == records
    assert [record.kind for record in records] == [
        "probe",
        *["check"] * (len(records) - 2),
        "finish",
    ]
    assert (records[0].step, records[0].steps, records[0].tau) == (6, 6, records[0].tau)
    assert all(record.passes - record.elsewhere >= 2 for record in records[1:])
    assert all(record.decision for record in records)
    steps = [record.steps for record in records[:-1]]
    assert steps[:2] == [6, 6]
    assert [record.step for record in records[:-1]] == list(accumulate(steps))


def test_the_probe_goes_to_the_lowest_point_that_it_measured(problem):
    optimizer = make(problem)
    problem.train(optimizer, 3)
    (record,) = optimizer.history
    losses = dict(record.trials)
    assert record.tau in losses
    assert record.loss_after == losses[record.tau] == min(losses.values()) < record.loss_before
    assert problem.val_loss().item() == record.loss_after


def test_the_first_steps_are_taken_at_a_small_part_of_the_rate(problem):
    optimizer = make(problem, torch.optim.SGD(problem.parameters, lr=0.64))
    start, expected = problem.weights(), Regression()
    problem.train(optimizer, 2)
    expected.train(torch.optim.SGD(expected.parameters, lr=0.01), 2)
    for one, other in zip(problem.weights(), expected.weights(), strict=True):
        torch.testing.assert_close(one, other)
    assert not same(problem.weights(), start)


def test_a_check_that_finds_nothing_leaves_the_weights_bit_for_bit(problem):
    optimizer = make(problem, total_steps=100)
    after_step = []
    optimizer.optimizer.register_step_post_hook(lambda *_: after_step.append(problem.weights()))
    checks = 0
    for step in range(60):
        problem.train(optimizer, 1, first=step)
        record = optimizer.history[-1] if optimizer.history else None
        if record is not None and (record.step, record.kind) == (step + 1, "check"):
            assert (record.decision == "sound") == (not record.useful) == (record.tau == 0)
            if not record.useful:
                checks += 1
                assert same(problem.weights(), after_step[-1])
    assert checks >= 3


def test_max_interval_limits_the_steps_between_checks(problem):
    optimizer = make(problem, max_interval=7, total_steps=60)
    problem.train(optimizer, 60)
    steps = [record.steps for record in optimizer.history]
    assert steps[:3] == [3, 6, 7]
    assert max(steps) == 7


def test_steps_that_move_nothing_are_no_window(problem):
    """In 16 bits small steps are lost in rounding: then larger ones are taken."""
    problem.model.bfloat16()
    problem.inputs, problem.targets = problem.inputs.bfloat16(), problem.targets.bfloat16()
    with torch.no_grad():
        for p in problem.parameters:
            p.add_(8.0)
    optimizer = make(problem, torch.optim.SGD(problem.parameters, lr=1e-4))
    scale = optimizer.lr_scale
    problem.train(optimizer, 3)
    assert not optimizer.history
    assert optimizer.lr_scale == pytest.approx(8 * scale)
    problem.train(optimizer, 9, first=3)
    assert optimizer.lr_scale <= 1.0 or optimizer.history


def test_with_a_rate_of_zero_nothing_happens(problem):
    optimizer = make(problem, torch.optim.SGD(problem.parameters, lr=0.0))
    before = problem.weights()
    problem.train(optimizer, 20)
    assert same(problem.weights(), before)
    assert not optimizer.history


def test_the_constants_can_be_set(problem):
    law = Calibration(probe=0.25, first_window=10)
    optimizer = make(problem, calibrate_lr=law)
    assert optimizer.lr_scale == 0.25
    problem.train(optimizer, 13)
    assert [record.steps for record in optimizer.history] == [3, 10]
    assert "calibrate_lr=Calibration(probe=0.25" in repr(optimizer)
    assert "calibrate_lr=True" in repr(make(Regression()))


# What others see of it.


def test_the_multiplier_can_be_read_and_is_in_the_history(problem):
    optimizer = make(problem)
    assert optimizer.lr_scale == 1 / 64
    problem.train(optimizer, 30)
    assert optimizer.lr_scale == optimizer.history[-1].lr_scale > 10
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert make(Regression(), calibrate_lr=False).lr_scale == 1.0


def test_without_calibration_nothing_is_scaled_and_there_is_no_mean(problem):
    optimizer = make(problem, calibrate_lr=False)
    problem.train(optimizer, 20)
    assert {record.lr_scale for record in optimizer.history} == {1.0}
    assert optimizer.finish() is None
    assert not [name for name in optimizer.param_groups[0] if "fast_forward_lr_" in name]
    with (
        pytest.raises(RuntimeError, match="there is no mean of the iterates"),
        optimizer.averaged(),
    ):
        pass


def test_a_line_search_has_no_part_in_it(problem):
    with pytest.raises(ValueError, match="leave out line_search or calibrate_lr"):
        make(problem, line_search=lambda evaluate, last_tau: 0.0)


def test_schedulers_and_hooks_on_the_wrapper_never_see_the_scaled_rate(problem):
    optimizer = make(problem)
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    seen, inside, scales = [], [], []
    optimizer.register_step_post_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    optimizer.optimizer.register_step_pre_hook(
        lambda o, *_: inside.append(o.param_groups[0]["lr"] / scales[-1])
    )
    for step in range(20):
        scales.append(optimizer.lr_scale)
        problem.train(optimizer, 1, first=step)
        scheduler.step()
    assert optimizer.lr_scale > 2
    expected = [1e-4 * 0.9**step for step in range(20)]
    assert seen == pytest.approx(expected, rel=1e-12)
    assert inside == pytest.approx(expected, rel=1e-12)


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
    problem = Noisy()
    optimizer = problem.run(0.1, decay=False)
    optimizer.param_groups[0]["lr"] = 1.0  # as noisy at the end as it gets
    stages, before = len(optimizer.history), problem.test_loss()
    record = optimizer.finish()
    assert record is optimizer.history[-1]
    assert len(optimizer.history) == stages + 1
    assert record.averaged
    with torch.no_grad():
        assert record.loss_after == record.mean_loss == problem().item() < record.loss_before
    assert problem.test_loss() < before
    assert optimizer.finish() is None


def test_finish_leaves_the_weights_where_the_mean_is_no_better(problem):
    """As after a long way in one direction: the mean lies far behind."""
    start = problem.weights()
    optimizer = make(problem, torch.optim.SGD(problem.parameters, lr=1e-3), total_steps=1000)
    problem.train(optimizer, 15)
    optimizer._calibrator.iterates._average = [start]
    before = problem.weights()
    record = optimizer.finish()
    assert (record.averaged, record.tau, record.decision) == (0, 0, "the mean is not better")
    assert record.mean_loss > record.loss_before == record.loss_after
    assert same(problem.weights(), before)


def test_before_a_step_after_the_probe_there_is_nothing_to_finish(problem):
    optimizer = make(problem)
    assert optimizer.finish() is None
    problem.train(optimizer, 3)
    assert optimizer.finish() is None
    with optimizer.averaged():
        pass
    problem.train(optimizer, 1, first=3)
    assert optimizer.finish().kind == "finish"


def test_averaged_puts_the_weights_back_bit_for_bit_and_the_run_goes_on(problem):
    twin = Regression()
    optimizers = [make(each, total_steps=60) for each in (problem, twin)]
    problem.train(optimizers[0], 20)
    twin.train(optimizers[1], 20)
    before = problem.weights()
    with optimizers[0].averaged():
        assert not same(problem.weights(), before)
    assert same(problem.weights(), before)
    with pytest.raises(KeyError), optimizers[0].averaged():
        raise KeyError
    problem.train(optimizers[0], 40, first=20)
    twin.train(optimizers[1], 40, first=20)
    assert same(problem.weights(), twin.weights())


# Faults.


def until_the_next_step_is_checked(problem, optimizer, first):
    """Train up to the last step before a check; how many steps there were in all then."""
    iterates = optimizer._calibrator.iterates
    while iterates.steps < optimizer._progress.rate.window - 1:
        problem.train(optimizer, 1, first=first)
        first += 1
    return first


def blown_up(problem, windows):
    """A run that is thrown far away by the last step of a window; with the best mean before that,
    and the steps since."""
    sgd = torch.optim.SGD(problem.parameters, lr=0.05)
    optimizer = make(problem, sgd, interval=4, calibrate_lr=UNCLIPPED)
    problem.train(optimizer, 4)
    step, last = 4, []
    for _ in range(windows):
        step = until_the_next_step_is_checked(problem, optimizer, step)
        window = optimizer._progress.rate.window
        problem.train(optimizer, 1, first=step)
        step += 1
        last = [mean.clone() for mean in optimizer._calibrator.iterates.best[0]]
    start = problem.weights() if not windows else last
    step = until_the_next_step_is_checked(problem, optimizer, step)
    window, rate = optimizer._progress.rate.window, optimizer._progress.rate.rate
    problem.backward(step)
    for p in problem.parameters:
        p.grad.mul_(1e6)
    optimizer.step()
    assert optimizer.history[-1].steps == window
    return optimizer, start, rate, step + 1


@pytest.mark.parametrize("windows", [0, 1, 3])
def test_a_run_that_blows_up_is_taken_back_to_the_best_mean_at_a_lower_rate(windows):
    problem = Regression()
    optimizer, start, rate, step = blown_up(problem, windows)
    record = optimizer.history[-1]
    assert record.tau <= -record.steps
    assert record.decision.startswith("worse")
    assert same(problem.weights(), start)
    assert record.loss_after == record.loss_before == problem.val_loss().item()
    ceiling, loss = optimizer._progress.rate.ceiling, problem.loss(slice(0, 64)).item()
    assert optimizer._progress.rate.rate == ceiling == rate * Calibration().cut
    problem.train(optimizer, 150, first=step)
    assert optimizer._progress.rate.rate <= ceiling
    assert problem.loss(slice(0, 64)).item() < loss, "the run goes on"


def test_weights_that_are_not_finite_are_put_back(problem):
    optimizer = make(problem, torch.optim.SGD(problem.parameters, lr=0.05), interval=4)
    problem.train(optimizer, 4)
    start = problem.weights()
    problem.train(optimizer, 3, first=4)
    problem.backward(3)
    problem.parameters[0].grad.fill_(math.nan)
    optimizer.step()
    problem.train(optimizer, 2, first=8)
    assert optimizer.history[-1].tau == -6
    assert same(problem.weights(), start)
    problem.train(optimizer, 12)
    assert all(torch.isfinite(p).all() for p in problem.parameters)
    assert math.isfinite(optimizer.history[-1].loss_after)
    with optimizer.averaged():
        assert all(torch.isfinite(p).all() for p in problem.parameters)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_mean_whose_loss_is_not_finite_is_never_taken(problem, value):
    losses = iter([3.0, 3.0, value])  # at the best mean, the last iterate and the mean kept aside
    optimizer = make(problem, total_steps=100)
    problem.train(optimizer, 8)
    optimizer.val_fn = lambda: next(losses)
    before = problem.weights()
    record = optimizer.finish()
    assert repr(record.mean_loss) == repr(value)
    assert not record.averaged
    assert record.loss_after == 3.0
    assert same(problem.weights(), before)


@pytest.mark.parametrize("stage", ["probe", "check", "finish"])
@pytest.mark.parametrize("call", [1, 2])
def test_an_error_in_val_fn_leaves_the_anchor_and_the_next_window_begins(problem, stage, call):
    calls = []

    def val_fn():
        calls.append(None)
        if len(calls) == fails_at:
            raise ValueError("no data")
        return problem.val_loss()

    fails_at = 0
    base = torch.optim.SGD(problem.parameters, lr=0.01)
    optimizer = FastForward(base, val_fn, interval=3, calibrate_lr=True)
    anchor = []
    base.register_step_post_hook(lambda *_: anchor.append(problem.weights()))
    problem.train(optimizer, 2)
    if stage != "probe":
        problem.train(optimizer, 6, first=2)
    problem.backward(8)
    rate, history = optimizer._progress.rate, list(optimizer.history)
    fails_at = len(calls) + call
    with pytest.raises(ValueError, match="no data"):
        optimizer.finish() if stage == "finish" else optimizer.step()
    assert same(problem.weights(), anchor[-1])
    assert list(optimizer.history) == history
    assert optimizer._progress.rate._replace(travelled=0.0) == rate._replace(travelled=0.0)
    steps = 3 if stage == "probe" else 6
    problem.train(optimizer, steps - 1, first=9)
    assert len(optimizer.history) == len(history)
    problem.train(optimizer, 1, first=8 + steps)
    assert len(optimizer.history) == len(history) + 1
    assert optimizer.history[-1].steps == steps


def test_new_stage_is_called_before_each_stage_and_for_each_set_of_other_examples(problem):
    calls = []

    class Validation:
        def check(self):
            pass

        def new_stage(self):
            calls.append("stage")

        def __call__(self):
            calls.append("loss")
            return problem.val_loss()

    optimizer = FastForward(
        torch.optim.AdamW(problem.parameters, lr=1e-3), Validation(), interval=3, calibrate_lr=True
    )
    problem.train(optimizer, 20)
    expected = []
    for record in optimizer.history:
        expected += ["stage", *["loss"] * (record.passes - record.elsewhere)]
        expected += ["stage", "loss", "loss"] * (record.elsewhere // 2)
        expected += ["stage", "loss"] * (record.elsewhere % 2)  # the same examples again
    assert calls == expected


def test_a_stage_of_a_window_whose_losses_are_no_numbers_changes_nothing(problem):
    optimizer = make(problem)
    problem.train(optimizer, 8)
    optimizer.val_fn = lambda: math.nan
    problem.train(optimizer, 1, first=8)
    record = optimizer.history[-1]
    assert (record.step, record.tau) == (9, 0.0)
    problem.train(optimizer, 10, first=9)
    assert all(torch.isfinite(p).all() for p in problem.parameters)


# Warm-up, frozen tensors and memory.


def test_in_a_warm_up_the_rate_rises_in_a_straight_line_and_windows_begin_after_it(problem):
    inside = []
    base = torch.optim.SGD(problem.parameters, lr=0.0)
    optimizer = make(problem, base, warmup=20, total_steps=100)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    base.param_groups[0]["initial_lr"] = 0.01
    scheduler.base_lrs = [0.01]
    base.param_groups[0]["lr"] = 0.01 / 20
    base.register_step_pre_hook(lambda o, *_: inside.append(o.param_groups[0]["lr"]))
    for step in range(27):
        problem.train(optimizer, 1, first=step)
        scheduler.step()
    assert inside[:3] == pytest.approx([0.01 / 64] * 3)
    peak = optimizer._progress.rate.rate
    assert inside[3:20] == pytest.approx([peak * step / 20 for step in range(4, 21)])
    assert inside[20:26] == pytest.approx([peak] * 6)
    assert [(record.step, record.steps) for record in optimizer.history] == [(3, 3), (26, 6)]


@pytest.mark.parametrize("windows", [0, 2], ids=["in the probe", "in the search"])
def test_tensors_frozen_or_unfrozen_start_a_new_window(problem, windows):
    optimizer = make(problem)
    frozen = problem.parameters[0]
    first = [2, 10][bool(windows)]
    problem.train(optimizer, first)
    frozen.requires_grad_(False)
    frozen.grad = None
    before = frozen.clone()
    stages, window = len(optimizer.history), optimizer._progress.rate.window
    assert stages == windows
    problem.train(optimizer, window - 1, first=first)
    assert len(optimizer.history) == stages
    problem.train(optimizer, 1, first=first + window - 1)
    assert [record.steps for record in optimizer.history][stages:] == [window]
    assert torch.equal(frozen, before)
    frozen.requires_grad_(True)
    problem.train(optimizer, 1, first=first + window)
    assert optimizer._calibrator.iterates.steps == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_holds_five_copies_between_stages_and_six_during_one(device, dtype):
    weights = [nn.Parameter(torch.randn(40, 50, device=device, dtype=dtype)) for _ in range(3)]
    size = sum(p.numel() * p.element_size() for p in weights)
    wide = sum(p.numel() * 4 for p in weights)
    held = []

    def val_fn():
        held.append(live_tensor_bytes())
        return sum(float(p.detach().square().sum()) for p in weights)

    optimizer = FastForward(torch.optim.SGD(weights, lr=1.0), val_fn, interval=2, calibrate_lr=True)
    for p in weights:
        p.grad = torch.randn_like(p)
    gc.collect()
    gc.freeze()  # what is there already is left out when the live tensors are looked for
    try:
        before = live_tensor_bytes()
        for _ in range(12):
            optimizer.step()
            assert live_tensor_bytes() - before <= 5 * wide + 12  # and three numbers
    finally:
        gc.unfreeze()
    assert len(optimizer.history) > 1
    # The direction begins at a copy in the tensors' own dtype: for 16-bit ones one more.
    during = 5 * wide + (1 if dtype == torch.float32 else 2) * size
    # The CPU's generator is kept together with the device's too.
    random_states = (1 if device == "cpu" else 2) * torch.get_rng_state().numel()
    assert max(held) - before <= during + random_states + 64


# The same rows at each check.


class Rows(NoisyRegression):
    """Validation batches of 32 rows, of which a stage measures one."""

    def val_fn(self):
        def forward(model, batch):
            losses = (model(batch["x"]) - batch["y"]).square().mean(1)
            return losses.mean(), len(losses), (losses, torch.ones(len(losses)))

        batches = [
            {"x": self.inputs[k : k + 32], "y": self.targets[k : k + 32]}
            for k in range(3072, 3328, 32)
        ]
        return ValidationLoss(self.model, batches, forward=forward, batches_per_stage=1)

    def run(self, optimizer, steps):
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(torch.randint(0, 3072, (64,), generator=generator)).backward()
            optimizer.step()


def test_checks_compare_the_same_rows_and_each_measures_them_once():
    problem, measured = Rows(), []
    val_fn = problem.val_fn()
    measure = val_fn.measure
    val_fn.measure = lambda: measured.append(val_fn.state_dict()["stages"]) or measure()
    adamw = torch.optim.AdamW(problem.model.parameters(), lr=1e-3)
    optimizer = FastForward(adamw, val_fn, calibrate_lr=True, total_steps=200)
    problem.run(optimizer, 200)
    probe, first, *checks = optimizer.history
    assert measured[: probe.passes] == [1] * probe.passes
    # The next rows, since the probe's have been chosen by; the first check measures both ends.
    of_checks = measured[probe.passes :]
    assert of_checks.count(2) == len(checks) + 2
    assert len(of_checks) == len(checks) + 2 + sum(record.elsewhere for record in checks)
    assert len(checks) > 5
    best = first.mean_loss
    for record in checks:
        assert record.loss_before == best, "at the best mean so far"
        assert record.error > 0
        best = min(best, record.mean_loss)


def test_a_run_that_blows_up_after_the_last_check_ends_at_the_mean_before():
    problem = Rows()
    optimizer = FastForward(
        torch.optim.SGD(problem.model.parameters(), lr=0.1), problem.val_fn(), calibrate_lr=True
    )
    problem.run(optimizer, 100)
    sound = [mean.clone() for mean in optimizer._calibrator.iterates._previous[0]]
    assert optimizer._calibrator.iterates.steps
    with torch.no_grad():
        for p in problem.model.parameters():
            p.add_(torch.randn_like(p))
    optimizer._calibrator.iterates._average = [
        [p.detach().clone() for p in problem.model.parameters()]
    ]
    record = optimizer.finish()
    assert record.decision.startswith("worse")
    assert (record.tau, record.averaged) == (-optimizer._calibrator.iterates.steps, False)
    assert record.loss_after == optimizer.history[-2].mean_loss < record.loss_before
    assert same(list(problem.model.parameters()), sound)


def test_where_a_schedule_has_brought_the_rate_down_the_mean_is_not_looked_at():
    problem = Rows()
    adamw = torch.optim.AdamW(problem.model.parameters(), lr=1e-3)
    optimizer = FastForward(adamw, problem.val_fn(), calibrate_lr=True, total_steps=100)
    problem.run(optimizer, 100)
    adamw.param_groups[0]["lr"] = 1e-5
    record = optimizer.finish()
    assert (len(record.trials), record.mean_loss, record.averaged) == (1, None, False)
    assert record.decision == "left at the last iterate"


def test_random_draws_are_the_same_at_each_check():
    """A forward that draws noise, as a diffusion model's does."""
    problem, drawn = Rows(), []

    def forward(model, batch):
        noise = torch.randn(())
        drawn.append(noise.item())
        losses = (model(batch["x"]) - batch["y"] + noise).square().mean(1)
        return losses.mean(), len(losses), (losses, torch.ones(len(losses)))

    parts = [slice(0, 32), slice(32, 64)]
    batches = [{"x": problem.inputs[part], "y": problem.targets[part]} for part in parts]
    val_fn = ValidationLoss(problem.model, batches, batches_per_stage=1, forward=forward)
    drawn.clear()  # what it drew when it was tried
    adamw = torch.optim.AdamW(problem.model.parameters(), lr=1e-3)
    optimizer = FastForward(adamw, val_fn, calibrate_lr=True, total_steps=60)
    state = torch.get_rng_state()
    problem.run(optimizer, 60)
    assert len(drawn) > 10
    assert len(set(drawn)) == 1
    assert torch.equal(torch.get_rng_state(), state)
