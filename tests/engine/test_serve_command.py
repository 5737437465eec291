"""`difyops serve` as a person runs it: a program with arguments, an exit code and a log."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from difyops import modelsource, serve_command
from difyops.bench import load, peers
from difyops.engine import opening
from difyops.engine.config import LlmConfig
from difyops.engine.opening import open_llm
from difyops.errors import UsageError
from tests.engine import tiny
from tests.serving.conftest import until

KEY = "sk-serve-0123456789abcdef"


class Serve:
    """`difyops serve …` on a free port; its log is collected as it comes."""

    def __init__(self, *arguments: str | Path, key: str | None = None) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "DIFYOPS_API_KEY"}
        if key is not None:
            environment["DIFYOPS_API_KEY"] = key
        command = [sys.executable, "-m", "difyops", "serve", *map(str, arguments), "--threads", "1"]
        if "--port" not in arguments:
            command += ["--port", "0"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=environment,
        )  # fmt: skip
        self.log = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log += line

    def url(self) -> str:
        def ready() -> bool:
            assert self.process.poll() is None, self.log
            return "ready after" in self.log

        until(ready, 60, lambda: self.log)
        found = re.search(r"listening on (http://\S+)", self.log)
        assert found
        return found[1]

    def wait(self, seconds: float = 60) -> int:
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Serve]]:
    started: list[Serve] = []

    def go(*arguments: str | Path, key: str | None = None) -> Serve:
        started.append(Serve(*arguments, key=key))
        return started[-1]

    yield go
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("serve") / "tiny", context=512)


def test_a_server_with_an_embedding_and_a_key(
    serve: Callable[..., Serve], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = Path(os.environ.get("DIFYOPS_TEST_CACHE") or tmp_path_factory.mktemp("models"))
    modelsource.fetch_model("minilm-l6", cache)
    server = serve(
        checkpoint, "--context", "300", "--embedding", "minilm-l6", "--cache", cache, key=KEY
    )
    with httpx.Client(base_url=server.url(), timeout=30) as http:
        assert http.get("/v1/models").status_code == 401
        http.headers["Authorization"] = f"Bearer {KEY}"
        chat, embedding = http.get("/v1/models").json()["data"]
        assert (chat["id"], chat["context_length"], chat["tools"]) == ("tiny", 300, False)
        assert (embedding["id"], embedding["dimensions"]) == ("minilm-l6", 384)
        assert "tools" not in embedding
        messages = [{"role": "user", "content": "Hello."}]
        asked = {"model": "tiny", "messages": messages, "max_tokens": 5}
        answer = http.post("/v1/chat/completions", json=asked)
        assert answer.json()["usage"]["completion_tokens"] <= 5
        asked = {"model": "minilm-l6", "input": "A cat."}
        assert len(http.post("/v1/embeddings", json=asked).json()["data"][0]["embedding"]) == 384
    assert KEY not in " ".join(psutil.Process(server.process.pid).cmdline())
    server.process.send_signal(signal.SIGINT)
    assert server.wait(10) == 0, server.log
    about = r"tiny: cpu, float32, 1 thread, 16 slots, 300 tokens of context, up to .*of keys and "
    assert re.search(
        about + r"values, .* of states, up to [\d,]+ MiB for prefixes, .* of weights "
        r"\([\d,]+ parameters\)\n",
        server.log,
    )
    last = [line.split(" ", 3)[3] for line in server.log.splitlines()[-2:]]
    assert last == ["stopping", "stopped"]
    assert "GET /v1/models" not in server.log
    assert KEY not in server.log
    assert "Traceback" not in server.log
    assert "WARNING" not in server.log


def test_the_model_that_comes_along(serve: Callable[..., Serve]) -> None:
    """`difyops serve tiny`, with all defaults: it writes, and some of its guesses come true."""
    server = serve("tiny")
    with httpx.Client(base_url=server.url(), timeout=30) as http:
        (chat,) = http.get("/v1/models").json()["data"]
        assert (chat["id"], chat["context_length"]) == ("tiny", 1024)
        asked = {"model": "tiny", "prompt": "To install the package, you", "max_tokens": 60,
                 "temperature": 0, "ignore_eos": True}  # fmt: skip
        answer = http.post("/v1/completions", json=asked).json()
        assert answer["usage"]["completion_tokens"] == 60
        assert len(answer["choices"][0]["text"].split()) > 15
        assert re.search(
            r'speculation_accepted_tokens_total\{place="1"\} [1-9]', http.get("/metrics").text
        )
    server.process.send_signal(signal.SIGINT)
    assert server.wait(10) == 0, server.log


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["smollm2-135m", "--context", "9000"], 2, "smollm2-135m has 8192"),
        (["{}", "--context", "513"], 2, "513 tokens were asked for, and tiny has 512"),
        (["{}", "--device", "gpu"], 2, "device: 'gpu' is none of cpu, cuda, cuda:N, auto"),
        (["{}", "--speculate", "nonsense"], 2, "--speculate: 'nonsense' is none of auto, off, mtp"),
        (["{}", "--speculate", "draft:nope"], 2, "speculate: no model 'nope'"),
        (["{}", "--speculate", "draft:minilm-l6"], 2, "speculate: minilm-l6"),
        (["{}", "--embedding", "bogus"], 2, "Fix: embedding models: minilm-l6"),
    ],
)
def test_what_can_be_known_is_told_before_it_listens(
    arguments: list[str], code: int, said: str, serve: Callable[..., Serve], checkpoint: Path
) -> None:
    server = serve(*(a.format(checkpoint) for a in arguments))
    assert server.wait() == code
    assert server.log.startswith("error: ") and said in server.log
    assert len(server.log.splitlines()) == 2


def test_a_second_ctrl_c_on_a_terminal_leaves_no_traceback(checkpoint: Path) -> None:
    ours, theirs = pty.openpty()
    code = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "from difyops import cli; cli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "serve", str(checkpoint), "--port", "0", "--threads"]
    child = subprocess.Popen(
        [*command, "1"], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    shown: list[str] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while data := os.read(ours, 4096):
                shown.append(data.decode())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        until(lambda: "ask it: difyops chat --url" in "".join(shown), 60, lambda: "".join(shown))
        found = re.search(r"--url (http://\S+/v1)", "".join(shown))
        assert found
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True,
                "ignore_eos": True, "max_tokens": 450}  # fmt: skip
        with httpx.stream("POST", f"{found[1]}/chat/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.write(ours, b"\x03")
            until(lambda: "stopping" in "".join(shown), 10, lambda: "".join(shown))
            os.write(ours, b"\x03")
            assert any("server_stopping" in line for line in lines)
        assert child.wait(15) == 0
        reader.join(5)
    finally:
        child.kill()
        child.wait()
        os.close(ours)
    assert "stopped" in "".join(shown)
    assert "Traceback" not in "".join(shown) and "Error" not in "".join(shown)


def test_an_unknown_model_names_what_is_near(serve: Callable[..., Serve]) -> None:
    server = serve("smolm2-135m", "--host", "0.0.0.0")  # noqa: S104
    absent = serve("./no/such/model", "--host", "localhost")
    assert server.wait() == 2
    assert "no model 'smolm2-135m'" in server.log
    assert "did you mean smollm2-135m?" in server.log
    assert "WARNING 0.0.0.0 without an API key" in server.log
    assert absent.wait() == 3
    assert "no/such/model: no such file or directory" in absent.log
    assert "WARNING" not in absent.log


@pytest.mark.parametrize(("form", "damage"), [("gguf", "truncated"), ("safetensors", "corrupt")])
def test_a_damaged_file_is_exit_3_and_named(
    form: str, damage: str, serve: Callable[..., Serve], checkpoint: Path, smol: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    if form == "gguf":
        bad = model = tmp_path / "bad.gguf"
        shutil.copyfile(smol, bad)
    else:
        model = tmp_path / "bad"
        shutil.copytree(checkpoint, model)
        (bad,) = model.glob("*.safetensors")
    if damage == "truncated":
        os.truncate(bad, bad.stat().st_size * 2 // 3)
    else:
        with bad.open("r+b") as file:
            file.write(b"\xff" * 64)
    server = serve(model)
    assert server.wait() == 3, server.log
    (wrong,) = [line for line in server.log.splitlines() if line.startswith("error: ")]
    assert str(bad) in wrong and "  Fix: download it again" in server.log
    assert "listening" not in server.log
    assert "Traceback" not in server.log


def test_a_taken_port_is_exit_3(serve: Callable[..., Serve], checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        server = serve(checkpoint, "--port", port)
        assert server.wait() == 3
    assert server.log.splitlines() == [
        f"error: cannot listen on 127.0.0.1:{port}: Address already in use",
        f"  Fix: --port 0 takes any that is free; or stop what listens on {port}",
    ]


def test_pages_for_less_than_one_context_are_refused(checkpoint: Path) -> None:
    wanted = LlmConfig(id="tiny", model=str(checkpoint), pages=3, device="cpu", threads=1)
    with pytest.raises(UsageError, match="pages: 3 hold 48 tokens, less than a context of 512"):
        open_llm(wanted)


@pytest.mark.parametrize(
    ("said", "bytes_"),
    [("off", 0), ("0", 0), ("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5k", 1500), ("7B", 7)],
)
def test_sizes(said: str, bytes_: int) -> None:
    assert serve_command._prefix_bytes(said) == bytes_


def test_what_is_no_size_is_refused() -> None:
    for said in ("", "none", "-1", "2 PB", "1e9"):
        with pytest.raises(UsageError, match="--prefix-cache"):
            serve_command._prefix_bytes(said)


def test_prefixes_take_no_more_than_is_free() -> None:
    assert opening.prefix_budget(None, 800) == 100
    assert [opening.prefix_budget(n, 800) for n in (0, 800)] == [0, 800]
    with pytest.raises(UsageError, match=r"prefix_cache: 2,048 MiB .*, and 1,024 MiB are free"):
        opening.prefix_budget(2 << 30, 1 << 30)


def test_the_start_lines_name_the_draft_model_its_weights_and_no_prefix_cache(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    llm = open_llm(LlmConfig(id="tiny", model=str(checkpoint), speculate=f"draft:{checkpoint}",
                             prefix_cache=0, device="cpu", threads=1))  # fmt: skip
    llm.engine.stop()
    assert f"speculation: draft {checkpoint}\n" in caplog.text
    (weights,) = re.findall(r"no prefix cache, (.*) of weights \(", caplog.text)
    assert re.search(re.escape(weights) + r" of weights \([\d,]+ parameters\) for drafting",
                     caplog.text)  # fmt: skip
    assert "GiB" not in caplog.text


@pytest.mark.parametrize("wanted", ["mtp", "medusa"])
def test_a_drafter_that_the_checkpoint_lacks_is_refused(checkpoint: Path, wanted: str) -> None:
    config = LlmConfig(id="tiny", model=str(checkpoint), speculate=wanted, device="cpu", threads=1)
    with pytest.raises(UsageError, match=f"no {wanted} weights"):
        open_llm(config)


def test_a_context_beyond_the_model_s_is_refused(checkpoint: Path) -> None:
    wanted = LlmConfig(id="tiny", model=str(checkpoint), context=513, device="cpu", threads=1)
    with pytest.raises(UsageError, match="context: 513 tokens were asked for, and tiny has 512"):
        open_llm(wanted)


def test_bench_starts_it_and_peers_load_the_same(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFYOPS_API_KEY", "somebody-else-s")
    with peers.native(str(checkpoint), threads=1, slots=2) as target:
        (sample,) = target.measure([load.prompt(load.FEWEST_WORDS, 1)], streams=1, tokens=4).samples
    assert (target.name, sample.tokens) == ("native", 4)
    (tmp_path / "link").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    assert peers.weights_of("./link", print) == tmp_path / "link"


def test_ctrl_c_while_loading_is_an_end_like_any_other(
    serve: Callable[..., Serve], checkpoint: Path
) -> None:
    server = serve(checkpoint)
    until(lambda: "listening" in server.log, 20, lambda: server.log)
    server.process.send_signal(signal.SIGINT)
    assert server.wait(10) == 0, server.log
    assert "Traceback" not in server.log
