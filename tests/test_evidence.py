"""The error of a paired difference is as large as the difference is uncertain."""

import itertools
import math

import numpy as np
import pytest

from fastforward_optim.search.evidence import Paired, Rows, student_factor


def rows(sums, weights):
    return Rows(tuple(map(float, sums)), tuple(map(float, weights)))


def draw(generator, units, *, even=False):
    """Examples of many lengths whose losses differ much, and fall by little from anchor on."""
    weights = np.full(units, 50.0) if even else generator.integers(20, 200, units).astype(float)
    level = generator.normal(2.0, 0.5, units)
    change = generator.normal(-0.01, 0.02, units)
    return rows(level * weights, weights), rows((level + change) * weights, weights)


def reference(anchor, candidate):
    """Cochran's ratio estimator and its standard error, deviation by deviation."""
    w, d = np.array(anchor.weights), np.subtract(candidate.sums, anchor.sums)
    n, ratio = len(w), d.sum() / w.sum()
    variance = ((d - ratio * w) ** 2).sum() / (n - 1) / n
    return ratio, math.sqrt(variance) / w.mean() * student_factor(n - 1)


@pytest.mark.parametrize("units", [2, 3, 5, 32, 500])
def test_difference_and_error_are_those_of_the_ratio_estimator(units):
    pair = draw(np.random.default_rng(units), units)
    paired = Paired.of(*pair)
    assert (paired.difference, paired.error) == pytest.approx(reference(*pair), rel=1e-8)


def test_the_difference_is_that_of_the_mean_losses():
    anchor, candidate = draw(np.random.default_rng(0), 7)
    means = [sum(rows.sums) / sum(rows.weights) for rows in (anchor, candidate)]
    assert Paired.of(anchor, candidate).difference == pytest.approx(means[1] - means[0])


def test_pairs_tell_far_more_than_two_means_do():
    """Examples differ by much more than a step changes any of them."""
    anchor, candidate = draw(np.random.default_rng(0), 32)
    levels = np.divide(anchor.sums, anchor.weights)
    assert Paired.of(anchor, candidate).error < 0.1 * levels.std() / math.sqrt(32)


@pytest.mark.parametrize("units", [2, 3, 4, 8, 32])
def test_an_interval_of_two_errors_covers_the_truth_19_times_in_20(units):
    generator = np.random.default_rng(0)
    trials = 4000
    hits = 0
    for _ in range(trials):
        paired = Paired.of(*draw(generator, units, even=True))
        hits += abs(paired.difference + 0.01) <= 1.96 * paired.error
    assert hits / trials == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / trials))


def test_units_of_very_unequal_size_are_covered_nearly_as_often():
    generator = np.random.default_rng(0)
    trials = 4000
    hits = 0
    for _ in range(trials):
        paired = Paired.of(*draw(generator, 8))
        hits += abs(paired.difference + 0.01) <= 1.96 * paired.error
    assert 0.90 < hits / trials < 0.97


# Of any table of Student's t, two-sided 95 %.
@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (6, 2.4469), (7, 2.3646),
     (10, 2.2281), (31, 2.0395), (100, 1.9840), (1e6, 1.9600)],
)  # fmt: skip
def test_few_units_count_as_the_little_that_they_are(degrees, quantile):
    assert student_factor(degrees) * 1.959964 == pytest.approx(quantile, rel=2e-4)


def test_parts_of_several_ranks_are_together_what_the_whole_is():
    anchor, candidate = draw(np.random.default_rng(1), 33)
    cuts = [0, 1, 1, 20, 33]  # one rank has a single unit, another none
    parts = [
        Paired.of(
            *(Rows(r.sums[a:b], r.weights[a:b]) for r in (anchor, candidate)),
        )
        for a, b in itertools.pairwise(cuts)
    ]
    whole = Paired.of(anchor, candidate)
    assert Paired.combine(parts) == pytest.approx(whole, rel=1e-12)
    assert Paired.combine(parts).error == pytest.approx(whole.error, rel=1e-9)
    assert Paired.combine([]) == Paired()


@pytest.mark.parametrize("units", [0, 1])
def test_fewer_than_two_units_have_no_known_error(units):
    paired = Paired.of(*draw(np.random.default_rng(0), units))
    assert paired.error == math.inf
    assert math.isnan(paired.difference) == (units == 0)


def test_units_without_labels_are_no_evidence():
    anchor, candidate = draw(np.random.default_rng(0), 5)
    empty = (
        Rows((*r.sums, sums), (*r.weights, 0.0))
        for r, sums in ((anchor, 0.0), (candidate, math.nan))
    )
    assert Paired.of(*empty) == Paired.of(anchor, candidate)
    nothing = Paired.of(rows([0, 0], [0, 0]), rows([0, 0], [0, 0]))
    assert nothing == Paired()


@pytest.mark.parametrize(
    ("anchor", "candidate", "difference"),
    [
        ([1, 2, 3], [1, math.inf, 3], math.inf),
        ([1, math.inf, 3], [1, 2, 3], -math.inf),
        ([1, 2, 3], [1, math.nan, 3], math.nan),
        ([1, math.inf, 3], [1, math.inf, 3], math.nan),
        ([1, math.inf, 3], [math.inf, 2, 3], math.nan),
        ([1, 2, 3], [1e308, 1e308, 1e308], math.inf),
    ],
)
def test_losses_that_are_no_numbers_are_no_evidence(anchor, candidate, difference):
    paired = Paired.of(rows(anchor, [1, 2, 1]), rows(candidate, [1, 2, 1]))
    assert paired.difference == pytest.approx(difference, nan_ok=True)
    assert paired.error == math.inf
    assert Paired.combine([paired, Paired.of(*draw(np.random.default_rng(0), 5))]).error == math.inf


def test_finite_losses_too_large_to_square_have_no_known_error():
    paired = Paired.of(rows([0, 0], [1, 1]), rows([1e200, 2e200], [1, 1]))
    assert paired.difference == pytest.approx(1.5e200)
    assert paired.error == math.inf


def test_the_same_change_everywhere_is_certain():
    weights = [3, 70, 12]
    paired = Paired.of(rows([0, 0, 0], weights), rows([0.1 * w for w in weights], weights))
    assert paired.difference == pytest.approx(0.1)
    assert paired.error == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    "candidate", [rows([2, 3, 4], [2, 2, 2]), rows([3, 6], [2, 4])], ids=["number", "weights"]
)
def test_measurements_of_other_units_are_compared_by_their_means_alone(candidate):
    anchor = rows([4, 8], [3, 3])
    paired = Paired.of(anchor, candidate)
    expected = sum(candidate.sums) / sum(candidate.weights) - 2
    assert (paired.n, paired.difference) == (1, pytest.approx(expected))
    assert paired.error == math.inf
    assert Paired.of(anchor, rows([], [])) == Paired()
