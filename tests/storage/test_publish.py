"""Nothing is published before it is on the disk: the order of system calls, against a model of a disk that loses what
was not flushed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saeflow.storage.checksums import StateError, load_state, save_state, save_tensors
from saeflow.storage.publish import beside, make_folder, publish, publish_text, remove_leftovers, writing


class Disk:
    """What has reached the disk: files and names of folders that were flushed, and renames in their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flushed: set[tuple[int, int]] = set()
        """Inode and size of what was flushed."""
        self.unsafe: list[str] = []
        """What got its name before it was flushed."""
        self.folders: list[Path] = []
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def flush(descriptor: int) -> None:
            stat = os.fstat(descriptor)
            self.flushed.add((stat.st_ino, stat.st_size))
            self.folders.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        def moved(move, source, target, **options):
            source = Path(source)
            if source.name.endswith(".partial"):
                everything = [source, *source.rglob("*")] if source.is_dir() else [source]
                states = {path: path.stat() for path in everything}
                self.unsafe += [str(path) for path, s in states.items() if (s.st_ino, s.st_size) not in self.flushed]
            move(source, target, **options)
            self.folders.append(Path(f"rename {target}"))

        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(os, "rename", lambda *a, **o: moved(rename, *a, **o))
        monkeypatch.setattr(os, "replace", lambda *a, **o: moved(replace, *a, **o))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_all_of_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, disk: Disk) -> None:
    target = tmp_path / "results/train/key"
    partial = beside(target)
    make_folder(target.parent)
    (partial / "deep/er").mkdir(parents=True)
    (partial / "deep/er/weights").write_bytes(b"x" * 5000)
    publish(partial, target)
    assert disk.unsafe == [] and (target / "deep/er/weights").read_bytes() == b"x" * 5000
    after = disk.folders[disk.folders.index(Path(f"rename {target}")) :]
    assert target.parent in after  # the name too
    assert {tmp_path, tmp_path / "results"} <= set(disk.folders)  # and those of the folders that were made


def test_a_disk_that_is_not_asked_loses_it(tmp_path: Path, disk: Disk) -> None:
    """The model tells the two apart."""
    partial = beside(tmp_path / "key")
    partial.mkdir()
    (partial / "weights").write_bytes(b"x")
    partial.rename(tmp_path / "key")
    assert str(partial / "weights") in disk.unsafe


@pytest.mark.parametrize("what", ["text", "tensors", "state", "shard", "plan", "digests", "caption"])
def test_everything_that_appears_by_a_rename_is_flushed_first(tmp_path: Path, disk: Disk, what: str) -> None:
    file = tmp_path / "folder" / "file.json"
    if what == "text":
        publish_text(file, "{}")
    elif what == "tensors":
        save_tensors(file, {"a": torch.ones(3)})
    elif what == "state":
        save_state(file, {"a": torch.ones(3)})
    elif what == "shard":
        import numpy as np

        from saeflow.activations.shards import Layout, ShardWriter

        writer = ShardWriter(file, Layout(8, 4, 16))
        writer.add(np.zeros(32, dtype=np.uint8))
        writer.close()
    elif what == "plan":
        from saeflow.planning.graph import Plan

        Plan("test", {}, {}).freeze(file)
    elif what == "digests":
        from saeflow.planning.digests import DigestCache

        cache = DigestCache(file)
        cache.file(__file__)
        cache.save()
    else:
        from saeflow.figures.captions import caption
        from saeflow.figures.registry import declared

        caption(next(iter(declared())), tmp_path, file.parent)
    assert disk.unsafe == []
    assert any(str(entry).startswith("rename ") for entry in disk.folders)
    assert disk.folders[-1] == file.parent  # its name was flushed last
    assert not list(file.parent.glob("*partial"))


def test_a_folder_replaces_another_whole(tmp_path: Path) -> None:
    for content in ("first", "second"):
        partial = beside(tmp_path / "key")
        partial.mkdir()
        (partial / content).write_text(content)
        publish(partial, tmp_path / "key")
    assert [p.name for p in tmp_path.rglob("*")] == ["key", "second"]


def test_a_folder_that_may_stay_stays(tmp_path: Path) -> None:
    for content in ("first", "second"):
        partial = beside(tmp_path / "key")
        partial.mkdir()
        (partial / content).write_text(content)
        publish(partial, tmp_path / "key", unless=lambda path: (path / "first").exists())
    assert [p.name for p in tmp_path.rglob("*")] == ["key", "first"]


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "file"
    publish_text(file, "old")
    with pytest.raises(RuntimeError), writing(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, file = socket.gethostname(), tmp_path / "a[1].json"
    names = {
        "dead": f"a[1].json.{host}-{dead.pid}.partial",
        "old": "a[1].json.partial",  # as earlier versions named them
        "elsewhere": "a[1].json.another-host-7.partial",
        "alive": f"a[1].json.{host}-{os.getppid()}.partial",
        "another": f"b.json.{host}-{dead.pid}.partial",
    }
    for name in names.values():
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / names["old"], (0, 0))
    remove_leftovers(file)
    assert {p.name for p in tmp_path.iterdir()} == {names["elsewhere"], names["alive"], names["another"]}
    remove_leftovers(file, locked=True)  # nobody else writes it
    assert {p.name for p in tmp_path.iterdir()} == {names["another"]}


# -------------------------------------------------------------------- states
def test_every_flipped_bit_of_a_state_is_found(tmp_path: Path) -> None:
    """One bit at a time, in header, values and checksum: never another value."""
    file = tmp_path / "state.safetensors"
    state = {"step": torch.tensor(7), "m": torch.arange(12, dtype=torch.bfloat16).view(3, 4), "empty": torch.ones(0)}
    save_state(file, state)
    loaded = load_state(file)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        try:
            again = load_state(file)
        except StateError as error:
            assert str(file) in str(error)
        else:  # a space of the header's padding, or the like
            assert all(torch.equal(again[name], state[name]) for name in state)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StateError):
        load_state(file)


def test_states_of_earlier_versions_open(tmp_path: Path) -> None:
    save_tensors(tmp_path / "old.safetensors", {"a": torch.arange(3)})
    assert load_state(tmp_path / "old.safetensors")["a"].tolist() == [0, 1, 2]
