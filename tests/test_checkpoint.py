"""Checkpoints: a run that is saved and resumed goes on bit for bit, stages included."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fastforward_optim import FastForward

from .conftest import LOWEST, Regression, same, through_a_file


def make(problem, **options):
    """Of one that is not calibrated, the interval adapts and stages take what measures lowest."""
    search = {} if options.get("calibrate_lr") else {"line_search": LOWEST}
    return FastForward(
        torch.optim.AdamW(problem.parameters, lr=1e-3),
        problem.val_loss,
        **{"interval": 3, "warmup": 2, **search, **options},
    )


def uninterrupted(steps=20):
    problem = Regression()
    optimizer = make(problem)
    problem.train(optimizer, steps)
    return problem, optimizer


def trials(optimizer):
    return [(record.step, record.tau, record.trials) for record in optimizer.history]


@pytest.mark.parametrize("stop", [0, 9, 12])
def test_a_resumed_run_is_bit_identical(stop):
    expected, expected_optimizer = uninterrupted()
    first = Regression()
    optimizer = make(first)
    first.train(optimizer, stop)
    saved = through_a_file({"model": first.model.state_dict(), "optimizer": optimizer.state_dict()})

    second = Regression()
    second.model.load_state_dict(saved["model"])
    resumed = make(second)
    resumed.load_state_dict(saved["optimizer"])
    assert list(resumed.history) == list(optimizer.history)
    second.train(resumed, 20 - stop, first=stop)
    assert same(second.weights(), expected.weights())
    assert trials(resumed) == trials(expected_optimizer)
    assert max(record.tau for record in resumed.history) > 1


def test_a_plain_checkpoint_loads_into_the_wrapper_and_starts_an_empty_history():
    problem, other = Regression(), Regression()
    plain = torch.optim.AdamW(problem.parameters, lr=0.5)
    problem.train(plain, 4)
    optimizer = make(other)
    other.train(optimizer, 5)
    assert len(optimizer.history) == 1
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    assert len(optimizer.history) == 0
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert same(
        [state["exp_avg"] for state in plain.state.values()],
        [state["exp_avg"] for state in optimizer.state.values()],
    )
    other.train(optimizer, 5)
    assert [record.step for record in optimizer.history] == [5]


def test_the_wrappers_checkpoint_loads_into_a_plain_optimizer():
    problem, optimizer = uninterrupted(6)
    other = Regression()
    other.model.load_state_dict(problem.model.state_dict())
    plain = torch.optim.AdamW(other.parameters)
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    assert plain.param_groups[0]["lr"] == 1e-3
    other.train(plain, 2, first=6)
    problem.train(optimizer, 1, first=6)
    optimizer.interval = 1000
    problem.train(optimizer, 1, first=7)
    assert same(problem.weights(), other.weights())


@pytest.mark.parametrize("calibrate_lr", [False, True])
@pytest.mark.parametrize("steps", [0, 9])
def test_the_checkpoint_is_torchs_own_format_plus_one_key(calibrate_lr, steps):
    problem = Regression()
    optimizer = make(problem, calibrate_lr=calibrate_lr, warmup=0)
    problem.train(optimizer, steps)
    state_dict = optimizer.state_dict()
    assert set(state_dict) == {"state", "param_groups", "fast_forward"}
    group = state_dict["param_groups"][0]
    counters = {key: value for key, value in group.items() if key.startswith("fast_forward")}
    assert counters["fast_forward_step"] == steps
    assert all(type(value) in (int, float) for value in counters.values())
    assert all(
        set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in state_dict["state"].values()
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoints_keep_the_schedule(tmp_path, flatten):
    """``torch.distributed.checkpoint`` drops the history, and nothing that decides the run."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    expected, expected_optimizer = uninterrupted()
    first = Regression()
    optimizer = make(first)
    first.train(optimizer, 9)
    first.model.zero_grad()
    saved = {
        "model": first.model.state_dict(),
        "optimizer": get_optimizer_state_dict(first.model, optimizer, options=options),
    }
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)

    second = Regression()
    resumed = make(second)
    loaded = {
        "model": second.model.state_dict(),
        "optimizer": get_optimizer_state_dict(second.model, resumed, options=options),
    }
    assert resumed.param_groups[0]["fast_forward_step"] == 0, "torch's fake step does not count"
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    second.model.load_state_dict(loaded["model"])
    set_optimizer_state_dict(second.model, resumed, loaded["optimizer"], options=options)
    assert len(resumed.history) == 0
    second.train(resumed, 11, first=9)
    assert same(second.weights(), expected.weights())
    assert trials(resumed) == trials(expected_optimizer)[len(optimizer.history) :]


def test_torchs_fake_step_runs_no_stage_and_a_warmups_first_step_counts():
    problem = Regression()
    optimizer = make(problem, interval=1, warmup=0)
    get_optimizer_state_dict(problem.model, optimizer)
    assert len(optimizer.history) == 0
    assert optimizer.state, "the wrapped optimizer has made its state"

    problem = Regression()
    optimizer = make(problem, interval=2, warmup=0)
    optimizer.param_groups[0]["lr"] = 0.0
    problem.train(optimizer, 1)
    assert optimizer.param_groups[0]["fast_forward_step"] == 1

    problem = Regression()
    optimizer = make(problem, interval=2, warmup=0)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(lambda: problem.backward(0))
    assert optimizer.param_groups[0]["fast_forward_step"] == 1


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_plain_optimizers_distributed_checkpoint_loads_in_part(tmp_path):
    """It has no counters, so the planner must be told that this is meant."""
    first, second = Regression(), Regression()
    plain = torch.optim.AdamW(first.parameters, lr=0.5)
    first.train(plain, 3)
    first.model.zero_grad()
    dcp.save(
        {"optimizer": get_optimizer_state_dict(first.model, plain)},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    optimizer = make(second)
    loaded = {"optimizer": get_optimizer_state_dict(second.model, optimizer)}
    dcp.load(
        loaded,
        checkpoint_id=tmp_path,
        planner=dcp.DefaultLoadPlanner(allow_partial_load=True),
        no_dist=True,
    )
    set_optimizer_state_dict(second.model, optimizer, loaded["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["fast_forward_step"] == 0
    assert same(
        [state["exp_avg"] for state in plain.state.values()],
        [state["exp_avg"] for state in optimizer.state.values()],
    )


def test_state_dict_hooks_run_on_the_wrapper_and_on_the_wrapped_optimizer():
    _, optimizer = uninterrupted(6)
    events = []
    for name, owner in (("outer", optimizer), ("inner", optimizer.optimizer)):
        owner.register_state_dict_pre_hook(lambda o, n=name: events.append((n, "pre", o)))
        owner.register_state_dict_post_hook(
            lambda o, state_dict, n=name: events.append((n, "post", o, set(state_dict)))
        )
        owner.register_load_state_dict_pre_hook(
            lambda o, state_dict, n=name: events.append((n, "load pre", o))
        )
        owner.register_load_state_dict_post_hook(
            lambda o, n=name: events.append((n, "load post", o, len(optimizer.history)))
        )
    outer, inner = optimizer, optimizer.optimizer
    state_dict = optimizer.state_dict()
    ours = {"state", "param_groups"}
    assert events == [
        ("outer", "pre", outer),
        ("inner", "pre", inner),
        ("inner", "post", inner, ours),
        ("outer", "post", outer, ours | {"fast_forward"}),
    ]
    events.clear()
    optimizer.load_state_dict(state_dict)
    assert [event[:3] for event in events] == [
        ("outer", "load pre", outer),
        ("inner", "load pre", inner),
        ("inner", "load post", inner),
        ("outer", "load post", outer),
    ]
    assert events[-1][3] == 1

    optimizer.register_state_dict_post_hook(lambda o, state_dict: {"replaced": 1})
    assert optimizer.state_dict() == {"replaced": 1}


def test_loading_does_not_change_what_was_loaded():
    _, optimizer = uninterrupted(6)
    state_dict = optimizer.state_dict()
    keys = set(state_dict), set(state_dict["param_groups"][0])
    optimizer.load_state_dict(state_dict)
    assert (set(state_dict), set(state_dict["param_groups"][0])) == keys


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_calibrated_run_that_is_saved_in_its_warm_up_goes_on_bit_for_bit(stop):
    """The first window begins where the warm-up ends, not where the checkpoint was written."""
    first, second = Regression(), Regression()
    optimizer, resumed = (make(problem, calibrate_lr=True) for problem in (first, second))
    first.train(optimizer, stop)
    second.model.load_state_dict(first.model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for problem, wrapper in ((first, optimizer), (second, resumed)):
        problem.train(wrapper, 12 - stop, first=stop)
    assert [record.kind for record in optimizer.history] == ["probe", "check"]
    assert same(first.weights(), second.weights())
    assert trials(resumed) == trials(optimizer)


def test_a_calibrated_run_can_be_saved_between_freezing_a_tensor_and_the_next_step():
    first, second = Regression(), Regression()
    optimizer, resumed = (make(problem, calibrate_lr=True) for problem in (first, second))
    first.train(optimizer, 6)
    for problem in (first, second):
        problem.parameters[0].requires_grad_(False)
    first.parameters[0].grad = None
    second.model.load_state_dict(first.model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for problem, wrapper in ((first, optimizer), (second, resumed)):
        problem.train(wrapper, 7, first=6)
    assert [record.step for record in optimizer.history] == [3, 12], "a window from step 6 on"
    assert same(first.weights(), second.weights())
    assert trials(resumed) == trials(optimizer)


def test_a_finished_run_that_is_loaded_is_finished_until_the_next_step():
    first, second = Regression(), Regression()
    optimizer, resumed = (make(problem, calibrate_lr=True) for problem in (first, second))
    first.train(optimizer, 8)
    assert optimizer.finish().kind == "finish"
    second.model.load_state_dict(first.model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert optimizer.finish() is None
    assert resumed.finish() is None
    assert same(first.weights(), second.weights())
    for problem, wrapper in ((first, optimizer), (second, resumed)):
        problem.train(wrapper, 1, first=8)
        assert wrapper.finish() is not None
    assert same(first.weights(), second.weights())
