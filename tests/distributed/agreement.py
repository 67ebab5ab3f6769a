"""Checks, run on each rank: all take the same decision, whatever their validation losses are."""

import hashlib
import math
import random
import time
from itertools import count

import pytest
import torch
import torch.distributed as dist

from fastforward_optim import BracketSearch, FastForward, RepeatSearch, ValidationFunction
from fastforward_optim.ranks import RankError, Ranks
from fastforward_optim.search.evidence import Measurement, Rows
from fastforward_optim.validation.base import adapted
from tests.conftest import Regression, Untried, bits, fixed, same
from tests.distributed.launch import DEVICE

EXCEPTIONS = ["val_fn returns .* at all weights"]  # each rank has one number


def assert_same_on_all_ranks(tensors):
    digest = hashlib.blake2b(b"".join(bits(tensor) for tensor in tensors), digest_size=8).digest()
    mine = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(DEVICE)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    assert all(other == gathered[0] for other in gathered)


def step(problem, optimizer, number):
    """What data parallelism makes of a step: the same gradient on every rank."""
    problem.backward(number)
    optimizer.step()


def adversary(problem, rank):
    """A validation loss that does its worst, with other numbers on every rank."""
    draw = random.Random(rank)

    def val_fn():
        loss = problem.val_loss().item()
        kind = draw.random()
        if kind < 0.5:  # the last bit
            return math.nextafter(loss, math.inf if draw.random() < 0.5 else -math.inf)
        if kind < 0.6:
            return loss * draw.uniform(0.5, 2)
        if kind < 0.65:
            return draw.choice([math.nan, math.inf, -math.inf])
        if kind < 0.7:
            time.sleep(0.005 * draw.random())
        return loss, draw.choice([0.0, 1.0, 3.0, 1e12])

    return val_fn


def adversarial_run(rank, size, **options):
    problem = Regression(device=DEVICE)
    inner = torch.optim.AdamW(problem.parameters, lr=1e-3)
    optimizer = FastForward(inner, Untried(adversary(problem, rank)), **fixed(2) | options)
    for number in range(80):
        try:
            step(problem, optimizer, number)
        except RankError as error:  # on all ranks, and from a draw of zeros only
            assert "all weights are zero" in str(error)  # noqa: PT017
        assert_same_on_all_ranks(problem.parameters)
    everything = [None] * size
    dist.all_gather_object(everything, [(r.step, r.trials, r.tau) for r in optimizer.history])
    assert all(repr(other) == repr(everything[0]) for other in everything)
    adapts = options.get("max_interval", 2) > 2
    assert len(optimizer.history) > (3 if adapts or "calibrate_lr" in options else 20)
    assert any(record.tau for record in optimizer.history)


def check_ranks_never_part(rank, size):
    """Whatever the search, whatever the interval, and where the rate is calibrated."""
    adversarial_run(rank, size, line_search=BracketSearch(standard_errors=0))
    adversarial_run(rank, size, line_search=RepeatSearch(max_tau=15), max_interval=8)
    adversarial_run(rank, size, calibrate_lr=True, max_interval=8)


def recording(problem, val_fn, **options):
    """An optimizer of one real step, and the weights that it led to."""
    inner = torch.optim.SGD(problem.parameters, lr=0.01)
    optimizer = FastForward(inner, Untried(val_fn), **fixed(1) | options)
    after = []
    inner.register_step_post_hook(lambda *_: after.append(problem.weights()))
    return optimizer, after


def check_the_loss_is_the_mean_over_the_ranks_by_their_weights(rank, size):
    problem = Regression(device=DEVICE)
    optimizer, _ = recording(problem, lambda: (rank + 1.0, rank))
    step(problem, optimizer, 0)
    expected = sum((other + 1) * other for other in range(size)) / sum(range(size))
    assert {loss for _, loss in optimizer.history[0].trials} == {expected}
    optimizer, _ = recording(problem, lambda: torch.tensor(rank + 1.0))
    step(problem, optimizer, 0)
    assert optimizer.history[0].loss_before == (size + 1) / 2


class RowLosses(ValidationFunction):
    """Rows whose losses at each trial are known; each rank has some of them."""

    def __init__(self, rows):
        self.trials = iter(range(100))
        self.rows = rows

    def __call__(self):
        return self.measure()[0]

    def measure(self):
        trial = next(self.trials)
        sums = tuple(3.0 * w - trial * (0.02 * w + 0.01 * math.sin(row)) for row, w in self.rows)
        weights = tuple(float(w) for _, w in self.rows)
        return Measurement(sum(sums) / sum(weights), sum(weights), Rows(sums, weights))


def check_the_error_over_all_ranks_is_that_of_one_process_with_all_rows(rank, size):
    rows = [(row, 1 + row % 3) for row in range(3 * size)]
    several, alone = Ranks(None, 1), Ranks(False, 1)
    mine, all_of_them = RowLosses(rows[rank::size]), RowLosses(rows)
    for trial in range(3):
        found, expected = several.measure(mine), alone.measure(all_of_them)
        assert found == pytest.approx(expected, rel=1e-12)
        assert found.error == pytest.approx(expected.error, rel=1e-9, abs=1e-15)
        assert (expected.error > 0) == (trial > 0)


def check_a_rank_that_knows_no_error_leaves_it_unknown_for_all(rank, size):
    ranks, rows = Ranks(None, 1), RowLosses([(1, 2), (2, 2)])
    val_fn = (lambda: 3.0) if rank == 0 else rows
    assert [ranks.measure(adapted(val_fn)).error for _ in range(2)] == [None, None]


def check_what_is_clear_only_over_all_ranks_is_taken(rank, size):
    """One row a rank: by itself none has an error, together they are as many draws."""
    problem = Regression(device=DEVICE)
    search = BracketSearch(max_trials=2)
    for spread, taken in ((1e-4, 1.0), (10.0, 0.0)):
        trials = iter(range(2))

        class ValFn:
            def __call__(self):
                return 0.0

            def measure(self, trials=trials, spread=spread):
                loss = 3.0 - next(trials) * (0.05 + spread * (-1) ** rank)
                return Measurement(loss, 1.0, Rows((loss,), (1.0,)))

        optimizer, _ = recording(problem, ValFn(), line_search=search)
        step(problem, optimizer, 0)
        [record] = optimizer.history
        assert (record.tau, record.error > 0) == (taken, True)


def check_nan_on_one_rank_is_nan_for_all(rank, size):
    problem = Regression(device=DEVICE)
    optimizer, after = recording(problem, lambda: math.nan if rank == 1 else 1.0)
    step(problem, optimizer, 0)
    assert optimizer.history[0].tau == 0
    assert all(math.isnan(loss) for _, loss in optimizer.history[0].trials)
    assert same(problem.weights(), after[0])


def check_a_rank_that_raises_ends_the_stage_of_all_and_is_named(rank, size):
    problem = Regression(device=DEVICE)
    calls = []

    def val_fn():
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            raise LookupError("no such batch")
        return problem.val_loss()

    optimizer, after = recording(problem, val_fn, line_search=RepeatSearch())
    start = time.perf_counter()
    words = "no such batch" if rank == 1 else "rank 1 raised LookupError: no such batch"
    with pytest.raises(LookupError if rank == 1 else RankError, match=words):
        step(problem, optimizer, 0)
    assert time.perf_counter() - start < 10, "nobody waits for the process group's timeout"
    assert same(problem.weights(), after[0])
    assert not optimizer.history
    step(problem, optimizer, 1)  # and the run can go on
    assert_same_on_all_ranks(problem.parameters)
    assert len(optimizer.history) == 1


def check_what_is_raised_in_new_stage_or_in_the_search_is_told_too(rank, size):
    problem = Regression(device=DEVICE)

    class ValFn:
        def new_stage(self):
            if rank == size - 1:
                raise LookupError("no more batches")

        def __call__(self):
            return problem.val_loss()

    optimizer, after = recording(problem, ValFn())
    words = "no more" if rank == size - 1 else f"rank {size - 1} raised LookupError: no more"
    with pytest.raises((LookupError, RankError), match=words):
        step(problem, optimizer, 0)
    assert same(problem.weights(), after[0])

    def search(evaluate, last_tau):
        evaluate(0.0)
        evaluate(1.0)
        return 1.0 / (0 if rank == 0 else 1)

    optimizer, after = recording(problem, problem.val_loss, line_search=search)
    words = "division by zero" if rank == 0 else "rank 0 raised ZeroDivisionError: float division"
    with pytest.raises((ZeroDivisionError, RankError), match=words):
        step(problem, optimizer, 0)
    assert same(problem.weights(), after[0])
    assert_same_on_all_ranks(problem.parameters)


def check_a_rank_whose_val_fn_changes_the_weights_is_named(rank, size):
    problem = Regression(device=DEVICE)

    def val_fn():
        if rank == 1:
            with torch.no_grad():
                problem.parameters[0].add_(1)
        return problem.val_loss()

    optimizer, after = recording(problem, val_fn)
    with pytest.raises(RuntimeError, match="val_fn changed 1 of the 4 parameters"):
        step(problem, optimizer, 0)
    assert same(problem.weights(), after[0])


def check_searches_that_differ_are_noticed(rank, size):
    problem = Regression(device=DEVICE)

    def search(evaluate, last_tau):
        start, other = evaluate(0.0), evaluate(1.0 + (rank == 1))
        return 0.0 if start < other else 1.0 + (rank == 1)

    optimizer, after = recording(problem, problem.val_loss, line_search=search)
    with pytest.raises(RankError, match=r"different candidates \(tau at rank 0: 1, rank 1: 2"):
        step(problem, optimizer, 0)
    assert same(problem.weights(), after[0])

    def result(evaluate, last_tau):
        evaluate(0.0), evaluate(1.0)
        return float(rank == 1)

    optimizer, after = recording(problem, problem.val_loss, line_search=result)
    with pytest.raises(RankError, match=r"line_search returned different taus: \[0.0, 1.0"):
        step(problem, optimizer, 0)
    assert same(problem.weights(), after[0])


def check_numbers_of_trials_that_differ_are_noticed(rank, size):
    problem = Regression(device=DEVICE)
    search = RepeatSearch(max_trials=3 if rank else 4)
    calls = count()
    optimizer, after = recording(problem, lambda: -next(calls), line_search=search)
    words = "not at the same point of a stage: rank 0 at TRIAL after step 1, rank 1 at END"
    with pytest.raises(RankError, match=words):
        step(problem, optimizer, 0)
    assert same(problem.weights(), after[-1])


def check_stages_after_different_steps_are_noticed(rank, size):
    problem = Regression(device=DEVICE)
    inner = torch.optim.SGD(problem.parameters, lr=0.01)
    optimizer = FastForward(inner, problem.val_loss, **fixed(2 + (rank == 1)))
    step(problem, optimizer, 0)
    words = r"rank 0 at BEGIN after step 2, rank 1 at BEGIN after step 3"
    with pytest.raises(RankError, match=words):
        [step(problem, optimizer, number) for number in (1, 2)]


def check_without_a_group_every_rank_is_alone(rank, size):
    problem = Regression(device=DEVICE)
    inner = torch.optim.SGD(problem.parameters, lr=0.01)
    optimizer = FastForward(inner, lambda: float(rank), interval=1, process_group=False)
    step(problem, optimizer, rank)
    assert optimizer.history[0].loss_before == rank


def check_a_group_of_some_ranks_decides_among_them(rank, size):
    problem = Regression(device=DEVICE)
    pairs = [dist.new_group([first, first + 1]) for first in range(0, size, 2)]
    inner = torch.optim.SGD(problem.parameters, lr=0.01)
    optimizer = FastForward(inner, lambda: float(rank), interval=1, process_group=pairs[rank // 2])
    step(problem, optimizer, 0)
    assert optimizer.history[0].loss_before == rank // 2 * 2 + 0.5


def check_a_stage_waits_until_a_step_moves_something_on_any_rank(rank, size):
    """As with sharded tensors, of which a rank may hold nothing."""
    problem = Regression(device=DEVICE)
    inner = torch.optim.SGD(problem.parameters, lr=0.01 if rank == 0 else 0.0)
    optimizer = FastForward(inner, problem.val_loss, **fixed(1))
    step(problem, optimizer, 0)
    assert len(optimizer.history) == 1
    for group in inner.param_groups:
        group["lr"] = 0.0
    step(problem, optimizer, 0)
    assert len(optimizer.history) == 1


def check_a_stage_meets_at_its_begin_at_each_trial_and_at_its_end(rank, size):
    problem = Regression(device=DEVICE)
    optimizer, _ = recording(problem, problem.val_loss)
    real, sent, received = dist.all_gather, [], []

    def all_gather(gathered, values, group=None):
        sent.append(values.nbytes)
        received.append(sum(other.nbytes for other in gathered))
        return real(gathered, values, group=group)

    dist.all_gather = all_gather
    try:
        step(problem, optimizer, 0)
    finally:
        dist.all_gather = real
    assert len(sent) == 1 + optimizer.history[0].passes + 2, "one before the first step"
    assert set(sent) == {88}, "eleven float64 numbers"
    assert set(received) == {88 * size}
