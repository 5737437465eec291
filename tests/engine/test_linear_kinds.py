"""What the papers promise of each linear kind, beside the gates."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from difyops.engine.mixers import REGISTRY, Mixer, Performer
from difyops.engine.mixers.base import options_from
from difyops.engine.mixers.performer import log_features, projection
from tests.engine.gates import WIDTH, Bench, error, tokens

EXACT = 1e-10


def estimates(rows: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """φ(q)ᵀφ(k) by each of many draws of ω, rows [draws, M, Dk]: [draws]."""
    each = (log_features(q, rows.flatten(0, 1)) + log_features(k, rows.flatten(0, 1))).exp()
    return each.view(len(rows), -1).sum(-1) * len(rows)  # M is here that of all draws together


def draws(features: int, dim: int, count: int, seed: int = 3) -> Tensor:
    """`count` independent draws of ω, [count, features, dim]: blocks are drawn independently."""
    assert features % dim == 0
    return projection(count * features, dim, seed).view(count, features, dim)


@pytest.mark.parametrize("dim", [1, 4, 7])
def test_favor_is_unbiased(dim: int) -> None:
    """Also when q and k point to where QR by itself would not."""
    count = 12_000
    generator = torch.Generator().manual_seed(dim)
    q, k = torch.randn(2, dim, generator=generator, dtype=torch.float64)
    rows = draws(dim, dim, count)
    for a, b in ((q, k), (q, -k), (torch.eye(dim, dtype=torch.float64)[0] * 1.5,) * 2):
        found = estimates(rows, a, b)
        true = math.exp(float(a @ b) / math.sqrt(dim))
        assert abs(float(found.mean()) - true) < 4 * float(found.std()) / math.sqrt(count)


def test_orthogonal_features_err_no_more_than_independent_ones() -> None:
    dim, count = 8, 10_000
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, dim, generator=generator, dtype=torch.float64)
    independent = torch.randn(count, dim, dim, generator=generator, dtype=torch.float64)
    true = math.exp(float(q @ k) / math.sqrt(dim))
    errors = [
        float((estimates(rows, q, k) - true).square().mean())
        for rows in (draws(dim, dim, count), independent)
    ]
    assert errors[0] <= errors[1]


def test_the_rows_of_a_block_are_orthogonal_and_the_seed_decides() -> None:
    rows = projection(13, 5, seed=2)
    for block in rows.split(5):
        products = block @ block.T
        assert error(products, torch.diag(products.diagonal())) < EXACT
    assert rows.shape == (13, 5)
    assert torch.equal(rows, projection(13, 5, seed=2))
    assert not torch.equal(rows, projection(13, 5, seed=3))
    lengths = projection(20_000, 5, seed=4).square().sum(-1)
    # χ² with 5 degrees of freedom: mean 5, variance 10.
    assert float(lengths.mean()) == pytest.approx(5, abs=4 * math.sqrt(10 / 20_000))


def test_the_projection_belongs_to_the_checkpoint() -> None:
    made = [Performer(WIDTH, Performer.Options(heads=2, head_dim=5, features=9, seed=s))
            for s in (1, 2)]  # fmt: skip
    first, second = made
    assert not torch.equal(first.projection, second.projection)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.projection, second.projection)


def log_space(mixer: Mixer, x: Tensor) -> Tensor:
    """Performer's definition in logarithms, where no norm is too large."""
    assert isinstance(mixer, Performer)
    inputs = mixer.project(x, torch.arange(len(x)))
    q, k = (log_features(inputs[name], mixer.projection) for name in "qk")
    scores = (q.transpose(0, 1)[:, :, None] + k.transpose(0, 1)[:, None]).logsumexp(-1)
    hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return mixer.emit(torch.einsum("hts,shd->thd", weights, inputs["v"]), x)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_the_stabiliser_changes_nothing(dtype: torch.dtype, bound: float) -> None:
    """Keys whose features span e^±10000, small ones before and after huge ones."""
    options = {"heads": 3, "head_dim": 5, "value_dim": 7, "features": 13}
    bench = Bench.of("performer", options, dtype=dtype)
    exact = copy.deepcopy(bench.mixer).double()
    scale = torch.ones(90, 1)
    scale[[5, 6, 40, 41, 70]] = torch.tensor([60.0, 1e-3, 90.0, 40.0, 30.0])[:, None]
    x = (tokens(90) * scale).to(dtype)
    wanted = log_space(exact, x.double())
    whole, stepped = bench.slot(), bench.slot()
    parallel = bench.prefill({whole: x})[whole]
    one_by_one = torch.stack([bench.step({stepped: token})[stepped] for token in x])
    size = wanted.abs().amax(-1, keepdim=True)
    for got in (parallel, one_by_one):
        assert got.isfinite().all()
        assert float(((got.double() - wanted) / size).abs().max()) < bound


@pytest.mark.parametrize("feature", ["elu", "exp"])
def test_linear_attention_bears_large_queries_and_keys(feature: str) -> None:
    options = {"heads": 2, "head_dim": 5, "value_dim": 7, "feature": feature}
    bench = Bench.of("linear", options, dtype=torch.float32)
    x = tokens(70, dtype=torch.float32) * 1000
    slot = bench.slot()
    out = bench.prefill({slot: x})[slot]
    assert out.isfinite().all()
    # A mean of values is no larger than they are.
    values = bench.mixer.project(x, torch.arange(70))["v"].abs().max()
    assert out.abs().max() <= values * bench.mixer.o_proj.weight.abs().sum(1).max() * 1.001


@pytest.mark.parametrize("block", [1, 5, 64])
def test_diag_is_softmax_under_a_block_mask(block: int) -> None:
    options = {"heads": 6, "kv_heads": 2, "head_dim": 10, "value_dim": 7, "block": block}
    bench, x = Bench.of("diag", options), tokens(150)
    slot = bench.slot()
    got = bench.prefill({slot: x})[slot]
    inputs = bench.mixer.project(x, torch.arange(150))
    q, k, v = (inputs[name].transpose(0, 1)[None] for name in "qkv")
    mask = torch.block_diag(*[torch.ones(block, block)] * 150)[:150, :150].tril().bool()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert error(got, bench.mixer.emit(out[0].transpose(0, 1), x)) < EXACT


def test_retention_forgets_at_each_heads_rate() -> None:
    """What is seen of the first value fades by 1 - 2^(-5-h) a token."""
    bench = Bench.of("retention", {"heads": 3, "head_dim": 4, "value_dim": 6})
    inputs = {name: torch.zeros(1, 4, 3, 6 if name == "v" else 4).double() for name in "qkv"}
    inputs["q"][:] = 1
    inputs["k"][:, 0], inputs["v"][:, 0] = 1, 1
    out, _ = bench.mixer.scan(inputs, bench.state.read(torch.tensor([1])), torch.tensor([4]))
    rates = torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128]).double()
    for t in range(4):
        assert error(out[0, t, :, 0], 4 * rates**t) < EXACT


def test_a_norms_output_has_the_size_of_its_weight() -> None:
    bench, x = Bench.of("norm", {"heads": 3, "head_dim": 10, "value_dim": 7}), tokens(300)
    seen = []
    bench.mixer.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    bench.prefill({bench.slot(): x})
    sizes = (seen[0] / bench.mixer.norm.weight).square().mean(-1)
    assert error(sizes, torch.ones_like(sizes)) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "performer", "norm", "diag", "retention"])
def test_the_state_does_not_grow_with_the_context(kind: str) -> None:
    options = {"heads": 2, "head_dim": 4} | ({"features": 8} if kind == "performer" else {})
    mixer = REGISTRY[kind](WIDTH, options_from(REGISTRY[kind], options))
    assert mixer.state_spec().token_bytes == 0
