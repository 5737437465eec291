"""Who services run as, and what root may give away."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from difyops import identity
from difyops.core import User
from difyops.errors import PrerequisiteError, UsageError

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
NOBODY = User("nobody", 65534, 65534, "/nonexistent")


@root_only
def test_a_link_in_the_place_of_a_folder_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o755)
    (tmp_path / "home").symlink_to(victim)
    with pytest.raises(PrerequisiteError, match="is a link"):
        identity.hand_over(tmp_path / "home", NOBODY)
    assert victim.stat().st_uid == 0
    assert victim.stat().st_mode & 0o777 == 0o755


@root_only
def test_a_folder_is_given_to_the_services_user(tmp_path: Path) -> None:
    identity.hand_over(tmp_path / "new", NOBODY)
    assert (tmp_path / "new").stat().st_uid == NOBODY.uid
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


@root_only
def test_services_never_run_as_the_owner_of_what_root_obeys(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY.uid, NOBODY.gid)
    assert identity.wanted(None, tmp_path) == "difyops"
    with pytest.raises(UsageError, match="could command root"):
        identity.wanted("nobody", tmp_path)
    with pytest.raises(UsageError, match="root cannot be used"):
        identity.wanted("root", tmp_path)


def test_an_ordinary_user_needs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert identity.wanted("anybody", tmp_path) is None
