"""One file per topic. `ALL` is the order in which doctor looks: the ground first, the chat last."""

from __future__ import annotations

from difyops.checks import (
    celery,
    chat,
    dify,
    exact,
    host,
    model,
    net,
    postgres,
    redis,
    secrets,
    wired,
)
from difyops.doctor import Check

ALL: tuple[Check, ...] = tuple(
    check
    for topic in (host, secrets, net, postgres, redis, model, exact, dify, celery, wired, chat)
    for check in topic.check.checks
)

#: What needs Dify to be wired, and what asks it a question.
WIRED: tuple[Check, ...] = tuple(wired.check.checks)
CHAT: tuple[Check, ...] = tuple(chat.check.checks)

#: What asks the model for many answers: seconds that `up` need not take.
EXACT: tuple[Check, ...] = tuple(exact.check.checks)

#: What can be asked of a model server that is not part of a deployment.
OF_A_SERVER: tuple[str, ...] = ("model.exact",)

PREFLIGHT: tuple[Check, ...] = tuple(check for check in ALL if check.preflight)

_ISSUES = {
    "dify": "https://github.com/langgenius/dify/issues",
    "plugins": "https://github.com/langgenius/dify-official-plugins/issues",
    "vllm": "https://github.com/vllm-project/vllm/issues",
}


def table() -> str:
    """Every check as a Markdown table: docs/doctor.md is made of it."""
    rows = [
        ("topic", "ID", "can answer", "why it matters", "needs", "before `up`", "seen in"),
        ("---",) * 7,
    ]
    for check in ALL:
        rows.append(
            (
                check.topic,
                f"`{check.id}`",
                ", ".join(check.answers),
                check.why,
                ", ".join(f"`{need}`" for need in check.needs),
                "yes" if check.preflight else "",
                ", ".join(_link(issue) for issue in check.upstream),
            )
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _link(issue: str) -> str:
    project, number = issue.split("#")
    return f"[{issue}]({_ISSUES[project]}/{number})"
