"""Small artifacts to make dashboards of: random dictionaries, and tables of latents that hold any texts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xarray as xr
from stores import write_receipt

from saeflow.config import FeaturesConfig
from saeflow.dashboards.comparisons import compare
from saeflow.dashboards.job import dashboard
from saeflow.dictionaries import Spec, save_dictionary
from saeflow.dictionaries.sae import build
from saeflow.features.artifact import GROUP, ExamplesWriter, latents_table, write_index, write_latents
from saeflow.features.examples import SCHEMA
from saeflow.jobs.job import Job
from saeflow.planning.graph import Instance, Plan

HOOK, D, N_TOKENS = "blocks.3.hook_mlp_out", 16, 100_000
HOSTILE = [
    "</script><script>document.title='broken'</script>", "<img src=x onerror=\"document.title='broken'\">", "<!--",
    "]]>", "&amp;", "&lt;b&gt;", "'\"`", "\\u003c", "\\", "${1}", "a\x00b", "\x1b[31mred", "\x07", "\x7f", "\u2028",
    "\u2029", "\u202eevil\u202c", "\u2066hid", "\ufeff", "\u200b", "\ufffd", "\ud7ff", "\ue000", "🌊", "👩‍🚀", "مرحبا",
    "e\u0301\u0323\u0334" * 40, "x" * 5000, "", " ", "\n", "\r\n", "\t", "javascript:alert(1)", "__proto__",
    "constructor", "toString", "\u00a0",
]  # fmt: skip
SMALL = FeaturesConfig(top=3, intervals=3, per_interval=1, before=4, after=2, bins=8)


def plan_in(root: Path) -> Plan:
    stages: dict[str, dict[str, Instance]] = {s: {} for s in ("train", "features", "evaluate", "dashboards")}
    return Plan("test", stages | {"comparisons": {}}, {}, results=str(root))


def add(
    plan: Plan, name: str, texts: list[str], n: int = 40, *, seed: int = 0, labels: bool = False, heads: int = 0,
    evaluated: bool = True, partner: str | None = None, tokens_of: dict[int, list[int]] | None = None, W: Any = None,
    config: FeaturesConfig = SMALL, **about: Any,
) -> Job:  # fmt: skip
    """A dictionary of `n` random latents, its table and its dashboard's job. Latents 1 and 5 never fire, 2 fires on a
    quarter of the tokens. `tokens_of`: token ids of single latents; others have random ones."""
    rng = np.random.default_rng(seed)
    root, g = Path(plan.results), torch.Generator().manual_seed(seed)
    train = root / "train" / name
    train.mkdir(parents=True)
    spec = Spec("sae", "relu", D, D, n, HOOK, HOOK)
    W = torch.randn(n, D, generator=g) if W is None else W
    save_dictionary(build(spec, W.T.contiguous(), torch.zeros(n), W, torch.zeros(D)), train)
    write_receipt(train, "train")
    fired = np.exp(rng.uniform(0, 8, n)).astype(np.int64) + 1
    fired[[1, 5]], fired[2] = 0, N_TOKENS // 4
    folder = root / "features" / name
    folder.mkdir(parents=True)
    _write_table(folder, rng, texts, fired, labels, heads, tokens_of or {}, config)
    index = {"dictionary_key": name, "kind": "sae", "activation": "relu", "hook_name": HOOK, "hook_name_out": HOOK}
    index |= {"hook_head_index": None, "d_in": D, "d_out": D, "amount_name": "l1_coefficient", "amount": 0.5 + seed}
    index |= {"tokens_key": "held", "split": "held_out", "context_size": 64, "n_tokens": N_TOKENS, "n_rows": 1600}
    index |= {"n_documents": 120, "jacobian_key": None, "left_out": {}}
    write_index(folder, index | about, pa.table({"fired": fired}), config)
    write_receipt(folder, "features")
    plan.stages["train"][name] = Instance("train", name, {"training": {"lr": 0.1}, "seed": seed}, {}, {})
    plan.stages["features"][name] = Instance("features", name, {}, {"train": [name]}, {})
    needs = {"features": [name], "train": [name]}
    if evaluated:
        _write_evaluation(root / "evaluate" / name, name, seed)
        plan.stages["evaluate"][name] = Instance("evaluate", name, {}, {"train": [name]}, {})
        needs["evaluate"] = [name]
    sources = {"partner": partner} if partner else {}
    instance = Instance("dashboards", name, {}, needs, sources)
    plan.stages["dashboards"][name] = instance
    return Job(instance, plan, "cpu")


def made(plan: Plan, *args: Any, **kwargs: Any) -> Path:
    """The folder of a dashboard."""
    job = add(plan, *args, **kwargs)
    dashboard(job)
    return job.path


def compared(plan: Plan, matches: int = 3) -> Path:
    """The comparison of all dictionaries of a plan."""
    needs = {stage: sorted(plan.stages[stage]) for stage in ("dashboards", "features", "train", "evaluate")}
    instance = Instance("comparisons", "all", {"dashboards": {"matches": matches}}, needs, {})
    plan.stages["comparisons"]["all"] = instance
    job = Job(instance, plan, "cpu")
    compare(job)
    return job.path


def _write_evaluation(folder: Path, name: str, seed: int) -> None:
    folder.mkdir(parents=True)
    value = {"l0": 10.0 + 5 * seed, "loss_recovered_zero": 0.9 - 0.05 * seed, "explained_variance": 0.7}
    ends = {f"{k}{end}": v + d for k, v in value.items() for end, d in (("_low", -0.01), ("_high", 0.01))}
    more = {"dictionary_key": name, "n_tokens": 1000, "n_documents": 50, "confidence": 0.95, "dead_fraction": 0.05}
    more |= {"model_name": "tiny", "skip": False, "saelens": None, "source": "", "seed": 0}
    more |= {"kind": "sae", "activation": "relu", "hook_name": HOOK, "hook_name_out": HOOK, "hook_head_index": None}
    more |= {"d_sae": 40, "sparsity": "l1", "amount_name": "l1_coefficient", "amount": 0.5 + seed}
    (folder / "summary.json").write_text(json.dumps(value | ends | more))
    write_receipt(folder, "evaluate")


def _write_table(
    folder: Path, rng: np.random.Generator, texts: list[str], fired: np.ndarray, labels: bool, heads: int,
    tokens_of: dict[int, list[int]], config: FeaturesConfig,
) -> None:  # fmt: skip
    n, live = len(fired), fired > 0
    largest = np.where(live, rng.uniform(1, 9, n), np.nan)

    def some(k: int) -> list[np.ndarray]:
        return [np.array(tokens_of.get(i, rng.integers(0, len(texts), k)), dtype=np.int32) for i in range(n)]

    tokens, raised, lowered = some(4), some(5), some(5)
    tokens = [one if live[i] else one[:0] for i, one in enumerate(tokens)]
    values = lambda lists: [rng.uniform(0, 3, len(one)) for one in lists]  # noqa: E731
    near = [np.array([(i + 1) % n, (i + 7) % n]) for i in range(n)]
    columns: dict[str, Any] = {
        "latent": np.arange(n), "fired": fired, "frequency": fired / N_TOKENS, "n_documents": np.minimum(fired, 100),
        "max": largest, "min": largest / 50, "mean": largest / 3, "std": largest / 5, "mean_position": largest,
        "n_distinct_tokens": np.minimum(fired, 9), "decoder_norm": np.ones(n),
        **{f"q{q}": largest * q / 100 for q in (10, 25, 50, 75, 90, 99)},
        "effect": np.where(live, rng.normal(0, 0.1, n), np.nan), "effect_error": np.where(live, 0.01, np.nan),
        "effect_tokens": np.where(live, 8, 0), "tokens": tokens, "token_fired": [np.ones(len(t), int) for t in tokens],
        "token_share": values(tokens), "token_mean": values(tokens), "raised": raised, "lowered": lowered,
        "raised_by": [-np.sort(-v) for v in values(raised)], "lowered_by": [np.sort(-v) for v in values(lowered)],
        "near_decoder": near, "near_decoder_cosine": values(near), "near_firing": near[::-1],
        "near_firing_jaccard": values(near),
    }  # fmt: skip
    if labels:
        columns["label"] = [f"<b>is_{i % 3}</b>" if i % 2 else None for i in range(n)]
        columns["label_f1"] = np.where(np.arange(n) % 2, 0.75, np.nan)
    profiles = {"histogram": (("latent", "bin"), rng.integers(0, 90, (n, config.bins)) * live[:, None]),
                "positions": (("latent", "position_bin"), rng.integers(0, 9, (n, 16))),
                "position_begin": (("position_bin",), np.arange(16) * 4)}  # fmt: skip
    if heads:
        columns["head"] = np.arange(n) % heads
        profiles["head_share"] = (("latent", "head"), np.eye(heads)[np.arange(n) % heads])  # type: ignore[assignment]
    writer = ExamplesWriter(folder)
    for first in range(0, n, GROUP):
        writer.write(_examples(range(first, min(n, first + GROUP)), rng, tokens, largest, len(texts), config))
    writer.close()
    write_latents(folder, latents_table(columns, n), xr.Dataset(profiles), writer.tokens, lambda token: texts[token])


def _examples(
    latents: range, rng: np.random.Generator, tokens: list[np.ndarray], largest: np.ndarray, n_texts: int,
    config: FeaturesConfig,
) -> pa.Table:  # fmt: skip
    rows = []
    width = config.before + 1 + config.after
    for i in latents:
        if np.isnan(largest[i]):
            continue
        shown = [(rank, None) for rank in range(1, config.top + 1)] + [(None, k) for k in range(config.intervals)]
        for rank, interval in shown:
            ids = rng.integers(0, n_texts, width).astype(np.int32)
            ids[config.before] = tokens[i][0]
            part = (config.intervals if interval is None else interval + 1) / config.intervals
            activations = np.zeros(width, np.float32)
            activations[config.before] = value = np.float32(largest[i] * (part - 0.01 * (rank or 1)))
            activations[0] = value / 2
            row = {"latent": i, "rank": rank, "interval": interval, "value": value, "quantile": 0.5, "document": 7}
            row |= {"row": 3, "position": 20, "begin": 20 - config.before}
            rows.append(row | {"token_ids": ids, "activations": activations})
    return pa.Table.from_pylist(rows, SCHEMA)


def replaced(config: FeaturesConfig = SMALL, **changes: Any) -> FeaturesConfig:
    return dataclasses.replace(config, **changes)
