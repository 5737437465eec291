"""A family's logits against transformers' torch path, on tiny random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from difyops.engine.models import family
from difyops.engine.models.decoder import Decoder
from difyops.engine.state import StatePool

#: Around the chunk of 64 and of different lengths, so that a batch is ragged.
LENGTHS = (3, 64, 65, 150)
NEAR = 1e-5


def randomise(model: Any) -> Any:
    """Weights that make every part of the model count: transformers' own are so small that a
    layer could be left out unnoticed. Were they larger than this, float32 itself would be further
    from float64 than the bound."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.5 * noise * parameter.shape[1:].numel() ** -0.5)
            else:
                parameter.add_(0.2 * noise)
    return model.eval()


def ours(model: Any, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Decoder:
    """The family's module with the weights of transformers' model."""
    found = family(config)
    decoder = found.build(config)
    renamed = {found.rename(name): tensor for name, tensor in model.state_dict().items()}
    decoder.load_state_dict(renamed)
    return decoder.to(dtype).requires_grad_(False)


@dataclass
class Oracle:
    """Sequences, what transformers makes of each in one pass, and our model beside it."""

    decoder: Decoder
    sequences: list[Tensor]
    wanted: list[Tensor]
    pool: StatePool = field(init=False)

    @classmethod
    def of(cls, model: Any, config: Mapping[str, Any]) -> Oracle:
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(11)
        sequences = [
            torch.randint(config["vocab_size"], (length,), generator=generator)
            for length in LENGTHS
        ]
        randomise(model)
        with torch.no_grad():
            wanted = [model(sequence[None], use_cache=False).logits[0] for sequence in sequences]
        return cls(ours(model, config), sequences, wanted)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> list[int]:
        """An empty pool; a slot for each sequence, not in order."""
        self.pool = StatePool(self.decoder.state_specs(), slots=5, context=160, window=6)
        slots = [self.pool.table.acquire() for _ in range(5)][1:][::-1]
        assert all(self.pool.table.grow(slot, 160) for slot in slots if slot is not None)
        self.pool.sync()
        return [slot for slot in slots if slot is not None]

    def prefill(self, parts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """slot -> tokens [T]; answers slot -> logits [T, V]."""
        lengths = torch.tensor([len(tokens) for tokens in parts.values()])
        cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        slots = torch.tensor(list(parts))
        hidden = self.decoder.prefill(torch.cat(list(parts.values())), self.pool, slots, cu)
        logits = self.decoder.logits(hidden)
        return dict(zip(parts, logits.split(lengths.tolist()), strict=True))

    def step(self, parts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        slots = torch.tensor(list(parts))
        hidden = self.decoder.step(torch.stack(list(parts.values())), self.pool, slots)
        return dict(zip(parts, self.decoder.logits(hidden), strict=True))

    def verify(self, parts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        slots = torch.tensor(list(parts))
        hidden = self.decoder.verify(torch.stack(list(parts.values())), self.pool, slots)
        return dict(zip(parts, self.decoder.logits(hidden), strict=True))

    def commit(self, accepted: Mapping[int, int]) -> None:
        slots, counts = torch.tensor(list(accepted)), torch.tensor(list(accepted.values()))
        self.decoder.commit(self.pool, slots, counts)

    # What every family is held to.

    def whole_prefill(self) -> None:
        slots = self.start()
        got = self.prefill(dict(zip(slots, self.sequences, strict=True)))
        for slot, wanted in zip(slots, self.wanted, strict=True):
            near(got[slot], wanted)
        assert all(wanted.std() > 0.3 for wanted in self.wanted)

    def chunked_prefill(self) -> None:
        """In uneven pieces, the sequences beside one another in changing company."""
        slots = self.start()
        got: dict[int, list[Tensor]] = {slot: [] for slot in slots}
        at = dict.fromkeys(slots, 0)
        for i, piece in enumerate((2, 1, 61, 1, 70, 7, 3, 5)):
            parts = {}
            for j, slot in enumerate(slots):
                rest = self.sequences[j][at[slot] :]
                if len(rest) and (i + j) % 3:
                    parts[slot] = rest[: piece + j]
                    at[slot] += len(parts[slot])
            for slot, logits in (self.prefill(parts) if parts else {}).items():
                got[slot].append(logits)
        for slot, wanted in zip(slots, self.wanted, strict=True):
            logits = torch.cat(got[slot])
            near(logits, wanted[: len(logits)])
        assert at[slots[-1]] > 128

    def steps(self) -> None:
        """From nothing, and behind a prefill of another length in each slot."""
        slots = self.start()
        behind = [0, 60, 64, 131]
        prompts = {
            slot: sequence[:length]
            for slot, sequence, length in zip(slots, self.sequences, behind, strict=True)
            if length
        }
        self.prefill(prompts)
        for i in range(19):
            now = {
                slot: (sequence[length + i], wanted[length + i])
                for slot, sequence, length, wanted in zip(
                    slots, self.sequences, behind, self.wanted, strict=True
                )
                if length + i < len(sequence)
            }
            got = self.step({slot: token for slot, (token, _) in now.items()})
            for slot, (_, wanted) in now.items():
                near(got[slot], wanted)

    def continuation(self) -> None:
        """Windows of several tokens, taken in part and in whole, and a step behind them."""
        slots = self.start()[2:]
        sequences, wanted = self.sequences[2:], self.wanted[2:]
        at = [40, 63]
        self.prefill({slot: s[:a] for slot, s, a in zip(slots, sequences, at, strict=True)})
        for accepted in ((1, 4), (5, 2), (0, 5), (3, 1)):
            windows = {}
            for slot, sequence, start, count in zip(slots, sequences, at, accepted, strict=True):
                windows[slot] = sequence[start : start + 5].clone()
                windows[slot][count:] = 0  # a draft that is wrong from here on
            got = self.verify(windows)
            self.commit(dict(zip(slots, accepted, strict=True)))
            for i, slot in enumerate(slots):
                near(got[slot][: accepted[i]], wanted[i][at[i] : at[i] + accepted[i]])
                at[i] += accepted[i]
        got = self.step({slot: s[a] for slot, s, a in zip(slots, sequences, at, strict=True)})
        for i, slot in enumerate(slots):
            near(got[slot], wanted[i][at[i]])


def near(got: Tensor, wanted: Tensor, bound: float = NEAR) -> None:
    assert got.shape == wanted.shape
    worst = float((got - wanted).abs().max()) if got.numel() else 0.0
    assert worst <= bound, worst


class IsTransformers:
    """The tests of a family. Its module has the fixture `oracle`."""

    def test_prefill(self, oracle: Oracle) -> None:
        oracle.whole_prefill()

    def test_prefill_in_pieces(self, oracle: Oracle) -> None:
        oracle.chunked_prefill()

    def test_steps(self, oracle: Oracle) -> None:
        oracle.steps()

    def test_verify_commit_and_step(self, oracle: Oracle) -> None:
        oracle.continuation()
