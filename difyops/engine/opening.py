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
    small = _small(config)
    drafter = drafters.choose(config.speculate.partition(":")[0], model, small)
    log.info("speculation: %s", _called(config, drafter))
    prefix_bytes = prefix_budget(config.prefix_cache, free_bytes(model))
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
            prefix_bytes=prefix_bytes,
        )
        engine.warm_up()
    except (ValueError, RuntimeError, MemoryError) as error:
        raise PrerequisiteError(f"cannot serve {config.id} from {config.model}: {error}") from error
    log.info("%s: %s", config.id, about(engine, small))
    engine.start()
    defaults = replace(loaded.sampling, **config.sampling.given())
    return Llm(config.id, engine, words, template, grammars, defaults)


def about(engine: Engine, small: Decoder | None = None) -> str:
    """One line: where the model runs, and what it may take; `small` drafts for it."""
    device, dtype = engine.device, str(engine.model.dtype).removeprefix("torch.")
    stats, threads = engine.stats(), torch.get_num_threads()
    parts = [str(device), dtype]
    if device.type == "cpu":
        parts.append(f"{threads} thread{'' if threads == 1 else 's'}")
    parts += [f"{stats.slots} slots", f"{engine.context} tokens of context"]
    if stats.pages:
        pages = stats.pages * PAGE_SIZE * stats.token_bytes
        parts.append(f"up to {_mib(pages)} of keys and values")
    if stats.slot_bytes:
        parts.append(f"{_mib(stats.slots * stats.slot_bytes)} of states")
    if stats.prefix is not None:
        parts.append(f"up to {_mib(stats.prefix.budget)} for prefixes")
    else:
        parts.append("no prefix cache")
    parts.append(_weights(engine.model))
    if small is not None:
        parts.append(f"{_weights(small)} for drafting")
    return ", ".join(parts)


def _weights(model: Decoder) -> str:
    weights = list(model.parameters())
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    count = sum(weight.numel() for weight in weights)
    return f"{_mib(size)} of weights ({count:,} parameters)"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"


def _small(config: LlmConfig) -> Decoder | None:
    """The model of `draft:MODEL`."""
    _, _, name = config.speculate.partition(":")
    return load_model(config.model_copy(update={"model": name})).model if name else None


def _called(config: LlmConfig, drafter: Drafter | None) -> str:
    """What drafts, and by which model."""
    if drafter is None:
        return "off"
    _, _, name = config.speculate.partition(":")
    return f"{drafter.name} {name}".rstrip()


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


def prefix_budget(wanted: int | None, free: int) -> int:
    """Bytes of states that are kept for prompts that begin alike; None: an eighth of `free` ones.

    Raises UsageError for more than are free.
    """
    if wanted is None:
        return free // 8
    if wanted > free:
        raise UsageError(
            f"prefix_cache: {_mib(wanted)} were asked for, and {_mib(free)} are free",
            f"ask for less, or leave it out: that is an eighth of them, {_mib(free // 8)}",
        )
    return wanted


def free_bytes(model: Decoder) -> int:
    """Free memory where the model is."""
    device = model.embed.weight.device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
