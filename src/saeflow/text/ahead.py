"""Documents that were tokenised ahead of the job that packs them into rows, by jobs that share its work.

    <tokens folder>.parts/<block>.safetensors    of some successive documents, as they are packed: `hashes`, `lengths`,
                                                 `ids` one after another, and `crc32c` of all that
    <tokens folder>.parts/2-of-8.json            the blocks that a part has made, and their sizes

Tokenising takes thirty times as long as reading: so every part reads the corpus, and tokenises every N-th block of it;
the job that packs reads it too, and takes the ids of a block from here, if that is whole and of the same documents, or
tokenises it itself. Blocks are of the corpus, never of one number of parts.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import google_crc32c
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save_file
from tokenizers import Tokenizer

from saeflow.planning.parts import Part
from saeflow.storage.publish import publish_text, writing
from saeflow.text.corpus import Document, document_hash
from saeflow.text.packing import encode_all

BLOCK_DOCUMENTS, BLOCK_CHARACTERS = 64, 1 << 22
MARGIN = 1.05
"""A part ends where all parts have made so many times the tokens that are wanted, as far as it can tell."""


def blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Successive documents in blocks of 64, fewer where they are long."""
    block: list[Document] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document.text)
        if len(block) == BLOCK_DOCUMENTS or size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


class Ahead:
    """What was tokenised ahead for the tokens in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = ahead_of(folder)

    def read(self, number: int, block: list[Document]) -> list[np.ndarray] | None:
        """Token ids of each document of a block; None where they do not lie ready whole, or are of other documents."""
        try:
            held = load(self._file(number).read_bytes())
            hashes, lengths, ids, crc = (held[name] for name in ("hashes", "lengths", "ids", "crc32c"))
            if _crc(hashes, lengths, ids) != crc or (hashes != _hashes(block)).any():
                return None
            return np.split(ids, np.cumsum(lengths)[:-1])
        except (OSError, KeyError, ValueError, SafetensorError):
            return None

    def write(self, number: int, block: list[Document], ids: list[list[int]]) -> None:
        held = _hashes(block), np.array([len(one) for one in ids], np.int32), np.concatenate(ids).astype(np.int32)
        tensors = dict(zip(("hashes", "lengths", "ids"), held, strict=True)) | {"crc32c": _crc(*held)}
        with writing(self._file(number)) as partial:
            save_file(tensors, partial)

    def finish(self, part: Part, numbers: list[int]) -> None:
        """Says that a part has made all of its blocks."""
        sizes = {str(number): self._file(number).stat().st_size for number in numbers}
        publish_text(self.folder / f"{part}.json", json.dumps(sizes) + "\n")

    def is_finished(self, part: Part) -> bool:
        """Whether a part has made its blocks, and these are there, as far as can be seen without reading them."""
        try:
            sizes = json.loads((self.folder / f"{part}.json").read_bytes())
            return all(self._file(int(number)).stat().st_size == size for number, size in sizes.items())
        except (OSError, ValueError, AttributeError):
            return False

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"


def _hashes(block: list[Document]) -> np.ndarray:
    """(documents,) uint64"""
    return np.array([int(document_hash(document.text), 16) for document in block], np.uint64)


def _crc(*arrays: np.ndarray) -> np.ndarray:
    """(1,) uint32 of their bytes, one after another."""
    return np.array([google_crc32c.value(b"".join(array.tobytes() for array in arrays))], np.uint32)


def ahead_of(folder: Path) -> Path:
    """Where lies what was made ahead of the tokens in `folder`."""
    return folder.with_name(f"{folder.name}.parts")


def token_ids(
    documents: Iterable[Document], tokenizer: Tokenizer, ahead: Ahead | None = None
) -> Iterator[list[int] | np.ndarray]:
    """Of each document, as they lie ready, or else from the tokenizer."""
    if ahead is None or not ahead.folder.is_dir():
        yield from encode_all(tokenizer, (document.text for document in documents))
        return
    for number, block in enumerate(blocks(documents)):
        ready = ahead.read(number, block)
        yield from encode_all(tokenizer, (document.text for document in block)) if ready is None else ready


def tokenise_ahead(documents: Iterable[Document], tokenizer: Tokenizer, ahead: Ahead, part: Part, wanted: int) -> int:
    """Makes a part's blocks of the documents of a split, in the order in which they are packed, until there are about
    as many tokens as are `wanted`; what is there is kept. Returns how many it made.

    How many tokens the blocks of others have follows from their characters.
    """
    own_tokens = own_characters = characters = n_documents = made = 0
    numbers: list[int] = []
    for number, block in enumerate(blocks(documents)):
        if own_characters and characters * own_tokens / own_characters + n_documents > MARGIN * wanted:
            break
        size = sum(len(document.text) for document in block)
        characters, n_documents = characters + size, n_documents + len(block)
        if part.has(number):
            ids = ahead.read(number, block)
            if ids is None:
                encoded = list(encode_all(tokenizer, (document.text for document in block)))
                ahead.write(number, block, encoded)
                made += 1
            own_tokens += sum(map(len, encoded if ids is None else ids))
            own_characters += size
            numbers.append(number)
    ahead.finish(part, numbers)
    return made
