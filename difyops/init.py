"""`difyops init`: ask what is missing, write difyops.yaml and secrets.env, once."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from difyops import catalog, releases, secrets, settings
from difyops.core import Paths
from difyops.errors import UsageError
from difyops.files import dotenv_text, write_atomic
from difyops.openai_client import KEY_VARIABLE as KEY_VARIABLE  # `init` takes it, too

HEADER = """\
# What you want of this Dify; yours to edit. Then: difyops up --source
# Every key is optional; docs/settings.md describes them all.
"""


@dataclass(frozen=True)
class Made:
    """What `init` did in a directory: `created` or `same` for each file."""

    root: Path
    settings: str
    secrets: list[str]  # names added


def run(
    root: Path,
    answers: dict[str, Any],
    ask: Callable[[], dict[str, Any]],
    model_key: str | None = None,
) -> Made:
    """Make `root` a deployment directory; a second run changes nothing.

    `answers` come from flags; `ask` is called for the rest when there is no difyops.yaml yet.
    `model_key` goes to secrets.env where a model is somebody else's.
    Raises UsageError for a wrong answer, before anything is written.
    """
    paths = Paths(root.resolve())
    if (paths.data / "postgres" / "PG_VERSION").exists() and not paths.secrets.exists():
        raise UsageError(
            f"{paths.secrets} is missing, and data/ was made with it",
            "put it back from a backup: the databases, the account and stored keys need its values",
        )
    text = None
    if _exists(paths.settings):
        if answers:
            raise UsageError(
                f"{paths.settings} is there already, and init does not change it",
                "edit it, then: difyops up --source",
            )
        wanted = settings.load(paths.settings)
    else:
        chosen = _merged(_defaults(), ask(), answers)
        wanted = settings.parse(chosen)
        _check_names(wanted)
        text = HEADER + _yaml(chosen)
    given = {}
    if model_key and _has_external_model(wanted):
        given["EXTERNAL_MODEL_API_KEY"] = model_key
        dotenv_text(given)  # refuses what cannot be kept
    try:
        if text is not None:
            write_atomic(paths.settings, text)
        added = secrets.ensure(paths.secrets, given)
    except OSError as error:
        raise UsageError(
            f"{paths.root} cannot be written: {error.strerror}",
            "name another directory: difyops init DIR",
        ) from None
    return Made(paths.root, "same" if text is None else "created", added)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        raise UsageError(f"{path.parent} cannot be read", "name another directory") from None


def _check_names(wanted: settings.Settings) -> None:
    """Names that only the release list and the catalog know."""
    releases.get(wanted.dify.version)
    if wanted.model.backend != "external" and wanted.model.source is None:
        _check_chat_model(wanted.model.name, wanted.model.backend)
    if wanted.embedding and wanted.embedding.url is None:
        catalog.get_embedding(wanted.embedding.name)


def _check_chat_model(name: str, backend: str) -> None:
    try:
        catalog.get_llm(name)
    except UsageError as error:
        if name in catalog.bundled_names():
            raise UsageError(f"{name} is served by our own engine", "--backend native") from None
        if backend != "native":
            raise
        own = "one of your own: --model-source SOURCE (model.source in difyops.yaml)"
        raise UsageError(error.message, f"{error.hint}; {own}") from None


def _has_external_model(wanted: settings.Settings) -> bool:
    embedding = wanted.embedding.url if wanted.embedding else None
    return wanted.model.backend == "external" or embedding is not None


def _defaults() -> dict[str, Any]:
    """What `--yes` writes. A port that is taken now is not one to begin with."""
    taken: set[int] = set()
    known = settings.Settings()
    return {
        "dify": {"version": known.dify.version, "port": _free(known.dify.port, taken)},
        "mode": known.mode,
        "model": {
            "backend": known.model.backend,
            "name": known.model.name,
            "port": _free(known.model.port, taken),
        },
        "embedding": {"name": settings.Embedding().name},
        "vector_store": known.vector_store,
        "postgres": {
            "provider": known.postgres.provider,
            "port": _free(known.postgres.port, taken),
        },
        "redis": {"provider": known.redis.provider, "port": _free(known.redis.port, taken)},
    }


def _free(port: int, taken: set[int]) -> int:
    """The first port from `port` on that nobody listens on; two calls never get the same."""
    for candidate in range(port, port + 200):
        if candidate not in taken and is_free(candidate):
            taken.add(candidate)
            return candidate
    return port


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen on this TCP port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _merged(*parts: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            old = result.get(key)
            both = isinstance(old, dict) and isinstance(value, dict)
            result[key] = _merged(old or {}, value) if both else value
    return result


def _yaml(value: dict[str, Any]) -> str:
    """A section a line where it is short, as a person would write it."""
    lines = []
    for key, entry in value.items():
        flow = isinstance(entry, dict)
        text = yaml.safe_dump(
            entry, sort_keys=False, default_flow_style=flow, width=10_000, allow_unicode=True
        )
        lines.append(f"{key}: {text.removesuffix(chr(10)).removesuffix('...').rstrip()}\n")
    return "".join(lines)


def enable_dify(path: Path) -> None:
    """Turn `dify.enabled` on in a difyops.yaml that `--without-dify` wrote; nothing else changes.

    Raises UsageError when a person has written that key in a way of their own.
    """
    text = path.read_text(encoding="utf-8")
    changed = text.replace("enabled: false, ", "", 1).replace(", enabled: false", "", 1)
    if changed == text or not settings.parse(yaml.safe_load(changed), path.name).dify.enabled:
        raise UsageError(f"{path}: dify.enabled is false", "set dify.enabled: true there")
    write_atomic(path, changed)


def answers(
    *,
    version: str | None,
    model: str | None,
    model_url: str | None,
    base_url: str | None,
    without_dify: bool,
    backend: str | None = None,
    model_source: str | None = None,
) -> dict[str, Any]:
    """What the flags say, in the shape of difyops.yaml; empty where there are none."""
    given: dict[str, Any] = {}
    dify = {"version": version, "base_url": base_url, "enabled": False if without_dify else None}
    if dify := {k: v for k, v in dify.items() if v is not None}:
        given["dify"] = dify
    if model_url and not model:
        raise UsageError("--model-url needs the name of a model there", "--model NAME")
    if model_url and backend:
        raise UsageError("--backend is for a model here, --model-url for one elsewhere", "one only")
    if model_source and backend != "native":
        raise UsageError("--model-source is for the native engine", "--backend native")
    if model_source and not model:
        raise UsageError("--model-source needs a name to call the model by", "--model NAME")
    if model_source and (path := Path(model_source).expanduser()).exists():
        model_source = str(path.absolute())  # in difyops.yaml it is seen from the deployment
    backend = "external" if model_url else backend
    about = {"backend": backend, "name": model, "source": model_source, "url": model_url}
    if about := {k: v for k, v in about.items() if v is not None}:
        given["model"] = about
    return given


def ask(given: dict[str, Any]) -> dict[str, Any]:
    """Ask for what no flag said. Raises UsageError when there is nobody to ask."""
    if not sys.stdin.isatty():
        raise UsageError("init would ask, and there is no terminal", "difyops init --yes")
    said: dict[str, Any] = {}
    if "model" not in given:
        url = _prompt("URL of your OpenAI-compatible model server (empty: a small one here)")
        if url:
            said["model"] = {"backend": "external", "url": url, "name": _prompt("Its model's name")}
    if "base_url" not in given.get("dify", {}):
        base = _prompt("URL that people will open (empty: only this machine)")
        if base:
            said["dify"] = {"base_url": base}
    return said


def _prompt(question: str) -> str:
    """A line from the terminal. The question goes to stderr: stdout is for the payload."""
    sys.stderr.write(f"{question}: ")
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:  # Ctrl-D
        raise KeyboardInterrupt
    return line.strip()
