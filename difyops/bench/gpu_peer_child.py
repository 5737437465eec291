"""transformers or vLLM with random weights, in a process of its own:
`python -m difyops.bench.gpu_peer_child`.

Protocol: JSON lines. The first on stdin is `Orders`; once the model stands, `{"ready": true,
"with": "…"}` goes to stdout. Then each `{"sequences": B, "length": T, "tokens": N}` is answered by
`{"seconds": s}`: one batch of B random prompts of T tokens each, read and answered greedily by
exactly N tokens. An `{"error": …}` answers what cannot be done. The end of stdin means stop.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypedDict

#: Of the GPU's memory; the rest is the parent's, whose model waits meanwhile.
_SHARE = 0.6
#: Packages that make transformers faster where it finds them.
_FASTER = {"fla": "fla-core", "causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm"}
_ARCHITECTURES = {"qwen3_5_text": "Qwen3_5ForCausalLM", "mamba2": "Mamba2ForCausalLM"}


class Orders(TypedDict):
    """`config` is a config.json; `context` is the most tokens of a prompt with its answer."""

    peer: str
    config: Mapping[str, Any]
    context: int
    device: str


class Peer(Protocol):
    about: str

    def generate(self, sequences: int, length: int, tokens: int) -> float:
        """Seconds."""
        ...


class Transformers:
    def __init__(self, orders: Orders) -> None:
        import torch

        transformers = importlib.import_module("transformers")
        config = dict(orders["config"])
        made = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
        with torch.device(orders["device"]):
            model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
        self._model = model.eval()
        self._device = orders["device"]
        self._vocabulary = made.vocab_size
        self.about = _versions("transformers", *_FASTER)

    def generate(self, sequences: int, length: int, tokens: int) -> float:
        import torch

        prompts = torch.randint(self._vocabulary, (sequences, length), device=self._device)
        began = time.perf_counter()
        with torch.inference_mode():
            answers = self._model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers.tolist()  # waits for the GPU
        return time.perf_counter() - began


class Vllm:
    def __init__(self, orders: Orders) -> None:
        config = dict(orders["config"])
        self._vllm = importlib.import_module("vllm")
        with tempfile.TemporaryDirectory() as folder:
            config["architectures"] = [_ARCHITECTURES[config["model_type"]]]
            Path(folder, "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
            self._model = self._vllm.LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype="bfloat16",
                max_model_len=orders["context"],
                max_num_seqs=256,
                enable_prefix_caching=False,
                gpu_memory_utilization=_SHARE,
            )
        self._vocabulary = config["vocab_size"]
        self.about = _versions("vllm")

    def generate(self, sequences: int, length: int, tokens: int) -> float:
        from random import randrange

        prompts = [
            {"prompt_token_ids": [randrange(self._vocabulary) for _ in range(length)]}  # noqa: S311
            for _ in range(sequences)
        ]
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        self._model.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began


PEERS: Mapping[str, tuple[str, type[Transformers] | type[Vllm]]] = {
    "transformers": ("transformers", Transformers),
    "vllm": ("vllm", Vllm),
}


def _versions(*modules: str) -> str:
    there = [_FASTER.get(m, m) for m in modules if importlib.util.find_spec(m) is not None]
    absent = [_FASTER.get(m, m) for m in modules if importlib.util.find_spec(m) is None]
    said = ", ".join(f"{name} {version(name)}" for name in there)
    return f"{said}; without {', '.join(absent)}" if absent else said


def main() -> None:
    # Ctrl-C is for the parent to act on: it closes our stdin, or kills.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # From here on a stray print of a library cannot break the protocol.
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    def failed(error: Exception) -> None:
        said = next(iter(str(error).splitlines()), "")
        answer({"error": f"{type(error).__name__}: {said[:300]}"})

    try:
        orders: Orders = json.loads(sys.stdin.readline())
        peer: Peer = PEERS[orders["peer"]][1](orders)
    except Exception as error:
        return failed(error)
    answer({"ready": True, "with": peer.about})
    for line in sys.stdin:
        try:
            answer({"seconds": peer.generate(**json.loads(line))})
        except Exception as error:  # too large for the memory: smaller ones may still be asked for
            failed(error)


if __name__ == "__main__":
    main()
