"""The page of a study of circuits: static HTML that loads nothing, from the stage's tables."""

import io
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from saeflow.circuits.figures import as_paths, draw_graph, largest
from saeflow.config.checks import html_text
from saeflow.features.show import visible
from saeflow.figures.axes import subplots
from saeflow.figures.style import STYLE

ATTRIBUTIONS, PATHS = 12, 10  # that are shown; the tables hold all
KINDS = {
    "feature": "earlier latents", "head": "heads", "embedding": "embedding", "error": "the transcoders' errors",
    "mlp": "MLPs without a transcoder", "skip": "skip connections", "bias": "biases",
}  # fmt: skip
_CSS = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #111; }
section { border-top: 1px solid #999; margin-top: 2em; }
table { border-collapse: collapse; margin: .4em 2em 1.2em 0; display: inline-table; vertical-align: top; }
th, td { padding: .1em .6em; text-align: right; border-bottom: 1px solid #ccc; }
td:first-child, th:first-child { text-align: left; }
caption { text-align: left; font-weight: 600; padding-bottom: .3em; }
.text { font: 12px/1.9 ui-monospace, monospace; white-space: pre-wrap; }
.text span { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.text .max { text-decoration: underline; font-weight: 600; }
figure { margin: 1em 0; } figure svg { max-width: 100%; height: auto; }
code { font: 12px ui-monospace, monospace; white-space: pre; }
"""


def page(summary: dict[str, Any], tables: dict[str, pd.DataFrame]) -> str:
    heading = f"Circuits of latents of layer {summary['layer']}"
    layers = ", ".join(map(str, summary["layers"]))
    on = "a prompt" if summary["prompt"] is not None else "the held-out text on which it is most active"
    parts = [
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{heading}</title>\n<style>{_CSS}</style>',
        f"<h1>{heading}</h1>",
        f"<p>Transcoders <code>{html_text(summary['group'])}</code> of layers {layers}; each latent on {on}. A "
        "pre-activation without <code>b_enc</code> is the sum of all contributions; attention patterns and the scales "
        "of norms are taken as they are on this text. Tables of weights do not depend on a text; they leave out the "
        "scales of norms.</p>",
    ]
    for one in tables["latents"].itertuples():
        mine = {name: table[table["latent"] == one.latent] for name, table in tables.items()}
        parts.append(_section(one, mine))
    return "\n".join(parts) + "\n</html>\n"


def _section(one: Any, mine: dict[str, pd.DataFrame]) -> str:
    tokens = [visible(text) for text in mine["text"]["text"]]
    where = f"document {one.document}, " if one.document >= 0 else ""
    return "\n".join(
        [
            f'<section id="latent-{one.latent}"><h2>Latent {one.latent}</h2>',
            f"<p>Fires on {one.fired:,} tokens ({one.frequency:.2%}); here, at position {one.token} ({where}“"
            f"{html_text(tokens[one.token])}”), its activation is {one.activation:.4g}: b_enc {one.b_enc:+.4g}, and "
            f"{one.pre_activation - one.b_enc:.4g} of contributions. Errors of the transcoders are "
            f"{one.error_share:.1%} of these without their signs.</p>",
            "<p>What embedding and heads bring it from each token (orange: more, blue: less):</p>",
            _shaded(tokens, mine["text"]["contribution"].tolist()),
            _graph(one, mine, tokens),
            _kinds(one),
            _attributions(mine["attributions"], tokens),
            _paths(mine["paths"], tokens),
            _overlap(mine["overlap"]),
            _means(mine["means"]),
            _weights(mine["weights"]),
            _heads(mine["heads"]),
            "</section>",
        ]
    )


def _shaded(tokens: list[str], values: list[float]) -> str:
    largest_one = max(map(abs, values), default=0.0) or 1.0
    spans = []
    for token, value in zip(tokens, values, strict=True):
        colour = "230,159,0" if value > 0 else "86,180,233"
        marked = ' class="max"' if abs(value) == largest_one else ""
        style = f'style="background:rgba({colour},{0.9 * abs(value) / largest_one:.2f})"'
        spans.append(f'<span{marked} {style} title="{value:.3g}">{html_text(token)}</span>')
    return f'<div class="text">{"".join(spans)}</div>'


def _graph(one: Any, mine: dict[str, pd.DataFrame], tokens: list[str]) -> str:
    """The figure's panel as SVG, of the same bytes each time."""
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "none", "svg.hashsalt": "circuits"}):
        drawn, axis = subplots(figsize=(9.0, 4.2))
        draw_graph(axis, largest(as_paths(mine["paths"])), one, tokens)
        drawn.tight_layout()
        file = io.StringIO()
        drawn.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>Numbers: % of the contributions.</figcaption></figure>"


def _table(caption: str, head: list[str], rows: list[list[str]]) -> str:
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    names = "".join(f"<th>{html_text(name)}</th>" for name in head)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><caption>{html_text(caption)}</caption><tr>{names}</tr>{body}</table>"


def _kinds(one: Any) -> str:
    rows = [[name, f"{getattr(one, kind):+.4f}"] for kind, name in KINDS.items() if getattr(one, kind)]
    return _table("Contributions by kind", ["of", "sum"], rows)


def _node(kind: str, layer: int, unit: int, token: int, tokens: list[str]) -> str:
    """In words, as HTML."""
    at = f"<code>{html_text(tokens[token])}</code> {token}"
    named = {"feature": f"L{layer} latent {unit}", "head": f"L{layer} head {unit} from", "embedding": "embedding"}
    return f"{named.get(kind, KINDS.get(kind, kind) + f' L{layer}')} {at}"


def _attributions(table: pd.DataFrame, tokens: list[str]) -> str:
    order = table["contribution"].abs().sort_values(ascending=False, kind="stable").index[:ATTRIBUTIONS]
    rows = [
        [_node(row["kind"], row["layer"], row["unit"], row["token"], tokens), f"{row['contribution']:+.4f}"]
        for row in table.loc[order].to_dict("records")
    ]
    return _table(f"The {len(rows)} largest contributions", ["of", "contribution"], rows)


def _paths(table: pd.DataFrame, tokens: list[str]) -> str:
    ends = sorted(as_paths(table)[1:], key=lambda path: -path.contributions[-1])[:PATHS]
    rows = [
        [" ← ".join(_node(*node, tokens) for node in path.nodes[1:]), f"{path.contributions[-1]:.4f}"] for path in ends
    ]
    return _table("The largest paths", ["down from the latent", "contribution"], rows)


def _overlap(table: pd.DataFrame) -> str:
    if table.empty:
        return ""
    wide = table.pivot(index="layer", columns="k", values="overlap")
    rows = [
        [f"layer {layer}", *("" if np.isnan(v) else f"{100 * v:.0f} %" for v in line)]
        for layer, line in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    tokens = table["n_tokens"].iloc[0]
    caption = f"Of the k latents that bring it most on average (of {tokens:,} tokens), among the k largest pullbacks"
    return _table(caption, ["", *(f"k = {k}" for k in wide)], rows)


def _means(table: pd.DataFrame) -> str:
    parts = []
    for layer, rows in table[table["rank"] > 0].groupby("layer"):
        cells = [[f"latent {row.unit}", f"{row.contribution:+.4f}", f"{row.weight:+.3f}"] for row in rows.itertuples()]
        parts.append(_table(f"Latents of layer {layer} that bring it most on average", ["", "mean", "pullback"], cells))
    return "\n".join(parts)


def _weights(table: pd.DataFrame) -> str:
    names = {"latents": "Latents of layer {} that write it", "embedding": "Tokens that write it",
             "logits": "Tokens whose logits it raises, and lowers"}  # fmt: skip
    parts = []
    for _, rows in table.groupby(["what", "layer", "head_layer", "head"], sort=False):
        one = rows.to_dict("records")[0]
        through = f", through head {one['head']} of layer {one['head_layer']}" if one["head"] >= 0 else ""
        cells = [
            [
                f"latent {row['unit']}" if row["token_id"] < 0 else f"<code>{html_text(visible(row['text']))}</code>",
                f"{row['weight']:+.3f}",
            ]
            for row in rows.to_dict("records")
        ]
        parts.append(_table(names[one["what"]].format(one["layer"]) + through, ["", "weight"], cells))
    return "\n".join(parts)


def _heads(table: pd.DataFrame) -> str:
    wide = table.pivot(index="layer", columns="head", values="ov_norm")
    rows = [
        [f"layer {layer}", *(f"{value:.3f}" for value in line)]
        for layer, line in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    return _table(
        "Norm of what each head's OV circuit lets it read of the stream", ["", *(f"head {h}" for h in wide)], rows
    )
