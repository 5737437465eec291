"""What each Dify release needs, as data (releases.yaml)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict

from difyops.errors import UsageError


class Release(BaseModel):
    """One release. `postgres` is the inclusive range of major versions it works with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    commit: str
    python: str
    lock: Literal["poetry"]
    groups: tuple[str, ...]
    replace: dict[str, str]
    postgres: tuple[int, int]
    api: tuple[str, ...]
    worker: tuple[str, ...]


@cache
def all_releases() -> dict[str, Release]:
    data = yaml.safe_load(Path(__file__).with_name("releases.yaml").read_text(encoding="utf-8"))
    return {version: Release(version=version, **entry) for version, entry in data.items()}


def get(version: str) -> Release:
    """The entry of one release. Raises UsageError naming the releases that are known."""
    try:
        return all_releases()[version]
    except KeyError:
        raise UsageError(
            f"dify.version: {version} is not supported",
            f"supported: {', '.join(all_releases())}; set dify.version in difyops.yaml",
        ) from None
