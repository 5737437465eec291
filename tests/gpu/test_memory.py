"""What a GPU's memory holds is what was computed."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from difyops.bench import gpu
from difyops.engine import drafters, sizing
from difyops.engine.config import LlmConfig
from difyops.engine.opening import open_llm
from difyops.engine.request import Request, SamplingParams
from difyops.engine.runner import Engine
from difyops.errors import PrerequisiteError
from tests.engine.test_exact import answers, ended
from tests.engine.test_scheduler import NoText

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

HYBRID = Path(__file__).parents[2] / "models" / "tiny-hybrid"
#: The issue's bound on the difference between what is computed and what is allocated.
WITHIN = 0.05


@pytest.mark.parametrize(
    ("states_in", "modules"), [(None, 0), (torch.bfloat16, 0), (None, 1)], ids=str
)
def test_what_is_allocated_is_what_was_computed(
    states_in: torch.dtype | None, modules: int
) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = gpu.build({**gpu.SHAPES["qwen3.5-0.8b"], "mtp_num_hidden_layers": modules})
    model.states_in = states_in
    drafter = drafters.choose("mtp", model) if modules else None
    found = sizing.needs(model, drafter, context=4096, prefill_tokens=8192)
    engine = Engine(
        model, slots=128, context=4096, pages=8000, prefill_tokens=8192, drafter=drafter
    )
    engine.warm_up()
    gc.collect()
    kept = torch.cuda.memory_allocated() - before
    wanted = found.kept(128, 8000) + sizing.GRAPHS
    print(f"kept: {kept / 2**20:.0f} MiB, computed {wanted / 2**20:.0f} MiB")
    assert abs(kept - wanted) < WITHIN * wanted
    torch.cuda.reset_peak_memory_stats()
    engine.start()
    params = SamplingParams(8, temperature=0.0)
    requests = [Request([i % 1000 for i in range(2000)], params, NoText()) for _ in range(140)]
    answers(engine, requests)
    most = torch.cuda.max_memory_allocated() - before
    total = found.kept(128, 8000) + found.work
    print(f"at most: {most / 2**20:.0f} MiB, computed {total / 2**20:.0f} MiB")
    assert most < total * (1 + WITHIN)
    ended(engine)


def test_slots_and_pages_are_what_fits() -> None:
    free, total = torch.cuda.mem_get_info()
    wanted = LlmConfig(
        id="tiny", model=str(HYBRID), device="cuda", gpu_memory_utilization=0.5, speculate="off"
    )
    llm = open_llm(wanted)
    stats = llm.engine.stats()
    assert stats.slots == sizing.MOST_SLOTS
    used = free - torch.cuda.mem_get_info()[0] + stats.prefix.budget  # type: ignore[union-attr]
    assert used < 0.5 * total
    llm.engine.stop()


def test_too_many_slots_are_refused_with_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    free, total = torch.cuda.mem_get_info()
    # Others may run on this GPU, too.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, total))
    share = (total - free + (1 << 30)) / total
    wanted = LlmConfig(
        id="tiny", model=str(HYBRID), device="cuda", slots=4096, gpu_memory_utilization=share
    )
    with pytest.raises(PrerequisiteError) as error:
        open_llm(wanted)
    assert "would fit" in str(error.value.hint)
