"""A full disk: a small file system of its own below the deployment."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager

import pytest
import yaml

from difyops import source
from difyops.errors import StepError
from tests.integration.faults import left, without_model
from tests.recorder import Recorder


@contextmanager
def small_disk(folder, size):
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "tmpfs", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _grow(folder, size):
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def test_disk_full_at_initdb(new, standin):
    cli = new(**without_model(standin))
    data = cli.root / "data"
    with small_disk(data, "20m"):
        refused = cli("up", "--source")
        assert refused.returncode == 3
        assert "host.disk" in refused.stderr
        # It filled up after the preflight: straight to the steps.
        with pytest.raises(StepError, match="no space left for") as caught:
            source.up(cli.root, None, Recorder())
        assert "free space" in (caught.value.hint or "")
        assert not (data / "postgres").exists()
        assert not (data / ".postgres.new").exists()
        _grow(data, "1g")
        result = cli("up", "--source")
        assert result.returncode == 0, result.stderr
        assert cli("down").returncode == 0
        assert left(cli.root) == []


def test_disk_full_at_the_copy_of_postgres(new, standin):
    cli = new(**without_model(standin))
    opt = cli.root / "opt"
    with small_disk(opt, "10m"):
        result = cli("up", "--source")
        assert result.returncode == 1
        assert "No space left on device" in result.stderr
        assert "Traceback" not in result.stderr
        assert not list(opt.iterdir())


def test_disk_full_at_render_keeps_the_old_file(new, standin):
    cli = new(**without_model(standin))
    etc = cli.root / "etc"
    with small_disk(etc, "128k"):
        assert cli("render").returncode == 0
        names = ("valkey.conf", "postgresql.conf", "supervisord.conf")
        before = {name: (etc / name).read_text() for name in names}
        filler = etc / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(512))
        path = cli.root / "difyops.yaml"
        content = yaml.safe_load(path.read_text())
        content["redis"]["port"] += 1
        path.write_text(yaml.safe_dump(content))
        result = cli("render")
        assert result.returncode == 1
        assert "No space left on device" in result.stderr
        assert "Traceback" not in result.stderr
        assert {name: (etc / name).read_text() for name in names} == before
        assert [p.name for p in etc.iterdir() if p.name.startswith(".")] == [".rendered.json"]
        filler.unlink()
        result = cli("render")
        assert result.returncode == 0
        assert f"port {content['redis']['port']}" in (etc / "valkey.conf").read_text()
