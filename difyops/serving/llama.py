"""A llama.cpp server as a child process, and the HTTP client that reaches it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import sys
from collections import deque

import httpx

from difyops.errors import DifyopsError, PrerequisiteError
from difyops.serving.config import LlmConfig
from difyops.serving.llama_child import Orders
from difyops.serving.process import default_threads

#: "0.00.027.408 E llama_model_load: " and a second prefix of the same kind.
_LOG_PREFIX = re.compile(r"^[\d.]+ [A-Z] +(?:\w+ +)?\S+: +(?:error loading model: +)?")


class Llama:
    """One GGUF model behind llama.cpp's own HTTP server on a free loopback port.

    `start` loads and warms; then `client` reaches it and `context` is what one request may hold
    (tokens), as llama.cpp reports it. `wait` returns when the process ends, `stop` ends it.
    """

    def __init__(self, config: LlmConfig) -> None:
        self.config = config
        self.context = 0
        self._key = secrets.token_urlsafe(32)
        self._process: asyncio.subprocess.Process | None = None
        self._client: httpx.AsyncClient | None = None
        self._errors: deque[str] = deque(maxlen=50)
        self._drain: asyncio.Task[None] | None = None

    @property
    def client(self) -> httpx.AsyncClient:
        if self._client is None:
            raise DifyopsError(f"{self.config.id} is not running")
        return self._client

    async def start(self) -> None:
        """Load the model and answer one token. Raises PrerequisiteError with llama.cpp's reason."""
        config = self.config
        if not config.path.is_file():
            raise PrerequisiteError(f"cannot load {config.id}: no file {config.path}")
        orders = Orders(
            path=str(config.path),
            alias=config.id,
            api_key=self._key,
            context=config.context,
            parallel=config.parallel,
            threads=config.threads or default_threads(),
        )
        process = self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "difyops.serving.llama_child"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise DifyopsError("llama.cpp was started without pipes")
        self._drain = asyncio.create_task(self._read_errors(process.stderr))
        # The orders hold the key, so they travel in a pipe and not in argv.
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(orders).encode() + b"\n")
            await process.stdin.drain()
        line = await process.stdout.readline()
        if not line:
            raise PrerequisiteError(await self._why_not_loaded())
        self._client = httpx.AsyncClient(
            base_url=json.loads(line)["address"],
            headers={"Authorization": f"Bearer {self._key}"},
            # No read timeout: a long prompt on a slow CPU is silent for minutes.
            timeout=httpx.Timeout(None, connect=10),
            # llama.cpp closes connections when it likes; one that is reused may be a dead one.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            # A proxy of the environment has no business on loopback.
            trust_env=False,
        )
        await self._warm()

    async def _warm(self) -> None:
        try:
            slots = (await self.client.get("/slots")).raise_for_status().json()
            self.context = min(int(slot["n_ctx"]) for slot in slots)
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
            (await self.client.post("/v1/chat/completions", json=body)).raise_for_status()
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise PrerequisiteError(
                f"{self.config.id} was loaded but does not answer: {error}"
            ) from error

    async def wait(self) -> str:
        """Wait until the process ends; return the reason in a line."""
        if self._process is None:
            raise DifyopsError(f"{self.config.id} is not running")
        code = await self._process.wait()
        last = f": {self._errors[-1]}" if self._errors else ""
        return f"llama.cpp ended with status {code}{last}"

    async def stop(self) -> None:
        """End the process, whatever it is doing. Safe to call twice, and before `start`."""
        if self._client is not None:
            await self._client.aclose()
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            if process.stdin is not None:
                process.stdin.close()
            try:
                async with asyncio.timeout(0.5):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if self._drain is not None:
            await self._drain

    async def _read_errors(self, stream: asyncio.StreamReader) -> None:
        # The pipe is always drained, or llama.cpp would block on a full one.
        pending = b""
        while chunk := await stream.read(65536):
            *lines, pending = (pending + chunk).split(b"\n")
            self._errors.extend(
                text for line in lines if (text := line.decode("utf-8", "replace").strip())
            )
            pending = pending[-65536:]

    async def _why_not_loaded(self) -> str:
        if self._process is not None:
            await self._process.wait()
        if self._drain is not None:
            await self._drain
        code = self._process.returncode if self._process is not None else None
        # llama.cpp reports from the inside out: its first line is the precise one. Python's
        # traceback (a missing package, say) has it last.
        lines = [line for line in self._errors if not line.startswith((" ", "Traceback"))]
        first = _LOG_PREFIX.match(lines[0]) if lines else None
        if not lines:
            reason = f"llama.cpp ended with status {code}"
        elif first:
            reason = lines[0][first.end() :]
        else:
            reason = lines[-1]
        return f"cannot load {self.config.id} from {self.config.path}: {reason}"
