"""Tokens made in parts: the same bytes for any number of them, whatever was killed, lost or damaged between them."""

import itertools
import os
from pathlib import Path

import pytest
from conftest import make_texts, write_jsonl
from stores import contents

from saeflow.planning.parts import Part
from saeflow.text import ahead as module
from saeflow.text.ahead import Ahead, blocks, tokenise_ahead
from saeflow.text.corpus import Document, read_documents
from saeflow.text.tokenizer import LoadedTokenizer, load_tokenizer
from saeflow.text.tokens import in_order, write_tokens

HOW = {"split": "train", "context_size": 32, "prepend_bos": True, "held_out_fraction": 0.3, "tokenizer_digest": "tiny"}
N_ROWS = 400  # of which the tokens are in 7 of the 14 blocks of 16 documents


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> LoadedTokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def documents(corpus_file: Path) -> list[Document]:
    return list(read_documents(corpus_file))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_DOCUMENTS", 16)


class Tokens:
    """Tokens folders of one test; those called otherwise than `whole` may be made in parts."""

    def __init__(self, folder: Path, documents: list[Document], tokenizer: LoadedTokenizer) -> None:
        self.folder, self.documents, self.tokenizer = folder, documents, tokenizer

    def ahead(self) -> Ahead:
        return Ahead(self.folder / "parts")

    def part(self, number: int, of: int, n_rows: int = N_ROWS, split: str = "train") -> int:
        shuffled = in_order(iter(self.documents), split, 0.3)
        return tokenise_ahead(shuffled, self.tokenizer.tokenizer, self.ahead(), Part(number, of), n_rows * 31)

    def pack(self, name: str, n_rows: int = N_ROWS, **how: object) -> dict[str, bytes]:
        folder = self.folder / f"{name}-{n_rows}"
        folder.mkdir()
        given = {**HOW, **how, "n_rows": n_rows}
        write_tokens(folder, iter(self.documents), self.tokenizer, **given, ahead=self.ahead())  # type: ignore[arg-type]
        return contents(folder)

    def whole(self, **how: object) -> dict[str, bytes]:
        (self.folder / "whole").mkdir()
        write_tokens(self.folder / "whole", iter(self.documents), self.tokenizer, n_rows=N_ROWS, **{**HOW, **how})  # type: ignore[arg-type]
        return contents(self.folder / "whole")

    def files(self) -> dict[str, tuple[int, int]]:
        found = sorted(self.ahead().folder.glob("*.safetensors"))
        return {file.stem: (file.stat().st_mtime_ns, file.stat().st_ino) for file in found}


@pytest.fixture
def made(tmp_path, documents, tokenizer) -> Tokens:
    return Tokens(tmp_path, documents, tokenizer)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many documents each call of the tokenizer got."""
    found: list[int] = []
    real = module.encode_all

    def encode(tokenizer, texts, *rest):
        texts = list(texts)
        found.append(len(texts))
        return real(tokenizer, texts, *rest)

    monkeypatch.setattr(module, "encode_all", encode)
    return found


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("of", [1, 2, 3, 8, 20])
def test_any_number_of_parts_gives_the_bytes_of_one_job(made, encoded, of, split) -> None:
    n_rows = N_ROWS if split == "train" else 150
    expected = Tokens(made.folder / "own", made.documents, made.tokenizer)
    expected.folder.mkdir()
    whole = expected.pack("whole", n_rows, split=split)
    counts = [made.part(number, of, n_rows, split) for number in range(1, of + 1)]
    assert max(counts) - min(counts) <= 1 and all(made.ahead().is_finished(Part(n + 1, of)) for n in range(of))
    encoded.clear()
    assert made.pack("parts", n_rows, split=split) == whole
    assert sum(encoded) == 0  # all lay ready


def test_parts_end_when_there_are_enough_tokens(made) -> None:
    few = sum(made.part(number, 3, n_rows=60) for number in (1, 2, 3))
    more = sum(made.part(number, 3) for number in (1, 2, 3))
    assert 2 <= few <= 4 and few + more == len(made.files()) and 7 <= few + more <= 9  # of 14


def test_blocks_depend_on_the_documents_alone(documents, monkeypatch) -> None:
    whole = list(blocks(documents))
    assert list(itertools.chain(*whole)) == documents and {len(block) for block in whole[:-1]} == {16}
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 500)
    assert max(sum(len(d.text) for d in block[:-1]) for block in blocks(documents)) < 500


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, _flip, lambda f: os.truncate(f, 300), lambda f: f.write_text("")])
def test_a_block_that_was_lost_is_made_again_alone(made, encoded, damage) -> None:
    whole = made.whole()
    for number in (1, 2, 3):
        made.part(number, 3)
    before = made.files()
    damage(made.ahead().folder / "4.safetensors")
    assert [made.ahead().is_finished(Part(n, 3)) for n in (1, 2, 3)] == [True, damage is _flip, True]
    encoded.clear()
    if damage is _flip:  # which only who reads it finds
        assert made.pack("parts") == whole and encoded == [16]
        encoded.clear()
    assert [made.part(number, 3) for number in (1, 2, 3)] == [0, 1, 0] and encoded == [16]
    assert {name for name, state in made.files().items() if before[name] != state} == {"4"}
    assert made.pack("again") == whole


def test_a_killed_part_goes_on_and_what_others_made_in_other_parts_is_kept(made, monkeypatch) -> None:
    whole = made.whole()
    made.part(1, 2)
    before, write, written = made.files(), Ahead.write, []

    def stop(self: Ahead, *block: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(block)
        write(self, *block)  # type: ignore[arg-type]

    monkeypatch.setattr(Ahead, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        made.part(2, 2)
    monkeypatch.undo()
    monkeypatch.setattr(module, "BLOCK_DOCUMENTS", 16)
    assert not made.ahead().is_finished(Part(2, 2))
    assert len(made.files()) == len(before) + 2
    assert 0 < sum(made.part(number, 3) for number in (1, 2, 3)) <= 3
    assert before.items() < made.files().items() and made.pack("parts") == whole


def test_documents_of_another_order_are_not_taken(made, encoded) -> None:
    for number in (1, 2):
        made.part(number, 2)
    made.documents = made.documents[20:]  # which are shuffled otherwise
    whole = made.whole()
    encoded.clear()
    assert made.pack("parts") == whole and sum(encoded) > 80


def test_a_corpus_that_is_too_short_is_refused_as_ever(made, tmp_path) -> None:
    short = Tokens(
        tmp_path, list(read_documents(write_jsonl(tmp_path / "short.jsonl", make_texts(30)))), made.tokenizer
    )
    short.part(1, 1)
    with pytest.raises(Exception, match=r"the corpus is too short: .* but 400 rows are asked for"):
        short.pack("parts")
