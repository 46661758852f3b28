"""Prometheus metrics. Gauges and totals are read from the scheduler when scraped; latencies are observed here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from scheduler.stats import Stats

# long prefills take minutes
LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 100, 200, 400, 600, 900, 1200, 1800)
TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10)


class Metrics:
    def __init__(self, model_name: str, stats: Callable[[], Stats]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # each would double its counter with a start time
        self._registry = CollectorRegistry()
        self._registry.register(_SchedulerCollector(model_name, stats))
        self._labels = {"model_name": model_name}
        self._first = self._histogram("time_to_first_token_seconds", "Arrival to first token", LATENCY_BUCKETS)
        self._between = self._histogram("inter_token_latency_seconds", "Between tokens", TOKEN_BUCKETS)
        self._whole = self._histogram("e2e_request_latency_seconds", "Arrival to last token", LATENCY_BUCKETS)
        self._requests = self._counter("num_requests", "Completions that ended, by reason", "finish_reason")
        self._aborted = self._counter("num_aborted_requests", "Completions whose client left or aborted them")
        self._responses = self._counter("http_responses", "HTTP responses", "path", "status")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"sp:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
        return histogram.labels(**self._labels)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(f"sp:{name}", text, ["model_name", *labels], registry=self._registry)
        return counter if labels else counter.labels(**self._labels)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def next_tokens(self, seconds: float, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._between.observe(seconds / num_tokens)

    def finished(self, reason: str, seconds: float) -> None:
        self._whole.observe(seconds)
        self._requests.labels(**self._labels, finish_reason=reason).inc()

    def aborted(self) -> None:
        self._aborted.inc()
        self._requests.labels(**self._labels, finish_reason="abort").inc()

    def failed(self) -> None:
        self._requests.labels(**self._labels, finish_reason="error").inc()

    def responded(self, path: str, status: int) -> None:
        self._responses.labels(**self._labels, path=path, status=str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _SchedulerCollector(Collector):
    """One snapshot of the scheduler for each scrape."""

    def __init__(self, model_name: str, stats: Callable[[], Stats]) -> None:
        self._model_name = model_name
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return []  # the registry need not ask the scheduler for names

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield from self._gauges(stats)
        yield from self._totals(stats)
        yield from self._plans(stats)
        yield from self._ranks(stats)

    def _gauges(self, stats: Stats) -> Iterable[Metric]:
        gauges = {
            "num_running_reqs": ("Requests being computed", stats.num_running),
            "num_queue_reqs": ("Requests that wait", stats.num_waiting),
            "num_pages": ("KV pages of all ranks", stats.num_pages),
            "pages_used": ("KV pages of live requests", stats.pages_used),
            "pages_cached": ("KV pages kept for their prefix alone", stats.pages_cached),
            "token_usage": ("Share of KV pages in use", stats.pages_used / max(1, stats.num_pages)),
            "max_request_tokens": ("Longest request that fits", stats.capacity_tokens),
        }
        for name, (text, value) in gauges.items():
            family = GaugeMetricFamily(f"sp:{name}", text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family

    def _totals(self, stats: Stats) -> Iterable[Metric]:
        totals = {
            "prompt_tokens": ("Prompt tokens of accepted requests", stats.prompt_tokens),
            "cached_tokens": ("Prompt tokens found in the prefix cache", stats.cached_tokens),
            "generation_tokens": ("Tokens generated", stats.generated_tokens),
            "num_retractions": ("Requests put back into the queue for want of pages", stats.num_retractions),
        }
        for name, (text, value) in totals.items():
            family = CounterMetricFamily(f"sp:{name}", text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
        steps = CounterMetricFamily("sp:num_steps", "Forward passes", labels=["model_name", "kind"])
        for kind, value in stats.num_steps.items():
            steps.add_metric([self._model_name, str(kind)], value)
        yield steps

    def _plans(self, stats: Stats) -> Iterable[Metric]:
        """What the steps ran: in total by plan, and the newest choice with its reason."""
        families = {
            "num_steps": "Forward passes by plan; + joins plans that ran side by side",
            "num_tokens": "New tokens of these steps",
            "seconds": "Time of these steps",
            "predicted_seconds": "What the planner predicted, where it did",
            "measured_seconds": "What the predicted steps took",
        }
        for name, text in families.items():
            family = CounterMetricFamily(f"sp:plan_{name}", text, labels=["model_name", "plan"])
            for plan, totals in stats.plans.items():
                family.add_metric([self._model_name, plan], getattr(totals, name))
            yield family
        last = stats.last_choice
        if last is not None:
            labels = ["model_name", "plan"]  # not the reason: its numbers would make a new series each time
            for name in ("predicted_seconds", "measured_seconds"):
                gauge = GaugeMetricFamily(f"sp:last_choice_{name}", "Of the newest predicted step", labels=labels)
                gauge.add_metric([self._model_name, last.plan], getattr(last, name))
                yield gauge

    def _ranks(self, stats: Stats) -> Iterable[Metric]:
        labels = ["model_name", "rank", "sp_rank", "tp_rank"]
        families: list[tuple[Metric, str]] = [
            (GaugeMetricFamily("sp:rank_pages_used", "KV pages in use", labels=labels), "pages_used"),
            (
                GaugeMetricFamily("sp:rank_pages_cached", "KV pages kept for the prefix cache alone", labels=labels),
                "pages_cached",
            ),
            (GaugeMetricFamily("sp:rank_pages_total", "KV pages", labels=labels), "num_pages"),
            (_rank_counter("num_steps", "Forward passes that it took part in", labels), "num_steps"),
            (_rank_counter("query_key_pairs", "Attention work", labels), "query_key_pairs"),
            (_rank_counter("bytes_sent", "Bytes sent by attention plans", labels), "bytes_sent"),
            (_rank_counter("wait_seconds", "Time blocked on other ranks", labels), "wait_seconds"),
            (_rank_counter("busy_seconds", "Time inside steps", labels), "busy_seconds"),
            (_rank_counter("idle_seconds", "Time between steps while there were requests", labels), "idle_seconds"),
        ]
        for family, field in families:
            for rank in stats.per_rank:
                values = [self._model_name, str(rank.rank), str(rank.sp_rank), str(rank.tp_rank)]
                family.add_metric(values, getattr(rank, field))  # type: ignore[attr-defined]
            yield family


def _rank_counter(name: str, text: str, labels: list[str]) -> CounterMetricFamily:
    return CounterMetricFamily(f"sp:rank_{name}", text, labels=labels)
