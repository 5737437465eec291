"""One file per topic. `ALL` is the order in which doctor looks: the ground first, the chat last."""

from __future__ import annotations

from difyops.checks import chat, dify, host, model, net, postgres, redis, secrets
from difyops.doctor import Check

ALL: tuple[Check, ...] = tuple(
    check
    for topic in (host, secrets, net, postgres, redis, model, dify, chat)
    for check in topic.check.checks
)

PREFLIGHT: tuple[Check, ...] = tuple(check for check in ALL if check.preflight)
