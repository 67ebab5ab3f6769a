"""Around every optimizer: a stage moves the weights and nothing else, and the run stays its own.

The optimizers are torch's and, of other packages, those whose state or step is of another kind:
matrices only, closures, quantized moments, a reference point.
"""

import copy
import itertools

import bitsandbytes
import lion_pytorch
import prodigyopt
import pytest
import torch
import transformers
from torch.utils._pytree import tree_leaves

from fastforward_optim import FastForward

from .conftest import UNCLIPPED, Regression, Untried, fixed, same, through_a_file


def matrices(params):
    return [p for p in params if p.ndim == 2]


ALL = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW, amsgrad, tensor lr": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(0.01), amsgrad=True, foreach=False
    ),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Muon": lambda p: torch.optim.Muon(matrices(p), lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "LBFGS, strong Wolfe": lambda p: torch.optim.LBFGS(
        p, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"
    ),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
    "AdamW, fused, tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), fused=True),
    "AdamW, named parameters": lambda p: torch.optim.AdamW(
        [(f"p{index}", tensor) for index, tensor in enumerate(p)], lr=0.01
    ),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "Adafactor of transformers": lambda p: transformers.Adafactor(
        p, lr=0.01, relative_step=False, scale_parameter=False
    ),
    "Lion": lambda p: lion_pytorch.Lion(p, lr=0.003, weight_decay=0.01),
    "Prodigy": lambda p: prodigyopt.Prodigy(p, weight_decay=0.01, use_bias_correction=True),
    "Prodigy, sliced": lambda p: prodigyopt.Prodigy(p, slice_p=3, safeguard_warmup=False),
    # Small tensors keep 32 bits unless told otherwise.
    "AdamW8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=0.01, min_8bit_size=1),
    "Lion8bit": lambda p: bitsandbytes.optim.Lion8bit(p, lr=0.003, min_8bit_size=1),
    "AdEMAMix8bit": lambda p: bitsandbytes.optim.AdEMAMix8bit(p, lr=0.01, min_8bit_size=1),
}
# Rprop takes its rate in its first step alone, to begin with; there is nothing to calibrate.
CALIBRATED = [name for name in ALL if name != "Rprop"]


def advance(problem, optimizer, steps, first=0):
    for step in range(first, first + steps):
        # The Adafactor of transformers calls a closure without gradients.
        optimizer.step(torch.enable_grad()(lambda step=step: problem.backward(step)))


def thrice(evaluate, last_tau):
    """Always goes two steps further."""
    evaluate(0.0)
    evaluate(2.0)
    return 2.0


def packed(tensor):
    # The state of a sliced Prodigy has strides.
    return tensor.clone(memory_format=torch.contiguous_format)


def state_of(optimizer):
    """The tensors and the other values of a state dict, without the wrapper's counters."""
    state_dict = copy.deepcopy(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        for key in [key for key in group if key.startswith("fast_forward")]:
            del group[key]
    leaves = tree_leaves(state_dict)
    tensors = [packed(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return tensors, [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]


def assert_same_state(first, second):
    assert same(first[0], second[0])
    assert first[1] == second[1]


@pytest.mark.parametrize("name", ALL)
def test_with_stages_that_find_nothing_every_step_is_the_wrapped_optimizers(name):
    plain, problem = Regression(), Regression()
    expected = ALL[name](plain.parameters)
    losses = itertools.count()  # each measurement is worse than the one before
    optimizer = FastForward(
        ALL[name](problem.parameters), Untried(lambda: next(losses)), **fixed(2)
    )
    for step in range(9):
        advance(plain, expected, 1, step)
        advance(problem, optimizer, 1, step)
        assert same(plain.weights(), problem.weights())
        assert_same_state(state_of(expected), state_of(optimizer.optimizer))
    assert [record.tau for record in optimizer.history] == [0.0] * 4
    assert all(record.passes > 1 for record in optimizer.history)


@pytest.mark.parametrize("name", ALL)
def test_a_stage_repeats_the_step_and_leaves_the_optimizers_state_alone(name):
    problem = Regression()
    base = ALL[name](problem.parameters)
    optimizer = FastForward(base, problem.val_loss, interval=1, line_search=thrice)
    seen = []
    base.register_step_post_hook(lambda *_: seen.append((problem.weights(), state_of(base))))
    for step in range(4):
        before = problem.weights()
        advance(problem, optimizer, 1, step)
        anchor, state = seen.pop()
        assert_same_state(state_of(base), state)
        for old, stepped, now in zip(before, anchor, problem.weights(), strict=True):
            torch.testing.assert_close(now, 3 * stepped - 2 * old)
    assert len(optimizer.history) == 4


@pytest.mark.parametrize("calibrate_lr", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_is_bit_identical(name, calibrate_lr):
    def make(problem):
        options = {"interval": 3, "calibrate_lr": calibrate_lr}
        return FastForward(ALL[name](problem.parameters), problem.val_loss, **options)

    first = Regression()
    optimizer = make(first)
    advance(first, optimizer, 7)
    saved = through_a_file({"model": first.model.state_dict(), "optimizer": optimizer.state_dict()})
    advance(first, optimizer, 6, first=7)
    second = Regression()
    second.model.load_state_dict(saved["model"])
    resumed = make(second)
    resumed.load_state_dict(saved["optimizer"])
    advance(second, resumed, 6, first=7)
    assert [r.trials for r in resumed.history] == [r.trials for r in optimizer.history]
    assert len(resumed.history) >= 2
    assert same(first.weights(), second.weights())
    assert_same_state(state_of(optimizer.optimizer), state_of(resumed.optimizer))


def assert_steps_at_the_scaled_rate(make, device="cpu"):
    """Each step of a calibrated run is one of a plain optimizer whose rate was set by hand."""
    problem, twin = Regression(device=device), Regression(device=device)
    base, plain = make(problem.parameters), make(twin.parameters)
    optimizer = FastForward(base, problem.val_loss, calibrate_lr=UNCLIPPED, **fixed(2))
    seen = []
    base.register_step_post_hook(lambda *_: seen.append(problem.weights()))
    rate = copy.deepcopy(base.param_groups[0]["lr"])
    scales = set()
    for step in range(12):
        twin.model.load_state_dict(problem.model.state_dict())
        plain.param_groups[0]["lr"] = rate * optimizer.lr_scale
        scales.add(optimizer.lr_scale)
        advance(twin, plain, 1, step)
        advance(problem, optimizer, 1, step)
        assert same(seen.pop(), twin.weights())
        assert base.param_groups[0]["lr"] == rate
    assert len(scales) > 2


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_calibrated_step_is_the_wrapped_optimizers_at_the_scaled_rate(name):
    assert_steps_at_the_scaled_rate(ALL[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch captures on accelerators alone")
@pytest.mark.parametrize("tensor", [False, True])
def test_a_calibrated_step_of_an_optimizer_that_can_be_captured(tensor):
    def make(params):
        lr = torch.tensor(0.01, device="cuda") if tensor else 0.01
        return torch.optim.AdamW(params, lr=lr, capturable=True)

    assert_steps_at_the_scaled_rate(make, "cuda")


def test_prodigys_estimate_stays_a_lower_bound_of_the_distance_to_the_solution():
    """On a convex problem; a jump moves the weights, not the point from which it measures."""
    torch.manual_seed(0)
    solution = torch.randn(8)
    weights = torch.nn.Parameter(torch.zeros(8))

    def loss():
        return (weights - solution).abs().mean()

    optimizer = FastForward(prodigyopt.Prodigy([weights]), loss, interval=2)
    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        assert optimizer.param_groups[0]["d"] <= solution.abs().max()
    assert max(record.tau for record in optimizer.history) > 10
    assert optimizer.history[-1].loss_after < 0.2 * solution.abs().mean()
