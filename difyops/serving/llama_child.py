"""llama.cpp in a process of its own: `python -m difyops.serving.llama_child`, started by llama.py.

A process, because xllamacpp holds the GIL while it loads (nothing else would answer meanwhile), and
because a failed check inside ggml aborts the whole process.

Protocol: the first line on stdin is a JSON object (`Orders`); once loaded, one JSON line
`{"address": "http://127.0.0.1:PORT"}` goes to stdout; the end of stdin means stop, so that this
process never outlives its parent. stderr is llama.cpp's own. Exit code 3: the model did not load.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import NoReturn, TypedDict


class Orders(TypedDict):
    path: str
    alias: str
    api_key: str
    context: int
    parallel: int
    threads: int


def main() -> NoReturn:
    # A signal to the whole group (Ctrl-C, a supervisor) is for the parent to act on: it still has
    # streams to finish, and closes our stdin when it has done so.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # From here on a stray print of the library cannot break the protocol.
    os.dup2(2, 1)
    orders: Orders = json.loads(sys.stdin.readline())

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = orders["path"]
    params.model_alias = {orders["alias"]}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [orders["api_key"]]
    # llama.cpp divides n_ctx by the slots: each one gets the whole declared context.
    params.n_ctx = orders["context"] * orders["parallel"]
    params.n_parallel = orders["parallel"]
    # Nothing is dropped or shrunk in silence: no context shift, no fitting of n_ctx to memory.
    params.ctx_shift = False
    params.fit_params = False
    # The default keeps up to 8 GiB of old prompts in RAM, which no memory plan would foresee.
    params.cache_ram_mib = 0
    # A cancelled request is noticed between batches, so the batch bounds how long a client that
    # left can hold a slot while its prompt is read.
    params.n_batch = params.n_ubatch = 256
    params.cpuparams.n_threads = orders["threads"]
    params.cpuparams_batch.n_threads = orders["threads"]
    # Each waiting stream holds an HTTP thread; too few would starve the requests behind them.
    params.n_threads_http = 64
    params.endpoint_slots = True
    params.ui = False
    params.verbosity = 1  # errors only: prompts never reach the log
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        os._exit(3)
    answer.write(json.dumps({"address": server.listening_address}) + "\n")
    answer.flush()
    while sys.stdin.read(1 << 16):
        pass
    # Without destructors: they would wait for requests whose clients are gone.
    os._exit(0)


if __name__ == "__main__":
    main()
