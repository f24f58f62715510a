"""The data of SAEDashboard's pages, a JSON file a dictionary, as its `SaeVisData.save_json` writes it and `load_json`
reads it (0.8): by latent the histograms, logits, tables and sequences, and the statistics of all.

Quantiles of all activations, by which its prompt-centric page ranks latents, are not in it; nor is what
`saeflow.export.dashboard.LEFT_OUT` names.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.export.dashboard import Example, Group, Histogram, Latent, Models, at, open_dashboard
from saeflow.export.subjects import Subject

DECIMALS = 4  # SAEDashboard's, of activations
ACTS_TITLE = "ACTIVATIONS<br>DENSITY = {:.3%}"
TOP_TITLE = "TOP ACTIVATIONS<br>MAX = {:.3f}"
INTERVAL_TITLE = "INTERVAL {:.3f} - {:.3f}<br>CONTAINS {:.3%}"


def write(subjects: list[Subject], folder: Path) -> dict[str, Any]:
    """Writes `<dictionary>/sae_vis_data.json`, latent by latent. Raises what `open_dashboard` does."""
    entries, models = {}, Models()
    for subject in subjects:
        dashboard, place = open_dashboard(subject, models), folder / subject.name
        place.mkdir(parents=True)
        highest, frequency = list[float](), list[float]()
        with (place / "sae_vis_data.json").open("w", encoding="utf-8") as file:
            file.write('{"feature_data_dict": {')
            for latent in dashboard.latents:
                start = ",\n" if highest else "\n"
                file.write(f'{start}"{latent.latent}": {json.dumps(feature_data(latent), allow_nan=False)}')
                highest.append(latent.row["max"] or 0.0)
                frequency.append(latent.row["frequency"])
            stats = {"max": highest, "frac_nonzero": frequency}
            stats |= {name: [] for name in ("skew", "kurtosis", "quantile_data", "quantiles", "ranges_and_precisions")}
            file.write(f'\n}},\n"feature_stats": {json.dumps(stats, allow_nan=False)}\n}}\n')
        entries[subject.name] = [f"{subject.name}/sae_vis_data.json"]
    return {"entries": entries, "left_out": {}}


def feature_data(latent: Latent) -> dict[str, Any]:
    """Its `FeatureData`."""
    row = latent.row
    places, values, shares = (list(column) for column in zip(*latent.aligned, strict=True))
    return {
        "feature_tables_data": {
            "neuron_alignment_indices": places,
            "neuron_alignment_values": values,
            "neuron_alignment_l1": shares,
            **{
                f"correlated_{of}_{what}": []
                for of in ("neurons", "features", "b_features")
                for what in ("indices", "pearson", "cossim")
            },
        },
        "acts_histogram_data": _histogram(latent.histogram, ACTS_TITLE.format(row["frequency"])),
        "logits_table_data": {
            "bottom_token_ids": row["lowered"],
            "bottom_logits": row["lowered_by"],
            "top_token_ids": row["raised"],
            "top_logits": row["raised_by"],
        },
        "logits_histogram_data": _histogram(latent.logit_histogram(), None),
        "sequence_data": {"seq_group_data": [_group(group, latent) for group in latent.groups]},
        "prompt_data": _sequence([], [], [], 0, 0),
        "dfa_data": {},
        "decoder_weights_data": None
        if latent.head_share is None
        else {"n_heads": len(latent.head_share), "allocation_by_head": latent.head_share},
    }


def _group(group: Group, latent: Latent) -> dict[str, Any]:
    top = group.contains < 0
    title = TOP_TITLE.format(group.high) if top else INTERVAL_TITLE.format(group.low, group.high, group.contains)
    return {"title": title, "seq_data": [_example(example, latent) for example in group.examples]}


def _example(example: Example, latent: Latent) -> dict[str, Any]:
    ids = example["token_ids"]
    logits = [0.0] * len(ids) if latent.logits is None else latent.logits[ids].tolist()
    acts, logits = ([round(value, DECIMALS) for value in values] for values in (example["activations"], logits))
    return _sequence(ids, acts, logits, example["row"], at(example))


def _sequence(ids: list[int], acts: list[float], logits: list[float], row: int, at: int) -> dict[str, Any]:
    names = ("loss_contribution", "top_token_ids", "top_logits", "bottom_token_ids", "bottom_logits")
    found: dict[str, Any] = {"original_index": row, "qualifying_token_index": at, "token_ids": ids, "feat_acts": acts}
    return found | {"token_logits": logits} | {name: [] for name in names}


def _histogram(histogram: Histogram | None, title: str | None) -> dict[str, Any]:
    if histogram is None:
        return {"bar_heights": [], "bar_values": [], "tick_vals": [], "title": None}
    centres = [round(value, 5) for value in histogram.centres.tolist()]
    half = (centres[1] - centres[0]) / 2 if len(centres) > 1 else 0.0
    ticks = np.linspace(centres[0] - half, centres[-1] + half, 5)
    return {
        "bar_heights": histogram.counts.tolist(),
        "bar_values": centres,
        "tick_vals": [round(value, 3) for value in ticks.tolist()],
        "title": title,
    }
