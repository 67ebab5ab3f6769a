"""A state dict that cannot be right is refused, in words, and changes nothing at all."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastforward_optim import OptimizerState

from .saved_runs import KINDS, REMOVED, Run, assert_refused, edited, saved

GROUP, PART = ("param_groups", 0), ("fast_forward",)
ITERATES, RECORD = (*PART, "iterates"), (*PART, "history", 0)
DAMAGED = "the 'fast_forward' part of the state dict is damaged"
NAN = math.nan
EDITS = [
    (("state",), REMOVED, "this is not a state dict of AdamW: it has no state"),
    (("state",), [], "AdamW cannot load this state dict"),
    (("param_groups",), REMOVED, "this is not a state dict of AdamW: it has no param_groups"),
    (("param_groups",), [], "different number of parameter groups"),
    ((*GROUP, "params"), REMOVED, "KeyError\\('params'\\)"),
    ((*GROUP, "params"), [0, 1], "doesn't match the size of optimizer's group"),
    ((*GROUP, "lr"), "0.1", "the learning rate of group 0 is '0.1'"),
    ((*GROUP, "lr"), -1.0, "the learning rate of group 0 is -1.0"),
    (("state", 0, "step"), torch.tensor(NAN), "has taken nan steps"),
    (("state", 0, "step"), "5", "could not convert string to float"),
    (("state", 0), [1, 2], "AdamW cannot load this state dict"),
    (("state", 2, "exp_avg"), torch.zeros(3, 5), "exp_avg has shape \\[3, 5\\], its parameter"),
    ((*GROUP, "fast_forward_step"), -1, "fast_forward_step in its first group is -1"),
    ((*GROUP, "fast_forward_step"), "9", "fast_forward_step in its first group is '9'"),
    ((*GROUP, "fast_forward_step"), 2, "its last stage was after step 9, but it has taken 2"),
    ((*GROUP, "fast_forward_last_stage"), -3, "fast_forward_last_stage in its first group is -3"),
    ((*GROUP, "fast_forward_tau"), math.inf, "fast_forward_tau in its first group is inf"),
    (PART, "nonsense", f"{DAMAGED}: expected a dict, got 'nonsense'; remove it to load"),
    ((*PART, "version"), 99, "has version 99, this release reads version 5"),
    ((*PART, "version"), REMOVED, "has version None"),
    ((*PART, "history"), REMOVED, DAMAGED),
    ((*PART, "val_fn"), [1], f"{DAMAGED}: its val_fn is \\[1\\]; remove it to load"),
    ((*PART, "val_fn"), {}, "the place in the validation set must be a count, got None"),
    ((*PART, "val_fn", "stages"), -1, "must be a count, got -1"),
    ((*PART, "shapes"), [[1, 2]], DAMAGED),
    ((*PART, "shapes"), [], "the state dict is of another model"),
    ((*PART, "shapes", 0, 2), [2, 17], "parameter 2 of group 0 has shape \\[2, 17\\] there"),
    ((*PART, "optimizer"), 7, f"{DAMAGED}: its optimizer is 7; remove it to load"),
    ((*RECORD, "more"), 1, "a stage record needs exactly"),
    ((*RECORD, "step"), "3", "a stage record cannot be read: its step is '3'"),
    ((*RECORD, "tau"), NAN, "tau and lr_scale of a stage record must be finite"),
    ((*RECORD, "lr_scale"), -1.0, "tau and lr_scale of a stage record must be finite"),
    ((*RECORD, "averaged"), torch.zeros(2, 3), "a stage record cannot be read: its "),
    ((*RECORD, "trials"), [[0.0, "1"]], "a stage record cannot be read: its "),
]
BROKEN = "the calibration in the state dict is damaged"
SPARSE = "it holds tensors that are sparse or"
EDITS_OF_CALIBRATED = [
    *(
        ((*GROUP, f"fast_forward_lr_{name}"), value, f"fast_forward_lr_{name} in its first group")
        for name, values in {
            "scale": [0.0, 1e300, "1"],
            "rate": [-1e-3, math.inf],
            "peak": [NAN],
            "probed": [-1e-3],
            "probed_variance": [math.inf],
            "moving": [NAN],
            "moving_variance": [-1.0, "inf"],
            "ceiling": [-1.0, [math.inf]],
            "travelled": [math.inf],
            "phase": [-1, 4, 0.5],
            "window": [0, 6.5],
        }.items()
        for value in values
    ),
    ((*GROUP, "fast_forward_interval"), 0, "fast_forward_interval in its first group is 0"),
    (ITERATES, [1], DAMAGED),
    (ITERATES, {}, BROKEN),
    ((*ITERATES, "steps"), -1, BROKEN),
    ((*ITERATES, "age"), NAN, BROKEN),
    ((*ITERATES, "second"), 1.5, BROKEN),
    ((*ITERATES, "mean", 1), "nonsense", BROKEN),
    ((*ITERATES, "mean", 1), torch.zeros(3), "is of 4 tensors, this optimizer trains 4, or their"),
    ((*ITERATES, "mean"), [], "is of 0 tensors, this optimizer trains 4"),
    ((*ITERATES, "movement"), [], "this optimizer trains 4, or their shapes differ"),
    *(
        edit
        for name in ("mean", "average")
        for edit in (
            ((*ITERATES, name, 1), lambda: torch.zeros(16).to_sparse(), SPARSE),
            ((*ITERATES, name, 1), torch.zeros(16, device="meta"), SPARSE),
            ((*ITERATES, name, 1), torch.zeros(16, dtype=torch.int64), "tensors of whole numbers"),
        )
    ),
]


def name_of(edit):
    value = str(edit[1])[:12]
    if callable(edit[1]):
        value = "sparse"
    return "-".join(map(str, edit[0])) + f"-{value}"


@pytest.mark.parametrize("edit", EDITS, ids=name_of)
def test_an_edited_state_dict_is_refused(edit):
    path, value, words = edit
    state_dict = edited(saved(Run().take(9)), path, value)
    assert_refused(Run().take(5), state_dict, words)
    assert_refused(Run(), state_dict, words)


@pytest.mark.parametrize("edit", EDITS_OF_CALIBRATED, ids=name_of)
def test_an_edited_state_dict_of_a_calibrated_run_is_refused(edit):
    path, value, words = edit
    state_dict = edited(saved(Run(options=KINDS["calibrated"]).take(10)), path, value)
    assert_refused(Run(options=KINDS["calibrated"]).take(5), state_dict, words)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"weight_decay": NAN, "eps": math.inf, "betas": (0.9, NAN)}),
        (torch.optim.SGD, {"momentum": NAN, "dampening": NAN, "lr": torch.tensor(-1.0)}),
    ],
)
def test_options_that_no_run_can_have_are_refused(kind, options):
    for name, value in options.items():
        state_dict = edited(saved(Run(kind).take(9)), (*GROUP, name), value)
        words = "learning rate" if name == "lr" else name
        assert_refused(Run(kind).take(5), state_dict, f"{words} of group 0 is")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*PART, "val_fn"), [1]),
        ((*PART, "shapes"), [10] * 10**5),
        ((*RECORD, "trials"), [[0.0, "1"]] * 10**5),
        ((*RECORD, "more"), [0.0] * 10**5),
    ],
    ids=["val_fn", "shapes", "trials", "more"],
)
def test_the_error_does_not_grow_with_the_state_dict(kind, path, value):
    state_dict = saved(Run(options=KINDS[kind]).take(10))
    state_dict["fast_forward"]["history"] *= 1000
    with pytest.raises(ValueError, match=r"damaged|stage record") as caught:
        Run(options=KINDS[kind]).optimizer.load_state_dict(edited(state_dict, path, value))
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("value", [None, [], "text", 3, torch.zeros(2)], ids=str)
def test_what_is_no_state_dict_is_refused(value):
    assert_refused(Run().take(5), value, "state_dict must be a dict, got")


def leaves(value, path=()):
    """The paths of all that is in a state dict, itself left out."""
    yield from [path] if path else []
    if isinstance(value, dict):
        items = value.items()
    else:
        items = enumerate(value) if isinstance(value, list | tuple) else ()
    for name, item in items:
        yield from leaves(item, (*path, name))


JUNK = st.one_of(
    st.just(REMOVED),
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(width=16),
    st.text(max_size=3),
    st.lists(st.floats(), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([torch.tensor(math.nan), torch.zeros(2, 3), torch.zeros(0)]),
)
STATE_DICTS = {name: saved(Run(options=options).take(10)) for name, options in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_whatever_is_edited_it_is_refused_or_the_run_goes_on(name):
    """Of our part and numbers. Any other exception, now or later, would be a surprise."""
    state_dict = STATE_DICTS[name]
    paths = [
        path
        for path in leaves(state_dict)
        if path[0] == "fast_forward" or str(path[-1]).startswith("fast_forward_")
    ]
    run = Run(options=KINDS[name]).take(5)
    outcomes = {"refused": 0, "loaded": 0}

    @settings(
        max_examples=150,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(path=st.sampled_from(paths), value=JUNK)
    def check(path, value):
        if value is REMOVED and isinstance(path[-1], int) and path[-2] in ("betas", "trials"):
            value = None
        try:
            changed = edited(state_dict, path, value)
        except TypeError:  # the inside of a tuple
            return
        before = run.everything()
        try:
            run.optimizer.load_state_dict(changed)
        except ValueError as error:
            message = str(error)
        else:
            message = None
        if message is not None:
            assert run.everything() == before
            assert len(message) > 10
            outcomes["refused"] += 1
            return
        outcomes["loaded"] += 1
        other = Run(options=KINDS[name])
        other.optimizer.load_state_dict(run.optimizer.state_dict())
        other.take(7)
        run.optimizer.load_state_dict(state_dict)

    check()
    assert min(outcomes.values()) > 10, outcomes


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(
    "damage",
    [
        lambda state: {},
        lambda state: state | {"fast_forward": "{"},
        lambda state: state | {"fast_forward": "[]"},
        lambda state: state | {"iterates": {}},
        lambda state: state | {"iterates": {"mean.x": torch.zeros(1)}},
        lambda state: (
            state
            | {"fast_forward": json.dumps({**json.loads(state["fast_forward"]), "version": 9})}
        ),
    ],
)
def test_a_damaged_distributed_checkpoint_is_refused(damage):
    theirs = Run(options=KINDS["calibrated"]).take(10)
    state = OptimizerState(theirs.model, theirs.optimizer).state_dict()
    run = Run(options=KINDS["calibrated"]).take(5)
    before = run.everything()
    with pytest.raises(ValueError, match=r"damaged|version 9|is of 0 tensors"):
        OptimizerState(run.model, run.optimizer).load_state_dict(damage(state))
    assert run.everything() == before
    run.model.zero_grad()
    OptimizerState(run.model, run.optimizer).load_state_dict(state)
    assert run.optimizer.history == theirs.optimizer.history
