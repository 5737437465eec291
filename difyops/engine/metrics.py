"""`/metrics`: Prometheus' text. Times are measured where a client would feel them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from difyops.engine.runner import Engine
    from difyops.engine.stats import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """The numbers of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first text.", _FIRST
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two pieces of a choice, by its tokens.", _TOKEN
        )
        self.whole = self._histogram(
            "request_duration_seconds", "From a request's arrival to its end.", _WHOLE
        )
        self.choices = Counter(
            "difyops_choices",
            "Choices that ended, by why: stop, length, tool_calls, cancelled, error.",
            ("finish",),
            registry=self._registry,
        )
        self.refused = Counter(
            "difyops_requests_refused",
            "Requests that were refused, by their error's code.",
            ("code",),
            registry=self._registry,
        )

    def watch(self, engine: Engine) -> None:
        """Show the engine's own numbers, too."""
        self._registry.register(_EngineCollector(engine))

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _histogram(self, name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"difyops_{name}", help_, buckets=buckets, registry=self._registry)


class _EngineCollector(Collector):
    """Engine.stats() at the moment of asking."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._predicted = sum(spec.slot_bytes for spec in engine.state_specs())

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        counters = stats.counters
        for name, help_, value in (
            ("requests_running", "Sequences that have a slot.", stats.running),
            ("requests_waiting", "Sequences in the queue.", stats.waiting),
            ("slots", "Slots in all.", stats.slots),
            ("slots_used", "Slots that are taken.", stats.slots - stats.free_slots),
            ("pages", "Pages for keys and values in all.", stats.pages),
            (
                "pages_used",
                "Pages that are taken; those kept for prefixes are among them.",
                stats.pages - stats.free_pages,
            ),
            ("state_bytes", "All state that was allocated.", stats.state_bytes),
            ("state_bytes_per_slot", "Constant state of a slot, allocated.", stats.slot_bytes),
            ("state_bytes_per_slot_predicted", "The same, as computed.", self._predicted),
            ("state_bytes_per_token", "What grows with a token of context.", stats.token_bytes),
        ):
            yield GaugeMetricFamily(f"difyops_{name}", help_, value)
        for name, help_, value in (
            ("engine_steps", "Steps of the engine.", counters.steps),
            (
                "prompt_tokens",
                "Prompt tokens read, again after a preemption; reused ones are not counted.",
                counters.prompt_tokens,
            ),
            ("generated_tokens", "Tokens generated.", counters.generated_tokens),
            (
                "decode_passes",
                "Decoding passes, for each sequence in them; without guesses each makes one token.",
                counters.passes,
            ),
            ("preemptions", "Sequences that gave their pages up.", stats.preemptions),
        ):
            yield CounterMetricFamily(f"difyops_{name}", help_, value)
        yield from _speculation(stats)
        yield from _prefixes(stats)


def _speculation(stats: Stats) -> Iterator[Metric]:
    counters = stats.counters
    yield GaugeMetricFamily(
        "difyops_speculation_guesses", "Tokens guessed in the last pass.", stats.guesses
    )
    for name, help_, counts in (
        ("speculation_drafted_tokens", "Tokens guessed, by place.", counters.drafted),
        ("speculation_accepted_tokens", "Guesses that came true, by place.", counters.accepted),
    ):
        family = CounterMetricFamily(f"difyops_{name}", help_, labels=("place",))
        for place, count in sorted(counts.items()):
            family.add_metric((str(place + 1),), count)
        yield family


def _prefixes(stats: Stats) -> Iterator[Metric]:
    if (usage := stats.prefix) is None:
        return
    for name, help_, value in (
        ("prefix_lookup_tokens", "Tokens looked up in the prefix cache.", usage.looked_up),
        ("prefix_hit_tokens", "Those whose state was kept.", usage.reused),
        ("prefix_evictions", "States that made room for others.", usage.evicted),
    ):
        yield CounterMetricFamily(f"difyops_{name}", help_, value)
    for name, help_, value in (
        ("prefix_states", "States that are kept for prompts that begin alike.", usage.kept),
        ("prefix_bytes", "What they count for, pages as if unshared.", usage.bytes),
        ("prefix_limit_bytes", "What they may take: --prefix-cache.", usage.budget),
    ):
        yield GaugeMetricFamily(f"difyops_{name}", help_, value)
