"""Public models over ModelScope's HTTP API: a list of files, then each by its path."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difyops.errors import PrerequisiteError
from difyops.files import sync_dir

if TYPE_CHECKING:
    import requests

_CHUNK = 1 << 20
_ATTEMPTS = 5
_TIMEOUT = (10.0, 60.0)  # seconds, to connect and between two chunks


def download(
    owner: str,
    name: str,
    revision: str,
    folder: Path,
    wanted: Callable[[str], bool],
    progress: Callable[[str], None],
) -> None:
    """Put the `wanted` files (by path) of a model into `folder`, each whole or not at all.

    Files that are there already stay. MODELSCOPE_ENDPOINT replaces https://modelscope.cn. Raises
    PrerequisiteError naming the model when it cannot be had.
    """
    import requests

    source = f"modelscope:{owner}/{name}@{revision}"
    base = os.environ.get("MODELSCOPE_ENDPOINT", "https://modelscope.cn").rstrip("/")
    url = f"{base}/api/v1/models/{owner}/{name}/repo"
    with requests.Session() as session:
        # Compressed, a length or a range would not be the file's.
        session.headers.update({"User-Agent": "difyops", "Accept-Encoding": "identity"})
        files = [f for f in _listed(session, url, revision, source) if wanted(f["Path"])]
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            if not (folder / file["Path"]).is_file():
                progress(f"{source}: {file['Path']} ({file['Size'] / 1e6:.1f} MB)")
                asked = {"Revision": revision, "FilePath": file["Path"]}
                _download(session, url, asked, folder, file, source)


def _listed(
    session: requests.Session, url: str, revision: str, source: str
) -> list[dict[str, Any]]:
    """The wanted files: Path, Size and perhaps Sha256 of each."""
    import requests

    try:
        asked = {"Revision": revision, "Recursive": "true"}
        reply = session.get(f"{url}/files", params=asked, timeout=_TIMEOUT)
        if reply.status_code in (401, 403, 404):
            raise PrerequisiteError(
                f"{source}: no such repository or revision, or it is not public",
                "check the spelling at https://modelscope.cn/models",
            )
        reply.raise_for_status()
        files = [
            {"Path": str(f["Path"]), "Size": int(f["Size"]), "Sha256": f.get("Sha256")}
            for f in reply.json()["Data"]["Files"]
            if f["Type"] == "blob"
        ]
    except requests.RequestException as error:
        raise _unreachable(source, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise PrerequisiteError(
            f"{source}: the list of files is not as expected: {error}"
        ) from error
    return files


def _download(
    session: requests.Session,
    url: str,
    asked: Mapping[str, str],
    folder: Path,
    file: Mapping[str, Any],
    source: str,
) -> None:
    """Put one file into `folder`, whole or not at all; what an earlier try left is gone on with."""
    import requests

    target = folder / file["Path"]
    part = target.with_name(f".{target.name}.part")
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _append(session, url, asked, part, file["Size"])
            break
        except requests.RequestException as error:
            refused = error.response is not None and error.response.status_code < 500
            if refused or attempt == _ATTEMPTS:
                raise _unreachable(source, error) from error
        except OSError as error:
            raise PrerequisiteError(f"cannot write {part}: {error.strerror}") from error
    size = part.stat().st_size
    if size != file["Size"] or (file["Sha256"] and _sha256(part) != file["Sha256"]):
        part.unlink()
        raise PrerequisiteError(
            f"{source}: {target.name} is not the expected file ({size} bytes, expected "
            f"{file['Size']}; or another sha256)",
            "try again; the source or a mirror changed it, or the connection damages data",
        )
    part.replace(target)
    sync_dir(folder)


def _append(
    session: requests.Session, url: str, asked: Mapping[str, str], part: Path, size: int
) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have >= size > 0:
        return
    headers = {"Range": f"bytes={have}-"} if have else {}
    with session.get(
        url, params=dict(asked), headers=headers, stream=True, timeout=_TIMEOUT
    ) as reply:
        reply.raise_for_status()
        # A server that does not know ranges sends the whole file with status 200.
        with part.open("ab" if reply.status_code == 206 else "wb") as out:
            for chunk in reply.iter_content(_CHUNK):
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())


def _unreachable(source: str, error: Exception) -> PrerequisiteError:
    return PrerequisiteError(
        f"{source}: cannot be downloaded: {error}",
        "MODELSCOPE_ENDPOINT may name a mirror; what was downloaded is kept, so try again",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
