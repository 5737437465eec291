"""What is read from Dify's own files: its version, its Celery queues, its newest migration.

Nothing of Dify is imported or run: these answers are needed before its dependencies are there.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

from difyops.errors import DifyopsError, UsageError

PACKAGING = "api/configs/packaging/__init__.py"
PYPROJECT = "api/pyproject.toml"
ENTRYPOINT = "api/docker/entrypoint.sh"
MIGRATIONS = "api/migrations/versions"
_NEEDED = (PYPROJECT, "api/app.py", ENTRYPOINT, MIGRATIONS)

_VERSION = re.compile(
    r"""CURRENT_VERSION\b[^=]*=\s*Field\([^()]*?\bdefault\s*=\s*["']([^"']+)["']"""
)


def version(read: Callable[[str], str | None], where: str) -> str:
    """Dify's version. `read` gives the text of a file by its path in the tree, or None.

    Up to 1.0 it stands in the settings class, later in pyproject.toml. Raises UsageError naming
    `where` if it is in neither.
    """
    found = _VERSION.search(read(PACKAGING) or "")
    if found:
        return found[1]
    try:
        project = tomllib.loads(read(PYPROJECT) or "").get("project", {})
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where}: {PYPROJECT}: {error}", "give an unchanged Dify tree") from None
    if isinstance(project.get("version"), str):
        return str(project["version"])
    raise UsageError(
        f"{where} does not look like Dify: no version in {PACKAGING} or {PYPROJECT}",
        "give the top folder of a Dify checkout, or a tarball of it",
    )


def require(tree: Path, where: str) -> None:
    """Raises UsageError unless `tree` has the files we run Dify from; `where` names it."""
    missing = [name for name in _NEEDED if not (tree / name).exists()]
    if missing:
        found = sorted(p.name for p in tree.iterdir()) if tree.is_dir() else []
        shown = ", ".join(found[:8]) + (", …" if len(found) > 8 else "") or "nothing"
        raise UsageError(
            f"{where} does not look like Dify: looked for {', '.join(missing)}; found {shown}",
            "give the top folder of a Dify checkout, or a tarball of it",
        )


def queues(tree: Path) -> list[str]:
    """The Celery queues of a self-hosted worker, from the container's entrypoint.

    A queue that no worker consumes holds its tasks forever, so a list that cannot be read is an
    error, never a guess.
    """
    path = tree / ENTRYPOINT
    text = _text(path)
    lists = _default_queues(text) or set(re.findall(r"\$\{CELERY_QUEUES:-([\w,.-]+)\}", text))
    if len(lists) != 1:
        raise DifyopsError(
            f"{path}: {len(lists)} lists of Celery queues for a self-hosted worker, expected one",
            "use an unchanged Dify tree, or one of the supported releases",
        )
    return [name for name in lists.pop().split(",") if name]


def _default_queues(script: str) -> set[str]:
    """What DEFAULT_QUEUES is set to outside the branches that are for Dify's own cloud."""
    found = set()
    branches: list[str] = []  # the condition of each `if` that is open here
    for raw in script.splitlines():
        line = raw.strip()
        word = re.match(r"(if|elif|else|fi)\b", line)
        if word and word[1] == "if":
            branches.append(line)
        elif word and branches:
            condition = branches.pop()
            if word[1] == "elif":
                branches.append(line)
            elif word[1] == "else":
                branches.append(f"else of {condition}")
        value = re.match(r"""DEFAULT_QUEUES=["']?([\w,.-]+)["']?\s*(?:#.*)?$""", line)
        if value and not any(_is_cloud(branch) for branch in branches):
            found.add(value[1])
    return found


def _is_cloud(condition: str) -> bool:
    return bool(re.match(r"""(?:el)?if\b.*EDITION\b.*[^!]==?\s*["']?CLOUD""", condition))


_REVISION = re.compile(r"""^revision\b[^=\n]*=\s*["'](\w+)["']""", re.M)
_PARENT = re.compile(r"^down_revision\b[^=\n]*=\s*(\([^)]*\)|[^#\n]*)", re.M)


def migration_head(tree: Path) -> str:
    """The newest revision of Dify's database schema. Raises DifyopsError unless there is one."""
    folder = tree / MIGRATIONS
    revisions: set[str] = set()
    parents: set[str] = set()
    for path in sorted(folder.glob("*.py")):
        text = _text(path)
        revision = _REVISION.search(text)
        parent = _PARENT.search(text)
        if revision and parent:
            revisions.add(revision[1])
            parents.update(re.findall(r"""["'](\w+)["']""", parent[1]))
        elif path.name != "__init__.py":
            raise DifyopsError(f"{path}: no revision and down_revision", "use an unchanged tree")
    heads = sorted(revisions - parents)
    if len(heads) != 1:
        named = f": {', '.join(heads)}" if heads else ""
        raise DifyopsError(
            f"{folder}: {len(heads)} migration heads{named}, expected one",
            "migrations of two branches were mixed: use an unchanged tree, or merge the heads",
        )
    return heads[0]


def knows_migration(tree: Path, revision: str) -> bool:
    """Whether a database at `revision` is one that this code can be migrated from."""
    for path in (tree / MIGRATIONS).glob("*.py"):
        found = _REVISION.search(_text(path))
        if found and found[1] == revision:
            return True
    return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DifyopsError(f"{path} cannot be read: {error}", "fetch Dify's code again") from None
