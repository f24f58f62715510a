"""Checksums of files, and states of trainings and stores that carry their own.

crc32c finds every error of up to three bits and all but one of four billion others, at several times the speed of a
cryptographic hash: it is what a file is verified by. BLAKE2s identifies a content among all others: it enters keys.
"""

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c

from saeflow.storage.publish import writing

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 20


def file_digest(path: str | Path) -> str:
    """BLAKE2s of a file's bytes, 32 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2s(digest_size=16)).hexdigest()


def crc32c(path: Path) -> str:
    """crc32c of a file's bytes, 8 hexadecimal digits."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            crc = google_crc32c.extend(crc, block)
    return f"{crc:08x}"


class StateError(ValueError):
    """A saved state that is not what was written; the message names the file."""


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Writes a safetensors file that appears whole."""
    from safetensors.torch import save_file

    with writing(path) as partial:
        save_file(dict(tensors), partial)


def save_state(path: Path, state: Mapping[str, "Tensor"]) -> None:
    """Writes tensors, on any device, as a safetensors file that appears whole and has their checksum in its header."""
    from safetensors.torch import save_file

    held = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with writing(path) as partial:
        save_file(held, partial, {"crc32c": _crc_of_tensors(held)})


def load_state(path: Path) -> dict[str, "Tensor"]:
    """What `save_state` wrote; files of earlier versions, which have no checksum, are taken as they are.

    Raises `StateError` where a byte is another than was written, or the file is not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path} is damaged ({error})") from error
    if about is not None and about.get("crc32c") != _crc_of_tensors(state):
        raise StateError(f"{path} is damaged (its checksum is another)")
    return state


def _crc_of_tensors(state: Mapping[str, "Tensor"]) -> str:
    """crc32c of names, types, shapes and values."""
    import torch

    crc = 0
    for name in sorted(state):
        tensor = state[name]
        about = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        crc = google_crc32c.extend(crc, struct.pack("<I", len(about)) + about)
        values = tensor.reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(values), _BLOCK):
            crc = google_crc32c.extend(crc, values[start : start + _BLOCK].tobytes())
    return f"{crc:08x}"
