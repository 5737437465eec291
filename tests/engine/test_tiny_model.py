"""The trained hybrid: real text, where guesses do come true."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from difyops.engine import drafters
from difyops.engine.load import Loaded, load
from difyops.engine.runner import Engine
from tests.engine.test_exact import answers, asked, ended

FOLDER = Path(__file__).parents[2] / "models" / "tiny-hybrid"
PROMPTS = (
    "To install the package on a Debian system, you",
    "<|im_start|>user\nWhat is a virtual environment?<|im_end|>\n<|im_start|>assistant\n",
    "The options of this command are:\n\n",
    "A function is called with",
)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    torch.set_num_threads(1)
    return load(FOLDER, dtype="float64")


def test_its_mtp_is_often_right_and_changes_nothing(loaded: Loaded) -> None:
    prompts = [loaded.tokenizer.encode(text) for text in PROMPTS]
    drafter = drafters.choose("auto", loaded.model)
    assert isinstance(drafter, drafters.Mtp)
    plain = Engine(loaded.model, slots=4, context=256)
    guessing = Engine(loaded.model, slots=4, context=256, drafter=drafter, guesses=2)
    plain.start()
    guessing.start()
    said = answers(plain, asked(prompts, 48))
    assert answers(guessing, asked(prompts, 48)) == said
    counts = guessing.stats().counters
    assert counts.accepted[0] > 0.6 * counts.drafted[0]
    # Fewer passes of the model than tokens, by what came true.
    assert guessing.stats().counters.passes < 0.7 * plain.stats().counters.passes
    ended(plain)
    ended(guessing)
