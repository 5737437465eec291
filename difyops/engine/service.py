"""What one process serves, and whether it does so now."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from difyops.engine.config import EngineConfig
from difyops.engine.inbox import Inbox
from difyops.engine.intake import Llm
from difyops.engine.metrics import Metrics
from difyops.serving.embedder import Embedder
from difyops.serving.embeddings import embedder_entry
from difyops.serving.protocol import model_entry


@dataclass
class Service:
    """Nothing is answered before `ready`; once `draining`, nothing new is; `stopping` cuts what
    still runs. Made inside the event loop that it serves from."""

    config: EngineConfig
    llm: Llm | None = None
    embedder: Embedder | None = None
    ready: bool = False
    draining: bool = False
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    #: Answers that are being written.
    active: int = 0
    metrics: Metrics = field(default_factory=Metrics)
    inbox: Inbox = field(default_factory=Inbox)
    created: int = field(default_factory=lambda: int(time.time()))

    def describe(self) -> list[dict[str, Any]]:
        """Entries of `/v1/models`; lengths in tokens."""
        entries = []
        if self.llm is not None:
            entry = model_entry(self.llm.id, self.llm.context, self.created)
            entries.append(entry | {"tools": self.llm.tool_format is not None})
        if self.config.embedding is not None and self.embedder is not None:
            entries.append(embedder_entry(self.config.embedding.id, self.embedder, self.created))
        return entries
