"""Predicts how long a prefill step takes, from the steps that were measured.

    seconds = a + b * tokens + c * pairs            tokens, pairs (query, key): of the busiest rank

Steps of similar size share a bucket and its median time, so that one slow step moves nothing and old sizes stay
known. The fit minimises relative errors; what it underestimated lately is made up for by a factor. Nothing is
trusted far beyond what was measured: at most `GROWTH` times the tokens and pairs of the largest step so far.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import median

import numpy as np
from numpy.typing import NDArray

GROWTH = 4.0
Floats = NDArray[np.float64]


class PrefillTime:
    def __init__(self) -> None:
        self._buckets: dict[tuple[int, int], deque[tuple[float, float, float]]] = {}
        self._ratios: deque[float] = deque(maxlen=16)  # measured / fitted
        self._weights = (0.0, 0.0, 0.0)
        self._is_fitted = True
        self._margin = 1.0
        self._most_tokens = 0.0
        self._most_pairs = 0.0

    def observe(self, tokens: float, pairs: float, seconds: float) -> None:
        if tokens <= 0 or seconds <= 0:
            return
        if self._buckets:
            fitted = self.expected(tokens, pairs)
            self._ratios.append(min(max(seconds / max(fitted, 1e-9), 1.0), 4.0))
            self._margin = sorted(self._ratios)[int(0.8 * len(self._ratios))]
        place = (round(2 * math.log2(tokens)), round(2 * math.log2(pairs + 1)))
        self._buckets.setdefault(place, deque(maxlen=8)).append((tokens, pairs, seconds))
        self._most_tokens = max(self._most_tokens, tokens)
        self._most_pairs = max(self._most_pairs, pairs)
        self._is_fitted = False  # until it is asked, which is not while somebody waits for this step's tokens

    def expected(self, tokens: float, pairs: float) -> float:
        """Seconds, as likely more as less."""
        if not self._is_fitted:
            self._fit()
        a, b, c = self._weights
        return a + b * tokens + c * pairs

    def predict(self, tokens: float, pairs: float) -> float:
        """Seconds, on the careful side; infinite for sizes too far from what was measured."""
        if tokens > GROWTH * self._most_tokens or pairs > GROWTH * self._most_pairs:
            return math.inf
        return self.expected(tokens, pairs) * self._margin

    def largest(self, limit: float, most: int, size: Callable[[int], tuple[float, float]]) -> int:
        """The largest n in [0, most] whose size(n) = (tokens, pairs), growing with n, is predicted within limit."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.predict(*size(middle)) <= limit:
                low = middle
            else:
                high = middle - 1
        return low

    def _fit(self) -> None:
        rows = [
            (1.0, *(sum(s[i] for s in bucket) / len(bucket) for i in (0, 1)), median(s[2] for s in bucket))
            for bucket in self._buckets.values()
        ]
        table = np.array(rows)
        self._weights = _non_negative_fit(table[:, :3] / table[:, 3:])
        self._is_fitted = True


def _non_negative_fit(features: Floats) -> tuple[float, float, float]:
    """Weights >= 0 that bring features [n, 3] @ weights near 1: least squares, dropping the most negative in turn."""
    scale = np.maximum(features.max(axis=0), 1e-300)
    kept = [0, 1, 2]
    weights = np.zeros(3)
    while kept:
        found = np.linalg.lstsq(features[:, kept] / scale[kept], np.ones(len(features)), rcond=1e-6)[0]
        if found.min() >= 0:
            weights[kept] = found / scale[kept]
            break
        del kept[int(found.argmin())]
    return float(weights[0]), float(weights[1]), float(weights[2])
