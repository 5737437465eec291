"""Beginnings of sequences that are kept for requests that begin alike: the prefix cache over the
pool. Whoever calls guards the pool's books."""

from __future__ import annotations

from difyops.engine.prefix import PrefixCache
from difyops.engine.request import Request
from difyops.engine.state import Snapshot, StatePool


class Keeping:
    """Without a cache nothing is kept."""

    def __init__(self, cache: PrefixCache[Snapshot] | None, pool: StatePool) -> None:
        self._cache = cache
        self._pool = pool

    def longest(self, request: Request) -> tuple[int, int]:
        """Tokens, and pages to share, of the longest kept beginning."""
        found = self._cache.find(request.tokens, request.salt) if self._cache is not None else None
        return (found.length, self._pool.table.shared(found.lease)) if found is not None else (0, 0)

    def resume(self, request: Request) -> int:
        """Put the longest kept beginning of the request into its new slot."""
        if self._cache is None or request.slot is None:
            return 0
        usage = self._cache.usage
        usage.looked_up += len(request.tokens)
        found = self._cache.find(request.tokens, request.salt)
        if found is None:
            return 0
        try:
            self._pool.restore(request.slot, found)
        except MemoryError:
            return 0
        usage.reused += found.length
        request.reused = max(request.reused, min(found.length, len(request.prompt)))
        return found.length

    def reclaim(self) -> bool:
        return self._cache is not None and self._cache.evict()

    def keep(self, request: Request) -> None:
        """Keep the state of the request as it is now, for whoever begins alike."""
        if self._cache is None or request.slot is None or not request.computed:
            return
        # A step ahead of its end has read the stop token as well.
        stop = [] if request.ended_by is None else [request.ended_by]
        tokens = [*request.tokens, *stop][: request.computed]
        if not self._cache.has(tokens, request.salt):
            known = None if self._pool.drafting else len(tokens)
            snapshot = self._pool.snapshot(request.slot, known)
            size = self._pool.snapshot_bytes(snapshot)
            self._cache.keep(tokens, snapshot, size, request.salt)
