"""The model alone: decoding steps, prompts, and which kernels their time goes to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch

from difyops.bench.gpu_model import (
    BEFORE,
    Row,
    Subject,
    filled,
    prompt_limit,
    random_tokens,
    step_limit,
    timed,
)
from difyops.engine import graphs
from difyops.engine.models.decoder import Decoder
from difyops.engine.state import StatePool
from difyops.errors import DifyopsError

#: Kernels that a profile names.
TOP = 12

Make = Callable[[Decoder, StatePool], graphs.Steps]


def eager(subject: Subject) -> Iterator[Row]:
    """Before the model is fused: each operation by itself."""
    for size in subject.wanted.sequences:
        yield _decoding(subject, "step, eager", size, graphs.Eager)


def decode(subject: Subject) -> Iterator[Row]:
    subject.model.fuse()
    for size in subject.wanted.sequences:
        yield _decoding(subject, "step", size, graphs.Captured)


def prompt(subject: Subject) -> Iterator[Row]:
    subject.model.fuse()
    for size in subject.wanted.prompts:
        seconds = timed(reading(subject.model, size), 3)
        limit = prompt_limit(subject.model, size, subject.limits)
        yield Row(subject.name, "prompt", size, seconds, size / seconds, limit, unit="tokens")


def profile(subject: Subject) -> Iterator[Row]:
    """The kernels of one step of each number of sequences, and of the longest prompt."""
    subject.model.fuse()
    works = {
        ("step", size, "sequences"): stepping(subject.model, size, graphs.Captured)
        for size in subject.wanted.sequences
    }
    longest = max(subject.wanted.prompts)
    works["prompt", longest, "tokens"] = reading(subject.model, longest)
    for (work, size, unit), once in works.items():
        total, kernels = _kernels(once)
        for name, count, seconds in islice(kernels, TOP):
            note = f"{seconds / total:.0%} in {count} x {name[:60]}"
            facts = {"kernel": name, "count": count, "of": total}
            yield Row(subject.name, f"kernel of a {work}", size, seconds, note=note, unit=unit,
                      facts=facts)  # fmt: skip


def stepping(
    model: Decoder, sequences: int, make: Make, context: int = BEFORE
) -> Callable[[], object]:
    """What runs one step, with the choice of the token and the copies to and from the GPU."""
    pool, slots = filled(model, sequences, context)
    return step_of(model, pool, slots, make)


def step_of(
    model: Decoder, pool: StatePool, slots: Sequence[int], make: Make
) -> Callable[[], object]:
    tokens = random_tokens(model.shape.vocabulary, len(slots))
    runs = make(model, pool)

    def once() -> None:
        stepped = runs.run(tokens, slots)
        if stepped.best is None:
            stepped.logits.argmax(-1).tolist()

    return once


def median(once: Callable[[], object], count: int = 40) -> float:
    """Of `count` runs behind five more, in seconds."""
    for _ in range(5):
        once()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        once()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def reading(model: Decoder, size: int) -> Callable[[], object]:
    """What reads one prompt, up to its first token."""
    pool = StatePool(model.state_specs(), slots=1, context=size, device="cuda")
    slot = pool.table.acquire() or 0
    pool.table.grow(slot, size)
    pool.sync()
    tokens = random_tokens(model.shape.vocabulary, size)
    steps = graphs.Captured(model, pool)

    def once() -> None:
        pool.lengths[slot] = 0
        steps.read(tokens, [0, size], [slot], [0]).best  # noqa: B018 - it is waited for

    return once


def _decoding(subject: Subject, work: str, size: int, make: Make) -> Row:
    seconds = median(stepping(subject.model, size, make))
    limit = step_limit(subject.model, size, subject.limits)
    return Row(subject.name, work, size, seconds, size / seconds, limit)


def _kernels(once: Callable[[], object]) -> tuple[float, list[tuple[str, int, float]]]:
    """Seconds on the GPU of one run, and each kernel's name, how often, and seconds; the longest
    first. Raises DifyopsError where the GPU cannot be profiled."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    rounds = 5
    for _ in range(3):
        once()
    with profiling(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        for _ in range(rounds):
            once()
        torch.cuda.synchronize()
    found = [
        (event.key, round(event.count / rounds), event.self_device_time_total / rounds / 1e6)
        for event in seen.key_averages()
        if event.self_device_time_total
    ]
    if not found:
        raise DifyopsError("the profiler saw no kernel", "CUPTI may not be allowed here")
    found.sort(key=lambda one: -one[2])
    return sum(seconds for *_, seconds in found), found
