"""A blind comparison of dictionaries by how interpretable their features are (transcoder paper, section 3.2.1).

As many random live features of each dictionary are shown in one shuffled list, each by texts on which it is active:
examples at evenly spaced activations from the strongest to the weakest, in five bands, the tokens shaded. No number is
shown, nor anything else that tells dictionaries apart. `secret/key.json` says which feature is whose; `sheet.csv` is
to be filled in by someone who has not seen it, and `score` reads both. Names, order and draws follow from all that a
set is made of, so that the key of one tells nothing of another.
"""

import csv
import json
import logging
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import fisher_exact

from saeflow.config import BlindConfig, ConfigError
from saeflow.config.checks import html_text
from saeflow.dictionaries import Dictionary
from saeflow.dictionaries.fitting import open_dictionary
from saeflow.features.examples import values_at
from saeflow.features.firings import Firings
from saeflow.features.lookup import active, run_activations, spread_text
from saeflow.features.text import Seen, Text
from saeflow.jobs.job import Job
from saeflow.models.opening import open_model
from saeflow.models.source import reading_model
from saeflow.text.tokenizer import open_tokenizer
from saeflow.text.tokens import open_tokens

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

log = logging.getLogger("saeflow")
VERDICTS = ("interpretable", "maybe", "uninterpretable")
BANDS = ("strongest", "strong", "medium", "weak", "weakest")
ALIKE = 1.1  # factor of L0 within which dictionaries are equally sparse
LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # no vowels: names spell nothing


class SheetError(ConfigError):
    """A sheet that cannot be scored; the message names the line and what may stand there."""


def choose_features(fired: np.ndarray, n_tokens: int, config: BlindConfig, seed: int | tuple[int, int]) -> np.ndarray:
    """Random features of one dictionary that are live: on more than `min_frequency` of the tokens, and `min_active`.

    `fired` (n,): on how many tokens each is active. Raises `ConfigError` where there are too few.
    """
    live = np.flatnonzero((fired > config.min_frequency * n_tokens) & (fired >= config.min_active))
    if len(live) < config.n_features:
        raise ConfigError(
            f"blind.n_features={config.n_features}, but a dictionary has {len(live)} live features; lower it, or "
            "raise tokens.held_out_tokens"
        )
    return np.sort(np.random.default_rng(seed).choice(live, config.n_features, replace=False))


@torch.no_grad()
def find_activations(
    model: "HookedTransformer", dictionary: Dictionary, features: np.ndarray, text: Text, batch_rows: int, scratch: Path
) -> Seen:
    """Where each of `features` fires, numbered as they stand there. `scratch`: a folder that may be made and filled."""
    number = np.full(dictionary.d_sae, -1)
    number[features] = np.arange(len(features))
    firings = Firings(len(features), scratch)
    for _, values in run_activations(model, [dictionary.spec.hook_name], text, batch_rows):
        for n_tokens, token, latent, value in active(dictionary, values, text):
            wanted = number[latent] >= 0
            firings.add(n_tokens, token[wanted], number[latent[wanted]], value[wanted])
    (chunk,) = firings.chunks(len(features))
    return Seen(chunk, text.grid())


def examples(active: np.ndarray, n_examples: int) -> list[list[int]]:
    """For each band, strongest first, indices into `active`, the values of one feature where it fires: those nearest to
    evenly spaced values, each once."""
    order = np.argsort(-active, kind="stable")
    values = active[order]
    wanted = np.linspace(values[0], values[-1], min(n_examples, len(values)))
    free = np.ones(len(values), dtype=bool)
    chosen = []
    for value in wanted:
        nearest = int(np.argmin(np.where(free, np.abs(values - value), np.inf)))
        free[nearest] = False
        chosen.append(nearest)
    edges = np.linspace(values[0], values[-1], len(BANDS) + 1)
    band = np.minimum(np.searchsorted(-edges[1:-1], -values[sorted(chosen)], side="left"), len(BANDS) - 1)
    return [[int(order[i]) for i, b in zip(sorted(chosen), band, strict=True) if b == n] for n in range(len(BANDS))]


def names(n: int, seed: int) -> list[str]:
    """Different names of four letters."""
    generator = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < n:
        found["".join(generator.choices(LETTERS, k=4))] = None
    return list(found)


# -------------------------------------------------------------------- what is shown
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;color:#222}code{font:14px/1.7 monospace;white-space:"
    "pre-wrap}h2{border-top:1px solid #bbb;padding-top:1em}.b{color:#777}.s{background:#fde3cf}.t{background:#f9b98a}"
    ".u{background:#ee8640}.at{outline:1.5px solid #a33}"
)


def page(shown: list[tuple[str, list[list[str]]]]) -> str:
    """The HTML page of features by name, each with its bands of examples (HTML)."""
    parts = [f'<!doctype html><meta charset="utf-8"><title>Features</title><style>{STYLE}</style><h1>Features</h1>']
    parts.append(
        "<p>What is each feature active on? The token at which an example was chosen is outlined; the darker a token, "
        "the more active the feature there. Fill in the sheet: <i>interpretable</i>, <i>maybe</i> or "
        "<i>uninterpretable</i>, and whether the token alone explains it, whatever stands before it "
        "(<i>context_free</i>: yes or no).</p>"
    )
    for name, bands in shown:
        parts.append(f"<h2>{name}</h2>")
        for band, texts in zip(BANDS, bands, strict=True):
            if texts:
                parts.append(f'<div class="b">{band}</div>' + "".join(f"<div><code>{t}</code></div>" for t in texts))
    return "\n".join(parts) + "\n"


def example(tokens: list[str], values: np.ndarray, at: int, largest: float) -> str:
    """One text as HTML: tokens shaded by `values` (tokens,) over `largest`, the one at `at` outlined."""
    parts = []
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        shade = "" if value <= 0 else "s" if value < largest / 3 else "t" if value < 2 * largest / 3 else "u"
        classes = " ".join(c for c in (shade, "at" if i == at else "") if c)
        text = html_text(token.replace("\n", "↵"))
        parts.append(f'<span class="{classes}">{text}</span>' if classes else text)
    return "".join(parts)


# -------------------------------------------------------------------- jobs
def blind_job(job: Job) -> int:
    """Makes the set that a job names; returns the number of features in it."""
    settings = BlindConfig(**job.config["blind"])
    store = open_tokens(job.input("tokens"))
    text = spread_text(store, store.n_rows * store.context_size)  # all
    model = open_model(job)
    with reading_model(job) as folder:
        tokenizer = open_tokenizer(folder)
    salt = int(job.instance.identity, 16)
    shown, key, l0s = [], [], []
    folders = {"/".join(p.parts[-2:]) if p.name in ("input", "output") else p.name: p for p in job.dictionaries()}
    for n, evaluated in enumerate(job.inputs("evaluate")):
        summary = json.loads((evaluated / "summary.json").read_text())
        name = summary["dictionary_key"]
        l0s.append(summary["l0"])
        dictionary = open_dictionary(folders[name], job)
        fired = pd.read_parquet(evaluated / "latents.parquet")["fired_without_bos"].to_numpy()
        features = choose_features(fired, text.tokens.size, settings, (salt, n))
        with TemporaryDirectory() as scratch:
            seen = find_activations(model, dictionary, features, text, settings.batch_rows, Path(scratch) / "firings")
        for number, feature in enumerate(features):
            shown.append(_bands(seen, number, text, tokenizer, settings))
            key.append({"dictionary": name, "kind": dictionary.spec.kind, "feature": int(feature)})
    _warn_of_sparsity(l0s)
    order = list(range(len(shown)))
    random.Random(salt).shuffle(order)
    feature_names = names(len(order), salt)
    with job.writing() as out:
        (out / "dashboards.html").write_text(page([(n, shown[i]) for n, i in zip(feature_names, order, strict=True)]))
        with (out / "sheet.csv").open("w", newline="") as file:
            blank = ((name, "", "", "") for name in feature_names)
            csv.writer(file).writerows([("feature", "verdict", "context_free", "note"), *blank])
        (out / "secret").mkdir()
        secret = {name: key[i] for name, i in zip(feature_names, order, strict=True)}
        (out / "secret/key.json").write_text(json.dumps(secret, indent=1) + "\n")
    return len(order)


def _warn_of_sparsity(l0s: list[float]) -> None:
    """Says so where dictionaries are not of about equal L0: how sparse a dictionary is, is part of how readable."""
    if max(l0s) > ALIKE * min(l0s):
        told = " and ".join(f"{l0:.1f}" for l0 in sorted(l0s))
        log.warning("blind: dictionaries have an L0 of %s, so that verdicts also compare how sparse they are", told)


def _bands(seen: Seen, number: int, text: Text, tokenizer: Any, settings: BlindConfig) -> list[list[str]]:
    firings = slice(*seen.chunk.start[number : number + 2])
    value = seen.chunk.value[firings]
    rows, positions = (where[firings] for where in seen.place)
    largest = float(value.max())

    def shown(i: int) -> str:
        row, position = int(rows[i]), int(positions[i])
        first = max(0, position - settings.window)
        ids = text.tokens[row, first : position + settings.window + 1]
        around = np.arange(first, first + len(ids))
        values = values_at(seen, np.full_like(around, number), np.full_like(around, row), around)
        return example([tokenizer.decode([int(t)]) for t in ids], values, position - first, largest)

    return [[shown(i) for i in band] for band in examples(value, settings.n_examples)]


# -------------------------------------------------------------------- the score
def read_sheet(path: Path, key: dict[str, Any]) -> pd.DataFrame:
    """A filled-in sheet with what the key says of each feature.

    Raises `SheetError` for a verdict that is missing or unknown, and for features that are not those of the key.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for line, row in enumerate(rows, start=2):
        where = f"{path}, line {line} ({row.get('feature')})"
        if row.get("feature") not in key:
            raise SheetError(f"{where}: no such feature in the key; is it the key of another set?")
        row["verdict"] = (row.get("verdict") or "").strip().lower()
        row["context_free"] = (row.get("context_free") or "").strip().lower()
        if row["verdict"] not in VERDICTS:
            raise SheetError(f"{where}: verdict {row['verdict']!r} is none of {', '.join(VERDICTS)}")
        if row["context_free"] not in ("", "yes", "no"):
            raise SheetError(f"{where}: context_free {row['context_free']!r} is neither yes nor no")
    names = [row["feature"] for row in rows]
    if len(set(names)) < len(names) or len(names) < len(key):
        missing = sorted(set(key) - set(names))
        raise SheetError(
            f"{path} must have every feature once; missing: {', '.join(missing) or 'none, some are twice'}"
        )
    return pd.DataFrame([row | key[row["feature"]] for row in rows])


def score(sheet: pd.DataFrame) -> pd.DataFrame:
    """Of each dictionary: how many features got each verdict, how many of the interpretable ones are context-free."""
    out = []
    for name, rows in sheet.groupby("dictionary", sort=True):
        counts = {verdict: int((rows["verdict"] == verdict).sum()) for verdict in VERDICTS}
        free = int(((rows["verdict"] == "interpretable") & (rows["context_free"] == "yes")).sum())
        out.append(
            {"dictionary": name, "kind": rows["kind"].iloc[0], "features": len(rows)} | counts | {"context_free": free}
        )
    return pd.DataFrame(out)


def p_value(table: pd.DataFrame) -> float | None:
    """Fisher's exact test, two-sided, of interpretable or not, where two dictionaries were compared."""
    if len(table) != 2:
        return None
    return float(fisher_exact([table["interpretable"], table["features"] - table["interpretable"]]).pvalue)
