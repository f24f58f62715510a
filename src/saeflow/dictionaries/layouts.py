"""The layout of a dictionary on disk, by the names of its files: whose it is, and of how many parts."""

import json
from collections.abc import Mapping
from pathlib import Path

from saeflow.config import ConfigError
from saeflow.planning.digests import DigestCache, short_hash

LAYOUTS = {
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "jsae": ("cfg.json", "sae_weights.safetensors"),
}


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
        return "transcoder_circuits"
    for form, names in LAYOUTS.items():
        if all((path / name).is_file() for name in names):
            return "jsae" if form == "saelens" and _is_jsae(path / names[0]) else form
    known = "; ".join(f"{form}: {', '.join(names)}" for form, names in LAYOUTS.items())
    raise ConfigError(
        f"dictionary.path={path} is no dictionary that can be read here; these can: {known}; transcoder_circuits: a "
        ".pt file"
    )


def _is_jsae(config: Path) -> bool:
    """Whether a `cfg.json` is of a pair: of late by `is_pair`, before that by the loss that it was trained with."""
    try:
        found = json.loads(config.read_text())
    except (ValueError, OSError):
        return False  # the job says what is wrong with it
    return isinstance(found, dict) and bool({"is_pair", "use_jacobian_loss"} & found.keys())


def foreign_bytes(sources: Mapping[str, str]) -> int:
    """Of the files of a dictionary of another library, or of both of a pair, by where they lie; 0 where they are not
    here yet."""
    paths = {Path(sources[name]) for name in ("foreign", "foreign_out") if name in sources}
    files = {file for path in paths for file in [path, *path.glob("*")]}
    return sum(file.stat().st_size for file in files if file.is_file())


def foreign_files(path: Path, form: str) -> list[Path]:
    """The files that a dictionary consists of. Raises `ConfigError` where one is missing."""
    files = [path] if form == "transcoder_circuits" else [path / name for name in LAYOUTS[form]]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"dictionary.path={path} lacks {file.name}, which dictionary.format={form} has")
    return files


def foreign_digest(path: Path, form: str, digests: DigestCache) -> str:
    """Hash of the files that a dictionary consists of, 32 hexadecimal digits."""
    return short_hash([digests.file(file) for file in foreign_files(path, form)], 32)
