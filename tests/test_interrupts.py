"""Ctrl-C at each moment of a stage, one after another: what is left is always sound.

Python delivers a signal where a function begins and after a call of a C function. The exception is
raised there in all code that runs in a stage, torch's Python code included: not at random, but at
the first of these moments, then at the second, and so on to the end.

INSTRUCTIONS=1 raises it in more kinds of stages, and before each instruction of our own code too,
where no signal comes: some minutes.
"""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastforward_optim
from fastforward_optim import Calibration, FastForward, ValidationLoss

from .conftest import same

INSTRUCTIONS = [False, True] if os.environ.get("INSTRUCTIONS") else [False]
OURS = str(Path(fastforward_optim.__file__).parent)
LR = 0.01


class Run:
    """A model of three tensors in training, and what its stages measure."""

    def __init__(self, sign=1.0, **options):
        self.sign = sign
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1, bias=False))
        self.params = list(self.model.parameters())
        batches = [torch.randn(4, 3) for _ in range(4)]
        self.val_fn = ValidationLoss(self.model, batches, batches_per_stage=1, forward=self.forward)
        self.inner = torch.optim.AdamW(self.params, lr=LR)
        self.optimizer = FastForward(self.inner, self, **options)
        self.anchor, self.measured = [], []
        self.inner.register_step_post_hook(lambda *_: self.after_the_step())
        self.on_anchor = None
        self.fails = False

    @staticmethod
    def forward(model, rows):
        return (model(rows[:, :2]) - rows[:, 2:]).square().mean(), len(rows)

    def after_the_step(self):
        self.anchor, self.measured = self.weights(), []
        self.moments_after_step = self.moments()
        if self.on_anchor is not None:
            self.on_anchor()

    def check(self):
        """Only stages are interrupted, and fail."""

    def new_stage(self):
        self.val_fn.new_stage()

    def state_dict(self):
        return self.val_fn.state_dict()

    def load_state_dict(self, state):
        self.val_fn.load_state_dict(state)

    def __call__(self):
        weights = self.weights()
        if self.fails and self.measured:
            raise OSError("no data")
        loss = self.val_fn()
        self.measured.append((loss, weights))
        return loss

    def weights(self):
        return [p.detach().clone() for p in self.params]

    def moments(self):
        return [t.clone() for p in self.params for t in self.optimizer.state[p].values()]

    def step(self, before=lambda: None):
        for number, p in enumerate(self.params):
            p.grad = torch.full_like(p, self.sign * (1.0 - 0.3 * number))
        before()
        self.optimizer.step()


def try_one_repeat(evaluate, last_tau):
    start = evaluate(0.0)
    return 1.0 if evaluate(1.0) < start else 0.0


# Windows of two steps, as the probe, at a rate that soon does harm.
HARMFUL = Calibration(first_window=2, growth=1, distance=1e3)
OPTIONS = {
    "plain": {"interval": 1, "line_search": try_one_repeat, "max_interval": 4},
    # The steps lead downhill: the probe goes ahead.
    "calibrated": {"interval": 2, "calibrate_lr": True},
    # Uphill: the first check takes the run back.
    "back": {"interval": 2, "calibrate_lr": HARMFUL, "sign": -1.0},
}

# With and without a val_fn that fails in the middle of it.
CASES = [("plain", False), ("plain", True), ("back", False)]
if len(INSTRUCTIONS) > 1:
    CASES += [("back", True), ("calibrated", False), ("calibrated", True)]


class Moments:
    """Counts the moments at which a signal can be delivered, and raises at one of them.

    Args:
        at: number of the moment to raise at; None to list them all.
        instructions: whether each instruction of our own code is one.
    """

    def __init__(self, at=None, *, instructions=False):
        self.at = at
        self.instructions = instructions
        self.seen = []
        self.over = False
        self._number = 0

    def start(self):
        if self.instructions:
            sys.settrace(self._trace)
            frame = sys._getframe(1)
            while frame is not None:
                if frame.f_code.co_filename.startswith(OURS):
                    frame.f_trace, frame.f_trace_opcodes = self._trace, True
                frame = frame.f_back
        else:
            sys.setprofile(self._profile)

    def stop(self):
        sys.settrace(None)
        sys.setprofile(None)

    def _profile(self, frame, event, arg):
        if event in ("call", "c_return"):
            self._moment(frame, event)

    def _trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self._moment(frame, event)
        return self._trace

    def _moment(self, frame, event):
        if self.over:
            return
        if self.at is None:
            place = [event, frame.f_code, frame.f_lasti]
            while frame is not None:
                if frame.f_code.co_filename.startswith(OURS):
                    place += frame.f_code, frame.f_lasti
                frame = frame.f_back
            self.seen.append(tuple(place))
        elif self._number == self.at:
            self.stop()
            raise KeyboardInterrupt
        self._number += 1


def run_a_stage(moments, options, fails=False):
    """A run whose first stage, or check, may be interrupted, and what was raised."""
    run = Run(**options)
    for _ in range(3 if options.get("calibrate_lr") is HARMFUL else options["interval"] - 1):
        run.step()
    run.on_anchor, run.fails = moments.start, fails
    raised = None
    try:
        run.step()
        moments.over = True
    except (KeyboardInterrupt, OSError) as error:
        moments.over = True
        raised = type(error)
    moments.stop()
    run.on_anchor, run.fails = None, False
    return run, raised


def moments_of(run_it, instructions=False):
    """Numbers of the moments: of each place in the code, the first and the last time there.

    Two are at one place if the innermost function is at the same instruction, and ours are.
    """
    for _ in range(2):  # the first time, torch imports and caches
        moments = Moments(instructions=instructions)
        run_it(moments)
    places = {}
    for number, place in enumerate(moments.seen):
        places.setdefault(place, []).append(number)
    return sorted({n for numbers in places.values() for n in (numbers[0], numbers[-1])})


def assert_goes_on(run, options):
    """The next steps work, with a stage, and so does a checkpoint."""
    stages = len(run.optimizer.history)
    for _ in range(2 * options["interval"]):  # a stage that was of no use doubles it
        run.step()
    assert len(run.optimizer.history) > stages
    other = Run(**options)
    other.optimizer.load_state_dict(run.optimizer.state_dict())


@pytest.fixture
def lost_in_destructors(monkeypatch):
    """Python drops what is raised while a generator is closed, Ctrl-C too: then nothing stops.

    The garbage collector comes when it likes, and so do the callbacks that others have given it
    (hypothesis, for one): without it, the moments are the same each time.
    """
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("lost_in_destructors")
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(("name", "fails"), CASES)
def test_ctrl_c_at_each_moment_of_a_stage(name, fails, instructions):
    options = OPTIONS[name]

    def stage(moments):
        return run_a_stage(moments, options, fails)

    uninterrupted, _ = stage(Moments(at=-1))
    if not fails:
        record = uninterrupted.optimizer.history[-1]
        assert record.kind == {"plain": "stage", "calibrated": "probe", "back": "check"}[name]
        assert record.useful, "the stage moves the weights"
        assert (record.tau < 0) == (name == "back")
    numbers = moments_of(stage, instructions)
    assert len(numbers) > 300
    interrupted = 0
    for number in numbers:
        run, raised = stage(Moments(number, instructions=instructions))
        assert raised is not None or not fails
        interrupted += raised is KeyboardInterrupt
        # At the anchor, or at the best point that has been measured.
        best = min(run.measured, key=lambda pair: pair[0], default=(None, run.anchor))[1]
        assert same(run.weights(), run.anchor) or (not fails and same(run.weights(), best))
        assert same(run.moments(), run.moments_after_step)
        assert torch.is_grad_enabled()
        assert run.inner.param_groups[0]["lr"] == LR
        # No signal comes between "finally" and the first call there.
        assert instructions or all(module.training for module in run.model.modules())
        assert_goes_on(run, options)
    assert interrupted > 0.95 * len(numbers)


@pytest.mark.usefixtures("lost_in_destructors")
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_ctrl_c_at_each_moment_of_a_step_leaves_the_learning_rate_that_was_set(
    tensor, instructions
):
    options = {"interval": 4, "calibrate_lr": True}

    def step(moments):
        run = Run(**options)
        group = run.inner.param_groups[0]
        group["fast_forward_lr_scale"] = 3.0
        if tensor:
            group["lr"], group["foreach"] = torch.tensor(LR), False
        rate = group["lr"]
        run.step()  # torch makes the moments: an optimizer without some of them cannot go on
        try:
            run.step(moments.start)
            moments.over = True
        except KeyboardInterrupt:
            moments.over = True
        moments.stop()
        assert group["lr"] is rate
        assert float(rate) == pytest.approx(LR)
        return run

    numbers = moments_of(step, instructions)
    assert len(numbers) > 100
    for number in numbers:
        run = step(Moments(number, instructions=instructions))
        assert torch.is_grad_enabled()
        if number % 10 == 0:
            run.step()
            run.step()
            assert_goes_on(run, options)


@pytest.mark.usefixtures("lost_in_destructors")
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_ctrl_c_before_the_first_step_lets_the_run_begin(instructions):
    options = OPTIONS["calibrated"]

    def begin(moments):
        run = Run(**options)
        run.inner.register_step_pre_hook(lambda *_: setattr(moments, "over", True))
        weights = run.weights()
        try:
            run.step(moments.start)
        except KeyboardInterrupt:
            assert same(run.weights(), weights)
        moments.over = True
        moments.stop()
        return run

    numbers = moments_of(begin, instructions)
    assert len(numbers) > 50
    for number in numbers:
        assert_goes_on(begin(Moments(number, instructions=instructions)), options)
