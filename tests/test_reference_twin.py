"""The fast stage and its line searches, beside slow ones written from the definition.

``make test`` compares 1,160 random ones, ``make soak`` ten times as many.
"""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastforward_optim import BracketSearch, RepeatSearch
from fastforward_optim.stage.stage import Stage, copies, grouped

from . import reference_stage as reference
from .conftest import same
from .twins import is_candidate

TIMES = 10 if settings.get_current_profile_name() == "soak" else 1

# What measures lowest is taken: how sure that has to be is in test_line_search.py.
BRACKETS = st.builds(
    BracketSearch, st.sampled_from([1, 6.5, 1e4]), st.integers(2, 20), st.just(0.0)
)
REPEATS = st.builds(RepeatSearch, st.sampled_from([1, 6.5, 1000]), st.integers(2, 30))
SEARCHES = st.one_of(BRACKETS, REPEATS)


def plain(search, last_tau):
    """The reference's search of the same kind and limits."""
    if isinstance(search, RepeatSearch):
        return reference.repeat_search(search.max_tau, search.max_trials)
    return reference.bracket_search(search.max_tau, search.max_trials, last_tau)


LANDSCAPES = ["parabola", "parabola in noise", "noise", "flat", "tiny noise", "quartic", "line"]
LANDSCAPES += ["stairs", "curved", "negative", "edge"]


@st.composite
def landscapes(draw):
    """A loss over tau that may be anything; the same for the same tau."""
    name = draw(st.sampled_from(LANDSCAPES))
    seed = draw(st.integers(0, 2**31))
    holes = draw(st.sampled_from([0.0, 0.0, 0.1, 0.5]))
    place = draw(st.sampled_from([0.3, 1.0, 2.7, 19.0, 333.0, 1e5, -0.4, -3.0, -11.0]))
    depth = draw(st.sampled_from([1.0, 1e-2, 1e-4, 50.0]))

    def loss(tau):
        noise = random.Random(f"{seed} {tau!r}")
        if noise.random() < holes:
            return noise.choice([math.nan, math.inf, -math.inf])
        gauss, x = noise.gauss(0, 1), tau / place
        return {
            "parabola": 3 + depth * ((x - 1) ** 2 - 1),
            "parabola in noise": 3 + depth * ((x - 1) ** 2 - 1 + 0.1 * gauss),
            "noise": gauss,
            "flat": 3.0,
            "tiny noise": 3 + 1e-4 * gauss,
            "quartic": 3 + depth * (x**4 - 2 * x),
            "line": 3 - 0.01 * depth * tau,
            "stairs": 3 - 0.1 * math.floor(tau) if abs(tau) < abs(place) else 9.0,
            "curved": 3 - depth * math.atan(x),
            "negative": depth * ((x - 1) ** 2 - 1) - 3,
            "edge": 3 - 0.1 * tau if tau < place else math.inf,
        }[name]

    return loss


@settings(max_examples=TIMES * 600)
@given(SEARCHES, landscapes(), st.sampled_from([0.0, 1.5, 4.5, 40.0, 2000.0]))
def test_each_line_search_tries_what_its_description_says(search, loss, last_tau):
    """The same points in the same order, and the same one in the end.

    The reference goes on from the tau that was really tried, so that a difference in its last
    digit does not grow.
    """
    twin = plain(search, last_tau)
    wanted = [next(twin)]
    found = []

    def evaluate(tau):
        assert not found, "the reference has stopped"
        assert tau == pytest.approx(wanted[-1], rel=1e-6, abs=1e-9)
        measured = loss(tau)
        try:
            wanted.append(twin.send((tau, measured)))
        except StopIteration as stop:
            found.append(stop.value)
        return measured

    best = search(evaluate, last_tau)
    assert found, f"the reference goes on at {wanted[-1]}"
    assert best == found[0]


def quadratic(seed, dtypes):
    """Tensors before and after a step, and a convex loss of their values in float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = [(2, 3), (), (4,), (1, 5)][: len(dtypes)]
    befores = [randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    anchors = [before + (0.1 * randn(before.shape)).to(before.dtype) for before in befores]
    targets = [
        anchor.double() + 3 * (anchor - before).double() + 0.05 * randn(before.shape)
        for before, anchor in zip(befores, anchors, strict=True)
    ]

    def loss_of(values):
        distances = [
            float(((value.double() - target) ** 2).sum())
            for value, target in zip(values, targets, strict=True)
        ]
        return 1.0 + math.fsum(distances)

    return befores, anchors, loss_of


def fast_stage(befores, anchors, steps):
    """The library's stage on parameters that have just been moved there."""
    tensors = [torch.nn.Parameter(before.clone()) for before in befores]
    with torch.no_grad():
        stage = Stage(tensors, copies(grouped(tensors)) if steps > 1 else None, steps)
        for tensor, anchor in zip(tensors, anchors, strict=True):
            tensor.copy_(anchor)
    assert stage.set_anchor()
    return stage, tensors


@settings(max_examples=TIMES * 250)
@given(SEARCHES, st.integers(0, 2**31), st.integers(1, 4), st.sampled_from([1, 1, 3, 6]))
def test_a_stage_in_float64_tries_and_finds_what_the_reference_does(search, seed, count, steps):
    """Each on its own, tensors and search: equal within the rounding of float64.

    A vertex is a quotient of differences of losses: some digits are lost there.
    """
    befores, anchors, loss_of = quadratic(seed, [torch.float64] * count)
    stage, tensors = fast_stage(befores, anchors, steps)
    tau, trials = stage.search(lambda: loss_of(tensors), search, 0.0)
    expected, expected_trials = reference.run_stage(
        befores, anchors, loss_of, plain(search, 0.0), steps
    )
    assert [t for t, _ in trials] == pytest.approx([t for t, _ in expected_trials], rel=1e-7)
    assert [x for _, x in trials] == pytest.approx([x for _, x in expected_trials], rel=1e-9)
    assert tau == pytest.approx(expected, rel=1e-7)
    for tensor, before, anchor in zip(tensors, befores, anchors, strict=True):
        exact = reference.candidate(before, anchor, tau, steps)
        assert is_candidate(tensor.detach(), before, anchor, tau / steps)
        torch.testing.assert_close(tensor.detach(), exact, rtol=1e-12, atol=1e-12)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@settings(max_examples=TIMES * 250)
@given(
    st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4),
    st.integers(0, 2**31),
    st.lists(
        st.floats(-1, 1000, allow_subnormal=False) | st.sampled_from([0.5, 1.0, 7.0]),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([1, 1, 3, 64]),
    st.sampled_from([1.0, 1e-4, 1e3]),
)
def test_candidates_are_the_references_up_to_one_rounding(dtypes, seed, multiples, steps, scale):
    """In the tensor's type: within half a unit in the last place, and what ``is_candidate`` adds.

    That is at most u * (1 + 4 * |tau|) * |anchor - before|, with u = 2**-24 for 16-bit tensors too:
    for these half a unit is 2**-9 or 2**-12 of the value, and next to it the rest is nothing as
    long as |tau| times the step is not thousands of times the value.
    """
    befores, anchors, _ = quadratic(seed, dtypes)
    befores = [(scale * before.double()).to(before.dtype) for before in befores]
    anchors = [(scale * anchor.double()).to(anchor.dtype) for anchor in anchors]
    stage, tensors = fast_stage(befores, anchors, steps)
    for multiple in multiples:
        tau = multiple * steps
        stage.write(tau)
        for tensor, before, anchor in zip(tensors, befores, anchors, strict=True):
            value = tensor.detach()
            assert is_candidate(value, before, anchor, tau / steps)
            if value.dtype in (torch.bfloat16, torch.float16):
                exact = reference.candidate(before, anchor, tau, steps)
                rounded = exact.to(value.dtype).double()
                unit = torch.finfo(value.dtype).eps * exact.abs() + 1e-7
                assert ((value.double() - rounded).abs() <= 1.001 * unit)[rounded.isfinite()].all()
    stage.write(0.0)
    assert same([tensor.detach() for tensor in tensors], anchors)
    stage.write(-float(steps))
    assert same([tensor.detach() for tensor in tensors], befores)
