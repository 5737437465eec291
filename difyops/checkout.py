"""Where Dify's code comes from, and how it becomes `src/dify-<version>`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from difyops import archive, dify_tree, git, releases, trees
from difyops.core import Deployment
from difyops.dify_source import Source, parse, refuse_secret
from difyops.dify_tree import migration_head, queues
from difyops.errors import DifyopsError, PrerequisiteError, UsageError
from difyops.files import digest, tree_fingerprint
from difyops.steplog import StepLog

__all__ = [
    "Checkout",
    "Source",
    "checkout_done",
    "checkout_run",
    "fetch",
    "is_current",
    "migration_head",
    "parse",
    "peek",
    "queues",
    "reachable",
]

MANIFEST = ".difyops-checkout.json"
# Made by tools, never part of the code; left out of a copy and of the fingerprint.
SKIPPED = frozenset(
    {
        *(".git", ".venv", ".next", "__pycache__", "node_modules"),
        *(".mypy_cache", ".pytest_cache", ".ruff_cache"),
    }
)
# What a Dify that ran in the directory left there: its data, and settings that would override ours.
_SKIPPED_PATHS = frozenset(("api/storage", "api/.env", "web/.env", "docker/.env", "docker/volumes"))


@dataclass(frozen=True)
class Checkout:
    """A tree of Dify's code: what it is and where it came from."""

    version: str
    commit: str | None
    source: str

    def __str__(self) -> str:
        return f"dify {self.version}" + (f" at {self.commit[:9]}" if self.commit else "")


@dataclass(frozen=True)
class _Manifest(Checkout):
    """What is recorded in the tree; `state` changes when a local source does."""

    kind: str
    state: str


def peek(source: Source) -> str | None:
    """Dify's version of a local source, without any effect; None for one that is elsewhere.

    Raises UsageError if it cannot be read or is not Dify.
    """
    if source.kind == "directory":
        return _version(Path(source.location), str(source))
    if source.kind == "tarball":
        found = archive.read(Path(source.location), (dify_tree.PACKAGING, dify_tree.PYPROJECT))
        return dify_tree.version(found.get, str(source))
    if source.is_local and source.kind == "git":
        _known_commit(source)
        return dify_tree.version(lambda path: _git_text(source, path), str(source))
    return None


def reachable(mirrors: Sequence[str], seconds: float = 6.0) -> str | None:
    """The first git mirror that answers, or None. Raises PrerequisiteError without git."""
    git.require()
    return git.first_that_answers(mirrors, seconds)


def is_current(source: Source, destination: Path) -> Checkout | None:
    """What is at `destination` if it came from `source` as it is now; None: fetch it. Quick.

    A remote branch is not looked up again: what was fetched of it stays. A tag is current whichever
    repository its commit came from.
    """
    manifest = _manifest(destination)
    if manifest is None:
        return None
    if source.kind == "tag" and manifest.kind == "git" and manifest.commit:
        known = releases.all_releases().get(source.ref)
        if known and known.commit == manifest.commit:
            return Checkout(manifest.version, manifest.commit, manifest.source)
    if (manifest.kind, manifest.source) != (source.kind, str(source)):
        return None
    try:
        if manifest.state != _state(source):
            return None
    except (OSError, DifyopsError):
        return None
    return Checkout(manifest.version, manifest.commit, manifest.source)


def _manifest(tree: Path) -> _Manifest | None:
    try:
        return _Manifest(**json.loads((tree / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def fetch(
    source: Source,
    destination: Path,
    mirrors: Sequence[str],
    log: StepLog,
    *,
    version: str | None = None,
) -> Checkout:
    """Put the code of `source` at `destination`, whole or not at all.

    `version` is the Dify version that is wanted. Raises UsageError if the code is another one, is
    none that releases.yaml knows, or is not Dify; PrerequisiteError if no repository gives it.
    """
    with trees.replacing(destination) as work:
        tree = work / "tree"
        # Before the copy: what is edited meanwhile makes the next run copy again.
        state = _state(source)
        commit = _build(source, destination, tree, mirrors, log)
        dify_tree.require(tree, str(source))
        _refuse_links(tree, str(source))
        found = _version(tree, str(source))
        _check_version(found, version, str(source))
        checkout = Checkout(found, commit, str(source))
        manifest = _Manifest(**asdict(checkout), kind=source.kind, state=state)
        (tree / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
        trees.make_readable(tree)
    log.write(f"{checkout} from {source}")
    return checkout


def recorded(tree: Path) -> Checkout | None:
    """What a finished checkout is of, whether or not its source has changed since."""
    manifest = _manifest(tree)
    return manifest and Checkout(manifest.version, manifest.commit, manifest.source)


def identity(tree: Path) -> str | None:
    """A text that changes when a checkout is made anew (an edit in place is not seen); None without
    one."""
    manifest = _manifest(tree)
    if manifest is None:
        return None
    return f"{manifest.commit or manifest.source} {digest(manifest.state)}"


def checkout_done(deployment: Deployment) -> str | None:
    """Step: the checkout that is there and current, or None.

    When nobody says where the code should come from, the one that is there is right.
    """
    destination = deployment.paths.source(deployment.release.version)
    if deployment.source is None:
        current = recorded(destination)
    else:
        current = is_current(_source(deployment), destination)
    return str(current) if current else None


def checkout_run(deployment: Deployment, log: StepLog) -> str:
    """Step: fetch Dify's code of the version in the settings."""
    settings = deployment.settings
    destination = deployment.paths.source(settings.dify.version)
    mirrors = settings.mirrors.git
    return str(fetch(_source(deployment), destination, mirrors, log, version=settings.dify.version))


def _source(deployment: Deployment) -> Source:
    return parse(deployment.source or deployment.release.version, deployment.paths.root)


def _build(
    source: Source, destination: Path, tree: Path, mirrors: Sequence[str], log: StepLog
) -> str | None:
    """Make `tree` and tell its commit, if that is known."""
    if source.kind == "directory":
        if destination.resolve().is_relative_to(Path(source.location).resolve()):
            raise UsageError(
                f"{destination} lies inside {source}, which would be copied into itself",
                "keep the deployment directory outside Dify's",
            )
        _copy(Path(source.location), tree, log)
        try:
            return git.commit_of(Path(source.location), "HEAD")
        except DifyopsError:  # no repository, or no git: then there is no commit to record
            return None
    if source.kind == "tarball":
        return archive.extract(Path(source.location), tree, log)
    if source.kind == "git":
        return _clone([source.location], source.ref, None, tree, log)
    for mirror in mirrors:
        refuse_secret(mirror, "mirrors.git")
    # A mirror is trusted to give a release's code, not to choose it.
    release = releases.all_releases().get(source.ref)
    return _clone(mirrors, source.ref, release.commit if release else None, tree, log)


def _copy(source: Path, target: Path, log: StepLog) -> None:
    count = 0
    try:
        for here, folders, names in os.walk(source, onerror=_raise):
            relative = Path(here).relative_to(source)
            folders[:] = [f for f in folders if not _is_skipped(relative / f)]
            (target / relative).mkdir(parents=True)
            links = [f for f in folders if Path(here, f).is_symlink()]
            for name in (*names, *links):
                path = Path(here, name)
                if _is_skipped(relative / name):
                    continue
                if not path.is_symlink() and not path.is_file():
                    log.write(f"left out: {path} is a socket, pipe or device")
                    continue
                shutil.copy2(path, target / relative / name, follow_symlinks=False)
                count += 1
                if count % 500 == 0:
                    log.detail(f"{count} files")
    except PermissionError as error:
        raise UsageError(f"{error.filename}: {error.strerror}", "make it readable") from None
    log.write(f"copied {count} files of {source}")


def _raise(error: OSError) -> None:
    raise error


def _is_skipped(path: Path) -> bool:
    return path.name in SKIPPED or path.as_posix() in _SKIPPED_PATHS


def _clone(urls: Sequence[str], ref: str, expected: str | None, tree: Path, log: StepLog) -> str:
    """Fetch `ref` from the first of some repositories that gives it; returns its commit."""
    git.require()
    refusals = []
    for url in urls:
        log.detail(f"{ref} from {url}")
        log.write(f"# {url}")
        try:
            commit = _commit_at(url, ref, expected)
            git.fetch(url, commit, ref, tree, log)
            return commit
        except git.GitError as error:
            log.write(f"{url}: {error.message}")
            refusals.append(f"  {url}: {error.message}")
            shutil.rmtree(tree, ignore_errors=True)
    raise PrerequisiteError(
        f"Dify's code ({ref}) could not be fetched:\n" + "\n".join(refusals),
        "give the code itself: `difyops up --source --dify <directory | tarball>`, "
        "or set mirrors.git in difyops.yaml",
    )


def _commit_at(url: str, ref: str, expected: str | None) -> str:
    try:
        found = git.commit_of(Path(url), ref) if url.startswith("/") else ""
        found = found or git.remote_commit(url, ref)
    except git.NoSuchRef:
        if expected:  # a mirror without tags may still have the commit
            return expected
        raise
    if expected and found != expected:
        raise git.GitError(f"{ref} is {found[:9]} there, but {expected[:9]} was released")
    return found


def _refuse_links(tree: Path, where: str) -> None:
    root = tree.resolve()
    for here, folders, names in os.walk(tree):
        for name in (*folders, *names):
            path = Path(here, name)
            if not path.is_symlink():
                continue
            target = path.readlink()
            if target.is_absolute() or not path.resolve().is_relative_to(root):
                raise UsageError(
                    f"{where}: {path.relative_to(tree)} is a link out of the tree, to {target}",
                    "replace the link by what it points to",
                )


def _check_version(found: str, wanted: str | None, where: str) -> None:
    known = releases.all_releases()
    if found not in known:
        hint = f"supported: {', '.join(known)}"
        raise UsageError(f"{where} is Dify {found}, which is not supported", hint)
    if wanted is not None and found != wanted:
        raise UsageError(
            f"{where} is Dify {found}, but dify.version is {wanted}",
            f"set dify.version: {found} in difyops.yaml, or give the code of {wanted}",
        )


def _version(tree: Path, where: str) -> str:
    def read(name: str) -> str | None:
        path = tree / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None

    return dify_tree.version(read, where)


def _state(source: Source) -> str:
    """What changes when a local source was edited; nothing of it is read."""
    if source.kind == "directory":
        return tree_fingerprint(Path(source.location), SKIPPED)
    if source.kind == "tarball":
        info = Path(source.location).stat()
        return digest(f"{info.st_size} {info.st_mtime_ns}")
    if source.kind == "git" and source.is_local:
        return _known_commit(source)
    return ""


def _known_commit(source: Source) -> str:
    try:
        return git.commit_of(Path(source.location), source.ref)
    except git.GitError as error:
        raise UsageError(
            f"dify.source: {source.location}: {error.message}",
            f"see what it has: git -C {source.location} tag",
        ) from None


def _git_text(source: Source, path: str) -> str | None:
    try:
        return git.output(["-C", source.location, "show", f"{source.ref}:{path}"])
    except git.GitError:
        return None
