"""The folder that SAEDashboard's `neuronpedia-runner` (0.8) leaves, which Neuronpedia's converter takes: of every
dictionary `batch-<i>.json` of 128 latents each, `run_settings.json` and `skipped_indexes.json`.

Values are rounded as there, to three decimals. Frequencies are of tokens without the BOS in front of rows, which their
runner counts, though it lets nothing fire there.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from saeflow.export.dashboard import Dashboard, Example, Group, Histogram, Latent, Models, at, open_dashboard
from saeflow.export.subjects import Subject

BATCH, DECIMALS = 128, 3  # their defaults


def write(subjects: list[Subject], folder: Path) -> dict[str, Any]:
    """Writes a folder for each dictionary, batch by batch. Raises what `open_dashboard` does."""
    entries, models = {}, Models()
    for subject in subjects:
        dashboard, place = open_dashboard(subject, models), folder / subject.name
        place.mkdir(parents=True)
        about = {"model_id": dashboard.model_id, "layer": dashboard.layer, "sae_set": subject.name}
        for i, latents in enumerate(_batches(dashboard.latents)):
            features = [feature(latent, dashboard) for latent in latents]
            _dump(place / f"batch-{i}.json", about | {"sae_id_suffix": None, "features": features})
        _dump(place / "run_settings.json", _settings(dashboard, subject))
        _dump(place / "skipped_indexes.json", about | {"layer": str(dashboard.layer), "skipped_indexes": []})
        entries[subject.name] = [subject.name]
    return {"entries": entries, "left_out": {}}


def feature(latent: Latent, dashboard: Dashboard) -> dict[str, Any]:
    """Its `NeuronpediaDashboardFeature`."""
    row, texts, index = latent.row, dashboard.features.token_texts, dashboard.features.index
    places, values, shares = (list(column) for column in zip(*latent.aligned, strict=True))
    heights, bars = _bars(latent.histogram)
    logit_heights, logit_bars = _bars(latent.logit_histogram())
    return {
        "feature_index": latent.latent,
        "neuron_alignment_indices": places,
        "neuron_alignment_values": _rounded(values),
        "neuron_alignment_l1": _rounded(shares),
        **{f"correlated_{of}_{what}": [] for of in ("neurons", "features") for what in ("indices", "l1", "pearson")},
        "neg_str": [texts[token] for token in row["lowered"]],
        "neg_values": _rounded(row["lowered_by"]),
        "pos_str": [texts[token] for token in row["raised"]],
        "pos_values": _rounded(row["raised_by"]),
        "frac_nonzero": row["frequency"],
        "freq_hist_data_bar_heights": heights,
        "freq_hist_data_bar_values": bars,
        "logits_hist_data_bar_heights": logit_heights,
        "logits_hist_data_bar_values": logit_bars,
        "n_prompts_total": index["n_rows"],
        "n_tokens_in_prompt": index["context_size"],
        "dataset": dashboard.corpus,
        "decoder_weights_dist": latent.head_share or [],
        "activations": [_activation(example, group, texts) for group in latent.groups for example in group.examples],
        "vector": [],
    }


def _activation(example: Example, group: Group, texts: dict[int, str]) -> dict[str, Any]:
    """Its `NeuronpediaDashboardActivation`."""
    return {
        "bin_min": group.low,
        "bin_max": group.high,
        "bin_contains": group.contains,
        "qualifying_token_index": at(example),
        "tokens": [texts[token] for token in example["token_ids"]],
        "values": _rounded(example["activations"]),
    }


def _settings(dashboard: Dashboard, subject: Subject) -> dict[str, Any]:
    """What their runner notes of itself, as far as it is known here."""
    index = dashboard.features.index
    return {
        "sae_set": subject.name,
        "sae_path": index["hook_name"],
        "outputs_dir": ".",
        "np_set_name": None,
        "np_sae_id_suffix": None,
        "huggingface_dataset_path": dashboard.corpus,
        "n_prompts_total": index["n_rows"],
        "n_tokens_in_prompt": index["context_size"],
        "n_features_at_a_time": BATCH,
        "n_quantiles": index["intervals"],
        "model_id": dashboard.model_id,
        "layer": dashboard.layer,
    }


def _batches(latents: Iterator[Latent]) -> Iterator[list[Latent]]:
    while some := [*itertools.islice(latents, BATCH)]:
        yield some


def _bars(histogram: Histogram | None) -> tuple[list[int], list[float]]:
    if histogram is None:
        return [], []
    return histogram.counts.tolist(), _rounded(histogram.centres)


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(value), DECIMALS) for value in values]


def _dump(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
