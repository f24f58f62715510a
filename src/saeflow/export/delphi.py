"""Where latents fire, as the cache that delphi's `LatentDataset` reads: `<dictionary>/latents/<hook>/`.

    config.json                    what was cached: tokens, rows, and the folder of the model with its tokenizer
    <first>_<last>.safetensors     of the latents from first to last:
        locations     (A, 3)  row, position, latent less `first`; unsigned, of 16 bits where they do
        activations   (A,)    float32, which delphi's own cache rounds to float16
        tokens        (R, P)  token ids, int64, in each file

Firings are found by the pass of the stage `features`, on the tokens that its settings say, with what does not fit into
memory on the disk meanwhile. A firing is an activation that is not 0; delphi's own cache drops those up to 1e-5. The
BOS in front of rows has none.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from saeflow.export.subjects import Subject
from saeflow.features.firings import HELD, Firings
from saeflow.features.job import open_pass
from saeflow.features.lookup import gather
from saeflow.features.stage import together
from saeflow.features.text import Text
from saeflow.jobs.job import Job
from saeflow.planning.digests import canonical
from saeflow.storage.modes import share

SPLITS = 5
"""Files that delphi cuts the latents into; here more where one would have more than `HELD` firings."""

Looked = tuple[Subject, Job]
"""A dictionary, and the job that looks its latents up."""


def write(subjects: list[Subject], folder: Path) -> dict[str, Any]:
    """Writes the cache of every dictionary, those of one model and text by one pass. Raises `ConfigError` where the
    experiment has no features=all, and `FitError` where a dictionary does not fit its model."""
    groups: dict[str, list[Looked]] = {}
    for subject in subjects:
        job = subject.features()
        groups.setdefault(canonical(together(subject.plan, job.instance)), []).append((subject, job))
    for some in groups.values():
        _write_together(some, folder)
    return {"entries": {subject.name: [f"{subject.name}/latents"] for subject in subjects}, "left_out": {}}


def _write_together(some: list[Looked], folder: Path) -> None:
    config, dictionaries, text, _, batches = open_pass([job for _, job in some])
    places = [folder / subject.name / "latents" for subject, _ in some]
    for place in places:
        place.mkdir(parents=True)
    found = gather(dictionaries, batches, text, [place / "scratch" for place in places], config)
    for (subject, job), one, place in zip(some, found, places, strict=True):
        module = place / one.dictionary.spec.hook_name
        module.mkdir()
        about = {
            "dataset_repo": str(subject.settings.get("corpus.name", "")),
            "dataset_split": config.split,
            "dataset_name": "",
            "dataset_column": "text",
            "batch_size": config.batch_rows,
            "cache_ctx_len": text.context_size,
            "n_tokens": text.tokens.size,
            "n_splits": write_splits(one.firings, text, module),
            "model_name": job.instance.sources["model"],
        }
        (module / "config.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.rmtree(place / "scratch", ignore_errors=True)


def write_splits(firings: Firings, text: Text, folder: Path, held: int = HELD) -> int:
    """Writes the files of a module; returns how many. `held`: firings that one may have, on average."""
    size = -(-firings.n_latents // max(SPLITS, -(-firings.n_firings // held)))
    tokens, grid = text.tokens.astype(np.int64), text.grid()
    for chunk in firings.chunks(size):
        row, position = grid.row_and_position(chunk.token)
        locations = np.stack([row, position, chunk.latent], axis=1)
        narrow = np.uint16 if locations.max(initial=0) < 1 << 16 else np.uint32
        file = folder / f"{chunk.first}_{chunk.first + chunk.n_latents - 1}.safetensors"
        save_file({"locations": locations.astype(narrow), "activations": chunk.value, "tokens": tokens}, file)
        share(file)
    return -(-firings.n_latents // size)
