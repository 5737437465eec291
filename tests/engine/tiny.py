"""Tiny random native models, and directories of them that a server can be started on.

folder = tiny.checkpoint(tmp_path / "model", "hybrid")
model, config = tiny.model("performer", dtype=torch.float64)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from difyops.engine.models import native
from difyops.engine.models.decoder import Decoder

WIDTH = 24
#: Never two dimensions that are equal by accident.
LAYERS: dict[str, dict[str, Any]] = {
    "softmax": {"heads": 4, "kv_heads": 2, "head_dim": 6, "value_dim": 5, "rotary_dim": 4},
    "linear": {"heads": 4, "kv_heads": 2, "head_dim": 6, "value_dim": 5},
    "performer": {"heads": 3, "head_dim": 6, "value_dim": 5, "features": 11, "rotary_dim": 4},
    "norm": {"heads": 3, "head_dim": 6, "value_dim": 5, "rotary_dim": 4},
    "diag": {"heads": 3, "head_dim": 6, "value_dim": 5, "rotary_dim": 4},
    "retention": {"heads": 3, "head_dim": 6, "value_dim": 10, "rotary_dim": 6},
    "gated_delta": {"key_heads": 2, "value_heads": 4, "key_dim": 6, "value_dim": 5},
    "mamba2": {"heads": 4, "head_dim": 6, "groups": 2, "state_dim": 5},
}
#: Several layers of one mixer each, and two that are mixed.
PATTERNS: dict[str, list[dict[str, Any]]] = {
    **{name: [{"mixer": name, "repeat": 2, **options}] for name, options in LAYERS.items()},
    "hybrid": [
        {"mixer": "linear", "repeat": 3, **LAYERS["linear"]},
        {"mixer": "softmax", **LAYERS["softmax"]},
    ],
    "transnormer": [
        {"mixer": "diag", "repeat": 6, **LAYERS["diag"]},
        {"mixer": "norm", "repeat": 6, **LAYERS["norm"]},
    ],
}

END, START, TEXT_END = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_TEXT = """\
The state of a linear attention layer does not grow with the context.
A request is a slot, and a slot is free or taken. What is drafted may be taken back.
The answer is {"name": "weather", "arguments": {"city": "Paris", "days": 3}}, or it is not.
Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 1 2 3 4 5 6 7 8 9 10
def step(x, state, slots): return state[slots] + x  # one token for each sequence
"""


def config(
    kind: str = "hybrid", *, vocabulary: int = 96, context: int = 512, **keys: Any
) -> dict[str, Any]:
    """A native config over `PATTERNS[kind]`."""
    return {
        "model_type": "difyops_native", "width": WIDTH, "vocabulary": vocabulary,
        "context": context, "mlp_hidden": 40, "tied": True, "pattern": PATTERNS[kind], **keys,
    }  # fmt: skip


def model(
    kind: str = "hybrid", *, seed: int = 0, dtype: torch.dtype = torch.float32, **keys: Any
) -> tuple[Decoder, dict[str, Any]]:
    """A model with random weights, large enough that its words depend on what it has read."""
    keys = config(kind, **keys)
    torch.manual_seed(seed)
    made = native.build(keys).to(dtype).requires_grad_(False)
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1:
            # Tied embeddings as large as what the layers add would only say the last token again.
            parameter.normal_(std=0.5 if name == "embed.weight" else 2 * parameter.shape[1] ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval(), keys


def tokenizer(size: int = 400) -> Tokenizer:
    """A byte-level BPE with ChatML's special tokens: any text in, any tokens out."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[
            AddedToken(text, special=True, normalized=False) for text in (TEXT_END, START, END)
        ],
    )
    made.train_from_iterator(_TEXT.splitlines(), trainer)
    return made


def checkpoint(
    folder: Path, kind: str = "hybrid", *, seed: int = 0, dtype: torch.dtype = torch.float32,
    **keys: Any,
) -> Path:  # fmt: skip
    """`folder`, with everything that a server reads: weights, config, tokenizer, template."""
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer()
    words.save(str(folder / "tokenizer.json"))
    ends = [words.token_to_id(END), words.token_to_id(TEXT_END)]
    write = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE,
            "bos_token": None, "eos_token": END, "pad_token": TEXT_END,
            "clean_up_tokenization_spaces": False, "add_bos_token": False,
        },
        "generation_config.json": {"eos_token_id": ends, "pad_token_id": ends[1]},
    }  # fmt: skip
    for name, content in write.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    keys = {"vocabulary": words.get_vocab_size()} | keys
    made, config = model(kind, seed=seed, dtype=dtype, **keys)
    native.save(made, config, folder)
    return folder
