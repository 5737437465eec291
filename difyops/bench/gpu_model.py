"""What the parts of `difyops bench gpu` share: shapes with random weights, the limits of the GPU,
filled states, rows of the table."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from difyops.engine import models
from difyops.engine.mixers import Softmax
from difyops.engine.models.decoder import Decoder
from difyops.engine.state import StatePool, StateSpec

#: The size of the three shapes that contexts are compared over: 1.01 billion parameters, give or
#: take 1 %. Softmax layers share keys and values among four queries, as released models do; what
#: that saves is in wider MLPs.
_ONE_B = {
    "model_type": "difyops_native", "width": 2048, "vocabulary": 32000, "context": 262144,
    "tied": True,
}  # fmt: skip
_LINEAR = {"mixer": "linear", "heads": 16, "head_dim": 128}
_SOFTMAX = {"mixer": "softmax", "heads": 16, "kv_heads": 4, "head_dim": 128, "rotary_dim": 128}
_QWEN35 = {
    "model_type": "qwen3_5_text", "vocab_size": 248320, "head_dim": 256,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}  # fmt: skip

#: config.json of each shape. Those with a released model's name have its published text model.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen3.5-0.8b": {
        **_QWEN35, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24,
        "num_attention_heads": 8, "num_key_value_heads": 2, "linear_num_value_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3.5-9b": {
        **_QWEN35, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
        "num_attention_heads": 16, "num_key_value_heads": 4, "linear_num_value_heads": 32,
        "tie_word_embeddings": False,
    },
    "mamba2-1.3b": {
        "model_type": "mamba2", "vocab_size": 50288, "hidden_size": 2048, "num_hidden_layers": 48,
        "num_heads": 64, "head_dim": 64, "state_size": 128, "n_groups": 1,
        "tie_word_embeddings": True,
    },
    "linear-1b": {**_ONE_B, "mlp_hidden": 5632, "pattern": [{**_LINEAR, "repeat": 18}]},
    "hybrid-1b": {
        **_ONE_B, "mlp_hidden": 5888,
        "pattern": [{**_LINEAR, "repeat": 3}, _SOFTMAX] * 4 + [{**_LINEAR, "repeat": 2}],
    },
    "softmax-1b": {**_ONE_B, "mlp_hidden": 6656, "pattern": [{**_SOFTMAX, "repeat": 18}]},
}  # fmt: skip
#: Tokens that each sequence holds when its decoding is measured.
BEFORE = 512


@dataclass(frozen=True)
class Wanted:
    """`seconds` is how long the random load lasts."""

    shapes: Sequence[str] = ("qwen3.5-0.8b", "mamba2-1.3b", "linear-1b")
    sequences: Sequence[int] = (1, 64, 256)
    prompts: Sequence[int] = (16, 2048, 32768)
    contexts: Sequence[int] = (1024, 4096, 16384, 65536, 131072)
    parts: Sequence[str] = ("decode", "engine", "prompt")
    peers: Sequence[str] = ("transformers",)
    seconds: int = 60


@dataclass(frozen=True)
class Limits:
    """What the GPU did: bytes a second of a copy, read and written, and operations a second of a
    bf16 matrix product."""

    bandwidth: float
    operations: float


@dataclass(frozen=True)
class Row:
    """One line of the table: `work` at `size` (`unit`), in seconds and tokens a second beside the
    most that `limit` allows; None where there is no such number. `note` says the rest, `facts` the
    same for programs. A row that `failed` has the reason as its note."""

    shape: str
    work: str
    size: int | None
    seconds: float | None = None
    rate: float | None = None
    limit: float | None = None
    note: str = ""
    unit: str = "sequences"
    facts: Mapping[str, Any] = field(default_factory=dict)
    failed: bool = False

    @property
    def share(self) -> float | None:
        return self.rate / self.limit if self.rate is not None and self.limit else None


@dataclass(frozen=True)
class Subject:
    """A shape that is measured. Its model is fused once a part asks for that."""

    name: str
    model: Decoder
    limits: Limits
    wanted: Wanted


def build(config: Mapping[str, Any], device: str = "cuda") -> Decoder:
    """A model in bf16 with random weights of the size that training begins with."""
    with torch.device(device):
        model = models.family(config).build(config)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.normal_(0, 0.02)
    return model


def measure_limits() -> Limits:
    source = torch.randn(1 << 30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / timed(lambda: target.copy_(source), 20)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return Limits(bandwidth, 2 * 8192**3 / timed(lambda: a @ b, 20))


def timed(work: Callable[[], object], count: int) -> float:
    """The median of `count` runs behind two more, in seconds."""
    times = []
    for _ in range(count + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def weight_bytes(model: Decoder) -> int:
    """What one pass reads of the weights: of an embedding that is not the head, next to nothing.
    What plain decoding does not run (multi-token prediction) is left out."""
    return sum(p.nbytes for p in _read(model, model.head.weight))


def sequence_bytes(specs: Sequence[StateSpec], context: int) -> int:
    """What a step moves of one sequence: its state read and written, its keys and values read."""
    return sum(2 * spec.slot_bytes + context * spec.token_bytes for spec in specs)


def step_limit(
    model: Decoder, sequences: int, limits: Limits, context: int = BEFORE,
    specs: Sequence[StateSpec] | None = None,
) -> float:  # fmt: skip
    """Tokens a second that the bandwidth allows `sequences` of `context` tokens each."""
    each = sequence_bytes(specs or model.state_specs(), context)
    return sequences * limits.bandwidth / (weight_bytes(model) + sequences * each)


def prompt_operations(model: Decoder, tokens: int) -> int:
    """Two for each weight and token, and softmax attention's products: queries with keys and scores
    with values, over half a square. The embedding is a look-up, and the head scores one row."""
    weights = sum(p.numel() for p in _read(model, None))
    found = 2 * weights * tokens + 2 * model.head.weight.numel()
    for block in model.blocks:
        if isinstance(block.mixer, Softmax):
            o, values = block.mixer.options, block.mixer.value_dim
            found += o.heads * (o.head_dim + values) * tokens * tokens
    return found


def prompt_limit(model: Decoder, tokens: int, limits: Limits) -> float:
    """Tokens a second of one prompt: what is slower, its operations or to read the weights once."""
    operations = prompt_operations(model, tokens) / limits.operations
    return tokens / max(operations, weight_bytes(model) / limits.bandwidth)


def _read(model: Decoder, head: torch.Tensor | None) -> list[torch.Tensor]:
    """The weights that every token is multiplied with, and `head`."""
    aside = {id(p) for p in (*model.embed.parameters(), *model.head.parameters())}
    aside |= {id(p) for p in model.extra.parameters()}
    inner: list[torch.Tensor] = [p for p in model.parameters() if id(p) not in aside]
    return inner if head is None else [*inner, head]


def filled(
    model: Decoder, sequences: int, context: int, room: int = 256,
    specs: Sequence[StateSpec] | None = None,
) -> tuple[StatePool, list[int]]:  # fmt: skip
    """A pool whose slots hold `context` tokens of noise, or nothing, with room for more; and the
    slots."""
    specs, device = specs or model.state_specs(), model.embed.weight.device
    pool = StatePool(specs, slots=sequences, context=context + room, device=device)
    slots = [pool.table.acquire() or 0 for _ in range(sequences)]
    for slot in slots:
        pool.table.grow(slot, context + room)
    pool.sync()
    for layer in pool.layers if context else ():
        for tensor in (*layer.slot.values(), *layer.token.values()):
            tensor.normal_()
    pool.lengths[1:] = context
    return pool, slots


def random_tokens(vocabulary: int, count: int, seed: int = 0) -> list[int]:
    dice = random.Random(seed)  # noqa: S311  (a load, not a secret)
    return [dice.randrange(vocabulary) for _ in range(count)]
