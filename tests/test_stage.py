"""A stage moves tensors along the last step, and leaves no trace where it finds nothing."""

import contextlib
import random

import numpy as np
import pytest
import torch

from benchmarks.support.memory import live_tensor_bytes
from fastforward_optim import FastForward, RepeatSearch
from fastforward_optim.stage.stage import Stage

from .conftest import DEVICES, LOWEST, Regression, Untried, bits, fixed, same

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_tau_zero_is_the_anchor_bit_for_bit(dtype, device):
    values = torch.tensor([1.0, -0.0, torch.nan, torch.inf, -torch.inf, 3.14])
    tensors = [values.to(device, dtype)]
    stage = Stage(tensors)
    tensors[0].copy_(torch.tensor([-0.0, -0.0, 1.0, torch.nan, torch.inf, 3.15]))
    anchor = tensors[0].clone()
    stage.set_anchor()
    stage.write(7.0)
    stage.write(0.0)
    # CUDA's multi-tensor copy gives every 16-bit NaN the same bits; which NaN it is means nothing.
    restored, anchor = (x.masked_fill(x.isnan(), torch.nan) for x in (tensors[0], anchor))
    assert bits(restored) == bits(anchor)


def test_a_tensor_that_is_listed_twice_is_moved_once():
    p = torch.nn.Parameter(torch.tensor([10.0]))
    p.grad = torch.tensor([1.0])

    def twice(evaluate, last_tau):
        evaluate(0.0)
        evaluate(2.0)
        return 2.0

    optimizer = FastForward(
        torch.optim.SGD([p], lr=1.0),
        lambda: p.item(),
        interval=1,
        params=[p, p],
        line_search=twice,
    )
    optimizer.step()
    assert p.item() == 7.0


def weights_after_one_step():
    """Those of a plain run: what a stage must leave when it fails."""
    plain = Regression()
    plain.train(torch.optim.SGD(plain.parameters, lr=0.1), 1)
    return plain.weights()


def one_step(problem, val_fn, **options):
    """A step of SGD with a stage after it."""
    base = torch.optim.SGD(problem.parameters, lr=0.1)
    optimizer = FastForward(base, val_fn, interval=1, **options)
    problem.backward(0)
    optimizer.step()
    return optimizer


def nowhere(evaluate, last_tau):
    """A search that tries a lot and finds nothing."""
    for tau in (0.0, 1.0, 30.0, 0.5):
        evaluate(tau)
    return 0.0


@pytest.mark.parametrize("device", DEVICES)
def test_a_stage_that_finds_nothing_leaves_no_trace(device):
    """Not in weights, moments and random streams: the run goes on bit for bit as without it."""
    plain, wrapped = (Regression(device=device, dropout=0.3) for _ in range(2))

    def noisy_val_loss():
        # Draws random numbers from all over, as dropout or a sampled validation set would.
        torch.rand(3)
        return wrapped.val_loss() + torch.randn((), device=device)

    plain_optimizer = torch.optim.AdamW(plain.parameters, lr=0.01)
    optimizer = FastForward(
        torch.optim.AdamW(wrapped.parameters, lr=0.01),
        noisy_val_loss,
        **fixed(2),
        line_search=nowhere,
    )
    torch.manual_seed(1)
    plain.train(plain_optimizer, 11)
    states = torch.get_rng_state(), *torch.cuda.get_rng_state_all()
    torch.manual_seed(1)
    wrapped.train(optimizer, 11)
    assert len(optimizer.history) == 5
    assert same(plain.weights(), wrapped.weights())
    assert same([torch.get_rng_state(), *torch.cuda.get_rng_state_all()], list(states))
    for mine, theirs in zip(optimizer.state.values(), plain_optimizer.state.values(), strict=True):
        assert same(list(mine.values()), list(theirs.values()))
    assert all(
        same([p.grad], [q.grad]) for p, q in zip(plain.parameters, wrapped.parameters, strict=True)
    )


def test_every_trial_of_a_stage_sees_the_same_random_numbers(problem):
    seen = []

    def val_fn():
        seen.append(torch.rand(()).item())
        return 1.0

    one_step(problem, val_fn, line_search=nowhere)
    assert len(seen) == 2 + 4, "twice before the first step"
    assert len(set(seen)) == 1


@pytest.mark.parametrize("search", [RepeatSearch(), LOWEST], ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.003),
        lambda p: torch.optim.AdamW(p, lr=1e-4),
    ],
    ids=["SGD", "AdamW"],
)
def test_the_weights_end_at_the_best_point_that_was_measured(problem, search, make):
    optimizer = FastForward(
        make(problem.parameters), problem.val_loss, line_search=search, **fixed(3)
    )
    for step in range(1, 31):
        problem.backward(step)
        optimizer.step()
        if step % 3 == 0:
            record = optimizer.history[-1]
            assert record.step == step
            with torch.no_grad():
                assert problem.val_loss().item() == record.loss_after
            assert record.loss_after == min(loss for _, loss in record.trials)
            assert record.trials[0] == (0.0, record.loss_before)
            assert dict(record.trials)[record.tau] == record.loss_after
    assert len(optimizer.history) == 10
    assert sum(record.tau > 0 for record in optimizer.history) >= 3


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_exception_in_val_fn_restores_the_anchor_and_propagates(error, call):
    plain, problem = Regression(), Regression()
    calls = 0

    def val_fn():
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return -float(calls)

    base = torch.optim.AdamW(problem.parameters, lr=0.01)
    optimizer = FastForward(base, Untried(val_fn), interval=2)
    problem.train(optimizer, 1)
    problem.backward(1)
    with pytest.raises(type(error)) as caught:
        optimizer.step()
    assert caught.value is error
    assert calls == call
    plain_optimizer = torch.optim.AdamW(plain.parameters, lr=0.01)
    plain.train(plain_optimizer, 2)
    assert same(problem.weights(), plain.weights())
    assert len(optimizer.history) == 0
    # The run can go on, and the next stage comes when it is due.
    problem.train(optimizer, 2, first=2)
    assert [record.step for record in optimizer.history] == [4]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "got None of type NoneType"),
        ("0.5", "got '0.5' of type str"),
        (torch.zeros(2), r"got a tensor of shape \(2,\)"),
        (torch.zeros(1, dtype=torch.complex64), "dtype torch.complex64"),
        (1j, "of type complex"),
        (True, "got True of type bool"),
        ([0.5], "of type list"),
    ],
    ids=["None", "str", "two elements", "complex tensor", "complex", "bool", "list"],
)
def test_what_is_not_one_real_number_is_refused(problem, value, words):
    with pytest.raises(TypeError, match=f"val_fn must return .* one real number.*{words}"):
        one_step(problem, Untried(lambda: value))
    assert same(problem.weights(), weights_after_one_step())


@pytest.mark.parametrize(
    "convert",
    [float, torch.tensor, np.float32, np.float64, lambda x: torch.tensor([[x]]), int],
    ids=["float", "0-dim tensor", "np.float32", "np.float64", "1-element tensor", "int"],
)
@pytest.mark.filterwarnings("ignore:val_fn returns 3 at all weights")
def test_any_real_number_will_do(problem, convert):
    optimizer = one_step(problem, lambda: convert(3))
    assert optimizer.history[0].loss_before == 3.0


def test_a_search_that_swallows_the_error_does_not_keep_the_changed_weights(problem):
    def val_fn():
        problem.parameters[0].add_(1.0)
        return 1.0

    def careless(evaluate, last_tau):
        with contextlib.suppress(RuntimeError):
            evaluate(0.0)
        return 0.0

    one_step(problem, Untried(val_fn), line_search=careless)
    assert same(problem.weights(), weights_after_one_step())


@pytest.mark.parametrize(
    ("search", "words"),
    [
        (lambda evaluate, last: None, "returned tau = None, which it did not evaluate"),
        (lambda evaluate, last: 2.0, "returned tau = 2.0, which it did not evaluate"),
        (lambda evaluate, last: evaluate(-1.0), "asked for tau = -1.0"),
        (lambda evaluate, last: evaluate(float("nan")), "asked for tau = nan"),
    ],
)
def test_a_line_search_of_ones_own_is_held_to_the_contract(problem, search, words):
    with pytest.raises(RuntimeError, match=words):
        one_step(problem, lambda: 1.0, line_search=search)
    assert same(problem.weights(), weights_after_one_step())


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stage_holds_two_copies_and_leaves_none(dtype):
    weights = [torch.randn(400, 300, dtype=dtype, requires_grad=True) for _ in range(3)]
    size = sum(p.numel() * p.element_size() for p in weights)
    held = []

    def val_fn():
        held.append(live_tensor_bytes())
        return random.Random(len(held)).random()

    optimizer = FastForward(torch.optim.AdamW(weights), Untried(val_fn), interval=1)
    for p in weights:
        p.grad = torch.randn_like(p)
    optimizer.optimizer.step()
    before = live_tensor_bytes()
    optimizer.step()
    assert len(held) >= 2
    random_state = torch.get_rng_state().numel()
    assert max(held) - before <= 2 * size + random_state
    assert live_tensor_bytes() == before


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("calibrate_lr", [False, True])
def test_on_stage_finds_the_stages_copies_freed(calibrate_lr):
    weights = [torch.nn.Parameter(torch.randn(60, 50)) for _ in range(3)]
    held = []

    def val_fn():
        return sum(float(p.detach().square().sum()) for p in weights)

    optimizer = FastForward(
        torch.optim.SGD(weights, lr=0.01),
        val_fn,
        interval=2,
        calibrate_lr=calibrate_lr,
        on_stage=lambda stage: held.append(live_tensor_bytes()),
    )
    for p in weights:
        p.grad = torch.randn_like(p)
    optimizer.step()
    between = live_tensor_bytes()
    optimizer.step()
    assert held == [between]


def test_a_step_without_a_stage_copies_nothing(problem, monkeypatch):
    def refuse(self, tensors):
        raise AssertionError("copied")

    monkeypatch.setattr(Stage, "__init__", refuse)
    optimizer = FastForward(torch.optim.AdamW(problem.parameters), problem.val_loss, interval=100)
    problem.train(optimizer, 20)


def test_inside_an_autocast_region_the_trials_see_the_candidates():
    """Autocast caches 16-bit copies of the weights, which a candidate must not hit."""
    problem = Regression()
    optimizer = FastForward(
        torch.optim.SGD(problem.parameters, lr=0.1),
        problem.val_loss,
        interval=1,
        line_search=nowhere,
    )
    with torch.autocast("cpu", torch.bfloat16):
        problem.backward(0)
        with torch.no_grad():
            problem.val_loss()
        optimizer.step()
    losses = [loss for _, loss in optimizer.history[0].trials]
    assert len(set(losses)) == 4
