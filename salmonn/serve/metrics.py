"""What a server counts, in the text that Prometheus reads."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from salmonn.caption.engine import Engine

_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """Counts of one server, in a registry of its own.

    Args:
        engine: whose answers are counted too.

    Attributes:
        requests: by outcome.
        tokens: of prompts and of answers.
        received_bytes: of files that were sent or fetched, by whence.
        first_word, seconds, reading: histograms, in seconds: from the request to its first word, to its end, and from
            the query to the end of reading.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("salmonn_requests", "Requests by outcome.", ["outcome"], registry=self._registry)
        self.tokens = Counter("salmonn_tokens", "Tokens of prompts and answers.", ["of"], registry=self._registry)
        self.received_bytes = Counter(
            "salmonn_received_bytes", "Bytes of files sent or fetched.", ["whence"], registry=self._registry
        )
        self.present = Gauge("salmonn_requests_present", "Requests under way.", registry=self._registry)
        self.first_word = self._time("salmonn_first_word_seconds", "From a request to its first word.")
        self.seconds = self._time("salmonn_request_seconds", "From a request to its end.")
        self.reading = self._time("salmonn_reading_seconds", "From a query to the end of reading its file.")
        self._registry.register(_EngineCounts(engine))

    def _time(self, name: str, words: str) -> Histogram:
        return Histogram(name, words, buckets=_SECONDS, registry=self._registry)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _EngineCounts(Collector):
    """What the engine counts by itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        engine = self._engine
        counts = {
            "readings": (engine.num_prefills, "Readings of prompts that the model was asked for."),
            "answered": (engine.num_answered, "Queries that were answered."),
            "failed": (engine.num_failed, "Queries that failed."),
            "dropped": (engine.num_cancelled, "Queries that nobody waited for any more."),
        }
        yield GaugeMetricFamily("salmonn_waiting", "Answers that wait for the model.", value=engine.num_waiting)
        for name, (value, words) in counts.items():
            yield CounterMetricFamily(f"salmonn_{name}", words, value=value)
