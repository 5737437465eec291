"""difyops.yaml: what is wrong is said with its place, what was expected and the remedy."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from difyops import settings
from difyops.errors import UsageError


def problem(tmp_path: Path, text: str | bytes) -> tuple[str, str]:
    """The message and the hint with which a file is refused."""
    path = tmp_path / "difyops.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        settings.load(path)
    assert caught.value.exit_code == 2
    lines = caught.value.message.splitlines()
    assert 1 <= len(lines) <= 4
    assert all(len(line) < 200 and "difyops.yaml" in line for line in lines)
    assert "pydantic" not in caught.value.message
    return caught.value.message, caught.value.hint or ""


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "{}\n", "\ufeff"])
def test_an_empty_file_means_all_defaults(tmp_path: Path, text: str) -> None:
    path = tmp_path / "difyops.yaml"
    path.write_text(text, encoding="utf-8")
    assert settings.load(path) == settings.Settings()


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("postgress: {}", "postgress: unknown key", "did you mean `postgres`?"),
        ("model: {backen: external}", "model.backen: unknown key", "did you mean `backend`?"),
        ("model: {xyzzy: 1}", "model.xyzzy: unknown key", "known keys: backend, name, source"),
        (
            "postgres: {provider: weel}",
            "postgres.provider: should be 'wheel', 'system', 'tarball' or 'external', not 'weel'",
            "did you mean `wheel`?",
        ),
        ("mode: 3", "mode: should be 'compose' or 'source', not 3", ""),
        ("mode: sorce", "mode: should be", "did you mean `source`?"),
        ("dify: {port: 0}", "dify.port: should be greater than or equal to 1, not 0", ""),
        ("dify: {port: 65536}", "dify.port: should be less than or equal to 65535", ""),
        ("dify: {port: '5001'}", "dify.port: should be a valid integer, not '5001'", ""),
        ("dify: {port: yes}", "dify.port: should be a valid integer, not true", ""),
        ("dify: {port: 5001.0}", "dify.port: should be a valid integer, not 5001.0", ""),
        ("dify: {port: }", "dify.port: should be a valid integer, not empty", ""),
        ("dify: {enabled: 'no'}", "dify.enabled: should be a valid boolean, not 'no'", ""),
        ("model: {context: 255}", "model.context: should be greater than or equal to 256", ""),
        ("model: {source: ./m}", "model: model.source is only for backend native", ""),
        ("model: [llamacpp]", "model: should be a mapping of keys, not a list", ""),
        ("model: small", "model: should be a mapping of keys, not 'small'", ""),
        ("model:\n", "model: should be a mapping of keys, not empty", "remove `model:`"),
        ("- dify\n- model", "should be a mapping of keys, not a list", "mode: source"),
        ("just words", "should be a mapping of keys, not 'just words'", "mode: source"),
        ("1: 2", "1: keys should be strings", ""),
        ("mirrors: {git: []}", "mirrors.git: list should have at least 1 item", ""),
        ("mirrors: {git: https://x}", "mirrors.git: should be a valid list", ""),
        ("admin: {email: nobody}", "admin.email: string should match pattern", ""),
        ("run_as: 1000", "run_as: should be text, not 1000", 'run_as: "…"'),
        # A number where a text was meant: YAML has lost what was written.
        ("dify: {version: 0.15}", "dify.version: should be text, not 0.15", 'version: "…"'),
        ("dify: {env: {DEBUG: true}}", "dify.env.DEBUG: should be text, in quotes", 'DEBUG: "…"'),
        ("dify: {env: {N: 3}}", "dify.env.N: should be text, in quotes", 'N: "…"'),
        ("dify: {env: {N: }}", "dify.env.N: should be text, in quotes", 'N: "…"'),
        ("dify: {env: [A=1]}", "dify.env: should be a mapping of keys, not a list", ""),
        ("dify: {env: {A-B: x}}", "dify.env: 'A-B' is not the name of an environment var", ""),
        ('dify: {env: {A: "x\\ny"}}', "dify.env: A: should be one line", ""),
        # Keys that belong to a provider.
        ("model: {backend: external}", "backend external needs model.url", ""),
        ("model: {url: 'http://x/v1'}", "model.url is only for backend external", ""),
        ("postgres: {provider: external}", "provider external needs postgres.dsn", ""),
        ("postgres: {dsn: 'postgresql://h/d'}", "postgres.dsn is only for provider external", ""),
        ("postgres: {provider: tarball}", "provider tarball needs postgres.tarball", ""),
        ("postgres: {tarball: /x}", "postgres.tarball is only for provider tarball", ""),
        ("postgres: {bin: /usr/bin}", "postgres.bin is only for provider system", ""),
        ("redis: {provider: external}", "redis.url belongs to provider external", ""),
        ("redis: {url: 'redis://h'}", "redis.url belongs to provider external", ""),
        # Ports of services that run here.
        ("dify: {port: 8090}", "model.port and dify.port are both 8090", ""),
        ("postgres: {port: 6389}", "redis.port and postgres.port are both 6389", ""),
        # URLs.
        ("dify: {base_url: localhost}", "dify.base_url: should be an http:// or https:// URL", ""),
        ("dify: {base_url: 'http://'}", "dify.base_url: should look like", ""),
        ("dify: {base_url: 'http://a b/'}", "dify.base_url: should look like", ""),
        ("dify: {base_url: 'http://[::1'}", "dify.base_url: should look like", ""),
        ("dify: {base_url: 'http://h:99999'}", "dify.base_url: should look like", ""),
        ("dify: {base_url: 'http://h/?a=b'}", "what stands after ? or # is not read", ""),
        ("redis: {provider: external, url: 'http://h'}", "redis.url: should look like redis", ""),
        ("redis: {provider: external, url: 'redis://h/3'}", "without a database number", ""),
        ("postgres: {provider: external, dsn: 'mysql://h/d'}", "postgres.dsn: should look", ""),
    ],
)
def test_a_wrong_setting(tmp_path: Path, text: str, said: str, hint: str) -> None:
    message, remedy = problem(tmp_path, text)
    assert said in message
    assert hint in remedy
    assert bool(hint) <= bool(remedy)


@pytest.mark.parametrize(
    "text",
    [
        "dify: {base_url: 'https://me:hunter2@h'}",
        "dify: {source: 'https://me:hunter2@git.example/dify@0.15.3'}",
        "model: {backend: external, url: 'http://me:hunter2@h/v1'}",
        "embedding: {url: 'http://hunter2@h/v1'}",
        "postgres: {provider: external, dsn: 'postgresql://u:hunter2@h/d'}",
        "postgres: {provider: external, dsn: 'postgresql://h/d?password=hunter2'}",
        "postgres: {provider: external, dsn: 'postgresql://u:hunter2/@h/d'}",
        "redis: {provider: external, url: 'redis://:hunter2@h:6379'}",
        "mirrors: {pypi: 'https://me:hunter2@h/simple'}",
        "mirrors: {git: ['https://me:hunter2@h/dify']}",
        "dify: {env: {SMTP_PASSWORD: [hunter2]}}",
        'dify: {env: {SMTP_PASSWORD: "hunter2\\n"}}',
    ],
)
def test_a_secret_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    message, hint = problem(tmp_path, text)
    assert "hunter2" not in message + hint


def test_a_number_that_is_a_password_is_not_repeated(tmp_path: Path) -> None:
    assert "271828" not in "".join(problem(tmp_path, "dify: {env: {SMTP_PASSWORD: 271828}}"))


def test_several_mistakes_are_said_at_once(tmp_path: Path) -> None:
    message, _ = problem(tmp_path, "a: 1\nb: 2\nc: 3\nd: 4\nmode: x\n")
    assert message.splitlines()[-1] == "difyops.yaml: and 2 more"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dify: {port: 5001\nmodel: {}", "line 2, column"),
        ("dify:\n\tport: 5001", "line 2, column 1: found character '\\t'"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("mode: source\n---\nmode: source", "line 2, column 1: but found another document"),
        ("dify: !!python/object:os.system {}", "line 1, column 7: could not determine"),
        ("mode: 'a\x00b'", "line 1: the character U+0000 cannot stand in YAML"),
        ("mode: source\ndify: {}\nmode: compose", "line 3, column 1: `mode` is there twice (first"),
        ("dify:\n  port: 1\n  port: 2", "line 3, column 3: `port` is there twice"),
        ("? [a]\n: b", "line 1, column 3: a key should be one word"),
        ("dify: {port: 05001}", "line 1, column 14: 05001 is not a plain decimal number"),
        ("dify: {port: 80:30}", "80:30 is not a plain decimal number"),
        ("dify: {port: " + "9" * 5000 + "}", "is not a plain decimal number"),
        ("dify: {port: 0x10}", "0x10 is not a plain decimal number"),
        ("dify: &d {port: 1}\nmodel: *d", "line 2, column 8: aliases are not read here"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_yaml_that_is_broken_or_means_something_else(tmp_path: Path, text: str, said: str) -> None:
    message, hint = problem(tmp_path, text)
    assert said in message
    assert hint


def test_not_utf8(tmp_path: Path) -> None:
    message, _ = problem(tmp_path, "# héllo".encode("latin-1"))
    assert message == "difyops.yaml: not UTF-8 at byte 3"


@pytest.mark.parametrize("merge", [False, True])
def test_a_billion_laughs_are_refused_at_once(tmp_path: Path, merge: bool) -> None:
    lines = ["a0: &a0 {x: ha}"]
    for n in range(1, 40):
        many = ", ".join([f"*a{n - 1}"] * 10)
        lines.append(f"a{n}: &a{n} {{<<: [{many}]}}" if merge else f"a{n}: &a{n} [{many}]")
    began = time.monotonic()
    message, _ = problem(tmp_path, "\n".join(lines))
    assert "aliases are not read here" in message
    assert time.monotonic() - began < 1


def test_a_directory_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "difyops.yaml").mkdir()
    with pytest.raises(UsageError, match=r"difyops\.yaml cannot be read: Is a directory"):
        settings.load(tmp_path / "difyops.yaml")


def test_ports_of_what_runs_elsewhere_do_not_count() -> None:
    settings.parse({"dify": {"enabled": False, "port": 5442}})
    settings.parse({"redis": {"provider": "external", "url": "redis://h", "port": 5442}})
    elsewhere = {"backend": "external", "url": "http://h/v1", "port": 5442}
    settings.parse({"model": elsewhere, "embedding": None})
    with pytest.raises(UsageError, match=r"postgres\.port and model\.port are both 5442"):
        settings.parse({"model": elsewhere})  # the embedding is still served here


def test_urls_lose_their_last_slash_and_keep_their_path() -> None:
    found = settings.parse({"dify": {"base_url": "https://ai.example/dify/"}})
    assert found.dify.url == "https://ai.example/dify"
    assert settings.Settings().dify.url == "http://localhost:5001"
