"""Finding a Python that satisfies a requirement and that the service's user can really run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from difyops.core import User
from difyops.errors import PrerequisiteError
from difyops.identity import as_user

# What Dify's packages import and what a home-made Python tends to lack.
_MODULES = ("bz2", "ctypes", "sqlite3", "ssl", "zlib")
_PROBE = f"""
import importlib, json, sys
lacks = []
for name in {_MODULES!r}:
    try: importlib.import_module(name)
    except ImportError: lacks.append(name)
base = getattr(sys, "_base_executable", None) or sys.executable
print(json.dumps([sys.implementation.name, list(sys.version_info[:3]), base, lacks]))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python outside any virtual environment, as it described itself when it was run."""

    path: Path
    version: tuple[int, int, int]

    @property
    def text(self) -> str:
        return ".".join(map(str, self.version))


def satisfies(version: tuple[int, int, int], requires: str) -> bool:
    """Whether a Python version meets `requires`, e.g. ">=3.11,<3.13" or "~=3.12.0".

    The requirements are those of releases.yaml: plain releases, no wildcards.
    """
    return all(_clause(version, clause.strip()) for clause in requires.split(",") if clause.strip())


def _clause(version: tuple[int, int, int], clause: str) -> bool:
    parsed = re.fullmatch(r"(>=|<=|==|!=|~=|<|>)\s*(\d+(?:\.\d+)*)", clause)
    if not parsed:
        raise ValueError(f"not a Python requirement: {clause!r}")
    given = [int(part) for part in parsed[2].split(".")]
    wanted = (*given, 0, 0)[:3]
    match parsed[1]:
        case ">=":
            return version >= wanted
        case "<=":
            return version <= wanted
        case "<":
            return version < wanted
        case ">":
            return version > wanted
        case "==":
            return version == wanted
        case "!=":
            return version != wanted
    stem = given[:-1]
    return version >= wanted and list(version[: len(stem)]) == stem


def find_interpreter(requires: str, user: User | None, uv: Path | None = None) -> Path:
    """A CPython that meets `requires` and that `user` (None: whoever runs us) can run.

    An interpreter below somebody's private home passes every check of root and then fails in the
    service, so each candidate is run as `user`. Raises PrerequisiteError that names what was found
    and why it was refused.
    """
    return probe_all(requires, user, uv).path


def probe_all(requires: str, user: User | None, uv: Path | None = None) -> Interpreter:
    """As `find_interpreter`, with the version."""
    refused: list[str] = []
    seen: set[Path] = set()
    for candidate in _candidates(uv):
        if candidate in seen:
            continue
        seen.add(candidate)
        found = probe(candidate, requires, user)
        if isinstance(found, Interpreter):
            return found
        refused.append(f"  {candidate}: {found}")
    minor = _example(requires)
    who = f" that the user {user.name} can run" if user else ""
    raise PrerequisiteError(
        f"no Python {requires}{who}; found:\n" + ("\n".join(refused) or "  none"),
        f"install one for everybody: `apt install python{minor}`, or "
        f"`UV_PYTHON_INSTALL_DIR=/opt/python uv python install {minor}` and put it on PATH",
    )


def probe(candidate: Path, requires: str, user: User | None) -> Interpreter | str:
    """Run one candidate as `user`: the interpreter, or why it will not do."""
    who = user.name if user else "us"
    try:
        answer = subprocess.run(
            [candidate, "-I", "-c", _PROBE],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            cwd="/",
            text=True,
            timeout=20,
            **as_user(user),
        )
        kind, version, base, lacks = json.loads(answer.stdout.splitlines()[-1])
    except OSError as error:
        return f"cannot be run by {who}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return "does not answer"
    except (ValueError, IndexError):
        said = answer.stderr.strip().splitlines()
        return f"cannot be run by {who}: {said[0] if said else f'exit {answer.returncode}'}"
    found = Interpreter(Path(base), (version[0], version[1], version[2]))
    if kind != "cpython":
        return f"is {kind}, not CPython"
    if not satisfies(found.version, requires):
        return f"is {found.text}"
    if lacks:
        return f"lacks {', '.join(lacks)}"
    return found


def _candidates(uv: Path | None) -> Iterator[Path]:
    """Ours first: it is known to work here. Newest first among the others."""
    yield Path(getattr(sys, "_base_executable", None) or sys.executable)
    names = [f"python3.{minor}" for minor in range(14, 10, -1)] + ["python3"]
    for name in names:
        found = shutil.which(name)
        if found:
            yield Path(found)
        for folder in ("/usr/local/bin", "/usr/bin"):
            if Path(folder, name).exists():
                yield Path(folder, name)
    # pyenv's commands on PATH are scripts that refuse a version that is not switched on.
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(pyenv.glob("versions/*/bin/python3"), reverse=True)
    if uv:
        yield from _known_to(uv)


def _known_to(uv: Path) -> Iterator[Path]:
    argv: list[str | Path] = [
        uv,
        "python",
        "list",
        "--only-installed",
        "--offline",
        "--output-format",
        "json",
    ]
    try:
        listed = subprocess.run(argv, capture_output=True, text=True, timeout=20).stdout
        for entry in json.loads(listed or "[]"):
            if entry.get("path"):
                yield Path(entry["path"])
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return  # an extra place to look, not one to depend on


def _example(requires: str) -> str:
    """A minor version that would do, for the remedy: the newest of those that surely exist."""
    fits = [
        minor for minor in (*range(14, 7, -1), *range(15, 40)) if satisfies((3, minor, 0), requires)
    ]
    return f"3.{fits[0]}" if fits else "3"
