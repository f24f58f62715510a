"""What a folder's safetensors files say of themselves: read at the plan, so that no job finds a shard missing or cut.

A file is 8 bytes of length, a JSON header with the shape and the place of every tensor, and the tensors.
"""

import json
from pathlib import Path
from typing import Any

from saeflow.models.folder import ModelError, read_keys, weight_files

Shapes = dict[str, tuple[int, ...]]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_EMBEDDINGS = ("embed_in.weight", "wte.weight", "embed_tokens.weight", "embed.W_E")
"""How the names of the token embedding's weights end: GPT-NeoX, GPT-2, Llama and its kin, TransformerLens."""


def read_shapes(folder: Path) -> Shapes:
    """Shapes of all tensors of a folder by name. No tensor is read.

    Raises `ModelError` for a shard that is missing, cut short or lacks a tensor that the index promises.
    """
    there = {file.name for file in weight_files(folder)}
    if SINGLE in there:
        return _read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise ModelError(
            f"model folder {folder} has {', '.join(sorted(there)[:3])}, but neither {SINGLE} nor {INDEX}, which says "
            "what each file holds; copy the model folder again"
        )
    promised = read_keys(folder / INDEX).get("weight_map")
    if not isinstance(promised, dict) or not promised:
        raise ModelError(f"{folder / INDEX} has no weight_map; copy the model folder again")
    if missing := sorted(set(promised.values()) - there):
        raise ModelError(
            f"the weights of {folder} are not whole: {INDEX} names {len(missing)} files that are not there, "
            f"{', '.join(missing[:3])} first; copy the model folder again"
        )
    shapes: Shapes = {}
    for name in sorted(set(promised.values())):
        held = _read_header(folder / name)
        lacking = sorted(tensor for tensor, file in promised.items() if file == name and tensor not in held)
        if lacking:
            raise ModelError(
                f"{folder / name} lacks {len(lacking)} tensors that {INDEX} promises, {lacking[0]} first; copy the "
                "model folder again"
            )
        shapes |= held
    return shapes


def open_weights(folder: Path) -> dict[str, Any]:
    """Tensors of a folder by name, each read from its file when it is sliced (`[...]`).

    The files are read and not mapped, so that one that is changed later changes no weights, and memory holds them once.
    """
    from safetensors import safe_open

    index = folder / INDEX
    names = {SINGLE} if (folder / SINGLE).is_file() else set(read_keys(index)["weight_map"].values())
    opened = [safe_open(folder / name, framework="pt", backend="pread") for name in sorted(names)]
    return {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118 -- no mapping


def n_embeddings(shapes: Shapes) -> int | None:
    """Rows of the token embedding: token ids must be below. None where its name is not known."""
    return next((shape[0] for name, shape in shapes.items() if name.endswith(_EMBEDDINGS) and shape), None)


def _read_header(file: Path) -> Shapes:
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if start == b"version ":
            raise ModelError(f"{file} is a pointer of Git LFS, not the weights; run git lfs pull in the model folder")
        length = int.from_bytes(start, "little")
        try:
            if not 0 < length <= size - 8:
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(opened.read(length))
            tensors = {name: about for name, about in header.items() if name != "__metadata__"}
            shapes = {name: tuple(map(int, about["shape"])) for name, about in tensors.items()}
            end = 8 + length + max((int(about["data_offsets"][1]) for about in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{file} is no safetensors file ({error}); copy the model folder again") from error
    if size != end:
        raise ModelError(
            f"the weights of {file.parent} are not whole: {file.name} has {size:,} bytes where its header speaks of "
            f"{end:,}; copy the model folder again"
        )
    return shapes
