"""What stages promise, on random problems.

``make test`` runs 935 cases, the same each time; ``make soak`` runs 23,375 others. How many each
test runs is stated beside it and counted.
"""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.support.memory import live_tensor_bytes
from fastforward_optim import BracketSearch, RepeatSearch

from .conftest import flat, same, through_a_file
from .problems import (
    ERRORS,
    FORMS,
    NOT_RESUMED_EXACTLY,
    OPTIMIZERS,
    SHAPES_OF_LOSS,
    Case,
    Problem,
    UserSearch,
)
from .twins import Schedule, Twins, lowest, no_trace

# Losses are made up: some do not depend on the weights, some only rise. Some steps change nothing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:val_fn returns", "ignore:the steps between", "ignore:what val_fn", "ignore:no stage can"
)

SOAK = settings.get_current_profile_name() == "soak"
TIMES = 25 if SOAK else 1
STATED, COUNTED = {}, Counter()

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SEARCHES = st.one_of(
    st.just(BracketSearch(standard_errors=0.0)),
    st.builds(BracketSearch, st.sampled_from([1.0, 7, 1e4]), st.integers(2, 20), st.just(0.0)),
    st.builds(RepeatSearch, st.sampled_from([1, 3.5, 1000]), st.integers(2, 20)),
)
DEFAULT_SEARCH = st.none()


def user_searches(back):
    return st.builds(
        UserSearch,
        st.integers(0, 99),
        st.integers(0, 5),
        st.sampled_from(["lowest", "any", "stay"]),
        st.just(back),
    )


USER_SEARCHES = user_searches(0.0)
FIELDS = {
    "seed": st.integers(0, 2**31),
    "dtypes": st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3).map(tuple),
    "transposed": st.booleans(),
    "dropout": st.sampled_from([0.0, 0.0, 0.3]),
    "optimizer": st.sampled_from(list(OPTIMIZERS)),
    "lr": st.sampled_from([0.1, 1e-4, 0.01, 3.0, 0.0]),
    "groups": st.booleans(),
    "frozen": st.integers(-1, 3),
    "freeze_at": st.sampled_from([0, 0, 0, 2, 3, 5]),
    "chosen": st.sampled_from(["all", "all", "some", "twice"]),
    "interval": st.integers(1, 4),
    "warmup": st.sampled_from([0, 0, 1, 3]),
    "longer": st.sampled_from([None, None, 0, 1, 6]),
    "search": st.one_of(DEFAULT_SEARCH, SEARCHES, USER_SEARCHES),
    "loss": st.sampled_from(SHAPES_OF_LOSS),
    "holes": st.sampled_from([0.0, 0.0, 0.1, 0.5]),
    "draws": st.booleans(),
    "form": st.sampled_from(FORMS),
    "closure": st.booleans(),
    "steps": st.integers(1, 9),
}


def cases(**fields):
    return st.builds(Case, **FIELDS | fields)


# Long enough for some windows.
CALIBRATED = {"calibrate_lr": st.just(True), "search": st.none(), "steps": st.integers(1, 24)}
EITHER = st.one_of(cases(), cases(**CALIBRATED))


def runs(count, strategy):
    """Run a test on so many random cases; those that it has got through are counted."""

    def decorate(test):
        name = test.__name__
        STATED[name] = TIMES * count

        @settings(
            max_examples=TIMES * count,
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(case=strategy)
        def on_a_case(case):
            test(case)
            COUNTED[name] += 1

        on_a_case.__doc__ = test.__doc__
        return on_a_case

    return decorate


@runs(200, cases(search=SEARCHES))
def test_the_weights_end_at_the_best_point_that_was_measured(case):
    """The first with the lowest finite loss, bit for bit as it was measured; else the anchor."""
    for step in Twins(case).steps():
        best = lowest(step.calls)
        assert same(step.after, step.anchor if best is None else best.values)
        if step.calls:
            assert same(step.calls[0].values, step.anchor), "the anchor is measured first"


@runs(120, cases(search=DEFAULT_SEARCH))
def test_by_default_the_weights_end_at_a_point_that_measured_lower_or_at_the_anchor(case):
    for step in Twins(case).steps():
        if step.record is None or step.record.tau == 0:
            assert same(step.after, step.anchor)
            continue
        (found,) = (call for call in step.calls if same(call.values, step.after))
        before = step.calls[0].loss
        assert math.isfinite(found.loss)
        assert found.loss < before or not math.isfinite(before)


@runs(80, cases(**CALIBRATED))
def test_a_calibrated_run_is_moved_by_its_probe_and_where_it_blew_up_and_at_its_end(case):
    """Anywhere else it is the run at the scaled rate, bit for bit."""
    for step in Twins(case).steps():
        record, losses = step.record, [call.loss for call in step.calls]
        if record is None:
            assert same(step.after, step.anchor)
            continue
        assert record.passes == len(step.calls)
        recorded = [loss for _, loss in record.trials]
        recorded += [] if record.mean_loss is None else [record.mean_loss]
        of_the_stage = losses[: len(losses) - record.elsewhere]
        assert repr(recorded) == repr(of_the_stage)
        if record.kind == "probe":
            best = lowest(step.calls)
            assert record.tau in dict(record.trials)
            assert record.loss_after == best.loss if best else record.tau == 0
            left = [call for call in step.calls if same(call.values, step.after)]
            assert best is None or any(call.loss == best.loss for call in left)
            assert record.tau or same(step.after, step.anchor)
        elif record.tau:
            assert record.kind in ("check", "finish")
            assert record.tau <= -record.steps
            assert same(step.after, step.calls[0].values), "the best mean so far"
            assert record.tau < -record.steps or step.is_back()
            assert math.isfinite(losses[0])
            assert losses[1] > losses[0] or not math.isfinite(losses[1])
        elif record.averaged:
            assert record.kind == "finish"
            assert same(step.after, step.calls[len(of_the_stage) - 1].values)
            assert record.loss_after == record.mean_loss < math.inf
        else:
            assert same(step.after, step.anchor)


@runs(150, EITHER)
def test_a_stage_leaves_no_trace_but_the_weights(case):
    """Moments, gradients, rates, modes and random streams are those of a step without a stage."""
    twins = Twins(case)
    for step in twins.steps():
        assert no_trace(twins)
        untouched = set(range(len(step.anchor))) - set(step.tracked)
        for values in (step.after, *(call.values for call in step.calls)):
            assert all(same([values[i]], [step.anchor[i]]) for i in untouched)


@runs(
    120,
    st.one_of(
        cases(raise_at=st.integers(1, 12), error=st.sampled_from(ERRORS)),
        cases(raise_at=st.integers(1, 12), error=st.sampled_from(ERRORS), **CALIBRATED),
    ),
)
def test_an_exception_leaves_what_the_real_step_made_and_the_run_goes_on(case):
    twins = Twins(case)
    schedule = Schedule(case)
    raised = 0
    for step in twins.steps():
        assert no_trace(twins)
        if not case.calibrate_lr:
            schedule.check(step)
        if step.error is not None:
            raised += 1
            assert step.record is None
            assert same(step.after, step.anchor)
    assert raised == (0 < case.raise_at <= twins.val_fn.count)


@runs(
    80,
    cases(
        search=st.one_of(DEFAULT_SEARCH, SEARCHES),
        loss=st.sampled_from(["flat", "zero", "rising", "worst"]),
        draws=st.just(False),
    ),
)
def test_a_run_whose_stages_find_nothing_is_the_plain_run(case):
    """From the first step to the last, with nothing put back in between."""
    twins, plain = Twins(case), Problem(case)
    torch.manual_seed(1)
    for number in range(1, case.steps + 1):
        plain.step(plain.optimizer, number)
    state = torch.get_rng_state()
    twins.seed = 1
    mine = list(twins.steps())
    # With holes the start may be no number, and any finite loss is better than that.
    if not any(step.record and step.record.useful for step in mine):
        assert same(mine[-1].after, plain.values())
        assert same([torch.get_rng_state()], [state])
    else:
        assert case.holes


@runs(100, cases())
def test_records_and_steps_of_stages_are_what_happened(case):
    twins = Twins(case)
    schedule = Schedule(case)
    for step in twins.steps():
        schedule.check(step)
        if step.record is not None:
            check_record(case, step)
    assert twins.reported == list(twins.optimizer.history)
    if case.search is not None:
        taus = [record.tau for record in twins.reported]
        assert twins.last_taus == [0.0, *taus][: len(taus)], "each search hears of the last one"


def check_record(case, step):
    record, calls = step.record, step.calls
    losses = [call.loss for call in calls]
    assert repr([loss for _, loss in record.trials]) == repr(losses)
    assert record.step == step.number
    assert record.seconds >= 0
    limit = getattr(case.search, "max_trials", case.search.count if user(case) else 20)
    assert record.passes == len(calls) <= limit
    if not user(case):
        assert record.trials[0][0] == 0
        assert repr(record.loss_before) == repr(losses[0])
    left = [call for call in calls if same(call.values, step.after)]
    assert same(step.after, step.anchor) or left
    at = [loss for tau, loss in record.trials if tau == record.tau]
    assert repr(record.loss_after) == repr(at[-1] if at else math.nan)
    assert record.useful == (record.tau != 0)
    assert len({call.drawn for call in calls}) <= 1, "all trials draw the same numbers"


def user(case):
    return isinstance(case.search, UserSearch)


SAVED = {
    "optimizer": st.sampled_from(sorted(set(OPTIMIZERS) - NOT_RESUMED_EXACTLY)),
}


@runs(
    60,
    st.tuples(st.one_of(cases(**SAVED), cases(**CALIBRATED | SAVED)), st.integers(0, 8)),
)
def test_a_run_that_is_saved_and_resumed_goes_on_bit_for_bit(case_and_stop):
    case, stop = case_and_stop
    torch.manual_seed(1)
    first = Twins(case)
    for _ in range(min(stop, case.steps)):
        if first.can_step:
            first.step()
    first.mine.freeze(first.number + 1)
    state = torch.get_rng_state()
    saved = through_a_file(
        {"net": first.mine.net.state_dict(), "opt": first.optimizer.state_dict()}
    )

    second = Twins(case)
    second.mine.freeze(first.number + 1)
    with torch.no_grad():
        for p in second.mine.params:
            p.fill_(0.5)
    second.mine.net.load_state_dict(saved["net"])
    second.optimizer.load_state_dict(saved["opt"])
    second.number = first.number
    assert told(second.optimizer) == told(first.optimizer)
    assert flat(second.optimizer.state_dict()) == flat(first.optimizer.state_dict())
    states = []
    for twins in (first, second):
        torch.set_rng_state(state)
        for number in range(twins.number + 1, case.steps + 3):
            if twins.can_step:
                twins.mine.step(twins.optimizer, number)
        twins.optimizer.finish()
        states.append(torch.get_rng_state())
    assert same(first.mine.values(), second.mine.values())
    assert same(states[:1], states[1:])
    assert flat(second.optimizer.state_dict()) == flat(first.optimizer.state_dict())
    assert told(second.optimizer) == told(first.optimizer)


def told(optimizer):
    """The history as text, in which NaN equals itself; without the times, which are not saved."""
    return [repr(replace(record, seconds=0.0)) for record in optimizer.history]


@pytest.mark.usefixtures("only_new_objects")
@runs(
    25,
    cases(raise_at=st.integers(0, 6), error=st.sampled_from(ERRORS), longer=st.none()),
)
def test_no_copy_outlives_its_stage(case):
    problem = Twins(case)
    problem.val_fn.keep = False
    optimizer = problem.optimizer
    for number in range(1, case.steps + 1):
        problem.mine.step(optimizer.optimizer, number)  # creates the moments, and no stage
        before = live_tensor_bytes()
        try:
            optimizer.step()
        except BaseException as error:
            if error is not problem.val_fn.error:
                raise
            error.__traceback__ = None  # it holds the frames
        optimizer._watch.stop()  # it keeps a copy for some steps after a long jump
        assert live_tensor_bytes() == before


def test_as_many_cases_ran_as_are_stated():
    assert sum(STATED.values()) == 935 * TIMES
    assert set(COUNTED) <= set(STATED)
    for name, count in COUNTED.items():
        assert count >= STATED[name], name
