"""The token store: right rows, the same first rows however many are asked for, whole or refused, in bounded memory."""

import json
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import CONTEXT_SIZE, make_texts, write_jsonl

from saeflow.config import ConfigError
from saeflow.planning.digests import DigestCache
from saeflow.planning.graph import Instance, Plan
from saeflow.text import tokens
from saeflow.text.corpus import (
    CorpusError,
    Document,
    document_hash,
    is_held_out,
    read_documents,
    shuffle_documents,
)
from saeflow.text.files import corpus_digest
from saeflow.text.packing import NO_DOCUMENT
from saeflow.text.tokenizer import LoadedTokenizer, TokenizerError, load_tokenizer, tokenizer_digest
from saeflow.text.tokens import TokensError, open_tokens, spread, write_tokens

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, documents, tokenizer: LoadedTokenizer, **options) -> Path:
    folder.mkdir(parents=True)
    defaults = {
        "split": "train",
        "n_rows": 20,
        "context_size": 16,
        "prepend_bos": True,
        "held_out_fraction": 0.3,
        "tokenizer_digest": "tiny",
    }
    write_tokens(folder, documents, tokenizer, **(defaults | options))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def documents(corpus_file):
    return list(read_documents(corpus_file))


# -------------------------------------------------------------------- what is in it
@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_rows_are_the_splits_documents_joined(tmp_path, documents, tokenizer, split, prepend_bos):
    store = open_tokens(write(tmp_path / "t", documents, tokenizer, split=split, prepend_bos=prepend_bos))
    mine = list(shuffle_documents(d for d in documents if is_held_out(d.text, 0.3) == (split == "held_out")))
    joined = tokenizer.tokenizer.encode("<|endoftext|>".join(d.text for d in mine), add_special_tokens=False).ids
    start = int(prepend_bos)
    assert (store.n_rows, store.context_size, len(store)) == (20, 16, 20)
    assert store[:][:, start:].reshape(-1).tolist() == joined[: 20 * (16 - start)]
    assert (store[:][:, :start] == 0).all()


def test_every_token_is_found_in_its_document(tokens_folder, documents, tokenizer):
    rows = open_tokens(tokens_folder).rows(0, 64)
    table = pd.read_parquet(tokens_folder / "documents.parquet")
    text_of = {document_hash(d.text): d for d in documents}
    ids = [tokenizer.tokenizer.encode(text_of[h].text).ids for h in table["hash"]]
    assert table["source"].tolist() == [text_of[h].source for h in table["hash"]]
    assert table["document"].tolist() == list(range(len(table))) and table["n_tokens"].tolist() == list(map(len, ids))
    assert table["document"].max() == rows.document.max()
    assert not any(is_held_out(text_of[h].text, 0.3) for h in table["hash"])
    for token, document, offset in zip(*(part.reshape(-1).tolist() for part in rows), strict=True):
        expected = 0 if document == NO_DOCUMENT else [*ids[document], tokenizer.eos_token_id][offset]
        assert token == expected


def test_splits_share_no_document(tmp_path, documents, tokenizer):
    hashes = []
    for split in ("train", "held_out"):
        folder = write(tmp_path / split, documents, tokenizer, split=split, n_rows=80)
        hashes.append(set(pd.read_parquet(folder / "documents.parquet")["hash"]))
    assert min(map(len, hashes)) > 5 and not hashes[0] & hashes[1]


def test_attributes_say_how_the_rows_were_made(tokens_folder):
    attributes = open_tokens(tokens_folder).attributes
    assert {k: v for k, v in attributes.items() if k != "packing"} == {
        "context_size": CONTEXT_SIZE,
        "prepend_bos": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "split": "train",
        "held_out_fraction": 0.3,
        "tokenizer": "tiny",
    }
    assert "joined by EOS" in attributes["packing"]


def test_xarray_opens_it_with_named_dimensions(tokens_folder):
    import xarray as xr

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = xr.open_zarr(tokens_folder / "tokens.zarr")
    assert set(opened) == {"tokens", "document", "offset"} and opened.attrs["context_size"] == CONTEXT_SIZE
    for name, array in opened.items():
        assert array.dims == ("sequence", "position") and array.shape == (64, CONTEXT_SIZE)
        assert array.dtype == np.int32 and array.attrs["description"], name
    np.testing.assert_array_equal(opened.tokens.values, open_tokens(tokens_folder)[:])


def test_chunks_carry_crc32c_within_shards(tokens_folder):
    metadata = json.loads((tokens_folder / "tokens.zarr/tokens/zarr.json").read_text())
    (sharding,) = metadata["codecs"]
    assert sharding["name"] == "sharding_indexed" and metadata["fill_value"] == tokens.NEVER_WRITTEN
    assert sharding["configuration"]["codecs"][-1]["name"] == "crc32c"


# -------------------------------------------------------------------- how much is asked for
@pytest.mark.parametrize("n_rows", [1, 7, 8, 9, 31, 32, 33, 90])
def test_first_rows_are_the_same_however_many_are_asked_for(tmp_path, documents, tokenizer, monkeypatch, n_rows):
    monkeypatch.setattr(tokens, "CHUNK_TOKENS", 4 * 16)  # shards of 8 rows: several, and the last one not full
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 8 * 16)
    few = write(tmp_path / "few", documents, tokenizer, n_rows=n_rows)
    many = write(tmp_path / "many", documents, tokenizer, n_rows=100)
    assert open_tokens(few).n_rows == n_rows
    for a, b in zip(open_tokens(few).rows(0, n_rows), open_tokens(many).rows(0, n_rows), strict=True):
        np.testing.assert_array_equal(a, b)
    table = pd.read_parquet(few / "documents.parquet")
    pd.testing.assert_frame_equal(table, pd.read_parquet(many / "documents.parquet").iloc[: len(table)])


def test_two_writes_are_identical_byte_for_byte(tmp_path, documents, tokenizer):
    a, b = (write(tmp_path / name, documents, tokenizer) for name in "ab")
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert len(files) == 8
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


def test_reading_stops_when_the_rows_are_there(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("saeflow.text.corpus.SHUFFLE_DOCUMENTS", 50)
    read = []
    endless = (Document(f"document {i} of many", "s") for i in iter(lambda: read.append(1) or len(read), None))
    write(tmp_path / "t", endless, tokenizer, n_rows=10)
    assert len(read) < 400


def test_memory_does_not_grow_with_the_rows(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK_TOKENS", 64 * 16)
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 64 * 16)
    monkeypatch.setattr("saeflow.text.corpus.SHUFFLE_DOCUMENTS", 50)
    endless = (Document(f"{text} {i}", "s") for i in range(1 << 30) for text in make_texts(50, seed=i))

    def peak(n_rows: int) -> int:
        tracemalloc.start()
        try:
            write(tmp_path / str(n_rows), endless, tokenizer, n_rows=n_rows)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(64)  # imports
    assert peak(3200) < peak(320) + 200_000  # the rows themselves: 16 x 4 x 3 x 2,880 = 553,000 bytes


@pytest.mark.parametrize(
    ("split", "n_rows", "message"),
    [
        (
            "train",
            10**6,
            r"too short: the train split holds \d+ documents of [\d,]+ tokens in all, ([\d,]+) rows of 16,",
        ),
        ("held_out", 10**6, r"1,000,000 rows are asked for; set tokens.held_out_tokens=\d+ or less, or .* larger"),
    ],
)
def test_corpus_that_ends_too_early_says_what_it_gives(tmp_path, documents, tokenizer, split, n_rows, message):
    with pytest.raises(CorpusError, match=message):
        write(tmp_path / "t", documents, tokenizer, split=split, n_rows=n_rows)


def test_what_the_message_advises_works(tmp_path, documents, tokenizer):
    with pytest.raises(CorpusError) as error:
        write(tmp_path / "a", documents, tokenizer, n_rows=10**6)
    advised = int(str(error.value).split("tokens.train_tokens=")[1].split(" ")[0])
    write(tmp_path / "b", documents, tokenizer, n_rows=advised // 16)
    with pytest.raises(CorpusError):
        write(tmp_path / "c", documents, tokenizer, n_rows=advised // 16 + 1)


def test_corpus_too_short_for_one_row_says_so(tmp_path, tokenizer):
    short = [Document("one two", "s")]
    with pytest.raises(
        CorpusError, match=r"too short for one row: the train split holds 1 documents of \d tokens in all"
    ):
        write(tmp_path / "a", short, tokenizer, held_out_fraction=1e-9)
    with pytest.raises(CorpusError, match=r"too short for one row: the held_out split holds 0 documents of 0 tokens"):
        write(tmp_path / "b", short, tokenizer, split="held_out", held_out_fraction=1e-9)


def test_bos_of_a_tokenizer_without_one_is_refused_before_anything_is_written(tmp_path, documents, tokenizer):
    without = tokenizer._replace(bos_token_id=None)
    with pytest.raises(TokenizerError, match=r"tokens.bos_token"):
        write(tmp_path / "a", documents, without)
    assert not list((tmp_path / "a").iterdir())
    store = open_tokens(write(tmp_path / "b", documents, without, prepend_bos=False))
    assert store.attributes["bos_token_id"] is None


# -------------------------------------------------------------------- damage
@pytest.mark.parametrize("where", [0, 100, -100, -1])
def test_flipped_bit_is_found_and_the_file_named(tokens_folder, tmp_path, where):
    folder = tmp_path / "t"
    shutil.copytree(tokens_folder, folder)
    file = folder / "tokens.zarr/tokens/c/0/0"
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)
    with pytest.raises(TokensError, match=r"tokens/c/0/0 is damaged .*remove .*/t and run the workflow again"):
        open_tokens(folder)[3:5]


def test_the_damaged_shard_of_several_is_named(tmp_path, documents, tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK_TOKENS", 8 * 16)
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 8 * 16)
    folder = write(tmp_path / "t", documents, tokenizer, n_rows=40)
    file = folder / "tokens.zarr/offset/c/3/0"
    file.write_bytes(file.read_bytes()[:-1])
    store = open_tokens(folder)
    store.rows(0, 24)
    store[:]
    with pytest.raises(TokensError, match=r"offset/c/3/0 is damaged"):
        store.rows(0, 40)


def test_missing_shard_is_no_row_of_fill_values(tokens_folder, tmp_path):
    folder = tmp_path / "t"
    shutil.copytree(tokens_folder, folder)
    (folder / "tokens.zarr/document/c/0/0").unlink()
    with pytest.raises(TokensError, match=r"document/c/0/0 is damaged \(no such file\)"):
        open_tokens(folder)


def test_folder_without_tokens_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no tokens.zarr; run the workflow"):
        open_tokens(tmp_path)


# -------------------------------------------------------------------- the job
def make_plan(tmp_path: Path, corpus: dict, corpus_path: str, model: Path, n_rows: int) -> Path:
    if corpus_path:
        corpus = {"content": corpus_digest(Path(corpus_path), DigestCache(None))}
    config = {
        "corpus": corpus | {"text_field": "text", "source_field": "source", "sample_by": "document"},
        "tokenizer": tokenizer_digest(model, DigestCache(None)),
        "tokens": {"context_size": 16, "prepend_bos": True, "bos_token": None, "held_out_fraction": 0.3},
        "split": "train",
        "n_rows": n_rows,
    }
    instance = Instance("tokens", "tiny-train-00", config, {}, {"model": str(model), "corpus": corpus_path})
    plan = Plan("tiny", {"tokens": {instance.key: instance}}, {}, results=str(tmp_path / "results"))
    plan.freeze(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def run_job(plan: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/job.py"), "tokens", "--plan", str(plan), "--key", "tiny-train-00"]
    return subprocess.run(command, capture_output=True, text=True)


def test_job_packs_a_local_corpus(tmp_path, corpus_file, tokenizer_folder):
    done = run_job(make_plan(tmp_path, {}, str(corpus_file), tokenizer_folder, 25))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "results/tokens/tiny-train-00"
    assert done.stdout.startswith("wrote 25 rows of 16 tokens from ") and f"to {folder}/" in done.stdout
    store = open_tokens(folder)
    assert store.n_rows == 25 and store.attributes["tokenizer"] == tokenizer_digest(tokenizer_folder, DigestCache(None))
    assert (folder / "provenance.json").is_file() and (folder / "config.yaml").is_file()
    assert (
        "'<|endoftext|>' (id 0) ends a document (tokens.eos_token); '<|endoftext|>' (id 0) stands in fro" in done.stderr
    )


def test_job_ends_documents_with_the_named_token(tmp_path, corpus_file, tokenizer_folder):
    plan = make_plan(tmp_path, {}, str(corpus_file), tokenizer_folder, 25)
    frozen = json.loads(plan.read_text())
    frozen["stages"]["tokens"]["tiny-train-00"]["config"]["tokens"] |= {"eos_token": "!", "prepend_bos": False}
    plan.write_text(json.dumps(frozen))
    done = run_job(plan)
    assert done.returncode == 0, done.stderr
    store = open_tokens(tmp_path / "results/tokens/tiny-train-00")
    end = load_tokenizer(tokenizer_folder).tokenizer.token_to_id("!")
    assert end and store.attributes["eos_token_id"] == end
    rows = store.rows(0, 25)
    lengths = pd.read_parquet(store.folder / "documents.parquet").set_index("document")["n_tokens"]
    is_end = rows.offset == lengths.reindex(rows.document.ravel()).to_numpy().reshape(rows.document.shape)
    assert is_end.any() and (rows.tokens[is_end] == end).all()
    assert f"'!' (id {end}) ends a document (tokens.eos_token); nothing stands in front of every row" in done.stderr


def test_job_packs_a_dataset_to_the_same_rows(tmp_path, corpus_file, documents, tokenizer, tokenizer_folder):
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "train.jsonl", [d.text for d in documents])
    corpus = {"dataset": str(data), "subset": None, "split": "train", "revision": None}
    done = run_job(make_plan(tmp_path, corpus, "", tokenizer_folder, 25))
    assert done.returncode == 0, done.stderr
    expected = write(tmp_path / "t", documents, tokenizer, n_rows=25)
    np.testing.assert_array_equal(open_tokens(tmp_path / "results/tokens/tiny-train-00")[:], open_tokens(expected)[:])


def test_job_that_fails_leaves_no_artifact(tmp_path, corpus_file, tokenizer_folder):
    done = run_job(make_plan(tmp_path, {}, str(corpus_file), tokenizer_folder, 10**6))
    assert done.returncode == 1 and "set tokens.train_tokens=" in done.stderr
    assert not (tmp_path / "results/tokens/tiny-train-00").exists()


@pytest.mark.parametrize(("n_rows", "n"), [(64, 21), (64, 64), (64, 1), (1000, 7)])
def test_spread_rows_are_one_of_each_equal_run(n_rows: int, n: int) -> None:
    chosen = spread(n_rows, n)
    assert len(chosen) == n and (np.diff(chosen) > 0).all() and (chosen == spread(n_rows, n)).all()
    edges = [i * n_rows // n for i in range(n + 1)]
    assert all(a <= row < b for row, a, b in zip(chosen, edges[:-1], edges[1:], strict=True))
    assert n in (1, 64) or (chosen != spread(n_rows, n, seed=1)).any()


def test_spread_rows_are_read_as_they_stand_and_are_of_more_documents_than_the_first(tokens_folder):
    store = open_tokens(tokens_folder)
    numbers, rows = store.spread_rows(8)
    whole = store.rows(0, store.n_rows)
    for found, every in zip(rows, whole, strict=True):
        np.testing.assert_array_equal(found, every[numbers])
    first = store.rows(0, 8)
    assert len(np.unique(rows.document)) > 1.5 * len(np.unique(first.document)) or numbers[-1] > 50
