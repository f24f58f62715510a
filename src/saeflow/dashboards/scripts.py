"""Data that a page opened from disk can load: scripts that hand it over, since browsers let no such page read files.

A script is one line, `saeflow.register({...})`, of ASCII alone: whatever tokens hold is escaped as JSON escapes it, and
nothing of it is ever HTML. Arrays are base64 of little-endian numbers, which a page turns into typed arrays at once.
"""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

APP = Path(__file__).parent / "app"
_NAMES = {"u1": "Uint8Array", "u2": "Uint16Array", "u4": "Uint32Array", "i4": "Int32Array", "f4": "Float32Array"}


def packed(values: Any) -> dict[str, Any]:
    """An array of any shape: integers in the smallest type that holds them, floats in single precision."""
    array = np.asarray(values)
    if array.dtype.kind == "f":
        kind = "f4"
    elif array.size and array.min() < 0:
        kind = "i4"
    else:
        kind = next(k for k, most in (("u1", 0xFF), ("u2", 0xFFFF), ("u4", 0xFFFFFFFF)) if array.max(initial=0) <= most)
    data = np.ascontiguousarray(array, dtype=f"<{kind}").tobytes()
    return {"type": _NAMES[kind], "shape": list(array.shape), "data": base64.b64encode(data).decode()}


def packed_column(column: pa.ChunkedArray) -> Any:
    """A column of numbers (null as NaN), of lists of numbers as `offsets` and `values`, or of texts as they are."""
    array = column.combine_chunks()
    if pa.types.is_list(array.type):
        offsets = array.offsets.to_numpy()
        return {"offsets": packed(offsets - offsets[:1].sum()), "values": packed(array.flatten().to_numpy())}
    return array.to_pylist() if pa.types.is_string(array.type) else packed(array.to_numpy(zero_copy_only=False))


def write_script(file: Path, data: Any) -> None:
    """Raises `ValueError` for a number that JSON has not."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    file.write_text(f"saeflow.register({text});\n", encoding="ascii")


def copy_app(folder: Path, page: str) -> None:
    """Puts a page of the app into a folder, as its `index.html`, with the scripts and the style that it loads."""
    shutil.copyfile(APP / page, folder / "index.html")
    (folder / "app").mkdir()
    for file in sorted(APP.iterdir()):
        if file.suffix in (".js", ".css"):
            shutil.copyfile(file, folder / "app" / file.name)
