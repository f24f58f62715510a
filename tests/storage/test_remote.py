"""A bucket on a real S3 server: read whole or not at all, whatever stands between."""

import json
import logging
import re
import sys
import threading
import urllib.request
from pathlib import Path

import obstore
import pytest
from bucket import KEY_ID, SECRET, Proxy
from stores import contents, write_receipt

from saeflow.storage import remote as remote_module
from saeflow.storage import transfer
from saeflow.storage.receipts import RECEIPT, DamagedError, is_whole
from saeflow.storage.remote import BadReadError, Remote, RemoteError, Stat

DATA = bytes(range(256)) * 400
PLACE = "s3://lab/some/folder"


def put(path: str, content: bytes, tmp_path: Path) -> Remote:
    file = tmp_path / "file"
    file.write_bytes(content)
    remote = Remote(PLACE)
    remote.upload(file, path)
    return remote


def first(n: int, fault: str, method: str = "GET"):
    """The first n requests of a method have the fault."""
    left = [n]

    def of_request(asked: str, path: str, number: int) -> str:
        if asked == method and left[0] > 0:
            left[0] -= 1
            return fault
        return ""

    return of_request


@pytest.mark.parametrize("fault", ["drop", "silent", "busy", "lost", "short"])
def test_what_is_read_is_whole_whatever_happens_on_the_way(s3: Proxy, tmp_path: Path, fault: str) -> None:
    remote = put("one", DATA, tmp_path)
    for read in (lambda: remote.read("one", 1000, 50_000).tobytes(), lambda: remote.tail("one", 50_000)[1].tobytes()):
        s3.fault = first(2, fault)
        assert read() in (DATA[1000:51_000], DATA[-50_000:])
    s3.fault = first(2, fault)
    assert remote.get("one") == DATA
    s3.fault = first(1, fault, "PUT")
    assert put("two", DATA[:100], tmp_path).get("two") == DATA[:100]


def test_uploads_of_several_parts_are_tried_again(s3: Proxy, tmp_path: Path) -> None:
    s3.fault = lambda method, path, n: {1: "busy", 2: "lost", 4: "drop"}.get(n, "")
    big = DATA * 200
    remote = put("big", big, tmp_path)
    assert remote.read("big", 0, len(big)).tobytes() == big
    assert remote.stat("big").n_bytes == len(big)


def test_a_read_is_of_exactly_what_was_asked_for(s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = put("one", DATA, tmp_path)
    monkeypatch.setattr(remote_module, "PIECE", 7000)
    assert remote.read("one", 3, 20_001).tobytes() == DATA[3:20_004]
    for start, length in ((len(DATA) - 10, 11), (len(DATA) + 5, 10)):
        with pytest.raises(RemoteError, match="s3://lab/some/folder/one"):
            remote.read("one", start, length)
    s3.fault = lambda method, path, n: "short"
    with pytest.raises(BadReadError, match="5 times: push it again"):
        remote.read("one", 0, 100)


def test_what_is_not_there_is_none(s3: Proxy) -> None:
    remote = Remote(PLACE)
    assert remote.get("no") is None and remote.stat("no") is None and remote.tail("no", 10) is None
    with pytest.raises(FileNotFoundError):
        remote.read("no", 0, 10)
    remote.delete("no")
    assert list(remote.names()) == []
    remote.check()


def test_a_server_that_stays_away_ends_in_one_sentence(
    s3: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put("one", DATA, tmp_path)
    s3.fault = lambda method, path, n: "busy"
    with caplog.at_level(logging.WARNING), pytest.raises(RemoteError) as raised:
        Remote(PLACE, patience=1.0).get("one")
    said = str(raised.value)
    assert re.fullmatch(
        rf"{PLACE}/one at {s3.url}: the server answered 503; tried \d+ times in \d+ s\. See whether .*", said
    )
    assert any("trying again in" in record.message for record in caplog.records)
    s3.fault = lambda method, path, n: "silent"
    with pytest.raises(RemoteError, match="no whole answer within 1 s"):
        Remote(PLACE, patience=0.5).get("one")


def test_what_no_try_would_change_is_said_at_once(s3: Proxy, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RemoteError, match=r"s3://nobody-has-this/x at .*there is no such bucket; make it, or correct"):
        Remote("s3://nobody-has-this/x").check()
    auth = urllib.request.Request(
        f"{s3_server}/moto-api/reset-auth", data=b"0", method="POST", headers={"Content-Type": "text/plain"}
    )
    urllib.request.urlopen(auth, timeout=60).close()
    try:
        for ask in (lambda r: r.check(), lambda r: r.get("one"), lambda r: r.put_new("one", b"1")):
            asked = len(s3.requests)
            with pytest.raises(RemoteError, match=r"403.*set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") as raised:
                ask(Remote(PLACE))
            assert len(s3.requests) == asked + 1
            assert KEY_ID not in str(raised.value) and SECRET not in str(raised.value)
    finally:
        auth.data = b"1000000"
        urllib.request.urlopen(auth, timeout=60).close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(RemoteError, match=r"at http://127\.0\.0\.1:9: no connection; tried \d+ times"):
        Remote(PLACE, patience=0.3).check()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{SECRET}@127.0.0.1:9")
    with pytest.raises(RemoteError, match="tried") as raised:
        Remote(PLACE, patience=0.3).check()
    assert SECRET not in str(raised.value)


def test_no_credentials_are_said_at_once(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # of a machine that is none of Amazon's
    with pytest.raises(RemoteError, match="no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        Remote(PLACE).check()
    assert s3.requests == []


def test_credentials_are_in_no_message(s3: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    for text in (f"Generic S3 error: {SECRET} and {KEY_ID}", f"<Code>X{KEY_ID}</Code> status code: 500 {SECRET}"):
        said = remote_module.in_words(RuntimeError(text))
        assert SECRET not in said and KEY_ID not in said
    remote = Remote(PLACE)
    assert SECRET not in f"{remote!r} {remote._store!r} {remote.name('x')}"


@pytest.mark.parametrize(
    "url", ["lab/x", "http://lab/x", "s3://", "s3://a", "s3://lab/../x", "s3://me:key@lab/x", "s3://lab//x", "s3://lab/a?b"]
)  # fmt: skip
def test_no_place_is_refused(url: str) -> None:
    with pytest.raises(RemoteError, match="is no place in a bucket: use s3://bucket"):
        Remote(url)


def test_without_obstore_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(
        RemoteError, match=r"needs obstore, which is not installed here: pip install 'saeflow\[remote\]'"
    ):
        Remote(PLACE)


def test_the_first_to_put_has_put(s3: Proxy) -> None:
    remote = Remote(PLACE)
    assert remote.put_new("one", b"first") is None
    assert remote.put_new("one", b"second") == b"first"
    s3.fault = first(1, "lost", "PUT")
    assert remote.put_new("two", b"mine") is None
    assert remote.get("two") == b"mine"


# -------------------------------------------------------------------- artifacts
def artifact(folder: Path, weights: bytes = DATA) -> Path:
    (folder / "tokens.zarr" / "c").mkdir(parents=True)
    (folder / "sae_weights.safetensors").write_bytes(weights)
    (folder / "tokens.zarr" / "c" / "0").write_bytes(DATA[:999])
    (folder / "empty").touch()
    write_receipt(folder, "train")
    receipt = folder / RECEIPT
    receipt.write_text(json.dumps(json.loads(receipt.read_text()), indent=1) + "\n")
    return folder


def test_an_artifact_goes_and_comes_back_byte_for_byte(s3: Proxy, tmp_path: Path) -> None:
    here, there = artifact(tmp_path / "here"), Remote(f"{PLACE}/train/one")
    s3.fault = lambda method, path, n: {2: "busy", 5: "lost", 9: "drop", 12: "short", 14: "busy"}.get(n, "")
    assert transfer.push(there, here) == "pushed"
    assert s3.requests[-1] == ("PUT", f"/lab/some/folder/train/one/{RECEIPT}")  # last of all
    assert transfer.push(there, here) == "there"
    first_of_pull = len(s3.requests)
    s3.fault = lambda method, path, n: {1: "busy", 3: "drop", 4: "short", 6: "lost"}.get(n - first_of_pull, "")
    assert transfer.pull(there, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(here)
    assert list(transfer.damaged(there)) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "here"]


def test_half_a_push_is_nothing_and_goes_on(s3: Proxy, tmp_path: Path) -> None:
    here, there = artifact(tmp_path / "here"), Remote(f"{PLACE}/train/one", patience=0.1)
    s3.fault = lambda method, path, n: "busy" if "weights" in path else ""
    with pytest.raises(RemoteError, match="503"):
        transfer.push(there, here)
    s3.fault = lambda method, path, n: ""
    assert there.stat("config.yaml") is not None or there.stat("empty") is not None
    assert not transfer.pull(there, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    known = {name for name, _ in there.names()}
    s3.requests.clear()
    assert transfer.push(there, here) == "pushed"
    put_again = {path.rsplit("/one/")[1] for method, path in s3.requests if method == "PUT"}
    assert not put_again & known and "sae_weights.safetensors" in put_again


def test_half_a_pull_is_nothing(s3: Proxy, tmp_path: Path) -> None:
    here, there = artifact(tmp_path / "here"), Remote(f"{PLACE}/train/one", patience=0.1)
    transfer.push(there, here)
    s3.fault = lambda method, path, n: "busy" if "weights" in path else ""
    with pytest.raises(RemoteError, match="503"):
        transfer.pull(there, tmp_path / "back")
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "long"])
def test_damage_in_the_bucket_is_found(s3: Proxy, tmp_path: Path, damage: str) -> None:
    here, there = artifact(tmp_path / "here"), Remote(f"{PLACE}/train/one")
    transfer.push(there, here)
    name, held = "sae_weights.safetensors", bytearray(DATA)
    held[5] ^= 1
    other = {"flip": bytes(held), "cut": DATA[:-1], "long": DATA + b"0", "gone": b""}[damage]
    there.delete(name)
    if damage != "gone":
        there.put_new(name, other)
    with pytest.raises(RemoteError, match=f"{name} at .* is damaged .*push it again from where it is whole"):
        transfer.pull(there, tmp_path / "back")
    assert [p.name for p in tmp_path.iterdir()] == ["here"]
    ((found, why),) = transfer.damaged(there)
    assert found == name and why
    there.delete(RECEIPT)
    transfer.push(there, here)  # what the receipt's removal allows: it is put again
    assert list(transfer.damaged(there)) == []


def test_a_bit_flipped_on_the_way_is_read_again(s3: Proxy, tmp_path: Path) -> None:
    here, there = artifact(tmp_path / "here"), Remote(f"{PLACE}/train/one")
    transfer.push(there, here)
    flips = iter(["flip", "flip"])
    s3.fault = lambda method, path, n: next(flips, "") if method == "GET" and "weights" in path else ""
    assert transfer.pull(there, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(here)
    flips = iter(["flip", "flip"])
    assert list(transfer.damaged(there)) == []


def test_two_pushes_at_once_make_one_artifact(s3: Proxy, tmp_path: Path) -> None:
    places = [artifact(tmp_path / name / "one") for name in ("a", "b")]
    receipts = [json.loads((place / RECEIPT).read_text()) for place in places]
    for receipt, place, host in zip(receipts, places, ("a", "b"), strict=True):  # times and hosts differ, bytes do not
        (place / RECEIPT).write_text(json.dumps({**receipt, "host": host}))
    results: list[str] = []
    push = lambda place: results.append(transfer.push(Remote(f"{PLACE}/train/one"), place))  # noqa: E731
    threads = [threading.Thread(target=push, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) in (["pushed", "there"], ["there", "pushed"])
    there = Remote(f"{PLACE}/train/one")
    assert transfer.pull(there, tmp_path / "back") and list(transfer.damaged(there)) == []
    assert is_whole(tmp_path / "back")


def test_other_bytes_of_one_key_are_not_mixed(s3: Proxy, tmp_path: Path) -> None:
    there = Remote(f"{PLACE}/train/one")
    transfer.push(there, artifact(tmp_path / "a" / "one"))
    with pytest.raises(ValueError, match="with other bytes than here"):
        transfer.push(there, artifact(tmp_path / "b" / "one", weights=DATA[::-1]))
    assert there.get("sae_weights.safetensors") == DATA


def test_what_is_damaged_here_is_not_pushed(s3: Proxy, tmp_path: Path) -> None:
    here, there = artifact(tmp_path / "here"), Remote(f"{PLACE}/train/one")
    (here / "sae_weights.safetensors").write_bytes(DATA[::-1])
    with pytest.raises(DamagedError):
        transfer.push(there, here)
    assert list(there.names()) == []


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "a\\..\\x", "./x", ""])
def test_a_receipt_that_points_outside_is_refused(s3: Proxy, tmp_path: Path, name: str) -> None:
    receipt = json.loads((artifact(tmp_path / "here") / RECEIPT).read_text())
    receipt["sizes"][name], receipt["crc32c"][name] = 1, "00000000"
    there = Remote(f"{PLACE}/train/one")
    there.put_new(RECEIPT, json.dumps(receipt).encode())
    with pytest.raises(RemoteError, match="is no whole receipt"):
        transfer.pull(there, tmp_path / "back")
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_what_other_tools_put_has_no_checksum(s3: Proxy, tmp_path: Path) -> None:
    there = Remote(PLACE)
    obstore.put(there._store, "one", DATA)
    assert there.stat("one") == Stat(len(DATA), None)
    transfer.get(there, "one", tmp_path / "one", there.stat("one"))
    assert (tmp_path / "one").read_bytes() == DATA
