"""Dify's own model SDK, as its plugins use it, against the real server process."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from difyops import interpreters
from difyops.engine.chat import ChatTemplate
from difyops.errors import PrerequisiteError
from tests.engine import taught
from tests.serving.conftest import Running, fetched

from .conftest import KEY, MODEL, TEMPLATE, configuration

SDK = "dify-plugin==0.10.2"
SLOTS, WAITING = 2, 1
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SCRIPT = Path(__file__).with_name("dify_plugin_client.py")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the SDK; kept in DIFYOPS_TEST_CACHE if it is set."""
    try:
        found = interpreters.probe_all(">=3.12", None)
    except PrerequisiteError as error:
        pytest.skip(str(error).partition(";")[0])
    cache = os.environ.get("DIFYOPS_TEST_CACHE")
    folder = Path(cache) if cache else tmp_path_factory.mktemp("sdk")
    folder /= f"{SDK.replace('==', '-')}-python{found.text}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    subprocess.run([found.path, "-m", "venv", "--clear", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", SDK]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{SDK} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    (folder / "complete").touch()
    return python


@pytest.fixture(scope="module")
def seen(python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every scenario of the script, run once."""
    folder = tmp_path_factory.mktemp("dify")
    source = TEMPLATE.replace("tool | tojson", "tool.function.name").replace(
        "{% if think %}", "{% if enable_thinking %}"
    )
    template = ChatTemplate(source)

    def prompt(text: str, **options: Any) -> str:
        return template.render([{"role": "user", "content": text}], **options)

    lessons = {
        prompt("Well?"): "It is so.",
        prompt("Well?", kwargs={"enable_thinking": True}): "Is it?\n</think>\n\nIt is.",
        prompt("Weather?", tools=[{"function": {"name": "weather"}}]): f"Let me see.\n{CALL}",
    }
    model = taught.checkpoint(folder / "model", lessons, source, context=1024)
    files = fetched("minilm-l6", folder)
    server = Running(
        configuration(model, slots=SLOTS, max_waiting=WAITING)
        | {
            "embedding": {
                "id": "minilm",
                "model": str(files["weights"]),
                "tokenizer": str(files["tokenizer"]),
                "max_tokens": 256,
            }
        },
        folder,
        "difyops.engine",
    )
    try:
        given = {"url": server.ready().url(), "key": KEY, "llm": MODEL, "embedding": "minilm"}
        given |= {"slots": SLOTS, "waiting": WAITING}
        done = subprocess.run(
            [python, "-I", SCRIPT, json.dumps(given)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
    finally:
        server.stop()
    assert "Traceback" not in server.log
    return answer


def test_credentials(seen: dict[str, Any]) -> None:
    assert seen["validate"] is None
    wrong = seen["validate_with_a_wrong_key"]
    assert wrong["error"] == "CredentialsValidateFailedError" and "401" in wrong["message"]


def test_chat(seen: dict[str, Any]) -> None:
    blocking, streamed = seen["blocking"], seen["streamed"]
    assert blocking["text"] == streamed["text"] == "It is so."
    assert streamed["finish"] == "stop" and streamed["chunks"] > 2
    assert blocking["usage"] == streamed["usage"] and min(streamed["usage"]) > 0


def test_every_parameter_of_the_form(seen: dict[str, Any]) -> None:
    """top_p 0 leaves the likeliest token, whatever the temperature."""
    assert seen["every_parameter"]["text"] == "It is "
    assert seen["completion"]["text"]


def test_calls(seen: dict[str, Any]) -> None:
    for answer in seen["called"]:
        ((number, name, arguments),) = answer["calls"]
        assert number.startswith("call_") and name == "weather"
        assert json.loads(arguments) == {"city": "Rome"}
        assert answer["text"] == "Let me see."
    assert seen["called"][1]["finish"] == "tool_calls"
    assert seen["after_a_call"]["finish"] in ("stop", "length")


def test_structured_outputs(seen: dict[str, Any]) -> None:
    for answer in seen["json_schema"]:
        value = json.loads(answer["text"])
        assert value["size"] in ("small", "large") and isinstance(value["sure"], bool)
    assert seen["json_object"]["text"].startswith("{")


def test_reasoning(seen: dict[str, Any]) -> None:
    assert seen["reasoning"]["text"] == "<think>\nIs it?\n</think>It is."
    assert seen["no_reasoning"]["text"] == "It is so."


@pytest.mark.parametrize(
    ("scenario", "status", "reason"),
    [
        ("wrong_key", 401, "invalid_api_key"),
        ("too_long", 400, "1024 tokens"),
        ("functions", 400, "functions"),
        ("busy", 429, "waiting"),
    ],
)
def test_refusals_reach_the_user(
    seen: dict[str, Any], scenario: str, status: int, reason: str
) -> None:
    """The SDK has one error for all of them; it shows what the server says."""
    error = seen[scenario]
    assert error["error"] == "InvokeError"
    assert f"status code {status}" in error["message"] and reason in error["message"]


def test_embeddings(seen: dict[str, Any]) -> None:
    (lengths, tokens), wrong = seen["embedded"], seen["embedded_with_a_wrong_key"]
    assert lengths == [384, 384] and tokens > 0
    assert wrong["error"] == "InvokeBadRequestError" and "401" in wrong["message"]


def test_tokens_are_counted(seen: dict[str, Any]) -> None:
    assert seen["tokens"] > 20
