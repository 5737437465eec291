"""wire.py and knowledge.py against the stand-in: idempotence, and each fault with its remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from difyops import wire
from difyops.console import BearerConsole, DifyUnreachable
from difyops.errors import DifyopsError
from difyops.knowledge import RIGHT, prove_knowledge
from difyops.secrets import Secret
from difyops.wire import ModelTarget, ProofError, WireTarget
from tests.unit.fake_dify import (
    ERROR_EVENT,
    GOOD_STREAM,
    PASSWORD,
    USAGE,
    FakeDify015,
    Refusal,
    message,
    serve_fake,
    sse,
)

KEY = "model-key-0123456789"


@pytest.fixture
def fake() -> Iterator[FakeDify015]:
    with serve_fake() as fake:
        yield fake


@pytest.fixture
def target(fake: FakeDify015) -> WireTarget:
    return WireTarget(
        base_url=fake.url,
        admin_email="admin@example.com",
        admin_name="Admin",
        admin_password=Secret(PASSWORD),
        llm=ModelTarget("tiny", "http://127.0.0.1:8090/v1", Secret(KEY), 2048, 512),
        embedding=ModelTarget("minilm", "http://127.0.0.1:8091/v1", Secret(KEY), 256),
    )


def quiet(step: str, detail: str) -> None:
    pass


def writes(fake: FakeDify015) -> dict[str, int]:
    """Requests that change something; a chat and a login are meant to happen every time."""
    every_time = ("/login", "/v1/chat-messages")
    return {
        call: count
        for call, count in fake.calls.items()
        if not call.startswith("GET") and not call.endswith(every_time)
    }


def test_the_first_run_makes_everything_once_and_the_second_writes_nothing(
    fake: FakeDify015, target: WireTarget
) -> None:
    steps: list[str] = []
    first = wire.run(target, lambda step, _: steps.append(step))
    made = writes(fake)
    second = wire.run(target, quiet)

    assert list(dict.fromkeys(steps)) == ["account", "models", "defaults", "app", "key", "proof"]
    assert set(first.changes.values()) == {"created"}
    assert set(second.changes.values()) == {"same"}
    assert writes(fake) == made
    assert (len(fake.apps), len(fake.keys), len(fake.models)) == (1, 1, 2)
    assert fake.calls["POST /setup"] == 1
    assert fake.calls["POST /v1/chat-messages"] == 4


def test_what_dify_is_told_about_the_models(fake: FakeDify015, target: WireTarget) -> None:
    wire.run(target, quiet)
    assert fake.models["llm", "tiny"] == {
        "endpoint_url": "http://127.0.0.1:8090/v1",
        "api_key": KEY,
        "mode": "chat",
        "context_size": "2048",
        "max_tokens_to_sample": "512",
        "stream_mode_delimiter": "\\n\\n",
        "function_calling_type": "no_call",
        "stream_function_calling": "not_supported",
        "vision_support": "no_support",
    }
    assert set(fake.models["text-embedding", "minilm"]) == {
        "endpoint_url",
        "api_key",
        "context_size",
    }


def test_only_what_changed_is_updated(fake: FakeDify015, target: WireTarget) -> None:
    wire.run(target, quiet)
    report = wire.run(replace(target, llm=replace(target.llm, context=4096)), quiet)
    assert [k for k, v in report.changes.items() if v != "same"] == ["model llm"]


def test_another_model_moves_the_default_and_the_app(fake: FakeDify015, target: WireTarget) -> None:
    wire.run(target, quiet)
    report = wire.run(replace(target, llm=replace(target.llm, name="other")), quiet)
    assert {k: v for k, v in report.changes.items() if v != "same"} == {
        "model llm": "created",
        "default llm": "updated",
        "app config": "updated",
    }
    assert fake.apps[0]["model_config"]["model"]["name"] == "other"


def test_a_prompt_that_a_person_wrote_is_kept(fake: FakeDify015, target: WireTarget) -> None:
    wire.run(target, quiet)
    fake.apps[0]["model_config"]["pre_prompt"] = "Speak like a pirate."
    wire.run(replace(target, llm=replace(target.llm, max_output=64)), quiet)
    config = fake.apps[0]["model_config"]
    assert config["pre_prompt"] == "Speak like a pirate."
    assert config["model"]["completion_params"]["max_tokens"] == 64


def test_the_report_is_json_without_secrets(fake: FakeDify015, target: WireTarget) -> None:
    report = wire.run(target, quiet)
    text = json.dumps(report.as_dict()) + repr(report) + repr(target)
    assert fake.keys[0] not in text
    assert KEY not in text
    assert PASSWORD not in text
    assert set(report.as_dict()) == {"app_id", "api_key", "models", "changes", "chat"}
    assert report.chat is not None
    assert (report.chat.answer, report.chat.streamed) == ("Hello.", "Hello.")


def test_a_wrong_password_says_that_the_account_exists_and_is_tried_once(
    fake: FakeDify015, target: WireTarget
) -> None:
    fake.is_set_up = True
    with pytest.raises(DifyopsError, match="with another password") as caught:
        wire.run(replace(target, admin_password=Secret("wrong-Passw0rd")), quiet)
    assert "flask reset-password --email admin@example.com" in (caught.value.hint or "")
    assert "wrong-Passw0rd" not in f"{caught.value.message}{caught.value.hint}"
    # Dify locks an account after a few failures.
    assert fake.calls["POST /login"] == 1


def test_a_refused_model_names_the_endpoint(fake: FakeDify015, target: WireTarget) -> None:
    fake.model_refusal = "Credentials validation failed with status code 401"
    with pytest.raises(DifyopsError, match="status code 401") as caught:
        wire.run(target, quiet)
    assert "http://127.0.0.1:8090/v1" in (caught.value.hint or "")


class TestProof:
    def fails(self, target: WireTarget, pattern: str) -> ProofError:
        with pytest.raises(ProofError, match=pattern) as caught:
            wire.run(target, quiet)
        assert caught.value.evidence
        assert caught.value.hint
        return caught.value

    def test_model_down_blocking(self, fake: FakeDify015, target: WireTarget) -> None:
        fake.blocking_error = Refusal(400, "completion_request_error", "Server Unavailable Error")
        self.fails(target, "completion_request_error: Server Unavailable")

    def test_model_down_streaming_is_http_200(self, fake: FakeDify015, target: WireTarget) -> None:
        fake.stream = sse(ERROR_EVENT)
        self.fails(target, "error event, completion_request_error")

    def test_an_error_after_half_an_answer(self, fake: FakeDify015, target: WireTarget) -> None:
        fake.stream = sse(message("Hello wor"), ERROR_EVENT)
        assert "answered: 'Hello wor'" in self.fails(target, "error event").evidence

    def test_no_message_end(self, fake: FakeDify015, target: WireTarget) -> None:
        fake.stream = sse(message("Hello."))
        self.fails(target, "without message_end")

    def test_an_empty_blocking_answer(self, fake: FakeDify015, target: WireTarget) -> None:
        fake.answer = " \n"
        self.fails(target, "blocking answer is empty")

    def test_an_empty_streamed_answer(self, fake: FakeDify015, target: WireTarget) -> None:
        fake.stream = sse({"event": "message_end", "metadata": USAGE})
        self.fails(target, "streaming answer is empty")

    @pytest.mark.parametrize("answer", ["!!!!!!", "\ufffd\ufffd a", "0 1 2 3", "- - - - - ok"])
    def test_noise_is_not_words(self, fake: FakeDify015, target: WireTarget, answer: str) -> None:
        fake.answer = answer
        self.fails(target, "not made of words")

    @pytest.mark.parametrize("answer", ["Hi", "Grüße!", "你好", "Здравствуйте."])
    def test_words_of_any_script(self, fake: FakeDify015, target: WireTarget, answer: str) -> None:
        fake.answer = answer
        assert wire.run(target, quiet).chat is not None

    def test_no_tokens(self, fake: FakeDify015, target: WireTarget) -> None:
        fake.blocking_tokens = 0
        self.fails(target, "no completion tokens")

    def test_a_garbled_stream(self, fake: FakeDify015, target: WireTarget) -> None:
        fake.stream = GOOD_STREAM.replace(b'"answer"', b'answer"', 1)
        with pytest.raises(DifyopsError, match="not an event of Dify"):
            wire.run(target, quiet)

    def test_a_stream_that_breaks_off(self, fake: FakeDify015, target: WireTarget) -> None:
        fake.stream_cut = 10
        with pytest.raises(DifyUnreachable, match="broke off"):
            wire.run(target, quiet)

    def test_a_slow_model_times_out(self, fake: FakeDify015, target: WireTarget) -> None:
        report = wire.run(target, quiet)
        fake.delay = 0.5
        with pytest.raises(DifyUnreachable, match="no answer within"):
            wire.prove(target, report, seconds=0.1)


class TestKnowledge:
    @pytest.fixture
    def console(self, fake: FakeDify015) -> Iterator[BearerConsole]:
        with BearerConsole(fake.url) as console:
            yield console

    def test_made_once(self, fake: FakeDify015, console: BearerConsole) -> None:
        first = prove_knowledge(console, "minilm", quiet, poll=0)
        second = prove_knowledge(console, "minilm", quiet, poll=0)
        assert (first.change, second.change) == ("created", "same")
        assert first.passage == RIGHT
        assert (len(fake.datasets), len(fake.documents)) == (1, 1)
        assert fake.calls["POST /files/upload"] == 1

    def test_waiting_names_the_worker(self, fake: FakeDify015, console: BearerConsole) -> None:
        fake.stages = ["waiting"]
        with pytest.raises(ProofError, match="still `waiting`") as caught:
            prove_knowledge(console, "minilm", quiet, seconds=0, poll=0)
        assert "no worker takes the task" in (caught.value.hint or "")

    def test_a_failed_document_is_made_anew(
        self, fake: FakeDify015, console: BearerConsole
    ) -> None:
        fake.stages = ["error"]
        with pytest.raises(ProofError, match="error: no table here"):
            prove_knowledge(console, "minilm", quiet, poll=0)
        fake.stages = ["completed"]
        assert prove_knowledge(console, "minilm", quiet, poll=0).change == "updated"
        assert len(fake.documents) == 1

    def test_the_wrong_passage_first(self, fake: FakeDify015, console: BearerConsole) -> None:
        fake.order = (0, 2, 1)
        with pytest.raises(ProofError, match="right passage first"):
            prove_knowledge(console, "minilm", quiet, poll=0)

    def test_nothing_found(self, fake: FakeDify015, console: BearerConsole) -> None:
        fake.order = ()
        with pytest.raises(ProofError, match="finds nothing"):
            prove_knowledge(console, "minilm", quiet, poll=0)

    def test_another_embedding_model_is_said(
        self, fake: FakeDify015, console: BearerConsole
    ) -> None:
        prove_knowledge(console, "minilm", quiet, poll=0)
        with pytest.raises(DifyopsError, match="indexed with minilm, not with bge"):
            prove_knowledge(console, "bge", quiet, poll=0)
