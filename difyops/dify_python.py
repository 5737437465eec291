"""Dify's Python environment: `opt/dify-<version>`, made from the lock file of its checkout."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

from difyops import poetry_lock, trees
from difyops.core import Deployment
from difyops.errors import PrerequisiteError, StepError
from difyops.files import digest
from difyops.identity import as_user
from difyops.interpreters import find_interpreter, probe_all
from difyops.steplog import StepLog

__all__ = ["environment_done", "environment_run", "find_interpreter", "find_uv"]

MARKER = ".difyops-environment.json"


def find_uv() -> Path:
    """uv, from our own environment or PATH. Raises PrerequisiteError."""
    if importlib.util.find_spec("uv"):
        import uv

        try:
            return Path(uv.find_uv_bin())
        except FileNotFoundError:
            pass
    found = shutil.which("uv")
    if found:
        return Path(found)
    raise PrerequisiteError("uv is not installed", "pip install 'difyops[source]'")


def identity(deployment: Deployment) -> str | None:
    """A text that changes when the environment is made anew; None before it is complete."""
    python = deployment.paths.dify_python(deployment.release.version)
    try:
        return digest((python.parent.parent / MARKER).read_text(encoding="utf-8"))
    except OSError:
        return None


def environment_done(deployment: Deployment) -> str | None:
    """Step: what is installed, or None if it is not what the lock file asks for, or cannot run."""
    python = deployment.paths.dify_python(deployment.release.version)
    try:
        made = json.loads((python.parent.parent / MARKER).read_text(encoding="utf-8"))
        inputs = _inputs(deployment)
        if made["inputs"] != inputs or made["python"] != _version(python, deployment):
            return None
        return str(made["detail"])
    except (OSError, ValueError, KeyError, TypeError, StepError):
        return None


def environment_run(deployment: Deployment, log: StepLog) -> str:
    """Step: install what the lock file names.

    The environment is relocatable, so it is built beside the target and renamed: until it is
    complete the old one stays in use, and what a kill leaves is never taken for an environment.

    Bytecode is not compiled here: for everything that is installed that takes a minute and a
    gigabyte, while Dify imports a tenth of it. A PYTHONPYCACHEPREFIX that the service can write to
    saves the same time from its second start on.
    """
    release, settings = deployment.release, deployment.settings
    uv = find_uv()
    inputs = _inputs(deployment)
    lock = _lock(deployment)
    lines = poetry_lock.requirements(
        lock.read_text(encoding="utf-8"), release.groups, release.replace, str(lock)
    )
    interpreter = probe_all(release.python, deployment.user, uv)
    log.write(f"Python {interpreter.text} at {interpreter.path}")
    index = {"UV_DEFAULT_INDEX": settings.mirrors.pypi} if settings.mirrors.pypi else {}
    env = {"UV_NO_PROGRESS": "1", "UV_PYTHON_DOWNLOADS": "never", **index}
    target = deployment.paths.dify_python(release.version).parent.parent
    with trees.replacing(target) as work:
        tree = work / "tree"
        wanted = work / "requirements.txt"
        wanted.write_text("\n".join(lines) + "\n", encoding="utf-8")
        venv: list[str | Path] = [
            uv,
            "venv",
            "--relocatable",
            "--no-project",
            "--python",
            interpreter.path,
            tree,
        ]
        log.call(venv, env=env, what="uv venv")
        log.detail(f"{len(lines)} packages")
        install: list[str | Path] = [
            uv,
            "pip",
            "install",
            "--python",
            tree / "bin" / "python",
            "--no-deps",
        ]
        try:
            # The lock is complete, so nothing is resolved; hashes are checked where there are any.
            log.call(
                [*install, "--verify-hashes", "--requirements", wanted],
                env=env,
                what="uv pip install",
            )
        except StepError as error:
            error.hint = _remedy(error, settings.mirrors.pypi)
            raise
        count = sum(1 for _ in tree.glob("lib/python*/site-packages/*.dist-info"))
        detail = f"{count} packages, Python {interpreter.text}"
        made = {"inputs": inputs, "python": interpreter.text, "detail": detail}
        (tree / MARKER).write_text(json.dumps(made), encoding="utf-8")
        if deployment.user:
            trees.make_readable(tree)
    return detail


def _lock(deployment: Deployment) -> Path:
    return deployment.paths.source(deployment.release.version) / "api" / "poetry.lock"


def _inputs(deployment: Deployment) -> str:
    """A digest of everything that decides what is installed, except the interpreter."""
    release = deployment.release
    what = [release.lock, release.python, list(release.groups), sorted(release.replace.items())]
    return digest(json.dumps([*what, digest(_lock(deployment).read_bytes())]))


def _version(python: Path, deployment: Deployment) -> str:
    """The version of the environment's Python, run as the service's user. Raises OSError.

    It is asked, not remembered: an upgrade of the system replaces the interpreter under the
    environment, and another `run_as` may not reach it.
    """
    user = deployment.user
    answer = subprocess.run(
        [python, "-I", "-S", "-c", "import sys; print('%d.%d.%d' % sys.version_info[:3])"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        cwd="/",
        text=True,
        **as_user(user),
    )
    return str(answer.stdout).strip()


def _remedy(error: StepError, index: str | None) -> str:
    said = " ".join(error.tail).lower()
    where = index or "the package index"
    if "hash mismatch" in said:
        return f"{where} serves other files than the lock names: set mirrors.pypi to another index"
    if "no solution found" in said or "not found in the package registry" in said:
        return (
            f"{where} lacks a package of the lock: set mirrors.pypi in difyops.yaml to a complete "
            "index, e.g. https://pypi.org/simple"
        )
    network = ("error sending request", "failed to fetch", "dns", "connect", "timed out", "offline")
    if any(word in said for word in network):
        return f"{where} cannot be reached: set mirrors.pypi in difyops.yaml to one that can"
    return "the log tells more; `difyops up --source` continues from here"
