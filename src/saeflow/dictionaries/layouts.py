"""The layout of a dictionary on disk, by the names of its files: whose it is, and of how many parts."""

import contextlib
import json
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from saeflow.config import ConfigError
from saeflow.planning.digests import DigestCache, short_hash

LAYOUTS = {
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "jsae": ("cfg.json", "sae_weights.safetensors"),
}
IN_PT = {
    "kissane": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "transcoder_circuits": ("cfg", "state_dict"),
}
"""Formats that are a .pt file, with the names that it holds; kissane's has `<name>_cfg.json` beside it."""
_KISSANE_CONFIG = ("act_name", "act_size", "dict_size", "l1_coeff")


def head_folders(folder: Path) -> list[Path]:
    """Those of the dictionaries of the heads that `folder` consists of, in order; none where it is no such folder."""
    found = (path for path in folder.glob("head_*") if path.name[5:].isdecimal())
    return sorted(found, key=lambda path: int(path.name[5:]))


def part_folders(folder: Path) -> list[Path]:
    """Folders of the dictionaries that were trained as one: the two of a pair, those of heads, or `folder` itself."""
    pair = [folder / "input", folder / "output"]
    return pair if pair[0].is_dir() else head_folders(folder) or [folder]


def foreign_format(path: Path) -> str:
    """The format of a file or folder. Raises `ConfigError` where it is none that is known."""
    if path.is_file() and path.suffix == ".pt":
        return "kissane" if "W_enc" in (held := _texts(path)) and "state_dict" not in held else "transcoder_circuits"
    for form, names in LAYOUTS.items():
        if all((path / name).is_file() for name in names):
            return "jsae" if form == "saelens" and _is_jsae(path / names[0]) else form
    known = "; ".join(f"{form}: {', '.join(names)}" for form, names in LAYOUTS.items())
    raise ConfigError(
        f"dictionary.path={path} is no dictionary that can be read here; these can: {known}; transcoder_circuits: a "
        ".pt file; kissane: a .pt file with its _cfg.json; or a folder of head_0, head_1, ..., each one of these"
    )


def _is_jsae(config: Path) -> bool:
    """Whether a `cfg.json` is of a pair: of late by `is_pair`, before that by the loss that it was trained with."""
    try:
        found = json.loads(config.read_text())
    except (ValueError, OSError):
        return False  # the job says what is wrong with it
    return isinstance(found, dict) and bool({"is_pair", "use_jacobian_loss"} & found.keys())


def foreign_files(path: Path, form: str) -> list[Path]:
    """The files that a dictionary consists of. Raises `ConfigError` where one is missing."""
    if form in IN_PT:
        files = [path, _kissane_file(path)] if form == "kissane" else [path]
    else:
        files = [path / name for name in LAYOUTS[form]]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"dictionary.path={path} lacks {file.name}, which dictionary.format={form} has")
    if lacking := sorted({*IN_PT.get(form, ())} - (_texts(path) if form in IN_PT else set())):
        raise ConfigError(
            f"dictionary.path={path} holds no {', '.join(lacking)}, which a .pt of dictionary.format={form} does; name "
            "the format that it is of, or save it again"
        )
    if form == "kissane":
        kissane_config(path)
    return files


def kissane_config(path: Path) -> dict[str, Any]:
    """What `<name>_cfg.json` says beside `<name>.pt`. Raises `ConfigError` where it does not say what is needed."""
    file = _kissane_file(path)
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}); copy it again from beside {path.name}") from error
    if not isinstance(config, dict) or (lacking := [name for name in _KISSANE_CONFIG if name not in config]):
        said = ", ".join(lacking) if isinstance(config, dict) else "any settings"
        raise ConfigError(f"{file} lacks {said}: it is no configuration of dictionary.format=kissane")
    return config


def _kissane_file(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('.pt')}_cfg.json")


def _texts(path: Path) -> set[str]:
    """The texts in the pickle of one of torch's files, read opcode by opcode: nothing of it is carried out. None of a
    file that is damaged, or not of torch."""
    found: set[str] = set()
    with contextlib.suppress(ValueError, zipfile.BadZipFile, KeyError), path.open("rb") as file:
        held: IO[bytes] = file
        if zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(file)
            held = archive.open(next((n for n in archive.namelist() if n.endswith("/data.pkl")), ""))
        for _ in range(4):  # before torch 1.6 a number, a version and the machine come before what was saved
            found |= {text for _, text, _ in pickletools.genops(held) if isinstance(text, str)}
    return found


def foreign_bytes(sources: Mapping[str, str]) -> int:
    """Of the files of a foreign dictionary, of both of a pair, or of those of all heads, by the `sources` of its
    instance; 0 where they are not here yet."""
    paths = {Path(path) for name, path in sources.items() if re.fullmatch(r"foreign(_out|_\d+)?", name)}
    files = {file for path in paths for file in [path, *path.glob("*")]}
    return sum(file.stat().st_size for file in files if file.is_file())


def foreign_digest(path: Path, form: str, digests: DigestCache) -> str:
    """Hash of the files that a dictionary consists of, 32 hexadecimal digits."""
    return short_hash([digests.file(file) for file in foreign_files(path, form)], 32)
