"""Gather what is known about a deployment directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from difyops import checkout, dify_python, dify_source, dify_tree, identity, releases, settings
from difyops.core import Deployment, Facts, Paths
from difyops.errors import DifyopsError
from difyops.secrets import Secrets
from difyops.services import pg_binaries, valkey


def load(root: Path, source: str | None = None) -> Deployment:
    """Read settings, secrets and what is installed. `source` overrides where Dify comes from.

    Raises UsageError for a directory that is not a deployment, or a wrong setting.
    """
    paths = Paths(root.resolve())
    wanted = settings.load(paths.settings)
    secrets = Secrets.load(paths.secrets)
    release = releases.get(wanted.dify.version)
    user = identity.find(identity.wanted(wanted.run_as, paths.root))
    if source is not None:
        source = str(dify_source.parse(source, Path.cwd()))
    known = Deployment(paths, wanted, secrets, release, user, source=source or wanted.dify.source)
    tree = paths.source(release.version)
    code = checkout.identity(tree)
    facts = Facts(
        postgres=pg_binaries.installed(known) if wanted.postgres.provider != "external" else None,
        valkey=valkey.installed(known) if wanted.redis.provider != "external" else None,
        checkout=code,
        queues=_queues(tree) if code else (),
        environment=dify_python.identity(known),
        server=_server(),
        python=identity.own_python(),
        python_reachable=user is None
        or identity.can(user, "x", Path(os.path.realpath(sys.executable))),
    )
    return Deployment(paths, wanted, secrets, release, user, facts, known.source)


def of_server(url: str, model: str | None) -> Deployment:
    """Nothing but a model server that somebody else runs; nothing of it is on disk. Without
    `model` the server's first.

    Raises UsageError for what is no URL, and DifyopsError when the server has to be asked for its
    models and cannot be.
    """
    # Imported here: every command loads a deployment, and few ask a server.
    from difyops.backends import probe
    from difyops.openai_client import key_for

    key = key_for(url)
    if model is None:
        try:
            found = [about.id for about in probe.describe(url, key) if not about.dimensions]
        except DifyopsError as error:
            hint = error.hint or "its key is taken from DIFYOPS_MODEL_API_KEY"
            raise DifyopsError(error.message, hint) from error
        if not found:
            raise DifyopsError(f"{url} has no chat model", "--model NAME")
        model = found[0]
    external = {"backend": "external", "url": url, "name": model}
    wanted = settings.parse({"dify": {"enabled": False}, "model": external, "embedding": None})
    paths = Paths(Path.cwd())
    kept = Secrets({"EXTERNAL_MODEL_API_KEY": key} if key else {}, paths.secrets)
    return Deployment(paths, wanted, kept, releases.get(wanted.dify.version), None)


def _queues(tree: Path) -> tuple[str, ...]:
    """Empty for a damaged checkout: it must still be possible to stop, and to look."""
    try:
        return tuple(dify_tree.queues(tree))
    except DifyopsError:
        return ()


def _server() -> str:
    """Versions of what serves models: another one is loaded at the next `up`."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("difyops", "xllamacpp", "torch", "onnxruntime", "tokenizers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # an extra that is not installed
            continue
    return ", ".join(found)
