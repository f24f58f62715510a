"""The stage `circuits`: what makes some latents of a transcoder active, by weights and on a text.

Tables, all of numbers that add up or follow from the weights alone, are of latents of one layer; `attributions` of one
sum to the pre-activation less `b_enc`, to the rounding of float32.
"""

import json
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeflow.circuits.attribution import CircuitRun
from saeflow.circuits.chosen import Activity, activity, choose, prompt_tokens
from saeflow.circuits.overlap import mean_contributions, overlap_table, pullbacks, strong_tokens
from saeflow.circuits.pages import page
from saeflow.circuits.paths import Path, graph, greedy_paths
from saeflow.circuits.weights import as_read, connections, de_embedding, logit_weights, ov, ov_norms
from saeflow.config import CircuitsConfig, build
from saeflow.config.circuits import conditions
from saeflow.dictionaries import Dictionary
from saeflow.dictionaries.fitting import open_dictionary
from saeflow.features.lookup import spread_text
from saeflow.features.text import Text
from saeflow.jobs.job import Job
from saeflow.jobs.progress import progress
from saeflow.models.opening import open_model
from saeflow.models.source import reading_model
from saeflow.text.packing import encode_all
from saeflow.text.tokenizer import open_tokenizer
from saeflow.text.tokens import open_tokens

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

log = logging.getLogger("saeflow")
KINDS = ("feature", "head", "embedding", "error", "mlp", "skip", "bias")
"""Of what a pre-activation is the sum of."""
TABLES = ("latents", "attributions", "paths", "nodes", "edges", "weights", "heads", "text")
"""Of a latent on its text; `means` and `overlap` are of all latents, over the held-out text."""


class Explained(NamedTuple):
    """A latent and the text on which it is explained."""

    latent: int
    run: CircuitRun
    token: int
    """Position at which it is read."""
    document: int
    """-1 of a prompt."""


def circuits_job(job: Job) -> dict[str, Any]:
    """Explains latents of the highest transcoder of a job, or of the layer that is asked for, and writes its folder."""
    config = build(CircuitsConfig, job.config["circuits"])
    layers, folders = job.config["layers"], job.inputs("train") + job.inputs("foreign")
    transcoders = {n: open_dictionary(path, job) for n, path in zip(layers, folders, strict=True)}
    layer = job.config["layer"]
    store, model = open_tokens(job.input("tokens")), open_model(job)
    with reading_model(job) as folder:
        tokenizer = open_tokenizer(folder)
    CircuitRun.check(model, transcoders)
    text = spread_text(store, config.n_tokens)
    found = activity(model, transcoders[layer], text, config.batch_rows)
    latents = choose(found.fired, config, layer)
    prompt = None
    if config.prompt is not None:
        (ids,) = encode_all(tokenizer, [config.prompt])
        prompt = prompt_tokens(ids, store.attributes["bos_token_id"], model.cfg.n_ctx)
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    for one in progress(_explained(model, transcoders, layer, latents, text, found, prompt), "latents", len(latents)):
        for name, table in tables_of(one, layer, config).items():
            tables[name].append(table.assign(latent=one.latent))
    whole = {name: pd.concat(rows, ignore_index=True) for name, rows in tables.items()}
    whole |= mean_tables(model, transcoders, layer, latents, text, config)
    whole["latents"] = whole["latents"].assign(
        fired=found.fired[latents], frequency=found.fired[latents] / text.n_tokens
    )
    for table in (whole["text"], whole["weights"]):
        table["text"] = [tokenizer.decode([int(t)]) if t >= 0 else "" for t in table["token_id"]]
    whole = {name: table[["latent", *(c for c in table if c != "latent")]] for name, table in whole.items()}
    summary = _summary(job, transcoders, text) | {"n_latents": len(latents)}
    summary["error_share"] = float(whole["latents"]["error_share"].mean())
    with job.writing() as out:
        for name, table in whole.items():
            table.to_parquet(out / f"{name}.parquet", index=False)
        (out / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
        (out / "circuits.html").write_text(page(summary, whole), encoding="utf-8")
    return summary


def _explained(
    model: "HookedTransformer", transcoders: dict[int, Dictionary], layer: int, latents: np.ndarray, text: Text,
    found: Activity, prompt: Tensor | None,
) -> Iterator[Explained]:  # fmt: skip
    """Each latent on the prompt, where its pre-activation is largest, or on the row of the text on which its activation
    is, as far as that."""
    if prompt is not None:
        run = CircuitRun(model, transcoders, prompt.to(model.cfg.device))
        largest = transcoders[layer].pre_activations(run.read(layer, "mlp"))[text.first :].argmax(0) + text.first
        for latent in latents.tolist():
            yield Explained(latent, run, int(largest[latent]), -1)
        return
    rows, positions = text.grid().row_and_position(found.token[latents])
    for latent, row, position in zip(latents.tolist(), rows, positions.tolist(), strict=True):
        tokens = torch.from_numpy(text.tokens[row, : position + 1].astype(np.int64)).to(model.cfg.device)
        document = int(text.document[row, position])
        yield Explained(latent, CircuitRun(model, transcoders, tokens), position, document)


def tables_of(one: Explained, layer: int, config: CircuitsConfig) -> dict[str, pd.DataFrame]:
    """All tables of one latent, without its number; `TABLES` names them."""
    run, latent, token = one.run, one.latent, one.token
    root = run.of_feature(layer, latent, token)
    attributions = run.attribute(root)
    through, without = (tuple(map(conditions, filters)) for filters in (config.through, config.without))
    paths = greedy_paths(run, root, config.iterations, config.branches, config.per_node, through, without)
    merged = graph(run, root, paths)
    heads, weights = weight_tables(run.model, run.transcoders, layer, latent, config)
    by_source = attributions[attributions["kind"].isin(["head", "embedding"])].groupby("token")["contribution"].sum()
    text = pd.DataFrame({"token": range(len(run.tokens)), "token_id": run.tokens.cpu().numpy()})
    text["contribution"] = by_source.reindex(text["token"]).fillna(0.0).to_numpy()
    return {
        "latents": latent_table(run, layer, latent, token, attributions).assign(document=one.document),
        "attributions": attributions,
        "paths": path_table(paths),
        "nodes": pd.DataFrame(merged["nodes"]),
        "edges": edge_table(merged["edges"]),
        "weights": weights,
        "heads": heads,
        "text": text,
    }


def mean_tables(
    model: "HookedTransformer", transcoders: dict[int, Dictionary], layer: int, latents: np.ndarray, text: Text,
    config: CircuitsConfig,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """`means`: of each latent the earlier latents that bring it most and least on average over the text
    (`contribution`), each with its pullback (`weight`); `overlap`: how far the two name the same ones."""
    strong = strong_tokens(model, transcoders[layer], latents, text, config.batch_rows)
    means = mean_contributions(model, transcoders, layer, latents, text, strong, config.batch_rows)
    weights = {earlier: pullbacks(model, transcoders, layer, latents, earlier) for earlier in means}
    columns = ["latent", "layer", "rank", "unit", "contribution", "weight"]
    found = [pd.DataFrame(columns=columns).astype(dict.fromkeys(columns[:4], int) | dict.fromkeys(columns[4:], float))]
    for n, latent in enumerate(latents.tolist()):
        for earlier in means if strong[n].any() else ():
            table = extremes(means[earlier][n], config.top).rename(columns={"weight": "contribution"})
            of_unit = weights[earlier][n].cpu().numpy()
            found.append(table.assign(latent=latent, layer=earlier, weight=of_unit[table["unit"]])[columns])
    return {"means": pd.concat(found, ignore_index=True), "overlap": overlap_table(means, weights, latents, strong)}


def latent_table(run: CircuitRun, layer: int, latent: int, token: int, attributions: pd.DataFrame) -> pd.DataFrame:
    """One row: `activation`, `pre_activation`, `b_enc`, the sum of the contributions of each of `KINDS`, and
    `error_share`: what errors are of the contributions without their signs."""
    transcoder, contributions = run.transcoders[layer], attributions["contribution"]
    sums = contributions.groupby(attributions["kind"]).sum()
    absolute = contributions.abs().groupby(attributions["kind"]).sum()
    row: dict[str, Any] = {
        "layer": layer,
        "token": token,
        "activation": float(run.features[layer][token, latent]),
        "pre_activation": float(transcoder.pre_activations(run.read(layer, "mlp")[token, None])[0, latent]),
        "b_enc": float(transcoder.b_enc[latent]),
    }
    row |= {kind: float(sums.get(kind, 0.0)) for kind in KINDS}
    return pd.DataFrame([row | {"error_share": float(absolute.get("error", 0.0) / absolute.sum())}])


def weight_tables(
    model: "HookedTransformer", transcoders: dict[int, Dictionary], layer: int, latent: int, config: CircuitsConfig
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the weights alone say of a latent, but for the scales of norms.

    The heads that can reach it, each with its `ov_norm`; and the largest and least weights, `rank` 1, 2, … and
    -1, -2, …, of three kinds: `latents` of earlier transcoders that write it, tokens whose `embedding` does, directly
    (`head_layer` and `head` -1) or through one of the heads of largest norm, and tokens whose `logits` it raises.
    """
    u = as_read(model, transcoders[layer].W_enc[:, latent])
    norms = ov_norms(model, u, layer)
    index = norms.flatten().argsort(descending=True, stable=True)
    places = [divmod(int(i), model.cfg.n_heads) for i in index]
    heads = pd.DataFrame([(n, h, float(norms[n, h])) for n, h in sorted(places)], columns=["layer", "head", "ov_norm"])
    ways: list[tuple[int, int, Tensor]] = [(-1, -1, u)]
    ways += [(n, h, as_read(model, ov(model, n, h) @ u)) for n, h in places[: config.heads]]
    found = []
    for head_layer, head, direction in ways:
        through = {"head_layer": head_layer, "head": head}
        below = layer if head_layer < 0 else head_layer
        for earlier in (n for n in transcoders if n < below):
            weights = connections(transcoders[earlier], direction)
            found.append(extremes(weights, config.top).assign(what="latents", layer=earlier, token_id=-1, **through))
        tokens = extremes(de_embedding(model, direction), config.top)
        found.append(tokens.assign(what="embedding", layer=-1, token_id=tokens["unit"], **through))
    logits = extremes(logit_weights(transcoders[layer].W_dec[latent], model), config.top)
    found.append(logits.assign(what="logits", layer=-1, token_id=logits["unit"], head_layer=-1, head=-1))
    columns = ["what", "head_layer", "head", "layer", "rank", "unit", "token_id", "weight"]
    return heads, pd.concat(found, ignore_index=True)[columns]


def extremes(weights: Tensor, n: int) -> pd.DataFrame:
    """The `n` largest entries of `weights` (n,), with `rank` from 1, and the `n` least with `rank` from -1; of fewer
    than 2n each once."""
    rows = []
    for sign, most in ((1, -(-len(weights) // 2)), (-1, len(weights) // 2)):
        values, units = (sign * weights).topk(min(n, most))
        rows += [(sign * (i + 1), int(u), sign * float(v)) for i, (v, u) in enumerate(zip(values, units, strict=True))]
    return pd.DataFrame(rows, columns=["rank", "unit", "weight"])


def path_table(paths: list[Path]) -> pd.DataFrame:
    """A row a step of a path, the root first: `contribution` is what the node adds to the root by way of those before
    it."""
    rows = [
        {"path": number, "step": step, **node._asdict(), "contribution": contribution}
        for number, path in enumerate(paths)
        for step, (node, contribution) in enumerate(zip(path.nodes, path.contributions, strict=True))
    ]
    return pd.DataFrame(rows)


def edge_table(edges: list[dict[str, Any]]) -> pd.DataFrame:
    """A row an edge of a graph: `to_…` is made of `from_…`."""
    columns = [f"{end}_{name}" for end in ("to", "from") for name in ("kind", "layer", "unit", "token")]
    rows = [(*edge["to"].values(), *edge["from"].values(), edge["contribution"]) for edge in edges]
    return pd.DataFrame(rows, columns=[*columns, "contribution"])


def _summary(job: Job, transcoders: dict[int, Dictionary], text: Text) -> dict[str, Any]:
    folders = job.inputs("train") + job.inputs("foreign")
    return {
        "layer": job.config["layer"],
        "layers": job.config["layers"],
        "group": job.config["group"],
        "dictionary_keys": [folder.name for folder in folders],
        "model_name": job.instance.sources.get("model_name"),
        "prompt": job.config["circuits"]["prompt"],
        "n_tokens": text.n_tokens,
    }
