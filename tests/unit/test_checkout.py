import contextlib
import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from difyops import checkout, core, dify_tree, files, git, releases, settings
from difyops.checkout import Source, fetch, is_current, parse, peek
from difyops.errors import DifyopsError, PrerequisiteError, UsageError
from difyops.steplog import StepLog

TREE = {
    "api/pyproject.toml": '[project]\nname = "dify-api"\nrequires-python = ">=3.11,<3.13"\n',
    "api/app.py": "app = None\n",
    "api/configs/packaging/__init__.py": (
        "class PackagingInfo(BaseSettings):\n    CURRENT_VERSION: str = Field(\n"
        '        description="Dify version",\n        default="0.15.3",\n    )\n'
        '    COMMIT_SHA: str = Field(\n        default="",\n    )\n'
    ),
    "api/docker/entrypoint.sh": "exec celery -Q ${CELERY_QUEUES:-dataset,mail}\n",
    "api/migrations/versions/a.py": "revision = 'aaa'\ndown_revision = None\n",
    "web/package.json": "{}\n",
}


def make_tree(root: Path, **changes: str) -> Path:
    for name, text in {**TREE, **changes}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def git_run(repo: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    argv = ["git", *who, "-C", str(repo), *arguments]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def make_repo(root: Path) -> str:
    """A repository with one commit, tagged 0.15.3 (annotated); the commit."""
    make_tree(root)
    git_run(root, "init", "-q")
    git_run(root, "add", "-A")
    git_run(root, "commit", "-qm", "one")
    git_run(root, "tag", "-a", "0.15.3", "-m", "release")
    return git_run(root, "rev-parse", "HEAD")


@pytest.fixture
def log(tmp_path):
    with StepLog(tmp_path / "step.log") as opened:
        yield opened


@pytest.fixture
def dest(tmp_path):
    return tmp_path / "deployment" / "src" / "dify-0.15.3"


def add(tar: tarfile.TarFile, name: str, text: str = "", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(text)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(text.encode()))


def make_tarball(path: Path, top: str = "dify-0.15.3/", mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, text in TREE.items():
            add(tar, top + name, text)
    return path


# --- parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.15.3", Source("tag", ref="0.15.3")),
        ("1.0.0-beta.1", Source("tag", ref="1.0.0-beta.1")),
        ("https://host/x.git@0.15.3", Source("git", "https://host/x.git", "0.15.3")),
        ("https://host/x@feature/y", Source("git", "https://host/x", "feature/y")),
        ("git@host:x/y@v1", Source("git", "git@host:x/y", "v1")),
        ("ssh://git@host:22/x@v1", Source("git", "ssh://git@host:22/x", "v1")),
        ("file:///srv/dify.git@v1", Source("git", "file:///srv/dify.git", "v1")),
    ],
)
def test_parse_remote(text, expected):
    assert parse(text) == expected


def test_parse_local(tmp_path):
    tree = make_tree(tmp_path / "0.15.3")
    make_repo(tmp_path / "repo@work")
    tarball = make_tarball(tmp_path / "dify.tgz")
    assert parse(str(tree)) == Source("directory", str(tree))
    assert parse("./0.15.3", tmp_path) == Source("directory", str(tree))
    assert parse("dify.tgz", tmp_path) == Source("tarball", str(tarball))
    assert parse("repo@work", tmp_path).kind == "directory"
    assert parse("repo@work@0.15.3", tmp_path) == Source(
        "git", str(tmp_path / "repo@work"), "0.15.3"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a directory, a tarball"),
        ("latest", "expected a directory, a tarball"),
        ("/nowhere/dify", "no such file or directory"),
        ("dify.tar.gz", "no such file or directory"),
        ("/nowhere/repo@0.15.3", "no such file or directory"),
        ("https://host/x.git", "which tag, branch or commit"),
        ("git@host:x/y", "which tag, branch or commit"),
        ("ssh://git@host", "which tag, branch or commit"),
        ("https://host/x.tar.gz", "a tarball has to be here already"),
        ("https://host/x@--upload-pack=evil", "is not a tag, branch or commit"),
        ("https://host/x@a..b", "is not a tag, branch or commit"),
        ("https://me:sesame@host/x@v1", "should not carry a user or password"),
        ("https://sesame@host/x@v1", "should not carry a user or password"),
    ],
)
def test_parse_refuses(text, says):
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert says in caught.value.message
    assert "sesame" not in caught.value.message


def test_parse_refuses_what_is_there_but_is_not_dify(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    git_run(tmp_path, "init", "-q", "--bare", "bare")
    with pytest.raises(UsageError, match=r"looked for api/pyproject.toml.*found nothing"):
        parse(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="not a tarball by its name"):
        parse(str(tmp_path / "notes.txt"))
    with pytest.raises(UsageError, match="which ref"):
        parse(str(tmp_path / "bare"))


# --- peek


def test_peek(tmp_path):
    make_repo(tmp_path / "repo")
    make_tarball(tmp_path / "a.tar.xz", mode="w:xz")
    make_tarball(tmp_path / "b.tar", top="./", mode="w")
    for text in ("repo", "repo@0.15.3", "a.tar.xz", "b.tar"):
        assert peek(parse(text, tmp_path)) == "0.15.3", text
    assert peek(parse("https://host/x@0.15.3")) is None
    assert peek(parse("0.15.3")) is None


def test_peek_reads_the_version_of_1_x(tmp_path):
    changed = {
        "api/configs/packaging/__init__.py": "class PackagingInfo(PyProjectTomlConfig): ...\n",
        "api/pyproject.toml": '[project]\nversion = "1.12.1"\n',
    }
    assert peek(parse(str(make_tree(tmp_path / "t", **changed)))) == "1.12.1"


def test_peek_refuses(tmp_path):
    make_repo(tmp_path / "repo")
    (tmp_path / "torn.tar.gz").write_bytes(make_tarball(tmp_path / "x.tar.gz").read_bytes()[:300])
    (tmp_path / "fake.tar.gz").write_text("<html>")
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        add(tar, "readme", "x")
    for name in ("torn.tar.gz", "fake.tar.gz"):
        with pytest.raises(UsageError, match="not a tarball, or is damaged"):
            peek(parse(name, tmp_path))
    with pytest.raises(UsageError, match="does not look like Dify"):
        peek(parse("other.tar", tmp_path))
    with pytest.raises(UsageError, match=r"no tag, branch or commit 9\.9"):
        peek(parse("repo@9.9", tmp_path))


# --- fetch: directories


def test_directory_is_copied_without_what_tools_and_a_running_dify_left(tmp_path, dest, log):
    source = tmp_path / "dify"
    commit = make_repo(source)
    junk = {"web/node_modules/x.js": "", "api/.venv/x": "", "api/__pycache__/x.pyc": ""}
    make_tree(source, **junk, **{"api/.env": "DB=x", "api/storage/key.pem": "x"})
    make_tree(source, **{"api/extensions/storage/s3.py": "x"})
    (source / "api/same.py").symlink_to("app.py")
    (source / "web/run.sh").write_text("#!/bin/sh\n")
    (source / "web/run.sh").chmod(0o700)
    (source / "api/app.py").chmod(0o600)
    with socket.socket(socket.AF_UNIX) as listening:
        with contextlib.chdir(source):  # the path of a socket is limited to 108 bytes
            listening.bind("s")
        done = fetch(parse(str(source)), dest, [], log, version="0.15.3")
    assert done == checkout.Checkout("0.15.3", commit, str(source))
    assert str(done) == f"dify 0.15.3 at {commit[:9]}"
    found = {str(p.relative_to(dest)) for p in dest.rglob("*") if not p.is_dir()}
    expected = {*TREE, "api/extensions/storage/s3.py", "api/same.py", "web/run.sh"}
    assert found == {*expected, checkout.MANIFEST}
    assert (dest / "api/same.py").readlink() == Path("app.py")
    assert (dest / "api/app.py").stat().st_mode & 0o777 == 0o644
    assert (dest / "web/run.sh").stat().st_mode & 0o777 == 0o755
    assert dest.stat().st_mode & 0o777 == 0o755


def test_strict_umask_does_not_lock_the_service_out(tmp_path, dest, log):
    before = os.umask(0o077)
    try:
        fetch(parse(str(make_tree(tmp_path / "dify"))), dest, [], log)
    finally:
        os.umask(before)
    for path in (dest.parent, dest.parent.parent, dest, dest / "api", dest / "api/app.py"):
        assert path.stat().st_mode & 0o044 == 0o044, path


def test_is_current_until_the_directory_is_edited(tmp_path, dest, log):
    source = parse(str(make_tree(tmp_path / "dify")))
    assert is_current(source, dest) is None
    done = fetch(source, dest, [], log)
    assert is_current(source, dest) == done
    assert is_current(parse(str(make_tree(tmp_path / "other"))), dest) is None
    (tmp_path / "dify/api/__pycache__").mkdir()
    (tmp_path / "dify/api/__pycache__/app.pyc").write_text("x")
    assert is_current(source, dest) == done
    (tmp_path / "dify/api/app.py").write_text("app = 1\n")
    assert is_current(source, dest) is None
    fetch(source, dest, [], log)
    assert (dest / "api/app.py").read_text() == "app = 1\n"
    (dest / checkout.MANIFEST).write_text("{")
    assert is_current(source, dest) is None


@pytest.mark.parametrize("target", ["/etc/passwd", "../../outside", "/"])
def test_links_out_of_the_tree_are_refused(tmp_path, dest, log, target):
    source = make_tree(tmp_path / "dify")
    (source / "api/link").symlink_to(target)
    with pytest.raises(UsageError, match="api/link is a link out of the tree"):
        fetch(parse(str(source)), dest, [], log)
    assert not dest.exists()


def test_deployment_inside_the_source_is_refused(tmp_path, log):
    source = make_tree(tmp_path / "dify")
    with pytest.raises(UsageError, match="copied into itself"):
        fetch(parse(str(source)), source / "deploy/src/dify-0.15.3", [], log)


def test_other_versions_are_refused_and_what_was_there_stays(tmp_path, dest, log, monkeypatch):
    fetch(parse(str(make_tree(tmp_path / "dify"))), dest, [], log)
    before = files.tree_fingerprint(dest)
    packaging = "api/configs/packaging/__init__.py"
    unknown = make_tree(tmp_path / "new", **{packaging: TREE[packaging].replace("0.15.3", "9.9.9")})
    with pytest.raises(UsageError, match=r"is Dify 9\.9\.9, which is not supported") as caught:
        fetch(parse(str(unknown)), dest, [], log, version="0.15.3")
    assert caught.value.hint == "supported: " + ", ".join(releases.all_releases())
    known = {**releases.all_releases(), "9.9.9": releases.get("0.15.3")}
    monkeypatch.setattr(releases, "all_releases", lambda: known)
    with pytest.raises(UsageError, match=r"is Dify 9\.9\.9, but dify\.version is 0\.15\.3"):
        fetch(parse(str(unknown)), dest, [], log, version="0.15.3")
    assert files.tree_fingerprint(dest) == before


def test_incomplete_tree_says_what_was_looked_for_and_found(tmp_path, dest, log):
    source = make_tree(tmp_path / "dify")
    (source / "api/app.py").unlink()
    with pytest.raises(UsageError, match=r"looked for api/app\.py; found api, web"):
        fetch(parse(str(source)), dest, [], log)


def test_interrupted_copy_leaves_the_old_tree_and_no_scraps(tmp_path, dest, monkeypatch):
    source = make_tree(tmp_path / "dify", **{f"web/{n}.txt": "x" for n in range(600)})
    with StepLog(tmp_path / "l") as log:
        fetch(parse(str(source)), dest, [], log)
    (source / "api/app.py").write_text("edited\n")

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with StepLog(tmp_path / "l", interrupt) as log, pytest.raises(KeyboardInterrupt):
        fetch(parse(str(source)), dest, [], log)
    assert (dest / "api/app.py").read_text() == TREE["api/app.py"]
    assert [p.name for p in dest.parent.iterdir()] == [dest.name]


def test_killed_copy_leaves_a_scratch_folder_that_the_next_run_removes(tmp_path, dest, log):
    source = make_tree(tmp_path / "dify", **{f"web/{n}.txt": "x" for n in range(600)})
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom difyops.checkout import fetch, parse\n"
        "from difyops.steplog import StepLog\n"
        "log = StepLog(Path(sys.argv[3]), lambda text: os.kill(os.getpid(), 9))\n"
        "fetch(parse(sys.argv[1]), Path(sys.argv[2]), [], log)\n"
    )
    argv = [sys.executable, "-c", script, source, dest, tmp_path / "killed.log"]
    assert subprocess.run(argv, check=False).returncode == -9
    assert not dest.exists()
    assert len(list(dest.parent.iterdir())) == 1
    assert is_current(parse(str(source)), dest) is None
    fetch(parse(str(source)), dest, [], log)
    assert [p.name for p in dest.parent.iterdir()] == [dest.name]


# --- fetch: tarballs


@pytest.mark.parametrize("top", ["dify-0.15.3/", "", "./"])
def test_tarball_with_and_without_a_top_folder(tmp_path, dest, log, top):
    source = parse(str(make_tarball(tmp_path / "dify.tar.gz", top)))
    assert fetch(source, dest, [], log).version == "0.15.3"
    assert (dest / "api/app.py").read_text() == TREE["api/app.py"]
    assert is_current(source, dest)
    os.utime(source.location, ns=(1, 1))
    assert is_current(source, dest) is None


def test_tarball_of_git_archive_tells_its_commit(tmp_path, dest, log):
    commit = make_repo(tmp_path / "repo")
    git_run(tmp_path / "repo", "archive", "--prefix=d/", "-o", str(tmp_path / "d.tar.gz"), "HEAD")
    assert fetch(parse("d.tar.gz", tmp_path), dest, [], log).commit == commit


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize(
    "members",
    [
        [("/abs/evil", {})],
        [("../evil", {})],
        [("dify/../../evil", {})],
        [("dify/link", {"type": tarfile.SYMTYPE, "linkname": "/etc"})],
        [("dify/link", {"type": tarfile.SYMTYPE, "linkname": "../../.."})],
        [("dify/hard", {"type": tarfile.LNKTYPE, "linkname": "../../evil"})],
        [("dify/null", {"type": tarfile.CHRTYPE})],
        [("dify/pipe", {"type": tarfile.FIFOTYPE})],
        [
            ("link", {"type": tarfile.SYMTYPE, "linkname": "d/up/.."}),
            ("d", {"type": tarfile.DIRTYPE, "mode": 0o755}),
            ("d/up", {"type": tarfile.SYMTYPE, "linkname": ".."}),
            ("link/evil", {}),
        ],
    ],
)
def test_tarball_cannot_write_elsewhere(tmp_path, dest, log, members, modern, monkeypatch):
    if not modern:  # Debian 12's Python has no extraction filters
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        for name, fields in members:
            add(tar, name, **fields)
    with pytest.raises(UsageError, match=r"evil\.tar: .* (elsewhere|device or pipe)"):
        fetch(parse("evil.tar", tmp_path), dest, [], log)
    assert not dest.exists()
    assert not list(tmp_path.rglob("evil"))


# --- fetch: git


def test_git_by_tag_branch_and_commit(tmp_path, dest, log):
    commit = make_repo(tmp_path / "repo")
    for text in ("repo@0.15.3", f"repo@{commit[:9]}", "repo@main"):
        source = parse(text, tmp_path)
        assert fetch(source, dest, [], log).commit == commit, text
        assert is_current(source, dest)
        assert not (dest / ".git").exists()
    url = (tmp_path / "repo").as_uri()
    for ref in ("0.15.3", commit, "main"):
        assert fetch(parse(f"{url}@{ref}"), dest, [], log).commit == commit, ref
    with pytest.raises(PrerequisiteError, match="a commit needs all 40 digits"):
        fetch(parse(f"{url}@{commit[:9]}"), dest, [], log)


def test_moved_local_branch_is_not_current(tmp_path, dest, log):
    make_repo(tmp_path / "repo")
    source = parse("repo@main", tmp_path)
    fetch(source, dest, [], log)
    git_run(tmp_path / "repo", "commit", "-qm", "two", "--allow-empty")
    assert is_current(source, dest) is None


def released(monkeypatch, commit):
    entry = releases.get("0.15.3").model_copy(update={"commit": commit})
    monkeypatch.setattr(releases, "all_releases", lambda: {"0.15.3": entry})


def test_tag_comes_from_the_first_mirror_that_has_it(tmp_path, dest, log, monkeypatch):
    commit = make_repo(tmp_path / "repo")
    released(monkeypatch, commit)
    git_run(tmp_path, "init", "-q", "--bare", "empty")
    mirrors = ["file:///nowhere.git", str(tmp_path / "empty"), str(tmp_path / "repo")]
    assert fetch(parse("0.15.3"), dest, mirrors, log).commit == commit
    assert is_current(parse("0.15.3"), dest)
    said = log.path.read_text()
    assert "# file:///nowhere.git" in said
    assert "# " + mirrors[2] in said


def test_mirror_without_tags_gives_the_released_commit(tmp_path, dest, log, monkeypatch):
    commit = make_repo(tmp_path / "repo")
    released(monkeypatch, commit)
    git_run(tmp_path / "repo", "tag", "-d", "0.15.3")
    assert fetch(parse("0.15.3"), dest, [(tmp_path / "repo").as_uri()], log).commit == commit


def test_mirror_may_not_choose_what_a_release_is(tmp_path, dest, log):
    make_repo(tmp_path / "repo")
    with pytest.raises(PrerequisiteError, match=r"0\.15\.3 is \w{9} there, but ca19bd31d was rel"):
        fetch(parse("0.15.3"), dest, [str(tmp_path / "repo")], log)
    assert not dest.exists()


def test_every_mirror_failing_names_each_and_the_remedy(tmp_path, dest, log):
    mirrors = ["file:///nowhere.git", "http://127.0.0.1:9/dify"]
    with pytest.raises(PrerequisiteError) as caught:
        fetch(parse("0.15.3"), dest, mirrors, log)
    lines = caught.value.message.splitlines()
    assert lines[1].startswith("  file:///nowhere.git: fatal: ")
    assert lines[2].startswith("  http://127.0.0.1:9/dify: fatal: unable to access")
    assert "difyops up --source --dify <directory | tarball>" in caught.value.hint
    assert "mirrors.git" in caught.value.hint


def test_mirror_with_a_password_is_refused_without_showing_it(dest, log):
    with pytest.raises(UsageError, match=r"mirrors\.git") as caught:
        fetch(parse("0.15.3"), dest, ["https://me:sesame@host/x"], log)
    assert "sesame" not in caught.value.message


def test_without_git(tmp_path, dest, log, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for ask in (
        lambda: checkout.reachable(["x"]),
        lambda: fetch(parse("0.15.3"), dest, ["x"], log),
    ):
        with pytest.raises(PrerequisiteError, match="git is not installed") as caught:
            ask()
        assert "tarball" in caught.value.hint
    source = parse(str(make_tree(tmp_path / "dify")))
    assert fetch(source, dest, [], log).commit is None


def test_reachable(tmp_path):
    make_repo(tmp_path / "repo")
    mirrors = ["http://127.0.0.1:9/x", str(tmp_path / "repo")]
    assert checkout.reachable(mirrors) == mirrors[1]
    assert checkout.reachable(mirrors[:1]) is None


def test_silent_server_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        assert checkout.reachable([url], seconds=0.5) is None
        with pytest.raises(git.GitError, match="no answer within"):
            git.output(["ls-remote", "--", url], timeout=0.5)


# --- the steps


def test_steps(tmp_path, log):
    make_tree(tmp_path / "dify")
    paths = core.Paths(tmp_path / "deployment")
    paths.root.mkdir()
    deployment = core.Deployment(
        paths, settings.Settings(), None, releases.get("0.15.3"), None, source="../dify"
    )
    assert checkout.checkout_done(deployment) is None
    assert checkout.checkout_run(deployment, log) == "dify 0.15.3"
    assert checkout.checkout_done(deployment) == "dify 0.15.3"
    manifest = json.loads((paths.source("0.15.3") / checkout.MANIFEST).read_text())
    assert manifest["version"] == "0.15.3"
    (tmp_path / "dify/api/app.py").write_text("edited")
    assert checkout.checkout_done(deployment) is None
    unsaid = dataclasses.replace(deployment, source=None)
    assert checkout.checkout_done(unsaid) == "dify 0.15.3"


# --- what is read from the tree

DEFAULT_QUEUES = """
if [[ -z "${CELERY_QUEUES}" ]]; then
  if [[ "${EDITION}" == "CLOUD" ]]; then
    DEFAULT_QUEUES="dataset,workflow_team"
  else
    # else: not the cloud
    DEFAULT_QUEUES="dataset,workflow"
  fi
else
  DEFAULT_QUEUES="${CELERY_QUEUES}"
fi
exec celery -Q ${DEFAULT_QUEUES}
"""


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (TREE["api/docker/entrypoint.sh"], ["dataset", "mail"]),
        (DEFAULT_QUEUES, ["dataset", "workflow"]),
        (DEFAULT_QUEUES.replace('== "CLOUD"', '!= "CLOUD"'), ["dataset", "workflow_team"]),
    ],
)
def test_queues(tmp_path, script, expected):
    if "!=" in script:
        script = script.replace('"dataset,workflow"', '"${CLOUD_QUEUES}"')
    tree = make_tree(tmp_path, **{"api/docker/entrypoint.sh": script})
    assert checkout.queues(tree) == expected


def test_queues_that_cannot_be_read(tmp_path):
    name = dify_tree.ENTRYPOINT
    for script in ("exec celery\n", 'DEFAULT_QUEUES="a"\nDEFAULT_QUEUES="b"\n'):
        with pytest.raises(DifyopsError, match=r"entrypoint\.sh: \d lists"):
            checkout.queues(make_tree(tmp_path, **{name: script}))
    (tmp_path / name).unlink()
    with pytest.raises(DifyopsError, match=r"entrypoint\.sh cannot be read"):
        checkout.queues(tmp_path)


def test_migration_head(tmp_path):
    versions = "api/migrations/versions/"
    added = {
        f"{versions}b.py": "revision: str = \"bbb\"\ndown_revision = 'aaa'  # a comment\n",
        f"{versions}c.py": "revision = 'ccc'\ndown_revision = 'aaa'\n",
    }
    tree = make_tree(tmp_path, **added)
    with pytest.raises(DifyopsError, match="2 migration heads: bbb, ccc"):
        checkout.migration_head(tree)
    merge = "revision = 'ddd'\ndown_revision = (\n    'bbb',\n    'ccc',\n)\nbranch_labels = None\n"
    make_tree(tmp_path, **{f"{versions}d.py": merge, f"{versions}__init__.py": ""})
    assert checkout.migration_head(tree) == "ddd"
    make_tree(tmp_path, **{f"{versions}e.py": "x = 1\n"})
    with pytest.raises(DifyopsError, match=r"e\.py: no revision"):
        checkout.migration_head(tree)
