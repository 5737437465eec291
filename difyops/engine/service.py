"""What one process serves, and whether it does so now."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from difyops.engine.config import EngineConfig
from difyops.engine.inbox import Inbox
from difyops.engine.intake import Llm
from difyops.engine.metrics import Metrics
from difyops.serving.protocol import model_entry
from difyops.serving.routes import Served


@dataclass
class Service(Served):
    """Chat and completions by the native engine, in this process."""

    llm_route = "completions"

    config: EngineConfig
    llm: Llm | None = None
    #: Answers that are being written.
    active: int = 0
    metrics: Metrics = field(default_factory=Metrics)
    inbox: Inbox = field(default_factory=Inbox)

    def llm_entry(self) -> dict[str, Any] | None:
        if self.llm is None:
            return None
        entry = model_entry(self.llm.id, self.llm.context, self.created)
        return entry | {"tools": self.llm.tool_format is not None}
