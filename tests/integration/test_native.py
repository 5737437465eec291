"""The native engine as the model server of a deployment without Dify."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from difyops import modelsource
from difyops.backends import probe
from difyops.services import model
from tests.engine import tiny
from tests.integration.conftest import Cli, end, make, needs_root
from tests.integration.faults import left, load, states

HERMES = tiny.CHAT_TEMPLATE.replace("Tools:", "Call by <tool_call>...</tool_call>. Tools:")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """Up, with the model that comes along on the native engine."""
    folder = Path(tempfile.mkdtemp(prefix="difyops-native-"))
    folder.chmod(0o755)
    cli = make(folder / "d", {"model": {"backend": "native", "name": "tiny"}})
    try:
        up = cli("up", "--source")
        assert up.returncode == 0, up.stderr
        yield cli
    finally:
        end(folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def edit(native: Cli) -> Iterator[Callable[..., None]]:
    """Sets keys of `model` in difyops.yaml; afterwards the file is as it was."""
    path = native.root / "difyops.yaml"
    kept = path.read_text()

    def change(**keys: object) -> None:
        content = yaml.safe_load(path.read_text())
        content["model"].update(keys)
        path.write_text(yaml.safe_dump(content))

    yield change
    path.write_text(kept)


def checkpoint(folder: Path) -> Path:
    tiny.checkpoint(folder, context=512)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes its files for their owner alone
    return folder


def test_it_runs_answers_and_is_healthy(native: Cli) -> None:
    process = psutil.Process(states(native)["model"].pid)
    assert "difyops.engine" in process.cmdline()
    deployment = load(native.root)
    dropped = deployment.user if deployment.facts.python_reachable else None
    assert process.uids().real == (dropped.uid if dropped else psutil.Process().uids().real)
    assert native("status").returncode == 0
    doctor = native("doctor", "--json")
    assert doctor.returncode == 0, doctor.stdout
    checks = {c["id"]: c["status"] for c in json.loads(doctor.stdout)["checks"]}
    assert {checks[f"model.{about}"] for about in ("up", "bind", "chat", "embedding")} == {"ok"}
    asked = native("chat", "--json", "--max-tokens", "9", "--once", "A lighthouse is")
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["answer"].strip()
    url, key = model.llm_url(deployment), model.llm_key(deployment)
    chat, embedding = probe.describe(url, key)
    assert (chat.id, chat.context, chat.tools) == ("tiny", 1024, False)
    assert len(probe.embed_once(url, embedding.id, key)) == embedding.dimensions == 384
    again = native("up", "--source")
    assert again.returncode == 0, again.stderr
    assert states(native)["model"].pid == process.pid


def test_a_model_of_ones_own(native: Cli, edit: Callable[..., None]) -> None:
    """A directory that lies in the deployment, and a GGUF file behind a link."""
    before = states(native)
    folder = checkpoint(native.root / "mine/tiny")
    (folder / "chat_template.jinja").write_text(HERMES)
    edit(source="mine/tiny", name="small")
    up = native("up", "--source")
    assert up.returncode == 0, up.stderr
    assert "small from mine/tiny, header read; minilm-l6" in up.stderr
    after = states(native)
    assert [n for n in after if after[n].pid != before[n].pid] == ["model"]
    deployment = load(native.root)
    url, key = model.llm_url(deployment), model.llm_key(deployment)
    chat = probe.describe(url, key)[0]
    assert (chat.id, chat.context, chat.tools) == ("small", 512, True)
    assert probe.chat_once(url, "small", key, max_tokens=5)
    assert probe.calls_tool(url, "small", key)

    weights = modelsource.fetch_model("smollm2-135m", native.root / "mine")["weights"]
    (native.root / "mine/smol.gguf").symlink_to(weights)
    edit(source=str(native.root / "mine/smol.gguf"), name="smol")
    up = native("up", "--source")
    assert up.returncode == 0, up.stderr
    assert probe.describe(url, key)[0].context == 8192
    assert probe.chat_once(url, "smol", key, max_tokens=5)


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("/no/such/model", 3, "/no/such/model: no such file or directory"),
        ("smolm2-135m", 2, "did you mean smollm2-135m?"),
        ("etc", 3, "holds neither config.json nor a .gguf file"),
        ("difyops.yaml", 3, "difyops.yaml: not a .gguf file"),
        ("mine/junk.gguf", 3, "junk.gguf: not a GGUF file"),
        ("hf:nonsense", 2, "hf:nonsense is not of the form hf:OWNER/NAME"),
    ],
)
def test_a_wrong_source_stops_nothing(
    source: str, code: int, said: str, native: Cli, edit: Callable[..., None]
) -> None:
    before = states(native)
    (native.root / "mine").mkdir(exist_ok=True)
    (native.root / "mine/junk.gguf").write_bytes(b"junk" * 100)
    edit(source=source, name="mine")
    up = native("up", "--source")
    assert up.returncode == code, up.stderr
    assert said in up.stderr
    assert "Traceback" not in up.stderr
    assert states(native)["model"].pid == before["model"].pid


def test_more_context_than_the_model_has(native: Cli, edit: Callable[..., None]) -> None:
    """Read from the header: nothing is stopped for it."""
    before = states(native)
    checkpoint(native.root / "mine/short")
    edit(source="mine/short", name="short", context=513)
    up = native("up", "--source")
    assert up.returncode == 2, up.stderr
    assert states(native)["model"].pid == before["model"].pid
    assert "context: 513 tokens were asked for, and short has 512" in up.stderr


def test_weights_of_another_model_are_told_after_one_start(
    native: Cli, edit: Callable[..., None]
) -> None:
    """Their headers are in order; `up` and doctor show what the server itself says."""
    wrong = checkpoint(native.root / "mine/wrong") / "config.json"
    wrong.write_text(json.dumps(json.loads(wrong.read_text()) | {"mlp_hidden": 41}))
    edit(source="mine/wrong", name="wrong")
    up = native("up", "--source")
    assert up.returncode == 1, up.stderr
    said = "config.json and the weights are of different models"
    (error,) = [line for line in up.stderr.splitlines() if line.startswith("error:")]
    assert error.startswith("error: model cannot start: ") and said in error
    assert "listening" in up.stderr and "ready after" not in up.stderr  # only of this run
    assert len((native.root / "run/model.starts").read_text().splitlines()) <= 2
    doctor = json.loads(native("doctor", "--only", "model.up", "--json").stdout)
    (found,) = [c for c in doctor["checks"] if c["id"] == "model.up"]
    assert said in found["evidence"] and "model.source (mine/wrong)" in found["fix"]


@needs_root
@pytest.mark.root
def test_a_model_that_the_service_cannot_read(native: Cli, edit: Callable[..., None]) -> None:
    deployment = load(native.root)
    if not deployment.facts.python_reachable:
        pytest.skip("the model server stays root: this Python is out of the service user's reach")
    weights = checkpoint(native.root / "mine/private") / "model.safetensors"
    weights.chmod(0o600)
    edit(source="mine/private", name="private")
    up = native("up", "--source")
    assert up.returncode == 3, up.stderr
    assert f"model.source: difyops cannot read {weights}" in up.stderr


def test_down(native: Cli) -> None:
    assert native("down").returncode == 0
    assert left(native.root) == []
    assert "Traceback" not in (native.root / "logs/model.log").read_text()
