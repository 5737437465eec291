"""A configuration -> a model that is loaded, warm and running."""

from __future__ import annotations

import logging
from dataclasses import replace

import psutil
import torch

from difyops.engine import drafters, sizing
from difyops.engine import load as checkpoints
from difyops.engine.chat import ChatTemplate
from difyops.engine.config import LlmConfig
from difyops.engine.grammar import Grammars
from difyops.engine.headers import check_context
from difyops.engine.intake import Llm
from difyops.engine.models.decoder import Decoder
from difyops.engine.runner import Engine
from difyops.engine.sources import default_cache, resolve
from difyops.engine.speculate import Drafter
from difyops.engine.state import PAGE_SIZE
from difyops.errors import PrerequisiteError, UsageError
from difyops.serving import process

log = logging.getLogger("difyops.engine")

#: Requests at a time on a CPU, if nobody says how many.
CPU_SLOTS = 16


def load_model(config: LlmConfig) -> checkpoints.Loaded:
    """The model that is named, on the device that is named. Raises DifyopsError."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(config.threads or process.default_threads())
    path = resolve(config.model, config.cache or default_cache(), log.info)
    if path.is_dir():
        path = path.resolve()  # a deployment's link has no name that a person knows
    try:
        return checkpoints.load(path, dtype=config.dtype, device=device)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise PrerequisiteError(
            f"{path}: its weights do not fit: {device} has {sizing.gib(total)}, "
            f"of which {sizing.gib(free)} are left",
            "see what else runs there (nvidia-smi), or take a smaller model or --device cpu",
        ) from error


def open_llm(config: LlmConfig) -> Llm:
    """A loaded model whose engine runs and is warm. Raises DifyopsError."""
    loaded = load_model(config)
    words, model = loaded.tokenizer, loaded.model
    check_context(config.context, config.id, loaded.context)
    context = config.context or loaded.context
    if config.state_dtype != "auto":
        model.states_in = checkpoints.DTYPES[config.state_dtype]
    small = _small(config)
    drafter = drafters.choose(config.speculate.partition(":")[0], model, small)
    log.info("speculation: %s", _called(config, drafter))
    room = _room(config, model, drafter, context)
    try:
        template = None
        if words.chat_template is not None:
            template = ChatTemplate(words.chat_template, words.special)
        grammars = None
        if words.stop_ids:
            grammars = Grammars(words.backend, model.shape.vocabulary, words.stop_ids)
        engine = Engine(
            model,
            slots=room.slots,
            context=context,
            pages=room.pages,
            prefill_tokens=_prefill_tokens(config, model),
            max_waiting=config.max_waiting,
            drafter=drafter,
            prefix_bytes=room.prefix_bytes,
        )
        engine.warm_up()
    except torch.OutOfMemoryError as error:
        raise PrerequisiteError(
            f"cannot serve {config.id}: out of GPU memory with {room.slots} slots, "
            f"{room.pages} pages and {sizing.gib(room.prefix_bytes)} for prefixes",
            f"halve --slots ({max(room.slots // 2, 1)}), lower --context or "
            "--gpu-memory-utilization; something else may have taken memory meanwhile",
        ) from error
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
        parts.append(f"up to {sizing.mib(pages)} of keys and values")
    if stats.slot_bytes:
        parts.append(f"{sizing.mib(stats.slots * stats.slot_bytes)} of states")
    if stats.prefix is not None:
        parts.append(f"up to {sizing.mib(stats.prefix.budget)} for prefixes")
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
    return f"{sizing.mib(size)} of weights ({count:,} parameters)"


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


def _prefill_tokens(config: LlmConfig, model: Decoder) -> int:
    """A CPU reads 512 tokens in the time in which a GPU reads 8192, about."""
    return config.prefill_tokens or (512 if _on_cpu(model) else 8192)


def _room(config: LlmConfig, model: Decoder, drafter: Drafter | None, context: int) -> sizing.Plan:
    """Slots, pages and bytes for prefixes. Raises UsageError or PrerequisiteError for what does
    not fit."""
    tokens = _prefill_tokens(config, model)
    needs = sizing.needs(model, drafter, context=context, prefill_tokens=tokens)
    if config.pages and needs.full > config.pages:
        raise UsageError(
            f"pages: {config.pages} hold {config.pages * PAGE_SIZE} tokens, less than a context "
            f"of {context}",
            f"raise pages to {needs.full} or more, or lower context",
        )
    free = free_bytes(model)
    if _on_cpu(model):
        slots, prefix = config.slots or CPU_SLOTS, prefix_budget(config.prefix_cache, free)
        pages = config.pages or cpu_pages(needs, slots, free)
        return sizing.Plan(slots, pages, prefix, needs.kept(slots, pages) + prefix)
    total = torch.cuda.mem_get_info(model.embed.weight.device)[1]
    # The weights are there already, and whatever else this GPU holds.
    budget = free - int((1 - config.gpu_memory_utilization) * total) + needs.weights
    return sizing.plan(
        needs, budget, slots=config.slots, pages=config.pages, prefix=config.prefix_cache,
        vocabulary=model.shape.vocabulary,
    )  # fmt: skip


def cpu_pages(needs: sizing.Needs, slots: int, free: int) -> int:
    """Pages for every slot to be full, or as many as a quarter of the free memory holds.

    Sequences rarely fill the context; when they do, the youngest waits. One always fits.
    """
    if not needs.full:
        return 0
    return max(needs.full, min(slots * needs.full, free // 4 // needs.page))


def prefix_budget(wanted: int | None, free: int) -> int:
    """Bytes of states that are kept for prompts that begin alike; None: an eighth of `free` ones.

    Raises UsageError for more than are free.
    """
    if wanted is None:
        return free // 8
    if wanted > free:
        raise UsageError(
            f"prefix_cache: {sizing.mib(wanted)} were asked for, and {sizing.mib(free)} are free",
            f"ask for less, or leave it out: that is an eighth of them, {sizing.mib(free // 8)}",
        )
    return wanted


def free_bytes(model: Decoder) -> int:
    """Free memory where the model is."""
    device = model.embed.weight.device
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left behind
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _on_cpu(model: Decoder) -> bool:
    return model.embed.weight.device.type == "cpu"
