"""A real environment from a small lock, with real uv and the package index."""

import subprocess
import time
from pathlib import Path

import pytest

from difyops import core, dify_python, releases, settings
from difyops.errors import StepError
from difyops.steplog import StepLog

LOCK = """
[[package]]
name = "iniconfig"
version = "0.0.1"
optional = false
groups = ["main"]
files = []

[[package]]
name = "idna"
version = "3.10"
optional = false
groups = ["main", "vdb"]
files = [
    {{file = "idna-3.10-py3-none-any.whl", hash = "sha256:{idna}"}},
]

[[package]]
name = "colorama"
version = "0.4.6"
optional = false
groups = ["main"]
markers = "sys_platform == \\"win32\\""
files = []

[[package]]
name = "gunicorn"
version = "23.0.0"
optional = false
groups = ["vdb"]
files = []

[[package]]
name = "packaging"
version = "24.2"
optional = false
groups = ["vdb"]
files = []

[metadata]
lock-version = "2.1"
"""
IDNA = "946d195a0d259cbba61165e88e65941f16e9b36ea6ddb97f00452bae8b1287d3"


@pytest.fixture
def deployment(tmp_path):
    paths = core.Paths(tmp_path / "deployment")
    lock = paths.source("0.15.3") / "api/poetry.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(LOCK.format(idna=IDNA))
    update = {"groups": ("vdb",), "replace": {"iniconfig==0.0.1": "iniconfig==2.0.0"}}
    release = releases.get("0.15.3").model_copy(update={**update, "python": ">=3.11"})
    return core.Deployment(paths, settings.Settings(), None, release, None)


def build(deployment: core.Deployment, path: Path) -> str:
    with StepLog(path) as log:
        try:
            return dify_python.environment_run(deployment, log)
        except StepError as error:
            if "cannot be reached" in (error.hint or ""):
                pytest.skip(f"no package index: {error.tail[-1]}")
            raise


def test_real_environment(deployment, tmp_path):
    detail = build(deployment, tmp_path / "log")
    assert detail.startswith("4 packages, Python 3.")
    started = time.monotonic()
    assert dify_python.environment_done(deployment) == detail
    assert time.monotonic() - started < 1
    bin = deployment.paths.dify_python("0.15.3").parent
    # Built elsewhere and renamed: console scripts must not remember where.
    script = subprocess.run([bin / "gunicorn", "--version"], capture_output=True, text=True)
    assert script.stdout.strip() == "gunicorn (version 23.0.0)"
    code = "import importlib.metadata as m; print(m.version('iniconfig'), m.version('idna'))"
    python = subprocess.run([bin / "python", "-c", code], capture_output=True, text=True)
    assert python.stdout.strip() == "2.0.0 3.10"


def test_hashes_are_checked(deployment, tmp_path):
    lock = deployment.paths.source("0.15.3") / "api/poetry.lock"
    lock.write_text(LOCK.format(idna="0" * 64))
    with pytest.raises(StepError) as caught:
        build(deployment, tmp_path / "log")
    assert "serves other files than the lock names" in caught.value.hint
    assert not deployment.paths.dify_python("0.15.3").exists()


def test_offline_with_a_cold_cache(deployment, tmp_path, monkeypatch):
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    offline = settings.parse({"mirrors": {"pypi": "http://127.0.0.1:9/simple"}})
    cut = core.Deployment(deployment.paths, offline, None, deployment.release, None)
    with StepLog(tmp_path / "log") as log, pytest.raises(StepError) as caught:
        dify_python.environment_run(cut, log)
    assert "http://127.0.0.1:9/simple cannot be reached: set mirrors.pypi" in caught.value.hint
    assert caught.value.tail
