"""`difyops init` makes a directory once, asks on the terminal, and never writes half a file."""

from __future__ import annotations

import http.server
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from difyops import files, init, settings
from difyops.errors import UsageError
from difyops.secrets import GENERATORS, Secrets
from difyops.services import model
from tests.unit.conftest import deployment


@pytest.fixture(autouse=True)
def no_port_is_taken(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.function.__name__ != "test_taken_ports":
        monkeypatch.setattr(init, "is_free", lambda port: True)


def snapshot(root: Path) -> dict[str, tuple[bytes, int, int]]:
    return {
        str(p.relative_to(root)): (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino)
        for p in root.rglob("*")
        if p.is_file()
    }


def test_all_defaults(tmp_path: Path) -> None:
    made = init.run(tmp_path / "new" / "d", {}, dict)
    assert (made.settings, made.secrets) == ("created", sorted(GENERATORS))
    assert settings.load(made.root / "difyops.yaml") == settings.Settings()
    assert sorted(snapshot(made.root)) == ["difyops.yaml", "secrets.env"]
    assert (made.root / "secrets.env").stat().st_mode & 0o777 == 0o600


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    init.run(tmp_path, {}, dict)
    before = snapshot(tmp_path)
    made = init.run(tmp_path, {}, lambda: pytest.fail("nothing is left to ask"))
    assert (made.settings, made.secrets) == ("same", [])
    assert snapshot(tmp_path) == before


def test_flags_do_not_change_a_file_that_is_there(tmp_path: Path) -> None:
    init.run(tmp_path, {}, dict)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match="is there already, and init does not change it"):
        init.run(tmp_path, {"dify": {"enabled": False}}, dict)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"dify": {"version": "9.9"}}, "dify.version: 9.9 is not supported"),
        ({"dify": {"base_url": "here"}}, "dify.base_url: should be an http:// or https:// URL"),
        ({"model": {"name": "smolm2"}}, "no model called 'smolm2'"),
        ({"model": {"name": "minilm-l6"}}, "is an embedding model, not a chat model"),
    ],
)
def test_a_wrong_answer_writes_nothing(tmp_path: Path, answers: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        init.run(tmp_path / "d", answers, dict)
    assert not (tmp_path / "d").exists()


def test_what_is_written_is_what_was_said(tmp_path: Path) -> None:
    answers = init.answers(
        version="0.15.3", model="true", model_url="http://h:1/v1", base_url="https://a.example",
        without_dify=True,
    )  # fmt: skip
    init.run(tmp_path, answers, dict)
    wanted = settings.load(tmp_path / "difyops.yaml")
    assert wanted.model.name == "true"  # and not a bool
    assert (wanted.model.backend, wanted.model.url) == ("external", "http://h:1/v1")
    assert (wanted.dify.enabled, wanted.dify.base_url) == (False, "https://a.example")
    with pytest.raises(UsageError, match="--model-url needs the name of a model there"):
        init.answers(
            version=None, model=None, model_url="http://h/v1", base_url=None, without_dify=False
        )


def test_the_backend_is_for_a_model_here(tmp_path: Path) -> None:
    nothing = {"version": None, "model": None, "base_url": None, "without_dify": False}
    answers = init.answers(**nothing, model_url=None, backend="native")  # type: ignore[arg-type]
    init.run(tmp_path / "d", answers, dict)
    wanted = settings.load(tmp_path / "d/difyops.yaml").model
    assert (wanted.backend, wanted.name) == ("native", "smollm2-135m")
    with pytest.raises(UsageError, match=r"model\.backend: should be 'llamacpp', 'native'"):
        init.run(tmp_path / "e", {"model": {"backend": "nativ"}}, dict)
    nothing["model"] = "m"
    with pytest.raises(UsageError, match="--backend is for a model here"):
        init.answers(**nothing, model_url="http://h/v1", backend="native")  # type: ignore[arg-type]


def test_the_model_that_comes_along_is_for_our_engine(tmp_path: Path) -> None:
    model = {"backend": "native", "name": "tiny"}
    init.run(tmp_path / "d", {"model": model}, dict)
    assert settings.load(tmp_path / "d/difyops.yaml").model.source == "tiny"
    with pytest.raises(UsageError, match="tiny is served by our own engine") as caught:
        init.run(tmp_path / "e", {"model": {"name": "tiny"}}, dict)
    assert caught.value.hint == "--backend native"


def test_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").touch()
    nothing: dict[str, Any] = {
        "version": None, "model_url": None, "base_url": None, "without_dify": False,
    }  # fmt: skip
    answers = init.answers(**nothing, model="mine", backend="native", model_source="m.gguf")
    init.run(tmp_path / "d", answers, dict)
    wanted = settings.load(tmp_path / "d/difyops.yaml").model
    assert (wanted.backend, wanted.name) == ("native", "mine")
    assert wanted.source == str(tmp_path / "m.gguf")  # the deployment is elsewhere
    with pytest.raises(UsageError, match="--model-source is for the native engine"):
        init.answers(**nothing, model="mine", model_source="m.gguf")
    with pytest.raises(UsageError, match="needs a name"):
        init.answers(**nothing, model=None, backend="native", model_source="m.gguf")
    with pytest.raises(UsageError, match="no model called 'qqq'") as caught:
        init.run(tmp_path / "e", {"model": {"backend": "native", "name": "qqq"}}, dict)
    assert caught.value.hint and caught.value.hint.startswith("chat models: smollm2-135m; ")
    assert "--model-source" in caught.value.hint and "minilm" not in caught.value.hint


def test_taken_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not init.is_free(port)
        monkeypatch.setattr(init, "is_free", lambda p: p not in (5442, 5443, 5001))
        init.run(tmp_path, {}, dict)
    assert init.is_free(port)
    wanted = settings.load(tmp_path / "difyops.yaml")
    assert (wanted.postgres.port, wanted.dify.port, wanted.redis.port) == (5444, 5002, 6389)


# --- the key of a model elsewhere -----------------------------------------------------------------

ELSEWHERE = {"model": {"backend": "external", "url": "http://127.0.0.1:9/v1", "name": "m"}}


def test_the_key_of_an_external_model_goes_to_the_secrets(tmp_path: Path) -> None:
    made = init.run(tmp_path, ELSEWHERE, dict, "sk-1")
    assert "EXTERNAL_MODEL_API_KEY" in made.secrets
    assert Secrets.load(tmp_path / "secrets.env")["EXTERNAL_MODEL_API_KEY"].reveal() == "sk-1"
    assert "sk-1" not in (tmp_path / "difyops.yaml").read_text()
    assert init.run(tmp_path, {}, dict, "sk-2").secrets == []  # what is there stays


def test_a_key_that_came_later_is_added(tmp_path: Path) -> None:
    init.run(tmp_path, ELSEWHERE, dict)
    assert Secrets.load(tmp_path / "secrets.env").get("EXTERNAL_MODEL_API_KEY") is None
    assert init.run(tmp_path, {}, dict, "sk-2").secrets == ["EXTERNAL_MODEL_API_KEY"]


def test_a_key_is_not_kept_for_a_model_of_ours(tmp_path: Path) -> None:
    assert init.run(tmp_path, {}, dict, "sk-1").secrets == sorted(GENERATORS)


def test_a_key_that_cannot_be_kept_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="EXTERNAL_MODEL_API_KEY: a line break"):
        init.run(tmp_path / "d", ELSEWHERE, dict, "sk\n1")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("key", ["sk-1", None])
def test_the_key_is_sent_and_no_other(key: str | None) -> None:
    seen: list[str | None] = []

    class Models(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            body = b'{"data": [{"id": "m"}]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Models) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        known = {"EXTERNAL_MODEL_API_KEY": key} if key else {}
        changes = {"model": {**ELSEWHERE["model"], "url": url}}
        try:
            model.ready_elsewhere(deployment(changes, **known))
        finally:
            server.shutdown()
            thread.join()
    assert set(seen) == {f"Bearer {key}" if key else None}


# --- places that cannot be written, and interruptions ---------------------------------------------


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    for root in (tmp_path / "f", tmp_path / "f" / "d"):
        with pytest.raises(UsageError, match=r"cannot be (written|read)"):
            init.run(root, {}, dict)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    # Root may write anywhere, but not here.
    root = Path("/proc/difyops") if os.geteuid() == 0 else tmp_path
    with pytest.raises(UsageError, match=f"{root} cannot be written") as caught:
        init.run(root, {}, dict)
    assert caught.value.hint


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_killed_at_any_write_and_run_again(tmp_path: Path, at: int) -> None:
    child = os.fork()
    if child == 0:
        syncs = 0

        def kill(handle: int) -> None:
            nonlocal syncs
            syncs += 1
            if syncs == at:
                os.kill(os.getpid(), signal.SIGKILL)

        files.os.fsync = kill  # type: ignore[assignment]
        init.run(tmp_path, {}, dict)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    half = snapshot(tmp_path)
    init.run(tmp_path, {}, dict)
    whole = snapshot(tmp_path)
    assert settings.load(tmp_path / "difyops.yaml") == settings.Settings()
    assert set(GENERATORS) <= set(Secrets.load(tmp_path / "secrets.env").names())
    for name in ("difyops.yaml", "secrets.env"):
        assert name not in half or half[name] == whole[name]


# --- the terminal ---------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "difyops", "init"]


def test_without_a_terminal_the_flag_is_named(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, str(tmp_path / "d")], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "difyops init --yes" in done.stderr
    assert not (tmp_path / "d").exists()


def on_a_terminal(arguments: list[str], typed: bytes) -> tuple[int, str, str]:
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen([*COMMAND, *arguments], stdin=theirs, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) as child:  # fmt: skip
            os.write(ours, typed)
            try:
                out, err = child.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                child.kill()
                raise
    finally:
        os.close(ours)
        os.close(theirs)
    return child.returncode, out, err


def test_answers_of_a_person(tmp_path: Path) -> None:
    typed = b"http://10.0.0.5:8000/v1\nqwen3.5-4b\nhttps://ai.example\n"
    code, out, err = on_a_terminal([str(tmp_path)], typed)
    assert code == 0, err
    assert "URL of your OpenAI-compatible model server" in err
    assert out.splitlines()[0] == f"created  {tmp_path / 'difyops.yaml'}"
    wanted = settings.load(tmp_path / "difyops.yaml")
    assert (wanted.model.backend, wanted.model.name) == ("external", "qwen3.5-4b")
    assert wanted.model.url == "http://10.0.0.5:8000/v1"
    assert wanted.dify.base_url == "https://ai.example"


def test_only_what_no_flag_said_is_asked(tmp_path: Path) -> None:
    code, _, err = on_a_terminal([str(tmp_path), "--model", "smollm2-135m"], b"\n")
    assert code == 0, err
    assert "model server" not in err
    assert "URL that people will open" in err
    assert settings.load(tmp_path / "difyops.yaml").dify.base_url is None


def test_ending_the_questions(tmp_path: Path) -> None:
    code, out, err = on_a_terminal([str(tmp_path / "d")], b"\n\x04")  # Ctrl-D
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert not (tmp_path / "d").exists()


# --- enable_dify ----------------------------------------------------------------------------------


def test_dify_is_turned_on_and_nothing_else_changes(tmp_path: Path) -> None:
    init.run(tmp_path, {"dify": {"enabled": False}}, dict)
    path = tmp_path / "difyops.yaml"
    path.write_text(path.read_text() + "# mine\n")
    before = settings.load(path)
    init.enable_dify(path)
    after = settings.load(path)
    assert after.dify.enabled
    assert after.model_copy(update={"dify": before.dify}) == before
    assert path.read_text().endswith("# mine\n")
    with pytest.raises(UsageError, match=r"dify\.enabled is false"):
        path.write_text("dify:\n  enabled: no\n")
        init.enable_dify(path)


def test_dify_is_turned_on_in_what_without_dify_wrote(tmp_path: Path) -> None:
    init.run(tmp_path, {"dify": {"enabled": False}}, dict)
    path = tmp_path / "difyops.yaml"
    before = path.read_text()
    init.enable_dify(path)
    assert settings.load(path).dify.enabled
    assert path.read_text().replace("}", ", enabled: false}", 1) == before


def test_a_key_in_a_persons_own_writing_is_left_to_them(tmp_path: Path) -> None:
    path = tmp_path / "difyops.yaml"
    path.write_text("dify:\n  enabled: no  # later\n")
    with pytest.raises(UsageError, match=r"dify\.enabled is false"):
        init.enable_dify(path)
    assert path.read_text() == "dify:\n  enabled: no  # later\n"


def test_lost_secrets_are_not_made_anew_for_data_of_the_old_ones(tmp_path: Path) -> None:
    init.run(tmp_path, {}, dict)
    (tmp_path / "data/postgres").mkdir(parents=True)
    (tmp_path / "data/postgres/PG_VERSION").write_text("16\n")
    (tmp_path / "secrets.env").unlink()
    with pytest.raises(UsageError, match="data/ was made with it"):
        init.run(tmp_path, {}, dict)
    assert not (tmp_path / "secrets.env").exists()
