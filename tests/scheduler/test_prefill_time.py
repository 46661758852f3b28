from __future__ import annotations

import math
import random

import pytest

from scheduler.prefill_time import GROWTH, PrefillTime

A, B, C = 0.02, 3e-4, 4e-8


def truth(tokens: float, pairs: float) -> float:
    return A + B * tokens + C * pairs


def observe_prefill(model: PrefillTime, chunk: int, length: int, noise: float = 0.0, outliers: float = 0.0) -> None:
    rng = random.Random(0)
    for start in range(0, length, chunk):
        pairs = chunk * (start + chunk / 2)
        factor = 10.0 if rng.random() < outliers else rng.lognormvariate(0, noise)
        model.observe(chunk, pairs, truth(chunk, pairs) * factor)


def test_nothing_is_known_at_first() -> None:
    assert PrefillTime().predict(1, 1) == math.inf
    assert PrefillTime().largest(100.0, 1000, lambda n: (n, n)) == 0


def test_exact_measurements_are_reproduced() -> None:
    model = PrefillTime()
    observe_prefill(model, 256, 8192)
    observe_prefill(model, 1024, 16384)
    for tokens, start in ((512, 0), (2048, 10_000), (100, 16_000)):
        pairs = tokens * (start + tokens / 2)
        assert model.predict(tokens, pairs) == pytest.approx(truth(tokens, pairs), rel=0.05)


def test_noise_and_outliers_move_little() -> None:
    model = PrefillTime()
    observe_prefill(model, 256, 32768, noise=0.2, outliers=0.03)
    observe_prefill(model, 1024, 65536, noise=0.2, outliers=0.03)
    for tokens, start in ((512, 1000), (1024, 60_000), (2048, 10_000)):
        pairs = tokens * (start + tokens / 2)
        assert 0.8 < model.predict(tokens, pairs) / truth(tokens, pairs) < 2.0


def test_a_slower_machine_is_noticed_soon() -> None:
    model = PrefillTime()
    observe_prefill(model, 512, 16384)
    for _ in range(8):
        model.observe(512, 512 * 8000, 2.0 * truth(512, 512 * 8000))
    tokens, pairs = 600, 600 * 10_000
    assert model.predict(tokens, pairs) > 1.4 * truth(tokens, pairs)


def test_nothing_far_beyond_the_measured_is_trusted() -> None:
    model = PrefillTime()
    model.observe(100, 5000, 0.05)
    assert model.predict(GROWTH * 100, 5000) < math.inf
    assert model.predict(GROWTH * 100 + 1, 5000) == math.inf
    assert model.predict(100, GROWTH * 5000 + 1) == math.inf


def test_largest_is_the_largest_within_the_limit() -> None:
    model = PrefillTime()
    observe_prefill(model, 1024, 16384)
    start = 5000

    def size(n: int) -> tuple[float, float]:
        return n, n * (start + n / 2)

    best = model.largest(0.5, 4096, size)
    assert model.predict(*size(best)) <= 0.5 < model.predict(*size(best + 1))
    assert model.largest(0.5, 100, size) == 100
    assert model.largest(0.001, 4096, size) == 0


def test_collinear_measurements_do_not_break_the_fit() -> None:
    model = PrefillTime()
    for _ in range(20):
        model.observe(64, 2048, 0.1)
    assert model.predict(64, 2048) == pytest.approx(0.1, rel=0.01)
    assert 0.0 < model.predict(32, 1024) <= 0.1
