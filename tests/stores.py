"""Small stores of tokens and activations for tests."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zarr
from torch import Tensor

from saeflow.activations.store import ActivationStore, Column, TokenRows, open_column, write_column
from saeflow.activations.writer import ColumnRequest, ColumnWriter
from saeflow.config import ActivationsConfig
from saeflow.models.folder import model_digest
from saeflow.planning.digests import DigestCache
from saeflow.planning.graph import Instance, Plan
from saeflow.storage import receipts
from saeflow.text.tokenizer import tokenizer_digest

TRAINING_STORE = "tiny-gpt2-float32-01234567"
TRAINING = {"n_tokens": 4096, "batch_size": 128, "lr": 1e-2}


def write_rows(folder: Path, tokens: np.ndarray) -> TokenRows:
    """A tokens folder as `docs/layout.md` describes it, of the given token ids (rows, context_size)."""
    group = zarr.open_group(folder / "tokens.zarr", mode="w", zarr_format=3)
    arrays = {"tokens": tokens, "document": np.arange(tokens.size).reshape(tokens.shape) // 7, "offset": tokens * 0}
    for name, values in arrays.items():
        array = group.create_array(name, shape=tokens.shape, chunks=(4, tokens.shape[1]), dtype="int32", fill_value=-2)
        array[:] = values.astype(np.int32)
    return TokenRows(folder)


def write_store(
    folder: Path, hooks: dict[str, Tensor], tokens: np.ndarray | None = None, **geometry: object
) -> list[Column]:
    """A store that holds given activations, (N, *size) a hook, written by the writer that caching uses; of `tokens`
    (rows, context_size), or of rows of one token 0."""
    store = ActivationStore(folder, ActivationsConfig(**geometry))
    n_tokens = len(next(iter(hooks.values())))
    rows = write_rows(folder / "tokens", np.zeros((n_tokens, 1), dtype=np.int32) if tokens is None else tokens)
    columns = []
    with store.locked(), ThreadPoolExecutor(1) as thread:
        for hook, values in hooks.items():
            wanted = ColumnRequest(hook, tuple(values.shape[1:]), n_tokens)
            store.create(hook, wanted.size, {})
            writer = ColumnWriter(store, [wanted], "cpu", thread)
            for start in range(0, n_tokens, 37):
                writer.append(start, values[start : start + 37])
            writer.wait()
            column = Column(folder / f"{hook}-{n_tokens}", *wanted[:1], n_tokens, wanted.size, store.config.dtype)
            column.folder.mkdir()
            write_column(column, writer.statistics[wanted])
            write_receipt(column.folder)
            columns.append(open_column(column.folder))
        store.commit(dict.fromkeys(hooks, n_tokens), rows, {})
    return columns


def weights_of(folder: Path) -> str:
    """What identifies a model's weights."""
    return model_digest(folder, DigestCache(None))


def tokens_instance(key: str, model: Path) -> Instance:
    """As the plan has it, as far as jobs that read the tokens ask."""
    return Instance("tokens", key, {"tokenizer": tokenizer_digest(model, DigestCache(None))}, {}, {})


def write_receipt(folder: Path, stage: str = "any", needs: dict[str, list[str]] | None = None) -> None:
    """Makes a folder an artifact, as far as jobs that read it and plans ask."""
    (folder / "config.yaml").touch()
    about = {"stage": stage, "key": folder.name, "needs": needs or {}, "blake2s": {}}
    receipt = {**about, **receipts.contents(folder)}
    (folder / receipts.RECEIPT).write_text(json.dumps(receipt))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def training_plan(
    results: Path, hooks: list[str], dictionaries: dict[str, dict], training: dict, how: str = "{}", seed: int = 5
) -> Plan:
    """A plan with trainings, by key, at `hooks`, whose columns of 1,000 tokens lie below `results`."""
    columns = [f"{TRAINING_STORE}/{hook}-1000" for hook in hooks]
    tokens = Instance("tokens", "text-train", {"tokens": {"prepend_bos": False}}, {}, {})
    model = {"weights": "abc", "fold_ln": True, "center_writing_weights": False, "center_unembed": False}
    config = {"model": model, "tokens": {"context_size": 64}}
    activations = {c: Instance("activations", c, config, {"tokens": [tokens.key]}, {}) for c in columns}
    jobs = {}
    for key, dictionary in dictionaries.items():
        config = {"dictionary": dictionary, "training": training, "seed": seed}
        config |= {"hook_name": hooks[0], "hook_name_out": (*hooks, None)[1]}
        jobs[key] = Instance(
            "train", key, config, {"activations": columns}, {"training": how, "model_name": "tiny-gpt2"}
        )
    stages = {"tokens": {tokens.key: tokens}, "activations": activations, "train": jobs}
    return Plan("test", stages, {}, results=str(results))
