"""What a stage promises at the edges: errors, records, hooks and state of a val_fn."""

import pytest
import torch

from fastforward_optim import FastForward, ValidationLoss
from fastforward_optim.calibration import Calibration
from fastforward_optim.search.line_search import RepeatSearch
from fastforward_optim.stage.stage import Stage, copies

from .conftest import Regression, Untried, fixed, tiny_lora, token_batch


def one_step(problem, **options):
    """A run of one step with a stage after it."""
    options = {"interval": 1, **options}
    val_fn = options.pop("val_fn", problem.val_loss)
    optimizer = FastForward(torch.optim.SGD(problem.parameters, lr=0.01), val_fn, **options)
    problem.train(optimizer, 1)
    return optimizer


# Stages on tensors.


def test_a_stage_of_several_steps_moves_by_their_mean_and_may_go_back_to_where_they_began():
    tensor = torch.tensor([8.0])
    stage = Stage([tensor], before=[[torch.tensor([2.0])]], steps=3)
    assert stage.set_anchor()
    tau, trials = stage.search(lambda: float(tensor), lambda evaluate, _: at(evaluate, 1, -3), 0.0)
    assert (tau, trials) == (-3.0, ((1.0, 10.0), (-3.0, 2.0)))
    assert tensor.item() == 2.0
    words = r"tau = -3.5; it must be finite and >= -3"
    with pytest.raises(RuntimeError, match=words), stage.rolled_back_on_error():
        stage.search(lambda: 1.0, lambda evaluate, _: at(evaluate, -3.5), 0.0)
    assert tensor.item() == 8.0


def at(evaluate, *taus):
    for tau in taus:
        evaluate(float(tau))
    return float(taus[-1])


def moved():
    tensors = [torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), torch.tensor([3.0])]
    stage = Stage(tensors)
    for tensor in tensors:
        tensor += 1
    stage.set_anchor()
    return stage, tensors


def raises():
    raise ValueError("no data")


def test_an_error_puts_the_tensors_back_to_the_anchor():
    stage, tensors = moved()
    values = [[torch.tensor([7.0]), torch.tensor([8.0])], [torch.tensor([9.0])]]
    with pytest.raises(ValueError, match="no data"), stage.rolled_back_on_error():
        stage.measure(raises, values)
    assert [tensor.item() for tensor in tensors] == [2, 2, 4]
    with pytest.raises(ValueError, match="no data"), stage.rolled_back_on_error():
        stage.search(raises, lambda evaluate, _: at(evaluate, 3), 0.0)
    assert [tensor.item() for tensor in tensors] == [2, 2, 4]


def test_what_is_off_the_line_is_left_by_the_next_search():
    stage, tensors = moved()
    loss = stage.measure(
        lambda: float(tensors[0]), [[torch.full((1,), 7.0)] * 2, [torch.full((1,), 7.0)]]
    )
    assert loss == 7.0
    stage.search(lambda: float(tensors[0]), lambda evaluate, _: 0.0, 0.0)
    assert [tensor.item() for tensor in tensors] == [2, 2, 4]


def test_copies_of_weights_need_no_gradient():
    weight = torch.nn.Parameter(torch.ones(2))
    assert not any(tensor.requires_grad for (tensor,) in copies([[weight]]))


def test_tensors_are_written_no_more_often_than_they_have_to_move():
    stage, (tensor, *_) = moved()
    version = tensor._version
    stage.search(lambda: 1.0, lambda evaluate, _: at(evaluate, 0), 0.0)
    assert tensor._version == version
    stage.search(lambda: 1.0, lambda evaluate, _: at(evaluate, 0, 2), 0.0)
    once = tensor._version - version
    stage.search(lambda: 1.0, lambda evaluate, _: at(evaluate, 2), 0.0)
    assert tensor._version == version + once


# Errors and records of the optimizer's stages.


def test_errors_say_what_to_do(problem):
    def changes_weights():
        problem.parameters[0].add_(1.0)
        return 1.0

    remedy = r"measure the loss\. Take optimizer steps, weight averaging and load_state_dict out of"
    with pytest.raises(RuntimeError, match=remedy + r" val_fn\.$"):
        one_step(problem, val_fn=Untried(changes_weights))
    with pytest.raises(RuntimeError, match=r"line_search <function .*unknown at .* = 9\.0, which"):
        one_step(problem, line_search=unknown)


def unknown(evaluate, last_tau):
    evaluate(0.0)
    return 9.0


def test_the_record_of_a_stage_is_of_one_step_and_of_no_mean(problem):
    optimizer = one_step(problem, interval=3)
    problem.train(optimizer, 2, first=1)
    record = optimizer.history[0]
    assert (record.step, record.steps) == (3, 1)
    assert (record.averaged, record.mean_loss, record.lr_scale) == (False, None, 1.0)
    assert 0 < record.seconds < 60


def test_a_search_that_stays_without_a_trial_leaves_the_loss_unknown(problem):
    optimizer = one_step(problem, line_search=lambda evaluate, last_tau: 0.0)
    assert repr((optimizer.history[0].loss_before, optimizer.history[0].loss_after)) == "(nan, nan)"


def test_a_stage_is_named_in_profiles(problem):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        one_step(problem)
    assert "FastForward.stage" in {event.key for event in profile.key_averages()}


def test_repr_tells_the_calibration_and_the_longest_interval(problem):
    def text(**options):
        base = torch.optim.SGD(problem.parameters, lr=0.01)
        return repr(FastForward(base, problem.val_loss, **options)).partition(", history=")[0]

    assert text(calibrate_lr=True) == "FastForward(interval=6, calibrate_lr=True"
    law = Calibration(probe=0.5)
    expected = f"FastForward(interval=6, calibrate_lr={law!r}, total_steps=90, warmup=4"
    assert text(calibrate_lr=law, total_steps=90, warmup=4) == expected
    search = RepeatSearch()
    expected = f"FastForward(interval=2, line_search={search!r}, max_interval=8"
    assert text(interval=2, max_interval=8, line_search=search) == expected


def test_after_an_error_in_a_check_the_mean_that_is_kept_goes_on_and_the_window_is_over(problem):
    failing = False

    def val_fn():
        if failing:
            raises()
        return problem.val_loss()

    def average():
        return optimizer.state_dict()["fast_forward"]["iterates"]["average"]

    base = torch.optim.SGD(problem.parameters, lr=0.01)
    optimizer = FastForward(base, val_fn, calibrate_lr=True, **fixed(2))
    problem.train(optimizer, 3)
    failing = True
    problem.backward(3)
    before = average()
    with pytest.raises(ValueError, match="no data"):
        optimizer.step()
    kept = average()
    with torch.no_grad():
        expected = [old.lerp(p, 1 / 1.1) for old, p in zip(before, problem.parameters, strict=True)]
    torch.testing.assert_close(kept, expected)
    failing = False
    problem.train(optimizer, 2, first=4)
    assert [(record.step, record.kind) for record in optimizer.history] == [
        (2, "probe"),
        (6, "check"),
    ]


# Checkpoints.


def pooled(model, **options):
    batches = [token_batch(2, 6, seed=k) for k in range(6)]
    val_fn = ValidationLoss(model, batches, batches_per_stage=1)
    params = [p for p in model.parameters() if p.requires_grad]
    base = torch.optim.AdamW(params, lr=1e-3)
    optimizer = FastForward(base, val_fn, **fixed(2), **options)
    return optimizer, val_fn


def train(model, optimizer, steps):
    for step in range(steps):
        model(**token_batch(2, 6, seed=100 + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("calibrate_lr", [False, True])
def test_a_checkpoint_holds_the_place_in_the_pool_and_means_only_if_there_are_any(calibrate_lr):
    model = tiny_lora()
    optimizer, val_fn = pooled(model, calibrate_lr=calibrate_lr)
    train(model, optimizer, 4)
    state_dict = optimizer.state_dict()
    assert (state_dict["fast_forward"].get("iterates") is not None) == calibrate_lr
    resumed, other = pooled(tiny_lora(), calibrate_lr=calibrate_lr)
    assert other.state_dict() != val_fn.state_dict()
    resumed.load_state_dict(state_dict)
    assert other.state_dict() == val_fn.state_dict()
    del state_dict["fast_forward"]["val_fn"]  # saved with another val_fn
    resumed.load_state_dict(state_dict)
    assert other.state_dict() == val_fn.state_dict()


def test_a_pooled_checkpoint_loads_where_val_fn_has_no_state():
    model = tiny_lora()
    optimizer, _ = pooled(model)
    train(model, optimizer, 2)
    other, _ = pooled(tiny_lora())
    other.val_fn = lambda: 1.0
    other.load_state_dict(optimizer.state_dict())
    assert len(other.history) == 1


def test_a_load_state_dict_pre_hook_may_see_and_replace_the_state_dict(problem):
    optimizer = one_step(problem)
    state_dict = optimizer.state_dict()
    resumed = one_step(Regression(), interval=5)
    seen = []

    def replace(optimizer, given):
        seen.append(set(given))
        return state_dict

    resumed.register_load_state_dict_pre_hook(replace)
    resumed.load_state_dict({"something": "else"})
    assert seen == [{"something"}]
    assert len(resumed.history) == 1


def test_a_calibrated_run_that_loads_a_plain_checkpoint_keeps_a_rate_of_its_own(problem):
    plain = torch.optim.SGD(problem.parameters, lr=0.5)
    resumed = one_step(Regression(), calibrate_lr=True)
    resumed.load_state_dict(plain.state_dict())
    assert resumed.lr_scale == Calibration().probe
    assert "fast_forward_lr_scale" in resumed.param_groups[0]


# Tensors in unusual places.


@pytest.mark.parametrize("second", [slice(0, 3), slice(1, 3)], ids=["all of it", "a part"])
def test_tensors_that_share_memory_are_moved_once(second):
    memory = torch.tensor([1.0, 2.0, 3.0])
    stage = Stage([memory[:], memory[second]])
    change = torch.tensor([0.25, 0.5, 1.0])
    memory += change
    anchor = memory.clone()
    stage.set_anchor()
    for tau in (1.0, 3.0, -0.5, 0.0):
        stage.write(tau)
        assert torch.equal(memory, anchor + tau * change), tau


def test_weights_that_val_fn_changed_before_it_raised_are_not_measured_again(problem):
    """As where an average of the weights is put in, and the error keeps it from being taken out."""
    calls = []

    def val_fn():
        calls.append(1)
        if len(calls) == 1:
            with torch.no_grad():
                problem.parameters[0].fill_(99.0)
            raise OSError("the validation data are gone")
        return problem.val_loss()

    def tries_again(evaluate, last_tau):
        try:
            evaluate(0.0)
        except OSError:
            evaluate(0.0)
        return 0.0

    optimizer = one_step(problem, val_fn=Untried(val_fn), line_search=tries_again)
    assert not (problem.parameters[0] == 99.0).any()
    assert optimizer.history[0].loss_before == problem.val_loss().item()
