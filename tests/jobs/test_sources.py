"""A job reads what the plan read, or refuses: files from outside that are replaced, and put back."""

import json
import os
from pathlib import Path

import pytest
from conftest import make_texts, write_jsonl
from stores import contents

from saeflow.jobs import job as jobs
from saeflow.jobs.job import Job, SourceError
from saeflow.models.folder import model_digest
from saeflow.models.source import reading_model
from saeflow.planning import digests as digests_module
from saeflow.planning.digests import DIGESTS_FILE, DigestCache, short_hash
from saeflow.planning.graph import Instance, Plan
from saeflow.text.files import corpus_digest
from saeflow.text.job import tokens_job
from saeflow.text.tokenizer import tokenizer_digest


@pytest.fixture(autouse=True)
def planned_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jobs._digests.cache_clear()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus/a.jsonl", make_texts(120))
    return tmp_path / "corpus"


@pytest.fixture
def job(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> Job:
    """A job of the stage tokens, as the plan makes it."""
    cache = DigestCache(DIGESTS_FILE)
    held = {"text_field": "text", "source_field": "source", "sample_by": "document"}
    config = {
        "corpus": held | {"content": corpus_digest(corpus, cache)},
        "tokenizer": tokenizer_digest(tokenizer_folder, cache),
        "tokens": {"context_size": 32, "prepend_bos": True, "bos_token": None, "held_out_fraction": 0.3},
        "split": "train",
        "n_rows": 16,
    }
    cache.save()
    instance = Instance("tokens", "text-0", config, {}, {"corpus": str(corpus), "model": str(tokenizer_folder)})
    return Job(instance, Plan("test", {"tokens": {"text-0": instance}}, {}, results="results"), "cpu")


def test_what_has_not_changed_is_not_hashed_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests_module, "file_digest", lambda path: pytest.fail(f"hashed {path} again"))
    tokens_job(job)


def test_what_only_moved_or_was_touched_is_the_same(job: Job, corpus: Path) -> None:
    tokens_job(job)
    expected = contents(job.path)
    file = corpus / "a.jsonl"
    file.write_bytes(file.read_bytes())
    file.rename(corpus / "another name.jsonl")
    Path(DIGESTS_FILE).unlink()
    tokens_job(job)
    assert {n for n, held in contents(job.path).items() if held != expected[n]} <= {"provenance.json"}


@pytest.mark.parametrize("how", ["another text", "one more file", "one file less", "another format"])
def test_a_corpus_that_was_replaced_is_refused(job: Job, corpus: Path, how: str) -> None:
    if how == "another text":
        write_jsonl(corpus / "a.jsonl", make_texts(120, seed=1))
    elif how == "one more file":
        write_jsonl(corpus / "b.jsonl", make_texts(3, seed=1))
    elif how == "one file less":
        write_jsonl(corpus / "b.txt", ["x"])
        (corpus / "a.jsonl").unlink()
    else:
        (corpus / "a.jsonl").rename(corpus / "a.txt")
    with pytest.raises(SourceError, match="does not hold what it held when the plan was made") as error:
        tokens_job(job)
    assert str(corpus) in str(error.value) and not job.path.exists()


@pytest.mark.parametrize("back", ["written", "renamed", "with its time"])
def test_a_corpus_that_was_replaced_and_put_back_meanwhile_is_refused(
    job: Job, corpus: Path, monkeypatch: pytest.MonkeyPatch, back: str
) -> None:
    """Nobody knows which of the two was read. Its content, and even its time, are those of the plan."""
    file, aside = corpus / "a.jsonl", corpus.parent / "aside"
    held, time = file.read_bytes(), file.stat().st_mtime_ns
    from saeflow.text import corpus as module

    read = module.read_documents

    def swapped(path: Path, **fields: str):
        if back == "renamed":
            file.rename(aside)
        write_jsonl(file, make_texts(120, seed=1))
        yield from list(read(path, **fields))
        if back == "renamed":
            aside.replace(file)
        else:
            file.write_bytes(held)
        if back == "with its time":
            os.utime(file, ns=(time, time))

    monkeypatch.setattr(module, "read_documents", swapped)
    with pytest.raises(SourceError, match="was changed while this job read it"):
        tokens_job(job)
    assert not job.path.exists() and file.read_bytes() == held


def test_another_tokenizer_is_refused(job: Job, tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    job.instance.sources["model"] = str(folder)
    tokens_job(job)
    names = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"bos_token": "a"}))
    with pytest.raises(SourceError):
        tokens_job(job)


@pytest.mark.parametrize("control", [{}, {"randomise": "permuted", "randomise_seed": 2}])
def test_other_weights_are_refused(tmp_path: Path, gpt2_folder: Path, control: dict) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in gpt2_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = model_digest(folder, DigestCache(None))
    model = {"weights": short_hash([weights, control], 32) if control else weights} | control
    instance = Instance("evaluate", "key", {"model": model}, {}, {"model": str(folder)})
    job = Job(instance, Plan("test", {}, {}, results="results"), "cpu")
    with reading_model(job) as found:
        assert found == folder
    file = folder / "model.safetensors"
    held = bytearray(file.read_bytes())
    held[-1] ^= 1
    file.write_bytes(held)
    with pytest.raises(SourceError), reading_model(job):
        pytest.fail("opened other weights")
    held[-1] ^= 1
    file.write_bytes(held)
    with pytest.raises(SourceError, match=r"model\.safetensors was changed"), reading_model(job):
        file.write_bytes(held)
