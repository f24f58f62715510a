"""An artifact is there if its receipt is whole and its files are what that says."""

import json
import os
import time
from pathlib import Path

import pytest

from saeflow.jobs.job import Job
from saeflow.planning.graph import Instance, Plan
from saeflow.storage.receipts import RECEIPT, DamagedError, bring_to_now, is_whole, read_receipt, set_aside, verify


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    instance = Instance("train", "key", {"seed": 3}, {}, {})
    job = Job(instance, Plan("test", {"train": {"key": instance}}, {}, results=str(tmp_path / "results")), "cpu")
    with job.writing() as folder:
        (folder / "weights.bin").write_bytes(bytes(range(256)) * 8)
        (folder / "data.zarr/c").mkdir(parents=True)
        (folder / "data.zarr/c/0").write_bytes(b"chunk")
    return job.path


def test_a_whole_artifact_is_whole(artifact: Path) -> None:
    assert is_whole(artifact)
    verify(artifact)
    held = json.loads((artifact / RECEIPT).read_text())
    files = {"config.yaml", "weights.bin", "data.zarr/c/0"}
    assert held["sizes"].keys() == held["crc32c"].keys() == held["blake2s"].keys() == files
    assert held["crc32c"]["data.zarr/c/0"] == f"{castagnoli(b'chunk'):08x}"


def castagnoli(data: bytes) -> int:
    """crc32c, bit by bit (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("torn", [b"", b"\0" * 100, b'{"stage": "train", "key": "k', b"[]", b"{}", b"\xff\xfe", b'"x"',
                                  b'{"stage": "train", "key": "key", "blake2s": {}}',
                                  b'{"stage": "train", "key": 1, "blake2s": {"config.yaml": ""}}'])  # fmt: skip
def test_a_torn_receipt_is_none(artifact: Path, torn: bytes) -> None:
    (artifact / RECEIPT).write_bytes(torn)
    assert read_receipt(artifact) is None and not is_whole(artifact)
    with pytest.raises(DamagedError, match="no whole receipt"):
        verify(artifact)


@pytest.mark.parametrize("how", ["deleted", "emptied", "cut", "longer"])
def test_sizes_tell_without_reading(artifact: Path, how: str) -> None:
    file = artifact / "weights.bin"
    data = file.read_bytes()
    file.write_bytes({"emptied": b"", "cut": data[:-1], "longer": data + b"x"}.get(how, data))
    if how == "deleted":
        file.unlink()
    assert not is_whole(artifact)
    with pytest.raises(DamagedError, match=r"weights\.bin is damaged"):
        verify(artifact)


def test_every_flipped_bit_is_found_and_its_file_named(artifact: Path) -> None:
    file = artifact / "data.zarr/c/0"
    verify(artifact)
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        assert is_whole(artifact)  # sizes do not tell
        with pytest.raises(DamagedError) as error:
            verify(artifact)
        assert str(file) in str(error.value) and f"it makes {artifact} anew" in str(error.value)


def test_what_a_job_does_not_read_is_not_verified(artifact: Path) -> None:
    (artifact / "weights.bin").write_bytes(b"x" * 2048)
    verify(artifact, ["config.yaml"])
    with pytest.raises(DamagedError):
        verify(artifact, ["weights.bin"])


def test_what_has_been_verified_is_not_read_again(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify(artifact)
    monkeypatch.setattr("saeflow.storage.receipts.crc32c", lambda file: pytest.fail(f"read {file} again"))
    verify(artifact)
    os.utime(artifact / "config.yaml")
    with pytest.raises(pytest.fail.Exception):
        verify(artifact)


def test_artifacts_of_earlier_versions_are_whole_and_verified(artifact: Path) -> None:
    held = json.loads((artifact / RECEIPT).read_text())
    del held["sizes"], held["crc32c"]
    (artifact / RECEIPT).write_text(json.dumps(held))
    assert is_whole(artifact)
    verify(artifact)
    file = artifact / "weights.bin"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    with pytest.raises(DamagedError):
        verify(artifact)


def test_what_is_set_aside_counts_as_missing(artifact: Path) -> None:
    assert set_aside(artifact) and not is_whole(artifact) and not (artifact / RECEIPT).exists()
    assert not set_aside(artifact)


def test_receipts_come_back_from_the_future_and_keep_the_past(tmp_path: Path) -> None:
    now = time.time()
    times = {"ahead": now + 7200, "past": now - 7200}
    for name, when in times.items():
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (when, when))
    bring_to_now([tmp_path / name for name in (*times, "gone")])
    found = {name: (tmp_path / name).stat().st_mtime for name in times}
    assert now - 1 < found["ahead"] <= time.time() and found["past"] == pytest.approx(times["past"])
