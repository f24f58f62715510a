"""The layout of a dictionary on disk, by the names of its files: whose it is, and of how many parts."""

from pathlib import Path

from saeflow.config import ConfigError
from saeflow.planning.digests import DigestCache, short_hash

LAYOUTS = {
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
    "sparsify": ("cfg.json", "sae.safetensors"),
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
            return form
    known = "; ".join(f"{form}: {', '.join(names)}" for form, names in LAYOUTS.items())
    raise ConfigError(
        f"dictionary.path={path} is no dictionary that can be read here; these can: {known}; transcoder_circuits: a "
        ".pt file"
    )


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
