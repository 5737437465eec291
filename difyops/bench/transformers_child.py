"""transformers' `generate` in a process of its own: `python -m difyops.bench.transformers_child`.

Protocol: JSON lines. The first on stdin is `Orders`; once loaded, `{"ready": true}` goes to stdout.
Then each `{"prompts": [messages…], "tokens": N}` is answered by `{"prompt_tokens": [n…],
"moments": [seconds…]}`: one batch, greedy, exactly N tokens each, and when each step was over. An
`{"error": …}` answers what cannot be done. The end of stdin means stop.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, TypedDict


class Orders(TypedDict):
    """`weights` is a GGUF file or a directory in Hugging Face's layout."""

    weights: str
    threads: int


class Generator:
    """A model in float32 and its tokenizer."""

    def __init__(self, orders: Orders) -> None:
        import torch

        transformers = importlib.import_module("transformers")
        torch.set_num_threads(orders["threads"])
        path = Path(orders["weights"])
        # Nothing is looked for outside: the weights are on this machine.
        where: dict[str, Any] = {"local_files_only": True}
        if path.is_dir():
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, **where
            )
        else:
            where["gguf_file"] = path.name
            path = path.parent
            self.model = _of_gguf(path, where)
        self.model.eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, padding_side="left", **where
        )

    def generate(self, prompts: list[Any], tokens: int) -> dict[str, Any]:
        """-> the lengths of the prompts in tokens, and the seconds from the beginning (the template
        and the tokenizer are part of it, as they are for a server) to the end of each step."""
        import torch

        moments: list[float] = []

        def on_step(*_: Any, **__: Any) -> Any:
            moments.append(time.perf_counter() - began)
            return torch.zeros(len(prompts), dtype=torch.bool)

        began = time.perf_counter()
        batch = self.tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        self.model.generate(
            **batch,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            stopping_criteria=[on_step],
        )
        return {"prompt_tokens": batch["attention_mask"].sum(1).tolist(), "moments": moments}


def _of_gguf(folder: Path, where: dict[str, Any]) -> Any:
    """The dequantised tensors in a model made from the file's metadata. `from_pretrained` would do
    the same, but needs accelerate for it."""
    import torch

    transformers = importlib.import_module("transformers")
    gguf = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    config = transformers.AutoConfig.from_pretrained(folder, **where)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    file = str(folder / where["gguf_file"])
    found = gguf.load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(found["tensors"], strict=False)
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise ValueError(f"tensors differ: {sorted({*unexpected, *missing} - tied)[:5]}")
    model.tie_weights()
    return model


def main() -> None:
    # Ctrl-C is for the parent to act on: it closes our stdin, or kills.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # From here on a stray print of a library cannot break the protocol.
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        generator = Generator(json.loads(sys.stdin.readline()))
        answer({"ready": True})
        for line in sys.stdin:
            answer(generator.generate(**json.loads(line)))
    except Exception as error:
        said = next(iter(str(error).splitlines()), "")
        answer({"error": f"{type(error).__name__}: {said[:300]}"})


if __name__ == "__main__":
    main()
