"""`difyops demo`: bring up what this machine can have, and show an answer of its own model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from difyops import bringup, checkout, init, settings
from difyops.backends import probe
from difyops.bringup import BroughtUp
from difyops.core import Paths, Progress
from difyops.doctor import Report
from difyops.errors import PrerequisiteError
from difyops.services import model

QUESTION = "In one sentence: what is a lighthouse for?"


def run(
    root: Path, dify: str | None, progress: Progress, *, tell: Callable[[Report], None]
) -> tuple[BroughtUp, list[str]]:
    """Make a deployment in `root` if there is none, bring it up, ask the model a question.

    Without `dify`, and with no repository of Dify in reach, everything else is brought up, and
    doctor's table says what is missing and how to supply it. -> the result, and lines to show.
    """
    paths = Paths(root.resolve())
    if not paths.settings.exists():
        without = dify is None and not _upstream_answers(progress)
        init.run(root, {"dify": {"enabled": False}} if without else {}, dict)
    result = bringup.run(root, dify, progress, tell=tell)
    return result, _chat(result) if result.report else []


def _upstream_answers(progress: Progress) -> bool:
    try:
        found = checkout.reachable(settings.Mirrors().git)
    except PrerequisiteError:  # no git
        found = None
    if found is None:
        progress.note("Dify's repository cannot be reached from here: everything but Dify, then")
    return found is not None


def _chat(result: BroughtUp) -> list[str]:
    """A question to the model server itself, and its answer."""
    deployment = result.deployment
    name = deployment.settings.model.name
    answer = probe.chat_once(
        model.llm_url(deployment),
        name,
        model.llm_key(deployment),
        prompt=QUESTION,
        max_tokens=64,
    )
    said = " ".join(answer.text.split())
    return [
        f"Asked     {QUESTION}",
        f"Answered  {said}",
        f"          {name}, {answer.seconds:.1f} s, first token {answer.first_token:.2f} s",
    ]
