"""One process at a time, and none for ever."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from saeflow.storage import locks
from saeflow.storage.locks import Lock, locked

HOLD = """
import sys, time
from pathlib import Path
from saeflow.storage.locks import Lock
lock = Lock(Path(sys.argv[1]))
lock.acquire("x")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "key.lock"


def hold(lock: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def _count(lock: Path, counter: Path) -> None:
    for _ in range(10):
        with locked(lock, "the counter"):
            n = int(counter.read_text())
            time.sleep(0.002)
            counter.write_text(str(n + 1))


def test_no_two_processes_are_inside(lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "WAIT", 0.005)
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count, args=(lock, counter)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert counter.read_text() == "40" and not lock.exists()


def test_who_waits_is_told_who_holds_it(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    process = hold(lock)
    os.kill(process.pid, signal.SIGSTOP)  # alive, though it does nothing
    waiting = Lock(lock)
    since = time.strftime("since %Y-%m-%d %H:")
    assert f"process {process.pid} on {socket.gethostname()} {since}" in waiting.holder()
    assert waiting.taken()
    os.kill(process.pid, signal.SIGCONT)
    process.kill()
    process.wait()
    started = time.monotonic()
    assert not Lock(lock).taken()  # a dead process holds nothing
    waiting.acquire("results/train/key")
    assert time.monotonic() - started < 5
    waiting.release()
    waiting.release()
    assert not lock.exists()


def test_a_living_holder_is_waited_for(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    process = hold(lock)
    threading.Timer(0.7, lambda: (process.kill(), process.wait())).start()  # unless waited for, it would seem to live
    started = time.monotonic()
    mine = Lock(lock)
    assert mine.acquire("results/train/key")
    assert time.monotonic() - started > 0.3
    assert f"waiting for process {process.pid}" in caplog.text and "makes results/train/key" in caplog.text
    mine.release()


@pytest.mark.parametrize("left", [b"", b"\0" * 90, b"filelock/2\npid="])
def test_a_lock_that_a_power_cut_tore_is_nobodys(lock: Path, left: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "EMPTY_FOR", 0.5)
    lock.parent.mkdir()
    lock.write_bytes(left)
    mine = Lock(lock)
    mine.acquire("x")
    assert str(os.getpid()) in lock.read_text()
    mine.release()


def test_a_holder_on_another_host_without_a_sign_of_life_loses_it(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file system without `flock` shows it: the file of a process that cannot be asked for."""
    monkeypatch.setattr(locks, "EXPIRES", 1.0)
    process = hold(lock)
    process.kill()
    process.wait()
    text = lock.read_text().replace(f"host={socket.gethostname()}", "host=another").replace("120.0", "1.0")
    lock.write_text(text)
    started = time.monotonic()
    mine = Lock(lock)
    assert mine.acquire("x")
    assert 0.9 < time.monotonic() - started < 10
    mine.release()
