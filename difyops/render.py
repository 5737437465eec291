"""Plan -> files, each with a verb. A file that a person edited is kept, and said so."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from difyops.core import Deployment, File, Plan
from difyops.files import digest, write_atomic

Verb = Literal["created", "same", "changed", "kept"]


@dataclass(frozen=True)
class Rendered:
    """What became, or would become, of one file. `kept`: a person's edit stands."""

    path: Path  # relative to the deployment directory
    verb: Verb
    diff: str = ""  # empty for private files: they hold secrets


def write(
    deployment: Deployment, plan: Plan, *, dry: bool = False, force: bool = False
) -> list[Rendered]:
    """Write every file of the plan (nothing when `dry`); `force` overwrites edited ones too."""
    record = _read_record(deployment)
    results = [_write_one(deployment, file, record, dry, force) for file in plan.files]
    if not dry:
        _write_record(deployment, record)
    return results


def _write_one(
    deployment: Deployment, file: File, record: dict[str, str], dry: bool, force: bool
) -> Rendered:
    target, name = deployment.paths.root / file.path, str(file.path)
    try:
        # As bytes: a changed line ending is an edit, and a file that is not UTF-8 is one, too.
        now: str | None = target.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        now = None
    owner = deployment.owner if file.for_service else None
    mode = 0o600 if file.private else 0o644
    if now == file.text:
        record[name] = digest(file.text)
        if not dry and _differs(target, mode, owner):
            write_atomic(target, file.text, mode=mode, owner=owner)
        return Rendered(file.path, "same")
    verb: Verb = "created" if now is None else "changed"
    if now is not None and record.get(name) != digest(now) and not force:
        verb = "kept"
    elif not dry:
        write_atomic(target, file.text, mode=mode, owner=owner)
        record[name] = digest(file.text)
    return Rendered(file.path, verb, "" if file.private else _diff(now or "", file.text, name))


def _differs(target: Path, mode: int, owner: tuple[int, int] | None) -> bool:
    info = target.stat()
    return info.st_mode & 0o777 != mode or (owner is not None and info.st_uid != owner[0])


def _diff(before: str, after: str, name: str) -> str:
    lines = difflib.unified_diff(
        before.splitlines(True), after.splitlines(True), f"{name} (now)", f"{name} (rendered)"
    )
    return "".join(lines)


def _record_path(deployment: Deployment) -> Path:
    return deployment.paths.etc / ".rendered.json"


def _read_record(deployment: Deployment) -> dict[str, str]:
    """path -> digest of what was last rendered there; a file that differs from it was edited."""
    try:
        record: dict[str, str] = json.loads(_record_path(deployment).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record


def _write_record(deployment: Deployment, record: dict[str, str]) -> None:
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    path = _record_path(deployment)
    if not path.exists() or path.read_text() != text:
        write_atomic(path, text)
