"""/metrics: what the engine counts, and that the table of names has them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from difyops.engine.metrics import Metrics
from difyops.engine.runner import Engine
from tests.engine import tiny
from tests.engine.test_exact import answers, asked, ended

DOCS = Path(__file__).parents[2] / "docs" / "engine.md"
CONTEXT = 256


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def watched(prefix_bytes: int) -> tuple[Engine, Metrics]:
    model = tiny.model("hybrid", context=CONTEXT)[0]
    engine = Engine(model, slots=2, context=CONTEXT, prefix_bytes=prefix_bytes)
    metrics = Metrics()
    metrics.watch(engine)
    return engine, metrics


def samples(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {s.name.removeprefix("difyops_"): s.value for f in families for s in f.samples}


def test_every_metric_is_in_the_table_and_no_other() -> None:
    _, metrics = watched(10**6)
    shown = set()
    for family in text_string_to_metric_families(metrics.text().decode()):
        if family.name.endswith("_created"):  # the library's own, of each histogram
            continue
        ending = "_total" if family.type == "counter" else ""
        shown.add(family.name.removeprefix("difyops_") + ending)
    section = DOCS.read_text(encoding="utf-8").split("## Metrics")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == shown


def test_the_prefix_cache_and_passes_are_counted() -> None:
    engine, metrics = watched(10**7)
    engine.start()
    prompt = [i % 50 for i in range(150)]
    for _ in range(2):
        answers(engine, asked([prompt], count=5))
    seen = samples(metrics)
    usage = engine.stats().prefix
    ended(engine)
    assert usage is not None
    assert (seen["prefix_lookup_tokens_total"], seen["prefix_hit_tokens_total"]) == (300, 128)
    assert seen["prompt_tokens_total"] == 150 + 22
    assert seen["decode_passes_total"] == 2 * 4  # the first token of each comes from its prompt
    # Behind 128 and 150 tokens, and behind the answer.
    assert (seen["prefix_states"], seen["prefix_limit_bytes"]) == (3, 10**7)
    assert 0 < seen["prefix_bytes"] == usage.bytes < 10**7


def test_without_a_prefix_cache_there_is_nothing_to_tell_of_it() -> None:
    _, metrics = watched(0)
    assert not [name for name in samples(metrics) if name.startswith("prefix")]
