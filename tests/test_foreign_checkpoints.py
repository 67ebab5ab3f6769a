"""State dicts of other optimizers, models and releases; and loading that is cut short."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .conftest import same
from .saved_runs import KINDS, REMOVED, Run, assert_refused, edited, saved

GROUP = ("param_groups", 0)
OPTIMIZERS = [
    getattr(torch.optim, name)
    for name in ("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam")
] + [torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD]


def test_the_state_of_another_optimizer_is_refused():
    """And what is loaded goes on."""
    refused, loaded = set(), set()
    for theirs in OPTIMIZERS:
        state_dict = Run(theirs).take(4).optimizer.state_dict()
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
            assert f"{ours.__name__} cannot go on" in message
            assert message.endswith(f"it was saved from {theirs.__name__}")
            assert run.everything() == before
    same_kind = {f"{kind.__name__} {kind.__name__}" for kind in OPTIMIZERS}
    assert loaded == same_kind | {"Adam AdamW", "AdamW Adam"}
    assert len(refused) == len(OPTIMIZERS) ** 2 - len(loaded)


@pytest.mark.parametrize(("theirs", "ours"), [("SGD", "AdamW"), ("AdamW", "SGD")])
def test_a_plain_state_dict_without_the_options_needed_is_refused(theirs, ours):
    state_dict = Run(getattr(torch.optim, theirs)).take(4).inner.state_dict()
    words = f"{ours} cannot go on .* lack .*; it was saved from another optimizer"
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


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (torch.optim.AdamW, "lr", -1.7e-20),  # where a schedule ends at zero, but for rounding
        (torch.optim.AdamW, "betas", (torch.tensor(0.9), torch.tensor(0.99))),
        (torch.optim.Adafactor, "d", math.inf),
        (torch.optim.Rprop, "step_sizes", (1e-6, math.inf)),
        (torch.optim.SGD, "nesterov", True),
        (Signs, "scale", math.inf),
        (Signs, "scale", math.nan),  # a step may have written it
    ],
)
def test_options_that_a_run_can_have_are_loaded(kind, name, value):
    run = Run(kind)
    run.optimizer.load_state_dict(edited(saved(Run(kind).take(4)), (*GROUP, name), value))
    assert str(run.inner.param_groups[0][name]) == str(value)
    if value == value:
        run.take(4)


def test_what_blew_up_is_loaded():
    theirs = Run().take(4)
    for state in theirs.inner.state.values():
        state["exp_avg"].fill_(math.nan)
    Run().optimizer.load_state_dict(saved(theirs))


def model(width, bias=True, outputs=2):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, outputs, bias=bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("origin", ["wrapper", "plain"])
@pytest.mark.parametrize(("width", "bias"), [(8, True), (16, False)], ids=["shapes", "number"])
def test_the_state_of_another_model_is_refused(kind, origin, width, bias):
    theirs = Run(options=KINDS[kind], model=model(width, bias)).take(5)
    state_dict = saved(theirs)
    if origin == "plain":
        state_dict = theirs.inner.state_dict()
    words = "of another model" if origin == "wrapper" else ""
    assert_refused(Run(options=KINDS[kind]).take(5), state_dict, words)


def test_shapes_are_told_where_the_wrapped_optimizer_has_no_state():
    plain = saved(Run(Signs, model=model(8)).take(4))
    assert_refused(Run(Signs).take(4), plain, "has shape \\[8, 6\\] there and \\[16, 6\\] here")


def test_a_hook_that_puts_other_parameters_in_their_place_is_trusted():
    theirs, run = Run(model=model(8)).take(4), Run()
    ours = Run().take(4).inner.state_dict()
    with pytest.raises(ValueError, match="of another model"):
        run.optimizer.load_state_dict(saved(theirs))
    run.inner.register_load_state_dict_pre_hook(lambda *_: ours)
    run.optimizer.load_state_dict(saved(theirs))
    run.take(4)


class Sums(torch.optim.Optimizer):
    """One of another library: it loads into the state that is there."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"sum": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["sum"].add_(p.grad), alpha=group["lr"])

    def load_state_dict(self, state_dict):
        for group, theirs in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for index, p in zip(theirs["params"], group["params"], strict=True):
                self.load(p, state_dict["state"][index])
            group.update({key: value for key, value in theirs.items() if key != "params"})

    def load(self, p, theirs):
        self.state[p]["sum"].copy_(theirs["sum"])


class ReplacesValues(Sums):
    def load(self, p, theirs):
        self.state[p]["sum"] = theirs["sum"].clone()


class ReplacesStates(Sums):
    def load(self, p, theirs):
        self.state[p] = {"sum": theirs["sum"].clone()}
        self.state[torch.zeros(0)] = {}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ((*GROUP, "fast_forward_step"), -1, "fast_forward_step in its first group is -1"),
        ((*GROUP, "fast_forward_last_stage"), 99, "its last stage was after step 99"),
        (("fast_forward", "val_fn", "stages"), -1, "must be a count"),
        (("fast_forward", "shapes"), [], "another model"),
    ],
)
def test_what_is_damaged_of_ours_is_seen_before_an_optimizer_copies_into_its_state(
    path, value, words
):
    assert_refused(Run(Sums).take(5), edited(saved(Run(Sums).take(9)), path, value), words)


@pytest.mark.parametrize("kind", [ReplacesValues, ReplacesStates])
def test_an_optimizer_that_replaces_parts_of_its_state_is_put_back(kind):
    state_dict = edited(saved(Run(kind).take(9)), (*GROUP, "lr"), float("nan"))
    assert_refused(Run(kind).take(5), state_dict, "the learning rate of group 0 is nan")


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
