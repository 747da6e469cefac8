"""Intervals and comparisons: the laws they keep, and how often they are right."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from specforge_exp.report.statistics import (
    Spread,
    StratifiedSample,
    averaged,
    compare,
    over_seeds,
    spread,
    stratum,
    thin,
)

numbers = st.floats(-100, 100)


@st.composite
def samples(draw: st.DrawFn, size: int | None = None) -> StratifiedSample:
    count = size or draw(st.integers(1, 30))
    totals = draw(st.lists(numbers, min_size=count, max_size=count))
    weights = draw(st.lists(st.integers(0, 50), min_size=count, max_size=count))
    weights[0] += 1
    return StratifiedSample((stratum("held-out", totals, weights),))


def normal(generator: np.random.Generator, mean: float, count: int = 50) -> StratifiedSample:
    slots = generator.integers(20, 60, count)
    return StratifiedSample((stratum("x", generator.normal(mean, 0.5, count) * slots, slots),))


@settings(deadline=None)
@given(samples(), st.integers(1, 60))
def test_interval_contains_the_estimate(sample: StratifiedSample, resamples: int) -> None:
    found = spread(sample, resamples)
    assert found.interval is not None
    assert found.interval[0] <= found.value == sample.estimate <= found.interval[1]


@settings(deadline=None)
@given(samples())
def test_a_run_beside_itself_differs_by_nothing(sample: StratifiedSample) -> None:
    one, again = spread(sample, 40), spread(sample, 40)
    found = compare(one, again)
    assert (found.value, found.interval, found.distinguishable) == (0, (0, 0), False)
    seeds = over_seeds([one, spread(StratifiedSample(sample.strata[:1]), 40)], 40)
    assert compare(seeds, seeds).interval == (0, 0)


@settings(deadline=None)
@given(samples(12), samples(12))
def test_comparing_the_other_way_round_changes_the_sign(
    one: StratifiedSample, other: StratifiedSample
) -> None:
    there, back = (compare(spread(a, 50), spread(b, 50)) for a, b in ((one, other), (other, one)))
    assert there.interval and back.interval
    assert there.value == pytest.approx(-back.value)
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]), abs=1e-6)
    assert there.distinguishable == back.distinguishable


def test_estimate_is_a_quotient_of_sums_and_a_mean_over_data_sets() -> None:
    one = stratum("a", [6.0, 2.0], [2, 2])
    assert StratifiedSample((one,)).estimate == 2
    assert StratifiedSample((one, stratum("b", [4.0], [1]))).estimate == 3


def test_a_conversation_without_slots_counts_for_nothing() -> None:
    with_it = StratifiedSample((stratum("a", [3.0, 0.0, 5.0], [1, 0, 1]),))
    found = spread(with_it, 500)
    assert found.value == 4
    assert found.draws is not None and set(np.unique(found.draws[~np.isnan(found.draws)])) <= {
        3.0, 5.0, 4.0, 11 / 3, 13 / 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("totals", "weights"),
    [([1.0], [1, 2]), ([1.0], [0]), ([float("nan")], [1]), ([], [])],
)
def test_what_is_no_sample_is_refused(totals: list[float], weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"totals|finite"):
        stratum("a", totals, weights)


def test_intervals_cover_the_truth() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        found = spread(normal(generator, 3.0), 400).interval
        assert found
        hits += found[0] <= 3.0 <= found[1]
    assert 0.89 <= hits / 300 <= 0.99


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_over_seeds_cover_what_another_seed_would_give(seeds: int) -> None:
    """The seeds' spread dominates here; conversations alone would cover a third."""
    generator = np.random.default_rng(seeds)
    hits, alone = 0, 0
    for _ in range(200):
        runs = [spread(normal(generator, 3 + generator.normal(0, 0.3)), 300) for _ in range(seeds)]
        found, first = over_seeds(runs, 300).interval, runs[0].interval
        assert found and first
        hits += found[0] <= 3.0 <= found[1]
        alone += first[0] <= 3.0 <= first[1]
    assert hits / 200 >= 0.88
    assert alone / 200 <= 0.6


def test_pairing_sees_what_separate_intervals_hide() -> None:
    generator = np.random.default_rng(5)
    slots, hard = generator.integers(20, 60, 80), generator.normal(0, 1, 80)

    def run(mean: float) -> Spread:
        lengths = (mean + hard + generator.normal(0, 0.05, 80)) * slots
        return spread(StratifiedSample((stratum("x", lengths, slots),)), 1000)

    one, other = run(3.0), run(3.1)
    assert one.interval and other.interval and one.interval[1] > other.interval[0]
    assert compare(one, other).distinguishable is True
    apart = Spread(other.value, other.draws, ("other", 80))
    assert compare(one, apart).interval is None
    assert compare(one, apart).distinguishable is False


def test_runs_that_were_measured_differently_are_not_paired() -> None:
    one = stratum("x", [1.0, 2.0], [1, 1])
    greedy, sampled = (
        StratifiedSample((one,), "temperature 0"),
        StratifiedSample((one,), "temperature 1"),
    )
    assert compare(spread(greedy, 10), spread(sampled, 10)).interval is None


def test_nothing_is_said_without_intervals() -> None:
    assert compare(Spread(3.0), Spread(2.0)).distinguishable is None


def test_averaged_adds_in_quadrature() -> None:
    found = averaged([(3.0, 2.7, 3.3), (5.0, 4.6, 5.4)])
    assert found.value == 4
    assert found.interval == pytest.approx((3.75, 4.25))


@pytest.mark.parametrize("count", [2, 3, 8, 10, 11, 30])
def test_seeds_without_resamples_spread_as_students_t(count: int) -> None:
    values = np.random.default_rng(count).normal(3.0, 0.1, count)
    found = over_seeds([Spread(float(value)) for value in values], 20_000)
    assert found.value == pytest.approx(values.mean()) and found.draws is not None
    error = values.std(ddof=1) / count**0.5
    assert found.draws.std() / error == pytest.approx(t.ppf(0.975, count - 1) / 1.96, rel=0.03)


@settings(deadline=None)
@given(st.lists(numbers, max_size=700), st.integers(4, 200))
def test_thinning_keeps_ends_order_and_extremes(values: list[float], most: int) -> None:
    curve = np.array(values)
    kept = thin(curve, most)
    assert len(kept) <= max(most, 0)
    assert (np.diff(kept) > 0).all()
    if len(curve):
        assert kept[0] == 0 and kept[-1] == len(curve) - 1
        assert curve[kept].max() == curve.max() and curve[kept].min() == curve.min()
    if len(curve) <= most:
        assert len(kept) == len(curve)
