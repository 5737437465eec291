"""Looking at one check, as doctor does, and pasting its fix into a shell."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from difyops import checks, doctor, settings
from difyops.core import Deployment
from difyops.doctor import Result
from difyops.secrets import Secret, Secrets


def examine(deployment: Deployment, name: str) -> Result:
    """The result of one check, after what it needs."""
    report = doctor.run(deployment, doctor.select(checks.ALL, [name]))
    result = next(r for r in report.results if r.id == name)
    declared = next(c for c in checks.ALL if c.id == name)
    assert result.status in (*declared.answers, "ok", "skip"), "docs/doctor.md would be wrong"
    assert (result.fix is not None) == (result.status in ("warn", "fail")), result
    assert "could not be checked" not in result.evidence, result
    return result


def set_to(deployment: Deployment, **changes: Any) -> Deployment:
    """The same deployment as if its difyops.yaml said otherwise."""
    data = deployment.settings.model_dump()
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(data[key], dict)
        data[key] = {**data[key], **value} if both else value
    return dataclasses.replace(deployment, settings=settings.parse(data))


def with_secrets(deployment: Deployment, **values: str) -> Deployment:
    """The same deployment as if its secrets.env held other values."""
    old = deployment.secrets
    kept = {name: old[name] for name in old.names()}
    new = {**kept, **{name: Secret(value) for name, value in values.items()}}
    return dataclasses.replace(deployment, secrets=Secrets(new, old.path))


def paste(fix: str | None, cwd: Path = Path("/")) -> None:
    """Run a fix as a person would, from anywhere."""
    assert fix
    bin_folder = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", fix],
        cwd=cwd,
        env={**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{fix}\n{done.stdout}{done.stderr}"
