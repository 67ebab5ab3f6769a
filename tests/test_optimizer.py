"""FastForward is a torch optimizer wherever torch looks."""

import copy
import logging
import math
import pickle

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastforward_optim import BracketSearch, FastForward, RepeatSearch
from fastforward_optim.search.evidence import Measurement, Rows

from .conftest import Regression, Untried, fixed, same


def stay(evaluate, last_tau):
    """A search that tries something and stays."""
    evaluate(0.0)
    evaluate(2.0)
    return 0.0


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01)


def wrapped(problem, make=adamw, **options):
    options = {**fixed(options.pop("interval", 3)), "line_search": stay, **options}
    return FastForward(make(problem.parameters), problem.val_loss, **options)


def test_groups_state_and_defaults_are_the_wrapped_optimizers_own(problem):
    base = torch.optim.AdamW(problem.parameters, lr=0.01)
    groups, defaults = base.param_groups, base.defaults
    optimizer = FastForward(base, problem.val_loss)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.optimizer is base
    assert optimizer.param_groups is base.param_groups is groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults is defaults
    problem.train(optimizer, 1)
    assert len(optimizer.state) == 4
    optimizer.param_groups[0]["lr"] = 0.5
    assert base.param_groups[0]["lr"] == 0.5
    replacement = [dict(base.param_groups[0])]
    optimizer.param_groups = replacement
    assert base.param_groups is replacement
    state = optimizer.state
    optimizer.state = type(state)(dict)
    assert not base.state
    optimizer.defaults = {"lr": 1.0}
    assert base.defaults == {"lr": 1.0}


def test_stages_come_every_interval_after_the_warmup(problem):
    optimizer = wrapped(problem, interval=4, warmup=3)
    problem.train(optimizer, 16)
    assert [record.step for record in optimizer.history] == [7, 11, 15]


@pytest.mark.parametrize(
    ("found", "steps"),
    [
        ("", [3, 9, 21, 45, 93, 189]),  # after 3, 6, 12, ... steps: without limit
        ("y" * 9, list(range(3, 28, 3))),
        ("nnyynyn", [3, 9, 21, 27, 30, 36, 39]),  # 3, 6, 12, 6, 3, 6, 3
    ],
)
def test_the_interval_doubles_after_a_stage_that_found_nothing_and_halves_after_one_that_did(
    problem, found, steps
):
    answers = iter(found)

    def search(evaluate, last_tau):
        evaluate(0.0), evaluate(1e-6)
        return 1e-6 if next(answers, "n") == "y" else 0.0

    optimizer = wrapped(problem, interval=3, max_interval=None, line_search=search)
    problem.train(optimizer, steps[-1])
    assert [record.step for record in optimizer.history] == steps


def test_max_interval_is_the_most_and_equal_to_the_interval_the_papers_fixed_interval(problem):
    optimizer = wrapped(problem, interval=3, max_interval=8)
    problem.train(optimizer, 26)
    assert [record.step for record in optimizer.history] == [3, 9, 17, 25]
    other = Regression()
    fixed_one = wrapped(other, interval=3, max_interval=3)
    other.train(fixed_one, 13)
    assert [record.step for record in fixed_one.history] == [3, 6, 9, 12]


def test_total_steps_can_be_set_before_the_first_step_and_is_checked(problem):
    optimizer = wrapped(problem)
    assert optimizer.total_steps is None
    optimizer.total_steps = 40
    assert optimizer.total_steps == 40
    with pytest.raises(ValueError, match="total_steps must be at least 1"):
        optimizer.total_steps = 0
    optimizer.total_steps = None
    assert "total_steps" not in repr(optimizer)


def test_without_calibration_there_is_no_mean_of_the_iterates_and_nothing_to_finish(problem):
    optimizer = wrapped(problem)
    problem.train(optimizer, 4)
    before = problem.weights()
    assert optimizer.finish() is None
    words = r"calibrate_lr=True only.*AveragedModel"
    with pytest.raises(RuntimeError, match=words), optimizer.averaged():
        pass
    assert same(problem.weights(), before)


def rows_of(problem, spread):
    """A val_fn whose rows agree on where the loss falls, but for ``spread``."""

    class ValFn:
        def __call__(self):
            return self.measure().loss

        def measure(self):
            loss = float(problem.val_loss())
            moved = float(
                sum((p - q).sum() for p, q in zip(problem.parameters, start, strict=True))
            )
            sums = (loss + spread * moved, loss - spread * moved)
            return Measurement(loss, 2.0, Rows(sums, (1.0, 1.0)))

    start = problem.weights()
    return ValFn()


@pytest.mark.parametrize(("spread", "taken"), [(0.0, True), (1e3, False)])
def test_a_stage_moves_the_weights_only_where_the_rows_agree(spread, taken):
    problem = Regression()
    optimizer = FastForward(
        torch.optim.SGD(problem.parameters, lr=0.003), rows_of(problem, spread), interval=1
    )
    anchors = []
    optimizer.optimizer.register_step_post_hook(lambda *_: anchors.append(problem.weights()))
    problem.train(optimizer, 1)
    [record] = optimizer.history
    assert (record.tau > 0) == taken
    assert same(problem.weights(), anchors[0]) != taken
    assert min(loss for _, loss in record.trials) < record.loss_before
    assert record.decision == ("taken" if taken else "lower, but not clearly")
    assert record.error >= 0


@pytest.mark.parametrize(
    ("losses", "decision", "tau"),
    [
        ((1.0, 0.9, 1.1), "taken", 1.0),
        ((1.0, 0.9995, 1.1), "lower, but not clearly", 0.0),
        ((1.0, 1.1, 1.2), "not lower", 0.0),
        ((math.nan, math.nan, math.nan), "not lower", 0.0),
        ((math.nan, 2.0, 3.0), "taken", 1.0),
    ],
)
def test_the_record_says_in_words_what_was_made_of_a_stage(problem, losses, decision, tau):
    values = iter(losses)
    optimizer = FastForward(
        torch.optim.SGD(problem.parameters, lr=0.01),
        Untried(lambda: next(values)),
        interval=1,
        line_search=BracketSearch(max_trials=3),
    )
    problem.train(optimizer, 1)
    [record] = optimizer.history
    assert (record.kind, record.decision, record.tau) == ("stage", decision, tau)
    assert record.error is None, "val_fn gives one number"


def test_a_rate_that_rises_without_a_warm_up_announced_is_remarked_on_once(caplog):
    def train(rates, **options):
        caplog.clear()
        problem = Regression()
        optimizer = wrapped(problem, interval=50, **options)
        for step, rate in enumerate(rates):
            optimizer.param_groups[0]["lr"] = rate
            problem.train(optimizer, 1, first=step)
        return [record.message for record in caplog.records]

    [message] = train([0.001 * step for step in range(1, 9)])
    assert "the learning rate rises from step to step: pass warmup=" in message
    assert len(train([1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0])) == 1
    assert not train([0.001 * step for step in range(1, 9)], warmup=8)
    assert not train([0.001, 0.002, 0.003] * 3), "not three times in a row"
    assert not train([0.01 / step for step in range(1, 9)])
    assert not train([0.01] * 9)


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr("fastforward_optim.optimizer.time", clock)
    monkeypatch.setattr("fastforward_optim.diagnostics.notices.time", clock)
    return clock


def costly_run(clock, steps, step_seconds, stage_seconds, first=0, problem=None, optimizer=None):
    """A run of which the clock knows what steps and stages take."""
    problem = problem or Regression()

    def val_fn():
        clock.now += stage_seconds / 2
        return problem.val_loss()

    optimizer = optimizer or wrapped(problem, interval=10)
    optimizer.val_fn = val_fn
    for step in range(first, first + steps):
        clock.now += step_seconds
        problem.train(optimizer, 1, first=step)
    return optimizer


@pytest.mark.parametrize(("stage_seconds", "remarks"), [(1.0, 0), (1.5, 1)])
def test_stages_that_take_more_than_a_tenth_of_the_time_are_remarked_on_once(
    clock, caplog, stage_seconds, remarks
):
    costly_run(clock, 100, 1.0, stage_seconds)
    assert not caplog.records, "too early to say"
    caplog.clear()
    costly_run(clock, 300, 1.0, stage_seconds)
    assert len(caplog.records) == remarks
    if remarks:
        assert "stages have taken 13 % of the time so far: measure fewer examples" in caplog.text


def test_after_a_checkpoint_or_in_a_copy_the_time_is_counted_anew(clock, caplog):
    optimizer = costly_run(clock, 95, 1.0, 0.5)
    problem, copied = Regression(), Regression()
    resumed = wrapped(problem, interval=10)
    resumed.load_state_dict(optimizer.state_dict())
    copied.model, copy_of_it = copy.deepcopy((problem.model, wrapped(problem, interval=10)))
    for owner, other in ((problem, resumed), (copied, copy_of_it)):
        clock.now += 1e-3
        costly_run(clock, 20, 1e-3, 9.0, optimizer=other, problem=owner)
    assert not caplog.records


def test_interval_line_search_and_callbacks_can_be_changed_in_mid_run(problem):
    records = []
    optimizer = wrapped(problem, interval=4)
    problem.train(optimizer, 4)
    optimizer.interval = optimizer.max_interval = 2
    optimizer.line_search = RepeatSearch(max_tau=3)
    optimizer.on_stage = records.append
    problem.train(optimizer, 4, first=4)
    assert [record.step for record in optimizer.history] == [4, 6, 8]
    assert records == list(optimizer.history[1:])


def test_the_next_search_starts_from_the_last_tau(problem):
    starts = []

    def search(evaluate, last_tau):
        starts.append(last_tau)
        for tau in (0.0, 5.0):
            evaluate(tau)
        return 5.0

    problem.train(wrapped(problem, line_search=search), 9)
    assert starts == [0.0, 5.0, 5.0]


def test_only_tensors_that_require_a_gradient_now_are_moved():
    problem = Regression()
    first, *rest = problem.parameters

    def search(evaluate, last_tau):
        evaluate(0.0)
        evaluate(10.0)
        return 10.0

    optimizer = wrapped(problem, lambda p: torch.optim.SGD(p, lr=0.01), line_search=search)
    first.requires_grad_(False)
    before = first.detach().clone()
    problem.train(optimizer, 3)
    assert torch.equal(first, before)
    first.requires_grad_(True)
    optimizer.interval = optimizer.max_interval = 1
    problem.backward(3)
    gradient, before = first.grad.clone(), first.detach().clone()
    optimizer.step()
    torch.testing.assert_close(first.detach(), before - 11 * 0.01 * gradient)
    for p in rest:
        p.requires_grad_(False)
    first.requires_grad_(False)
    stages = len(optimizer.history)
    optimizer.step()
    assert len(optimizer.history) == stages, "nothing to move: no stage"


def test_a_step_that_changes_nothing_puts_the_stage_off(problem):
    """A rate of zero, or a wrapper that only accumulates: there is no direction to search along."""
    optimizer = wrapped(problem, lambda p: torch.optim.SGD(p, lr=0.0), interval=2)
    optimizer.line_search = BracketSearch()
    problem.train(optimizer, 3)
    assert len(optimizer.history) == 0
    optimizer.param_groups[0]["lr"] = 0.001
    problem.train(optimizer, 3, first=3)
    assert [record.step for record in optimizer.history] == [4, 6]


def test_params_restricts_what_a_stage_moves():
    problem = Regression()
    chosen = problem.parameters[2:]

    def search(evaluate, last_tau):
        evaluate(0.0)
        evaluate(4.0)
        return 4.0

    optimizer = FastForward(
        torch.optim.SGD(problem.parameters, lr=0.01),
        problem.val_loss,
        interval=1,
        params=iter(chosen),
        line_search=search,
    )
    problem.backward(0)
    before = problem.weights()
    optimizer.step()
    for p, old, factor in zip(problem.parameters, before, (1, 1, 5, 5), strict=True):
        torch.testing.assert_close(p.detach(), old - factor * 0.01 * p.grad)


def test_a_param_group_can_be_added_in_mid_run():
    problem = Regression()
    optimizer = FastForward(
        torch.optim.SGD(problem.parameters[:2], lr=0.01), problem.val_loss, **fixed(2)
    )
    problem.train(optimizer, 3)
    optimizer.add_param_group({"params": problem.parameters[2:], "lr": 0.02})
    before = problem.weights()
    problem.train(optimizer, 1, first=3)
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == [0.01, 0.02]
    assert not any(map(torch.equal, before, problem.weights()))
    assert [record.step for record in optimizer.history] == [2, 4]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(problem, set_to_none):
    optimizer = wrapped(problem)
    problem.backward(0)
    optimizer.zero_grad(set_to_none)
    for p in problem.parameters:
        assert p.grad is None if set_to_none else not p.grad.any()


def test_step_hooks_run_around_the_step_and_its_stage(problem):
    events = []
    base = torch.optim.SGD(problem.parameters, lr=0.01)
    optimizer = FastForward(
        base,
        Untried(lambda: events.append("val_fn") or 1.0),
        **fixed(1),
        line_search=lambda evaluate, last: evaluate(0.0) * 0,
    )

    def on(word, owner):
        return lambda optimizer, args, kwargs: events.append((word, optimizer is owner))

    handles = [
        optimizer.register_step_pre_hook(on("outer pre", optimizer)),
        optimizer.register_step_post_hook(on("outer post", optimizer)),
        base.register_step_pre_hook(on("inner pre", base)),
        base.register_step_post_hook(on("inner post", base)),
    ]
    problem.backward(0)
    optimizer.step()
    assert events == [
        ("outer pre", True),
        ("inner pre", True),
        ("inner post", True),
        "val_fn",
        ("outer post", True),
    ]
    for handle in handles:
        handle.remove()
    events.clear()
    optimizer.step()
    assert events == ["val_fn"]


def test_grad_scaler_unscales_the_gradients_and_skipped_steps_do_not_count():
    """With a fused optimizer too, which would otherwise be left to unscale by itself."""
    results = []
    for wrap in (False, True):
        problem = Regression()
        optimizer = torch.optim.AdamW(problem.parameters, lr=0.01, fused=True)
        if wrap:
            optimizer = FastForward(optimizer, problem.val_loss, line_search=stay, **fixed(2))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for step in range(6):
            optimizer.zero_grad()
            loss = problem.loss(slice(step, step + 16))
            if step == 2:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(problem.weights())
        if wrap:
            assert [record.step for record in optimizer.history] == [2, 4]
            assert optimizer.param_groups[0]["fast_forward_step"] == 5
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_deepcopy_of_model_and_optimizer_together_goes_on_alike():
    problem = Regression()
    optimizer = wrapped(problem, line_search=BracketSearch())
    lr_scheduler.StepLR(optimizer, 100)  # patches step with a closure on this instance
    problem.train(optimizer, 4)
    twin, copied = copy.deepcopy((problem, optimizer))
    assert copied.param_groups[0]["params"][0] is twin.parameters[0]
    assert copied.param_groups is copied.optimizer.param_groups
    assert copied.optimizer is not optimizer.optimizer
    problem.train(optimizer, 8, first=4)
    twin.train(copied, 8, first=4)
    assert same(problem.weights(), twin.weights())
    assert [r.trials for r in copied.history] == [r.trials for r in optimizer.history]


def test_pickling_keeps_everything():
    problem = Regression()
    optimizer = wrapped(problem, line_search=BracketSearch(), params=problem.parameters[:3])
    problem.train(optimizer, 4)
    twin, copied = pickle.loads(pickle.dumps((problem, optimizer)))
    problem.train(optimizer, 8, first=4)
    twin.train(copied, 8, first=4)
    assert same(problem.weights(), twin.weights())
    assert len(copied.history) == len(optimizer.history) == 4
    copied.register_step_post_hook(lambda *_: None)
    lr_scheduler.StepLR(copied, 3)


def test_logging_is_quiet_unless_asked_and_prints_nothing(problem, caplog, capsys):
    with caplog.at_level(logging.INFO):
        problem.train(wrapped(problem), 3)
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, logger="fastforward_optim"):
        problem.train(wrapped(problem), 3)
    assert "stage after step 3" in caplog.text
    assert capsys.readouterr() == ("", "")


def test_a_validation_loss_that_is_not_finite_is_warned_of(problem, caplog):
    optimizer = FastForward(
        torch.optim.SGD(problem.parameters, lr=0.1), lambda: float("nan"), interval=2
    )
    problem.train(optimizer, 2)
    assert "validation loss after step 2 is nan" in caplog.text
    assert optimizer.history[0].tau == 0


class Noted(FastForward):
    """A subclass with an attribute of its own."""

    note = None


def test_a_subclass_keeps_its_attributes_when_copied(problem):
    optimizer = Noted(torch.optim.SGD(problem.parameters, lr=0.1), problem.val_loss)
    optimizer.note = "mine"
    assert copy.deepcopy(optimizer).note == "mine"


def test_global_step_hooks_still_see_the_wrapped_optimizer(problem):
    seen = []
    handle = register_optimizer_step_post_hook(
        lambda optimizer, args, kwargs: seen.append(type(optimizer).__name__)
    )
    try:
        problem.train(wrapped(problem), 1)
    finally:
        handle.remove()
    assert seen == ["AdamW", "FastForward"]
