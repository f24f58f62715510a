"""A blind comparison of dictionaries by how interpretable their features are (transcoder paper, section 3.2.1).

As many random live features of each dictionary are shown in one shuffled list, each by texts on which it is active:
examples at evenly spaced activations from the strongest to the weakest, in five bands, the tokens shaded. No number is
shown, nor anything else that tells dictionaries apart. `secret/key.json` says which feature is whose; `sheet.csv` is
to be filled in by someone who has not seen it, and `score` reads both.
"""

import csv
import html
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import fisher_exact

from saeflow.config import BlindConfig, ConfigError
from saeflow.config.checks import escape_controls
from saeflow.dictionaries import Dictionary
from saeflow.dictionaries.fitting import open_dictionary, open_model
from saeflow.evaluation.sums import Rows, token_batches
from saeflow.jobs.job import Job
from saeflow.models.attention import fused_attention
from saeflow.models.source import reading_model
from saeflow.models.splicing import flattened, read_hooks
from saeflow.text.tokenizer import open_tokenizer
from saeflow.text.tokens import TokenStore, open_tokens

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

VERDICTS = ("interpretable", "maybe", "uninterpretable")
BANDS = ("strongest", "strong", "medium", "weak", "weakest")
LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # no vowels: names spell nothing


class SheetError(ConfigError):
    """A sheet that cannot be scored; the message names the line and what may stand there."""


class Activations(NamedTuple):
    """Where one feature is active: row, position and value, (activations,) each."""

    row: np.ndarray
    position: np.ndarray
    value: np.ndarray


def choose_features(fired: np.ndarray, n_tokens: int, config: BlindConfig, seed: int) -> np.ndarray:
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


def find_activations(
    model: "HookedTransformer", dictionary: Dictionary, features: np.ndarray, rows: Rows,
    prepend_bos: bool, batch_rows: int,
) -> list[Activations]:  # fmt: skip
    """Where each of `features` is active in `rows` (sequence, position), BOS left out."""
    found: list[list[np.ndarray]] = [[] for _ in features]
    chosen = torch.from_numpy(features).to(model.cfg.device)
    start = 0
    for tokens, _ in token_batches(rows, prepend_bos, batch_rows, model.cfg.device, "examples"):
        with fused_attention(model), torch.no_grad():
            (value,) = read_hooks(model, tokens, [dictionary.spec.hook_name])
            x = flattened(value, dictionary.spec.hook_head_index)
            size = max(1, (1 << 22) // dictionary.d_sae)
            f = torch.cat([dictionary.encode(some)[:, chosen] for some in x.split(size)])
        values = f.view(*tokens.shape, -1).cpu().numpy()
        values[:, : int(prepend_bos)] = 0
        for parts, of_one in zip(found, np.moveaxis(values, 2, 0), strict=True):
            row, position = np.nonzero(of_one)
            parts.append(np.stack([row + start, position, of_one[row, position]]))
        start += len(tokens)
    joined = (np.concatenate(parts, axis=1) for parts in found)
    return [Activations(one[0].astype(int), one[1].astype(int), one[2]) for one in joined]


def examples(active: Activations, n_examples: int) -> list[list[int]]:
    """For each band, strongest first, indices into `active`: those nearest to evenly spaced values, each once."""
    order = np.argsort(-active.value, kind="stable")
    values = active.value[order]
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
        text = html.escape(escape_controls(token.replace("\n", "↵")))
        parts.append(f'<span class="{classes}">{text}</span>' if classes else text)
    return "".join(parts)


# -------------------------------------------------------------------- jobs
def blind_job(job: Job) -> int:
    """Makes the set that a job names; returns the number of features in it."""
    settings = BlindConfig(**job.config["blind"])
    rows = open_tokens(job.input("tokens"))
    model = open_model(job)
    with reading_model(job) as folder:
        tokenizer = open_tokenizer(folder)
    shown, key = [], []
    folders = {"/".join(p.parts[-2:]) if p.name in ("input", "output") else p.name: p for p in job.dictionaries()}
    for evaluated in job.inputs("evaluate"):
        name = json.loads((evaluated / "summary.json").read_text())["dictionary_key"]
        dictionary = open_dictionary(folders[name], job)
        fired = pd.read_parquet(evaluated / "latents.parquet")["fired_without_bos"].to_numpy()
        features = choose_features(fired, rows.n_rows * rows.context_size, settings, settings.seed)
        found = find_activations(model, dictionary, features, rows, rows.attributes["prepend_bos"], settings.batch_rows)
        for feature, active in zip(features, found, strict=True):
            shown.append(_bands(active, rows, tokenizer, settings))
            key.append({"dictionary": name, "kind": dictionary.spec.kind, "feature": int(feature)})
    order = list(range(len(shown)))
    random.Random(settings.seed).shuffle(order)
    feature_names = names(len(order), settings.seed)
    with job.writing() as out:
        (out / "dashboards.html").write_text(page([(n, shown[i]) for n, i in zip(feature_names, order, strict=True)]))
        with (out / "sheet.csv").open("w", newline="") as file:
            blank = ((name, "", "", "") for name in feature_names)
            csv.writer(file).writerows([("feature", "verdict", "context_free", "note"), *blank])
        (out / "secret").mkdir()
        secret = {name: key[i] for name, i in zip(feature_names, order, strict=True)}
        (out / "secret/key.json").write_text(json.dumps(secret, indent=1) + "\n")
    return len(order)


def _bands(active: Activations, rows: TokenStore, tokenizer: Any, settings: BlindConfig) -> list[list[str]]:
    values = {(r, p): v for r, p, v in zip(*active, strict=True)}
    largest = float(active.value.max())

    def text(i: int) -> str:
        row, position = int(active.row[i]), int(active.position[i])
        first = max(0, position - settings.window)
        ids = rows[row : row + 1][0, first : position + settings.window + 1]
        at = np.array([values.get((row, p), 0.0) for p in range(first, first + len(ids))])
        return example([tokenizer.decode([int(t)]) for t in ids], at, position - first, largest)

    return [[text(i) for i in band] for band in examples(active, settings.n_examples)]


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
