"""A GGUF file as a checkpoint in Hugging Face's terms: config, tensors, tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from torch import Tensor

from difyops.engine.gguf_file import GgufFile, check_architecture
from difyops.engine.tokens import Tokenizer
from difyops.errors import PrerequisiteError

#: llama.cpp's name of a tensor (blk.3.attn_q.weight) -> Hugging Face's (model.layers.3.…).
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)\Z")
#: Divisors of the rotary frequencies: part of the config, as rope scaling is there.
_FACTORS = "rope_freqs.weight"

#: Keys below "llama." -> keys of config.json.
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
#: Keys that say what the tensors say, too, or that are read elsewhere here.
_READ_ELSEWHERE = {
    "vocab_size",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "tensor_data_layout",
    "expert_count",
    "expert_used_count",
}

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class GgufCheckpoint:
    """The tensors of a Llama GGUF, named and laid out as Hugging Face has them.

    Raises PrerequisiteError for another architecture, and for metadata that it cannot honour.
    """

    def __init__(self, file: GgufFile) -> None:
        self.where = file.path
        self._file = file
        check_architecture(file)
        self.config = _config(file)
        self._sources = {_renamed(name): name for name in file.tensors if name != _FACTORS}

    def names(self) -> Iterable[str]:
        return self._sources.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._sources[name]].shape

    def get(self, name: str) -> Tensor:
        """The tensor called `name`, float32."""
        values = self._file.tensor(self._sources[name])
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f".{part}." in name:
                values = _unpermuted(values, self.config[heads])
        return torch.from_numpy(values)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the metadata. Raises PrerequisiteError for one that is not known."""
        try:
            return _tokenizer(self._file.metadata)
        except PrerequisiteError as error:
            raise PrerequisiteError(f"{self.where}: {error.message}", error.hint) from error
        except KeyError as error:
            raise PrerequisiteError(f"{self.where}: {error.args[0]} is missing") from None


def _renamed(name: str) -> str:
    if found := _BLOCK.match(name):
        number, part, kind = found.groups()
        return f"model.layers.{number}.{_IN_BLOCK.get(part, part)}.{kind}"
    return _OUTSIDE.get(name, name)


def _unpermuted(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp stores each head's rotated pairs side by side, Hugging Face as two halves."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _config(file: GgufFile) -> dict[str, Any]:
    prefix = "llama."
    raw = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    if unknown := sorted(raw.keys() - _KEYS.keys() - _READ_ELSEWHERE):
        raise PrerequisiteError(
            f"{file.path}: llama.{unknown[0]} is not known to the engine, and may change the model",
            "use the model's safetensors",
        )
    if raw.get("expert_count"):
        raise PrerequisiteError(f"{file.path}: llama.expert_count: mixtures of experts not served")
    config = {_KEYS[key]: value for key, value in raw.items() if key in _KEYS}
    for needed in ("num_attention_heads", "hidden_size"):
        if not isinstance(config.get(needed), int) or config[needed] < 1:
            raise PrerequisiteError(f"{file.path}: {needed} is missing from the metadata")
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    config.setdefault("head_dim", config["hidden_size"] // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if raw.get(key, config["head_dim"]) != config["head_dim"]:
            raise PrerequisiteError(
                f"{file.path}: llama.{key}: {raw[key]}, but heads have {config['head_dim']}"
            )
    if "token_embd.weight" not in file.tensors:
        raise PrerequisiteError(f"{file.path}: the tensor token_embd.weight is missing")
    return config | {
        "model_type": "llama",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "rope_scaling": _scaling(file, raw),
    }


def _scaling(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any] | None:
    if _FACTORS in file.tensors:
        return {"rope_type": "factors", "factors": file.tensor(_FACTORS).tolist()}
    kind = raw.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    return {"rope_type": kind, "factor": raw.get("rope.scaling.factor")}


def _pre_tokenizer(name: str) -> tuple[pre_tokenizers.PreTokenizer, normalizers.Normalizer | None]:
    """How the text is cut before BPE, by llama.cpp's name, and what is done to it before that."""
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(pattern: str) -> pre_tokenizers.PreTokenizer:
        cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([cut, plain])

    if name == "gpt-2":
        return levels, None
    if name == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), levels]
        ), None
    if name == "llama-bpe":
        return split(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), None
    if name == "qwen2":
        # The model's own tokenizer composes characters first; llama.cpp leaves that out.
        return split(rf"{_WORDS}|\p{{N}}|{_REST}"), normalizers.NFC()
    raise PrerequisiteError(
        f"tokenizer.ggml.pre: {name!r} is not known to the engine",
        "known: gpt-2, llama-bpe, qwen2, smollm; or use the model's safetensors and tokenizer.json",
    )


def _tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    if (kind := metadata["tokenizer.ggml.model"]) != "gpt2":
        raise PrerequisiteError(
            f"tokenizer.ggml.model: {kind!r} cannot be read from GGUF",
            "byte-level BPE (gpt2) can; or use the model's safetensors and tokenizer.json",
        )
    name = metadata.get("tokenizer.ggml.pre", "gpt-2")
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _texts(metadata, "tokenizer.ggml.merges")]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    try:
        # Llama 3's vocabulary has words that no merge makes.
        model = models.BPE(vocabulary, merges, ignore_merges=name == "llama-bpe")  # type: ignore[arg-type]
    except Exception as error:  # the library raises bare Exception
        raise PrerequisiteError(f"tokenizer.ggml.merges: {error}") from error
    backend = Backend(model)
    backend.pre_tokenizer, normalizer = _pre_tokenizer(name)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, tokens, metadata)
    return Tokenizer(backend, _tokenizer_config(backend, tokens, metadata, name))


def _add_special(backend: Backend, tokens: list[str], metadata: Mapping[str, Any]) -> None:
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    if len(kinds) not in (0, len(tokens)):
        raise PrerequisiteError(
            f"tokenizer.ggml.token_type: {len(kinds)} types for {len(tokens)} tokens"
        )
    unknown, control, user_defined = 2, 3, 4
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (unknown, control, user_defined):
            special = bool(kind != user_defined)
            backend.add_tokens([AddedToken(token, special=special, normalized=False)])


def _tokenizer_config(
    backend: Backend, tokens: list[str], metadata: Mapping[str, Any], name: str
) -> dict[str, Any]:
    config: dict[str, Any] = {"chat_template": metadata.get("tokenizer.chat_template")}
    for key, field in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ):
        id = metadata.get(f"tokenizer.ggml.{field}")
        if id is not None and not (isinstance(id, int) and 0 <= id < len(tokens)):
            raise PrerequisiteError(f"tokenizer.ggml.{field}: {id!r} is not one of the tokens")
        if id is not None:
            config[key] = tokens[id]
    # A chat's turn may end in another token than a text (Llama 3).
    turn = metadata.get("tokenizer.ggml.eot_token_id")
    config["eos_token_id"] = [int(turn)] if turn is not None else None
    begins = metadata.get("tokenizer.ggml.add_bos_token", name == "llama-bpe")
    if begins and "bos_token" in config:
        bos = config["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return config


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata[key]
    if not isinstance(value, list):
        raise PrerequisiteError(f"{key}: not a list of texts")
    return value
