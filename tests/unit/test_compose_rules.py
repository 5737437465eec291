"""Every fragment below compose/ keeps the rules, whatever it is for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from difyops.text import bundled

FRAGMENTS = sorted(bundled("compose").glob("*.yaml"))


@pytest.fixture(params=FRAGMENTS, ids=lambda path: path.stem)
def fragment(request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any]]:
    return request.param, yaml.safe_load(request.param.read_text())


def test_there_are_fragments():
    assert {path.stem for path in FRAGMENTS} >= {"postgres", "valkey"}


def test_it_declares_one_service_by_its_name(fragment):
    path, content = fragment
    assert list(content["services"]) == [path.stem]


def test_its_image_is_pinned(fragment):
    for service in fragment[1]["services"].values():
        name, _, tag = service["image"].rpartition(":")
        assert name
        assert re.search(r"\d", tag), f"{service['image']}: no version"
        assert "latest" not in tag


def test_it_has_a_healthcheck_and_no_root(fragment):
    for service in fragment[1]["services"].values():
        assert service["healthcheck"]["test"]
        assert not str(service["user"]).startswith("0")


def test_it_holds_no_secret_and_publishes_no_port(fragment):
    path, content = fragment
    for service in content["services"].values():
        assert "ports" not in service
    for name, value in re.findall(r"^\s+(\w*(?:PASSWORD|AUTH)): (\S+)", path.read_text(), re.M):
        assert value.startswith("${"), name


def test_every_variable_says_what_to_do_when_it_is_missing(fragment):
    variables = re.findall(r"\$\{[^}]+\}", fragment[0].read_text())
    assert all(":?" in variable or ":-" in variable for variable in variables)
