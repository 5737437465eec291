"""A Secret never shows; secrets.env is private, kept as it is, and only added to."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
import string
import traceback
from pathlib import Path

import pytest

from difyops import report, secrets
from difyops.core import File, Process
from difyops.errors import UsageError
from difyops.secrets import GENERATORS, Secret, Secrets

VALUE = "hunter2hunter2"


@dataclasses.dataclass
class Holder:
    key: Secret
    others: list[Secret]


def test_it_never_shows(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    secret = Secret(VALUE)
    holder = Holder(secret, [secret])
    process = Process(("x",), Path(), env={"KEY": secret})
    caplog.set_level(logging.DEBUG)
    logging.getLogger("x").info("%s %r", secret, {"k": secret})
    report.emit_json({"one": secret, "many": [secret], "holder": holder})
    try:
        raise ValueError("with", secret, holder)
    except ValueError as error:
        trace = "".join(traceback.TracebackException.from_exception(error, capture_locals=True)
                        .format())  # fmt: skip
    shown = [
        str(secret), repr(secret), f"{secret}", f"{secret!r:>20}", f"{secret:>20}",
        "{}".format(secret), "%s %r" % (secret, secret), repr(holder), str([secret]),  # noqa: UP031, UP032
        repr(process), trace, caplog.text, capsys.readouterr().out,
        repr(File(Path("etc/x"), VALUE, private=True)),
    ]  # fmt: skip
    for text in shown:
        assert VALUE not in text, text
    assert secret.reveal() == VALUE
    assert not hasattr(secret, "__dict__")


def test_it_is_not_serialised_or_copied() -> None:
    secret = Secret(VALUE)
    for way in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled"):
            way(secret)
    with pytest.raises(TypeError) as caught:
        json.dumps(secret)
    assert VALUE not in str(caught.value)


def test_it_compares() -> None:
    assert Secret("a") == Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert not Secret("")
    assert len({Secret("a"), Secret("a")}) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secrets.env"
    path.write_text("A=1\n")
    path.chmod(mode)
    with pytest.raises(UsageError, match="can be read by others") as caught:
        Secrets.load(path)
    assert caught.value.hint == f"chmod 600 {path}"
    with pytest.raises(UsageError, match="can be read by others"):
        secrets.ensure(path)


def test_values_of_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "secrets.env"
    assert secrets.ensure(path) == sorted(GENERATORS)
    assert path.stat().st_mode & 0o777 == 0o600
    loaded = Secrets.load(path)
    values = [loaded[name].reveal() for name in GENERATORS]
    assert len(set(values)) == len(values)
    for value in values:
        assert len(value) == 32
        assert set(value) <= set(string.ascii_letters + string.digits)
    assert secrets.ensure(path) == []


def test_what_is_there_is_kept_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "secrets.env"
    old = "# mine\nREDIS_PASSWORD='it is\\' mine' # why\n\nOTHER=x"
    path.write_text(old)
    path.chmod(0o600)
    added = secrets.ensure(path, {"EXTERNAL_MODEL_API_KEY": "sk-1"})
    assert "REDIS_PASSWORD" not in added
    assert path.read_text().startswith(old + "\n")
    loaded = Secrets.load(path)
    assert loaded["REDIS_PASSWORD"].reveal() == "it is' mine"
    assert loaded["OTHER"].reveal() == "x"
    assert loaded["EXTERNAL_MODEL_API_KEY"].reveal() == "sk-1"
    assert secrets.ensure(path, {"EXTERNAL_MODEL_API_KEY": "sk-2"}) == []
    assert Secrets.load(path)["EXTERNAL_MODEL_API_KEY"].reveal() == "sk-1"


def test_a_dollar_is_a_dollar(tmp_path: Path) -> None:
    path = tmp_path / "secrets.env"
    path.write_text("A=pa$HOME${X}\n")
    path.chmod(0o600)
    assert Secrets.load(path)["A"].reveal() == "pa$HOME${X}"


def test_a_line_that_cannot_be_read_is_not_taken_for_a_missing_value(tmp_path: Path) -> None:
    path = tmp_path / "secrets.env"
    old = "OTHER=1\nDIFY_DB_PASSWORD='abc\n"
    path.write_text(old)
    path.chmod(0o600)
    with pytest.raises(UsageError, match=r"secrets\.env: line 2 cannot be read"):
        secrets.ensure(path)
    assert path.read_text() == old


def test_a_missing_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secrets.env"
    with pytest.raises(UsageError, match="is missing"):
        Secrets.load(path)
    path.write_text("A=\n")
    path.chmod(0o600)
    with pytest.raises(UsageError, match=r"secrets\.env: A is missing") as caught:
        Secrets.load(path)["A"]
    assert "there are: admin, app" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="REDIS_PASSWORD is missing") as caught:
        Secrets.load(path)["REDIS_PASSWORD"]
    assert "difyops init" in (caught.value.hint or "")
    assert Secrets.load(path).get("A") is None
    path.write_bytes(b"A=\xff\n")
    with pytest.raises(UsageError, match="not UTF-8"):
        Secrets.load(path)
