"""Calibration: any learning rate ends where a good one does, and nobody else sees it."""

import math
from itertools import pairwise

import pytest
import torch

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
    TOO_HIGH,
    TOO_LOW,
    TRUSTED,
    Outcome,
    Rate,
    calibrate,
    is_far_off,
    verdict,
)
from fastforward_optim.schedule import next_interval

from .conftest import NoisyRegression, tiny_lora, token_batch


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
        ((0.0, 2.0), (0.25, 1.8), (-0.25, 1.9), (0.5, 1.9)),  # of a window of one step too
        ((0.0, math.nan), (3.0, math.nan)),
        ((0.0, math.nan), (3.0, math.nan), (-3.0, math.nan)),
    ],
)
def test_where_the_trials_do_not_tell_the_rate_stays(trials):
    assert verdict(trials, 12) is None
    assert calibrate(Rate(3.0), Outcome(0.0, trials, 2.0, None, False), 12).scale == 3.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_no_sign_of_where_it_is_lowest(bad):
    """A rate that is raised for half of the way to it would run into it."""
    assert verdict(((0.0, 2.0), (3.0, bad), (-3.0, 2.5)), 12) is None
    assert verdict(((0.0, 2.0), (3.0, bad), (-3.0, bad)), 12) is None
    assert verdict(((0.0, 2.0), (3.0, 1.5), (-3.0, 2.5), (6.0, bad)), 12) == 3 / 12
    assert verdict(((0.0, 2.0), (3.0, bad), (-3.0, 1.5), (-6.0, 1.9)), 12) < 0
    assert verdict(((0.0, bad), (3.0, bad), (-3.0, 1.9), (-6.0, 1.5), (-12.0, 1.6)), 12) < 0


def test_the_trials_tell_the_same_in_any_order():
    """A search of one's own need not begin at tau = 0, nor try anything."""
    trials = ((0.0, 2.0), (3.0, 1.8), (-3.0, 2.3))
    backwards = trials[::-1]
    assert verdict(backwards, 12) == verdict(trials, 12) > 0
    found = [calibrate(Rate(), Outcome(3.0, t, 1.8, None, False), 12) for t in (trials, backwards)]
    assert found[0] == found[1]
    assert verdict((), 12) is None


def test_a_loss_behind_that_is_the_same_is_no_lower():
    trials = ((0.0, 2.0), (3.0, 1.8), (-3.0, 2.0), (6.0, 1.9))
    assert 0 < verdict(trials, 12) < 0.5


def outcome(minimum, steps, averaged=False):
    return Outcome(0.0, parabola(minimum, steps), 2.0, None, averaged)


def test_the_rate_follows_the_verdict_within_limits():
    factors = [calibrate(Rate(), outcome(m, 24), 24).scale for m in (-0.5, -0.2, 0.0, 0.2, 0.5)]
    assert all(low < high for low, high in pairwise(factors))
    assert factors[0] < 0.6
    assert 1 < factors[2] < 1.5
    assert calibrate(Rate(3.0), outcome(-0.08, 24), 24).scale == 3.0, "about right"
    further = ((0.0, 3.0), (48.0, 2.0), (96.0, 3.0))
    raised = calibrate(Rate(), Outcome(48.0, further, 2.0, None, False), 12).scale
    assert raised == pytest.approx(STEEPEST * (1 + 48 / 12) / (1 + TOO_LOW))
    far = ((0.0, 3.0), (6e4, 2.0), (1.2e5, 2.5))
    assert calibrate(Rate(), Outcome(6e4, far, 2.0, None, False), 6).scale == HIGHEST
    behind = ((0.0, 3.0), (6.0, 4.0), (-6.0, 2.5), (-12.0, 2.2), (-24.0, 2.0))
    assert calibrate(Rate(), Outcome(-24.0, behind, 2.0, None, False), 24).scale == LOWEST


def test_after_few_steps_a_mild_sign_of_too_high_a_rate_counts_less():
    few, many = (calibrate(Rate(), outcome(-0.2, steps), steps).scale for steps in (6, 24))
    assert many < few < 1
    assert many == pytest.approx((0.8 / (1 + TOO_HIGH)) ** GAIN)
    more = calibrate(Rate(), outcome(-0.2, 2 * TRUSTED), 2 * TRUSTED).scale
    assert more == pytest.approx(many**0.25), "so do many more"


def test_a_raise_by_much_needs_a_clear_decrease():
    shallow, deep = (
        calibrate(Rate(), Outcome(0.0, parabola(0.2, 24, curvature), 2.0, None, False), 24).scale
        for curvature in (0.1, 1.0)
    )
    assert shallow == CAUTIOUS < deep
    from_zero = ((0.0, 0.0), (6.0, -1.0), (-6.0, 1.0), (12.0, -0.5))
    assert calibrate(Rate(), Outcome(6.0, from_zero, -1.0, None, False), 24).scale <= CAUTIOUS


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
    assert calibrate(Rate(), with_start(3.0985, 3.1, 64), 64).scale == NO_PROGRESS, "rounding"
    assert calibrate(Rate(), with_start(2.9, 2.9, 24, last=4.0), 24).scale == LOWEST


def test_a_blow_up_is_told_by_the_last_iterate_and_by_a_tenth_of_the_loss():
    worse_ahead = ((0.0, 3.0), (6.0, 3.5), (-6.0, 3.1), (-24.0, 3.05))
    assert calibrate(Rate(), Outcome(0.0, worse_ahead, 2.9, 2.9, True), 24).scale > 0.5
    for last, scale in ((3.2, 1.0), (3.4, LOWEST)):
        noise = ((0.0, last), (6.0, 2.9), (-6.0, 3.1), (12.0, 3.5), (-24.0, 3.0))
        assert calibrate(Rate(), Outcome(6.0, noise, 2.9, None, False), 24).scale == scale


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


@pytest.mark.parametrize(
    ("gain", "factor", "far"),
    [
        (4.0, 2.0, False),
        (4.0, 2.1, True),
        (4.0, 0.5, False),
        (4.0, 0.4, True),
        (2.0, 3.0, True),
        (1.0, 3.0, False),  # its sign has changed twice: noise
    ],
)
def test_a_rate_that_has_changed_more_than_twofold_is_looked_at_again_soon(gain, factor, far):
    assert is_far_off(Rate(5.0, 4.0), Rate(5.0 * factor, gain)) is far


def test_the_interval_halves_after_a_useful_stage_and_doubles_after_another():
    assert [next_interval(n, True, 6, 64) for n in (6, 12, 24)] == [6, 6, 12]
    assert next_interval(13, True, 6, 64) == 6, "a whole number"
    assert [next_interval(n, False, 6, 64) for n in (6, 12, 48)] == [12, 24, 64]


@pytest.mark.parametrize("taus", [[], [1.0], [1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0]], ids=str)
def test_a_line_search_of_ones_own_may_try_any_points(problem, taus):
    """None, not tau = 0, that one later than others, or one twice: as without calibration."""

    def search(evaluate, last_tau):
        for tau in taus:
            evaluate(tau)
        return 0.0

    optimizer = FastForward(
        torch.optim.SGD(problem.parameters, lr=0.01),
        problem.val_loss,
        interval=3,
        calibrate_lr=True,
        line_search=search,
    )
    problem.train(optimizer, 3)
    assert [tau for tau, _ in optimizer.history[0].trials[: len(taus)]] == taus


def test_the_verdict_takes_the_loss_at_tau_zero_wherever_it_was_tried():
    trials = [(-2.0, 5.0), (0.0, 3.0), (2.0, 2.0), (4.0, 3.0)]
    expected = verdict(sorted(trials, key=lambda trial: abs(trial[0])), 4)
    assert expected == verdict(trials, 4) > 0
    assert verdict(trials[2:], 4) is None


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_mean_whose_loss_is_not_finite_is_never_taken(problem, value):
    def stay(evaluate, last_tau):
        evaluate(0.0)
        return 0.0

    losses = iter([3.0, value])
    optimizer = FastForward(
        torch.optim.SGD(problem.parameters, lr=0.01),
        lambda: next(losses),
        interval=4,
        calibrate_lr=True,
        line_search=stay,
    )
    problem.train(optimizer, 4)
    (record,) = optimizer.history
    assert repr(record.mean_loss) == repr(value)
    assert not record.averaged
    assert record.loss_after == 3.0
