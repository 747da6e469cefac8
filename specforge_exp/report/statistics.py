"""Intervals and comparisons by the bootstrap: which differences are larger than chance.

A metric of one run is a mean of quotients (`StratifiedSample`): over strata (data sets), the sum of
what the units (conversations, prompts) gave, divided by the sum of their weights. A resample draws
as many units as a stratum has, with replacement. The draw depends on nothing but the stratum's
place and size, so two runs measured on the same units are resampled together: the difference of
their resampled values is a paired bootstrap, in which what makes a conversation easy or hard
cancels.

Intervals have 95 % and are of percentiles; each comparison stands by itself (no correction for
how many runs are compared).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LEVELS = (2.5, 97.5)
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""
NORMAL = 1.96


@dataclass(frozen=True, eq=False)
class Stratum:
    """What the units of a data set gave."""

    name: str
    totals: np.ndarray
    """[n]"""
    weights: np.ndarray
    """[n]"""


def stratum(name: str, totals: Sequence[float], weights: Sequence[float]) -> Stratum:
    """A stratum from lists.

    Raises:
        ValueError: they have different lengths, no weight, or something that is no finite number.
    """
    both = np.array(totals, float), np.array(weights, float)
    if both[0].shape != both[1].shape or both[0].ndim != 1:
        raise ValueError(f"{len(totals)} totals for {len(weights)} weights")
    if not np.isfinite(both).all() or both[1].sum() <= 0:
        raise ValueError("not all are finite numbers, or all weights are 0")
    return Stratum(name, *both)


@dataclass(frozen=True, eq=False)
class StratifiedSample:
    """What a metric of one run is made of."""

    strata: tuple[Stratum, ...]
    made: str = ""
    """How it was measured; runs measured differently are not paired."""

    @property
    def estimate(self) -> float:
        """mean over strata of sum(totals) / sum(weights)."""
        return float(np.mean([s.totals.sum() / s.weights.sum() for s in self.strata]))

    @property
    def units(self) -> tuple[object, ...]:
        """Equal for two runs that can be paired: the same strata, with as many units each."""
        return (self.made, *((s.name, len(s.totals)) for s in self.strata))


@dataclass(frozen=True, eq=False)
class Spread:
    """An estimate and how far chance might have moved it."""

    value: float
    draws: np.ndarray | None = None
    """[resamples] values of resampled units and seeds; None: only `given` is known."""
    units: tuple[object, ...] = ()
    """Equal for spreads that can be paired."""
    given: tuple[float, float] | None = None
    """An interval that was computed elsewhere."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval, which always contains `value`; None: nothing is known."""
        return self.given if self.draws is None else around(self.value, self.draws)


@dataclass(frozen=True)
class Comparison:
    """A run beside another: `value` is its metric minus the other's."""

    value: float
    interval: tuple[float, float] | None
    """95 % interval of the difference; None where the two cannot be paired."""
    distinguishable: bool | None
    """Paired: 0 is not in `interval`. Otherwise: the two runs' own intervals do not overlap. None:
    a run has no interval."""


def around(value: float, draws: np.ndarray) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of the draws, widened to `value` if it lies outside."""
    finite = draws[np.isfinite(draws)]
    low, high = np.percentile(finite, LEVELS) if len(finite) else (value, value)
    return min(float(low), value), max(float(high), value)


@lru_cache(maxsize=32)
def resampling(units: int, resamples: int, place: int) -> np.ndarray:
    """How often each resample draws each unit, [resamples, units]; the same at every call."""
    generator = np.random.default_rng((place, units))
    shares = np.full(units, 1 / units)
    return generator.multinomial(units, shares, resamples).astype(np.float32)


def spread(sample: StratifiedSample, resamples: int) -> Spread:
    """Bootstrap a sample: value_b = mean over strata of (c_b . totals) / (c_b . weights).

    c_b counts how often resample b drew each unit. Where it drew no weight at all, the value is not
    a number and does not count.
    """
    sums = np.zeros(resamples)
    for place, stratum in enumerate(sample.strata):
        counts_RN = resampling(len(stratum.totals), resamples, place)
        with np.errstate(invalid="ignore", divide="ignore"):
            sums += (counts_RN @ stratum.totals) / (counts_RN @ stratum.weights)
    draws = np.where(np.isfinite(sums / len(sample.strata)), sums / len(sample.strata), np.nan)
    return Spread(sample.estimate, draws, sample.units)


def averaged(intervals: Sequence[tuple[float, float, float]]) -> Spread:
    """A mean of independent estimates (value, low, high) whose units are not known.

    Half-widths add in quadrature: low = mean - sqrt(sum((value_i - low_i)^2)) / n, and so on.
    """
    values, lows, highs = np.array(intervals, float).T
    value, count = float(values.mean()), len(values)
    below, above = np.sqrt(((values - lows) ** 2).sum()), np.sqrt(((highs - values) ** 2).sum())
    return Spread(value, given=(value - float(below) / count, value + float(above) / count))


def over_seeds(spreads: Sequence[Spread], resamples: int) -> Spread:
    """Runs that differ in their seed only: resample seeds, then units.

    value = mean of the S seeds' values. Draw b picks seeds s_1..s_S with replacement:
    value_b = m_b + f(S) * (mean_j value_b(s_j) - m_b), m_b the mean of all seeds at resample b.
    A bootstrap of few values is too narrow, hence f(S) = sqrt(S / (S - 1)) * t(S - 1) / 1.96 with
    Student's t (beyond the table its first-order expansion): wide with two seeds, about 1 with
    many. Seeds without draws count as exact.
    """
    count = len(spreads)
    value = float(np.mean([seed.value for seed in spreads]))
    if count == 1:
        return spreads[0]
    drawn = all(seed.draws is not None and len(seed.draws) == resamples for seed in spreads)
    draws_SR = np.array(
        [seed.draws if drawn else np.full(resamples, seed.value) for seed in spreads], float
    )
    picks_SR = np.random.default_rng((count, resamples)).integers(0, count, (count, resamples))
    picked_R = np.take_along_axis(draws_SR, picks_SR, 0).mean(0)
    mean_R = draws_SR.mean(0)
    student = STUDENT[count - 2] if count - 2 < len(STUDENT) else NORMAL + 2.4 / (count - 1)
    factor = np.sqrt(count / (count - 1)) * student / NORMAL
    units = spreads[0].units if len({seed.units for seed in spreads}) == 1 else ()
    return Spread(value, mean_R + factor * (picked_R - mean_R), units if drawn else ())


def compare(one: Spread, other: Spread) -> Comparison:
    """One run minus another, paired where both were measured on the same units."""
    value = one.value - other.value
    if one.draws is not None and other.draws is not None and one.units and one.units == other.units:
        low, high = around(value, one.draws - other.draws)
        return Comparison(value, (low, high), low > 0 or high < 0)
    if one.interval is None or other.interval is None:
        return Comparison(value, None, None)
    apart = one.interval[0] > other.interval[1] or one.interval[1] < other.interval[0]
    return Comparison(value, None, apart)


def thin(values: np.ndarray, most: int = 200) -> np.ndarray:
    """Positions of at most `most` values that draw the same line; increasing, ends included.

    All of them when they are few enough. Otherwise the values between the ends are cut into
    (most - 2) / 2 parts of equal length, and of each the positions of its smallest and its
    largest value stay: no spike disappears.
    """
    count = len(values)
    if count <= most:
        return np.arange(count)
    positions = {0, count - 1}
    for part in np.array_split(np.arange(1, count - 1), max(1, (most - 2) // 2)):
        positions |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    return np.array(sorted(positions))
