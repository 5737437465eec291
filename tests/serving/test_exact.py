"""`model.exact`: real servers are the same every way; one that is not is found out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from difyops.backends import exact
from difyops.backends.exact import Comparison, Ways
from difyops.checks.exact import exact_answers
from difyops.secrets import Secret
from tests.serving.conftest import CHAT, KEY, Running
from tests.serving.faulty_server import Answer, faulty, refuse, stream
from tests.unit.conftest import deployment
from tests.unit.test_cli import main


def test_the_real_llama_cpp_is_exact(server: Running) -> None:
    url = f"{server.url()}/v1"
    known = exact.ways("llamacpp", url, CHAT, Secret(KEY))
    assert known == Ways(uncached={"cache_prompt": False})
    found = exact.compare(url, CHAT, Secret(KEY), ways=known)
    assert found.difference is None or found.difference.near_tie, str(found.difference)
    assert found.answers == 6


def answer(text: str, gap: float | None = None) -> Answer:
    """200; with `gap`, every word of the text is a token with a second choice so far behind it."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    if gap is not None:
        words = [word + " " for word in text.split()]
        choice["logprobs"] = {"content": [
            {"token": word, "top_logprobs": [{"logprob": -0.1}, {"logprob": -0.1 - gap}]}
            for word in words
        ]}  # fmt: skip
    return 200, {"Content-Type": "application/json"}, json.dumps({"choices": [choice]}).encode()


RIGHT, WRONG = answer("he saw a whale"), answer("he saw a shark")


def compared(*script: Answer) -> Comparison:
    with faulty(*script) as server:
        return exact.compare(server.url, "faulty", ways=Ways())


def test_a_stand_in_that_is_exact() -> None:
    with faulty(RIGHT) as server:
        found = exact.compare(server.url, "faulty", ways=Ways())
    assert found.difference is None
    assert found.answers == len(server.asked) == 6
    assert {body["temperature"] for body in server.asked} == {0}
    first, second = server.asked[0]["messages"], server.asked[2]["messages"]
    assert second[:2] == [*first, {"role": "assistant", "content": "he saw a whale"}]
    assert len(first[0]["content"].split()) > 80
    with faulty(RIGHT) as again:
        exact.compare(again.url, "faulty", ways=Ways())
    assert again.asked[0]["messages"] != first  # what one run has warmed is cold to the next


@pytest.mark.parametrize("place", [1, 2, 3, 4, 5])
def test_one_answer_that_differs_is_found(place: int) -> None:
    """At every place: the warm one, the second turn, its repetition, the two that run together."""
    script = [RIGHT] * 6
    script[place] = WRONG
    found = compared(*script, answer("he saw a whale", 2.0))
    assert found.difference is not None
    assert not found.difference.near_tie
    assert (found.difference.at, found.difference.gap) == (9, pytest.approx(2.0))
    said = str(found.difference)
    assert "'whale'" in said and "'shark'" in said and "2, a near-tie is below 0.5" in said


@pytest.mark.parametrize(
    ("scored", "status", "evidence"),
    [
        (answer("he saw a whale", 2.0), "fail", "warm 'shark'"),
        (answer("he saw a shark", 0.6), "fail", "changes tokens"),
        (answer("he saw a whale", 0.3), "ok", "a near-tie, no fault: after 9 equal characters"),
        (answer("he saw a whale"), "warn", "gives no logprobs"),
        (answer("a third thing is said", 0.01), "warn", "gives no logprobs there"),
        (refuse(400, "logprobs is not supported"), "warn", "gives no logprobs"),
    ],
)
def test_what_doctor_says(scored: Answer, status: str, evidence: str) -> None:
    """A stand-in whose second identical request is answered otherwise."""
    with faulty(RIGHT, WRONG, RIGHT, RIGHT, RIGHT, RIGHT, scored) as server:
        model = {"backend": "external", "url": server.url, "name": "faulty"}
        found = exact_answers(deployment({"model": model}))
    assert found.status == status, found
    assert evidence in found.evidence.replace("\n", " "), found
    assert (found.fix is None) == (status == "ok")


def test_only_servers_that_name_themselves_are_sent_extensions() -> None:
    def known(owner: str) -> Ways:
        entry = {"id": "m", "owned_by": owner}
        models = json.dumps({"data": [entry]}).encode()
        with faulty(RIGHT, models=models) as server:
            return exact.ways("external", server.url, "m", None)

    assert known("somebody") == Ways()
    assert known("llamacpp") == Ways({"cache_prompt": False})
    assert list(known("vllm").uncached or ()) == ["cache_salt"]


@pytest.mark.parametrize(("second", "code"), [(RIGHT, 0), (WRONG, 1)])
def test_any_server_without_a_deployment(
    second: Answer, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    scored = answer("he saw a whale", 2.0)
    with faulty(stream("Hello."), RIGHT, second, RIGHT, RIGHT, RIGHT, RIGHT, scored) as server:
        assert main("doctor", "--url", server.url, "--json") == code
    found = {check["id"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert list(found) == ["model.up", "model.chat", "model.exact"]
    assert found["model.exact"]["status"] == ("fail" if code else "ok")
    assert list(tmp_path.iterdir()) == []


def test_what_a_server_is_not_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("doctor", "--model", "m") == 2
    assert "--url" in capsys.readouterr().err
    with faulty(RIGHT, models=b'{"data": []}') as server:
        assert main("doctor", "--url", server.url) == 1
    assert "has no chat model" in capsys.readouterr().err


def test_reasoning_counts_as_text() -> None:
    def thoughtful(thought: str) -> Answer:
        message = {"content": "yes", "reasoning_content": thought}
        return 200, {}, json.dumps({"choices": [{"message": message}]}).encode()

    found = compared(thoughtful("I see. "), thoughtful("I think. "), thoughtful("I see. "))
    assert found.difference is not None
