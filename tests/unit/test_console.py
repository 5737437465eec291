"""console.py and transport.py against the stand-in: errors, redaction, streams, idempotence."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from difyops.console import (
    BearerConsole,
    DifyApiError,
    DifyUnreachable,
    ServiceApi,
    completion_tokens,
    masked,
)
from difyops.errors import DifyopsError
from difyops.secrets import Secret
from difyops.transport import lines_until, parse_sse
from tests.unit.fake_dify import PASSWORD, FakeDify015, serve_fake, sse


@pytest.fixture
def fake() -> Iterator[FakeDify015]:
    with serve_fake() as fake:
        yield fake


@pytest.fixture
def console(fake: FakeDify015) -> Iterator[BearerConsole]:
    with BearerConsole(fake.url) as console:
        yield console


@pytest.fixture
def api(fake: FakeDify015) -> Iterator[ServiceApi]:
    with ServiceApi(fake.url, Secret("app-key")) as api:
        yield api


def test_importing_does_not_import_requests() -> None:
    code = "import sys, difyops.console, difyops.wire; sys.exit('requests' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_refusal_carries_difys_code_and_message(console: BearerConsole) -> None:
    console.setup("a@example.com", "A", Secret(PASSWORD))

    with pytest.raises(DifyApiError, match="successfully installed") as caught:
        console.setup("a@example.com", "A", Secret(PASSWORD))

    assert (caught.value.code, caught.value.status) == ("already_setup", 403)


def test_a_secret_is_redacted_even_when_dify_repeats_it(
    fake: FakeDify015, console: BearerConsole
) -> None:
    fake.model_refusal = "the server says: key sk-very-secret is wrong"

    with pytest.raises(DifyApiError) as caught:
        console.ensure_model("llm", "m", {}, Secret("sk-very-secret"))

    assert "sk-very-secret" not in str(caught.value)
    assert "is wrong" in str(caught.value)


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://user:hush@127.0.0.1:{free.getsockname()[1]}"
        with BearerConsole(url) as console, pytest.raises(DifyUnreachable) as caught:
            console.is_set_up()
    assert "Connection refused" in caught.value.message
    assert "hush" not in caught.value.message


def test_no_answer_in_time(fake: FakeDify015, api: ServiceApi) -> None:
    fake.delay = 0.5
    with pytest.raises(DifyUnreachable, match=r"within 0\.1 s"):
        api.chat("hi", user="u", seconds=0.1)


def test_pings_do_not_keep_a_stuck_answer_open_for_ever() -> None:
    class Pinging:
        def iter_lines(self) -> Iterator[bytes]:
            while True:
                yield b"event: ping"

    with pytest.raises(DifyUnreachable, match="did not end in time"):
        list(lines_until(Pinging(), time.monotonic() + 0.05))  # type: ignore[arg-type]


def test_another_server_is_not_the_api(fake: FakeDify015, console: BearerConsole) -> None:
    fake.other_server = True
    with pytest.raises(DifyopsError, match=r"not an answer of Dify's API: .*Invalid API Key"):
        console.is_set_up()


def test_a_web_page_is_not_the_api(fake: FakeDify015, api: ServiceApi) -> None:
    fake.stream_type = "text/html"
    with pytest.raises(DifyopsError, match="text/html"):
        list(api.chat_stream("hi", user="u"))


@pytest.mark.parametrize(
    ("stored_key", "new_key", "change"),
    [
        ("lab-key-0123456789", "lab-key-0123456789", "same"),
        ("lab-key-0123456789", "another-key-0123456", "updated"),
        ("short", "short", "updated"),  # Dify shows nothing of it, so it is saved to be sure
        ("", "", "same"),
        ("lab-key-0123456789", "", "updated"),
        ("", "lab-key-0123456789", "updated"),
    ],
)
def test_a_key_is_compared_by_what_dify_shows(
    console: BearerConsole, stored_key: str, new_key: str, change: str
) -> None:
    settings = {"endpoint_url": "http://m/v1"}
    assert console.ensure_model("llm", "m", settings, Secret(stored_key)) == "created"
    assert console.ensure_model("llm", "m", settings, Secret(new_key)) == change


def test_a_persons_settings_survive_an_update(fake: FakeDify015, console: BearerConsole) -> None:
    console.save_model("llm", "m", {"endpoint_url": "http://old/v1", "api_key": "k", "extra": "x"})
    console.ensure_model("llm", "m", {"endpoint_url": "http://new/v1"}, Secret(""))
    assert fake.models["llm", "m"] == {"endpoint_url": "http://new/v1", "extra": "x"}


def test_apps_are_found_by_their_exact_name(fake: FakeDify015, console: BearerConsole) -> None:
    fake.apps = [
        {"id": "2", "name": "chat", "created_at": 2},
        {"id": "0", "name": "chat 2", "created_at": 0},
        {"id": "1", "name": "chat", "created_at": 1},
    ]
    assert [app["id"] for app in console.apps("chat")] == ["1", "2"]


def test_a_field_that_is_gone_is_named(fake: FakeDify015, console: BearerConsole) -> None:
    fake.apps = [{"id": "1"}]
    with pytest.raises(DifyopsError, match="no field 'name'"):
        console.apps("chat")


def test_masked() -> None:
    assert masked("12345678") is None
    assert masked("123456789") == "123456************89"


def test_completion_tokens_of_an_answer_without_usage() -> None:
    assert completion_tokens({"metadata": {"usage": None}}) == 0
    assert completion_tokens({}) == 0


class TestParseSse:
    def test_pings_are_left_out_and_lines_joined(self) -> None:
        lines = [b"event: ping", b"", b'data: {"event":', b'data: "message"}', b"", b": note"]
        assert list(parse_sse(lines)) == [("message", {"event": "message"})]

    @pytest.mark.parametrize("body", [b"data: {oops", b"data: [1]", b'data: {"answer": "x"}'])
    def test_what_is_not_an_event_is_an_error(self, body: bytes) -> None:
        with pytest.raises(DifyopsError, match="not an event"):
            list(parse_sse([body, b""]))

    def test_a_cut_inside_an_event_is_an_error(self) -> None:
        lines = sse({"event": "message"}).splitlines()
        with pytest.raises(DifyopsError, match="ends inside"):
            list(parse_sse([*lines, b'data: {"event": "mess']))
