"""Gradients that are far larger than usual: scaled down in a calibrated run, others as they are."""

import math

import pytest
import torch

from fastforward_optim import Calibration, FastForward
from fastforward_optim.calibration import GradientSpikes

from .conftest import DEVICES, UNCLIPPED, Regression, same

FACTOR = Calibration().spike


def clipped(norms, spikes=None, device="cpu"):
    """The norms that gradients of these norms have after clipping."""
    spikes = spikes or GradientSpikes(Calibration())
    params = [torch.nn.Parameter(torch.zeros(n, device=device)) for n in (3, 1)]
    after = []
    for norm in norms:
        for p in params:
            p.grad = torch.full_like(p, norm / 2)
        spikes.clip([{"params": params[:1]}, {"params": params[1:]}])
        after.append(torch.cat([p.grad for p in params]).norm().item())
    return after


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_spike_is_scaled_down_to_what_is_usual_and_all_else_is_left_bit_for_bit(size, device):
    norms = [size * norm for norm in (1.0, 1.01, 0.99, 1.02, 100.0, 1.0, 0.5)]
    after = clipped(norms, device=device)
    assert after[4] == pytest.approx(FACTOR * size, rel=0.03)
    assert after[:4] + after[5:] == clipped(
        norms[:4] + norms[5:], GradientSpikes(UNCLIPPED), device
    )


def test_one_spike_does_not_hide_the_next():
    assert max(clipped([1.0, 1.1] * 10 + [100.0, 100.0])) < 2


def test_norms_that_vary_by_nature_are_left_alone():
    generator = torch.Generator().manual_seed(0)
    norms = torch.randn(2000, generator=generator).exp().tolist()
    after = clipped(norms)
    changed = sum(a < 0.999 * b for a, b in zip(after, norms, strict=True))
    assert changed < 0.02 * len(norms)


def test_a_level_that_rises_is_followed():
    after = clipped([1.0] * 20 + [4.0] * 60)
    assert after[-1] == 4.0


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_norm_that_says_nothing_changes_nothing(value):
    spikes = GradientSpikes(Calibration())
    assert clipped([value, 1.0, 1.0, value, 1.0], spikes)[1::3] == [1.0, 1.0]
    assert spikes.state_dict()[0] == 3


def test_only_the_dense_part_of_a_gradient_counts_and_changes():
    sparse = torch.nn.Parameter(torch.zeros(3))
    with torch.sparse.check_sparse_tensor_invariants(True):
        sparse.grad = torch.sparse_coo_tensor([[1]], [100.0], (3,))
    dense, without = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    spikes = GradientSpikes(Calibration())
    spikes.clip([{"params": [sparse, without]}])
    assert spikes.state_dict()[0] == 0
    for norm in (1.0, 1.0, 50.0):
        dense.grad = torch.tensor([norm, 0.0, 0.0])
        spikes.clip([{"params": [dense, sparse, without]}])
    assert dense.grad.norm().item() == pytest.approx(FACTOR, rel=1e-3)
    assert without.grad is None
    assert sparse.grad.to_dense().tolist() == [0.0, 100.0, 0.0]


def train(problem, steps, *, spike=None, with_closure=False, optimizer=None, begin=0):
    """Take steps ``begin`` to ``steps``; the gradient of ``spike`` is a thousand times itself."""
    optimizer = optimizer or FastForward(
        torch.optim.SGD(problem.parameters, lr=1e-2), problem.val_loss, 3, calibrate_lr=True
    )
    for step in range(begin, steps):

        def closure(step=step):
            loss = problem.backward(step)
            if step == spike:
                for p in problem.parameters:
                    p.grad *= 1000
            return loss

        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return optimizer


@pytest.mark.parametrize("with_closure", [False, True])
def test_in_a_calibrated_run_a_spike_moves_the_weights_no_further_than_other_steps(with_closure):
    problem = Regression()
    optimizer = train(problem, 40, with_closure=with_closure)
    before = problem.weights()
    train(problem, 41, begin=40, spike=40, with_closure=with_closure, optimizer=optimizer)
    spike = sum((a - b).norm() ** 2 for a, b in zip(problem.weights(), before, strict=True)).sqrt()
    before = problem.weights()
    train(problem, 42, begin=41, with_closure=with_closure, optimizer=optimizer)
    usual = sum((a - b).norm() ** 2 for a, b in zip(problem.weights(), before, strict=True)).sqrt()
    assert spike < 3 * usual


def test_a_closure_changes_no_bit():
    runs = [Regression(), Regression()]
    for problem, with_closure in zip(runs, (False, True), strict=True):
        train(problem, 40, spike=30, with_closure=with_closure)
    assert same(*(problem.weights() for problem in runs))


def test_a_run_that_goes_on_from_a_checkpoint_meets_a_spike_as_if_it_had_not_stopped():
    whole, resumed = Regression(), Regression()
    train(whole, 40, spike=30)
    state = train(resumed, 28).state_dict()
    fresh = FastForward(
        torch.optim.SGD(resumed.parameters, lr=1e-2), resumed.val_loss, 3, calibrate_lr=True
    )
    fresh.load_state_dict(state)
    train(resumed, 40, begin=28, spike=30, optimizer=fresh)
    assert same(whole.weights(), resumed.weights())


@pytest.mark.parametrize("norms", [[1.0, 0.0], [1.0, math.nan, 0.0], [-1.0, 0.0, 0.0], ["1", 0, 0]])
def test_damaged_norms_are_refused(norms):
    optimizer = train(Regression(), 5)
    state = optimizer.state_dict()
    state["fast_forward"]["gradient_norms"] = norms
    with pytest.raises(ValueError, match="gradient norms in the state dict are damaged"):
        optimizer.load_state_dict(state)
