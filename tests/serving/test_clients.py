"""`difyops chat` and `difyops bench serve` against the real server, and against faults."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from difyops.bench import peers

from .conftest import CHAT, KEY, Running, until
from .faulty_server import faulty, refuse, stream

COMMAND = [sys.executable, "-m", "difyops"]


def run(*arguments: str, key: str = KEY, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        input=said,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "DIFYOPS_MODEL_API_KEY": key},
    )


@pytest.fixture
def url(server: Running) -> str:
    return f"{server.url()}/v1"


# --- one question ---------------------------------------------------------------------------------


def test_once_prints_only_the_answer(url: str) -> None:
    wanted = ["--max-tokens", "8", "--temperature", "0"]
    done = run("chat", "--url", url, "--once", "Say hello.", *wanted)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert re.fullmatch(
        r"8 tokens, [\d.]+ tokens/s, first token after [\d.]+ s, cut: --max-tokens .*\n",
        done.stderr,
    )
    piped = run("chat", "--url", url, *wanted, said="Say hello.\n")
    assert piped.returncode == 0
    assert piped.stdout


def test_json(url: str) -> None:
    done = run("chat", "--url", url, "--json", "--max-tokens", "6", "--system", "Be short.",
               "--once", "Hi")  # fmt: skip
    found = json.loads(done.stdout)
    assert " ".join(found) == (
        "version model answer reasoning finish_reason tokens tokens_exact tokens_per_second "
        "seconds_to_first_token"
    )
    assert (found["version"], found["model"], found["tokens_exact"]) == (1, CHAT, True)
    assert 0 < found["tokens"] <= 6
    assert 0 < found["seconds_to_first_token"] < 60
    assert found["answer"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "key", "code", "said"),
    [
        (["--once", "hi " * 2000], KEY, 1, "1024 tokens"),
        (["--once", "hi"], "wrong", 1, "refuses the API key"),
        (["--once", "hi", "--model", "nope"], KEY, 1, "name one with --model"),
        (["--once", " "], KEY, 2, "the question is empty"),
        (["--once", "hi", "--max-tokens", "0"], KEY, 2, "max-tokens"),
    ],
    ids=["too long", "key", "model", "empty", "max-tokens"],
)
def test_errors(url: str, arguments: list[str], key: str, code: int, said: str) -> None:
    done = run("chat", "--url", url, *arguments, key=key)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_is_not_up() -> None:
    done = run("chat", "--url", "http://127.0.0.1:1/v1", "--once", "hi")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: http://127.0.0.1:1/v1 cannot be reached",
        "  Fix: is it up? One of ours: difyops serve MODEL, or difyops up --source",
    ]


def test_the_model_of_a_deployment(tmp_path: Path) -> None:
    with faulty(stream("here")) as server:
        made = run("init", str(tmp_path), "--yes", "--without-dify", "--model", "faulty",
                   "--model-url", server.url)  # fmt: skip
        assert made.returncode == 0, made.stderr
        done = run("-C", str(tmp_path), "chat", "--once", "hi", "--temperature", "0.5", key="")
    assert (done.returncode, done.stdout) == (0, "here\n")
    assert (server.asked[0]["model"], server.asked[0]["temperature"]) == ("faulty", 0.5)
    nowhere = run("-C", str(tmp_path / "no"), "chat", "--once", "hi")
    assert nowhere.returncode == 2
    assert "difyops.yaml is missing" in nowhere.stderr


# --- faults ---------------------------------------------------------------------------------------


def test_a_server_that_loads_is_waited_for_and_counts_are_estimates_without_usage() -> None:
    loading = refuse(503, "the models are still loading", Retry_After="1")
    with faulty(loading, stream("one ", "two ", "three")) as server:
        began = time.monotonic()
        done = run("chat", "--url", server.url, "--once", "Count.")
    assert time.monotonic() - began >= 1
    assert (done.returncode, done.stdout) == (0, "one two three\n")
    assert re.search(r"^~3 tokens, ", done.stderr, re.M)
    assert len(server.asked) == 2
    assert server.asked[1]["model"] == "faulty"
    assert server.asked[1]["stream_options"] == {"include_usage": True}
    assert not {"max_tokens", "temperature"} & set(server.asked[1])


def test_a_full_queue() -> None:
    with faulty(refuse(429, "9 requests are waiting", Retry_After="3")) as server:
        done = run("chat", "--url", server.url, "--once", "hi")
    assert done.returncode == 1
    assert "is busy (429: 9 requests are waiting)" in done.stderr
    assert "Fix: try again in 3 s" in done.stderr
    assert len(server.asked) == 1


@pytest.mark.parametrize("json_wanted", [False, True])
def test_a_broken_stream(json_wanted: bool) -> None:
    with faulty(stream("half an ", end=b"")) as server:
        flags = ["--json"] if json_wanted else []
        done = run("chat", "--url", server.url, "--once", "hi", *flags)
    assert done.returncode == 1
    assert done.stdout == ("" if json_wanted else "half an ")
    assert "the answer broke off" in done.stderr


# --- a conversation -------------------------------------------------------------------------------


#: The terminal becomes the controlling one, so that Ctrl-C typed there is a signal.
ON_A_TERMINAL = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "from difyops import cli; cli.main(sys.argv[1:])"
)


class Terminal:
    """`difyops chat` on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.shown = ""
        self.fd, theirs = pty.openpty()
        self.child = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, "chat", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "DIFYOPS_MODEL_API_KEY": KEY, "NO_COLOR": "1", "TERM": "dumb"},
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        self.shown = ""
        os.write(self.fd, text.encode())

    def until(self, pattern: str, seconds: float = 30) -> str:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.shown):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.shown!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.shown += os.read(self.fd, 4096).decode("utf-8", "replace")
        return self.shown

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self.fd)


@pytest.fixture
def terminal(request: pytest.FixtureRequest) -> Iterator[Any]:
    opened: list[Terminal] = []

    def go(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        opened[-1].until("> $")
        return opened[-1]

    yield go
    for one in opened:
        one.close()


def busy(server: Running) -> bool:
    """Whether the engine computes: an answer that goes on takes a whole processor."""
    import psutil

    (engine,) = psutil.Process(server.process.pid).children()
    return bool(engine.cpu_percent(0.3) > 20)


def test_ctrl_c_stops_only_the_answer(server: Running, url: str, terminal: Any) -> None:
    chat = terminal("--url", url, "--max-tokens", "900")
    assert chat.shown.startswith(f"{CHAT} at {url}; /reset ")
    chat.type("Tell a very long story about the sea and all of its ships.\n")
    chat.until(r"ships\.\r?\n.*\w+ \w+ \w+")
    chat.type("\x03")
    shown = chat.until(r"token.*stopped\r?\n> $")
    assert "error" not in shown
    until(lambda: not busy(server), 10)  # the slot is free: the connection was closed
    chat.type("/reset\n")
    chat.until("forgotten\r?\n> $")
    chat.type("/help\n")
    chat.until("/exit .*ends.*\r?\n> $")
    chat.type("\x03")
    assert chat.child.wait(20) == 130


def test_turns_are_kept_until_reset(terminal: Any) -> None:
    with faulty(stream("first"), refuse(429, "full"), stream("third"), stream("last")) as server:
        chat = terminal("--url", server.url, "--system", "Be short.")
        for question, answer in [
            ("one", "first"), ("two", "is busy"), ("three", "third"), ("/reset", "forgotten"),
            ("four", "last"),
        ]:  # fmt: skip
            chat.type(f"{question}\n")
            chat.until(rf"{answer}[\s\S]*> $")
        chat.type("\x04")
        assert chat.child.wait(20) == 0
    system = {"role": "system", "content": "Be short."}
    said = [[m["content"] for m in body["messages"]] for body in server.asked]
    assert said == [
        ["Be short.", "one"],
        ["Be short.", "one", "first", "two"],
        ["Be short.", "one", "first", "three"],  # a question that failed was never asked
        ["Be short.", "four"],
    ]
    assert server.asked[0]["messages"][0] == system


def test_a_model_does_not_command_the_terminal(terminal: Any) -> None:
    with faulty(stream("a\x1b[31mb\x07c\r\n", "d\n")) as server:
        chat = terminal("--url", server.url)
        chat.type("hi\n")
        assert "a[31mbc\r\nd\r\n" in chat.until("d\r\n.*tokens")
        chat.type("/exit\n")
        assert chat.child.wait(20) == 0


# --- bench serve ----------------------------------------------------------------------------------


def test_a_small_load(url: str) -> None:
    done = run("bench", "serve", "--url", url, "--streams", "2", "--tokens", "5",
               "--prompt-tokens", "40", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(r["streams"], r["requests"]) for r in found["rows"]] == [(2, 8)]
    for row in found["rows"]:
        # ignore_eos is taken, the template is counted: all requests are alike.
        assert row["tokens"] == [5, 5]
        assert row["prompt_tokens"] == [40, 40]
        assert 0 < row["ttft_p50"] <= row["ttft_p95"]
        assert 0 < row["itl_p50"] <= row["itl_p95"]
        assert row["ratio"] == {"tokens_per_second": 1, "ttft_p50": 1, "itl_p50": 1}
    assert "round 2 of 2" in done.stderr


def test_a_load_that_is_refused() -> None:
    # Asked for its shortest prompt without ignore_eos, too, and in the warm-up; then it is told.
    with faulty(refuse(400, "ignore_eos: no"), refuse(429, "full")) as server:
        done = run("bench", "serve", "--url", server.url, "--streams", "1")
    assert done.returncode == 1
    assert "is busy (429: full)" in done.stderr
    assert [("ignore_eos" in body) for body in server.asked] == [True, False, False]


def test_a_server_that_does_not_count() -> None:
    with faulty(stream("a", "b")) as server:
        done = run("bench", "serve", "--url", server.url, "--streams", "1")
    assert done.returncode == 1
    assert "does not count its tokens" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "nothing to measure"),
     (["--url", "http://127.0.0.1:1/v1", "--peer", "llamacpp"], "peers need the model"),
     (["nope", "--peer", "llamacpp"], "no model 'nope'"),
     (["--url", "http://127.0.0.1:1/v1", "--streams", "0"], "--streams"),
     (["--url", "http://127.0.0.1:1/v1", "--streams", "1,x"], "--streams")],
)  # fmt: skip
def test_wrong_usage(arguments: list[str], said: str) -> None:
    done = run("bench", "serve", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_llamacpp_as_a_peer(model_files: dict[str, dict[str, Path]]) -> None:
    from difyops.bench.load import prompt

    weights = model_files[CHAT]["weights"]
    with peers.llamacpp(weights, 1, 2, 256) as target:
        found = target.measure([prompt(12, seed) for seed in range(3)], 2, 4)
    assert [s.tokens for s in found.samples] == [4, 4, 4]
    assert len({s.prompt_tokens for s in found.samples}) == 1
    assert found.seconds > 0


def test_a_peer_that_cannot_load_says_why(tmp_path: Path) -> None:
    from difyops.errors import DifyopsError

    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"noise" * 1000)
    with (
        pytest.raises(DifyopsError, match=r"llama_child ended: .*\w"),
        peers.llamacpp(bad, 1, 1, 256),
    ):
        pass


def test_a_batch_of_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    words = {word: i for i, word in enumerate(["?", "Words:", "time", "people", "water"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="?")
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    fast.save_pretrained(tmp_path)

    from difyops.bench.load import prompt

    with peers.transformers(tmp_path, 1) as target:
        found = target.measure([prompt(9, 1), prompt(9, 2), prompt(12, 3)], 2, 7)
    # The last batch is smaller; every answer has its number of tokens, every prompt its own.
    assert [s.tokens for s in found.samples] == [7, 7, 7]
    assert [s.prompt_tokens for s in found.samples] == [11, 11, 14]
    assert all(len(s.gaps) == 6 and s.first > 0 for s in found.samples)
