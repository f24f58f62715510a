"""Objects of a bucket, on S3 or what speaks its protocol: read whole or not at all, and tried again where that helps.

A server that drops a connection, is silent for `TIMEOUT` seconds, or answers 503 is asked again, for `PATIENCE` seconds
in all, with growing waits between. What it then gives is of the length that was asked for, or is not given at all:
callers compare checksums beside that. An object is there whole or not at all, which S3 promises of what is put.

Who may read and write, and where the server is, say the variables that all tools of S3 know: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL (or the role of the machine). Nothing here writes
them anywhere.
"""

import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import google_crc32c
import numpy as np

from saeflow.config.device import PLACE
from saeflow.storage.checksums import crc32c

log = logging.getLogger("saeflow")
T = TypeVar("T")
TIMEOUT = 60.0  # seconds for one request, of at most
PIECE = (16 << 20) + (
    64 << 10
)  # bytes (16 MiB of chunks with their checksums): with 8 of them on the way, 2 MB a second are enough
PART = 8 << 20  # of an upload, two at a time
PATIENCE = 300.0  # seconds for which a request is tried again
QUICK = 10.0  # the same of what only asks whether a bucket can be read, before anything runs
FIRST_WAIT, LONGEST_WAIT = 0.2, 20.0  # seconds
READ_TRIES = 5  # of what the server gives well, and yet too short or with another checksum
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
UNSURE = {408, 409, 425, 429}  # of the 4xx, those that another try may change
KINDS = {  # what obstore's report of a failed request says of its kind
    "Connect": "no connection", "Timeout": "no whole answer within {:.0f} s",
    "Interrupted": "the connection was dropped", "Decode": "the connection was dropped", "Request": "no answer",
}  # fmt: skip


class RemoteError(OSError):
    """A bucket that cannot be read or written; the message names the object, what was tried, and what to do."""


class BadReadError(RemoteError):
    """An object of which a server gives, every time, less than was asked for, or something else than was put."""

    def __init__(self, name: str, problem: str) -> None:
        self.name, self.problem = name, f"{problem}, {READ_TRIES} times"
        super().__init__(f"{name} {self.problem}: push it again from where it is whole")


class Stat(NamedTuple):
    """Of an object."""

    n_bytes: int
    crc32c: str | None
    """Of its bytes, as who put it said; None where that was not `Remote.upload`."""


class Remote:
    """A place in a bucket, `s3://bucket/prefix`, and the objects below it."""

    def __init__(self, url: str, patience: float | None = None) -> None:
        """Asks nothing yet. Raises `RemoteError` for what is no such place, and where obstore is not installed."""
        if not re.fullmatch(PLACE, url):
            raise RemoteError(f"{url!r} is no place in a bucket: use s3://bucket or s3://bucket/folder")
        if find_spec("obstore") is None:
            raise RemoteError(f"{url} needs obstore, which is not installed here: pip install 'saeflow[remote]'")
        self.url, self.patience = url.rstrip("/"), PATIENCE if patience is None else patience

    def below(self, path: str) -> "Remote":
        return Remote(f"{self.url}/{path}", self.patience)

    @cached_property
    def _store(self) -> Any:
        from obstore.store import S3Store

        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        longest = min(TIMEOUT, max(1.0, self.patience))
        limits: Any = {"timeout": timedelta(seconds=longest), "connect_timeout": timedelta(seconds=min(10.0, longest))}
        if endpoint().startswith("http://"):
            limits["allow_http"] = True
        # The requests that an upload is made of are tried again there; all else is here, where it is logged.
        backoff = {"init_backoff": timedelta(seconds=FIRST_WAIT), "max_backoff": timedelta(seconds=2), "base": 2.0}
        retries: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=longest), "backoff": backoff}
        return S3Store(bucket, prefix=prefix or None, client_options=limits, retry_config=retries)

    # ---------------------------------------------------------------- reading
    def check(self) -> None:
        """Raises `RemoteError`, in seconds, where the place cannot be read: no such server or bucket, no right to."""
        import obstore

        quick = Remote(self.url, min(self.patience, QUICK))
        quick._tried("", lambda: next(iter(obstore.list(quick._store, chunk_size=1)), None))

    def stat(self, path: str) -> Stat | None:
        """None where there is no such object."""
        import obstore

        def ask() -> Stat:
            found = obstore.get(self._store, path, options={"head": True})
            return Stat(found.meta["size"], found.attributes.get("crc32c"))

        try:
            return self._tried(path, ask)
        except FileNotFoundError:
            return None

    def get(self, path: str) -> bytes | None:
        """A small object; None where there is none."""

        def ask() -> bytes:
            about = self.stat(path)
            if about is None:
                raise FileNotFoundError
            found = self.read(path, 0, about.n_bytes).tobytes()
            if about.crc32c not in (None, f"{google_crc32c.value(found):08x}"):
                raise BadReadError(self.name(path), "has another checksum than what was put there")
            return found

        try:
            return self._tried(path, ask)
        except FileNotFoundError:
            return None

    def tail(self, path: str, n_bytes: int) -> tuple[int, np.ndarray] | None:
        """The size of an object, and its last bytes, uint8; None where there is none. Raises `BadReadError`."""
        import obstore

        def ask() -> tuple[int, np.ndarray]:
            found = obstore.get(self._store, path, options={"range": {"suffix": n_bytes}})
            return found.meta["size"], np.frombuffer(self._whole(path, found.bytes(), n_bytes), dtype=np.uint8)

        try:
            return self._tried(path, ask)
        except FileNotFoundError:
            return None

    def read(self, path: str, start: int, n_bytes: int) -> np.ndarray:
        """Bytes of an object, (n_bytes,) uint8, exactly so many. Raises `BadReadError`, and `FileNotFoundError`."""
        pieces = [self._piece(path, a, min(PIECE, start + n_bytes - a)) for a in range(start, start + n_bytes, PIECE)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, dtype=np.uint8), *pieces])

    def _piece(self, path: str, start: int, n_bytes: int) -> np.ndarray:
        import obstore

        def ask() -> np.ndarray:
            found = obstore.get_range(self._store, path, start=start, length=n_bytes)
            return np.frombuffer(self._whole(path, found, n_bytes), dtype=np.uint8)

        return self._tried(path, ask)

    def _whole(self, path: str, found: Any, n_bytes: int) -> Any:
        if len(found) != n_bytes:
            raise BadReadError(self.name(path), f"gave {len(found):,} bytes instead of {n_bytes:,}")
        return found

    def names(self, folder: str = "") -> Iterator[tuple[str, int]]:
        """Of all objects below a folder, what they are called in this place, and how many bytes they have."""
        import obstore

        def ask() -> list[Any]:
            return list(obstore.list(self._store, folder or None).collect())

        yield from ((one["path"], one["size"]) for one in self._tried(folder, ask))

    def folders(self, folder: str = "") -> list[str]:
        """What the folders are called that lie right below one."""
        import obstore

        found = self._tried(folder, lambda: obstore.list_with_delimiter(self._store, folder or None))
        return [path.rsplit("/", 1)[-1] for path in found["common_prefixes"]]

    # ---------------------------------------------------------------- writing
    def upload(self, content: Path | bytes, path: str, crc: str | None = None) -> None:
        """Puts a file or bytes with their crc32c (`crc`: where it is known), and looks whether they are there then."""
        import obstore

        if isinstance(content, Path):
            wanted = Stat(content.stat().st_size, crc or crc32c(content))
        else:
            wanted = Stat(len(content), f"{google_crc32c.value(content):08x}")

        def ask() -> Stat | None:
            about = {"crc32c": wanted.crc32c or ""}
            obstore.put(self._store, path, content, attributes=about, chunk_size=PART, max_concurrency=2)
            if self.stat(path) != wanted:
                raise BadReadError(self.name(path), "is not what was put there")
            return None

        self._tried(path, ask)

    def put_new(self, path: str, content: bytes) -> bytes | None:
        """Puts a small object unless there is one; then returns that one, which another process has put."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        def ask() -> bytes | None:
            try:
                about = {"crc32c": f"{google_crc32c.value(content):08x}"}
                obstore.put(self._store, path, content, attributes=about, mode="create")
            except AlreadyExistsError:
                there = self.get(path)
                return None if there == content else there  # an answer that was lost: it is ours
            return None

        return self._tried(path, ask)

    def delete(self, path: str) -> None:
        import obstore

        try:
            self._tried(path, lambda: obstore.delete(self._store, path))
        except FileNotFoundError:
            return

    # ---------------------------------------------------------------- trying again
    def name(self, path: str) -> str:
        """What people call an object, or the place: its URL, and the server, if that is not Amazon's."""
        server = urlsplit(endpoint())
        at = f" at {server.scheme}://{server.hostname}{f':{server.port}' if server.port else ''}" if endpoint() else ""
        return f"{self.url}/{path}".rstrip("/") + at

    def _tried(self, path: str, request: Callable[[], T]) -> T:
        """Raises `FileNotFoundError` for an object that is not there; `RemoteError` at once for what no other try would
        change, and else after `patience`."""
        from obstore.exceptions import BaseError

        started, wait, tries = time.monotonic(), FIRST_WAIT, 0
        while True:
            tries += 1
            try:
                return request()
            except BadReadError:
                if tries >= READ_TRIES:
                    raise
                reason = "the answer was not whole"
            except (FileNotFoundError, BaseError) as error:
                if "NoSuchBucket" in str(error):
                    advice = "make it, or correct device.remote or AWS_ENDPOINT_URL"
                    raise RemoteError(f"{self.name(path)}: there is no such bucket; {advice}") from None
                if isinstance(error, FileNotFoundError):
                    raise
                reason = in_words(error)
                if advice := _hopeless(error):
                    raise RemoteError(f"{self.name(path)}: {reason}; {advice}") from None
            passed = time.monotonic() - started
            if passed + wait > self.patience:
                raise RemoteError(
                    f"{self.name(path)}: {reason}; tried {tries} times in {passed:.0f} s. See whether the server is up "
                    "and AWS_ENDPOINT_URL is its address, then run the same again: what was done is kept"
                )
            log.warning("%s: %s; trying again in %.1f s", self.name(path), reason, wait)
            time.sleep(wait * random.uniform(0.5, 1))  # not all nodes of a cluster at once
            wait = min(2 * wait, LONGEST_WAIT)


def endpoint() -> str:
    """URL of the server; empty for Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL", "") or os.environ.get("AWS_ENDPOINT", "")


def in_words(error: Exception) -> str:
    """What went wrong, in some words: without the credentials that servers repeat in their answers."""
    text = str(error)
    status = re.search(r"status code: (\d{3})", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    kind = re.search(r"kind: (\w+)", text)
    if status:
        said = f"the server answered {' '.join(found[1] for found in (status, code) if found)}"
    else:
        said = (
            KINDS.get(kind[1], kind[1]).format(TIMEOUT)
            if kind
            else text.splitlines()[0]
            if text
            else type(error).__name__
        )
    for name in SECRETS:
        if secret := os.environ.get(name):
            said = said.replace(secret, f"<{name}>")
    return said


def _hopeless(error: Exception) -> str:
    """What to do about an error that no other try would change; empty for others."""
    from obstore.exceptions import GenericError, PermissionDeniedError, UnauthenticatedError

    text = str(error)
    status = int(found[1]) if (found := re.search(r"status code: (\d{3})", text)) else None
    credentials = any(word in text for word in ("AccessKey", "Token", "Signature", "Authorization"))
    refused = isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403)
    if refused or (status == 400 and credentials):
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN) to those of who may do that"
    if "/latest/api/token" in text or "/latest/meta-data" in text:  # the last place where credentials are looked for
        return "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, since this machine has no role either"
    if status == 301 or "redirect" in text:
        return "set AWS_REGION to the bucket's region"
    if "BadScheme" in text or "builder error" in text:
        return "correct AWS_ENDPOINT_URL: it has to begin with https:// or http://"
    if not isinstance(error, GenericError) or (status is not None and 400 <= status < 500 and status not in UNSURE):
        return "no other try would change that"
    return ""
