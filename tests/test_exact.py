"""``python -m benchmarks line-search``: our searches beside an exact one."""

import pytest

from benchmarks.comparison.comparison import Comparison
from benchmarks.measurements import line_search as exact

from .conftest import tiny_lora
from .test_benchmarks import SETTING, random_splits


@pytest.mark.parametrize("best", [0.3, 7.0, 900.0])
def test_the_exact_line_search_finds_the_minimum(best):
    def function(tau):
        return 2 + ((tau - best) / best) ** 2

    losses = {tau: function(tau) for tau in (0.0, 1.0, 4.0)}

    def once(tau):
        return losses.setdefault(tau, function(tau))

    assert exact.refine(once, losses) == pytest.approx(2, abs=1e-4)


def test_a_search_finds_no_more_than_the_exact_one():
    comparison = Comparison(tiny_lora(), random_splits(), SETTING)
    found = exact.measure(comparison, "bracket", 1e-4, 9)
    assert len(found) >= 2
    assert all(0 <= one.decrease <= one.exact + 1e-12 for one in found)
    stages, trials, share = exact.summary(found)
    assert stages == len(found)
    assert trials >= 2
    assert 0 <= share <= 1, "on evidence only, which random tokens may not give"
