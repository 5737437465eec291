"""`difyops bench spec`: what speculation and the prefix cache save, in this process, without HTTP.

Every mode is asked the same greedy prompts; that the answers are the same, too, is looked at.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from difyops import __version__
from difyops.bench import spec_engine
from difyops.bench.spec_engine import Asked, Model, Talk
from difyops.core import Progress
from difyops.errors import UsageError

#: Modes are measured forwards, then backwards: a machine that slows down meanwhile favours none.
ROUNDS = 2
#: Of an answer: one behind the first, which prefill makes.
FEWEST_TOKENS = 2
#: Acceptance is shown when it rests on at least so many guesses.
FEWEST_GUESSES = 20
OFF = "off"

#: Some are continued from nothing, some quote what they are given, as retrieval does.
PROMPTS = (
    "Explain in a few sentences why the sky is blue and the evening is red.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "List the steps to repair a bicycle tyre, one a line, with a number before each.",
    "Repeat this sentence, then say what it means: A state that does not grow with the context "
    "can be copied, and a state that can be copied can be taken back.",
    "Answer from this text only. Text: The mill was built in 1784. It burned down in 1802 and was "
    "rebuilt in stone. Since 1911 it has made electricity. Question: when did the mill burn down, "
    "and what has it made since 1911?",
    "Write a Python function that answers whether a number is prime, and an example of its use.",
    "Correct the spelling and write the whole text again: The gardner waterd the tomatos evry "
    "evning, and the tomatos thankd him with there weight.",
    "Give three reasons for and three against living by the sea.",
)


@dataclass(frozen=True)
class Wanted:
    """What to measure. `tokens` is the most of each answer; `draft` names a smaller model."""

    model: str
    streams: Sequence[int]
    tokens: int
    turns: int
    threads: int
    prompts: Sequence[str] = PROMPTS
    draft: str | None = None
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Mode:
    """A drafter and how many tokens it guesses; None: as many as pay."""

    drafter: str = OFF
    guesses: int | None = 0

    @property
    def name(self) -> str:
        if self.drafter == OFF:
            return OFF
        return f"{self.drafter} {'adaptive' if self.guesses is None else self.guesses}"


@dataclass(frozen=True)
class Row:
    """A mode at one number of streams. `forwards_per_token` counts passes of the model over a
    sequence for each token behind an answer's first; `acceptance` is the share of guesses that
    came true among those whose predecessors did, by place, and `guesses` how many these were.
    `same` counts answers that are those of "off" in its first round."""

    streams: int
    mode: str
    tokens: int
    tokens_per_second: float
    forwards_per_token: float
    acceptance: tuple[float, ...]
    guesses: tuple[int, ...]
    same: int
    answers: int


@dataclass(frozen=True)
class Turn:
    """One turn of the conversation; times to the first token in seconds, without the prefix cache
    and with it. `kept` counts prompt tokens whose state was there."""

    prompt_tokens: int
    kept: int
    without: float
    cached: float
    same: bool


@dataclass(frozen=True)
class Found:
    wanted: Wanted
    rows: tuple[Row, ...]
    turns: tuple[Turn, ...]
    dtype: str
    device: str

    @property
    def exact(self) -> bool:
        """Whether every answer of every mode was the same."""
        return all(r.same == r.answers for r in self.rows) and all(t.same for t in self.turns)

    def speedup(self, row: Row) -> float:
        """Tokens a second, to "off" at as many streams."""
        (off,) = (r for r in self.rows if r.mode == OFF and r.streams == row.streams)
        return row.tokens_per_second / off.tokens_per_second

    @property
    def first_tokens(self) -> tuple[float, float]:
        """Seconds over all turns, without and with the prefix cache."""
        return sum(t.without for t in self.turns), sum(t.cached for t in self.turns)

    def as_json(self) -> dict[str, Any]:
        without, cached = self.first_tokens
        return {
            "version": 1,
            "model": self.wanted.model,
            "tokens": self.wanted.tokens,
            "threads": self.wanted.threads,
            "dtype": self.dtype,
            "device": self.device,
            "versions": _versions(),
            "exact": self.exact,
            "speculation": [{**vars(row), "ratio": self.speedup(row)} for row in self.rows],
            "conversation": {
                "turns": [vars(turn) for turn in self.turns],
                "without": without,
                "cached": cached,
                "ratio": cached / without,
            },
            "remarks": self.remarks(),
        }

    def remarks(self) -> list[str]:
        """What the numbers mean, and where they are not what they should be."""
        wanted = self.wanted
        answers = sum(row.answers for row in self.rows if row.mode != OFF) + len(self.turns)
        threads = f"{wanted.threads} thread{'' if wanted.threads == 1 else 's'}"
        said = [
            f"{len(wanted.prompts)} prompts, {ROUNDS} rounds, at most {wanted.tokens} tokens each, "
            f"greedy, in-process; {self.dtype} on {self.device}, {threads}",
            "x is to off in the same run: tok/s above 1, TTFT below 1 is better; forwards/token of "
            "off is 1; accepted: guesses that came true where those before them did, by place, of "
            f"{FEWEST_GUESSES} or more",
            ", ".join(f"{name} {number}" for name, number in _versions().items()),
        ]
        if self.exact:
            said.append(f"exact: all {answers} answers are those without speculation and cache")
        else:
            wrong = [f"{r.mode} at {r.streams}" for r in self.rows if r.same < r.answers]
            wrong += ["the conversation"] if not all(t.same for t in self.turns) else []
            said.append(
                f"NOT EXACT: {', '.join(wrong)}. In {self.dtype} two scores may tie within "
                "rounding; --dtype float64 tells"
            )
        if len(self.turns) < wanted.turns:
            said.append(f"the conversation ends after {len(self.turns)} turns: the context is full")
        return said


def run(wanted: Wanted, progress: Progress) -> Found:
    """Load, measure, stop. Raises UsageError for what cannot be measured, DifyopsError when a
    request fails."""
    if not wanted.prompts:
        raise UsageError("--prompts: no prompt, and at least one is needed", "one a line")
    progress.started("model")
    began = time.monotonic()
    model = spec_engine.load(wanted.model, wanted.draft, wanted.device, wanted.dtype,
                             wanted.threads)  # fmt: skip
    progress.finished("model", wanted.model, time.monotonic() - began)
    rows: list[Row] = []
    for streams in wanted.streams:
        rows += _speculation(model, wanted, streams, progress)
    turns = _conversation(model, wanted, progress)
    return Found(wanted, tuple(rows), turns, model.dtype, model.device)


def modes(model: Model) -> Iterator[Mode]:
    yield Mode()
    for kind, most in model.drafters().items():
        yield from (Mode(kind, k) for k in range(1, most + 1))
        yield Mode(kind, None)


def _speculation(model: Model, wanted: Wanted, streams: int, progress: Progress) -> Iterator[Row]:
    prompts = [model.prompt([{"role": "user", "content": text}]) for text in wanted.prompts]
    room = _room(max(map(len, prompts)), wanted.tokens, model.context)
    all_modes = list(modes(model))
    measured: dict[Mode, list[Asked]] = {mode: [] for mode in all_modes}
    with ExitStack() as stack:
        engines = {
            mode: stack.enter_context(
                model.engine(streams, room, mode.drafter, mode.guesses, prefix_bytes=0)
            )
            for mode in all_modes
        }
        for number in range(ROUNDS + 1):  # the first only warms up
            for mode in all_modes[:: 1 if number % 2 else -1]:
                name = f"{streams} stream{'' if streams == 1 else 's'}"
                progress.started(name)
                progress.detail(name, f"{mode.name}, round {number} of {ROUNDS}")
                if not number:
                    engines[mode].ask(prompts[:streams], min(wanted.tokens, 8))
                    continue
                measured[mode].append(engines[mode].ask(prompts, wanted.tokens))
                done = f"{mode.name}, round {number} of {ROUNDS}"
                progress.finished(name, done, measured[mode][-1].seconds)
    expected = measured[Mode()][0].answers
    for mode, rounds in measured.items():
        yield summary(streams, mode, rounds, expected)


def _room(longest: int, tokens: int, context: int) -> int:
    """Tokens of the longest prompt and its answer. Raises UsageError for more than a context."""
    if longest + FEWEST_TOKENS > context:
        raise UsageError(
            f"the longest prompt has {longest} tokens, and the model has {context} for it and its "
            "answer",
            "--prompts FILE with shorter ones",
        )
    if longest + tokens > context:
        raise UsageError(
            f"the longest prompt has {longest} tokens and its answer {tokens}, and the model has "
            f"{context} for both",
            f"--tokens {context - longest} or fewer",
        )
    return longest + tokens


def summary(streams: int, mode: Mode, rounds: Sequence[Asked], expected: Sequence[Any]) -> Row:
    """`expected` are the tokens of the answers without speculation."""
    said = [(got, want) for r in rounds for got, want in zip(r.answers, expected, strict=True)]
    tokens, later = sum(r.tokens for r in rounds), sum(r.tokens - r.firsts for r in rounds)
    drafted, accepted = ([sum(c) for c in zip(*counts, strict=True)] for counts in (
        [r.drafted for r in rounds], [r.accepted for r in rounds]
    ))  # fmt: skip
    return Row(
        streams,
        mode.name,
        tokens,
        tokens / sum(r.seconds for r in rounds),
        sum(r.passes for r in rounds) / later if later else 1.0,
        tuple(right / made for right, made in zip(accepted, drafted, strict=True) if made),
        tuple(made for made in drafted if made),
        sum(got == want for got, want in said),
        len(said),
    )


def _conversation(model: Model, wanted: Wanted, progress: Progress) -> tuple[Turn, ...]:
    """The same questions to an engine without a prefix cache and to one with it, turn by turn."""
    turns: list[Turn] = []
    each = max(len(model.prompt([{"role": "user", "content": text}])) for text in wanted.prompts)
    # An answer that is read again may have more tokens than it was written with.
    room = min(model.context, wanted.turns * (each + 2 * wanted.tokens) + 64)
    with ExitStack() as stack:
        talks = [
            Talk(model, stack.enter_context(model.engine(1, room, OFF, 0, prefix_bytes=size)))
            for size in (0, spec_engine.PREFIX_BYTES)
        ]
        progress.started("conversation")
        began = time.monotonic()
        for number in range(wanted.turns):
            question = wanted.prompts[number % len(wanted.prompts)]
            if any(not talk.fits(question, wanted.tokens) for talk in talks):
                break
            progress.detail("conversation", f"turn {number + 1} of {wanted.turns}")
            order = talks[:: -1 if number % 2 else 1]
            said = {talk: talk.turn(question, wanted.tokens) for talk in order}
            without, cached = (said[talk] for talk in talks)
            turns.append(
                Turn(
                    cached.prompt_tokens,
                    cached.kept,
                    without.first,
                    cached.first,
                    (without.prompt_tokens, without.answers)
                    == (cached.prompt_tokens, cached.answers),
                )
            )
        progress.finished("conversation", f"{len(turns)} turns", time.monotonic() - began)
    return tuple(turns)


def table(found: Found) -> list[tuple[str, ...]]:
    """Speculation: the rows as text, below their headings."""
    lines: list[tuple[str, ...]] = [
        ("streams", "speculation", "tok/s", "x", "forwards/token", "accepted", "same")
    ]
    for row in found.rows:
        lines.append((
            str(row.streams), row.mode, f"{row.tokens_per_second:.1f}",
            f"{found.speedup(row):.2f}", f"{row.forwards_per_token:.3f}",
            " ".join(
                f"{rate:.0%}"
                for rate, guesses in zip(row.acceptance, row.guesses, strict=True)
                if guesses >= FEWEST_GUESSES
            ) or "-",
            f"{row.same}/{row.answers}",
        ))  # fmt: skip
    return lines


def conversation_table(found: Found) -> list[tuple[str, ...]]:
    """The prefix cache: a line for each turn, and their sum."""
    lines: list[tuple[str, ...]] = [
        ("turn", "prompt", "kept", "TTFT without", "with prefix cache", "x", "same")
    ]
    for number, t in enumerate(found.turns, 1):
        lines.append((
            str(number), str(t.prompt_tokens), str(t.kept), *_times(t.without, t.cached),
            "yes" if t.same else "NO",
        ))  # fmt: skip
    prompts, kept = sum(t.prompt_tokens for t in found.turns), sum(t.kept for t in found.turns)
    lines.append(("all", str(prompts), str(kept), *_times(*found.first_tokens), ""))
    return lines


def _times(without: float, cached: float) -> tuple[str, str, str]:
    return f"{without * 1000:.1f} ms", f"{cached * 1000:.1f} ms", f"{cached / without:.2f}"


def _versions() -> dict[str, str]:
    return {
        "difyops": __version__,
        "python": platform.python_version(),
        "torch": version("torch"),
    }
