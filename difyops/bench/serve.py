"""`difyops bench serve`: the native engine beside other servers, on the same prompts."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from difyops import __version__
from difyops.bench import peers
from difyops.bench.load import FEWEST_WORDS, Round, percentile, prompt
from difyops.bench.peers import Target
from difyops.core import Progress
from difyops.errors import DifyopsError, UsageError
from difyops.openai_client import Message

#: The rounds of a level go through the servers forwards, then backwards: a machine that slows down
#: or warms up meanwhile favours nobody.
ROUNDS = 2
#: Requests of a round, at least: one answer has no percentiles.
ENOUGH = 4


@dataclass(frozen=True)
class Wanted:
    """What to compare. `tokens` and `prompt_tokens` are per request."""

    model: str | None
    urls: Sequence[str]
    peers: Sequence[str]
    streams: Sequence[int]
    tokens: int
    prompt_tokens: int
    threads: int


@dataclass(frozen=True)
class Row:
    """One server at one number of streams; times in seconds. `missing` says why there is none."""

    server: str
    streams: int
    missing: str | None = None
    requests: int = 0
    tokens: tuple[int, int] = (0, 0)  # the shortest answer, and the longest
    prompt_tokens: tuple[int, int] = (0, 0)
    tokens_per_second: float = 0.0
    ttft_p50: float = 0.0
    ttft_p95: float = 0.0
    itl_p50: float | None = None  # None where no answer had two pieces
    itl_p95: float | None = None


@dataclass(frozen=True)
class Comparison:
    """`base` is the server that all ratios are to."""

    wanted: Wanted
    base: str
    rows: tuple[Row, ...]
    versions: dict[str, str]

    @property
    def complete(self) -> bool:
        return not any(row.missing for row in self.rows)

    def ratios(self, row: Row) -> dict[str, float | None]:
        """`row` divided by the base at as many streams; None where either is missing."""
        same = (r for r in self.rows if r.server == self.base and r.streams == row.streams)
        base = next(same, row)
        return {
            name: _ratio(row, base, name) for name in ("tokens_per_second", "ttft_p50", "itl_p50")
        }

    def as_json(self) -> dict[str, Any]:
        wanted = self.wanted
        return {
            "version": 1,
            "model": wanted.model,
            "tokens": wanted.tokens,
            "prompt_tokens": wanted.prompt_tokens,
            "threads": wanted.threads,
            "cpus": _cpus(),
            "versions": self.versions,
            "base": self.base,
            "rows": [{**vars(row), "ratio": self.ratios(row)} for row in self.rows],
            "remarks": self.remarks(),
        }

    def remarks(self) -> list[str]:
        """What the numbers mean, and where they are not like the others."""
        wanted, measured = self.wanted, [row for row in self.rows if not row.missing]
        said = [
            f"{wanted.prompt_tokens} prompt tokens and {wanted.tokens} new ones a request, greedy, "
            "counted by each server; TTFT and ITL (between pieces of text) as a client sees them",
            f"ratios are to {self.base}: tok/s above 1, TTFT and ITL below 1 are better than it",
            f"{_cpus()} CPUs, {wanted.threads} of them for each server that was started here; "
            "warmed up first; the order of servers is reversed for the second round",
            ", ".join(f"{name} {number}" for name, number in self.versions.items()),
        ]
        used = {row.server for row in measured}
        if "llamacpp" in used:
            said.append("llamacpp computes on the weights as quantised in the GGUF")
        if "transformers" in used:
            said.append(
                "transformers: generate in-process (no HTTP), float32, static batches of as many "
                "prompts as streams"
            )
        for url in wanted.urls:
            said.append(f"{url} was started by others, with threads and precision of its own")
        said += [line for row in measured for line in _uneven(row, wanted)]
        failed = dict.fromkeys((row.server, row.missing) for row in self.rows if row.missing)
        return said + [f"{server} was not measured: {why}" for server, why in failed]


def run(wanted: Wanted, progress: Progress) -> Comparison:
    """Start every server, measure, stop. A server that fails is a row that says why.

    Raises UsageError when there is nothing to measure, DifyopsError when nothing could be.
    """
    if wanted.model is None and not wanted.urls:
        raise UsageError("nothing to measure", "name a model, or a server with --url")
    if wanted.model is None and wanted.peers:
        raise UsageError("peers need the model that they load", "difyops bench serve MODEL")
    weights = None
    if wanted.model and wanted.peers:
        weights = peers.weights_of(wanted.model, progress.note)
    rows: list[Row] = []
    with ExitStack() as stack:
        lasting = _Field(stack, progress)
        for name, server in _servers(wanted, weights):
            lasting.enter(name, server)
        if (least := lasting.least_prompt()) > wanted.prompt_tokens:
            progress.note(f"--prompt-tokens: raised to {least}, the least with this chat template")
            wanted = replace(wanted, prompt_tokens=least)
        for streams in wanted.streams:
            with ExitStack() as inner:
                level = lasting.copy(inner)
                if weights and "llamacpp" in wanted.peers:
                    # Its slots are a choice of its start.
                    room = _context(wanted)
                    server = peers.llamacpp(weights, wanted.threads, streams, room)
                    level.enter("llamacpp", server)
                rows += level.measure(wanted, streams)
    base = next((row.server for row in rows if not row.missing), None)
    if base is None:
        raise DifyopsError(f"nothing could be measured: {rows[0].missing}")
    return Comparison(wanted, base, tuple(rows), _versions(wanted))


def _servers(
    wanted: Wanted, weights: Path | None
) -> Iterator[tuple[str, AbstractContextManager[Target]]]:
    """Those that serve every number of streams with one start."""
    if wanted.model:
        yield "native", peers.native(wanted.model, wanted.threads, max(wanted.streams))
    for url in wanted.urls:
        yield url, peers.running(url)
    if weights and "transformers" in wanted.peers:
        yield "transformers", peers.transformers(weights, wanted.threads)


class _Field:
    """The servers that run now, and why others do not."""

    def __init__(self, stack: ExitStack, progress: Progress) -> None:
        self._stack = stack
        self._progress = progress
        self._names: list[str] = []
        self._running: dict[str, Target] = {}
        self._missing: dict[str, str] = {}

    def copy(self, stack: ExitStack) -> _Field:
        """The same servers, and room for some that last only as long as `stack`."""
        other = _Field(stack, self._progress)
        other._names = list(self._names)
        other._running, other._missing = dict(self._running), dict(self._missing)
        return other

    def enter(self, name: str, server: AbstractContextManager[Target]) -> None:
        self._names.append(name)
        self._attempt(name, "start", lambda: self._start(name, server))

    def least_prompt(self) -> int:
        """Tokens of the shortest prompt that every server can be asked; its template counts."""
        least = 0
        for target in self._running.values():
            with suppress(DifyopsError):  # the warm-up meets it again, and tells
                (found,) = target.measure([prompt(FEWEST_WORDS, 0)], 1, 1).samples
                least = max(least, found.prompt_tokens)
        return least

    def measure(self, wanted: Wanted, streams: int) -> list[Row]:
        """A row of each server."""
        words: dict[str, int] = {}
        rounds: dict[str, list[Round]] = {name: [] for name in self._running}

        def warm(name: str) -> None:
            words[name] = calibrate(self._running[name], wanted.prompt_tokens)
            batch = _prompts(words[name], streams, 0)[:streams]
            self._running[name].measure(batch, streams, min(wanted.tokens, 8))

        def load(name: str, number: int) -> None:
            batch = _prompts(words[name], streams, number)
            rounds[name].append(self._running[name].measure(batch, streams, wanted.tokens))

        label = f"{streams} stream{'' if streams == 1 else 's'}"
        for name in rounds:
            self._attempt(name, f"{label}, warm-up", partial(warm, name))
        for number in range(1, ROUNDS + 1):
            for name in list(rounds)[:: 1 if number % 2 else -1]:
                what = f"{label}, round {number} of {ROUNDS}"
                self._attempt(name, what, partial(load, name, number))
        return [
            Row(name, streams, self._missing[name])
            if name in self._missing
            else summary(name, streams, rounds[name])
            for name in self._names
        ]

    def _start(self, name: str, server: AbstractContextManager[Target]) -> None:
        self._running[name] = self._stack.enter_context(server)

    def _attempt(self, name: str, what: str, action: Callable[[], None]) -> None:
        """Nothing for a server that has failed already."""
        if name in self._missing:
            return
        began = time.monotonic()
        self._progress.started(name)
        self._progress.detail(name, what)
        try:
            action()
        except DifyopsError as error:
            hint = f" ({error.hint})" if error.hint else ""
            self._missing[name] = f"{what}: {error.message}{hint}"
            self._progress.failed(name, what, time.monotonic() - began)
            self._progress.note(self._missing[name])
        else:
            self._progress.finished(name, what, time.monotonic() - began)


def calibrate(target: Target, prompt_tokens: int) -> int:
    """The words of a prompt that has `prompt_tokens` tokens with this model's chat template.

    Raises UsageError when the template alone is longer, DifyopsError when no number of words fits.
    """
    words = max(FEWEST_WORDS, prompt_tokens - 24)
    for attempt in range(4):
        (found,) = target.measure([prompt(words, -1 - attempt)], 1, 1).samples
        if found.prompt_tokens == prompt_tokens:
            return words
        words += prompt_tokens - found.prompt_tokens
        if words < FEWEST_WORDS:
            least = FEWEST_WORDS + prompt_tokens - words
            raise UsageError(f"--prompt-tokens: with this chat template, {least} or more")
    raise DifyopsError(f"no prompt of exactly {prompt_tokens} tokens", "another --prompt-tokens")


def summary(server: str, streams: int, rounds: Sequence[Round]) -> Row:
    """Raises ValueError for no rounds."""
    samples = [sample for r in rounds for sample in r.samples]
    firsts = [sample.first for sample in samples]
    gaps = [gap for sample in samples for gap in sample.gaps]
    tokens = [sample.tokens for sample in samples]
    prompts = [sample.prompt_tokens for sample in samples]
    return Row(
        server,
        streams,
        requests=len(samples),
        tokens=(min(tokens), max(tokens)),
        prompt_tokens=(min(prompts), max(prompts)),
        tokens_per_second=sum(tokens) / sum(r.seconds for r in rounds),
        ttft_p50=percentile(firsts, 50),
        ttft_p95=percentile(firsts, 95),
        itl_p50=percentile(gaps, 50) if gaps else None,
        itl_p95=percentile(gaps, 95) if gaps else None,
    )


def table(found: Comparison) -> list[tuple[str, ...]]:
    """The rows as text, below their headings; beside each median its ratio to the base."""
    head = ("streams", "server", "tok/s", "x", "TTFT p50", "x", "p95", "ITL p50", "x", "p95")
    lines: list[tuple[str, ...]] = [head]
    for row in found.rows:
        if row.missing:
            lines.append((str(row.streams), row.server, *"-" * 8))
            continue
        ratio = {name: _times(value) for name, value in found.ratios(row).items()}
        lines.append((
            str(row.streams), row.server,
            f"{row.tokens_per_second:.1f}", ratio["tokens_per_second"],
            _milliseconds(row.ttft_p50), ratio["ttft_p50"], _milliseconds(row.ttft_p95),
            _milliseconds(row.itl_p50), ratio["itl_p50"], _milliseconds(row.itl_p95),
        ))  # fmt: skip
    return lines


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _ratio(row: Row, base: Row, name: str) -> float | None:
    mine, its = getattr(row, name), getattr(base, name)
    return mine / its if mine and its else None


def _uneven(row: Row, wanted: Wanted) -> Iterator[str]:
    where = f"not comparable: {row.server} at {row.streams}:"
    for got, asked, what in (
        (row.tokens, wanted.tokens, "answers"),
        (row.prompt_tokens, wanted.prompt_tokens, "prompts"),
    ):
        if got != (asked, asked):
            yield f"{where} {what} of {got[0]} to {got[1]} tokens, and not {asked}"


def _prompts(words: int, streams: int, number: int) -> list[list[Message]]:
    """Those of a round: the same for every server, and new to each."""
    count = streams * -(-ENOUGH // streams)
    return [prompt(words, (streams * 100 + number) * 100_000 + i) for i in range(count)]


def _context(wanted: Wanted) -> int:
    """Tokens of a slot: the request, rounded up as engines like it."""
    return -(-(wanted.prompt_tokens + wanted.tokens + 16) // 256) * 256


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _versions(wanted: Wanted) -> dict[str, str]:
    """Of what was started here."""
    packages = {
        "native": ["torch"],
        "llamacpp": ["xllamacpp"],
        "transformers": ["transformers", "torch"],
    }
    started = [*(["native"] if wanted.model else []), *wanted.peers]
    found = {"difyops": __version__, "python": platform.python_version()}
    for package in dict.fromkeys(p for name in started for p in packages[name]):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
