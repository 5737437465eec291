"""A real Dify, brought up by the CLI from the checkout that DIFYOPS_E2E_DIFY names."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from difyops import deployment as deployments
from difyops.core import Deployment
from tests.integration.conftest import Cli, end, make

SOURCE = os.environ.get("DIFYOPS_E2E_DIFY", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    reason = "needs a Dify checkout, tarball or git path@ref: DIFYOPS_E2E_DIFY"
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker("e2e")
            item.add_marker(pytest.mark.timeout(1200))
            if not SOURCE:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cli() -> Iterator[Cli]:
    """The CLI on a deployment that a first `up --source` has brought up, timed by the step."""
    folder = Path(tempfile.mkdtemp(prefix="difyops-e2e-"))
    folder.chmod(0o755)
    cli = make(folder / "d", {"dify": {"enabled": True}})
    try:
        first = cli("up", "--source", "--dify", SOURCE, timeout=900)
        print(first.stderr, first.stdout)
        assert first.returncode == 0, first.stderr
        assert "Proved    chat answered" in first.stdout
        yield cli
    finally:
        end(folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def dify(cli: Cli) -> Deployment:
    return deployments.load(cli.root)
