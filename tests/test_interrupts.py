"""Ctrl-C in ``val_fn``, at each of its forwards: what is left is sound, and training can go on."""

import itertools

import pytest
import torch
from torch import nn

from fastforward_optim import Calibration, FastForward, ValidationLoss

from .conftest import same

LR = 0.01


class Run:
    """A model of three tensors in training, whose validation can be interrupted."""

    def __init__(self, sign=1.0, rate=LR, **options):
        self.sign = sign
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1, bias=False))
        self.params = list(self.model.parameters())
        batches = [torch.randn(4, 3) for _ in range(4)]
        self.interrupt_at = None  # number of a forward, from the next one on
        val_fn = ValidationLoss(self.model, batches, batches_per_stage=1, forward=self.forward)
        self.inner = torch.optim.AdamW(self.params, lr=rate)
        self.optimizer = FastForward(self.inner, val_fn, **options)
        self.measured = []
        self.inner.register_step_post_hook(lambda *_: self.after_the_step())

    def forward(self, model, rows):
        if self.interrupt_at is not None:
            self.interrupt_at -= 1
            if self.interrupt_at < 0:
                self.interrupt_at = None
                raise KeyboardInterrupt
        loss = (model(rows[:, :2]) - rows[:, 2:]).square().mean()
        self.measured = [*getattr(self, "measured", []), (loss.item(), self.weights())]
        return loss, len(rows)

    def after_the_step(self):
        self.anchor, self.measured, self.moments_then = self.weights(), [], self.moments()

    def weights(self):
        return [p.detach().clone() for p in self.params]

    def moments(self):
        return [t.clone() for p in self.params for t in self.optimizer.state[p].values()]

    def step(self, closure=None):
        for number, p in enumerate(self.params):
            p.grad = torch.full_like(p, self.sign * (1.0 - 0.3 * number))
        self.optimizer.step(closure)


def try_one_repeat(evaluate, last_tau):
    start = evaluate(0.0)
    return 1.0 if evaluate(1.0) < start else 0.0


# Windows of two steps, as the probe, at a rate that soon does harm.
HARMFUL = Calibration(first_window=2, growth=1, distance=1e3)
OPTIONS = {
    "stage": {"interval": 1, "line_search": try_one_repeat, "max_interval": 4},
    # The steps lead downhill: the probe goes ahead.
    "probe": {"interval": 2, "calibrate_lr": True},
    # Uphill: the first check takes the run back.
    "check": {"interval": 2, "calibrate_lr": HARMFUL, "sign": -1.0},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_ctrl_c_in_val_fn_leaves_the_run_as_the_step_made_it(kind):
    options = OPTIONS[kind]
    for number in itertools.count():
        run = Run(**options)
        for _ in range(3 if kind == "check" else options["interval"] - 1):
            run.step()
        run.interrupt_at = number
        try:
            run.step()
        except KeyboardInterrupt:
            pass
        else:
            break
        assert same(run.weights(), run.anchor)
        assert same(run.moments(), run.moments_then)
        assert torch.is_grad_enabled()
        assert run.inner.param_groups[0]["lr"] == LR
        assert all(module.training for module in run.model.modules())
        stages = len(run.optimizer.history)
        for _ in range(2 * options["interval"]):  # a stage that was of no use doubles it
            run.step()
        assert len(run.optimizer.history) > stages
        Run(**options).optimizer.load_state_dict(run.optimizer.state_dict())
    record = run.optimizer.history[-1]
    assert (record.kind, record.useful) == (kind, True), "without Ctrl-C the weights move"
    assert number >= 2


def test_ctrl_c_in_finish_leaves_the_last_iterate():
    run = Run(**OPTIONS["probe"])
    for _ in range(5):
        run.step()
    run.interrupt_at = 0
    with pytest.raises(KeyboardInterrupt):
        run.optimizer.finish()
    assert same(run.weights(), run.anchor)
    assert all(module.training for module in run.model.modules())
    run.step()


@pytest.mark.parametrize("rate", [LR, torch.tensor(LR)], ids=["number", "tensor"])
def test_ctrl_c_in_a_closure_leaves_the_learning_rate_that_was_set(rate):
    run = Run(rate=rate, **OPTIONS["probe"])
    group = run.inner.param_groups[0]
    rate, group["foreach"] = group["lr"], False

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.step(closure)
    assert group["lr"] is rate
    assert float(rate) == pytest.approx(LR)
    assert torch.is_grad_enabled()
    run.step()


def test_ctrl_c_before_the_first_step_lets_the_run_begin():
    losses, calls = iter(range(10)), []

    def val_fn():
        calls.append(None)
        if len(calls) == 2:
            with torch.no_grad():
                weight.add_(1.0)
            raise KeyboardInterrupt
        return float(next(losses))

    weight = nn.Parameter(torch.ones(2))
    optimizer = FastForward(torch.optim.SGD([weight], lr=0.1), val_fn)
    weight.grad = torch.ones(2)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert weight.tolist() == [1.0, 1.0]
    with pytest.warns(UserWarning, match="at the same weights"):
        optimizer.step()
    assert weight.tolist() == pytest.approx([0.9, 0.9])
