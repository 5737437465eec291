"""The real server over a shape with random weights: `python -m difyops.bench.gpu_server ORDERS`.

ORDERS is a JSON object of class `Orders`. What is not as in `difyops serve` is where model and
tokenizer come from: nothing is read from a disk, and each token is a short word.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from difyops.engine import serve
from difyops.engine.config import EngineConfig
from difyops.serving import process

if TYPE_CHECKING:
    from difyops.engine.service import Service
    from difyops.engine.tokens import Tokenizer

MODEL = "bench"


class Orders(TypedDict):
    """`config` is a config.json; `slots` sequences run at a time, of `context` tokens each."""

    config: Mapping[str, Any]
    device: str
    port: int
    slots: int
    context: int
    prefill_tokens: int


def words(vocabulary: int) -> Tokenizer:
    """A tokenizer in which every token is a short word with a space before it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    from difyops.engine.tokens import Tokenizer

    backend = Backend(models.WordLevel({f"Ġ{n:x}": n for n in range(vocabulary)}))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {})


def open_model(service: Service, orders: Orders) -> None:
    """Blocking."""
    from difyops.bench.gpu_model import build
    from difyops.engine.intake import Llm
    from difyops.engine.request import SamplingDefaults
    from difyops.engine.runner import Engine

    model = build(orders["config"], orders["device"])
    engine = Engine(
        model,
        slots=orders["slots"],
        context=orders["context"],
        prefill_tokens=orders["prefill_tokens"],
    )
    engine.warm_up()
    engine.start()
    tokenizer = words(model.shape.vocabulary)
    service.llm = Llm(MODEL, engine, tokenizer, None, None, SamplingDefaults())
    service.metrics.watch(engine)


def main() -> None:
    orders: Orders = json.loads(sys.argv[1])
    process.log_to_stderr()
    fields = {"host": "127.0.0.1", "port": orders["port"], "llm": {"id": MODEL, "model": MODEL}}
    config = EngineConfig.model_validate(fields)
    sys.exit(serve.serve(config, lambda service: open_model(service, orders)))


if __name__ == "__main__":
    main()
