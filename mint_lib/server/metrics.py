"""What the server tells Prometheus: counts and times, on a registry of its own.

Goes in: what the layers, the answers and the engines did. Comes out: both text formats of Prometheus. Labels are
bounded: routes are templates, models are names of the lineup, label ids are those of served students, everything else
is from a closed set. No text of a case, no token and no name that a client chose gets here.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, exposition
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from mint_lib.server.lifecycle import Readiness
from mint_lib.server.students import Lineup

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SHARES = tuple(tenth / 10 for tenth in range(1, 11))
_OUTCOMES = {
    400: "bad_request",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    405: "not_found",
    413: "too_large",
    415: "unsupported_type",
    429: "overloaded",
    499: "abandoned",
    503: "unavailable",
    504: "deadline",
}


class ServingMetrics:
    """All figures of one server; the `EngineObserver` of all its engines."""

    def __init__(self, lineup: Lineup, readiness: Readiness):
        self.registry = CollectorRegistry()
        self._lineup = lineup

        def counter(name: str, words: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"mint_serving_{name}", words, labels, registry=self.registry)

        def gauge(name: str, words: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"mint_serving_{name}", words, labels, registry=self.registry)

        def histogram(name: str, words: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(f"mint_serving_{name}", words, labels, registry=self.registry, buckets=buckets)

        self.requests = counter("requests_total", "Requests, by outcome.", ("route", "model", "outcome"))
        self.request_seconds = histogram("request_seconds", "From a request's head to its end.", _SECONDS, ("route",))
        self.rejected = counter("rejected_total", "Requests answered with an error, by its code.", ("reason",))
        self.queue_depth = gauge("queue_depth", "Requests that wait for the engine.")
        self.queue_wait_seconds = histogram("queue_wait_seconds", "Time in the engine's queue.", _SECONDS)
        self.running_requests = gauge("running_requests", "Requests that the engine works on.")
        self.batch_rows = histogram("batch_rows", "Requests in one forward pass.", _ROWS, ("kind",))
        self.computed_tokens = counter("computed_tokens_total", "Tokens of forward passes.", ("kind",))
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of started requests.", ("model",))
        self.cached_prompt_tokens = counter(
            "cached_prompt_tokens_total", "Those of them that came from the prefix cache.", ("model",)
        )
        self.generated_tokens = counter("generated_tokens_total", "Tokens of generated answers.", ("model",))
        self.time_to_first_token_seconds = histogram(
            "time_to_first_token_seconds", "From asking the engine to the first token.", _SECONDS
        )
        self.inter_token_seconds = histogram("inter_token_seconds", "From token to token.", _TOKEN_SECONDS)
        self.images = counter("images_total", "Images that were read for a student.")
        self.image_bytes = counter("image_bytes_total", "Their encoded size.")
        self.image_seconds = histogram("image_seconds", "Time to check, decode and prepare an image.", _SECONDS)
        self.labels_answered = counter("labels_answered_total", "First labels of rankings.", ("model", "label_id"))
        self.answer_confidence = histogram(
            "answer_confidence", "Probability of the first label of a ranking.", _SHARES, ("model",)
        )
        self.abstentions = counter("abstentions_total", "Rankings below the model's threshold.", ("model",))
        self.prefix_cache_bytes = gauge("prefix_cache_bytes", "Memory of cached prefixes.")
        self.prefix_cache_evicted_blocks = counter("prefix_cache_evicted_blocks_total", "Prefix blocks given up.")
        self.model_reload_failures = counter("model_reload_failures_total", "New versions refused.", ("model",))
        self.isolations = counter("isolations_total", "Batches that failed and were tried request by request.")
        self.tokens_file_reload_failures = counter(
            "tokens_file_reload_failures_total", "Broken tokens files; the tokens before stayed in force."
        )
        gauge("ready", "1 where requests should be sent here.").set_function(lambda: float(readiness.is_ready))
        ProcessCollector(registry=self.registry)
        self.registry.register(_LineupCollector(lineup))
        self._told = threading.local()

    def see_step(self, *, kind: Literal["prompt", "decode", "labels"], num_rows: int, num_tokens: int) -> None:
        """One forward pass of an engine."""
        self.batch_rows.labels(kind).observe(num_rows)
        self.computed_tokens.labels(kind).inc(num_tokens)

    def see_queue(self, *, num_queued: int, num_running: int) -> None:
        """An engine's queue or batch changed."""
        self._set_share(self.queue_depth, num_queued)
        self._set_share(self.running_requests, num_running)

    def see_prefix_cache(self, *, num_bytes: int, num_evicted_blocks: int) -> None:
        """An engine's prefix cache changed."""
        self._set_share(self.prefix_cache_bytes, num_bytes)
        self.prefix_cache_evicted_blocks.inc(num_evicted_blocks)

    def see_isolation(self) -> None:
        """An engine tries the requests of a batch one by one."""
        self.isolations.inc()

    def _set_share(self, gauge: Gauge, value: float) -> None:
        """Let the calling engine's share of a sum over all engines be `value`."""
        # Each engine tells from a thread of its own, so what a thread told before is what its engine told before.
        told = self._told.__dict__
        name = next(iter(gauge.describe())).name
        gauge.inc(value - told.get(name, 0.0))
        told[name] = value

    def see_request(self, *, route: str, model: str, status: int, problem: str, seconds: float) -> None:
        """A request is over. A stream that failed has status 200 and a problem."""
        outcome = _OUTCOMES.get(status, "failed") if status >= 400 or problem else "ok"
        self.requests.labels(route, self._known(model), outcome).inc()
        self.request_seconds.labels(route).observe(seconds)
        if problem:
            self.rejected.labels(problem).inc()

    def see_start(self, *, model: str, queue_seconds: float, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """A request left the engine's queue."""
        self.queue_wait_seconds.observe(queue_seconds)
        self.prompt_tokens.labels(self._known(model)).inc(num_prompt_tokens)
        self.cached_prompt_tokens.labels(self._known(model)).inc(num_cached_tokens)

    def see_image(self, *, num_bytes: int, seconds: float) -> None:
        """An image was decoded and prepared. May be called from any thread."""
        self.images.inc()
        self.image_bytes.inc(num_bytes)
        self.image_seconds.observe(seconds)

    def see_token(self, *, model: str, seconds: float, is_first: bool) -> None:
        """A token was made, `seconds` after the one before it or after asking."""
        (self.time_to_first_token_seconds if is_first else self.inter_token_seconds).observe(seconds)
        self.generated_tokens.labels(self._known(model)).inc()

    def see_ranking(self, *, model: str, label_id: str, probability: float, abstained: bool) -> None:
        """A ranking was answered; `label_id` is of the student's own label set."""
        name = self._known(model)
        self.labels_answered.labels(name, label_id).inc()
        self.answer_confidence.labels(name).observe(probability)
        if abstained:
            self.abstentions.labels(name).inc()

    def see_reload_failure(self, model: str) -> None:
        """A new version of `model` was refused."""
        self.model_reload_failures.labels(self._known(model)).inc()

    def see_tokens_file_failure(self) -> None:
        """A new tokens file was broken."""
        self.tokens_file_reload_failures.inc()

    def render(self, accept: str) -> tuple[bytes, str]:
        """The figures in the format that the header `accept` asks for, and its content type."""
        encode: Callable[[CollectorRegistry], bytes]
        encode, content_type = exposition.choose_encoder(accept)
        return encode(self.registry), content_type

    def _known(self, model: str) -> str:
        """`model` where it is served, empty where none was asked, else "other"."""
        return model if not model or model in self._lineup.names() else "other"


class _LineupCollector(Collector):
    """Which students are served, asked at each scrape, so that it is right after every swap."""

    def __init__(self, lineup: Lineup):
        self._lineup = lineup

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The families `model_info` and `model_load_seconds`."""
        info = GaugeMetricFamily(
            "mint_serving_model_info",
            "1 for each model that is served.",
            labels=("model", "reference", "precision"),
        )
        load_seconds = GaugeMetricFamily(
            "mint_serving_model_load_seconds", "From the first byte to the first warm answer.", labels=("model",)
        )
        for student in self._lineup.students():
            info.add_metric((student.name, str(student.reference), student.precision), 1.0)
            load_seconds.add_metric((student.name,), student.load_seconds)
        yield info
        yield load_seconds
