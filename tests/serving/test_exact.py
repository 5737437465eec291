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
from tests.serving.faulty_server import Answer, faulty, refuse
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
    def known(owner: str, **said: str) -> Ways:
        entry = {"id": "m", "owned_by": owner, **said}
        models = json.dumps({"data": [entry]}).encode()
        with faulty(RIGHT, models=models) as server:
            return exact.ways("external", server.url, "m", None)

    assert known("somebody") == Ways()
    assert known("llamacpp") == Ways({"cache_prompt": False})
    assert list(known("vllm").uncached or ()) == ["cache_salt"]
    ours = known("difyops", engine="native")
    assert list(ours.uncached or ()) == ["cache_salt"] and ours.unguessed == {"speculate": False}
    assert ours.near_tie < Ways().near_tie
    assert known("difyops", engine="llamacpp") == Ways({"cache_prompt": False})


@pytest.mark.parametrize(("second", "code"), [(RIGHT, 0), (WRONG, 1)])
def test_any_server_without_a_deployment(
    second: Answer, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFYOPS_MODEL_API_KEY", "whale")
    scored = answer("he saw a whale", 2.0)
    with faulty(RIGHT, second, RIGHT, RIGHT, RIGHT, RIGHT, scored) as server:
        assert main("doctor", "--url", server.url, "--json") == code
    (found,) = json.loads(capsys.readouterr().out)["checks"]
    assert (found["id"], found["status"]) == ("model.exact", "fail" if code else "ok")
    if code:
        assert "changes tokens" in found["evidence"] and "'shark'" in found["evidence"]
        assert f"see the log of the server at {server.url}" in found["fix"]
    assert "whale" not in found["evidence"]  # this run's key, and the server says it
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("models", "arguments", "said"),
    [
        (b'{"data": []}', (), "serves no chat model"),
        (b'{"data": [{"id": "m"}]}', ("--model", "other"), "has no model 'other'"),
        (b"<html>", (), "is not a list of models"),
    ],
)
def test_a_server_that_cannot_be_asked(
    models: bytes, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with faulty(RIGHT, models=models) as server:
        assert main("doctor", "--url", server.url, *arguments, "--json") == 1
    up, exact = json.loads(capsys.readouterr().out)["checks"]
    assert (up["id"], up["status"]) == ("model.up", "fail") and said in up["evidence"]
    assert up["fix"]
    assert (exact["status"], exact["evidence"]) == ("skip", "needs model.up")


def test_a_server_that_refuses_midway_says_nothing_of_exactness(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with faulty(RIGHT, RIGHT, refuse(429, "too many requests")) as server:
        assert main("doctor", "--url", server.url) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "could not be compared" in said and "too many requests" in said


def test_what_belongs_to_a_deployment_or_to_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("--model", "m"), ("--url", "http://h/v1", "--only", "pg"), ("--url", "")):
        assert main("doctor", *arguments) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_reasoning_counts_as_text() -> None:
    def thoughtful(thought: str) -> Answer:
        message = {"content": "yes", "reasoning_content": thought}
        return 200, {}, json.dumps({"choices": [{"message": message}]}).encode()

    found = compared(thoughtful("I see. "), thoughtful("I think. "), thoughtful("I see. "))
    assert found.difference is not None
