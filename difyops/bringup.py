"""`up`, straight through: preflight -> steps -> wire -> doctor -> result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difyops import checks, doctor, init, lock, proof, source
from difyops import deployment as deployments
from difyops.core import Deployment, Progress
from difyops.doctor import Report
from difyops.services import model
from difyops.wire import WireReport


@dataclass(frozen=True)
class BroughtUp:
    """What `up` came to. `wired` and `report` are None where it did not get that far."""

    deployment: Deployment
    preflight: Report
    wired: WireReport | None = None
    report: Report | None = None

    @property
    def healthy(self) -> bool:
        return self.report is not None and self.report.healthy

    def lines(self) -> list[str]:
        """For a person: where everything is, and what was proved."""
        if self.report is None:
            return []
        settings = self.deployment.settings
        said = []
        if settings.dify.enabled:
            said.append(
                f"Dify API  {settings.dify.url}   {settings.admin.email}"
                "  (password: difyops secrets show admin; no web interface yet)"
            )
        said.append(f"Model     {model.llm_url(self.deployment)}   {settings.model.name}")
        if self.wired and self.wired.chat:
            chat = self.wired.chat
            said.append(
                f"Proved    chat answered in {chat.seconds:.1f} s, streaming first token "
                f"{chat.first_token_seconds:.1f} s: {_quoted(chat.answer)}"
            )
            said.append(
                f"Try       curl {settings.dify.url}/v1/chat-messages -H 'Content-Type: "
                'application/json\' -H "Authorization: Bearer $(difyops secrets show app)" '
                """-d '{"query": "Hello", "inputs": {}, "user": "me"}'"""
            )
        return said

    def as_json(self) -> dict[str, Any]:
        """The pinned shape of `up --json`."""
        return {
            "version": 1,
            "healthy": self.healthy,
            "preflight": self.preflight.as_json(),
            "wired": self.wired.as_dict() if self.wired else None,
            "doctor": self.report.as_json() if self.report else None,
        }


def _quoted(answer: str, most: int = 60) -> str:
    text = " ".join(answer.split())
    return f'"{text}"' if len(text) <= most else f'"{text[:most].rstrip()}…"'


def run(
    root: Path,
    dify: str | None,
    progress: Progress,
    *,
    wire: bool = True,
    tell: Callable[[Report], None] = lambda preflight: None,
) -> BroughtUp:
    """Bring a deployment up and prove it. `tell` hears how the preflight went.

    Raises DifyopsError from the step that fails; a failed preflight is in the result.
    """
    deployment = deployments.load(root, dify)
    if dify and not deployment.settings.dify.enabled:
        init.enable_dify(deployment.paths.settings)
        progress.note("difyops.yaml: dify.enabled was false; --dify turns it on")
        deployment = deployments.load(root, dify)
    with lock.held(deployment.paths, "up"):
        preflight = doctor.run(deployment, checks.PREFLIGHT)
        tell(preflight)
        if not preflight.healthy:
            return BroughtUp(deployment, preflight)
        deployment = source.up(root, dify, progress)
        wired = None
        if wire and deployment.settings.dify.enabled:
            wired = proof.wire(deployment, progress)
        # With wiring, the chat was proved just now: asking again would only take longer. Without,
        # there is nothing to look at that wiring makes.
        every = [c for c in checks.ALL if c not in (*checks.CHAT, *checks.EXACT)]
        if not wire:
            every = [check for check in every if check not in checks.WIRED]
        return BroughtUp(deployment, preflight, wired, _examine(deployment, every, progress))


def _examine(deployment: Deployment, every: list[doctor.Check], progress: Progress) -> Report:
    progress.started("doctor")
    began = time.monotonic()
    report = doctor.run(deployment, every, lambda name: progress.detail("doctor", name))
    progress.finished("doctor", report.summary().rsplit(" in ")[0], time.monotonic() - began)
    return report
