"""The benchmarks compare fairly, and the demo runs on the real model."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.comparison.comparison import Comparison, Setting
from benchmarks.data.blocks import Blocks, Splits
from benchmarks.methods.fast_forward import CalibratedTrainer
from benchmarks.methods.reference import repeat_last_step
from benchmarks.methods.registry import METHODS
from benchmarks.methods.schedules import scheduler, warmup_steps
from benchmarks.methods.trainer import Method, Result, Trainer
from benchmarks.runs.training import train

from .conftest import tiny_lora

STEPS = 30
SETTING = Setting(batch_size=4, budget_steps=STEPS, interval=3, validation=6)
RATE = 1e-4
every_method = pytest.mark.parametrize(
    ("method", "schedule"),
    [pytest.param(method, method.schedules[-1], id=method.name) for method in METHODS.values()],
)


def random_splits():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 97, (80, 10), generator=generator)
    blocks = Blocks(tokens, tokens.where(torch.rand(80, 10, generator=generator) > 0.2, -100))
    return Splits(*(blocks.select(slice(*part)) for part in ((40,), (40, 58), (58, 80))))


@pytest.fixture(scope="module")
def shared():
    return Comparison(tiny_lora(), random_splits(), SETTING)


@pytest.fixture
def comparison(shared):
    shared.reseed(0)
    return shared


def run(comparison, method, lr=RATE, schedule="constant"):
    parts = []
    result = train(
        comparison,
        method,
        lr if method.has_rate else 1.0,
        lambda part, loss: parts.append(part),
        schedule,
    )
    assert sum(parts) == pytest.approx(result.flops / comparison.budget)
    return result


def watched(comparison, method, lr=RATE, schedule="constant"):
    """Run a method; returns also the training batches' tokens, and rows that eval mode has seen."""
    batches, evaluated = [], []

    def watch(model, args, kwargs):
        tokens = kwargs["input_ids"]
        if model.training:
            batches.append(tokens.clone())
        else:
            evaluated.append(len(tokens))

    handle = comparison.model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        return run(comparison, method, lr, schedule), batches, sum(evaluated)
    finally:
        handle.remove()


@every_method
def test_every_method_spends_the_budget_and_no_more_and_every_forward_is_charged(
    comparison, method, schedule
):
    result, batches, evaluated = watched(comparison, method, schedule=schedule)
    costs = comparison.costs
    assert len(batches) == result.steps
    tests = len(result.curve) - 1 + (not math.isnan(result.last_loss))
    test_rows = tests * comparison.splits.test.rows
    assert evaluated == result.trials * SETTING.validation + test_rows
    assert result.flops == result.steps * costs.step + result.trials * costs.trial
    reserve = CalibratedTrainer.reserve if method.name == "calibrated" else 0
    assert comparison.budget - costs.step - reserve * costs.trial < result.flops
    assert result.flops <= comparison.budget
    assert (result.trials > 0) == (not method.trains_on_pool)
    assert result.trials == sum(stage["passes"] for stage in result.stages)
    assert result.curve[0] == (0, 0, comparison.initial_test_loss)
    assert [point[0] for point in result.curve][-1] == result.flops
    assert result.curve[-1][1] == result.seconds > 0
    assert not result.diverged
    assert result.test_loss != comparison.initial_test_loss
    assert result.schedule == schedule
    if method.name != "schedulefree":  # which has gone back to the weights that it trains at
        last = result.test_loss if math.isnan(result.last_loss) else result.last_loss
        assert last == comparison.test()


def test_a_trial_is_charged_as_the_forwards_that_it_makes(comparison):
    """On this model a step costs a little more than two forwards of its batch of 4."""
    forward_of_four = comparison.costs.trial * 4 / 6
    assert comparison.costs.step / forward_of_four == pytest.approx(2.1, abs=0.15)


def test_all_methods_of_a_seed_start_from_one_adapter_and_see_the_same_batches(comparison):
    results, rows = [], []
    for name in ("adamw", "bracket", "loraplus", "adamw"):
        result, batches, _ = watched(comparison, METHODS[name])
        results.append(result)
        seen = [row.tolist() for row in torch.cat(batches)]
        rows.append(seen)
    assert untimed(results[0]) == untimed(results[3])
    assert rows[0] == rows[2] == rows[3]
    pool = comparison.splits.validation.input_ids.tolist()
    assert any(row in pool for row in rows[0]), "it measures nothing, so it is trained on too"
    own = [row for row in rows[0] if row not in pool]
    shared = 32  # of the first epoch
    assert rows[1][:shared] == own[:shared], "but the order of the others is the same"


def untimed(result):
    curve = [(flops, loss) for flops, _, loss in result.curve]
    return replace(result, seconds=0, curve=curve)


def test_another_seed_is_another_adapter_and_another_order(comparison):
    first, first_batches, _ = watched(comparison, METHODS["adamw"])
    adapter = [tensor.clone() for tensor in comparison.initial]
    comparison.reseed(1)
    second, second_batches, _ = watched(comparison, METHODS["adamw"])
    assert not torch.equal(first_batches[0], second_batches[0])
    assert first.test_loss != second.test_loss
    changed = [not torch.equal(a, b) for a, b in zip(adapter, comparison.initial, strict=True)]
    names = [name for name, p in comparison.model.named_parameters() if p.requires_grad]
    assert changed == ["lora_A" in name for name in names], "B is zero, as PEFT begins"
    comparison.reseed(0)
    assert all(map(torch.equal, adapter, comparison.initial))


def test_a_run_that_diverges_ends_early_and_says_so(comparison):
    class Broken(Trainer):
        def step(self, room):
            with torch.no_grad():
                for tensor in comparison.parameters:
                    tensor.fill_(torch.nan)
            return []

    method = Method("broken", "", lambda c, r: Broken(torch.optim.SGD(c.parameters)))
    result = run(comparison, method)
    assert result.diverged
    assert len(result.curve) == 2
    assert result.flops <= comparison.budget / 3


def test_a_budget_without_room_for_the_last_stage_is_refused():
    setting = replace(SETTING, budget_steps=3)
    small = Comparison(tiny_lora(), random_splits(), setting)
    with pytest.raises(ValueError, match=r"budget_steps must be at least 4\.\d+ for calibrated"):
        run(small, METHODS["calibrated"])


@pytest.mark.parametrize(
    ("schedule", "decay"),
    [
        ("linear", lambda step: (30 - step) / 29),
        ("cosine", lambda step: (1 + math.cos(math.pi * (step - 1) / 29)) / 2),
    ],
)
def test_a_decay_rises_over_a_twentieth_and_ends_at_zero(comparison, schedule, decay):
    rates = []

    def build(comparison, result):
        trainer = METHODS["adamw"].build(comparison, result)
        trainer.optimizer.register_step_post_hook(
            lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
        )
        return trainer

    run(comparison, replace(METHODS["adamw"], build=build), 1.0, schedule)
    assert rates == pytest.approx([1, *(decay(step) for step in range(1, 30))])
    assert scheduler("constant", torch.optim.SGD(comparison.parameters), 30, lambda: 0) is None


def test_the_clock_of_a_decay_is_the_cost_spent():
    """Where stages take a part of the budget, fewer steps bring the rate to zero."""
    clock = [0]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = scheduler("linear", optimizer, 40, lambda: clock[0])
    rates = []
    for clock[0] in (1, 2, 20, 21, 40, 41):
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1, 1, 20 / 38, 19 / 38, 0, 0])
    assert warmup_steps("linear", 40) == 2


@pytest.mark.parametrize(("norm", "expected"), [(50.0, 1.0), (0.5, 0.5)])
def test_clipped_adamw_scales_gradients_down_to_norm_1(comparison, norm, expected):
    trainer = METHODS["adamw-clipped"].build(comparison, Result("adamw-clipped", 1e-3))
    size = sum(p.numel() for p in comparison.parameters)
    for p in comparison.parameters:
        p.grad = torch.full_like(p, norm / size**0.5)
    trainer.step(0)
    total = torch.nn.utils.get_total_norm([p.grad for p in comparison.parameters])
    assert total.item() == pytest.approx(expected, rel=1e-4)


def test_the_mean_is_of_the_last_tenth_of_the_iterates(comparison):
    """Against a plain loop: the mean of all so far, then an exponential one over three steps."""
    iterates, trainers = [], []

    def build(comparison, result):
        trainer = METHODS["adamw-mean"].build(comparison, result)
        trainer.optimizer.register_step_post_hook(
            lambda *_: iterates.append([p.detach().clone() for p in comparison.parameters])
        )
        trainers.append(trainer)
        return trainer

    result = run(comparison, replace(METHODS["adamw-mean"], build=build), 1e-2)
    mean = iterates[0]
    for number, iterate in enumerate(iterates[1:], 2):
        weight = max(1 / number, 1 / 3)
        mean = [m + weight * (p - m) for m, p in zip(mean, iterate, strict=True)]
    for ours, plain in zip(trainers[0].mean, mean, strict=True):
        torch.testing.assert_close(ours, plain)
    assert all(map(torch.equal, comparison.parameters, iterates[-1])), "the last one is back"
    assert result.test_loss != result.last_loss == comparison.test()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_steps_train_as_computed_ones():
    """Run after run of several methods, each from the same adapter."""
    plain = Comparison(tiny_lora().cuda(), random_splits(), SETTING)
    graphed = Comparison(tiny_lora().cuda(), random_splits(), replace(SETTING, cuda_graphs=True))
    graphed.warm_up()
    graphed.capture()
    for name in ("adamw", "bracket", "loraplus", "adamw"):
        wanted, found = (run(one, METHODS[name], 1e-3) for one in (plain, graphed))
        assert found.steps == wanted.steps
        assert found.test_loss == pytest.approx(wanted.test_loss, rel=1e-4)


class TestReference:
    """The authors' rule, on f(x) = (x - goal)^2 and a last step from 0 to 1."""

    def repeat(self, loss, most=100):
        tensor = torch.tensor([1.0])
        trials = repeat_last_step([tensor], [torch.tensor([0.0])], lambda: loss(tensor), most)
        return tensor.item(), trials

    def test_it_keeps_the_repeat_that_overshoots(self):
        at, trials = self.repeat(lambda x: float((x - 4.5) ** 2))
        assert trials == [(1, 6.25), (2, 2.25), (3, 0.25), (4, 0.25), (5, 2.25)]
        assert at == 6, "as good as before is not worse"
        at, trials = self.repeat(lambda x: float((x - 4) ** 2))
        assert trials == [(1, 4), (2, 1), (3, 0), (4, 1)]
        assert at == 5

    def test_the_first_repeat_is_accepted_blind(self):
        at, trials = self.repeat(lambda x: float((x + 1) ** 2))
        assert at == 3
        assert trials == [(1, 9), (2, 16)]

    @pytest.mark.parametrize("loss", [1.0, float("nan")])
    def test_a_flat_loss_and_nan_are_ended_by_the_budget_alone(self, loss):
        at, trials = self.repeat(lambda x: loss, most=7)
        assert at == 8
        assert len(trials) == 7

    def test_every_third_step_is_repeated(self, comparison):
        result = run(comparison, METHODS["reference"])
        steps = [stage["step"] for stage in result.stages]
        assert steps == list(range(3, 3 * len(steps) + 1, 3))
        assert steps
        assert all(stage["tau"] == len(stage["trials"]) for stage in result.stages)


class Words:
    """A tokenizer of words, enough of one for packing."""

    eos_token_id = 0

    def __call__(self, documents, add_special_tokens):
        return {"input_ids": [[int(word) for word in text.split()] for text in documents]}
