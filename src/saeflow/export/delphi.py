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

from saeflow.activations.store import open_column
from saeflow.config import FeaturesConfig, build
from saeflow.dictionaries.fitting import open_dictionary, open_model
from saeflow.export.subjects import Subject
from saeflow.features.firings import HELD, Firings
from saeflow.features.lookup import active, choose_text, run_activations, stored_activations
from saeflow.features.text import Text
from saeflow.storage.modes import share
from saeflow.text.tokens import open_tokens

SPLITS = 5
"""Files that delphi cuts the latents into; here more where one would have more than `HELD` firings."""


def write(subjects: list[Subject], folder: Path) -> dict[str, Any]:
    """Writes the cache of every dictionary. Raises `ConfigError` where the experiment has no features=all, and
    `FitError` where a dictionary does not fit its model."""
    jobs = [subject.features() for subject in subjects]
    entries = {}
    for subject, job in zip(subjects, jobs, strict=True):
        cache = folder / subject.name / "latents"
        cache.mkdir(parents=True)
        config = build(FeaturesConfig, job.config["features"])
        (path,) = job.dictionaries()
        dictionary, store = open_dictionary(path, job), open_tokens(job.input("tokens"))
        columns = {column.hook_name: column for column in map(open_column, job.inputs("activations"))}
        text = choose_text(store, columns, config)
        model, hooks = open_model(job), [dictionary.spec.hook_name]
        stored = stored_activations(columns, hooks, text, config.batch_rows, model.cfg.device)
        batches = stored if columns else run_activations(model, hooks, text, config.batch_rows)
        firings, n_firings = Firings(dictionary.d_sae, cache / "scratch"), 0
        for _, values in batches:
            for n_tokens, *firing in active(dictionary, values, text):
                firings.add(n_tokens, *firing)
                n_firings += len(firing[0])
        module = cache / hooks[0]
        module.mkdir()
        n_splits = write_splits(firings, n_firings, text, module)
        about = {
            "dataset_repo": str(subject.settings.get("corpus.name", "")),
            "dataset_split": config.split,
            "dataset_name": "",
            "dataset_column": "text",
            "batch_size": config.batch_rows,
            "cache_ctx_len": text.context_size,
            "n_tokens": text.tokens.size,
            "n_splits": n_splits,
            "model_name": job.instance.sources["model"],
        }
        (module / "config.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.rmtree(cache / "scratch", ignore_errors=True)
        entries[subject.name] = [f"{subject.name}/latents"]
    return {"entries": entries, "left_out": {}}


def write_splits(firings: Firings, n_firings: int, text: Text, folder: Path, held: int = HELD) -> int:
    """Writes the files of a module; returns how many. `held`: firings that one may have, on average."""
    size = -(-firings.n_latents // max(SPLITS, -(-n_firings // held)))
    tokens, grid = text.tokens.astype(np.int64), text.grid()
    for chunk in firings.chunks(size):
        row, position = grid.row_and_position(chunk.token)
        locations = np.stack([row, position, chunk.latent], axis=1)
        narrow = np.uint16 if locations.max(initial=0) < 1 << 16 else np.uint32
        file = folder / f"{chunk.first}_{chunk.first + chunk.n_latents - 1}.safetensors"
        save_file({"locations": locations.astype(narrow), "activations": chunk.value, "tokens": tokens}, file)
        share(file)
    return -(-firings.n_latents // size)
