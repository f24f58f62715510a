"""Corpora: every format gives the same documents, whole; bad files are named."""

import gzip
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from conftest import make_texts, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from saeflow.config import ConfigError
from saeflow.text import corpus
from saeflow.text.corpus import Document, document_hash, is_held_out, read_documents
from saeflow.text.files import CorpusError, corpus_files, corpus_parts

TEXTS = ["One.\n\nStill one.", "naïve 海 🌊", "  spaced  "]


def texts(path: Path, **options) -> list[str]:
    return [document.text for document in read_documents(path, **options)]


# -------------------------------------------------------------------- formats
def compress(data: bytes, name: str) -> bytes:
    """As the last suffix of a file's name says."""
    import pyarrow

    if name.endswith(".gz"):
        return gzip.compress(data, mtime=0)
    if not name.lower().endswith(".zst"):
        return data
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "name", ["c.jsonl", "c.json", "c.JSONL", "c.jsonl.gz", "c.jsonl.zst", "c.JSON.ZST", "c.parquet"]
)
def test_every_format_gives_the_same_documents(tmp_path, name):
    file = tmp_path / name
    rows = [{"text": text, "source": f"s{i}"} for i, text in enumerate(TEXTS)]
    if name.endswith(".parquet"):
        import pandas as pd

        pd.DataFrame(rows).to_parquet(file)
    else:
        data = "\n\n".join(map(json.dumps, rows)).encode()
        file.write_bytes(compress(data, name))
    assert list(read_documents(file)) == [Document(text, f"s{i}") for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("name", ["c.txt", "c.txt.gz", "c.txt.zst"])
def test_text_is_a_document_a_paragraph_or_a_line(tmp_path, name):
    file = tmp_path / name
    data = b"\n\none\ntwo\n \t\n\n\nthree  \r\n\r\nfour"
    file.write_bytes(compress(data, name))
    assert texts(file) == ["one\ntwo\n \t\n\n\nthree  \n\nfour"]
    assert texts(file, sample_by="paragraph") == ["one\ntwo", "three  ", "four"]
    assert texts(file, sample_by="line") == ["one", "two", "three  ", "four"]
    assert {d.source for d in read_documents(file)} == {name}


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)))
def test_paragraphs_and_lines_lose_no_character_but_line_ends(tmp_path_factory, parts):
    file = tmp_path_factory.mktemp("text") / "c.txt"
    file.write_bytes("\n".join(["x", *parts]).encode())
    visible = Counter(file.read_text(encoding="utf-8-sig")) - Counter(dict.fromkeys("\n \t\r\x0b\x0c\x1c", 1 << 30))
    for sample_by in ("document", "paragraph", "line"):
        found = Counter("".join(texts(file, sample_by=sample_by)))
        assert {c: n for c, n in found.items() if not c.isspace()} == {
            c: n for c, n in visible.items() if not c.isspace()
        }


def test_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}')
    assert texts(tmp_path) == ["one", "two"]


def test_absent_text_is_left_out_and_absent_source_is_the_file(tmp_path):
    rows = [{"text": None}, {"text": " \n"}, {"text": "a", "source": None}, {"text": "b", "other": 1}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(read_documents(tmp_path / "c.jsonl")) == [Document("a", "c.jsonl"), Document("b", "c.jsonl")]


# -------------------------------------------------------------------- folders
def test_folder_is_read_in_name_order_and_stray_files_are_left_alone(tmp_path):
    for name in ("b/2.txt", "b/10.jsonl", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "b/2.txt").write_text("third")
    (tmp_path / "b/10.jsonl").write_text('{"text": "second"}')
    (tmp_path / "a.txt").write_text("first")
    for stray in ("README.md", "a.txt.bak", ".DS_Store", "b/LICENSE", "picture.png"):
        (tmp_path / stray).write_bytes(b"\xff\x00")
    assert texts(tmp_path) == ["first", "second", "third"]
    assert [f.name for f in corpus_files(tmp_path)] == ["a.txt", "10.jsonl", "2.txt"]


def test_folder_of_stray_files_only_is_an_error(tmp_path):
    (tmp_path / "README.md").write_text("text")
    with pytest.raises(CorpusError, match=r"no .txt, .jsonl, .json or .parquet file in this folder"):
        corpus_files(tmp_path)


def test_links_are_followed_and_every_folder_is_read_once(tmp_path):
    root, far = tmp_path / "root", tmp_path / "far"
    for folder in (root / "part1", far / "deep"):
        folder.mkdir(parents=True)
    (root / "part1" / "a.txt").write_text("here")
    (far / "b.txt").write_text("far")
    (far / "deep" / "c.txt").write_text("deep")
    (root / "a_link").symlink_to(root / "part1")  # comes before what it leads to
    (root / "part2").symlink_to(far)
    (root / "part3").symlink_to(far / "deep")
    (far / "back").symlink_to(root)
    (root / "d.txt").symlink_to(far / "b.txt")
    (root / "loop").symlink_to(root / "loop")
    assert texts(root) == ["far", "here", "far", "deep"]
    parts = corpus_parts(root)
    assert [f.relative_to(root).as_posix() for f in parts.read] == [
        "d.txt",
        "part1/a.txt",
        "part2/b.txt",
        "part2/deep/c.txt",
    ]
    read_already = {path.relative_to(root).as_posix() for path, why in parts.left_out.items() if "already" in why}
    assert read_already == {"a_link", "part2/back", "part3"}


def test_a_link_to_nothing_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(CorpusError, match=r"b.txt is a link to nothing; remove it"):
        corpus_files(tmp_path)


def test_what_is_no_text_is_left_alone_and_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}')
    for name in ("README.txt", "readme_en.txt", "LICENSE.txt", "dataset_infos.json", "b.jsonl.bz2", "c.csv"):
        (tmp_path / name).write_text("no text")
    parts = corpus_parts(tmp_path)
    assert texts(tmp_path) == ["a"] and [f.name for f in parts.read] == ["a.jsonl"]
    assert parts.left_out_in_words() == (
        "LICENSE.txt, README.txt, readme_en.txt (not text of a corpus); b.jsonl.bz2, c.csv (unknown format); "
        "dataset_infos.json (metadata)"
    )
    assert texts(tmp_path / "README.txt") == ["no text"]  # by its own name it is read


# -------------------------------------------------------------------- fields
@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_fields_within_fields_are_read(tmp_path, name):
    rows = [{"text": {"body": "one", "by": "x"}}, {"text": {"body": None, "by": "x"}}, {"text": None}]
    rows.append({"text": {"body": "two", "by": None}})
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    options = {"text_field": "text.body", "source_field": "text.by"}
    assert list(read_documents(tmp_path / name, **options)) == [Document("one", "x"), Document("two", name)]
    with pytest.raises(CorpusError, match=r"no (field|column) 'text\.boddy'; set corpus.text_field to one of text"):
        texts(tmp_path / name, text_field="text.boddy")


def test_a_field_whose_name_has_a_dot_comes_first(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text.body": "outer", "text": {"body": "inner"}}')
    assert texts(tmp_path / "c.jsonl", text_field="text.body") == ["outer"]


def test_records_without_text_are_counted(tmp_path, caplog):
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": " "}\n{"text": "b"}\n{"text": "c"}')
    with caplog.at_level("INFO"):
        documents = read_documents(tmp_path / "c.jsonl")
        assert [next(documents).text, next(documents).text] == ["a", "b"]
        documents.close()  # as the job does when it has enough
    assert "2 of the first 4 records hold no text" in caplog.text


# -------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.jsonl", b"", "is empty: it holds no document with any text"),
        ("c.jsonl", b'{"text": "  "}\n{"text": null}', "is empty: it holds no document with any text"),
        ("c.txt", b"ok\nna\xefve", r"is not UTF-8 \(line 2: .*iconv"),
        ("c.jsonl", b'{"text": "ok"}\n{"text": "\xff"}', r"is not UTF-8 \(line 2: "),
        ("c.txt.gz", gzip.compress(b"fine", mtime=0)[:-9], "is not a whole gzip file"),
        ("c.txt.gz", gzip.compress(b"fine" * 99, mtime=0)[:20] + b"\xff" * 30, "is not a whole gzip file"),
        ("c.txt.gz", b"not gzip", "is not a whole gzip file"),
        ("c.txt.zst", compress(b"fine" * 99, ".zst")[:-3], "is not a whole zstd file .*copy it again"),
        ("c.txt.zst", b"not zstd", "is not a whole zstd file .*copy it again"),
        ("c.jsonl", b'{"text": "ok"}\n' + b"[" * 100_000, "line 2: JSON that is nested too deeply"),
        ("c.jsonl", b'{"text": ' + b"9" * 6000 + b"}", "line 1: not a JSON object .*digits"),
        ("c.jsonl", b'{"text": {"body": "x", "id": 1}}', "'text' holds a dict, .*within it: text.body, text.id"),
        ("c.jsonl", b'{"\\u001b[31m": 1}', r"to one of '\\x1b\[31m'"),
        ("c.txt.gz", gzip.compress(b"one\n" * (1 << 19) + b"\xff" + bytes(1 << 22)), r"\(line 524289: .*iconv"),
        ("c.csv", b"text\nx", "unknown format; use .txt, .jsonl, .json .* or .parquet"),
        ("c.jsonl", b'{"text": "ok"}\n\n{"text"', "line 3: not a JSON object .*each line must be one"),
        ("c.json", b'[{"text": "ok"}]', "line 1: not a JSON object but a list"),
        (
            "c.jsonl",
            b'{"content": "ok", "id": 1}',
            r"line 1: no field 'text'; set corpus.text_field to one of content, id",
        ),
        ("c.jsonl", b'{"text": 7}', "line 1: 'text' holds a int, not text; set corpus.text_field"),
        ("c.jsonl", rb'{"text": "half \ud83d"}', "line 1: 'text' is no Unicode text"),
        ("c.parquet", b"PAR1", "is not a Parquet file"),
    ],
)
def test_bad_file_is_named_with_what_is_wrong(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=message) as error:
        list(read_documents(tmp_path / name))
    assert name in str(error.value) and isinstance(error.value, ConfigError)


def test_missing_corpus_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"nowhere.txt: no such file or folder"):
        list(read_documents(tmp_path / "nowhere.txt"))


@pytest.mark.parametrize(
    ("columns", "message"), [({"body": ["x"]}, "no column 'text'.*to one of body"), ({"text": [1]}, "int")]
)
def test_parquet_without_text_is_named(tmp_path, columns, message):
    import pandas as pd

    pd.DataFrame(columns).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(CorpusError, match=message):
        list(read_documents(tmp_path / "c.parquet"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.txt", b"word\n" * 100, "more than 100 characters; set corpus.sample_by=paragraph or line"),
        ("c.txt", b"word" * 300, "a line of more than 600 characters"),
        ("c.jsonl", b'{"text": "%s"}' % (b"x" * 101), "line 1: a document of 101 characters, more than 100; split it"),
    ],
)
def test_endless_document_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, name, data, message):
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_CHARACTERS", 100)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=message):
        list(read_documents(tmp_path / name))


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(n: int) -> int:
        file = tmp_path / f"{n}.jsonl"
        file.write_text(f'{{"text": "{"x" * 1000}"}}\n' * n)
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_documents(file)) == n
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # imports
    assert peak(4000) < peak(400) + 100_000


# -------------------------------------------------------------------- the split and the order
def test_split_depends_on_the_text_alone_and_has_the_right_size():
    many = make_texts(4000, words=(3, 6))
    held_out = {t for t in many if is_held_out(t, 0.1)}
    assert abs(len(held_out) / len(set(many)) - 0.1) < 0.02
    assert held_out < {t for t in many if is_held_out(t, 0.2)}  # a larger share keeps every document of a smaller
    assert document_hash("the sea") == "8e2c8ca6164402ef"  # a change here moves documents between the splits


def test_shuffling_keeps_every_document_and_depends_on_them_alone():
    documents = [Document(text, "s") for text in make_texts(500, words=(1, 9))]
    shuffled = list(corpus.shuffle_documents(documents))
    assert sorted(shuffled) == sorted(documents) and shuffled != documents
    assert list(corpus.shuffle_documents(iter(documents))) == shuffled


@pytest.mark.parametrize("name", ["SHUFFLE_DOCUMENTS", "SHUFFLE_CHARACTERS"])
def test_shuffle_buffer_is_bounded_by_documents_and_by_characters(monkeypatch, name):
    monkeypatch.setattr(corpus, name, 20)
    read = []
    stream = corpus.shuffle_documents(Document(f"{i:04}", "s") for i in range(100) if read.append(i) is None)
    first = next(stream)
    assert len(read) == (21 if name == "SHUFFLE_DOCUMENTS" else 6)
    assert sorted([first, *stream]) == [Document(f"{i:04}", "s") for i in range(100)]


# -------------------------------------------------------------------- hub datasets
def test_dataset_is_streamed_with_its_fields(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ["one", " ", "two"])
    found = list(corpus.stream_dataset(str(tmp_path), None, "train", None, "text", "source"))
    assert found == [Document("one", "a"), Document("two", "a")]
    with pytest.raises(CorpusError, match=r"no field 'body'; set corpus.text_field to one of source, text"):
        list(corpus.stream_dataset(str(tmp_path), None, "train", None, "body", "source"))


def test_a_dataset_of_zstd_files_is_streamed(tmp_path):
    (tmp_path / "train.jsonl.zst").write_bytes(compress(b'{"text": "one"}\n{"text": "two"}\n', ".zst"))
    found = list(corpus.stream_dataset(str(tmp_path), None, "train", None, "text", "source"))
    assert [document.text for document in found] == ["one", "two"]
    with pytest.raises(CorpusError, match=r"cannot be read .*set corpus.subset, corpus.split"):
        list(corpus.stream_dataset(str(tmp_path), None, "nosplit", None, "text", "source"))


def test_unreachable_dataset_says_that_it_needs_the_network(monkeypatch):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match=r"'no/such-dataset' cannot be had here .*needs the network; .*corpus.path"):
        next(corpus.stream_dataset("no/such-dataset", None, "train", None, "text", "source"))
