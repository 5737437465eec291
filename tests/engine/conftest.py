"""One thread, every kind of mixer, and the real SmolLM2 that several tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from difyops import modelsource
from difyops.engine.load import Loaded, load
from difyops.engine.tokens import Tokenizer
from tests.engine.gates import KINDS


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A mixer's name and its options."""
    return KINDS[request.param]


@pytest.fixture(scope="session")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as GGUF, fetched as difyops itself does."""
    cache = os.environ.get("DIFYOPS_TEST_CACHE")
    folder = Path(cache) if cache else tmp_path_factory.mktemp("models")
    return modelsource.fetch_model("smollm2-135m", folder)["weights"]


@pytest.fixture(scope="session")
def smol_model(smol: Path) -> Loaded:
    return load(smol, dtype="float32")


@pytest.fixture(scope="session")
def smol_tokenizer(smol: Path) -> Tokenizer:
    from difyops.engine.gguf_file import GgufFile
    from difyops.engine.gguf_model import GgufCheckpoint

    return GgufCheckpoint(GgufFile(smol)).tokenizer()
