"""The proof: a chat through Dify's own API, blocking and streaming, its content looked at."""

from __future__ import annotations

from difyops.core import Deployment
from difyops.doctor import Finding, Registry, fail, ok
from difyops.errors import DifyopsError

check = Registry()


@check(
    "chat.end-to-end",
    why="everything can be green, and the chat fails",
    needs=("api.login", "model.chat", "pg.hba", "redis.up"),
    dify=True,
)
def end_to_end(deployment: Deployment) -> Finding:
    from difyops import proof

    try:
        chat = proof.chat(deployment)
    except DifyopsError as error:
        return fail(error.message, error.hint or "difyops wire")
    return ok(
        f"answered in {chat.seconds:.1f} s, streaming first token {chat.first_token_seconds:.1f} s"
    )
