"""Each kernel beside its naive twin in float64: a mixer with kernels, and without.

On a GPU, or with TRITON_INTERPRET=1 on a CPU.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from difyops.engine.layers import Fusible, GatedMLP, GatedRMSNorm, RMSNorm, RowNorm
from difyops.engine.mixers import REGISTRY
from difyops.engine.mixers.base import Mixer, options_from
from difyops.engine.models.decoder import Block
from difyops.engine.state import StatePool
from tests.engine import gates

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and Triton's interpreter is not asked for", allow_module_level=True)
pytest.importorskip("triton")

from difyops.engine.kernels import (
    attention,
    choice,
    decayed_chunk,
    product,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH = 24
LENGTHS = {2: 1, 6: 15, 1: 63, 3: 64, 5: 65, 4: 300}
#: Those of the other gates that have kernels, and what only kernels tell apart.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: gates.KINDS[name]
        for name in ("softmax", "gated-delta", "gated-delta-wide-conv", "mamba2",
                     "mamba2-grouped-limited", "linear-grouped-rotary")
    },
    "softmax-rotary-normed": (
        "softmax",
        {"heads": 4, "kv_heads": 2, "head_dim": 20, "rotary_dim": 6, "qk_norm": True,
         "norm_offset": 1.0, "gated": True, "bias": True},
    ),
    "norm-grouped": ("norm", {"heads": 6, "kv_heads": 2, "head_dim": 10, "value_dim": 7}),
    "retention-grouped": (
        "retention", {"heads": 6, "kv_heads": 2, "head_dim": 10, "value_dim": 7, "rotary_dim": 10},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_learnt() -> Any:
    with torch.inference_mode():
        yield


def close(got: Tensor, wanted: Tensor, within: float = 2e-5) -> None:
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).norm() / wanted.double().norm()
    assert float(error) < within


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


class Twin:
    """A mixer in float64 without kernels and in float32 with them, each with its pool."""

    def __init__(self, kind: str, options: dict[str, Any], slots: int = 6) -> None:
        torch.manual_seed(0)
        naive: Mixer = REGISTRY[kind](WIDTH, options_from(REGISTRY[kind], options)).double()
        for parameter in naive.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        fused = copy.deepcopy(naive).float()
        self.mixers = [naive.to(DEVICE), fused.to(DEVICE)]
        fused.fuse()
        self.pools = [
            StatePool(
                [mixer.state_spec()], slots=slots, context=400, window=5, page_size=8,
                device=DEVICE,
            )
            for mixer in self.mixers
        ]  # fmt: skip
        for pool in self.pools:
            for _ in range(slots):
                slot = pool.table.acquire()
                assert slot is not None
                assert pool.table.grow(slot, 400)
            pool.sync()

    def prefill(self, lengths: dict[int, int]) -> list[Tensor]:
        slots = torch.tensor(list(lengths), device=DEVICE)
        counts = torch.tensor(list(lengths.values()), device=DEVICE)
        bounds = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        x, out = random(int(counts.sum()), WIDTH), []
        for mixer, pool in zip(self.mixers, self.pools, strict=True):
            parameter = next(mixer.parameters())
            out.append(mixer.prefill(x.to(parameter.dtype), pool.layers[0], slots, bounds))
            pool.advance(slots, counts)
        return out

    def states_agree(self) -> None:
        naive, fused = (pool.layers[0].slot for pool in self.pools)
        for state in naive:
            close(fused[state][1:], naive[state][1:])
            assert not fused[state][0].any()  # the null slot stays as it is

    def both(self, form: str, x: Tensor, slots: Tensor) -> list[Tensor]:
        return [
            getattr(mixer, form)(x.to(next(mixer.parameters()).dtype), pool.layers[0], slots)
            for mixer, pool in zip(self.mixers, self.pools, strict=True)
        ]


@pytest.mark.parametrize("name", KINDS)
def test_steps_are_those_of_the_naive_form(name: str) -> None:
    twin = Twin(*KINDS[name])
    wanted, got = twin.prefill(LENGTHS)
    close(got, wanted)
    for turn, order in enumerate(([2, 6, 1, 3, 5, 4], [4, 0, 1, 0], [6], [5, 4, 3, 2, 1])):
        slots = torch.tensor(order, device=DEVICE)
        wanted, got = twin.both("step", random(len(order), WIDTH, seed=turn), slots)
        real = slots > 0
        close(got[real], wanted[real])
        for pool in twin.pools:
            pool.advance(slots, real.to(slots.dtype))
    twin.states_agree()


@pytest.mark.parametrize("name", KINDS)
def test_what_is_accepted_goes_into_the_state(name: str) -> None:
    twin = Twin(*KINDS[name])
    twin.prefill({2: 1, 6: 3, 1: 9, 4: 5})
    slots = torch.tensor([4, 2, 1, 6], device=DEVICE)
    for turn, taken in enumerate(([3, 0, 1, 2], [5, 4, 5, 1])):
        wanted, got = twin.both("verify", random(4, 3 + 2 * turn, WIDTH, seed=turn), slots)
        close(got, wanted)
        accepted = torch.tensor(taken, device=DEVICE)
        for mixer, pool in zip(twin.mixers, twin.pools, strict=True):
            mixer.commit(pool.layers[0], slots, accepted)
            pool.advance(slots, accepted)
        twin.states_agree()
    wanted, got = twin.prefill({6: 4, 2: 1, 1: 20})  # prompts that go on
    close(got, wanted)
    twin.states_agree()


def test_layers_of_one_kind_commit_together() -> None:
    kind, options = KINDS["gated-delta"]
    torch.manual_seed(0)
    cls = REGISTRY[kind]
    mixers = [cls(WIDTH, options_from(cls, options)).to(DEVICE) for _ in range(3)]
    for mixer in mixers:
        mixer.fuse()
    cls.stack(mixers)
    slots, accepted = (torch.tensor(x, device=DEVICE) for x in ([4, 2, 1], [3, 0, 1]))
    states = []
    for together in (True, False):
        pool = StatePool([m.state_spec() for m in mixers], slots=5, context=40, window=5,
                         device=DEVICE)  # fmt: skip
        for i, (mixer, layer) in enumerate(zip(mixers, pool.layers, strict=True)):
            layer.slot["S"][1:] = random(*layer.slot["S"][1:].shape, seed=i).float()
            mixer.verify(random(3, 4, WIDTH, seed=i).float(), layer, slots)
        if together:
            cls.commit_all(mixers, pool.layers, slots, accepted)
        else:
            for mixer, layer in zip(mixers, pool.layers, strict=True):
                mixer.commit(layer, slots, accepted)
        states.append([layer.slot[name] for layer in pool.layers for name in ("S", "tail")])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert not torch.equal(states[0][0], states[0][2])


@pytest.mark.parametrize("name", ["gated-delta", "gated-delta-wide-conv"])
def test_padding_changes_nothing(name: str) -> None:
    twin = Twin(*KINDS[name])
    lengths = torch.tensor([70, 2, 0, 65, 0, 0], device=DEVICE)
    slots = torch.tensor([4, 2, 6, 1, 0, 0], device=DEVICE)
    bounds = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    x, count = random(150, WIDTH), int(bounds[-1])
    naive, fused = twin.mixers
    wanted = naive.prefill(x[:count], twin.pools[0].layers[0], slots[:4], bounds[:5])
    got = fused.prefill(x.float(), twin.pools[1].layers[0], slots, bounds)
    close(got[:count], wanted)
    twin.states_agree()


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """q and k [T, H, Dk], v [T, H, Dv], g and beta [T, H], state [H, Dk, Dv], token by token."""
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    out = torch.empty_like(v)
    for t in range(len(q)):
        state = state * g[t].exp()[:, None, None]
        new = beta[t, :, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
        state = state + k[t, :, :, None] * new[:, None]
        out[t] = torch.einsum("hk,hkv->hv", q[t], state) * q.shape[-1] ** -0.5
    return out, state


def inverse_in_tf32(system: Tensor) -> Tensor:
    """(I + system)⁻¹ [H, T, T], T at most 64, from that of blocks of 16 by products of ten bits."""
    count = system.shape[-1]
    full = torch.nn.functional.pad(system, (0, 64 - count, 0, 64 - count))
    blocks = [full[:, i : i + 16, i : i + 16] for i in range(0, 64, 16)]
    one = torch.eye(16, dtype=full.dtype, device=full.device)
    inverse = torch.stack([torch.block_diag(*(torch.linalg.inv(one + b[h]) for b in blocks))
                           for h in range(len(full))])  # fmt: skip
    at = torch.arange(64, device=full.device) // 16
    for size in (2, 4):
        apart = at[:, None] // (size // 2) != at // (size // 2)
        between = full * (apart & (at[:, None] // size == at // size))
        left = in_tf32(inverse) @ in_tf32(between)
        inverse = inverse - in_tf32(left) @ in_tf32(inverse)
    return inverse[:, :count, :count]


def in_tf32(x: Tensor) -> Tensor:
    """What a product of tf32 reads: ten bits, the rest is cut off."""
    return (x.float().view(torch.int32) & ~0x1FFF).view(torch.float32).double()


def delta_rule_rounded(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """delta_rule in chunks of 64, rounded wherever a product of bf16 or tf32 makes that necessary:
    what the kernel cannot be better than."""

    def rounded(x: Tensor) -> Tensor:
        return x.bfloat16().double()

    size = (k.square().sum(-1) + 1e-6).rsqrt().mT
    scale = (q.square().sum(-1) + 1e-6).rsqrt() * q.shape[-1] ** -0.5
    q, k, v, g, beta = (x.transpose(0, 1) for x in (q, k, v, g, beta))
    parts = []
    for at in range(0, k.shape[1], 64):
        part = slice(at, at + 64)
        keys, unit, b, since = k[:, part], size[:, part], beta[:, part], g[:, part].cumsum(-1)
        decay = (since[:, :, None] - since[:, None]).exp()
        system = (keys @ keys.mT * (b * unit)[..., None] * unit[:, None] * decay).tril(-1)
        inverse = inverse_in_tf32(system)
        w = rounded(rounded(inverse * (b * unit * since.exp())[:, None]) @ keys)
        before = rounded(state)
        new = rounded(rounded(inverse * b[:, None]) @ v[:, part]) - w @ before
        shares = rounded((q[:, part] @ keys.mT * unit[:, None] * decay).tril())
        parts.append(q[:, part] @ before * since.exp()[..., None] + shares @ rounded(new))
        left = unit * (since[:, -1:] - since).exp()
        state = state * since[:, -1:, None].exp() + keys.mT @ rounded(
            rounded(new) * left[..., None]
        )
    return torch.cat(parts, 1).transpose(0, 1) * scale[..., None], state


def error_of(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("plain", torch.float32),
        ("plain", torch.bfloat16),
        ("same keys", torch.float32),
        ("same keys", torch.bfloat16),
        ("no decay", torch.float32),
        ("strong decay", torch.float32),
    ],
)
def test_the_delta_rule_in_chunks(how: str, dtype: torch.dtype) -> None:
    from difyops.engine.kernels import gated_delta_chunk
    from difyops.engine.kernels.spans import Spans

    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies no bf16 matrices")
    key_heads, heads, keys, values = 1, 2, 20, 7
    lengths = [1, 15, 0, 63, 64, 65, 300]
    slots = torch.tensor([3, 1, 0, 6, 2, 5, 4], device=DEVICE)
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    count = int(bounds[-1])
    qkv = random(count + 9, (2 * key_heads * keys) + heads * values)
    if how == "same keys":  # a correction undoes all before it
        qkv[:, key_heads * keys : 2 * key_heads * keys] = random(key_heads * keys)
    a, b = random(count + 9, heads, seed=1), random(count + 9, heads, seed=2)
    rate, bias = {"no decay": (-40.0, 0.0), "strong decay": (3.0, 9.0)}.get(how, (-3.0, 0.0))
    b += 9 if how == "same keys" else 0
    rates, biases = (torch.full((heads,), x, dtype=dtype, device=DEVICE) for x in (rate, bias))
    z, weight = random(count + 9, heads * values, seed=3), random(values, seed=4)
    state = random(7, heads, keys, values, seed=5).float()
    state[0] = 0
    qkv, a, b, z, weight = (x.to(dtype) for x in (qkv, a, b, z, weight))
    before = state.double()

    got = gated_delta_chunk.run(
        qkv, a, b, state, slots, Spans.packed(bounds), rates, biases, key_heads, z, weight, 1e-6
    )
    norm = GatedRMSNorm(values).double().to(DEVICE)
    norm.weight.copy_(weight)
    q, k, v = qkv.double().split([key_heads * keys, key_heads * keys, heads * values], -1)
    q, k = (x.view(-1, key_heads, keys).repeat_interleave(heads // key_heads, 1) for x in (q, k))
    g = -rates.double().exp() * torch.nn.functional.softplus(a.double() + biases.double())
    tokens = [q, k, v.view(-1, heads, values), g, b.double().sigmoid()]
    for i, slot in enumerate(slots.tolist()):
        span = slice(*bounds[i : i + 2].tolist())
        if slot == 0 or span.start == span.stop:
            continue
        now = [*(x[span] for x in tokens), before[slot]]
        gate = z[span].double().view(-1, heads, values)
        out, after = delta_rule(*now)
        wanted, found = norm(out, gate), got[span].view_as(gate)
        if dtype == torch.float32:
            close(state[slot], after)
            close(found, wanted)
            continue
        rough, end = delta_rule_rounded(*now)
        assert error_of(state[slot], after) < 1.25 * error_of(end, after) + 2**-9
        assert error_of(found, wanted) < 1.25 * error_of(norm(rough, gate), wanted) + 2**-8
    assert not state[0].any()


@pytest.mark.parametrize("name", ["mamba2-grouped-limited", "linear-grouped-rotary", "norm-grouped",
                                  "retention-grouped"])  # fmt: skip
def test_prompts_of_several_segments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decayed_chunk, "_SEGMENT", 64)
    twin = Twin(*KINDS[name])
    for lengths in ({2: 1, 6: 15, 1: 130, 5: 65}, {1: 64, 4: 129, 2: 1}):
        wanted, got = twin.prefill(lengths)
        close(got, wanted)
        twin.states_agree()


@pytest.mark.parametrize("name", ["mamba2", "softmax-rotary-normed"])
def test_what_pads_a_prompt_changes_nothing(name: str) -> None:
    twin = Twin(*KINDS[name])
    twin.prefill({2: 1, 6: 3})
    mixer, pool = twin.mixers[1], twin.pools[1]
    slots, bounds = (torch.tensor(t, device=DEVICE) for t in ([6, 2, 0, 0], [0, 70, 75, 75, 75]))
    x = random(81, WIDTH).float()
    before = {name: state.clone() for name, state in pool.layers[0].token.items()}
    got = mixer.prefill(x, pool.layers[0], slots, bounds)
    for name, state in pool.layers[0].token.items():
        changed = (state != before[name]).flatten(1).any(1)
        assert int(changed.sum()) == 75
    wanted = twin.mixers[0].prefill(x[:75].double(), twin.pools[0].layers[0], slots[:2], bounds[:3])
    close(got[:75], wanted)
    twin.states_agree()


def test_long_prompts_go_on_behind_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SHORT", 8)
    twin = Twin(*KINDS["softmax-rotary-normed"])
    for lengths in ({2: 9, 6: 3, 1: 20}, {1: 7, 4: 30, 2: 1}):
        wanted, got = twin.prefill(lengths)
        close(got, wanted)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", ["softmax", "softmax-rotary-normed"])
def test_attention_over_pages_with_several_queries(name: str, count: int) -> None:
    twin = Twin(*KINDS[name])
    twin.prefill(LENGTHS)
    slots = torch.tensor([4, 2, 1, 5, 3, 6], device=DEVICE)
    wanted, got = twin.both("verify", random(6, count, WIDTH), slots)
    close(got, wanted)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("width", [24, 1000])
def test_norms(width: int, offset: float) -> None:
    norm = RMSNorm(width, offset=offset).double().to(DEVICE)
    norm.weight.add_(0.1 * random(width, seed=3))
    fused = copy.deepcopy(norm).float()
    fused.fuse()
    x = random(5, width)
    close(fused(x.float()), norm(x))


@pytest.mark.parametrize(("groups", "gate_first"), [(1, False), (1, True), (3, True)])
def test_gated_norms(groups: int, gate_first: bool) -> None:
    norm = GatedRMSNorm(30, groups=groups, gate_first=gate_first).double().to(DEVICE)
    norm.weight.add_(0.1 * random(30, seed=3))
    fused = copy.deepcopy(norm).float()
    fused.fuse()
    x, gate = random(5, 30), random(5, 50, seed=1)[:, 7:37]
    close(fused(x.float(), gate.float()), norm(x, gate))


@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp(bias: bool) -> None:
    mlp = GatedMLP(WIDTH, 1100, bias=bias).double().to(DEVICE)
    fused = copy.deepcopy(mlp).float()
    fused.fuse()
    x = random(2, 3, WIDTH)
    close(fused(x.float()), mlp(x))


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("width", [24, 1000, 4200])
def test_products_of_a_few_rows(width: int, rows: int) -> None:
    x, weight, bias = random(rows, width), random(42, width, seed=1), random(42, seed=2)
    onto, norm = random(rows, 42, seed=3), RMSNorm(width, offset=1.0).double().to(DEVICE)
    norm.weight.add_(0.1 * random(width, seed=4))
    wanted = torch.nn.functional.linear(norm(x), weight, bias)
    over = RowNorm(norm.weight.float(), norm.eps, norm.offset)
    x, weight, bias = x.float(), weight.float(), bias.float()
    close(product.row(x, weight, bias, norm=over, onto=onto.float()), wanted + onto)
    a, b = wanted.chunk(2, -1)
    close(product.row(x, weight, bias, norm=over, silu=True), torch.nn.functional.silu(a) * b)
    close(product.row(x, weight), x.double() @ weight.double().T)


def test_rough_products() -> None:
    x, weight = random(2, 300).float(), random(50, 300, seed=1).float()
    small, scales = product.quantised(weight)
    close(product.row(x, small, scales=scales), x @ (small.float() * scales[:, None]).T)
    close(product.row(x, small, scales=scales), x @ weight.T, within=0.05)


def test_the_best_token() -> None:
    logits = random(5, 10000).float()
    logits[1, 7] = logits[1, 9000] = 50
    logits[3, 9999] = 60
    logits[4, 5000] = float("nan")
    found = choice.best(logits, -1, torch.empty(5, dtype=torch.int64, device=DEVICE))
    assert found.tolist() == [*logits[:4].argmax(-1).tolist(), -1]


@pytest.mark.parametrize("form", ["prefill", "step", "verify"])
@pytest.mark.parametrize("name", KINDS)
def test_blocks_take_norm_and_addition_in(name: str, form: str) -> None:
    twin = Twin(*KINDS[name])
    for place, mixer in enumerate(twin.mixers):
        torch.manual_seed(1)
        norms = [RMSNorm(WIDTH).double() for _ in range(2)]
        block = Block(norms[0], copy.deepcopy(mixer), norms[1], GatedMLP(WIDTH, 40).double())
        norms[0].weight.add_(0.1 * torch.randn(WIDTH))
        block = block.to(DEVICE, torch.float32 if place else torch.float64)
        if place:
            for module in block.modules():
                if isinstance(module, Fusible):
                    module.fuse()
        twin.mixers[place] = Run(block)
    if form == "prefill":
        wanted, got = twin.prefill({2: 1, 6: 15, 1: 40})
    else:
        twin.prefill({2: 1, 6: 3, 1: 9, 4: 5})
        slots = torch.tensor([4, 2, 1, 6], device=DEVICE)
        shape = (4, WIDTH) if form == "step" else (4, 3, WIDTH)
        wanted, got = twin.both(form, random(*shape, seed=2), slots)
    close(got, wanted)


class Run:
    """A block, called as its mixer."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self.parameters = block.parameters

    def __getattr__(self, form: str) -> Any:
        def run(x: Tensor, state: Any, *more: Tensor) -> Tensor:
            return self._block(x, lambda mixer, x, s: getattr(mixer, form)(x, s, *more), state)

        return run
