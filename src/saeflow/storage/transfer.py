"""Artifacts to a bucket and back: whole or not at all, by their receipts.

In the bucket an artifact is the same folder as here, `<stage>/<key>/`, so other tools read it there. Its receipt is put
last and once: of two processes that put one artifact, the first to finish is who made it, and the other has to have the
same bytes. What has no receipt there is not there, and what was cut off goes on where it was: files that are there
already, by size and checksum, are not put again. What comes back is written beside its place, compared with the
receipt's checksums, and published.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import google_crc32c

from saeflow.storage.checksums import crc32c
from saeflow.storage.locks import locked
from saeflow.storage.publish import beside, make_folder, publish, remove_leftovers
from saeflow.storage.receipts import RECEIPT, contents, is_receipt, is_whole, read_receipt, verify
from saeflow.storage.remote import PIECE, READ_TRIES, BadReadError, Remote, RemoteError, Stat

AT_ONCE = 8  # files
T = TypeVar("T")


class OtherBytesError(ValueError):
    """An artifact of which the bucket has other bytes, from another machine; the message names it and what to do."""


def push(remote: Remote, folder: Path) -> Literal["pushed", "there"]:
    """Puts an artifact at `remote`, which is its own place. Raises `DamagedError` where it is not whole here,
    `OtherBytesError`, `RemoteError`."""
    verify(folder)
    receipt = read_receipt(folder)
    assert receipt is not None
    content = (folder / RECEIPT).read_bytes()
    if "crc32c" not in receipt:  # of earlier versions
        receipt |= contents(folder)
        content = (json.dumps(receipt, indent=1) + "\n").encode()
    if (there := receipt_there(remote)) is not None:
        _check_same(remote, there, receipt)
        return "there"
    known, crcs = dict(remote.names()), receipt["crc32c"]
    each(receipt["sizes"], lambda name: put(remote, folder / name, name, crcs.get(name), name in known))
    if other := remote.put_new(RECEIPT, content):
        _check_same(remote, json.loads(other), receipt)
        return "there"
    return "pushed"


def pull(remote: Remote, folder: Path) -> bool:
    """Brings an artifact from `remote`, its own place, to `folder`; False where the bucket has none. The caller has
    looked that there is none here.

    Raises `RemoteError` where a file there is not what the receipt says, or the bucket cannot be read.
    """
    receipt = receipt_there(remote)
    if receipt is None:
        return False
    with locked(folder.with_name(folder.name + ".lock"), str(folder)):
        if is_whole(folder):
            return True  # another process was faster
        remove_leftovers(folder, locked=True)
        partial = beside(folder)
        partial.mkdir(parents=True)
        try:
            each(receipt["sizes"], lambda name: get(remote, name, partial / name, Stat(*_of(receipt, name))))
            get(remote, RECEIPT, partial / RECEIPT, remote.stat(RECEIPT) or Stat(0, None))
            if json.loads((partial / RECEIPT).read_bytes()) != receipt:
                raise RemoteError(f"{remote.name(RECEIPT)} was changed while it was read: run the same again")
            publish(partial, folder)
        finally:
            remove_leftovers(folder, locked=True)
    return True


def damaged(remote: Remote) -> Iterator[tuple[str, str]]:
    """Reads all files of an artifact there; yields the name of each that is not what the receipt says, and why."""
    receipt = receipt_there(remote)
    for name in receipt["sizes"] if receipt else ():
        wanted = Stat(*_of(receipt, name))
        for _ in range(READ_TRIES):  # a byte may change on the way
            if not (problem := _problem(remote, name, wanted)):
                break
        else:
            yield name, problem


def receipt_there(remote: Remote) -> dict[str, Any] | None:
    """The receipt of an artifact at its place in a bucket; None where there is none. Raises `RemoteError` for one that
    says nothing, or names files outside of the artifact."""
    content = remote.get(RECEIPT)
    if content is None:
        return None
    try:
        receipt = json.loads(content)
    except ValueError:
        receipt = None
    legal = is_receipt(receipt) and receipt["sizes"].keys() == receipt["crc32c"].keys()
    if not legal or not all(_is_inside(name) for name in receipt["sizes"]):
        raise RemoteError(f"{remote.name(RECEIPT)} is no whole receipt: remove it, and push the artifact again")
    return dict(receipt)


# -------------------------------------------------------------------- files
def put(remote: Remote, file: Path, path: str, crc: str | None = None, maybe_there: bool = True) -> bool:
    """Puts a file unless the same is there; returns whether it did."""
    crc = crc or crc32c(file)
    if maybe_there and remote.stat(path) == Stat(file.stat().st_size, crc):
        return False
    remote.upload(file, path, crc)
    return True


def get(remote: Remote, path: str, file: Path, wanted: Stat) -> None:
    """Writes an object to `file`, in pieces, which is then what is `wanted`. Raises `RemoteError`."""
    make_folder(file.parent)
    for left in reversed(range(READ_TRIES)):
        with open(file, "wb") as out:
            problem = _problem(remote, path, wanted, out.write)
        if not problem:
            return
        if not left:
            raise RemoteError(
                f"{remote.name(path)} is damaged ({problem}, read {READ_TRIES} times): take it away there with make "
                "remote-verify SET_ASIDE=1, then push it again from where it is whole"
            )


def each(items: Iterable[Any], work: Callable[[Any], T], shown: Callable[[Iterator[T]], Iterable[T]] = iter) -> list[T]:
    """The same done to all of some, several at a time; the first error ends it. `shown` may say how far it is."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="objects") as threads:
        return list(shown(threads.map(work, items)))


def _problem(remote: Remote, path: str, wanted: Stat, take: Callable[[Any], Any] = lambda piece: None) -> str:
    """Reads an object, and says what is wrong with it; '' where it is as `wanted`."""
    crc = 0
    try:
        for start in range(0, wanted.n_bytes, PIECE):
            piece = remote.read(path, start, min(PIECE, wanted.n_bytes - start))
            crc = google_crc32c.extend(crc, piece.tobytes())
            take(piece.data)
        found = remote.stat(path)
    except FileNotFoundError:
        found = None
    except BadReadError as error:
        return f"it {error.problem}"
    if found is None:
        return "it is missing"
    if found.n_bytes != wanted.n_bytes:
        return f"{found.n_bytes:,} bytes instead of {wanted.n_bytes:,}"
    return "" if wanted.crc32c in (None, f"{crc:08x}") else "its checksum is another"


def _of(receipt: dict[str, Any] | None, name: str) -> tuple[int, str]:
    assert receipt is not None
    return receipt["sizes"][name], receipt["crc32c"][name]


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name and "\\" not in name


def _check_same(remote: Remote, there: dict[str, Any], here: dict[str, Any]) -> None:
    if there.get("crc32c") != here.get("crc32c"):
        raise OtherBytesError(
            f"{remote.name('')} was pushed from {there.get('host', 'elsewhere')} with other bytes than here (another "
            "kind of device, or number of threads); it was left as it is: remove one of the two"
        )
