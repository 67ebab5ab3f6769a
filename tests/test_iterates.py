"""The window of a calibrated stage: which weights it tries, which it leaves, and their mean."""

import math

import pytest
import torch

from fastforward_optim.calibration import REACH, TRUSTED, two_sided
from fastforward_optim.window import Window

START = 10.0  # where the windows begin; each step is one long


def opened(steps, dtype=torch.float64):
    """A tensor that took some steps, and its window."""
    tensor = torch.full((1,), START, dtype=dtype)
    window = Window()
    window.open([tensor])
    for _ in range(steps):
        tensor += 1
        window.add()
    return tensor, window


def mean_of(window):
    return float(window._mean[0][0])


def searched(steps, losses, taus, best=0.0, final=False, doubtful=False):
    """Run a stage with a given search over given losses.

    Args:
        steps: those since the window was opened.
        losses: by tau, and "mean" and "start".
        taus: those that the search tries after 0.
        best: the one that it returns.
        final: as in ``Window.search``.
        doubtful: as in ``Window.search``.
    """
    tensor, window = opened(steps)
    mean, anchor = mean_of(window), float(tensor)
    stage = window.stage()
    stage.set_anchor()

    def val_fn():
        here = float(tensor)
        if here == mean:
            return losses["mean"]
        return losses["start"] if here == START else losses[here - anchor]

    def search(evaluate, last_tau):
        assert last_tau == 5.0
        for tau in (0.0, *taus):
            evaluate(tau)
        return best

    outcome = window.search(stage, val_fn, search, 5.0, final, doubtful)
    return outcome, float(tensor) - anchor, mean - anchor


AHEAD = {0.0: 2.0, 3.0: 1.8, -3.0: 2.6}  # lowest at 1.5 by their parabola, of 12 steps
JUST_RIGHT = {0.0: 2.0, 3.0: 2.1, -3.0: 2.1}
BEHIND = {0.0: 2.0, 3.0: 2.6, -3.0: 1.95}


def test_the_search_is_over_a_quarter_of_the_window_to_each_side_and_back_to_its_begin():
    search = two_sided(24)
    assert (search.reach, search.furthest_back) == (6, 24)
    assert search.max_tau == 4096 * 24


@pytest.mark.parametrize("losses", [AHEAD, JUST_RIGHT], ids=["ahead", "just right"])
def test_the_mean_is_not_tried_where_the_loss_is_not_lowest_behind(losses):
    outcome, _, _ = searched(12, losses, (3.0, -3.0))
    assert outcome.mean_loss is None
    assert outcome.averaged is False
    assert outcome.trials == tuple(losses.items())


@pytest.mark.parametrize("final", [False, True])
def test_the_mean_is_left_where_it_is_better_than_the_best_trial(final):
    losses = (AHEAD if final else BEHIND) | {"mean": 1.85}
    outcome, at, mean = searched(12, losses, (3.0, -3.0), final=final)
    assert outcome.averaged is True
    assert (outcome.tau, outcome.loss, outcome.mean_loss) == (0.0, 1.85, 1.85)
    assert at == mean


@pytest.mark.parametrize(("mean", "averaged"), [(1.94, True), (1.95, False), (math.nan, False)])
def test_the_mean_has_to_be_better(mean, averaged):
    outcome, at, _ = searched(12, BEHIND | {"mean": mean}, (3.0, -3.0), best=-3.0)
    assert outcome.averaged is averaged
    assert outcome.tau == (0.0 if averaged else -3.0)
    assert averaged or at == -3.0


@pytest.mark.parametrize(("tau", "tried"), [(1.0, True), (12 * REACH, True), (3.5, False)])
def test_a_final_stage_tries_the_mean_unless_it_went_far_ahead(tau, tried):
    losses = {0.0: 2.0, tau: 1.9, "mean": 1.95}
    outcome, at, _ = searched(12, losses, (tau,), best=tau, final=True)
    assert outcome.mean_loss == (1.95 if tried else None)
    assert (outcome.tau, outcome.loss, at) == (tau, 1.9, tau)


@pytest.mark.parametrize(
    ("steps", "mean", "doubtful", "tried"),
    [
        (12, 1.9, False, False),
        (12, 1.8, False, True),  # better by a tenth: the run has blown up on the way
        (12, 1.9, True, True),
        (TRUSTED, 1.9, False, False),
        (TRUSTED + 1, 1.9, False, True),
        (12, 2.1, False, False),
        (12, 2.1, True, True),
    ],
)
def test_the_windows_begin_is_tried_after_a_blow_up_or_many_steps_or_in_doubt(
    steps, mean, doubtful, tried
):
    losses = {0.0: 2.0, 1.0: 2.1, "mean": mean, "start": 3.0}
    outcome, at, the_mean = searched(steps, losses, (1.0,), doubtful=doubtful)
    begin = ((-float(steps), 3.0),) if tried else ()
    assert outcome.trials == ((0.0, 2.0), (1.0, 2.1), *begin)
    assert outcome.averaged == (mean < 2)
    assert at == (the_mean if mean < 2 else 0.0)


def test_the_windows_begin_is_left_where_it_is_best_and_tried_only_once():
    losses = {0.0: 2.0, 1.0: 2.1, "mean": 1.5, "start": 1.2}
    outcome, at, _ = searched(12, losses, (1.0,))
    assert (outcome.tau, outcome.loss, outcome.averaged) == (-12.0, 1.2, False)
    assert at == -12
    outcome, _, _ = searched(12, losses, (1.0, -12.0), best=-12.0, doubtful=True)
    assert [tau for tau, _ in outcome.trials] == [0.0, 1.0, -12.0]


# The mean.


@pytest.mark.parametrize("tau", [-2.0, 0.0, 1.0, 2.5, 4.0])
def test_the_mean_moves_along_with_a_jump_that_is_not_longer_than_the_window(tau):
    tensor, window = opened(4)
    mean = mean_of(window)
    tensor += tau
    window.restart(tau)
    assert mean_of(window) == pytest.approx(mean + tau)
    assert window.steps == 0
    tensor += 3
    window.add()
    assert mean < mean_of(window) < float(tensor), "the iterates before it count on"


@pytest.mark.parametrize("tau", [-4.0, 4.5])
def test_the_mean_begins_anew_after_a_longer_jump_and_after_one_to_the_begin(tau):
    tensor, window = opened(4)
    window._mean[0][0].fill_(math.nan)  # nor does it matter what it was
    tensor += tau
    window.restart(tau)
    values = []
    for weight in (1, 8 / 9, 8 / 10):
        tensor += 1
        window.add()
        last = values[-1] if values else 0.0
        values.append(last + weight * (float(tensor) - last))
        assert mean_of(window) == pytest.approx(values[-1])


def test_a_window_over_several_dtypes_is_saved_and_loaded_in_the_order_of_the_tensors():
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float64]
    tensors = [torch.full((2,), float(k), dtype=dtype) for k, dtype in enumerate(dtypes, 1)]
    window = Window()
    window.open(tensors)
    for tensor in tensors:
        tensor += 8
    window.add()
    state = window.state_dict(tensors)
    assert [float(start[0]) for start in state["start"]] == [1, 2, 3, 4]
    assert [float(mean[0]) for mean in state["mean"]] == [9, 10, 11, 12]
    loaded = Window.from_state_dict(state, tensors)
    assert (loaded.steps, loaded.state_dict(tensors)["age"]) == (1, 1)
    for name in ("start", "mean"):
        pairs = zip(loaded.state_dict(tensors)[name], state[name], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_what_was_saved_of_no_tensors_before_the_first_step_is_a_window_without_steps():
    nothing = {"steps": 0, "age": 0, "start": [], "mean": []}
    assert Window.from_state_dict(nothing, [torch.zeros(4)]).steps == 0


@pytest.mark.parametrize("without", [None, "start", "mean"])
def test_the_shapes_are_checked_before_the_first_step_too(without):
    tensor = torch.zeros(3)
    state = Window().state_dict([tensor])
    assert state["steps"] == 0
    if without is not None:
        state[without] = []
    words = f"of {0 if without == 'start' else 1} tensors, this optimizer trains 1, or their shapes"
    with pytest.raises(ValueError, match=words):
        Window.from_state_dict(state, [torch.zeros(4)])
