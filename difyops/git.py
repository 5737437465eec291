"""The few git commands we need: never prompting, never hanging, telling what git said."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from difyops.errors import DifyopsError, PrerequisiteError, StepError
from difyops.steplog import StepLog

# Protocol 2 lets any commit be asked for by its id. Hooks and line-ending conversions of whoever
# runs us must not shape Dify's tree.
_CONFIG = (
    *("-c", "protocol.version=2", "-c", "core.hooksPath=/dev/null", "-c", "core.autocrlf=false"),
    *("-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=30", "-c", "gc.auto=0"),
)


def _quiet() -> dict[str, str]:
    ssh = os.environ.get("GIT_SSH_COMMAND") or "ssh -o BatchMode=yes -o ConnectTimeout=10"
    return {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": ssh, "LC_ALL": "C"}


class GitError(DifyopsError):
    """A git command failed; the message is the line of its output that says why."""


class NoSuchRef(GitError):
    """The repository answers, but has no such tag, branch or commit."""


def require() -> None:
    """Raises PrerequisiteError when there is no git on PATH."""
    if not shutil.which("git"):
        raise PrerequisiteError(
            "git is not installed, and Dify's code comes from a git repository",
            "install git, or give the code itself: "
            "`difyops up --source --dify <directory | tarball>`",
        )


def output(arguments: Sequence[str | Path], timeout: float = 20.0) -> str:
    """The standard output of a git command. Raises GitError."""
    child = _start(arguments)
    try:
        out, err = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise GitError(f"no answer within {timeout:.0f} s") from None
    finally:
        _end(child)
    if child.returncode:
        raise GitError(_why(err.splitlines()) or f"exit {child.returncode}")
    return out


def first_that_answers(urls: Sequence[str], seconds: float) -> str | None:
    """The first of some repositories, in their order, that answers; all are asked at once."""
    deadline = time.monotonic() + seconds
    children = [_start(["ls-remote", "--", url, "HEAD"]) for url in urls]
    try:
        for url, child in zip(urls, children, strict=True):
            try:
                child.communicate(timeout=max(0.01, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
            if child.returncode == 0:
                return url
        return None
    finally:
        for child in children:
            _end(child)


def is_repository(path: Path) -> bool:
    """Whether a local folder is a repository: a work tree's top, or a bare one."""
    return (path / ".git").exists() or ((path / "HEAD").is_file() and (path / "objects").is_dir())


def commit_of(repository: Path, ref: str) -> str:
    """The full id of a commit in a local repository. Raises GitError (NoSuchRef)."""
    wanted = ["--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}"]
    try:
        return output(["-C", repository, "rev-parse", *wanted]).strip()
    except GitError as error:
        if error.message.startswith("exit"):  # --quiet: it said nothing, so it is just not there
            raise NoSuchRef(f"no tag, branch or commit {ref}") from None
        raise


def remote_commit(url: str, ref: str) -> str:
    """The commit that a tag, branch or full commit id is at `url`. Raises GitError (NoSuchRef)."""
    listed = output(["ls-remote", "--", url, ref, f"{ref}^{{}}"])
    known = {name: commit for commit, name in (x.split("\t", 1) for x in listed.splitlines())}
    for name in (f"refs/tags/{ref}^{{}}", f"refs/tags/{ref}", f"refs/heads/{ref}", ref):
        if name in known:
            return known[name]
    if re.fullmatch(r"[0-9a-f]{40}", ref):
        return ref  # any commit may be asked for; the fetch tells whether it is there
    short = re.fullmatch(r"[0-9a-f]{7,39}", ref)
    raise NoSuchRef(
        f"no tag or branch {ref}" + (" (a commit needs all 40 digits)" if short else "")
    )


def fetch(url: str, commit: str, ref: str, tree: Path, log: StepLog) -> None:
    """The files of one commit as `tree`, without history. Raises GitError.

    `ref` is what is asked for where a server does not give out commits by id.
    """
    git = [*("git", *_CONFIG), f"--git-dir={tree / '.git'}", f"--work-tree={tree}"]
    tree.mkdir(parents=True, exist_ok=True)
    get = [*git, "fetch", "--quiet", "--depth", "1", "--no-tags", "--", url]
    try:
        log.call([*git, "init", "--quiet", "--template="], env=_quiet())
        try:
            log.call([*get, commit], env=_quiet(), what="git fetch")
        except StepError as error:
            if not re.search(r"unadvertised|not our ref", " ".join(error.tail)):
                raise
            log.call([*get, ref], env=_quiet(), what="git fetch")
        log.call([*git, "checkout", "--quiet", "--force", "--detach", commit], env=_quiet())
    except StepError as error:
        raise GitError(_why(_last_output(error.tail)) or error.message) from error
    shutil.rmtree(tree / ".git")


def _start(arguments: Sequence[str | Path]) -> subprocess.Popen[str]:
    # A group of its own: git's helpers (ssh, remote-https) outlive it and hold its pipes open.
    require()
    return subprocess.Popen(
        ["git", *_CONFIG, *(str(a) for a in arguments)],
        env={**os.environ, **_quiet()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    for pipe in (child.stdout, child.stderr):
        if pipe:
            pipe.close()


def _last_output(log_tail: Sequence[str]) -> list[str]:
    """The output of the last program in a step's log."""
    start = max((i for i, line in enumerate(log_tail) if line.startswith("$ ")), default=-1)
    return [line for line in log_tail[start + 1 :] if not line.startswith("exit ")]


def _why(lines: Iterable[str]) -> str:
    """The line that says why git failed: its first. What follows is advice and consequences."""
    noise = re.compile(r"(warning|hint|from|cloning)\b", re.I)
    said = (line.strip() for line in lines)
    return next((line[:300] for line in said if line and not noise.match(line)), "")
