"""Prometheus metrics of a server."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from salmonn.caption.engine import Engine

_BUCKETS_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics(Collector):
    """Metrics of one server, in its own registry.

    Args:
        engine: engine whose counters are exported too.

    Attributes:
        requests: counter by outcome.
        tokens: counter of prompt and completion tokens.
        received_bytes: counter of uploaded or fetched bytes, by source.
        active: gauge of requests in progress.
        time_to_first_token, seconds, reading: histograms of the times from the arrival of a request to its first text
            and to its end, and from its submission to the engine to the end of reading its file.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self.requests = Counter("salmonn_requests", "Requests by outcome.", ["outcome"], registry=self._registry)
        self.tokens = Counter("salmonn_tokens", "Prompt and completion tokens.", ["kind"], registry=self._registry)
        self.received_bytes = Counter(
            "salmonn_received_bytes", "Bytes of files uploaded or fetched.", ["source"], registry=self._registry
        )
        self.active = Gauge("salmonn_requests_active", "Requests in progress.", registry=self._registry)
        self.time_to_first_token = self._histogram("time_to_first_token", "From a request to its first text.")
        self.seconds = self._histogram("request", "From a request to its end.")
        self.reading = self._histogram("reading", "From submission to the end of reading the file.")
        self._registry.register(self)

    def _histogram(self, name: str, description: str) -> Histogram:
        return Histogram(f"salmonn_{name}_seconds", description, buckets=_BUCKETS_SECONDS, registry=self._registry)

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the counters of the engine; the registry calls this."""
        engine = self._engine
        yield GaugeMetricFamily("salmonn_waiting", "Samples in the queue.", value=engine.num_waiting)
        for name, value, description in [
            ("prefills", engine.num_prefills, "Prefills, each of one or more prompts."),
            ("answered", engine.num_answered, "Requests that were answered by the engine."),
            ("failed", engine.num_failed, "Requests that failed in the engine."),
            ("cancelled", engine.num_cancelled, "Requests that were cancelled."),
        ]:
            yield CounterMetricFamily(f"salmonn_{name}", description, value=value)
