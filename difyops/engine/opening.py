"""A configuration -> a model that is loaded, warm and running."""

from __future__ import annotations

import logging
from dataclasses import replace

import psutil
import torch

from difyops.engine import drafters
from difyops.engine import load as checkpoints
from difyops.engine.chat import ChatTemplate
from difyops.engine.config import LlmConfig
from difyops.engine.grammar import Grammars
from difyops.engine.headers import check_context
from difyops.engine.intake import Llm
from difyops.engine.models.decoder import Decoder
from difyops.engine.runner import Engine
from difyops.engine.sources import default_cache, resolve
from difyops.engine.speculate import Drafter, state_specs
from difyops.engine.state import PAGE_SIZE
from difyops.errors import PrerequisiteError, UsageError
from difyops.serving import process

log = logging.getLogger("difyops.engine")


def load_model(config: LlmConfig) -> checkpoints.Loaded:
    """The model that is named, on the device that is named. Raises DifyopsError."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(config.threads or process.default_threads())
    path = resolve(config.model, config.cache or default_cache(), log.info)
    if path.is_dir():
        path = path.resolve()  # a deployment's link has no name that a person knows
    return checkpoints.load(path, dtype=config.dtype, device=device)


def open_llm(config: LlmConfig) -> Llm:
    """A loaded model whose engine runs and is warm. Raises DifyopsError."""
    loaded = load_model(config)
    words, model = loaded.tokenizer, loaded.model
    check_context(config.context, config.id, loaded.context)
    context = config.context or loaded.context
    drafter = _drafter(config, model)
    pages = config.pages or default_pages(model, drafter, config.slots, context)
    if pages < (needed := _full(model, drafter, context)):
        raise UsageError(
            f"pages: {pages} hold {pages * PAGE_SIZE} tokens, less than a context of {context}",
            f"raise pages to {needed} or more, or lower context",
        )
    try:
        template = None
        if words.chat_template is not None:
            template = ChatTemplate(words.chat_template, words.special)
        grammars = None
        if words.stop_ids:
            grammars = Grammars(words.backend, model.shape.vocabulary, words.stop_ids)
        engine = Engine(
            model,
            slots=config.slots,
            context=context,
            pages=pages,
            prefill_tokens=config.prefill_tokens,
            max_waiting=config.max_waiting,
            drafter=drafter,
            prefix_bytes=default_prefix(model)
            if config.prefix_cache is None
            else config.prefix_cache,
        )
        engine.warm_up()
    except (ValueError, RuntimeError, MemoryError) as error:
        raise PrerequisiteError(f"cannot serve {config.id} from {config.model}: {error}") from error
    log.info("%s: %s", config.id, about(engine))
    engine.start()
    defaults = replace(loaded.sampling, **config.sampling.given())
    return Llm(config.id, engine, words, template, grammars, defaults)


def about(engine: Engine) -> str:
    """One line: where the model runs, and what it may take."""
    weights = list(engine.model.parameters())
    device, dtype = engine.device, str(engine.model.embed.weight.dtype).removeprefix("torch.")
    stats, threads = engine.stats(), torch.get_num_threads()
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    parts = [str(device), dtype]
    if device.type == "cpu":
        parts.append(f"{threads} thread{'' if threads == 1 else 's'}")
    parts += [f"{stats.slots} slots", f"{engine.context} tokens of context"]
    if stats.pages:
        parts.append(
            f"up to {_gib(stats.pages * PAGE_SIZE * stats.token_bytes)} of keys and values"
        )
    if stats.slot_bytes:
        parts.append(f"{_gib(stats.slots * stats.slot_bytes)} of states")
    count = sum(weight.numel() for weight in weights)
    return ", ".join([*parts, f"{_gib(size)} of weights ({count:,} parameters)"])


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _drafter(config: LlmConfig, model: Decoder) -> Drafter | None:
    kind, _, name = config.speculate.partition(":")
    small = load_model(config.model_copy(update={"model": name})).model if name else None
    drafter = drafters.choose(kind, model, small)
    log.info("speculation: %s", drafter.name if drafter is not None else "off")
    return drafter


def default_pages(model: Decoder, drafter: Drafter | None, slots: int, context: int) -> int:
    """Pages for every slot to be full, or as many as a quarter of the free memory holds.

    Sequences rarely fill the context; when they do, the youngest waits. One always fits.
    """
    one = _full(model, drafter, context)
    each = PAGE_SIZE * sum(spec.token_bytes for spec in state_specs(model, drafter))
    return max(one, min(slots * one, free_bytes(model) // 4 // each)) if one else 0


def _full(model: Decoder, drafter: Drafter | None, context: int) -> int:
    """Pages of one sequence that fills the context; 0 without softmax layers."""
    if not any(spec.token for spec in state_specs(model, drafter)):
        return 0
    return -(-(context + 1 + (drafter.most if drafter is not None else 0)) // PAGE_SIZE)


def default_prefix(model: Decoder) -> int:
    """Bytes of states that are kept for prompts that begin alike: an eighth of the free memory."""
    return free_bytes(model) // 8


def free_bytes(model: Decoder) -> int:
    """Free memory where the model is."""
    device = model.embed.weight.device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
