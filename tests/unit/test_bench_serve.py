"""The arithmetic of `difyops bench serve`, and its order, with servers that only pretend."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from difyops import report
from difyops.bench import load, peers, serve
from difyops.bench.load import Round, Sample, percentile, prompt
from difyops.errors import DifyopsError, UsageError


@pytest.mark.parametrize("count", [1, 2, 3, 19, 100])
def test_percentiles(count: int) -> None:
    values = [(i * 37 % 101) / 7 for i in range(count)]
    assert percentile(values, 50) == pytest.approx(statistics.median(values))
    assert percentile(values, 0) == min(values)
    assert percentile(values, 100) == max(values)
    if count > 1:
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        assert percentile(values, 95) == pytest.approx(cuts[94])


def test_no_values_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


@pytest.mark.parametrize("words", [8, 9, 50, 300])
def test_prompts_differ_early_and_have_the_same_words(words: int) -> None:
    prompts = [prompt(words, seed) for seed in range(40)]
    systems = {p[0]["content"] for p in prompts}
    assert len(systems) > 35
    bags = {tuple(sorted(f"{p[0]['content']} {p[1]['content']}".split())) for p in prompts}
    assert len(bags) == 1
    assert len(next(iter(bags))) == words + 2
    assert prompt(words, 3) == prompts[3]


def test_a_sample_of_moments() -> None:
    assert load.sample(1.0, [1.5, 1.75, 2.0], 4, 9) == Sample(0.5, (0.25, 0.25), 4, 9)
    with pytest.raises(DifyopsError, match="without any text"):
        load.sample(1.0, [], 4, 9)


class PretendedServer:
    """Every token takes `pace` seconds; a template of 11 tokens, a token a word."""

    def __init__(self, name: str, pace: float, diary: list[str], end: int = 1000) -> None:
        self.name, self.pace, self.diary, self.end = name, pace, diary, end

    def measure(self, prompts: Sequence[list[load.Message]], streams: int, tokens: int) -> Round:
        self.diary.append(f"{self.name} {streams} {len(prompts)} {tokens}")
        made = min(tokens, self.end)
        samples = [
            Sample(self.pace, (self.pace,) * (made - 1), made,
                   9 + sum(len(m["content"].split()) for m in p))
            for p in prompts
        ]  # fmt: skip
        return Round(tuple(samples), self.pace * made * len(prompts) / streams)


def wanted(*urls: str, streams: Sequence[int] = (1, 8), prompt_tokens: int = 64) -> serve.Wanted:
    return serve.Wanted(None, urls, (), streams, 16, prompt_tokens, threads=1)


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    servers = {
        "a": PretendedServer("a", 0.01, said),
        "b": PretendedServer("b", 0.02, said),
        "early": PretendedServer("early", 0.02, said, end=5),
    }

    @contextmanager
    def running(url: str) -> Iterator[peers.Target]:
        if url not in servers:
            raise DifyopsError(f"{url} cannot be reached", "start it")
        yield servers[url]
        said.append(f"{url} stopped")

    monkeypatch.setattr(peers, "running", running)
    return said


def test_ratios_to_the_first(diary: list[str]) -> None:
    found = serve.run(wanted("a", "b"), report.Lines())
    assert [(r.server, r.streams, r.requests) for r in found.rows] == [
        ("a", 1, 8), ("b", 1, 8), ("a", 8, 16), ("b", 8, 16),
    ]  # fmt: skip
    assert found.rows[2].tokens_per_second == pytest.approx(800)
    assert found.ratios(found.rows[3]) == pytest.approx(
        {"tokens_per_second": 0.5, "ttft_p50": 2, "itl_p50": 2}
    )
    assert found.complete
    assert not [line for line in found.remarks() if "not comparable" in line]
    assert found.rows[0].prompt_tokens == (64, 64)


def test_the_order_is_reversed_and_warmed_up(diary: list[str]) -> None:
    serve.run(wanted("a", "b", streams=[8]), report.Lines())
    loads = [line for line in diary if not line.endswith(" 1")]  # without calibration
    assert loads == [
        "a 8 8 8", "b 8 8 8", "a 8 8 16", "b 8 8 16", "b 8 8 16", "a 8 8 16",
        "b stopped", "a stopped",
    ]  # fmt: skip


def test_a_server_that_is_missing_says_why(
    diary: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = serve.run(wanted("gone", "a", streams=[1]), report.Lines())
    assert not found.complete
    assert found.base == "a"
    report.benchmark(found)
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split() == ["1", "gone", *"--------"]
    assert shown[-1] == "gone was not measured: start: gone cannot be reached (start it)"
    rows = found.as_json()["rows"]
    assert rows[0]["ratio"] == {"tokens_per_second": None, "ttft_p50": None, "itl_p50": None}
    assert rows[1]["ratio"]["tokens_per_second"] == 1


def test_nothing_but_missing_servers_is_an_error(diary: list[str]) -> None:
    with pytest.raises(DifyopsError, match=r"nothing could be measured: .*gone"):
        serve.run(wanted("gone"), report.Lines())


def test_answers_that_ended_early_are_told(diary: list[str]) -> None:
    found = serve.run(wanted("a", "early", streams=[1]), report.Lines())
    told = [line for line in found.remarks() if line.startswith("not comparable")]
    assert told == ["not comparable: early at 1: answers of 5 to 5 tokens, and not 16"]


def test_prompts_shorter_than_the_template_are_raised(
    diary: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = serve.run(wanted("gone", "a", streams=[1], prompt_tokens=12), report.Lines())
    assert found.rows[1].prompt_tokens == (19, 19)
    said = capsys.readouterr().err
    assert "--prompt-tokens: raised to 19" in said
    assert "start: gone cannot be reached (start it)" in said  # below its cross, at once


def test_a_template_longer_than_the_prompt(diary: list[str]) -> None:
    target = PretendedServer("a", 0.01, diary)
    with pytest.raises(UsageError, match="with this chat template, 19 or more"):
        serve.calibrate(target, 12)
    assert serve.calibrate(target, 19) == load.FEWEST_WORDS
    assert serve.calibrate(target, 300) == 289


@pytest.mark.parametrize(
    ("model", "given"), [(None, ()), (None, ("llamacpp",))], ids=["nothing", "peers"]
)
def test_nothing_to_measure(model: str | None, given: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        serve.run(serve.Wanted(model, (), given, [1], 8, 64, 1), report.Lines())


def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with (
        pytest.raises(DifyopsError, match="xllamacpp is not installed") as caught,
        peers.llamacpp(peers.Path("m.gguf"), 1, 1, 256),
    ):
        pass
    assert caught.value.hint == "pip install 'difyops[demo]'"
