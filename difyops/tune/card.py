"""The model directory that a run ends with, and its model card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from difyops.engine.layout import read_json
from difyops.engine.models import native
from difyops.files import write_atomic
from difyops.tune.evaluate import Scores
from difyops.tune.pretrain import Trainer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_model(trainer: Trainer, data: Path, folder: Path) -> None:
    """Weights in bfloat16, config and the tokenizer's files; `data` is what `tune data` made."""
    ends = read_json(data / "generation_config.json").get("eos_token_id")
    native.save(trainer.result(), {**trainer.config, "eos_token_id": ends}, folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(data / name, folder / name)


def write_card(name: str, trainer: Trainer, data: Path, scores: Scores, folder: Path) -> None:
    """README.md, from the same facts as the weights."""
    facts = read_json(data / "data.json")
    text = card(name, trainer, facts, scores)
    write_atomic(folder / "README.md", text)


def card(name: str, trainer: Trainer, facts: Mapping[str, Any], scores: Scores) -> str:
    plan, config, model = trainer.plan, trainer.config, trainer.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    extra = sum(parameter.numel() for parameter in model.extra.parameters())
    seen = trainer.step * plan.batch * plan.length
    layers = ", ".join(f"{e.get('repeat', 1)} x {e['mixer']}" for e in config["pattern"])
    mtp = ", ".join(f"{e.get('repeat', 1)} x {e['mixer']}" for e in config.get("mtp", ()))
    if (count := config.get("mtp_modules", 1)) > 1:
        mtp = f"{count} modules of {mtp}"
    stopped = "" if trainer.step >= plan.steps else f" (stopped; {plan.tokens:,} were planned)"
    precision = "bfloat16 with float32 weights" if trainer.device.type == "cuda" else "float32"
    lines = [
        f"# difyops-tiny-{name}",
        "",
        "A very small language model for tests and measurements of difyops' engine. It writes text "
        "in the manner of technical documentation; what it says is not to be relied on.",
        "",
        "To try it: `difyops serve` and this directory's path.",
        "",
        *_table(("", ""), [
            ("parameters", f"{parameters:,}, of them {extra:,} for multi-token prediction"),
            ("layers", layers),
            ("multi-token prediction", mtp or "none"),
            ("width, MLP, vocabulary",
             f"{config['width']}, {config['mlp_hidden']}, {config['vocabulary']}"),
            ("trained on sequences of", f"{plan.length} tokens"),
            ("tokens seen", f"{seen:,}{stopped}, of {facts['train']['tokens']:,} different ones"),
            ("training", f"AdamW, rate {plan.rate:g}, cosine to 0, {plan.batch * plan.length:,} "
             f"tokens a step, weight of the multi-token prediction loss {plan.mtp_weight:g}, "
             f"seed {plan.seed}; {precision}"),
        ]),
        "",
        "## On held-out text",
        "",
        f"One document in a hundred was held out ({facts['heldout']['documents']:,} documents); no "
        "paragraph stands in both parts.",
        "",
        *_table(("", ""), scores.lines()),
        "",
        "## Data",
        "",
        "Text of Debian's documentation packages, each paragraph once, shuffled by document. About "
        "one document in ten is told as a dialogue that a program made of it: a section's heading "
        "is the question, what stands under it the answer; nobody checked these dialogues.",
        "",
        *_table(("package", "version", "licence", "documents", "bytes"), [
            (row["package"], row["version"], row["licence"], f"{row['documents']:,}",
             f"{row['bytes']:,}")
            for row in facts["packages"]
        ]),
        "",
        f"Tokenizer: byte-level BPE of {facts['vocabulary']:,} tokens, trained on the same text; "
        f"{facts['train']['bytes'] / facts['train']['tokens']:.2f} bytes of it a token. "
        "Dialogues are in ChatML.",
        "",
        "To make it again: `difyops tune data DATA`, then "
        f"`difyops tune pretrain {name} DATA OUT --tokens {plan.tokens}`.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    ruled = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(row) + " |" for row in ruled]
