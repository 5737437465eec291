"""`difyops bench gpu`: how near the engine comes to the limits of the GPU's memory and arithmetic,
and whether what it says there is right.

Models of known shapes with random weights, so that nothing is downloaded: what a step costs depends
on neither weights nor tokens. The limits are measured in the same run. What has to do with answers
is measured on the trained model that comes with difyops.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from difyops import __version__
from difyops.bench import (
    gpu_context,
    gpu_engine,
    gpu_exact,
    gpu_http,
    gpu_load,
    gpu_peer,
    gpu_spec,
    gpu_step,
)
from difyops.bench.gpu_model import (
    BEFORE,
    SHAPES,
    Limits,
    Row,
    Subject,
    Wanted,
    build,
    measure_limits,
)
from difyops.core import Progress
from difyops.errors import DifyopsError, PrerequisiteError, UsageError

#: What is measured of each shape, in this order: `eager` comes before the model is fused.
OF_A_SHAPE: Mapping[str, Callable[[Subject], Iterable[Row]]] = {
    "eager": gpu_step.eager,
    "decode": gpu_step.decode,
    "engine": gpu_engine.engine,
    "prompt": gpu_step.prompt,
    "profile": gpu_step.profile,
    "http": gpu_http.http,
    "peer": gpu_peer.peer,
}
#: What brings its own models.
APART: Mapping[str, Callable[[Wanted, Limits], Iterable[Row]]] = {
    "context": gpu_context.context,
    "speculation": gpu_spec.speculation,
    "drift": gpu_exact.drift,
    "agreement": gpu_exact.agreement,
    "load": gpu_load.load,
}
PARTS = (*OF_A_SHAPE, *APART)


@dataclass(frozen=True)
class Found:
    device: str
    limits: Limits
    rows: tuple[Row, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing failed."""
        return not any(row.failed for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        return {
            "version": 2,
            "difyops": __version__,
            "torch": torch.__version__,
            "device": self.device,
            "limits": vars(self.limits),
            "rows": [{**vars(row), "share": row.share} for row in self.rows],
            "complete": self.complete,
        }

    def remarks(self) -> list[str]:
        return [
            f"{self.device}: a copy moves {self.limits.bandwidth / 1e12:.2f} TB/s, a bf16 product "
            f"runs at {self.limits.operations / 1e12:.0f} TFLOP/s; bf16 weights, random; torch "
            f"{torch.__version__}",
            "limit of decoding: weights once, each sequence's state read and written, its keys and "
            "values read, at the copy's bandwidth",
            "limit of a prompt: two operations for each weight and token and softmax attention's "
            "products at that length (the head scores one token, the embedding is a look-up), or "
            "to read the weights once, whichever takes longer",
            f"decoding behind {BEFORE} tokens where no context is named; eager: without graphs and "
            "kernels; engine: with scheduling, detokenising left out; kernels: one that starts "
            "before the one in front of it has ended counts the wait, too",
        ]


def table(found: Found) -> list[list[str]]:
    rows = [["model", "", "", "ms", "tok/s", "limit", "share", ""]]
    for row in found.rows:
        rows.append(
            [
                row.shape, row.work, f"{row.size:,} {row.unit}" if row.size is not None else "",
                _number(row.seconds and row.seconds * 1e3, ",.2f"), _number(row.rate, ",.0f"),
                _number(row.limit, ",.0f"), _number(row.share, ".0%"),
                f"FAILED: {row.note}" if row.failed else row.note,
            ]
        )  # fmt: skip
    return rows


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def run(wanted: Wanted, progress: Progress) -> Found:
    """What fails, fails by itself, as a row that says why; Ctrl-C ends it with what there is.

    Raises UsageError for a shape or part that is none, PrerequisiteError without a GPU.
    """
    check("--shape", wanted.shapes, SHAPES)
    check("--part", wanted.parts, PARTS)
    if not torch.cuda.is_available():
        raise PrerequisiteError(
            "bench gpu: PyTorch sees no GPU", "check nvidia-smi, and that PyTorch is built for CUDA"
        )
    limits = measure_limits()
    rows: list[Row] = []
    try:
        # One by one: what was measured before an interruption is not lost.
        for row in _all(wanted, limits, progress):
            rows.append(row)
    except KeyboardInterrupt:
        rows.append(Row("", "the rest", None, note="interrupted", failed=True))
    return Found(torch.cuda.get_device_name(), limits, tuple(rows))


def _all(wanted: Wanted, limits: Limits, progress: Progress) -> Iterator[Row]:
    for name in wanted.shapes if set(OF_A_SHAPE) & set(wanted.parts) else ():
        yield from _of_a_shape(name, wanted, limits, progress)
        _free()
    for part, measure in APART.items():
        if part in wanted.parts:
            yield from _guarded("", part, partial(measure, wanted, limits), progress)
            _free()


def check(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises UsageError."""
    known = tuple(known)
    for name in given:
        if name not in known:
            raise UsageError(f"{option}: {name!r} is not one", ", ".join(known))


def _of_a_shape(name: str, wanted: Wanted, limits: Limits, progress: Progress) -> Iterator[Row]:
    def measure() -> Iterator[Row]:
        subject = Subject(name, build(SHAPES[name]), limits, wanted)
        for part, work in OF_A_SHAPE.items():
            if part in wanted.parts:
                yield from _guarded(name, part, partial(work, subject), progress)

    yield from _guarded(name, "", measure, None)


def _guarded(
    shape: str, part: str, work: Callable[[], Iterable[Row]], progress: Progress | None
) -> Iterator[Row]:
    """The rows of `work`; what it fails with is the last one."""
    began, label = time.monotonic(), f"{shape} {part}".strip()
    if progress is not None:
        progress.started(label)
    try:
        with torch.inference_mode():
            yield from work()
    except Exception as error:
        said = error.message if isinstance(error, DifyopsError) else _first_line(error)
        yield Row(shape, part, None, note=said, failed=True)
        if progress is not None:
            progress.failed(label, said, time.monotonic() - began)
    else:
        if progress is not None:
            progress.finished(label, "", time.monotonic() - began)


def _first_line(error: Exception) -> str:
    said = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {said[:200]}"


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
