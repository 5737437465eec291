"""Files and their verbs: what a person edited is kept, a check writes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from difyops import plan, render
from difyops.core import Deployment
from tests.unit.conftest import SECRETS, deployment

CONF = Path("etc/postgresql.conf")
PRIVATE = Path("etc/valkey.conf")


def write(wanted: Deployment, *, dry: bool = False, force: bool = False) -> dict[Path, str]:
    found = render.write(wanted, plan.build(wanted), dry=dry, force=force)
    return {file.path: file.verb for file in found}


def diffs(wanted: Deployment) -> dict[Path, str]:
    return {f.path: f.diff for f in render.write(wanted, plan.build(wanted), dry=True)}


@pytest.fixture
def here(tmp_path: Path) -> Deployment:
    return deployment(root=tmp_path)


def test_created_then_same(here: Deployment) -> None:
    assert set(write(here).values()) == {"created"}
    before = {p: p.stat().st_mtime_ns for p in here.paths.root.rglob("*")}
    assert set(write(here).values()) == {"same"}
    assert {p: p.stat().st_mtime_ns for p in here.paths.root.rglob("*")} == before


def test_modes(here: Deployment) -> None:
    write(here)
    for file in plan.build(here).files:
        mode = (here.paths.root / file.path).stat().st_mode & 0o777
        assert mode == (0o600 if file.private else 0o644), file.path
    (here.paths.root / PRIVATE).chmod(0o644)
    assert set(write(here).values()) == {"same"}
    assert (here.paths.root / PRIVATE).stat().st_mode & 0o777 == 0o600


def test_a_dry_run_writes_nothing(here: Deployment) -> None:
    assert set(write(here, dry=True).values()) == {"created"}
    assert list(here.paths.root.iterdir()) == []


def test_a_changed_setting_changes_its_files(here: Deployment) -> None:
    write(here)
    other = deployment({"redis": {"port": 7000}}, root=here.paths.root)
    changed = {str(path) for path, verb in write(other, dry=True).items() if verb == "changed"}
    assert changed == {"etc/valkey.conf", "etc/api.env", "etc/worker.env", "etc/supervisord.conf"}
    assert "-" in diffs(other)[Path("etc/supervisord.conf")]
    write(other)
    assert set(write(other).values()) == {"same"}


@pytest.mark.parametrize("edit", [b"# mine\n", b"\xff not utf-8", b""])
def test_an_edited_file_is_kept_until_forced(here: Deployment, edit: bytes) -> None:
    write(here)
    target = here.paths.root / CONF
    target.write_bytes(edit)
    for _ in range(2):
        assert write(here)[CONF] == "kept"
        assert target.read_bytes() == edit
    assert "listen_addresses" in diffs(here)[CONF]
    assert write(here, dry=True, force=True)[CONF] == "changed"
    assert target.read_bytes() == edit
    assert write(here, force=True)[CONF] == "changed"
    assert set(write(here).values()) == {"same"}


def test_changed_line_ends_are_an_edit(here: Deployment) -> None:
    write(here)
    target = here.paths.root / CONF
    target.write_bytes(target.read_bytes().replace(b"\n", b"\r\n"))
    assert write(here)[CONF] == "kept"


def test_an_edit_taken_back_is_no_edit(here: Deployment) -> None:
    write(here)
    target = here.paths.root / CONF
    old = target.read_text()
    target.write_text("x")
    assert write(here)[CONF] == "kept"
    target.write_text(old)
    assert write(here)[CONF] == "same"


def test_a_file_deleted_by_hand_is_made_again(here: Deployment) -> None:
    write(here)
    (here.paths.root / CONF).unlink()
    found = write(here)
    assert found.pop(CONF) == "created"
    assert set(found.values()) == {"same"}


def test_a_diff_shows_no_secret(here: Deployment) -> None:
    for shown in (diffs(here), (write(here), diffs(deployment(
        root=here.paths.root, **dict.fromkeys(SECRETS, "another1"))))[1]):  # fmt: skip
        everything = "".join(shown.values())
        assert "another1" not in everything
        assert not any(value in everything for value in SECRETS.values())


def test_a_broken_record_is_no_record(here: Deployment) -> None:
    write(here)
    (here.paths.etc / ".rendered.json").write_text("{")
    assert set(write(here).values()) == {"same"}


def test_without_a_record_what_differs_is_kept(here: Deployment) -> None:
    write(here)
    (here.paths.etc / ".rendered.json").unlink()
    path = here.paths.etc / "postgresql.conf"
    path.write_text("mine")
    assert write(here)[Path("etc/postgresql.conf")] == "kept"
    assert path.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_files_of_a_service_belong_to_it(tmp_path: Path) -> None:
    from tests.unit.conftest import USER

    tmp_path.chmod(0o755)
    write(deployment(root=tmp_path, user=USER))
    assert (tmp_path / PRIVATE).stat().st_uid == USER.uid
    assert (tmp_path / "etc/api.env").stat().st_uid == 0  # read before root is given up
    os.chown(tmp_path / PRIVATE, 0, 0)
    write(deployment(root=tmp_path, user=USER))
    assert (tmp_path / PRIVATE).stat().st_uid == USER.uid
