"""A data directory that is there is never made anew."""

from __future__ import annotations

import os

import pytest

from tests.integration.faults import load, nothing_lost, without_model


@pytest.mark.parametrize("major", ["15"])
def test_data_of_another_major(light, major):
    with nothing_lost(light.root):
        assert light("down").returncode == 0
        file = light.root / "data/postgres/PG_VERSION"
        file.write_text(f"{major}\n")
        try:
            result = light("up", "--source")
        finally:
            file.write_text("16\n")
        assert result.returncode == 3
        assert f"was made by Postgres {major}; the binaries are 16" in result.stderr
        assert "never converted" in result.stderr
        assert light("up", "--source").returncode == 0


def test_folder_that_is_not_postgres(new, standin):
    cli = new(**without_model(standin))
    data = cli.root / "data/postgres"
    data.mkdir(parents=True)
    (data / "thesis.tex").write_text("years of work")
    if user := load(cli.root).user:  # else preflight already minds whose it is
        os.chown(data, user.uid, user.gid)
        os.chown(data.parent, user.uid, user.gid)
    result = cli("up", "--source")
    assert result.returncode == 3
    assert "is not empty, but not a Postgres data directory" in result.stderr
    assert "it is left as it is" in result.stderr
    assert [p.name for p in data.iterdir()] == ["thesis.tex"]
    assert (data / "thesis.tex").read_text() == "years of work"


def test_damaged_version_file(light):
    with nothing_lost(light.root):
        assert light("down").returncode == 0
        file = light.root / "data/postgres/PG_VERSION"
        file.write_text("")
        result = light("up", "--source")
        file.write_text("16\n")
        assert result.returncode == 3
        assert "PG_VERSION" in result.stderr
        assert light("up", "--source").returncode == 0
