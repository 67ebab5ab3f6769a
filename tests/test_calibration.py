"""Calibration: any learning rate ends where a good one does, and nobody else sees it."""

import math
from itertools import pairwise

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.overhead import live_tensor_bytes
from fastforward_optim import (
    BracketSearch,
    FastForward,
    RepeatSearch,
    ValidationLoss,
    lora_parameters,
)
from fastforward_optim.calibration import (
    CAUTIOUS,
    GAIN,
    HIGHEST,
    LOWEST,
    NO_PROGRESS,
    STEEPEST,
    Outcome,
    Rate,
    Window,
    calibrate,
    scaled_lr,
    verdict,
)
from fastforward_optim.schedule import next_interval

from .conftest import DEVICES, Regression, same, tiny_lora, token_batch


class NoisyRegression:
    """A student learns from a teacher's noisy answers, in batches: every rate has its floor."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        self.inputs = torch.randn(4096, 16) * torch.logspace(0, -1, 16)
        with torch.no_grad():
            self.targets = 3 * teacher(self.inputs) + 0.3 * torch.randn(4096, 4)
        self.model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        self.stage = -1

    def loss(self, rows):
        return nn.functional.mse_loss(self.model(self.inputs[rows]), self.targets[rows])

    def new_stage(self):
        self.stage += 1

    def __call__(self):
        first = 3072 + 32 * (self.stage % 8)
        return self.loss(slice(first, first + 32))

    def test_loss(self):
        with torch.no_grad():
            return float(self.loss(slice(3328, None)))

    def train(self, optimizer, budget):
        """Spend ``budget`` steps; a validation pass costs a quarter of one."""
        generator = torch.Generator().manual_seed(0)
        steps = 0
        while steps + 0.25 * passes(optimizer) < budget:
            optimizer.zero_grad()
            self.loss(torch.randint(0, 3072, (64,), generator=generator)).backward()
            optimizer.step()
            steps += 1


def passes(optimizer):
    return sum(record.passes for record in getattr(optimizer, "history", ()))


def reached(lr, **options):
    problem = NoisyRegression()
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=lr)
    if options:
        optimizer = FastForward(optimizer, problem, **options)
    problem.train(optimizer, 200)
    if options:
        optimizer.finish()
    return problem.test_loss()


def test_one_run_at_any_rate_ends_near_the_best_of_a_sweep_at_equal_cost():
    sweep = [reached(lr) for lr in (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)]
    best = min(sweep)
    assert sweep[0] > 3 * best
    assert sweep[-1] > 3 * best
    calibrated = [reached(lr, calibrate_lr=True) for lr in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)]
    assert max(calibrated) < 1.15 * best
    assert sum(calibrated) / len(calibrated) < 1.07 * best


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
@pytest.mark.parametrize("seed", range(3))
def test_where_there_is_nothing_to_learn_it_does_not_run_away(lr, seed):
    """Random tokens: what validation examples say about them is noise."""
    model = tiny_lora()
    val_fn = ValidationLoss(
        model, [token_batch(8, 12, seed=100 + k) for k in range(8)], batches_per_stage=1
    )
    adamw = torch.optim.AdamW(lora_parameters(model), lr=lr)
    optimizer = FastForward(adamw, val_fn, calibrate_lr=True)
    for step in range(50):
        model(**token_batch(16, 12, seed=1000 * seed + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finish()
    assert max(record.lr_scale for record in optimizer.history) * lr < 0.5
    assert val_fn() < 4.8  # 4.63 before training


@pytest.mark.parametrize("line_search", [BracketSearch(), RepeatSearch(max_trials=40)], ids=repr)
@pytest.mark.parametrize("lr", [1e-4, 1.0])
def test_it_works_with_the_other_searches_too(line_search, lr):
    options = {"calibrate_lr": True, "line_search": line_search}
    assert reached(lr, **options) < 0.6 * reached(lr)


# The law.


def parabola(minimum, steps, curvature=1.0):
    """Trials around a minimum at ``minimum`` windows."""
    taus = [0.0, 0.25 * steps, -0.25 * steps]
    return tuple((tau, 2 + curvature * (tau / steps - minimum) ** 2) for tau in taus)


@pytest.mark.parametrize("minimum", [-0.3, -0.1, 0.0, 0.1])
def test_the_verdict_is_where_the_parabola_is_lowest(minimum):
    assert verdict(parabola(minimum, 12), 12) == pytest.approx(minimum)


@pytest.mark.parametrize(
    "trials",
    [
        ((0.0, 2.0), (3.0, 2.0001), (-3.0, 1.9999)),  # flat within rounding
        ((0.0, 2.0), (3.0, 2.0001), (-3.0, 2.0), (24.0, 1.999), (192.0, 2.2)),  # a plateau
        ((0.0, 2.0), (1.0, 2.1)),  # unknown behind
        ((0.0, 2.0), (3.0, 1.8), (-3.0, 1.9), (6.0, 1.9)),  # lower on both sides
        ((0.0, math.nan), (3.0, math.nan)),
    ],
)
def test_where_the_trials_do_not_tell_the_rate_stays(trials):
    assert verdict(trials, 12) is None
    assert calibrate(Rate(3.0), Outcome(0.0, trials, 2.0, None, False), 12).scale == 3.0


def outcome(minimum, steps, averaged=False):
    return Outcome(0.0, parabola(minimum, steps), 2.0, None, averaged)


def test_the_rate_follows_the_verdict_within_limits():
    factors = [calibrate(Rate(), outcome(m, 24), 24).scale for m in (-0.5, -0.2, 0.0, 0.2, 0.5)]
    assert all(low < high for low, high in pairwise(factors))
    assert factors[0] < 0.6
    assert 1 < factors[2] < 1.5
    far = ((0.0, 3.0), (6e4, 2.0), (1.2e5, 2.5))
    assert calibrate(Rate(), Outcome(6e4, far, 2.0, None, False), 6).scale == HIGHEST
    behind = ((0.0, 3.0), (6.0, 4.0), (-6.0, 2.5), (-12.0, 2.2), (-24.0, 2.0))
    assert calibrate(Rate(), Outcome(-24.0, behind, 2.0, None, False), 24).scale == LOWEST


def test_after_few_steps_a_mild_sign_of_too_high_a_rate_counts_less():
    few, many = (calibrate(Rate(), outcome(-0.2, steps), steps).scale for steps in (6, 24))
    assert many < few < 1


def test_a_raise_by_much_needs_a_clear_decrease():
    shallow, deep = (
        calibrate(Rate(), Outcome(0.0, parabola(0.2, 24, curvature), 2.0, None, False), 24).scale
        for curvature in (0.1, 1.0)
    )
    assert shallow == CAUTIOUS < deep


def with_start(loss, start, steps, last=3.0):
    """An outcome whose window began at the loss ``start``, with the last iterate at ``last``."""
    trials = ((0.0, last), (6.0, last + 0.3), (-6.0, last + 0.1), (-float(steps), start))
    return Outcome(0.0, trials, loss, loss, True)


def test_a_steep_raise_is_followed_by_no_other_and_taken_back_if_it_did_not_pay():
    steep = Rate(300.0, GAIN, math.log(300.0))
    far = ((0.0, 3.0), (6e4, 2.0), (1.2e5, 2.5))
    assert calibrate(steep, Outcome(6e4, far, 2.0, None, False), 6).scale == 300 * STEEPEST
    assert calibrate(steep, with_start(2.9999, 2.9, 12), 12).scale == pytest.approx(1.0)
    assert calibrate(steep, with_start(2.9999, 3.2, 12), 12).scale > 200


def test_after_many_steps_the_rate_is_cut_only_for_lack_of_progress():
    """Noise is no reason: it does not go away with the rate, and the mean takes it out."""
    made = calibrate(Rate(), with_start(2.9, 3.1, 64), 64).scale
    none = calibrate(Rate(), with_start(3.0999, 3.1, 64), 64).scale
    assert 0.9 < made < 1
    assert none == NO_PROGRESS
    assert calibrate(Rate(), with_start(2.9, 2.9, 24, last=4.0), 24).scale == LOWEST


def test_the_rate_is_lowered_where_the_mean_was_better():
    assert calibrate(Rate(), outcome(0.0, 24, averaged=True), 24).scale < 1
    one_sided = Outcome(0.0, ((0.0, 2.0), (1.0, 2.1)), 1.9, 1.9, True)
    assert calibrate(Rate(), one_sided, 24).scale == 0.5


def test_each_change_of_sign_halves_the_gain_down_to_one():
    rate, gains = Rate(), []
    for minimum in (0.2, 0.2, -0.2, 0.2, -0.2):
        rate = calibrate(rate, outcome(minimum, 24), 24)
        gains.append(rate.gain)
    assert gains == [GAIN, GAIN, GAIN / 2, 1.0, 1.0]


def test_the_interval_halves_after_a_useful_stage_and_doubles_after_another():
    assert [next_interval(n, True, 6, 64) for n in (6, 12, 24)] == [6, 6, 12]
    assert [next_interval(n, False, 6, 64) for n in (6, 12, 48)] == [12, 24, 64]


# The optimizer.


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
        with scaled_lr(groups, 3.0):
            assert [float(group["lr"]) for group in groups] == pytest.approx([0.3, 0.3, 0.6])
            raise RuntimeError("no step")

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
    random_state = torch.get_rng_state().numel()
    assert max(held) - before <= 3 * size + random_state + 64
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


# Checkpoints.


def resumable(problem):
    optimizer = make(problem, torch.optim.AdamW(problem.parameters, lr=3e-4))
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / 60)


def train(problem, optimizer, scheduler, first, last):
    for step in range(first, last):
        problem.train(optimizer, 1, first=step)
        scheduler.step()


@pytest.mark.parametrize("stop", range(0, 30, 4))
def test_a_resumed_run_is_bit_identical(stop, tmp_path):
    expected = Regression()
    expected_optimizer, scheduler = resumable(expected)
    train(expected, expected_optimizer, scheduler, 0, 30)
    expected_optimizer.finish()
    assert len(expected_optimizer.history) > 4

    first = Regression()
    optimizer, scheduler = resumable(first)
    train(first, optimizer, scheduler, 0, stop)
    parts = first.model.state_dict(), optimizer.state_dict(), scheduler.state_dict()
    torch.save(parts, tmp_path / "checkpoint.pt")

    second = Regression()
    model, state, schedule = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second.model.load_state_dict(model)
    resumed, scheduler = resumable(second)
    resumed.load_state_dict(state)
    scheduler.load_state_dict(schedule)
    train(second, resumed, scheduler, stop, 30)
    resumed.finish()
    assert same(second.weights(), expected.weights())
    assert [(r.tau, r.trials, r.lr_scale) for r in resumed.history] == [
        (r.tau, r.trials, r.lr_scale) for r in expected_optimizer.history
    ]


def test_a_checkpoint_of_another_adapter_is_refused_and_changes_nothing(problem):
    optimizer = make(problem)
    problem.train(optimizer, 5)
    state_dict = optimizer.state_dict()
    other = Regression()
    other.model[0] = nn.Linear(6, 16, bias=False)
    fresh = make(other)
    other.train(fresh, 4)
    before = repr(fresh.state_dict())
    with pytest.raises(ValueError, match="calibration in the state dict is of 4 tensors, this"):
        fresh.load_state_dict(state_dict)
    del state_dict["fast_forward"]["window"]["mean"]
    with pytest.raises(ValueError, match="calibration in the state dict is damaged"):
        fresh.load_state_dict(state_dict)
    assert repr(fresh.state_dict()) == before


def test_checkpoints_load_with_and_without_calibration(problem):
    optimizer = make(problem)
    problem.train(optimizer, 8)
    state_dict = optimizer.state_dict()
    other = Regression()
    plain = make(other, calibrate_lr=False, max_interval=3)
    plain.load_state_dict(state_dict)
    assert plain.lr_scale == 1.0
    other.train(plain, 4)

    third = Regression()
    calibrated = make(third)
    calibrated.load_state_dict(plain.state_dict())
    assert calibrated.lr_scale == optimizer.lr_scale  # it rides along in the param group
    third.train(calibrated, 10)
    torch.optim.AdamW(Regression().parameters).load_state_dict(state_dict)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoints_keep_the_rate_and_the_interval(problem, tmp_path):
    optimizer = make(problem, max_interval=50)
    problem.train(optimizer, 30)
    assert optimizer.lr_scale != 1
    assert optimizer._interval_now() > 3
    problem.model.zero_grad()
    saved = get_optimizer_state_dict(problem.model, optimizer)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)

    second = Regression()
    resumed = make(second, max_interval=50)
    loaded = {"optimizer": get_optimizer_state_dict(second.model, resumed)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(second.model, resumed, loaded["optimizer"])
    assert resumed._rate == optimizer._rate
    assert resumed._interval_now() == optimizer._interval_now()
    second.train(resumed, resumed._interval_now())
    assert len(resumed.history) == 1
