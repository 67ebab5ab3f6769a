"""Loops as people write them: accumulation, clipping, mixed precision, compiling, freezing."""

import runpy
from itertools import compress
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from fastforward_optim import FastForward, ValidationLoss

from .conftest import UNCLIPPED, Regression, same


def accumulate_and_clip(problem, optimizer, step):
    optimizer.zero_grad()
    for part in range(4):
        start = (step * 16 + part * 4) % 64
        (problem.loss(slice(start, start + 4)) / 4).backward()
    torch.nn.utils.clip_grad_norm_(problem.parameters, 0.1)
    optimizer.step()


def autocast(problem, optimizer, step):
    with torch.autocast("cpu", torch.bfloat16):
        problem.backward(step)
    optimizer.step()


def autocast_and_scale(problem, optimizer, step):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    problem.model.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = problem.loss(slice(0, 16))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(problem.parameters, 0.1)
    scaler.step(optimizer)
    scaler.update()


def closure(problem, optimizer, step):
    optimizer.step(lambda: problem.backward(step))


LOOPS = [accumulate_and_clip, autocast, autocast_and_scale, closure]


def two_groups(problem):
    first, second = problem.parameters[:2], problem.parameters[2:]
    return torch.optim.AdamW([{"params": first, "lr": 1e-3}, {"params": second, "lr": 3e-4}])


@pytest.mark.parametrize("calibrate_lr", [False, True])
@pytest.mark.parametrize("loop", LOOPS)
def test_stages_come_after_real_steps_and_leave_what_they_measured(loop, calibrate_lr):
    problem, left = Regression(), []

    def val_fn():
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in loop.__name__):
            return problem.val_loss()

    optimizer = FastForward(
        two_groups(problem),
        val_fn,
        interval=2,
        max_interval=2,
        calibrate_lr=calibrate_lr,
        on_stage=lambda record: left.append(val_fn().item()),
    )
    for step in range(8):
        loop(problem, optimizer, step)
    assert [record.step for record in optimizer.history] == [2, 4, 6, 8]
    # A check measures at means, and leaves the weights where they are.
    there = [record.kind != "check" for record in optimizer.history]
    assert there == [True] + [not calibrate_lr] * 3
    measured = [record.loss_after for record in optimizer.history]
    assert list(compress(left, there)) == list(compress(measured, there))
    assert optimizer.history[-1].loss_after < optimizer.history[0].loss_before


@pytest.mark.parametrize("calibrate_lr", [False, True])
def test_a_step_that_the_scaler_skips_leaves_no_trace(calibrate_lr):
    """Also where a stage was due: the run is the one in which that batch never came."""
    results = []
    for overflows in ((), (1, 5, 6)):
        problem = Regression()
        optimizer = FastForward(
            torch.optim.AdamW(problem.parameters, lr=1e-4),
            problem.val_loss,
            interval=2,
            max_interval=2,
            calibrate_lr=calibrate_lr,
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        batches = iter(range(8))
        for step in range(8 + len(overflows)):
            problem.model.zero_grad()
            start = 0 if step in overflows else next(batches) * 8
            loss = problem.loss(slice(start, start + 16))
            scaler.scale(loss * torch.inf if step in overflows else loss).backward()
            stages = len(optimizer.history)
            scaler.step(optimizer)
            scaler.update()
            assert step not in overflows or len(optimizer.history) == stages
        assert scaler.get_scale() == 2.0 ** (16 - len(overflows))
        records = [(r.step, r.trials, r.lr_scale) for r in optimizer.history]
        results.append((problem.weights(), records))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert [record[0] for record in results[0][1]] == [2, 4, 6, 8]


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("calibrate_lr", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_not_compiled_again_after_the_first_stage(backend, calibrate_lr):
    problem = Regression(dropout=0.1)
    problem.model = torch.compile(problem.model, backend=backend)
    counters.clear()
    rows = [slice(64, 80), slice(80, 96)]
    val_fn = ValidationLoss(
        problem.model,
        rows,
        forward=lambda model, rows: (problem.loss(rows), 16),
        batches_per_stage=1,
    )
    optimizer = FastForward(
        torch.optim.AdamW(problem.parameters, lr=1e-4),
        val_fn,
        interval=2,
        max_interval=2,
        calibrate_lr=calibrate_lr,
    )

    def compiled():
        return counters["frames"]["total"], counters["stats"]["unique_graphs"]

    problem.train(optimizer, 3)
    once = compiled()
    assert once[1] >= 2, "a graph for the steps and one for the stages"
    problem.train(optimizer, 6, first=3)
    assert compiled() == once
    assert [record.step for record in optimizer.history] == [2, 4, 6, 8]
    assert optimizer.history[0].tau > 0


# Compiling an optimizer imports parts of torch that warn.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.usefixtures("dynamo")
def test_a_compiled_step_of_the_wrapped_optimizer_is_not_compiled_again_for_each_rate():
    problem = Regression()
    base = torch.optim.AdamW(problem.parameters, lr=1e-3, foreach=False)
    base.step = torch.compile(base.step, backend="eager")
    options = {"max_interval": 2, "calibrate_lr": UNCLIPPED}
    optimizer = FastForward(base, problem.val_loss, interval=2, **options)
    counters.clear()
    # Torch compiles a step anew when a number of the group first changes, from then on for any. The
    # last to do so are those of a run that was taken back.
    problem.train(optimizer, 20)
    assert any(record.decision.startswith("worse") for record in optimizer.history)
    once, scale = counters["stats"]["unique_graphs"], optimizer.lr_scale
    assert 0 < once < 8, "torch's limit, at which it gives up"
    problem.train(optimizer, 12, first=20)
    assert counters["stats"]["unique_graphs"] == once
    assert optimizer.lr_scale != scale


def test_the_last_stage_does_not_move_what_has_been_frozen_after_the_last_step():
    problem = Regression()
    optimizer = FastForward(
        torch.optim.AdamW(problem.parameters, lr=0.1), problem.val_loss, calibrate_lr=True
    )
    problem.train(optimizer, 5)
    problem.parameters[0].requires_grad_(False)
    before = problem.weights()
    assert optimizer.finish() is None
    assert same(problem.weights(), before)


def test_the_example_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(tmp_path, capsys):
    example = Path(__file__).parents[1] / "examples" / "plain_loop.py"
    main = runpy.run_path(str(example))["main"]
    whole, parts = (["--checkpoint", str(tmp_path / name)] for name in ("whole.pt", "parts.pt"))
    expected = main([*whole, "--stop", "24"])
    main([*parts, "--stop", "14"])
    resumed = main([*parts, "--stop", "24", "--resume"])
    stages = [(r.step, r.trials) for r in resumed.history]
    assert stages == [(r.step, r.trials) for r in expected.history]
    assert stages[0][0] <= 14, "one is in the checkpoint"
    assert stages[-1][0] > 14
    assert any(record.useful for record in resumed.history)
    weights = [
        torch.load(tmp_path / name, weights_only=True)["adapter"].values()
        for name in ("whole.pt", "parts.pt")
    ]
    assert same(*map(list, weights))
    assert f"step {stages[-1][0]}:" in capsys.readouterr().out
