"""Pre-training of a native model: next tokens, and with multi-token prediction modules those
behind them.

A run is a function of its plan, its config and its data: batch n is drawn from the seed and n, and
the learning rate depends on n alone. So a run that was stopped goes on from its checkpoint to the
same weights.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from difyops.engine.models import native
from difyops.engine.models.decoder import Decoder, whole
from difyops.engine.models.mtp import modules
from difyops.errors import DifyopsError, PrerequisiteError, UsageError
from difyops.files import digest

CHECKPOINT = "checkpoint.safetensors"
#: Between two lines of progress, in steps, and between two checkpoints, in seconds.
LOG_STEPS, SAVE_SECONDS = 50, 600
#: Layers that write into the residual stream.
_OUTWARDS = ("o_proj.weight", "out_proj.weight", "down_proj.weight")


@dataclass(frozen=True)
class Plan:
    """`tokens` in all, in steps of `batch` sequences of `length` tokens; `warmup` in steps. The
    rate rises to `rate` and falls as a cosine to 0. `mtp_weight` is that of the modules' loss."""

    tokens: int = 300_000_000
    length: int = 1024
    batch: int = 96
    rate: float = 3e-3
    warmup: int = 100
    decay: float = 0.1
    clip: float = 1.0
    mtp_weight: float = 0.3
    seed: int = 0

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.batch * self.length))

    def rate_at(self, step: int) -> float:
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (1 + math.cos(math.pi * done)) / 2


class Windows:
    """Sequences out of one long row of tokens, `length` apart, in another order and from another
    beginning each epoch. `more` tokens of the next sequence are with each: what it is to
    predict."""

    def __init__(
        self, tokens: np.ndarray[Any, Any], plan: Plan, device: torch.device, more: int
    ) -> None:
        """tokens: [N]. Raises UsageError when they do not make one batch."""
        self._count = (len(tokens) - plan.length - more) // plan.length
        self._steps = self._count // plan.batch
        if self._steps < 1:
            raise UsageError(
                f"{len(tokens)} tokens are not one batch of {plan.batch} x {plan.length}",
                "give more data, or a smaller --batch or --length",
            )
        self._plan = plan
        self._tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self._reach = torch.arange(plan.length + more, device=device)
        self._epoch = -1
        self._order = self._reach

    def batch(self, step: int) -> Tensor:
        """[batch, length + more], int64."""
        plan = self._plan
        epoch, place = divmod(step, self._steps)
        if epoch != self._epoch:
            chance = np.random.default_rng((plan.seed, epoch))
            order = torch.from_numpy(chance.permutation(self._count)) * plan.length
            self._order = (order + int(chance.integers(plan.length))).to(self._tokens.device)
            self._epoch = epoch
        starts = self._order[place * plan.batch : (place + 1) * plan.batch]
        return self._tokens[starts[:, None] + self._reach].long()


def read_tokens(path: Path, vocabulary: int) -> np.ndarray[Any, Any]:
    """A file that `difyops tune data` wrote: [N], uint16. Raises PrerequisiteError naming it when
    it is absent, or of another tokenizer."""
    if not path.is_file():
        raise PrerequisiteError(f"{path}: no such file", "make it: difyops tune data DIR")
    tokens = np.fromfile(path, dtype="<u2")
    if len(tokens) == 0 or int(tokens.max()) >= vocabulary:
        raise PrerequisiteError(
            f"{path}: not tokens of a vocabulary of {vocabulary}",
            "give the folder that belongs to the model's tokenizer",
        )
    return tokens


def fresh(config: Mapping[str, Any], seed: int) -> Decoder:
    """A model to train: small embeddings, since they are also the head, and what is added to the
    residual stream the smaller the more layers add to it (GPT-2's initialisation)."""
    torch.manual_seed(seed)
    model = native.build(config)
    with torch.no_grad():
        model.embed.weight.normal_(std=0.02)
        for name, parameter in model.named_parameters():
            if name.endswith(_OUTWARDS):
                parameter.mul_((2 * len(model.blocks)) ** -0.5)
    return model


def depth(model: Decoder, length: int) -> int:
    """How many multi-token prediction modules the model has. Raises UsageError when sequences of
    `length` tokens end before the last of them has anything to predict from."""
    count = len(modules(model))
    if length <= count:
        raise UsageError(
            f"sequences of {length} tokens are too short for mtp_modules: {count}",
            "give a larger --length",
        )
    return count


def logits(model: Decoder, tokens: Tensor) -> list[Tensor]:
    """tokens [B, T + D] with D modules -> D + 1 logits [B, T, V]: of the token behind each of the
    first T, and by the module of depth d of the token d further, after it saw the true d before."""
    chain = modules(model)
    length = tokens.shape[1] - len(chain)
    hidden = [model(tokens[:, :length])]
    for place, module in enumerate(chain, 1):
        embedded = model.embed(tokens[:, place : place + length])
        hidden.append(module(embedded, hidden[-1], whole, [None] * len(module.blocks)))
    return [model.logits(each) for each in hidden]


def losses(model: Decoder, tokens: Tensor) -> list[Tensor]:
    """Mean cross-entropy of the next token and of what each of D modules predicts, in nats;
    tokens: [B, T + D + 1]."""
    made = logits(model, tokens[:, :-1])
    targets = tokens.unfold(1, made[0].shape[1], 1)[:, 1:]  # [B, D + 1, T]
    return [
        F.cross_entropy(scores.flatten(0, 1), targets[:, place].flatten())
        for place, scores in enumerate(made)
    ]


class Trainer:
    """One run. `step` is how many steps were made."""

    def __init__(
        self, config: Mapping[str, Any], plan: Plan, tokens: np.ndarray[Any, Any], device: str
    ) -> None:
        self.plan = plan
        self.config = dict(config)
        self.device = torch.device(device)
        self.model = fresh(config, plan.seed).to(self.device)
        self.step = 0
        more = 1 + depth(self.model, plan.length)
        self._windows = Windows(tokens, plan, self.device, more)
        # Scans are computed in float32; on a GPU their products may take its faster matrix units.
        torch.set_float32_matmul_precision("high")
        self._identity = {
            "plan": asdict(plan), "config": self.config, "data": digest(tokens.tobytes()),
        }  # fmt: skip
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if p.dim() != 2]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": plan.decay},
             {"params": others, "weight_decay": 0.0}],
            lr=plan.rate, betas=(0.9, 0.95), fused=True,
        )  # fmt: skip

    def compile(self) -> None:
        """Fuse each block's operations. The first step then takes minutes, the others less."""
        # The blocks share one forward, of which each kind of layer is a version.
        torch._dynamo.config.recompile_limit = 64
        parts = (self.model.blocks, *(module.blocks for module in modules(self.model)))
        for block in itertools.chain(*parts):
            block.compile(dynamic=False)

    def train(self, tell: Callable[[str], None], stop: Callable[[], bool], folder: Path) -> bool:
        """Steps until the plan is done or `stop()`; whether it is done. Leaves a checkpoint in
        `folder`. Raises DifyopsError when the loss is no number any more."""
        since = saved = time.monotonic()
        first = self.step
        total = torch.zeros(2, device=self.device)
        while self.step < self.plan.steps and not stop():
            total += self._one()
            self.step += 1
            if self.step % LOG_STEPS == 0 or self.step == self.plan.steps:
                # The only wait for the device: what was added up since the last line.
                mean = (total / (self.step - first)).tolist()
                now = time.monotonic()
                tell(self._line(mean, (self.step - first) / (now - since)))
                if not math.isfinite(mean[0]):
                    raise DifyopsError(f"the loss is {mean[0]}", "try a lower --rate")
                total.zero_()
                since, first = now, self.step
                if now - saved > SAVE_SECONDS:
                    self.save(folder)
                    saved = now
        self.save(folder)
        return self.step >= self.plan.steps

    def _one(self) -> Tensor:
        """One step. Both losses: [2], still on the device."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.plan.rate_at(self.step)
        gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=gpu):
            loss, *deeper = losses(self.model, self._windows.batch(self.step))
        # The modules' loss is the mean over their depths (arXiv:2412.19437, eq. 25).
        ahead = torch.stack(deeper).mean() if deeper else loss * 0
        (loss + self.plan.mtp_weight * ahead).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return torch.stack((loss, ahead)).detach()

    def _line(self, mean: list[float], pace: float) -> str:
        plan = self.plan
        left = (plan.steps - self.step) / pace / 60
        ahead = f"  mtp {mean[1]:.3f}" if modules(self.model) else ""
        return (
            f"step {self.step}/{plan.steps}  loss {mean[0]:.3f}{ahead}  "
            f"{pace * plan.batch * plan.length / 1000:.0f}k tokens/s  {left:.1f} min left"
        )

    def save(self, folder: Path) -> None:
        """The weights and the optimizer's state, in one file."""
        state = self._optimizer.state_dict()["state"]
        tensors = {f"model.{name}": t for name, t in self._weights().items()}
        for number, kept in state.items():
            tensors |= {f"optimizer.{number}.{name}": t for name, t in kept.items()}
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"step": str(self.step), "identity": json.dumps(self._identity)}
        native.write_weights(
            folder / CHECKPOINT, {k: t.cpu().contiguous() for k, t in tensors.items()}, facts
        )

    def resume(self, folder: Path) -> bool:
        """Go on from the checkpoint in `folder`, if there is one; whether there was. Raises
        UsageError when it is of another run."""
        path = folder / CHECKPOINT
        if not path.is_file():
            return False
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            identity = json.loads(facts.get("identity", "{}"))
            if identity != self._identity:
                other = [k for k, v in self._identity.items() if identity.get(k) != v]
                raise UsageError(
                    f"{path}: a run with another {', '.join(other)}",
                    "give the same options, or another folder",
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.step = int(facts["step"])
        weights = self._weights()
        for name, weight in weights.items():
            weight.copy_(tensors[f"model.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        return True

    def _weights(self) -> dict[str, Tensor]:
        """What is trained and what belongs to it; tied weights once."""
        weights = {name: t.detach() for name, t in self.model.state_dict().items()}
        if self.model.tied:
            del weights["head.weight"]
        return weights

    def result(self) -> Decoder:
        """A copy as it is served: in bfloat16, on the CPU."""
        made = native.build(self.config)
        made.load_state_dict(self.model.state_dict())
        return made.to(torch.bfloat16)
