"""How well a model predicts text that it has not seen, and how often its guesses come true."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from difyops.engine.layout import read_json
from difyops.engine.models.decoder import Decoder
from difyops.tune.pretrain import depth, logits


@dataclass(frozen=True)
class Scores:
    """`loss` and `mtp_losses` in nats per token. `acceptances`: of all places in the held-out text,
    the share where a multi-token prediction module's guess is the model's own first choice, once
    both know the true tokens before it (greedy). Both by depth, a number for each module."""

    tokens: int
    loss: float
    bits_per_byte: float
    mtp_losses: tuple[float, ...] = ()
    acceptances: tuple[float, ...] = ()

    @property
    def bytes_per_token(self) -> float:
        """Of the held-out text, special tokens being no bytes."""
        return self.loss / (self.bits_per_byte * math.log(2))

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for a person."""
        said = [
            ("held-out tokens", f"{self.tokens:,}"),
            ("loss, nats per token", f"{self.loss:.3f}"),
            ("bits per byte", f"{self.bits_per_byte:.3f}, at {self.bytes_per_token:.2f} bytes of "
             "this text a token"),
        ]  # fmt: skip
        for k, (loss, share) in enumerate(zip(self.mtp_losses, self.acceptances, strict=True), 1):
            token = "the second token" if k == 1 else f"token {k + 1}"
            said.append((f"loss of {token}, nats", f"{loss:.3f}"))
            said.append((f"MTP acceptance, k = {k}, greedy, on given text", f"{share:.1%}"))
        return said


def token_bytes(tokenizer: Path) -> Tensor:
    """How many bytes of text each token of a byte-level tokenizer.json is: [V]; special ones 0."""
    content = read_json(tokenizer)
    words: Mapping[str, int] = content["model"]["vocab"]
    special = {token["id"] for token in content.get("added_tokens", ()) if token["special"]}
    sizes = torch.zeros(max(words.values()) + 1, dtype=torch.int64)
    for word, number in words.items():
        sizes[number] = 0 if number in special else len(word)  # its alphabet: one letter a byte
    return sizes


@torch.inference_mode()
def evaluate(
    model: Decoder, tokens: np.ndarray[Any, Any], sizes: Tensor, *, length: int, batch: int = 16
) -> Scores:
    """Over `tokens` [N], in sequences of `length`, in the model's dtype and where it is; `sizes`
    is `token_bytes`' answer. Raises UsageError for a length that has no place for a last guess."""
    device = model.embed.weight.device
    deep = depth(model, length)
    count = (len(tokens) - 1 - deep) // length
    row = torch.from_numpy(tokens[: count * length + 1 + deep].astype(np.int64))
    windows = row.unfold(0, length + 1 + deep, length)
    size = torch.zeros((), dtype=torch.int64, device=device)
    sums = torch.zeros(2, 1 + deep, dtype=torch.float64, device=device)  # losses, guesses
    sizes = sizes.to(device)
    for start in range(0, count, batch):
        some = windows[start : start + batch].to(device)
        size += sizes[some[:, 1 : length + 1]].sum()
        made = logits(model, some[:, :-1])
        chosen = made[0].argmax(-1)
        for d, scores in enumerate(made):
            target = some[:, d + 1 : d + 1 + length].flatten()
            sums[0, d] += F.cross_entropy(scores.flatten(0, 1), target, reduction="sum")
            # What is guessed at a place stands for the model's choice d places on.
            sums[1, d] += (scores.argmax(-1)[:, : length - d] == chosen[:, d:]).sum()
    seen = count * length
    loss, *mtp_losses = (sums[0] / seen).tolist()
    same = [total / (count * (length - d)) for d, total in enumerate(sums[1].tolist())]
    bits = loss * seen / float(size) / math.log(2)
    return Scores(seen, loss, bits, tuple(mtp_losses), tuple(same[1:]))
