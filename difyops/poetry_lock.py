"""A poetry.lock as pip requirements.

Poetry itself is not needed for it: since lock version 2.1 every package notes its groups and the
markers under which each group wants it. On Dify's lock the result is, package for package, what
`poetry export` prints; but it needs no network, and keeps every hash.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from difyops.errors import UsageError


def requirements(
    lock: str, groups: Sequence[str], replace: Mapping[str, str], where: str = "poetry.lock"
) -> list[str]:
    """One line per locked package that `main` or one of `groups` wants: pin, marker, hashes.

    `replace` maps a pin to another, which may be followed by hashes. Raises UsageError for a lock
    that cannot be installed from the package index alone, and for a replacement or group that the
    lock does not have (then the release's entry is out of date).
    """
    try:
        data = tomllib.loads(lock)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where}: {error}", "fetch Dify's code again") from None
    version = str(data.get("metadata", {}).get("lock-version", "?"))
    if not re.fullmatch(r"2\.[1-9]\d*", version):
        raise UsageError(f"{where}: lock version {version}, expected 2.1", "`poetry lock` with 2.x")
    wanted = {"main", *groups}
    lines, pins, known = [], set(), set()
    for package in data.get("package", []):
        known.update(package["groups"])
        used = [group for group in package["groups"] if group in wanted]
        if not used or package.get("optional"):
            continue
        _from_index(package, where)
        pin = f"{package['name']}=={package['version']}"
        pins.add(pin)
        hashes = [f"--hash={file['hash']}" for file in package["files"]]
        if pin in replace:
            pin, *hashes = replace[pin].split()
        marker = _marker(package.get("markers"), used)
        lines.append(" ".join([pin, *([f"; {marker}"] if marker else []), *hashes]))
    for kind, absent in (("group", wanted - known), ("package", set(replace) - pins)):
        if absent:
            raise UsageError(f"{where}: has no {kind} {', '.join(sorted(absent))}")
    return lines


def _marker(markers: str | Mapping[str, str] | None, groups: Sequence[str]) -> str:
    """When the package is wanted: under the marker of any of the groups; "" is always."""
    if markers is None or isinstance(markers, str):
        return markers or ""
    each = [markers.get(group, "") for group in groups]
    if not all(each):
        return ""
    return " or ".join(f"({marker})" for marker in dict.fromkeys(each))


def _from_index(package: Mapping[str, Any], where: str) -> None:
    kind = package.get("source", {}).get("type", "legacy")
    if kind != "legacy":  # "legacy" is an index other than PyPI; mirrors.pypi decides which
        raise UsageError(
            f"{where}: {package['name']} comes from a {kind}, not from a package index",
            "only packages of an index can be installed",
        )
