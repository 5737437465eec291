"""Deployments that exist only in memory, and the option that renews the golden trees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from difyops import releases, settings
from difyops.core import Deployment, Facts, Paths, User
from difyops.secrets import GENERATORS, Secret, Secrets

ROOT = Path("/srv/dify")
USER = User("difyops", 990, 990, "/nonexistent")
FACTS = Facts(
    postgres="16.14 (wheel)",
    valkey="9.1.2 (wheel)",
    checkout="ca19bd31d42fb87c83b91541c473ebae85e9d14e",
    queues=("dataset", "generation", "mail"),
    environment="environment-1",
)
SECRETS = {name: f"golden{name.replace('_', '').lower()}1" for name in GENERATORS}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/unit/golden anew")


def deployment(
    changes: dict[str, Any] | None = None,
    *,
    root: Path = ROOT,
    user: User | None = None,
    facts: Facts = FACTS,
    **secrets: str,
) -> Deployment:
    """A deployment of Dify 0.15.3 with fixed secrets; nothing of it is on disk."""
    values = {name: Secret(value) for name, value in {**SECRETS, **secrets}.items()}
    wanted = settings.parse(changes or {})
    kept = Secrets(values, root / "secrets.env")
    return Deployment(Paths(root), wanted, kept, releases.get(wanted.dify.version), user, facts)
