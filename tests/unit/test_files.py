"""Files are written whole or not at all; env files are read back as they were meant."""

from __future__ import annotations

import errno
import os
import signal
import string
import subprocess
from io import StringIO
from pathlib import Path

import pytest
from dotenv import dotenv_values
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from difyops.errors import UsageError
from difyops.files import digest, dotenv_text, tail, tree_fingerprint, write_atomic

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
LINES = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]))


def test_the_mode_is_set_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fchmod, fsync = os.fchmod, os.fsync

    def watched_chmod(handle: int, mode: int) -> None:
        events.append(("chmod", mode, os.fstat(handle).st_size))
        assert os.fstat(handle).st_mode & 0o777 == 0o600  # private until then
        fchmod(handle, mode)

    def watched_sync(handle: int) -> None:
        events.append(("sync", os.fstat(handle).st_mode & 0o777, os.fstat(handle).st_size))
        fsync(handle)

    monkeypatch.setattr(os, "fchmod", watched_chmod)
    monkeypatch.setattr(os, "fsync", watched_sync)
    write_atomic(tmp_path / "secret", "abc", mode=0o640)
    assert events[:2] == [("chmod", 0o640, 0), ("sync", 0o640, 3)]
    assert len(events) == 3  # and the folder was synced


def test_owner_before_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_away = []
    monkeypatch.setattr(
        os, "fchown", lambda h, uid, gid: given_away.append((uid, gid, os.fstat(h).st_size))
    )
    write_atomic(tmp_path / "f", "abc", owner=(7, 8))
    assert given_away == [(7, 8, 0)]


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    target = tmp_path / "f"
    target.write_text("old")

    def fail(handle: int) -> None:
        raise fault

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(fault)):
        write_atomic(target, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert target.read_text() == "old"


def test_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.write_text("old")
    child = os.fork()
    if child == 0:
        os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        write_atomic(target, "new" * 10_000)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert target.read_text() == "old"


@given(st.dictionaries(NAMES, LINES, max_size=5))
@example({"A": "x\\", "B": "it's"})
@example({"A": "'x\\'", "B": "y'"})
@example({"A": "$HOME `id` ${X:-y} #no", "B": ' "q" '})
def test_python_reads_back_what_was_written(values: dict[str, str]) -> None:
    try:
        text = dotenv_text(values)
    except UsageError:
        # Only what the format cannot say, and it says so.
        assume(not any(v.endswith("\\") for v in values.values()))
        raise
    assert dotenv_values(stream=StringIO(text), interpolate=False) == values


def test_a_backslash_at_the_end() -> None:
    assert dotenv_text({"A": "C:\\dir\\"}) == "A=C:\\dir\\\n"
    with pytest.raises(UsageError, match="A: a backslash at its end"):
        dotenv_text({"A": " x\\"})


#: All that stands in ordinary values; a quote and a backslash are written as python-dotenv wants.
ORDINARY = st.text(string.ascii_letters + string.digits + ' $`"#;&|<>*?~()[]{}!=%@_+:,./-äß你')


@settings(max_examples=30, deadline=None)
@given(st.lists(ORDINARY, min_size=1, max_size=20))
@example(["", "$HOME $(id) `id` ${X:-y}", "  two  words ", "redis://:pw@127.0.0.1:6389/1"])
def test_a_shell_reads_back_ordinary_values(values: list[str]) -> None:
    names = [f"V{n}" for n in range(len(values))]
    text = dotenv_text(dict(zip(names, values, strict=True)))
    shown = "; ".join(f'printf "%s\\0" "${name}"' for name in names)
    done = subprocess.run(
        ["sh", "-s"], input=f"{text}{shown}\n".encode(), capture_output=True, check=True
    )
    assert done.stdout.decode().split("\0")[:-1] == values


@pytest.mark.parametrize("values", [{"A": "x\ny"}, {"A": "x\r"}, {"A": "\0"}, {"A-B": "x"},
                                    {"1A": "x"}, {"": "x"}, {"A\n": "x"}])  # fmt: skip
def test_what_an_env_file_cannot_hold_is_refused(values: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        dotenv_text(values)


def test_tail(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == ()
    log.write_text("")
    assert tail(log) == ()
    log.write_text("one\n\n  \ntwo\nthree")
    assert tail(log) == ("one", "two", "three")
    assert tail(log, 2) == ("two", "three")
    assert tail(log, 0) == ()


def test_tail_at_the_limit_drops_a_cut_line_only(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\nsecond\nthird\n")
    assert tail(log, limit=13) == ("second", "third")  # exactly two lines
    assert tail(log, limit=12) == ("third",)
    log.write_bytes("é".encode() * 10)
    assert tail(log, limit=4) == ("éé",)  # the only line: its end is better than nothing
    log.write_bytes(b"x" * 10 + b"\n" + "é".encode() * 5 + b"\n")
    assert tail(log, limit=14) == ("ééééé",)


def test_a_fingerprint_changes_with_edit_rename_mtime_and_removal(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "a"
    file.write_text("x")
    os.utime(file, ns=(1, 1))
    (tmp_path / "other").write_text("y")
    seen = [tree_fingerprint(tmp_path)]
    assert tree_fingerprint(tmp_path) == seen[0]

    def changed() -> bool:
        seen.append(tree_fingerprint(tmp_path))
        return len(set(seen)) == len(seen)

    os.utime(file, ns=(2, 2))
    assert changed()
    file.write_text("xy")
    os.utime(file, ns=(1, 1))
    assert changed()
    file = file.rename(tmp_path / "sub" / "b")
    assert changed()
    file.unlink()
    assert changed()
    assert tree_fingerprint(tmp_path, skip=["sub"]) == tree_fingerprint(tmp_path)
    (tmp_path / "sub" / "c").write_text("")
    assert tree_fingerprint(tmp_path, skip=["sub"]) != tree_fingerprint(tmp_path)


def test_a_fingerprint_of_names_that_are_not_utf8(tmp_path: Path) -> None:
    before = tree_fingerprint(tmp_path)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).write_text("x")
    assert tree_fingerprint(tmp_path) != before


def test_digest() -> None:
    assert digest("é") == digest("é".encode())
    assert len(digest("")) == 16
