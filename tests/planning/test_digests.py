"""Digests: of content, in every writing of the same value, and remembered only while a file is untouched."""

import hashlib
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeflow.planning.digests import DigestCache, canonical, file_digest, short_hash

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def reordered(value):
    """The same value with the keys of every mapping in the other order."""
    if isinstance(value, dict):
        return {k: reordered(v) for k, v in reversed(value.items())}
    return [reordered(v) for v in value] if isinstance(value, list) else value


@given(PLAIN)
def test_canonical_text_is_one_for_every_order_of_keys_and_reads_back(value):
    assert canonical(reordered(value)) == canonical(value)
    assert json.loads(canonical(value)) == value


@given(PLAIN, PLAIN)
def test_hashes_are_equal_exactly_for_equal_texts(a, b):
    assert (short_hash(a, 32) == short_hash(b, 32)) == (canonical(a) == canonical(b))


def test_hash_is_pinned():
    """A change here renames every artifact on every disk."""
    assert canonical({"b": [1, 2.5, None], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.5,null]}'
    text = b'{"a":1}'
    assert short_hash({"a": 1}) == hashlib.blake2s(text, digest_size=4).hexdigest() == short_hash({"a": 1}, 8)
    assert short_hash({"a": 1}, 32) == hashlib.blake2s(text, digest_size=16).hexdigest()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_json_is_refused(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical([value])


@given(st.binary(max_size=3000))
def test_file_digest_is_the_digest_of_its_bytes(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("digest") / "file"
    file.write_bytes(data)
    assert file_digest(file) == hashlib.blake2s(data, digest_size=16).hexdigest()


# -------------------------------------------------------------------- the cache
def counting(monkeypatch) -> list[str]:
    """The names of the files that are hashed from here on."""
    hashed: list[str] = []
    monkeypatch.setattr("saeflow.planning.digests.file_digest", lambda p: hashed.append(Path(p).name) or file_digest(p))
    return hashed


def test_untouched_file_is_hashed_once_also_by_later_processes(tmp_path, monkeypatch):
    hashed = counting(monkeypatch)
    (tmp_path / "weights").write_bytes(b"abc")
    cache = DigestCache(tmp_path / "cache" / "digests.json")
    assert cache.file(tmp_path / "weights") == cache.file(tmp_path / "weights") == file_digest(tmp_path / "weights")
    cache.save()
    assert DigestCache(tmp_path / "cache" / "digests.json").file(tmp_path / "weights") == cache.file(
        tmp_path / "weights"
    )
    assert hashed == ["weights"]
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_flipped_bit_is_seen_even_with_the_old_time_of_modification(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(1000))
    cache = DigestCache(tmp_path / "digests.json")
    before, stat = cache.file(file), file.stat()
    with open(file, "r+b") as opened:
        opened.seek(500)
        opened.write(b"\x01")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns and file.stat().st_size == stat.st_size
    assert cache.file(file) != before


def test_replaced_and_linked_files_are_followed(tmp_path):
    for name, data in (("old", b"1"), ("new", b"2")):
        (tmp_path / name).write_bytes(data)
    link = tmp_path / "link"
    link.symlink_to("old")
    cache = DigestCache(None)
    assert cache.file(link) == file_digest(tmp_path / "old")
    link.unlink()
    link.symlink_to("new")
    assert cache.file(link) == file_digest(tmp_path / "new")


def test_torn_cache_only_costs_hashing_again(tmp_path, monkeypatch):
    (tmp_path / "weights").write_bytes(b"abc")
    (tmp_path / "digests.json").write_text('{"/some/file": [[1,')
    cache = DigestCache(tmp_path / "digests.json")
    assert cache.file(tmp_path / "weights") == file_digest(tmp_path / "weights")
    cache.save()
    hashed = counting(monkeypatch)
    DigestCache(tmp_path / "digests.json").file(tmp_path / "weights")
    assert hashed == []


def test_cache_that_learnt_nothing_is_not_written(tmp_path):
    DigestCache(tmp_path / "digests.json").save()
    DigestCache(None).save()
    assert not list(tmp_path.iterdir())


def test_digest_of_a_folder_is_of_names_and_contents_alone(tmp_path):
    def digest(**files: bytes) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        root.mkdir()
        for name, data in files.items():
            (root / name).write_bytes(data)
        return DigestCache(None).files(root, [root / name for name in files])

    first = digest(a=b"1", b=b"2")
    assert digest(b=b"2", a=b"1") == first
    assert len({first, digest(a=b"2", b=b"1"), digest(a=b"1", c=b"2"), digest(a=b"1"), digest(a=b"12", b=b"")}) == 5
