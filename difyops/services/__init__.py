"""One file per service; `ALL` is in start order. To add a service: its file, and a line here."""

from __future__ import annotations

from collections.abc import Callable

from difyops.core import Deployment, Service
from difyops.services import api, model, postgres, valkey, worker

#: Each declares the service for a deployment, or None when this deployment has no use for it.
ALL: tuple[Callable[[Deployment], Service | None], ...] = (
    postgres.declare,
    valkey.declare,
    model.declare,
    api.declare,
    worker.declare,
)
