import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from difyops import core, dify_python, interpreters, poetry_lock, releases, settings
from difyops.errors import PrerequisiteError, StepError, UsageError
from difyops.steplog import StepLog

NOBODY = core.User("nobody", 65534, 65534, "/nonexistent")

LOCK = """
[[package]]
name = "both"
version = "1.0"
optional = false
groups = ["main", "vdb"]
markers = {main = "sys_platform == \\"win32\\"", vdb = "python_version < \\"3.12\\""}
files = [{file = "both.whl", hash = "sha256:aa"}, {file = "both.tar.gz", hash = "sha256:bb"}]

[[package]]
name = "gone"
version = "2.0"
optional = false
groups = ["main"]
markers = "sys_platform == \\"linux\\""
files = [{file = "gone.whl", hash = "sha256:cc"}]

[[package]]
name = "somewhere"
version = "3.0"
optional = false
groups = ["main", "vdb"]
markers = {vdb = "sys_platform == \\"win32\\""}
files = []

[[package]]
name = "extra"
version = "4.0"
optional = true
groups = ["main"]
files = []

[[package]]
name = "tests-only"
version = "5.0"
optional = false
groups = ["dev"]
files = []

[metadata]
lock-version = "2.1"
"""


def test_requirements_keep_markers_and_hashes():
    replace = {"gone==2.0": "gone==2.1 --hash=sha256:dd"}
    assert poetry_lock.requirements(LOCK, ["vdb"], replace) == [
        'both==1.0 ; (sys_platform == "win32") or (python_version < "3.12") '
        "--hash=sha256:aa --hash=sha256:bb",
        'gone==2.1 ; sys_platform == "linux" --hash=sha256:dd',
        "somewhere==3.0",
    ]
    assert poetry_lock.requirements(LOCK, [], {})[0].startswith(
        'both==1.0 ; (sys_platform == "win32") --hash'
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("2.1", "2.0"), "lock version 2.0, expected 2.1"),
        (("[metadata]", "metadata]"), "Expected '='"),
        (("files = []\n", 'files = []\nsource = {type = "git"}\n'), "comes from a git"),
    ],
)
def test_locks_that_cannot_be_installed(change, says):
    with pytest.raises(UsageError, match=f"the.lock: .*{says}"):
        poetry_lock.requirements(LOCK.replace(*change, 1), ["vdb"], {}, "the.lock")


def test_stale_release_entries_are_named():
    with pytest.raises(UsageError, match="has no group tools"):
        poetry_lock.requirements(LOCK, ["tools"], {})
    with pytest.raises(UsageError, match="has no package gone==1"):
        poetry_lock.requirements(LOCK, [], {"gone==1": "gone==2"})


@pytest.mark.parametrize(
    ("version", "requires", "expected"),
    [
        ((3, 11, 0), ">=3.11,<3.13", True),
        ((3, 12, 9), ">=3.11,<3.13", True),
        ((3, 13, 0), ">=3.11,<3.13", False),
        ((3, 10, 9), ">=3.11,<3.13", False),
        ((3, 12, 1), "~=3.12.0", True),
        ((3, 13, 0), "~=3.12.0", False),
        ((3, 13, 0), "~=3.12", True),
        ((3, 12, 1), ">3.12, !=3.12.2, <=3.12.1", True),
        ((3, 12, 2), "!=3.12.2", False),
        ((3, 12, 0), "==3.12", True),
    ],
)
def test_satisfies(version, requires, expected):
    assert interpreters.satisfies(version, requires) is expected


def test_requirement_that_is_none():
    with pytest.raises(ValueError, match="not a Python requirement"):
        interpreters.satisfies((3, 12, 0), "3.12.*")


def fake_python(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('echo \'["cpython", [3, 10, 1], "/p", []]\'', "is 3.10.1"),
        ('echo \'["pypy", [3, 11, 1], "/p", []]\'', "is pypy, not CPython"),
        ('echo \'["cpython", [3, 11, 1], "/p", ["ssl"]]\'', "lacks ssl"),
        ("echo broken >&2; exit 3", "cannot be run by us: broken"),
        ("exit 3", "cannot be run by us: exit 3"),
    ],
)
def test_refused_interpreters(tmp_path, body, says):
    python = fake_python(tmp_path / "python3", body)
    assert interpreters.probe(python, ">=3.11", None) == says


def test_interpreter_is_the_base_not_a_virtual_environment():
    found = interpreters.find_interpreter(">=3.11", None)
    assert subprocess.run([found, "-c", "import sys; sys.exit(sys.prefix != sys.base_prefix)"])
    assert found == Path(sys._base_executable)


def test_no_interpreter_names_what_was_found(tmp_path, monkeypatch):
    old = fake_python(tmp_path / "python3.11", 'echo \'["cpython", [3, 11, 1], "/p", []]\'')
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrerequisiteError) as caught:
        interpreters.find_interpreter("~=3.99.0", None)
    assert f"  {old}: is 3.11.1" in caught.value.message
    assert "uv python install" in caught.value.hint


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: runs a program as another user")
def test_interpreter_that_only_root_can_run_is_refused(tmp_path):
    private = tmp_path / "home"
    python = fake_python(private / "python3", 'echo \'["cpython", [3, 11, 1], "/p", []]\'')
    private.chmod(0o700)
    assert isinstance(interpreters.probe(python, ">=3.11", None), interpreters.Interpreter)
    said = interpreters.probe(python, ">=3.11", NOBODY)
    assert said == "cannot be run by nobody: Permission denied"


# --- the step, with a stand-in for uv that makes files but installs nothing

STAND_IN_UV = """
echo "$@" >> {calls}
env | grep ^UV_ >> {calls}
if [ "$1" = venv ]; then
  for last; do :; done
  mkdir -p "$last/bin" "$last/lib/python3/site-packages/x-1.dist-info"
  ln -s {python} "$last/bin/python"
elif [ "$1" = pip ]; then
  {pip}
fi
"""


@pytest.fixture
def deployment(tmp_path):
    paths = core.Paths(tmp_path / "deployment")
    lock = paths.source("0.15.3") / "api/poetry.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(LOCK)
    update = {"groups": ("vdb",), "replace": {"gone==2.0": "gone==2.1"}, "python": ">=3.11"}
    release = releases.get("0.15.3").model_copy(update=update)
    wanted = settings.parse({"mirrors": {"pypi": "http://mirror.example/simple"}})
    return core.Deployment(paths, wanted, None, release, None)


@pytest.fixture
def uv(tmp_path, monkeypatch):
    def stand_in(pip: str = ":") -> Path:
        python, calls = sys._base_executable, tmp_path / "calls"
        body = STAND_IN_UV.format(python=python, calls=calls, pip=pip)
        path = fake_python(tmp_path / "bin/uv", body)
        monkeypatch.setattr(dify_python, "find_uv", lambda: path)
        return calls

    return stand_in


@pytest.fixture
def log(tmp_path):
    with StepLog(tmp_path / "step.log") as opened:
        yield opened


def test_environment_is_made_once_for_the_same_lock(deployment, uv, log):
    calls = uv()
    assert dify_python.environment_done(deployment) is None
    detail = dify_python.environment_run(deployment, log)
    assert detail == f"1 packages, Python {'.'.join(map(str, sys.version_info[:3]))}"
    assert dify_python.environment_done(deployment) == detail
    said = calls.read_text()
    assert "--no-deps --verify-hashes" in said
    assert "UV_DEFAULT_INDEX=http://mirror.example/simple" in said
    lock = deployment.paths.source("0.15.3") / "api/poetry.lock"
    lock.write_text(LOCK + "\n# edited\n")
    assert dify_python.environment_done(deployment) is None
    lock.write_text(LOCK)
    assert dify_python.environment_done(deployment) == detail


def test_environment_whose_python_went_away_or_changed_is_made_again(deployment, uv, log):
    uv()
    dify_python.environment_run(deployment, log)
    python = deployment.paths.dify_python("0.15.3")
    marker = python.parent.parent / dify_python.MARKER
    made = json.loads(marker.read_text())
    marker.write_text(json.dumps({**made, "python": "3.11.0"}))
    assert dify_python.environment_done(deployment) is None
    marker.write_text(json.dumps(made))
    assert dify_python.environment_done(deployment)
    python.unlink()
    assert dify_python.environment_done(deployment) is None


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("error sending request for url (http://mirror.example/simple/x)", "cannot be reached"),
        ("x No solution found when resolving dependencies", "lacks a package of the lock"),
        ("Hash mismatch for gone==2.0", "serves other files than the lock names"),
        ("something else", "the log tells more"),
    ],
)
def test_failed_install_keeps_the_old_environment(deployment, uv, log, said, remedy):
    uv()
    detail = dify_python.environment_run(deployment, log)
    uv(f"echo '{said}' >&2; exit 1")
    with pytest.raises(StepError) as caught:
        dify_python.environment_run(deployment, log)
    assert remedy in caught.value.hint
    assert dify_python.environment_done(deployment) == detail
    assert [p.name for p in deployment.paths.opt.iterdir()] == ["dify-0.15.3"]


def test_kill_leaves_no_environment(deployment, uv, log):
    uv("kill -9 $PPID")  # what runs us dies in the middle of the installation
    run = (
        "import sys, pickle\nfrom pathlib import Path\nfrom difyops import dify_python\n"
        "from difyops.steplog import StepLog\n"
        "dify_python.find_uv = lambda: Path(sys.argv[1])\n"
        "deployment = pickle.load(sys.stdin.buffer)\n"
        "dify_python.environment_run(deployment, StepLog(Path(sys.argv[2])))\n"
    )
    argv = [sys.executable, "-c", run, dify_python.find_uv(), log.path]
    ended = subprocess.run(argv, input=pickle.dumps(deployment), check=False)
    assert ended.returncode == -9
    assert dify_python.environment_done(deployment) is None
    uv()
    dify_python.environment_run(deployment, log)
    assert [p.name for p in deployment.paths.opt.iterdir()] == ["dify-0.15.3"]


def test_uv_is_found_or_the_remedy_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(fake_python(tmp_path / "uv", ":").parent))
    assert dify_python.find_uv() == tmp_path / "uv"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PrerequisiteError, match="uv is not installed"):
        dify_python.find_uv()
