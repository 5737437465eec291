"""`python -m difyops.serving --config FILE`: listen, load, serve until told to stop.

Exit codes: 0 stopped by a signal, 1 an engine died in service, 2 a wrong configuration,
3 never became ready.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import sys
import time
from pathlib import Path

from difyops.errors import EXIT_CANNOT_START, EXIT_FAILED, DifyopsError
from difyops.serving import process
from difyops.serving.app import Models, create_app
from difyops.serving.config import ServingConfig, load

log = logging.getLogger("difyops.serving")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m difyops.serving", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="a JSON file of mode 0600")
    arguments = parser.parse_args()
    process.log_to_stderr()
    try:
        config = load(arguments.config)
        _require(config)
        with process.listen(config.host, config.port) as listener:
            return asyncio.run(_serve(config, listener))
    except DifyopsError as error:
        process.log_error(log, error)
        return error.exit_code


def _require(config: ServingConfig) -> None:
    needed = ["xllamacpp"] if config.llm is not None else []
    needed += ["onnxruntime", "tokenizers"] if config.embedding is not None else []
    process.require(needed, "demo")


async def _serve(config: ServingConfig, listener: socket.socket) -> int:
    models = Models(config)
    server = process.Server(create_app(models), models.stopping)
    log.info("listening on http://%s:%d", config.host, listener.getsockname()[1])
    try:
        return await process.run(server, listener, _keep(models, server))
    finally:
        await models.close()


async def _keep(models: Models, server: process.Server) -> int:
    """Load, then watch. Returns only when the service cannot go on, with the exit code."""
    began = time.monotonic()
    try:
        await models.load()
    except DifyopsError as error:
        log.error("%s", error.message)
        server.should_exit = True
        return EXIT_CANNOT_START
    except Exception:
        log.exception("loading failed")
        server.should_exit = True
        return EXIT_CANNOT_START
    for entry in models.describe():
        log.info("%s: %d tokens of context", entry["id"], entry["context_length"])
    llm, llama = models.config.llm, models.llama
    if llm is not None and llama is not None and llama.context < llm.context:
        log.warning("%s: %d tokens of context were asked for", llm.id, llm.context)
    log.info("ready after %.1f s", time.monotonic() - began)
    if llama is None:
        await asyncio.Event().wait()
    else:
        log.error("%s", await llama.wait())
    models.ready = False
    server.should_exit = True
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
