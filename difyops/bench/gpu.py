"""`difyops bench gpu`: how near the engine comes to the limits of the GPU's memory and arithmetic.

Models of known shapes with random weights, so that nothing is downloaded: what a step costs depends
on neither weights nor tokens. The limits are measured in the same run.
"""

from __future__ import annotations

import gc
import queue
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from difyops import __version__
from difyops.core import Progress
from difyops.engine import graphs, models
from difyops.engine.models.decoder import Decoder
from difyops.engine.request import Output, Request, SamplingParams
from difyops.engine.runner import Engine
from difyops.engine.state import StatePool
from difyops.errors import DifyopsError, PrerequisiteError, UsageError

#: config.json of each shape.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen3.5-0.8b": {
        "model_type": "qwen3_5_text", "vocab_size": 248320, "hidden_size": 1024,
        "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 256, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 16,
        "tie_word_embeddings": True, "max_position_embeddings": 262144,
        "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25},
    },
    "mamba2-1.3b": {
        "model_type": "mamba2", "vocab_size": 50288, "hidden_size": 2048, "num_hidden_layers": 48,
        "num_heads": 64, "head_dim": 64, "state_size": 128, "n_groups": 1,
        "tie_word_embeddings": True,
    },
    "linear-1b": {
        "model_type": "difyops_native", "width": 2048, "vocabulary": 32000, "context": 262144,
        "mlp_hidden": 5632, "tied": True,
        "pattern": [{"mixer": "linear", "repeat": 18, "heads": 16, "head_dim": 128}],
    },
}  # fmt: skip
#: Tokens that each sequence holds when its decoding is measured.
BEFORE = 512
#: Tokens of each answer in the engine's measure.
ANSWER = 128


@dataclass(frozen=True)
class Wanted:
    shapes: Sequence[str] = tuple(SHAPES)
    sequences: Sequence[int] = (1, 64, 256)
    prompts: Sequence[int] = (16, 2048, 32768)
    eager: bool = True


@dataclass(frozen=True)
class Limits:
    """What the GPU did: bytes a second of a copy, read and written, and operations a second of a
    bf16 matrix product."""

    bandwidth: float
    operations: float


@dataclass(frozen=True)
class Row:
    """Tokens a second, and the most that the limits allow. `work`: "step" is the model and the
    choice of the next token with the copies to and from the GPU, "engine" the whole engine with
    its host code, "prompt" the reading of one prompt; `size` counts sequences or tokens."""

    shape: str
    work: str
    size: int
    seconds: float
    rate: float
    limit: float

    @property
    def share(self) -> float:
        return self.rate / self.limit


@dataclass(frozen=True)
class Found:
    device: str
    limits: Limits
    rows: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "version": 1,
            "difyops": __version__,
            "torch": torch.__version__,
            "device": self.device,
            "limits": vars(self.limits),
            "rows": [{**vars(row), "share": row.share} for row in self.rows],
        }

    def remarks(self) -> list[str]:
        return [
            f"{self.device}: a copy moves {self.limits.bandwidth / 1e12:.2f} TB/s, a bf16 product "
            f"runs at {self.limits.operations / 1e12:.0f} TFLOP/s; bf16 weights, random",
            "limit of decoding: weights once, and each sequence's state read and written, at the "
            "copy's bandwidth; of a prompt: two operations for each weight and token",
            f"decoding behind {BEFORE} tokens; eager: without graphs and kernels; engine: with "
            "scheduling, detokenising left out",
        ]


def table(found: Found) -> list[list[str]]:
    rows = [["model", "", "", "ms", "tok/s", "limit", "share"]]
    for row in found.rows:
        unit = "tokens" if row.work == "prompt" else "sequences"
        rows.append(
            [
                row.shape, row.work, f"{row.size} {unit}", f"{row.seconds * 1e3:.2f}",
                f"{row.rate:,.0f}", f"{row.limit:,.0f}", f"{row.share:.0%}",
            ]
        )  # fmt: skip
    return rows


def run(wanted: Wanted, progress: Progress) -> Found:
    """Raises UsageError for a shape that is none, PrerequisiteError without a GPU."""
    if unknown := [name for name in wanted.shapes if name not in SHAPES]:
        raise UsageError(f"--shape: {unknown[0]!r} is not one", f"shapes: {', '.join(SHAPES)}")
    if not torch.cuda.is_available():
        raise PrerequisiteError(
            "bench gpu: PyTorch sees no GPU", "check nvidia-smi, and that PyTorch is built for CUDA"
        )
    limits = measure_limits()
    rows: list[Row] = []
    for name in wanted.shapes:
        began = time.monotonic()
        progress.started(name)
        with torch.inference_mode():
            rows += _measure(name, wanted, limits)
        progress.finished(name, "", time.monotonic() - began)
        gc.collect()
        torch.cuda.empty_cache()
    return Found(torch.cuda.get_device_name(), limits, tuple(rows))


def measure_limits() -> Limits:
    source = torch.randn(1 << 30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _time(lambda: target.copy_(source), 20)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return Limits(bandwidth, 2 * 8192**3 / _time(lambda: a @ b, 20))


def build(name: str) -> Decoder:
    """A shape with random weights of the size that training begins with."""
    config = SHAPES[name]
    with torch.device("cuda"):
        model = models.family(config).build(config)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.normal_(0, 0.02)
    return model


def _measure(name: str, wanted: Wanted, limits: Limits) -> Iterator[Row]:
    model = build(name)
    parameters = sum(weight.numel() for weight in model.parameters())
    if wanted.eager:
        for size in wanted.sequences:
            yield _decoding(name, "step, eager", model, size, limits, graphs.Eager)
    model.fuse()
    for size in wanted.sequences:
        yield _decoding(name, "step", model, size, limits, graphs.Captured)
    for size in wanted.sequences:
        yield _engine(name, model, size, limits)
    for size in wanted.prompts:
        seconds = _prompt(model, size)
        most = limits.operations / (2 * parameters)
        yield Row(name, "prompt", size, seconds, size / seconds, most)


def _limit(model: Decoder, size: int, limits: Limits) -> float:
    """Tokens a second that the bandwidth allows `size` sequences of BEFORE tokens."""
    weights = sum(weight.nbytes for weight in model.parameters())
    if not model.tied:
        weights -= model.embed.weight.nbytes  # a row of it is read
    specs = model.state_specs()
    state = sum(2 * spec.slot_bytes + BEFORE * spec.token_bytes for spec in specs)
    return size * limits.bandwidth / (weights + size * state)


def _decoding(
    name: str, work: str, model: Decoder, size: int, limits: Limits,
    steps: Callable[[Decoder, StatePool], graphs.Steps],
) -> Row:  # fmt: skip
    pool = StatePool(model.state_specs(), slots=size, context=BEFORE + 256, device="cuda")
    slots = [pool.table.acquire() or 0 for _ in range(size)]
    for slot in slots:
        pool.table.grow(slot, BEFORE + 256)
    pool.sync()
    for layer in pool.layers:
        for tensor in (*layer.slot.values(), *layer.token.values()):
            tensor.normal_()
    pool.lengths[1:] = BEFORE
    dice = random.Random(0)  # noqa: S311
    tokens = [dice.randrange(model.shape.vocabulary) for _ in slots]
    runs = steps(model, pool)

    def once() -> None:
        stepped = runs.run(tokens, slots)
        if stepped.best is None:
            stepped.logits.argmax(-1).tolist()

    for _ in range(5):
        once()
    times = []
    for _ in range(40):
        began = time.perf_counter()
        once()
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times)
    return Row(name, work, size, seconds, size / seconds, _limit(model, size, limits))


class _NoText:
    """In place of a tokenizer."""

    stopped = False

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def _engine(name: str, model: Decoder, size: int, limits: Limits) -> Row:
    """The time between two tokens of the sequence that began last, so that all others run, too."""
    engine = Engine(model, slots=size, context=BEFORE + ANSWER, prefill_tokens=8192)
    engine.warm_up()
    engine.start()
    dice, vocabulary = random.Random(0), model.shape.vocabulary  # noqa: S311
    prompts = [[dice.randrange(vocabulary) for _ in range(BEFORE)] for _ in range(size)]
    params = SamplingParams(ANSWER, temperature=0.0)
    requests = [Request(prompt, params, _NoText()) for prompt in prompts]
    heard: dict[Request, list[float]] = {request: [] for request in requests}
    done: queue.SimpleQueue[Output] = queue.SimpleQueue()

    def deliver_to(times: list[float]) -> Callable[[Output], None]:
        def deliver(output: Output) -> None:
            times.append(time.perf_counter())
            if output.finish is not None:
                done.put(output)

        return deliver

    engine.submit_all({request: deliver_to(times) for request, times in heard.items()})
    errors = [output.error for output in (done.get() for _ in requests) if output.error]
    engine.stop()
    if errors:
        raise DifyopsError(f"bench gpu: {errors[0]}")
    last = heard[requests[-1]][: ANSWER // 2]
    seconds = statistics.median(b - a for a, b in pairwise(last))
    return Row(name, "engine", size, seconds, size / seconds, _limit(model, size, limits))


def _prompt(model: Decoder, size: int) -> float:
    """Seconds until a prompt's first token is known."""
    pool = StatePool(model.state_specs(), slots=1, context=size, device="cuda")
    slot = pool.table.acquire() or 0
    pool.table.grow(slot, size)
    pool.sync()
    tokens = torch.randint(model.shape.vocabulary, (size,), device="cuda")
    slots, bounds = torch.tensor([[slot], [0]], device="cuda")[0], torch.tensor([0, size]).cuda()

    def once() -> None:
        pool.lengths[slot] = 0
        hidden = model.prefill(tokens, pool, slots, bounds)
        model.logits(hidden[-1:]).argmax(-1).tolist()

    return _time(once, 3)


def _time(work: Callable[[], object], count: int) -> float:
    """The median of `count` runs behind two more, in seconds."""
    times = []
    for _ in range(count + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])
