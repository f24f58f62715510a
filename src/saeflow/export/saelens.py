"""A release as SAELens's: a folder a dictionary with `cfg.json` and `sae_weights.safetensors`.

Dictionaries are stored in SAELens's format already, so that the files are those of the artifact, byte for byte. Beside
them lie `sparsity.safetensors`, which SAELens reads with a release (log10 of how often each latent fires on held-out
text), and `settings.json`, all that made it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from saeflow.dictionaries.layouts import head_folders
from saeflow.dictionaries.saelens_format import CONFIG_FILE, WEIGHTS_FILE
from saeflow.export.subjects import Subject, kept
from saeflow.storage.modes import share

NEVER = 1e-10
"""What SAELens adds to frequencies before it takes their logarithm."""


def write(subjects: list[Subject], folder: Path) -> dict[str, Any]:
    """Writes the release of all dictionaries that SAELens has a class for."""
    why_not = {subject.name: why for subject in subjects if (why := refusal(subject))}
    chosen = kept(subjects, why_not, "SAELens")
    ids: dict[str, list[str]] = {}
    for subject in chosen:
        heads = [head.name for head in head_folders(subject.folder)]
        ids[subject.name] = [f"{subject.name}/{head}" for head in heads] or [subject.name]
        frequency = np.array_split(_log_frequency(subject), len(heads) or 1)
        for part, values in zip(heads or [""], frequency, strict=True):
            target = folder / subject.name / part
            target.mkdir(parents=True)
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copyfile(subject.folder / part / name, target / name)
            if len(values):
                save_file({"sparsity": values}, target / "sparsity.safetensors")
                share(target / "sparsity.safetensors")
        text = json.dumps(subject.settings, indent=1, sort_keys=True, ensure_ascii=False)
        (folder / subject.name / "settings.json").write_text(text + "\n", encoding="utf-8")
    return {"entries": ids, "left_out": why_not}


def refusal(subject: Subject) -> str:
    """Why SAELens cannot open a dictionary; '' where it can."""
    heads = head_folders(subject.folder)
    config = json.loads(((heads[0] if heads else subject.folder) / CONFIG_FILE).read_text())
    if config["architecture"] in ("topk_transcoder", "topk_skip_transcoder"):
        return (
            f"SAELens has no class for a TopK transcoder from {config['d_in']} to {config['d_out']} entries"
            + (" with a linear map beside it" if "skip" in config["architecture"] else "")
            + "; export those with the activation relu or batchtopk, or open it with saeflow"
        )
    return ""


def _log_frequency(subject: Subject) -> np.ndarray:
    """(n,) log10 of how often each latent fires, as SAELens stores it; (0,) where it has not been evaluated."""
    import pyarrow.parquet as pq

    if subject.evaluation is None:
        return np.zeros(0, dtype=np.float32)
    table = pq.read_table(subject.evaluation / "latents.parquet", columns=["frequency"])
    return np.log10(table["frequency"].to_numpy() + NEVER).astype(np.float32)
