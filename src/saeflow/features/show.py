"""How a latent, and a table of latents, show themselves in a notebook: HTML without scripts. All text is escaped."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from saeflow.config.checks import escape_controls, html_text

if TYPE_CHECKING:
    from saeflow.features.reader import Example, Feature, Features

TOP, OF_INTERVAL, TOKENS, NEIGHBOURS, LATENTS = 5, 1, 8, 6, 10
"""How many are shown."""
_LINE = "font:12px/1.8 ui-monospace,monospace;white-space:pre-wrap"
_LARGEST = 0.75  # opacity at the largest activation: the text stays readable on it, dark on light and light on dark


def feature_html(feature: "Feature") -> str:
    """What fires it, over the whole range of its activations, and what it does."""
    row = feature.row
    if not row["fired"]:
        return f"<h4>latent {feature.latent}</h4><p>It fires on no token that was looked at.</p>"
    facts = [
        f"fires on {int(row['fired']):,} tokens ({row['frequency']:.3%}) of {int(row['n_documents']):,} documents",
        f"largest activation {row['max']:.4g}, median {row['q50']:.4g}",
    ]
    if _known(row["effect"]):
        error = f" ± {row['effect_error']:.2g}" if _known(row["effect_error"]) else ""
        facts.append(f"without it the loss rises by {row['effect']:.3g}{error} nats where it fires")
    if isinstance(row["label"], str):
        facts.append(f"label: {row['label']}" + (f" (F1 {row['label_f1']:.2f})" if _known(row["label_f1"]) else ""))
    parts = [f"<h4>latent {feature.latent}</h4><p>{'; '.join(html_text(fact) for fact in facts)}</p>"]
    parts += ["<b>largest activations</b>", *(_example(one, row["max"]) for one in feature.top[:TOP])]
    parts.append("<b>over its range, from the strongest part to the weakest</b>")
    for examples in reversed(feature.intervals):
        parts += [_example(one, row["max"]) for one in examples[:OF_INTERVAL]]
    parts.append(_tokens("raises", feature.raised))
    parts.append(_tokens("lowers", feature.lowered))
    parts.append(_tokens("fires most on", feature.tokens))
    for name, near in feature.near.items():
        told = ", ".join(f"{latent} ({value:.2f})" for latent, value in near[:NEIGHBOURS])
        parts += [f"<p><b>nearest by {html_text(name)}</b> {told}</p>"] if told else []
    return "\n".join(part for part in parts if part)


def features_html(features: "Features") -> str:
    """Of which dictionary it is, and the latents that matter most."""
    index = features.index
    by = "effect" if features.table["effect"].notna().any() else "frequency"
    columns = ["latent", "frequency", "max", "effect", "label"]
    shown = features.table.nlargest(LATENTS, by)[[name for name in columns if features.table[name].notna().any()]]
    rows = "".join(
        f"<tr>{''.join(f'<td>{html_text(_number(value))}</td>' for value in row)}"
        f'<td style="text-align:left">{html_text(_quoted(features[int(row[0])].raised[:3]))}</td></tr>'
        for row in shown.itertuples(index=False)
    )
    heads = "".join(f"<th>{html_text(name)}</th>" for name in [*shown, "raises"])
    return (
        f"<p>Latents of <code>{html_text(index['dictionary_key'])}</code> at {html_text(index['hook_name'])}: "
        f"{index['n_latents']:,}, of which {index['n_live']:,} fire on {index['n_tokens']:,} tokens of "
        f"{html_text(index['split'].replace('_', '-'))} text. Those of the largest {html_text(by)}:</p>"
        f"<table><tr>{heads}</tr>{rows}</table>"
    )


def _example(example: "Example", largest: float) -> str:
    """A text in which tokens are the darker, the larger the activation; the one that is meant is outlined."""
    spans = []
    for n, (token, value) in enumerate(zip(example.tokens, example.activations, strict=True)):
        share = min(1.0, abs(value) / abs(largest)) * _LARGEST if largest else 0.0
        style = f"background:rgba(230,159,0,{share:.2f})" if value else ""
        style += ";outline:1.5px solid" if n == example.at else ""
        spans.append(f'<span style="{style}" title="{value:.4g}">{html_text(visible(token))}</span>')
    about = f"{example.value:.4g}, stronger than {example.quantile:.1%} of its firings; document {example.document}"
    return f'<div style="{_LINE}" title="{html_text(about)}"><small>{example.value:.3g}</small> {"".join(spans)}</div>'


def _tokens(what: str, named: Sequence[tuple[str, Any]]) -> str:
    return f"<p><b>{what}</b> <code>{html_text(_quoted(named[:TOKENS]))}</code></p>" if named else ""


def _quoted(named: Sequence[tuple[str, Any]]) -> str:
    return " ".join(f"“{visible(token)}” {_number(value)}" for token, value in named)


def visible(token: str) -> str:
    """A token with its line breaks and tabs as signs, and other characters that turn or hide text spelled out."""
    return escape_controls(token.replace("\n", "↵").replace("\t", "→").replace("\r", "↵"))


def _number(value: Any) -> str:
    if isinstance(value, Real) and not isinstance(value, Integral):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def _known(value: Any) -> bool:
    return isinstance(value, Real) and not math.isnan(value)
