"""A measured number with its uncertainty, and how one is computed from rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from scipy import stats

Z = 1.959964  # 95 % of a normal distribution is within so many standard deviations
EQUAL = 1e-9  # a smaller standard error of a share is of rows that agree, but for rounding


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number that an instrument found.

    Args:
      measure: what was measured, e.g. `loss` or `accuracy`.
      value: the number, in `unit`.
      low, high: the ends of its 95 % confidence interval; both are `value` where nothing was sampled.
      unit: e.g. `nats/token`, `bytes`; `share`: from 0 to 1.
      count: how many independent samples the number is of (rows, prompts).
      at: where it was measured, e.g. {"distance": 128}; empty: over everything.
      sums: of a mean, each row's (weighted sum of values, sum of weights); models measured on the same rows are compared by them.
    """

    measure: str
    value: float
    low: float
    high: float
    unit: str = ""
    count: int = 0
    at: Mapping[str, float | int | str] = dataclasses.field(default_factory=dict)
    sums: tuple[tuple[float, float], ...] = ()

    @property
    def key(self) -> tuple:
        """What was measured and where, to find the same measurement of another model."""
        return self.measure, *sorted(self.at.items())


def exact(measure: str, value: float, unit: str = "", **at: float | int | str) -> Measurement:
    """Returns a number that is not a sample: a count of bytes or parameters."""
    return Measurement(measure, value, value, value, unit, 1, at)


def mean_and_error(totals: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ratio of sums over rows and its standard error (linearized), of rows that were drawn independently.

    Args:
      totals: [..., rows], each row's weighted sum of values.
      weights: [rows], each row's sum of weights; their sum is positive.

    Returns:
      The mean and its standard error, [...]; the error of a single row is infinite.
    """
    mean, rows = totals.sum(-1) / weights.sum(), int((weights > 0).sum())
    if rows < 2:
        return mean, np.full_like(mean, np.inf)
    spread = np.square(totals - mean[..., None] * weights).sum(-1) * rows / (rows - 1)
    return mean, np.sqrt(spread) / weights.sum()


def half_width(error: float, rows: int) -> float:
    """Returns half the width of Student's 95 % interval of a mean over rows with this standard error; infinite for one row."""
    return float(stats.t.ppf(0.975, rows - 1) * error) if rows > 1 else np.inf


def weighted_mean(
    measure: str, values: np.ndarray, weights: np.ndarray, unit: str = "", *, share: bool = False, **at: float | int | str
) -> Measurement | None:
    """Returns sum(weights * values) / sum(weights) over rows that were drawn independently.

    The standard error is that of a ratio of sums over rows (linearized), because the tokens of one row are not independent; the
    interval is Student's, because a few rows know their own spread badly. For a share the interval is Wilson's, so that it is
    right near 0 and 1, with the number of samples that has this standard error, reduced by the square of Student's quantile over
    the normal one (Korn and Graubard, 1998), and at most one sample per value that counts; where all rows agree, their number.

    Args:
      values, weights: [rows, ...]. Values of weight 0 are ignored, whatever they are.
      share: the values are from 0 to 1.
      at: see `Measurement`.

    Returns:
      None if no weight is positive.
    """
    axes = tuple(range(1, values.ndim))
    counted = np.where(weights > 0, values, 0).astype(np.float64)
    numerators = np.asarray(np.sum(counted * weights, axis=axes))
    denominators = np.asarray(np.sum(weights, axis=axes, dtype=np.float64))
    rows = int((denominators > 0).sum())
    if rows == 0:
        return None
    mean, error = map(float, mean_and_error(numerators, denominators))
    sums = tuple((float(a), float(b)) for a, b in zip(np.atleast_1d(numerators), np.atleast_1d(denominators), strict=True))
    half = half_width(error, rows)
    if not share:
        return Measurement(measure, mean, mean - half, mean + half, unit, rows, at, sums)
    samples = float(rows)
    if EQUAL < error < np.inf and 0 < mean < 1:
        samples = min(mean * (1 - mean) * (Z / half) ** 2, float((weights > 0).sum()))
    center = (mean + Z**2 / (2 * samples)) / (1 + Z**2 / samples)
    half = Z / (1 + Z**2 / samples) * float(np.sqrt(mean * (1 - mean) / samples + Z**2 / (4 * samples**2)))
    return Measurement(measure, mean, center - half, center + half, "share", rows, at, sums)


def difference(one: Measurement, other: Measurement) -> Measurement | None:
    """Returns one - other of two means over the same rows, with the interval of paired rows.

    What makes some rows harder than others for every model drops out, so that differences far smaller than the two intervals
    can be seen. The standard error is that of a difference of ratios of sums over rows (linearized), the interval Student's. Where
    two shares differ equally in every row, as those of two models that are always right, it is as wide as that of a share which
    no row has: equal rows do not prove equal models.

    Returns:
      None if the two are not means over the same rows: another number of them, or other weights.
    """
    first, second = (np.array(m.sums, np.float64).reshape(-1, 2) for m in (one, other))
    if one.key != other.key or first.shape != second.shape or not len(first) or (first[:, 1] != second[:, 1]).any():
        return None
    weights = first[:, 1]
    value, error = map(float, mean_and_error(first[:, 0] - second[:, 0], weights))
    rows = int((weights > 0).sum())
    half = Z**2 / (rows + Z**2) if one.unit == "share" and error < EQUAL else half_width(error, rows)
    return Measurement(one.measure, value, value - half, value + half, one.unit, rows, one.at)


def buckets(length: int, first: int = 8) -> list[tuple[int, int]]:
    """Returns ranges (low, high] that double and cover 1 ... length: (0, first], (first, 2 first], ... , the last to length."""
    edges = [0, first]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    edges[-1] = max(length, 1)
    return list(zip(edges[:-1], edges[1:], strict=True))
