"""A state dict that cannot be right is refused, in words, and changes nothing at all."""

import copy
import io
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastforward_optim import FastForward, OptimizerState, ValidationLoss

from .conftest import Regression, flat, same

KINDS = {"plain": {}, "calibrated": {"calibrate_lr": True}}


class Run(Regression):
    """In training, with stages that take other validation examples in turn."""

    def __init__(self, optimizer=torch.optim.AdamW, options=KINDS["plain"], model=None):
        super().__init__()
        if model is not None:
            self.model = model
        rows = [(self.inputs[i : i + 8], self.targets[i : i + 8]) for i in range(64, 96, 8)]
        self.val_fn = ValidationLoss(self.model, rows, batches_per_stage=1, forward=self.forward)
        more = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
        self.inner = optimizer(self.parameters, lr=1e-3, **more)
        self.optimizer = FastForward(self.inner, self.val_fn, interval=3, **options)
        self.taken = 0

    @staticmethod
    def forward(model, rows):
        return nn.functional.mse_loss(model(rows[0]), rows[1]), len(rows[0])

    def loss(self, rows):
        outputs = self.model(self.inputs[rows])
        return nn.functional.mse_loss(outputs, self.targets[rows, : outputs.shape[1]])

    def take(self, steps):
        self.train(self.optimizer, steps, first=self.taken)
        self.taken += steps
        return self

    def everything(self):
        """All that a step depends on, bit for bit, and what stages have found."""
        state = {
            "weights": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "val_fn": self.val_fn.state_dict(),
            "lr_scale": self.optimizer.lr_scale,
            "random": torch.get_rng_state(),
            "attributes": sorted(self.inner.__dict__),
            "objects": [id(group) for group in self.inner.param_groups] + [id(self.inner.state)],
        }
        return flat(state)


def saved(run):
    """Its state dict, through a file."""
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_refused(run, state_dict, words=""):
    """It is, and the run goes on as one that has never seen it."""
    twin = copy.deepcopy(run)
    before = run.everything()
    with pytest.raises(ValueError, match=words or "."):
        run.optimizer.load_state_dict(state_dict)
    assert run.everything() == before
    run.take(6)
    twin.take(6)
    assert flat(run.optimizer.state_dict()) == flat(twin.optimizer.state_dict())
    assert same(run.weights(), twin.weights())


def edited(state_dict, path, value):
    """A copy with another value at the end of the path, or without it."""
    result = copy.deepcopy(state_dict)
    at = result
    for name in path[:-1]:
        at = at[name]
    if value is REMOVED:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return result


REMOVED = object()
GROUP, PART = ("param_groups", 0), ("fast_forward",)
WINDOW, RECORD = (*PART, "window"), (*PART, "history", 0)
DAMAGED = "the 'fast_forward' part of the state dict is damaged"
NAN, HUGE = math.nan, 10**30
EDITS = [
    (("state",), REMOVED, "has no dict under 'state'"),
    (("state",), [], "has no dict under 'state'"),
    (("param_groups",), REMOVED, "no list of dicts under 'param_groups'"),
    (("param_groups",), [1], "no list of dicts under 'param_groups'"),
    (("param_groups",), [], "different number of parameter groups"),
    ((*GROUP, "params"), REMOVED, "KeyError\\('params'\\)"),
    ((*GROUP, "params"), [0, 1], "doesn't match the size of optimizer's group"),
    ((*GROUP, "lr"), "0.1", "the learning rate of group 0 is '0.1'"),
    ((*GROUP, "lr"), NAN, "the learning rate of group 0 is nan"),
    ((*GROUP, "betas"), REMOVED, "its param groups lack betas"),
    ((*GROUP, "betas"), [0.9], "AdamW cannot go on from this state dict"),
    ((*GROUP, "eps"), "1", "AdamW cannot go on from this state dict"),
    (("state", 0), None, "AdamW cannot go on from this state dict"),
    (("state", 0, "step"), torch.tensor(NAN), "has taken tensor\\(nan\\) steps"),
    (("state", 0, "step"), torch.tensor(-1.0), "has taken tensor\\(-1.\\) steps"),
    (("state", 0, "step"), "5", "AdamW cannot go on from this state dict"),
    (("state", 0), [1, 2], "AdamW cannot go on from this state dict"),
    (("state", 0, "step"), REMOVED, "KeyError\\('step'\\)"),
    (("state", 3, "exp_avg_sq"), REMOVED, "KeyError\\('exp_avg_sq'\\)"),
    (("state", 3, "exp_avg_sq"), 1.0, "AdamW cannot go on from this state dict"),
    (("state", 2, "exp_avg"), torch.zeros(3, 5), "AdamW cannot go on from this state dict"),
    ((*GROUP, "fast_forward_step"), -1, "fast_forward_step in its first group is -1"),
    ((*GROUP, "fast_forward_step"), NAN, "fast_forward_step in its first group is nan"),
    ((*GROUP, "fast_forward_step"), HUGE, "fast_forward_step in its first group is 1000"),
    ((*GROUP, "fast_forward_step"), "9", "fast_forward_step in its first group is 9"),
    ((*GROUP, "fast_forward_step"), 1.5, "fast_forward_step in its first group is 1.5"),
    ((*GROUP, "fast_forward_step"), True, "fast_forward_step in its first group is True"),
    ((*GROUP, "fast_forward_step"), 2, "its last stage was after step 9, but it has taken 2"),
    ((*GROUP, "fast_forward_last_stage"), -3, "fast_forward_last_stage in its first group is -3"),
    ((*GROUP, "fast_forward_tau"), math.inf, "fast_forward_tau in its first group is inf"),
    ((*GROUP, "fast_forward_tau"), [1.0], "fast_forward_tau in its first group is \\[1.0\\]"),
    (PART, "nonsense", DAMAGED),
    (PART, {}, DAMAGED),
    ((*PART, "version"), 99, "has version 99, this release reads versions 1 to 3"),
    ((*PART, "version"), "3", "has version '3'"),
    ((*PART, "version"), [3], "has version \\[3\\]"),
    ((*PART, "version"), REMOVED, "has version None"),
    ((*PART, "history"), REMOVED, DAMAGED),
    ((*PART, "history"), {}, DAMAGED),
    ((*PART, "val_fn"), [1], DAMAGED),
    ((*PART, "val_fn"), {}, "the place in the validation set must be a count, got None"),
    ((*PART, "val_fn", "stages"), "3", "must be a count, got '3'"),
    ((*PART, "val_fn", "stages"), -1, "must be a count, got -1"),
    ((*PART, "shapes"), "nonsense", DAMAGED),
    ((*PART, "shapes"), [[1, 2]], DAMAGED),
    ((*PART, "shapes"), [], "the state dict is of another model"),
    ((*PART, "shapes", 0, 2), [2, 17], "parameter 2 of group 0 has shape \\[2, 17\\] there"),
    ((*PART, "optimizer"), 7, DAMAGED),
    (RECORD, {}, "a stage record needs exactly"),
    (RECORD, None, "a stage record needs exactly"),
    ((*RECORD, "more"), 1, "a stage record needs exactly"),
    ((*RECORD, "step"), "3", "a stage record is made of numbers"),
    ((*RECORD, "step"), 0, "a stage record is made of numbers"),
    ((*RECORD, "step"), HUGE, "a stage record is made of numbers"),
    ((*RECORD, "tau"), "1", "a stage record is made of numbers"),
    ((*RECORD, "tau"), NAN, "tau and lr_scale of a stage record must be finite"),
    ((*RECORD, "lr_scale"), -1.0, "tau and lr_scale of a stage record must be finite"),
    ((*RECORD, "trials"), [[0.0]], "a stage record is made of numbers"),
    ((*RECORD, "trials"), [[0.0, "1"]], "a stage record is made of numbers"),
]
EDITS_OF_CALIBRATED = [
    ((*GROUP, "fast_forward_lr_scale"), 0.0, "fast_forward_lr_scale in its first group is 0.0"),
    ((*GROUP, "fast_forward_lr_scale"), NAN, "fast_forward_lr_scale in its first group is nan"),
    ((*GROUP, "fast_forward_lr_gain"), -4.0, "fast_forward_lr_gain in its first group is -4.0"),
    ((*GROUP, "fast_forward_lr_last"), "0", "fast_forward_lr_last in its first group is 0"),
    ((*GROUP, "fast_forward_interval"), 0, "fast_forward_interval in its first group is 0"),
    ((*GROUP, "fast_forward_interval"), NAN, "fast_forward_interval in its first group is nan"),
    (WINDOW, [1], DAMAGED),
    (WINDOW, {}, "the calibration in the state dict is damaged"),
    ((*WINDOW, "steps"), -1, "the calibration in the state dict is damaged"),
    ((*WINDOW, "steps"), "2", "the calibration in the state dict is damaged"),
    ((*WINDOW, "age"), NAN, "the calibration in the state dict is damaged"),
    ((*WINDOW, "age"), HUGE, "the calibration in the state dict is damaged"),
    ((*WINDOW, "mean"), REMOVED, "the calibration in the state dict is damaged"),
    ((*WINDOW, "mean", 1), "nonsense", "the calibration in the state dict is damaged"),
    ((*WINDOW, "mean", 1), torch.zeros(3), "is of 4 tensors, this optimizer trains 4, or their"),
    ((*WINDOW, "start"), [], "is of 0 tensors, this optimizer trains 4"),
    ((*WINDOW, "start", 1), torch.zeros(16).half(), "torch.float16, torch.float32, this opt"),
    ((*WINDOW, "mean", 1), torch.zeros(16, dtype=torch.int64), "this optimizer trains"),
]


def name_of(edit):
    return "-".join(map(str, edit[0])) + f"-{str(edit[1])[:12]}"


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
    st.floats(),
    st.text(max_size=3),
    st.lists(st.floats(), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([torch.tensor(math.nan), torch.zeros(2, 3), torch.zeros(0)]),
)
# Which implementation is taken: any value means yes or no.
SWITCHES = {"foreach", "fused", "capturable", "differentiable", "maximize", "amsgrad"}
STATE_DICTS = {name: saved(Run(options=options).take(10)) for name, options in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_whatever_is_edited_it_is_refused_or_the_run_goes_on(name):
    """Any other exception, now or at the next stage, would be a surprise."""
    state_dict = STATE_DICTS[name]
    paths = [path for path in leaves(state_dict) if path[-1] not in SWITCHES]
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


OPTIMIZERS = [
    getattr(torch.optim, name)
    for name in ("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam")
] + [torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD]


def goes_on_alone(run, state_dict):
    """What the wrapped optimizer does with it."""
    wrapped = {key: state_dict[key] for key in ("state", "param_groups")}
    run.inner.load_state_dict(copy.deepcopy(wrapped))
    run.train(run.inner, 1)


@pytest.mark.parametrize("origin", ["wrapper", "plain"])
def test_the_state_of_another_optimizer_is_refused_where_it_cannot_work(origin):
    """And nowhere else: what is loaded goes on, what is refused would have failed."""
    refused, loaded = set(), set()
    for theirs in OPTIMIZERS:
        run = Run(theirs).take(4)
        state_dict = run.optimizer.state_dict() if origin == "wrapper" else run.inner.state_dict()
        for ours in OPTIMIZERS:
            pair = f"{theirs.__name__} {ours.__name__}"
            run = Run(ours)
            before = run.everything()
            try:
                run.optimizer.load_state_dict(copy.deepcopy(state_dict))
            except ValueError as error:
                refused.add(pair)
                message = str(error)
            else:
                loaded.add(pair)
                run.take(4)
                continue
            assert ours.__name__ in message
            assert run.everything() == before
            with pytest.raises((KeyError, TypeError, RuntimeError)):
                goes_on_alone(Run(ours), state_dict)
    assert {f"{kind.__name__} {kind.__name__}" for kind in OPTIMIZERS} <= loaded
    assert {"Adam AdamW", "AdamW Adam", "AdamW RAdam"} <= loaded
    assert {"SGD AdamW", "AdamW SGD", "AdamW Adamax", "Adamax AdamW"} <= refused


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ("SGD", "AdamW", "AdamW cannot go on .*, which was saved from SGD: .* lack amsgrad, betas"),
        ("AdamW", "SGD", "SGD cannot go on .*, which was saved from AdamW: .* lack dampening, mom"),
    ],
)
def test_the_error_names_both_optimizers_and_what_is_missing(theirs, ours, words):
    state_dict = saved(Run(getattr(torch.optim, theirs)).take(4))
    assert_refused(Run(getattr(torch.optim, ours)).take(5), state_dict, words)


class Signs(torch.optim.Optimizer):
    """One of another library: what it does in a step is not tried."""

    def __init__(self, params, lr, scale=1.0):
        super().__init__(params, {"lr": lr, "scale": scale})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"] * group["scale"])


def test_options_that_another_librarys_optimizer_needs_are_missed():
    plain = torch.optim.SGD(Run().parameters, lr=0.1).state_dict()
    words = "Signs cannot go on .* lack scale; it was saved from another optimizer"
    assert_refused(Run(Signs).take(4), plain, words)
    # Of the same class it may be an older release's, which its newer one can read.
    older = edited(saved(Run(Signs).take(4)), (*GROUP, "scale"), REMOVED)
    Run(Signs).optimizer.load_state_dict(older)


def model(width, bias=True, outputs=2):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, outputs, bias=bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("origin", ["wrapper", "version 2", "plain"])
@pytest.mark.parametrize(("width", "bias"), [(8, True), (16, False)], ids=["shapes", "number"])
def test_the_state_of_another_model_is_refused(kind, origin, width, bias):
    theirs = Run(options=KINDS[kind], model=model(width, bias)).take(5)
    state_dict = saved(theirs)
    if origin == "version 2":
        state_dict = as_version_2(state_dict)
    if origin == "plain":
        state_dict = theirs.inner.state_dict()
    words = "of another model" if origin == "wrapper" else ""
    assert_refused(Run(options=KINDS[kind]).take(5), state_dict, words)


def test_shapes_are_told_where_the_wrapped_optimizer_has_no_state():
    plain = saved(Run(Signs, model=model(8)).take(4))
    assert_refused(Run(Signs).take(4), plain, "has shape \\[8, 6\\] there and \\[16, 6\\] here")


def as_version_2(state_dict):
    """As releases wrote it that did not say whose state it is."""
    part = {"version": 2, "history": state_dict["fast_forward"]["history"]}
    for name in ("window", "val_fn"):
        if name in state_dict["fast_forward"]:
            part[name] = state_dict["fast_forward"][name]
    return {**state_dict, "fast_forward": part}


def as_version_1(state_dict):
    """As it was before the learning rate could be calibrated."""
    fields = ("step", "tau", "trials", "loss_before", "loss_after", "seconds")
    history = [
        {name: record[name] for name in fields} for record in state_dict["fast_forward"]["history"]
    ]
    return {**state_dict, "fast_forward": {"version": 1, "history": history}}


@pytest.mark.parametrize(
    ("kind", "older"),
    [("plain", as_version_1), ("plain", as_version_2), ("calibrated", as_version_2)],
)
def test_older_versions_go_on_bit_for_bit(kind, older):
    expected = Run(options=KINDS[kind]).take(10)
    state_dict = older(saved(expected))
    resumed = Run(options=KINDS[kind])
    resumed.model.load_state_dict(expected.model.state_dict())
    resumed.optimizer.load_state_dict(state_dict)
    if older is as_version_1:  # it had no place in the validation set
        resumed.val_fn.load_state_dict(expected.val_fn.state_dict())
    resumed.taken = 10
    assert len(resumed.optimizer.history) == len(expected.optimizer.history) >= 2
    assert same(resumed.take(10).weights(), expected.take(10).weights())


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["before", "after", "val_fn"])
def test_an_error_half_way_through_loading_changes_nothing(where, error):
    run = Run(options=KINDS["calibrated"]).take(5)
    state_dict = saved(Run(options=KINDS["calibrated"]).take(10))
    failing = [True]

    def fail(*_):
        if failing[0]:
            failing[0] = False
            raise error

    if where == "before":
        run.inner.register_load_state_dict_pre_hook(fail)
    elif where == "after":
        run.inner.register_load_state_dict_post_hook(fail)
    else:
        real = run.val_fn.load_state_dict
        run.val_fn.load_state_dict = lambda state: (real(state), fail())
    before = run.everything()
    with pytest.raises((ValueError, type(error))):
        run.optimizer.load_state_dict(state_dict)
    assert run.everything() == before
    run.optimizer.load_state_dict(state_dict)
    assert run.everything() != before


def test_loading_calls_no_step_hook_and_leaves_the_generators():
    state_dict = saved(Run().take(10))
    run, calls = Run(), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global")),
        run.inner.register_step_pre_hook(lambda *_: calls.append("inner")),
        run.optimizer.register_step_post_hook(lambda *_: calls.append("outer")),
    ]
    before, weights = torch.get_rng_state(), run.weights()
    run.optimizer.load_state_dict(state_dict)
    for handle in handles:
        handle.remove()
    assert calls == []
    assert same([torch.get_rng_state()], [before])
    assert same(run.weights(), weights)
    assert all(p.grad is None for p in run.parameters)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(
    "damage",
    [
        lambda state: {},
        lambda state: state | {"fast_forward": "{"},
        lambda state: state | {"fast_forward": "[]"},
        lambda state: state | {"iterates": {}},
        lambda state: state | {"iterates": {"start.x": torch.zeros(1)}},
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
