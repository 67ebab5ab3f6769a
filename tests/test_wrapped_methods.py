"""What the wrapped optimizer can do, the wrapper can; and it works in frameworks' wrappers."""

import copy
import pickle

import bitsandbytes
import pytest
import pytorch_optimizer
import torch
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from transformers.optimization import Adafactor, AdafactorSchedule

from fastforward_optim import FastForward

from .conftest import UNCLIPPED, Regression, fixed, flat, same, through_a_file

SGD = torch.optim.SGD


# Arguments of step.


class Scaled(SGD):
    """Its step takes what others of other packages take: more than a closure."""

    def step(self, closure=None, factor=1.0, *, shift=0.0):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(factor).add_(shift)
        super().step()
        return loss


CALLS = {
    "nothing": lambda optimizer, closure: optimizer.step(),
    "a closure": lambda optimizer, closure: optimizer.step(closure),
    "a closure by name": lambda optimizer, closure: optimizer.step(closure=closure),
    "no closure and a number": lambda optimizer, closure: optimizer.step(None, 0.5),
    "a number by name": lambda optimizer, closure: optimizer.step(factor=0.5, shift=0.1),
    "all": lambda optimizer, closure: optimizer.step(closure, 0.5, shift=0.1),
}


@pytest.mark.parametrize("calibrate_lr", [False, UNCLIPPED], ids=bool)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_step_is_given_reaches_the_wrapped_optimizer(call, calibrate_lr):
    plain, problem = Regression(), Regression()
    expected = Scaled(plain.parameters, lr=0.1)
    base = Scaled(problem.parameters, lr=0.1)
    optimizer = FastForward(base, lambda: 1.0, calibrate_lr=calibrate_lr)
    for step in range(3):
        for group in expected.param_groups:
            group["lr"] = 0.1 * optimizer.lr_scale
        plain.backward(step)
        problem.backward(step)
        returned = call(expected, lambda step=step: plain.backward(step))
        assert call(optimizer, lambda step=step: problem.backward(step)) == returned
        assert same(plain.weights(), problem.weights())


@pytest.mark.parametrize("calibrate_lr", [False, True])
def test_what_stands_in_a_closures_place_is_passed_on_as_it_is(problem, calibrate_lr):
    class Polyak(SGD):
        def step(self, loss):
            seen.append(loss)
            return super().step()

    seen = []
    optimizer = FastForward(
        Polyak(problem.parameters, lr=0.1), problem.val_loss, calibrate_lr=calibrate_lr
    )
    loss = problem.backward(0)
    seen.clear()
    optimizer.step(loss)
    assert [given is loss for given in seen] == [True]


# Attributes and methods.


def test_the_schedule_of_adafactor_finds_its_rate(problem):
    def rates(scheduled):
        problem = Regression()
        base = Adafactor(problem.parameters, lr=None, relative_step=True, warmup_init=True)
        optimizer = FastForward(base, problem.val_loss, **fixed(3))
        schedule = AdafactorSchedule(optimizer if scheduled == "wrapper" else base)
        for step in range(4):
            problem.backward(step)
            optimizer.step()
            schedule.step()
        return schedule.get_lr()

    assert rates("wrapper") == rates("wrapped")


def test_what_only_the_wrapped_optimizer_has_is_found(problem):
    base = pytorch_optimizer.LookSAM(problem.parameters, SGD, lr=0.1, k=7)
    optimizer = FastForward(base, problem.val_loss)
    assert optimizer.k == 7
    assert optimizer.init_group == base.init_group
    assert not hasattr(optimizer, "no_such_thing")
    with pytest.raises(AttributeError, match="'FastForward' object has no attribute 'no_such_th"):
        optimizer.no_such_thing  # noqa: B018


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: pytorch_optimizer.SAM(p, SGD, lr=0.1), "first_step"),
        (lambda p: pytorch_optimizer.SAM(p, SGD, lr=0.1), "second_step"),
        (lambda p: pytorch_optimizer.BSAM(p, num_data=9), "third_step"),
        (bitsandbytes.optim.AdamW8bit, "update_step"),
        (pytorch_optimizer.AdaBelief, "_step_foreach"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_method_that_would_take_a_step_past_the_wrapper_is_not(problem, make, name):
    base = make(problem.parameters)
    optimizer = FastForward(base, problem.val_loss)
    assert callable(getattr(base, name))
    assert not hasattr(optimizer, name)
    words = rf"{name} takes or undoes .* give step\(\) a closure .* optimizer\.optimizer\.{name}"
    with pytest.raises(AttributeError, match=words):
        getattr(optimizer, name)


def test_sharpness_aware_steps_with_a_closure_have_stages_and_by_hand_none(problem):
    base = pytorch_optimizer.SAM(problem.parameters, SGD, lr=0.1)
    optimizer = FastForward(base, problem.val_loss, **fixed(1))
    problem.backward(0)
    optimizer.step(lambda: problem.backward(0))
    assert len(optimizer.history) == 1
    problem.backward(1)
    optimizer.optimizer.first_step(zero_grad=True)
    problem.backward(1)
    optimizer.optimizer.second_step()
    assert len(optimizer.history) == 1


def test_a_wrapper_without_its_optimizer_yet_can_be_copied_and_pickled(problem):
    optimizer = FastForward(SGD(problem.parameters, lr=0.1), lambda: 1.0)
    optimizer.val_fn = None
    with pytest.raises(AttributeError):
        FastForward.__new__(FastForward).anything  # noqa: B018
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copied) is FastForward
        assert copied.interval == 6


# Wrappers of other packages, in ours.


@pytest.mark.parametrize(
    "make",
    [
        lambda p: pytorch_optimizer.OrthoGrad(torch.optim.AdamW(p, lr=1e-3)),
        lambda p: pytorch_optimizer.PCGrad(torch.optim.AdamW(p, lr=1e-3)),
        lambda p: pytorch_optimizer.Magma(torch.optim.AdamW(p, lr=1e-3), mask_prob=1.0),
        lambda p: pytorch_optimizer.SAM(p, torch.optim.AdamW, lr=1e-3),
        lambda p: pytorch_optimizer.LookSAM(p, torch.optim.AdamW, lr=1e-3),
    ],
    ids=["OrthoGrad", "PCGrad", "Magma", "SAM", "LookSAM"],
)
def test_a_wrapper_of_another_package_goes_on_from_its_checkpoint(make):
    def train(problem, optimizer, steps, first=0):
        for step in range(first, first + steps):
            problem.backward(step)
            optimizer.step(lambda step=step: problem.backward(step))

    problem, second = Regression(), Regression()
    optimizer = FastForward(make(problem.parameters), problem.val_loss, **fixed(3))
    train(problem, optimizer, 7)
    saved = through_a_file({"model": problem.model.state_dict(), "it": optimizer.state_dict()})
    train(problem, optimizer, 6, first=7)
    resumed = FastForward(make(second.parameters), second.val_loss, **fixed(3))
    second.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["it"])
    train(second, resumed, 6, first=7)
    assert resumed.history == optimizer.history
    assert len(resumed.history) == 4
    assert same(problem.weights(), second.weights())


def test_a_state_dict_of_a_form_of_its_own_is_checked_too(problem):
    def make():
        return FastForward(
            pytorch_optimizer.Magma(torch.optim.AdamW(problem.parameters)), problem.val_loss
        )

    optimizer = make()
    problem.train(optimizer, 2)
    saved = optimizer.state_dict()
    before = flat(make().state_dict())
    for damaged in (
        {key: value for key, value in saved.items() if key != "base"},
        torch.optim.AdamW(problem.parameters).state_dict(),
        {**saved, "base": {"state": {}}},
    ):
        other = make()
        with pytest.raises(ValueError, match=r"not a state dict of Magma|Magma cannot load"):
            other.load_state_dict(damaged)
        assert flat(other.state_dict()) == before


def test_a_wrapper_without_param_groups_is_refused(problem):
    base = pytorch_optimizer.SafeFP16Optimizer(SGD(problem.parameters, lr=0.1))
    with pytest.raises(TypeError, match="SafeFP16Optimizer lacks param_groups and state and"):
        FastForward(base, problem.val_loss)


# Wrappers of frameworks, around ours.


def in_lightning(optimizer):
    return LightningOptimizer(optimizer)


def in_fabric(optimizer):
    return Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)


IMITATIONS = [in_lightning, in_fabric]


@pytest.fixture(params=IMITATIONS)
def imitation(request):
    return request.param


def trained(**options):
    problem = Regression()
    optimizer = FastForward(
        torch.optim.AdamW(problem.parameters, lr=1e-4), problem.val_loss, **fixed(2), **options
    )
    problem.train(optimizer, 7)
    return problem, optimizer


def test_an_imitation_reads_what_the_wrapper_has_and_sets_it_there(imitation):
    _, optimizer = trained(calibrate_lr=True)
    outer = imitation(optimizer)
    assert isinstance(outer, FastForward)
    assert outer.optimizer is optimizer
    assert outer.history is optimizer.history
    assert outer.lr_scale == optimizer.lr_scale
    assert outer.param_groups is optimizer.param_groups
    assert outer.state is optimizer.state
    assert outer.defaults is optimizer.defaults
    assert repr(outer) == repr(optimizer)
    assert flat(outer.state_dict()) == flat(optimizer.state_dict())
    outer.total_steps = 50
    assert optimizer.total_steps == outer.total_steps == 50


def test_an_imitation_loads_all_and_hooks_run_once(imitation):
    _, optimizer = trained()
    other = FastForward(torch.optim.AdamW(Regression().parameters), lambda: 1.0, **fixed(2))
    calls = []
    outer = imitation(other)
    for register in ("state_dict_pre", "state_dict_post", "load_state_dict_pre"):
        hook = {"state_dict_pre": 1, "state_dict_post": 2, "load_state_dict_pre": 2}[register]
        if hook == 1:
            getattr(outer, f"register_{register}_hook")(lambda _: calls.append("saving"))
        else:
            getattr(outer, f"register_{register}_hook")(
                lambda _, state_dict, name=register: calls.append(name)
            )
    outer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    outer.load_state_dict(optimizer.state_dict())
    assert calls == ["load_state_dict_pre", "loaded"]
    assert outer.history == other.history == optimizer.history
    assert len(other.history) == 3
    calls.clear()
    saved = outer.state_dict()
    assert calls == ["saving", "state_dict_post"]
    assert flat(saved) == flat(optimizer.state_dict())
    assert saved["fast_forward"]["optimizer"] == "AdamW"


def test_an_imitation_finishes_and_gives_the_mean(imitation):
    problem, optimizer = trained(calibrate_lr=True)
    outer = imitation(optimizer)
    weights = problem.weights()
    with outer.averaged():
        assert not same(problem.weights(), weights)
    assert same(problem.weights(), weights)
    assert outer.finish() is optimizer.history[-1]
    assert optimizer.history[-1].kind == "finish"
    assert outer.finish() is None
