"""`difyops logs`: the end, then what comes, whole lines only, across rotation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from difyops import logs
from difyops.core import Paths


@pytest.fixture
def follow() -> Iterator[Callable[[Path], logs._Follower]]:
    with ExitStack() as stack:
        yield lambda path: stack.enter_context(closing(logs._Follower(path)))


Follow = Callable[[Path], logs._Follower]


def test_the_end_of_each(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "api.log").write_text("1\n2\n3\n")
    paths = Paths(tmp_path)
    assert list(logs.read(paths, ["api"], 2, False)) == ["2", "3"]
    assert list(logs.read(paths, ["api", "worker"], 1, False)) == ["api    | 3"]
    assert list(logs.read(paths, ["api"], 0, False)) == []


def test_following_gives_whole_lines_once(tmp_path: Path, follow: Follow) -> None:
    path = tmp_path / "x.log"
    path.write_text("old\n")
    follower = follow(path)
    assert list(follower.new()) == []
    with path.open("a") as file:
        for part, lines in (("ha", []), ("lf\nnext", ["half"]), ("\n\xe9\n", ["next", "é"])):
            file.write(part)
            file.flush()
            assert list(follower.new()) == lines


def test_following_through_a_rotation(tmp_path: Path, follow: Follow) -> None:
    path = tmp_path / "x.log"
    path.write_text("")
    follower = follow(path)
    with path.open("a") as file:
        path.rename(tmp_path / "x.log.1")
        assert list(follower.new()) == []
        file.write("last of the old\n")
    path.write_text("first of the new\n")
    assert list(follower.new()) == ["last of the old", "first of the new"]
    path.write_text("cut\n")
    assert list(follower.new()) == ["cut"]


def test_following_a_log_that_comes_later(tmp_path: Path, follow: Follow) -> None:
    follower = follow(tmp_path / "x.log")
    assert list(follower.new()) == []
    (tmp_path / "x.log").write_text("a\n")
    assert list(follower.new()) == ["a"]


def test_read_follows(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "api.log"
    log.write_text("1\n")
    with closing(logs.read(Paths(tmp_path), ["api"], 5, True)) as lines:
        assert next(lines) == "1"
        with log.open("a") as file:
            file.write("2\n")
        assert next(lines) == "2"


def test_what_came_since_a_mark(tmp_path: Path) -> None:
    log = tmp_path / "model.log"
    assert (logs.size(log), logs.since(log, 0)) == (0, ())
    log.write_text("old\n")
    mark = logs.size(log)
    assert logs.since(log, mark) == ()
    with log.open("a") as file:
        file.write("new\n\nmore\n")
    assert logs.since(log, mark) == ("new", "more")
    log.write_text("a\n")  # rotated
    assert logs.since(log, mark) == ("a",)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ["2026-01-01 1:2 INFO listening on x", "2026-01-01 1:2 ERROR m: bad (mend)"],
            "m: bad (mend)",
        ),
        (["2026-01-01 1:2 ERROR old", "2026-01-01 1:2 INFO listening on x"], None),
        (["2026-01-01 1:2 ERROR old", "2026-01-01 1:2 INFO ready after 1.0 s"], None),
        (["somebody said ERROR here"], None),
        ([], None),
    ],
)
def test_the_last_error_of_the_last_run(lines: list[str], said: str | None) -> None:
    assert logs.last_error(lines) == said
