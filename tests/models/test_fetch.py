"""Fetching from a hub that a local server plays: what is taken, that it is found offline, and what failures say."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789012345678901234567890123456789"
REPOSITORIES = {
    "models/some/model": {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "pytorch_model.bin": b"pickle",
        "tokenizer.json": b"{}",
        "README.md": b"text",
    },
    "models/some/hooked": {
        "config.json": json.dumps({"tokenizer_name": "some/tokenizer"}).encode(),
        "tiny_1000_final.pth": b"not weights",
        "tiny_500.pth": b"a checkpoint",
    },
    "models/some/tokenizer": {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "README.md": b"text"},
    "datasets/some/data": {"train.jsonl": b'{"text": "one"}', "picture.png": b"pixels"},
    "datasets/some/pictures": {"picture.png": b"pixels"},
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a snapshot takes: a revision's commit, its tree, and the files."""

    def answer(self) -> None:
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/((?:models|datasets)/some/\w+)(?:/(revision|tree)/\w+)?", path):
            files = REPOSITORIES.get(found[1])
            if files is None:
                return self.send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            info = {"id": found[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.send(json.dumps(entries if found[2] == "tree" else info).encode())
        found = re.fullmatch(r"/(datasets/)?(some/\w+)/resolve/\w+/(.+)", path)
        data = found and REPOSITORIES[f"{found[1] or 'models/'}{found[2]}"].get(found[3])
        if data is None:
            return self.send(b"", 404, {"X-Error-Code": "EntryNotFound"})
        return self.send(data, headers={"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def fetch(home: Path, endpoint: str, *arguments: str) -> subprocess.CompletedProcess:
    ours = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | ours
    command = [sys.executable, str(ROOT / "scripts/fetch.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_fetched_model_is_found_by_the_plan_without_the_network(tmp_path, hub, monkeypatch):
    done = fetch(tmp_path, hub, "some/model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("use it as model.hub=some/model\n")

    import huggingface_hub.constants

    from saeflow.config import ModelConfig
    from saeflow.models.folder import ModelError, resolve_folder

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = resolve_folder(ModelConfig("m", hub="some/model"))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model.hub=some/model is not in the local Hugging Face cache, or not whole"):
        resolve_folder(ModelConfig("m", hub="some/model"))


def test_fetched_dataset_is_read_as_a_local_corpus(tmp_path, hub):
    from saeflow.text.corpus import Document, read_documents

    done = fetch(tmp_path, hub, "--dataset", "some/data")
    assert done.returncode == 0, done.stderr
    folder = done.stdout.strip().split("corpus.path=")[1]
    assert list(read_documents(folder)) == [Document("one", "train.jsonl")]
    assert [p.name for p in Path(folder).iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["some/nothing"], "the Hugging Face hub has no model 'some/nothing', or it is private"),
        (["--dataset", "some/pictures"], "has no file of these: *.parquet, "),
    ],
)
def test_what_the_hub_does_not_have_is_said(tmp_path, hub, arguments, message):
    done = fetch(tmp_path, hub, *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_a_model_of_transformer_lens_becomes_a_folder(tmp_path, hub, hooked_source, tokenizer_folder, monkeypatch):
    files = {p.name: p.read_bytes() for p in hooked_source.iterdir()}
    monkeypatch.setitem(REPOSITORIES, "models/some/hooked", files | {"tiny_500.pth": b"a checkpoint"})
    tokenizer = {p.name: p.read_bytes() for p in tokenizer_folder.iterdir()}
    monkeypatch.setitem(REPOSITORIES, "models/some/tokenizer", tokenizer)
    done = fetch(tmp_path, hub, "some/hooked", "--to", str(tmp_path / "made"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"use it as model=local model.path={tmp_path / 'made'}\n")
    names = sorted(p.name for p in (tmp_path / "made").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_weights_that_are_no_weights_are_not_opened(tmp_path, hub):
    done = fetch(tmp_path, hub, "some/hooked", "--to", str(tmp_path / "made"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "some/hooked: " in done.stderr and "is not a file of weights alone, and is not opened" in done.stderr
    done = fetch(tmp_path, hub, "some/model", "--to", str(tmp_path / "made"))
    assert done.returncode == 1 and "--to is for models of TransformerLens's own format" in done.stderr


def test_unreachable_hub_says_how_to_go_on_without_it(tmp_path):
    done = fetch(tmp_path, "http://127.0.0.1:9", "some/model")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "some/model cannot be fetched" in done.stderr
    assert "run this where it can, and copy the cache" in done.stderr and "set model.path" in done.stderr
