"""What a person means by `--dify`: a directory, a tarball, a git repository at a ref, or a tag."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from difyops import archive, dify_tree, git
from difyops.errors import UsageError

_EXPECTED = (
    "expected a directory, a tarball (.tar.gz, .tar.xz, …), "
    "a git URL or path with @ref (https://host/dify.git@0.15.3), or a tag (0.15.3)"
)
_TAG = re.compile(r"v?\d+(\.\d+)+[\w.+-]*")
_URL = re.compile(r"(https?|ssh|git|file)://")
_SCP = re.compile(r"(?:[\w.-]+@)?[\w.-]+:(?!//)[^@]+")  # user@host:path, as ssh writes it


@dataclass(frozen=True)
class Source:
    """Where code comes from. `location` is an absolute path or a URL; a tag has only `ref`."""

    kind: Literal["directory", "tarball", "git", "tag"]
    location: str = ""
    ref: str = ""

    def __str__(self) -> str:
        return "@".join(part for part in (self.location, self.ref) if part)

    @property
    def is_local(self) -> bool:
        """Whether it is read from this machine's disk."""
        return self.kind in ("directory", "tarball") or self.location.startswith("/")


def parse(source: str, base: Path | None = None) -> Source:
    """What a person means by `--dify` or `dify.source`; relative paths start at `base`.

    Raises UsageError naming what was expected. A tag is told from a directory by its look alone, so
    that the answer does not depend on where difyops is run (`./0.15.3` is a directory).
    """
    if _TAG.fullmatch(source):
        return Source("tag", ref=source)
    if _URL.match(source):
        return _remote(source, path_starts=source.find("/", source.index("://") + 3))
    path = (base or Path()).joinpath(Path(source).expanduser()) if source else None
    if path and path.exists():
        return _local(Path(os.path.abspath(path)))  # noqa: PTH100 - resolve() would follow links
    if path and "@" in source:
        head, _, ref = str(path).rpartition("@")
        repository = Path(os.path.abspath(head))  # noqa: PTH100
        if repository.is_dir() and git.is_repository(repository):
            return Source("git", str(repository), _ref(ref, source))
    if _SCP.match(source) and "/" not in source.partition(":")[0]:
        return _remote(source, path_starts=source.index(":"))
    missing = "no such file or directory; " if "/" in source or archive.is_name(source) else ""
    raise UsageError(f"dify.source: {source!r}: {missing}{_EXPECTED}")


def _local(path: Path) -> Source:
    if path.is_dir():
        if (path / "api").is_dir():
            return Source("directory", str(path))
        if git.is_repository(path):
            raise UsageError(
                f"dify.source: {path} is a git repository: which ref?", f"{path}@0.15.3"
            )
        dify_tree.require(path, str(path))
    if path.is_file() and archive.is_name(path.name):
        return Source("tarball", str(path))
    raise UsageError(f"dify.source: {path} is not a tarball by its name; {_EXPECTED}")


def _remote(source: str, path_starts: int) -> Source:
    """A URL and its ref; an `@` before the path belongs to the user's name."""
    path, at, ref = source[path_starts:].rpartition("@") if path_starts >= 0 else ("", "", "")
    if not at or not path.strip("/:"):
        if archive.is_name(source):
            hint = "download it and give the file"
            raise UsageError(f"dify.source: {source}: a tarball has to be here already", hint)
        raise UsageError(f"dify.source: {source}: which tag, branch or commit?", f"{source}@0.15.3")
    url = source[:path_starts] + path
    refuse_secret(url, "dify.source")
    return Source("git", url, _ref(ref, source))


def _ref(ref: str, source: str) -> str:
    if not re.fullmatch(r"(?![-/.])(?!.*(\.\.|@\{))[\w./+@-]+", ref):
        raise UsageError(f"dify.source: {source!r}: {ref!r} is not a tag, branch or commit")
    return ref


def refuse_secret(url: str, where: str) -> None:
    """A URL is shown, logged and passed as an argument: it must not carry a password or token."""
    user = re.match(r"(\w+)://([^/@]*)@", url)
    if user and (user[1].startswith("http") or ":" in user[2]):
        raise UsageError(
            f"{where}: {url[: user.start(2)]}…: should not carry a user or password",
            "let git know it: `git config --global credential.helper store`",
        )
