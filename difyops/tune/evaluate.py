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
from difyops.tune.pretrain import logits


@dataclass(frozen=True)
class Scores:
    """`loss` and `mtp_loss` in nats per token. `acceptance`: of all places in the held-out text,
    the share where the multi-token prediction module's guess is the model's own first choice,
    once both know the true token before it (k = 1, greedy). None without such a module."""

    tokens: int
    loss: float
    bits_per_byte: float
    mtp_loss: float | None = None
    acceptance: float | None = None

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for a person."""
        said = [
            ("held-out tokens", f"{self.tokens:,}"),
            ("loss, nats per token", f"{self.loss:.3f}"),
            ("bits per byte", f"{self.bits_per_byte:.3f}"),
        ]
        if self.mtp_loss is not None and self.acceptance is not None:
            said.append(("loss of the second token, nats", f"{self.mtp_loss:.3f}"))
            said.append(("MTP acceptance, k = 1, greedy, on given text", f"{self.acceptance:.1%}"))
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
    is `token_bytes`' answer."""
    device = model.embed.weight.device
    count = (len(tokens) - 2) // length
    row = torch.from_numpy(tokens[: count * length + 2].astype(np.int64))
    windows = row.unfold(0, length + 2, length)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    sizes = sizes.to(device)
    for start in range(0, count, batch):
        some = windows[start : start + batch].to(device)
        first, second = logits(model, some[:, :-1])
        sums[0] += F.cross_entropy(first.flatten(0, 1), some[:, 1:-1].flatten(), reduction="sum")
        sums[1] += sizes[some[:, 1:-1]].sum()
        if second is not None:
            target = some[:, 2:].flatten()
            sums[2] += F.cross_entropy(second.flatten(0, 1), target, reduction="sum")
            sums[3] += (second[:, :-1].argmax(-1) == first[:, 1:].argmax(-1)).sum()
    loss, size, ahead, same = sums.tolist()
    seen = count * length
    scores = Scores(seen, loss / seen, loss / size / math.log(2))
    if not model.extra or "mtp" not in model.extra:
        return scores
    pairs = count * (length - 1)
    return Scores(seen, scores.loss, scores.bits_per_byte, ahead / seen, same / pairs)
