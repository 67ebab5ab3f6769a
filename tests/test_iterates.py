"""The iterates of a calibrated run: means, their movements, and what a checkpoint holds of them."""

import math

import pytest
import torch

from fastforward_optim.calibration import Iterates, Standing

from .conftest import same, through_a_file

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float32]
TENSORS = ("mean", "previous", "movement", "average", "best")


def opened(dtypes=DTYPES, horizon=0.1):
    """Tensors of different shapes, and their iterates."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3), (), (4,), (1, 5)][: len(dtypes)]
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    iterates = Iterates(horizon)
    iterates.open(tensors)
    return tensors, iterates


def walk(tensors, iterates, steps, seed=1):
    """Take steps; the values after each, in float64."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(steps):
        for tensor in tensors:
            step = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.add_(step.to(tensor.dtype), alpha=0.1)
        iterates.add()
        values.append([tensor.double().clone() for tensor in tensors])
    return values


def mean_of(values):
    return [torch.stack(each).mean(0) for each in zip(*values, strict=True)]


def held(iterates, name, tensors):
    """What is kept of each tensor, in their order."""
    return [kept.double() for kept in iterates.state_dict(tensors)[name]]


def assert_close(found, expected, rtol=2e-6):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)


def test_the_windows_mean_is_that_of_its_iterates():
    """In float32 for 16-bit tensors, in which a mean of many would drown in rounding."""
    tensors, iterates = opened()
    for steps in (1, 7, 300):
        values = walk(tensors, iterates, steps, seed=steps)
        assert iterates.steps == steps
        assert_close(held(iterates, "mean", tensors), mean_of(values))
        iterates.next_window(is_best=True)
        assert iterates.steps == 0
    assert [kept.dtype for kept in iterates.state_dict(tensors)["mean"]] == [
        *(torch.float32, torch.float32, torch.float64, torch.float32)
    ]


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_products_are_those_of_the_last_two_movements_of_the_mean(ranks):
    tensors, iterates = opened()
    means = []
    for steps in (5, 6, 8, 11):
        means.append(mean_of(walk(tensors, iterates, steps, seed=steps)))
        if len(means) < 3:
            assert iterates.products(ranks) == (0.0, 0.0, 0.0), "there are no two movements yet"
        else:
            last, now = (
                torch.cat([(b - a).flatten() for a, b in zip(*pair, strict=True)])
                for pair in (means[-3:-1], means[-2:])
            )
            expected = float(last @ now), float(last @ last), float(now @ now)
            found = [ranks * product for product in iterates.products(ranks)]
            assert found == pytest.approx(expected, rel=1e-4)
            assert iterates.lengths == ((5, 6) if steps == 8 else (6, 8))
        iterates.next_window(is_best=True)


def test_products_of_a_million_small_movements_do_not_drown_in_rounding():
    tensor = torch.zeros(2**20)
    iterates = Iterates(0.1)
    iterates.open([tensor])
    for value in (1.0, 2.0, 3.0):
        tensor.fill_(1e-3 * value)
        iterates.add()
        products = iterates.products(1)
        iterates.next_window(is_best=True)
    assert products == pytest.approx([2**20 * 1e-6] * 3, rel=1e-4)


@pytest.mark.parametrize("horizon", [0.1, 0.5])
def test_the_mean_kept_aside_is_over_the_recent_part_of_the_run(horizon):
    tensors, iterates = opened(horizon=horizon)
    expected, count = None, 0
    for steps in (20, 30, 150):
        for value in walk(tensors, iterates, steps, seed=steps):
            weight = 1 / (1 + horizon * count)
            count += 1
            old = value if expected is None else expected
            expected = [a + weight * (b - a) for a, b in zip(old, value, strict=True)]
        assert_close(held(iterates, "average", tensors), expected, rtol=1e-5)
        iterates.next_window(is_best=True)
    assert iterates.age == 200


def test_while_it_lasts_the_tensors_are_the_mean_and_then_what_they_were_bit_for_bit():
    tensors, iterates = opened()
    tensors[0][0, 0] = math.nan
    walk(tensors, iterates, 9)
    before = [tensor.clone() for tensor in tensors]
    for error in (None, KeyboardInterrupt):
        try:
            with iterates.averaged():
                rounded = [
                    kept.to(tensor.dtype)
                    for kept, tensor in zip(
                        held(iterates, "average", tensors), tensors, strict=True
                    )
                ]
                assert same(tensors[1:], rounded[1:])
                assert not same(tensors, before)
                if error is not None:
                    raise error
        except KeyboardInterrupt:
            pass
        assert same(tensors, before)


def test_before_the_first_step_there_is_no_mean():
    tensors, iterates = opened()
    before = [tensor.clone() for tensor in tensors]
    with iterates.averaged():
        assert same(tensors, before)
    walk(tensors, iterates, 3)
    iterates.restart(forget=True)
    before = [tensor.clone() for tensor in tensors]
    with iterates.averaged():
        assert same(tensors, before), "nor after a run has been taken back"


@pytest.mark.parametrize("forget", [True, False])
def test_a_window_that_is_begun_anew_has_no_means_behind(forget):
    tensors, iterates = opened()
    for seed in range(3):
        walk(tensors, iterates, 5, seed)
        iterates.next_window(is_best=True)
    walk(tensors, iterates, 2)
    average = held(iterates, "average", tensors)
    iterates.restart(forget=forget)
    assert (iterates.steps, iterates.lengths) == (0, ())
    assert iterates.products(1) == (0.0, 0.0, 0.0)
    assert same(held(iterates, "previous", tensors), [tensor.double() for tensor in tensors])
    assert iterates.age == (0 if forget else 17)
    values = walk(tensors, iterates, 1)
    assert same(held(iterates, "average", tensors), values[0]) == forget
    assert forget or not same(held(iterates, "average", tensors), average)


def test_a_stage_goes_back_to_where_the_first_window_began_or_to_the_mean_of_the_last():
    tensors, iterates = opened([torch.float64])
    begin = tensors[0].clone()
    for _ in range(3):
        (mean,) = mean_of(walk(tensors, iterates, 4))
        stage = iterates.stage()
        stage.set_anchor()
        anchor = tensors[0].clone()
        stage.write(-4.0)
        torch.testing.assert_close(tensors[0], begin, rtol=1e-12, atol=1e-12)
        stage.write(0.0)
        assert same(tensors, [anchor])
        iterates.next_window(is_best=True)
        begin = mean


def test_the_best_mean_is_kept_until_there_is_a_better_one():
    tensors, iterates = opened()
    best = [tensor.double().clone() for tensor in tensors]
    for is_best in (False, True, False, False):
        means = mean_of(walk(tensors, iterates, 4))
        iterates.next_window(is_best=is_best, known=1.0)
        best = means if is_best else best
        assert_close(held(iterates, "best", tensors), best)
    iterates.restart(forget=True)
    assert same(held(iterates, "best", tensors), [tensor.double() for tensor in tensors])


def test_a_checkpoint_of_before_the_best_mean_was_kept_begins_at_the_last_one():
    tensors, iterates = opened()
    walk(tensors, iterates, 3)
    iterates.next_window(is_best=False)
    state = iterates.state_dict(tensors)
    for name in ("best", "since", "returns", "suspected"):
        del state[name]
    loaded = Iterates.from_state_dict(0.1, state, tensors)
    assert same(held(loaded, "best", tensors), held(iterates, "previous", tensors))
    assert loaded.standing == Standing()


def test_it_begins_anew_for_other_tensors_and_goes_on_for_the_same():
    tensors, iterates = opened()
    walk(tensors, iterates, 3)
    iterates.open(list(tensors))
    assert (iterates.steps, iterates.age, iterates.unfinished) == (3, 3, True)
    iterates.open(tensors[1:])
    assert (iterates.steps, iterates.age, iterates.unfinished) == (0, 0, False)
    assert same(held(iterates, "mean", tensors[1:]), [tensor.double() for tensor in tensors[1:]])


# Checkpoints.


@pytest.mark.parametrize("windows", [(), (2,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
def test_what_was_saved_goes_on_bit_for_bit(windows, steps):
    tensors, iterates = opened()
    for length in windows:
        walk(tensors, iterates, length)
        iterates.next_window(is_best=True)
    walk(tensors, iterates, steps)
    state = through_a_file(iterates.state_dict(tensors))
    copies = [tensor.clone() for tensor in tensors]
    loaded = Iterates.from_state_dict(0.1, state, copies)
    for name in ("steps", "age", "lengths", "unfinished"):
        assert getattr(loaded, name) == getattr(iterates, name), name
    for _ in range(3):
        for values, of in ((tensors, iterates), (copies, loaded)):
            walk(values, of, 3)
        assert loaded.products(1) == iterates.products(1)
        for name in TENSORS:
            assert same(held(loaded, name, copies), held(iterates, name, tensors)), name
        loaded.next_window(is_best=True)
        iterates.next_window(is_best=True)


def test_what_is_saved_is_a_copy():
    tensors, iterates = opened()
    walk(tensors, iterates, 2)
    state = iterates.state_dict(tensors)
    kept = [tensor.clone() for name in TENSORS for tensor in state[name]]
    walk(tensors, iterates, 2)
    iterates.next_window(is_best=True)
    assert same([tensor for name in TENSORS for tensor in state[name]], kept)


def test_before_the_first_step_and_after_tensors_were_frozen_the_present_values_are_saved():
    tensors, iterates = opened()
    fresh = Iterates(0.1).state_dict(tensors)
    walk(tensors, iterates, 3)
    state = iterates.state_dict(tensors[1:])
    assert (fresh["steps"], state["steps"], state["age"]) == (0, 0, 0)
    assert len(fresh["mean"]) == 4
    assert same([mean.double() for mean in state["mean"]], [t.double() for t in tensors[1:]])


@pytest.mark.parametrize("name", TENSORS)
def test_the_shapes_are_checked_before_the_first_step_too(name):
    tensor = torch.zeros(3)
    words = "of 1 tensors, this optimizer trains 1, or their shapes differ"
    with pytest.raises(ValueError, match=words):
        Iterates.from_state_dict(0.1, Iterates(0.1).state_dict([tensor]), [torch.zeros(4)])
    state = Iterates(0.1).state_dict([tensor]) | {name: []}
    with pytest.raises(ValueError, match="or their shapes differ"):
        Iterates.from_state_dict(0.1, state, [tensor])


def test_what_is_loaded_may_be_of_another_floating_dtype():
    """The model may have been cast in between; a mean is float32 where it is 16 bits wide."""
    tensors, iterates = opened([torch.float32])
    walk(tensors, iterates, 3)
    narrow = [tensors[0].bfloat16()]
    loaded = Iterates.from_state_dict(0.1, iterates.state_dict(tensors), narrow)
    assert same(held(loaded, "mean", narrow), held(iterates, "mean", tensors))
