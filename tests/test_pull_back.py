"""Optimizers whose steps undo a jump of the weights are found by what they do, and refused."""

import copy
import logging
import pickle
import random
import warnings

import bitsandbytes
import numpy
import prodigyplus
import pytest
import pytorch_optimizer
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastforward_optim import FastForward
from fastforward_optim.diagnostics.pull_back import Watch, pulls_back

from .conftest import DEVICES, LOWEST, Regression, fixed

SGD = torch.optim.SGD

# Each keeps weights of its own: slow ones, where it started, an average, another sequence.
PULL_BACK = {
    "A2Grad": {},
    "AccSGD": {},
    "DAdaptAdaGrad": {},
    "DAdaptSGD": {},
    "FTRL": {},
    "MADGRAD": {},
    "Ranger": {},
    "Ranger21": {"num_iterations": 100},
    "SRMM": {},
}


def of(name, params):
    return getattr(pytorch_optimizer, name)(params, **PULL_BACK.get(name, {}))


@pytest.mark.parametrize("name", ["MADGRAD", "Ranger21"])
def test_an_optimizer_that_goes_on_from_weights_of_its_own_is_refused(problem, name):
    words = rf"optimizer takes jumps of the weights back \({name}\).* such as torch.optim.AdamW, or"
    optimizer = of(name, problem.parameters)
    with pytest.raises(ValueError, match=words):
        FastForward(optimizer, problem.val_loss)


@pytest.mark.parametrize("wrapper", ["Lookahead", "TRAC"])
@pytest.mark.parametrize("inner", [SGD, pytorch_optimizer.AdaBelief])
def test_a_wrapper_that_pulls_back_is_to_be_left_out(problem, wrapper, inner):
    base = inner(problem.parameters, lr=0.1)
    outer = getattr(pytorch_optimizer, wrapper)(base)
    words = rf"\({wrapper}\).* wrap the {inner.__name__} that {wrapper} holds in FastForward, and"
    with pytest.raises(ValueError, match=words):
        FastForward(outer, problem.val_loss)
    optimizer = FastForward(base, problem.val_loss, **fixed(1))
    problem.train(optimizer, 2)
    assert len(optimizer.history) == 2


@pytest.mark.parametrize("k", [1, 15])
def test_slow_weights_are_found_whatever_their_period(problem, k):
    outer = pytorch_optimizer.Lookahead(SGD(problem.parameters, lr=0.1), k=k, alpha=0.8)
    assert pulls_back(outer) is outer


def test_what_an_option_turns_off_is_not_refused(problem):
    make = prodigyplus.ProdigyPlusScheduleFree
    with pytest.raises(ValueError, match=r"jumps of the weights back \(ProdigyPlusScheduleFree\)"):
        FastForward(make(problem.parameters), problem.val_loss)
    FastForward(make(problem.parameters, use_schedulefree=False), problem.val_loss)


def test_one_that_is_held_by_another_is_found(problem):
    class Outer(torch.optim.Optimizer):
        def __init__(self, base):
            self._base = base
            super().__init__(base.param_groups, base.defaults)

        def step(self, closure=None):
            return self._base.step(closure)

    inner = of("MADGRAD", problem.parameters)
    assert pulls_back(Outer(inner)) is inner
    assert pulls_back(Outer(SGD(problem.parameters))) is None


class Slow(SGD):
    """A user's own: every third step ends in the middle of the way from three steps before."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]
        self.taken = 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        self.taken += 1
        if self.taken % 3 == 0:
            for p, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                p.copy_(slow.lerp_(p, 0.5))
        return loss


def test_a_copy_that_is_taken_when_it_is_first_needed_is_found(problem):
    class Late(Slow):
        """Its slow weights are those of its first period's end, not those of the start."""

        def step(self, closure=None):
            if self.taken == 5:
                torch._foreach_copy_(self.slow, self.param_groups[0]["params"])
            return super().step(closure) if self.taken >= 5 else self.plain_step(closure)

        def plain_step(self, closure):
            self.taken += 1
            return SGD.step(self, closure)

    optimizer = Late(problem.parameters)
    assert pulls_back(optimizer) is optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_users_own_optimizer_is_found_in_every_dtype(problem, dtype):
    problem.model.to(dtype)
    optimizer = Slow(problem.parameters)
    assert pulls_back(optimizer) is optimizer
    assert pulls_back(pytorch_optimizer.AdaBelief(problem.parameters)) is None


def ordinary(name, parameters):
    """One of pytorch_optimizer's, by what its constructor takes; None if it needs a model, say."""
    make = pytorch_optimizer.load_optimizer(name)
    hidden, others = [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]
    muon = [{"params": hidden, "use_muon": True}, {"params": others, "use_muon": False}]
    for params, options in ((parameters, {}), (muon, {}), (hidden, {}), (parameters, {"k": 9})):
        try:
            return make(params, **options)
        except (TypeError, ValueError, KeyError, ImportError, AttributeError, RuntimeError):
            continue
    return None


def test_of_a_large_collection_just_these_are_refused(problem):
    """Prodigy and the like, which keep the starting point to measure a distance, are not."""
    refused, tried = set(), 0
    for name in pytorch_optimizer.get_supported_optimizers():
        if name == "spectralsphere":  # takes seconds
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = ordinary(name, problem.parameters)
        if optimizer is not None:
            tried += 1
            if pulls_back(optimizer) is not None:
                refused.add(type(optimizer).__name__)
    free = {f"ScheduleFree{kind}" for kind in ("AdamW", "RAdam", "SGD")}
    assert refused == set(PULL_BACK) - {"Ranger21"} | free
    assert tried > 100


@pytest.mark.parametrize("name", ["SAM", "FriendlySAM", "LookSAM"])
def test_ascent_within_a_step_is_no_pull_back(problem, name):
    optimizer = getattr(pytorch_optimizer, name)(problem.parameters, SGD, lr=0.1)
    assert pulls_back(optimizer) is None


def test_nothing_of_the_replicas_is_seen_outside(problem, capfd, caplog):
    class Loud(pytorch_optimizer.AdaBelief):
        def step(self, closure=None):
            print("step")
            warnings.warn("step", stacklevel=1)
            logging.getLogger("loud").error("step")
            draws.append(float(torch.rand(1)) + random.random() + numpy.random.rand())
            return super().step(closure)

    def seen(*_):
        raise AssertionError("a replica's hook")

    draws = []
    optimizer = Loud(problem.parameters)
    optimizer.register_step_pre_hook(seen)
    everyones = register_optimizer_step_pre_hook(seen)

    def outside():
        return repr(
            (
                torch.get_rng_state().tolist(),
                random.getstate(),
                numpy.random.get_state()[1].tolist(),
                optimizer,
                problem.weights(),
            )
        )

    before = outside()
    try:
        with torch.no_grad(), torch.device("meta"):
            assert pulls_back(optimizer) is None
            assert not torch.is_grad_enabled()
    finally:
        everyones.remove()
    assert outside() == before
    assert len(draws) == 2 * 48, "two replicas took their steps"
    assert draws[:48] == draws[48:], "both draw the same numbers"
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    logging.getLogger("loud").error("still heard")
    assert len(caplog.records) == 1


def test_a_replica_does_not_wait_for_other_ranks(problem):
    """This module, which speaks of torch.distributed, is one whose optimizers might."""
    slow = Slow(problem.parameters)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert pulls_back(slow) is None
        assert pulls_back(of("MADGRAD", problem.parameters)) is not None
    finally:
        torch.distributed.destroy_process_group()
    assert pulls_back(slow) is slow


def test_a_replica_that_fails_tells_nothing(problem):
    class Strange(SGD):
        def __init__(self, params, secret):
            assert secret == "known to the user alone"
            super().__init__(params)

    optimizer = Strange(problem.parameters, "known to the user alone")
    assert pulls_back(optimizer) is None
    assert pulls_back(bitsandbytes.optim.AdamW8bit(problem.parameters)) is None


# What a replica does not show is seen in the run.


def pulled_back(said):
    return [str(one.message) for one in said if "undone its jump" in str(one.message)]


def average_with_slow_weights(params):
    """A hook of a user's: slow weights, as Lookahead has them."""
    slow, taken = [p.detach().clone() for p in params], []

    @torch.no_grad()
    def hook(*_):
        taken.append(None)
        if len(taken) % 5 == 0:
            for p, behind in zip(params, slow, strict=True):
                p.copy_(behind.lerp_(p, 0.5))

    return hook


def run(problem, optimizer, steps=24, **options):
    wrapped = FastForward(optimizer, problem.val_loss, line_search=LOWEST, **options)
    problem.train(wrapped, steps)
    assert max(record.tau for record in wrapped.history) > 50
    return wrapped


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interval", [2, 6])
def test_steps_that_take_a_jump_back_are_seen_once(interval, device):
    problem = Regression(device=device)
    base = torch.optim.AdamW(problem.parameters, lr=1e-5)
    base.register_step_post_hook(average_with_slow_weights(problem.parameters))
    with pytest.warns(UserWarning, match="undone its jump") as said:
        optimizer = run(problem, base, **fixed(interval))
    (message,) = pulled_back(said)
    assert "AdamW, or a hook, goes on from weights" in message
    assert optimizer._watch._before == []


def test_masters_in_more_bits_are_seen(problem):
    """The steps are taken on copies in float32 and written over the weights in bfloat16."""
    problem.model.to(torch.bfloat16)
    problem.inputs, problem.targets = problem.inputs.bfloat16(), problem.targets.bfloat16()
    masters = [p.detach().float().requires_grad_() for p in problem.parameters]
    inner = torch.optim.AdamW(masters, lr=1e-4)

    class Masters(SGD):
        def __init__(self, params, _):
            super().__init__(params)

        @torch.no_grad()
        def step(self, closure=None):
            for p, master in zip(problem.parameters, masters, strict=True):
                master.grad = p.grad.float()
            inner.step()
            torch._foreach_copy_(problem.parameters, masters)

    optimizer = FastForward(Masters(problem.parameters, object()), problem.val_loss, **fixed(6))
    optimizer.line_search = far
    with pytest.warns(UserWarning, match="undone its jump") as said:
        problem.train(optimizer, 13)
    assert len(pulled_back(said)) == 1


def far(evaluate, last_tau):
    evaluate(300.0)
    return 300.0


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-5),
        lambda p: SGD(p, lr=1e-4, momentum=0.9),
        lambda p: torch.optim.LBFGS(p, lr=1e-3, max_iter=1),
        pytorch_optimizer.Prodigy,
    ],
)
@pytest.mark.parametrize("interval", [1, 6])
def test_ordinary_steps_after_a_jump_are_not_taken_for_that(problem, make, interval):
    optimizer = FastForward(make(problem.parameters), problem.val_loss, **fixed(interval))
    optimizer.line_search = LOWEST
    for step in range(30):
        optimizer.step(torch.enable_grad()(lambda step=step: problem.backward(step)))
    assert any(record.tau > 5 for record in optimizer.history)


def test_the_copy_is_freed_after_some_steps_and_is_no_part_of_what_is_saved(problem):
    optimizer = FastForward(
        torch.optim.AdamW(problem.parameters, lr=1e-5), problem.val_loss, 6, line_search=LOWEST
    )
    problem.train(optimizer, 6)
    assert optimizer.history[-1].tau > 50
    assert optimizer._watch._before
    for copied in (copy.deepcopy(optimizer._watch), pickle.loads(pickle.dumps(optimizer._watch))):
        assert copied._before == []
    optimizer.interval = 1000
    problem.train(optimizer, 11)
    assert optimizer._watch._before
    problem.train(optimizer, 1)
    assert optimizer._watch._before == []


def test_no_more_than_the_first_long_jumps_are_looked_at():
    watch, weights = Watch(), [[torch.zeros(3)]]
    for jump in range(7):
        watch.jumped(lambda: weights, lambda: [[torch.ones(3)]], 1000.0)
        assert bool(watch._before) is (jump < 3)
    watch = Watch()
    watch.jumped(lambda: weights, lambda: [[torch.ones(3)]], 2.0)
    assert watch._before == [], "steps alone could take it back"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64])
def test_jumps_are_looked_at_in_every_dtype(dtype):
    watch, weights = Watch(), [[torch.ones(3).to(dtype)]]
    for left, taken_back in ((1.0, False), (0.5, True)):
        watch.jumped(lambda: weights, lambda: [[torch.zeros(3).to(dtype)]], 1000.0)
        assert watch._length == pytest.approx(3**0.5, rel=1e-3)
        assert watch.step(lambda left=left: [[weights[0][0] * left]], last=True) is taken_back


def test_tensors_that_changed_meanwhile_are_no_error():
    watch = Watch()
    watch.jumped(lambda: [[torch.zeros(3)]], lambda: [[torch.ones(3)]], 1000.0)
    assert watch.step(lambda: [[torch.zeros(4)]], last=True) is False
    assert watch._before == []
