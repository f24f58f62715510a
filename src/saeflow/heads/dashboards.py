"""Latents of a dictionary on all heads beside the atoms of single heads that they decompose into: a static HTML page.

Left the latent: what each head has of it, which tokens each head reads for it and which it promotes, and the texts on
which it is most active, each with its direct feature attribution, by source token and by head. Right its first atoms,
with how well they agree with it, on the texts on which they are most active themselves. Orange is above 0, blue below;
the darker, the larger relative to the largest of its line. Each table and line says its numbers on hovering.
"""

import functools
import html
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import xarray as xr
from torch import Tensor

from saeflow.config import HeadsConfig
from saeflow.dictionaries import Dictionary
from saeflow.dictionaries.heads import BlockDiagonal
from saeflow.features.examples import top, values_at
from saeflow.features.firings import Chunk
from saeflow.features.logits import logit_effects
from saeflow.features.show import visible
from saeflow.features.text import Grid, Seen
from saeflow.heads.attribution import by_source, de_embedding
from saeflow.heads.shares import MEASURES
from saeflow.heads.study import HeadMeasurements
from saeflow.heads.weights import Attention, decoder_by_head, encoder_by_head
from saeflow.models.splicing import read_hooks

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

ATOMS, SOURCES, TOKENS = 3, 6, 8  # shown of each latent
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 90em; color: #111; }
section { border-top: 1px solid #999; margin-top: 1.5em; break-inside: avoid; }
.beside { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 2em; }
table { border-collapse: collapse; margin: .4em 0; font-size: 12px; }
th, td { padding: .1em .5em; text-align: right; border-bottom: 1px solid #ccc; white-space: nowrap; }
td.tokens { text-align: left; font-family: ui-monospace, monospace; white-space: normal; }
.text { font: 12px/1.8 ui-monospace, monospace; white-space: pre-wrap; margin: .1em 0; }
.text span { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.at { outline: 1.5px solid #a33; }
.note { font-size: 12px; color: #555; margin: 0 0 .5em; }
h2 { font-size: 1.1em; } h3 { font-size: 1em; margin: .6em 0 .2em; }
"""


class Context(NamedTuple):
    """A text on which a latent is active: a row, and the position of its largest activation there."""

    row: int
    position: int
    value: float


def seen(measurements: HeadMeasurements, column: sp.csc_array) -> Seen:
    """The activations of one latent (N, 1), each row of text a window."""
    size = measurements.rows.shape[1]
    chunk = Chunk(0, np.array([0, column.nnz]), column.indices.astype(np.int64), column.data.astype(np.float32))
    return Seen(chunk, Grid(size, size, measurements.first))


def top_contexts(latent: Seen, most: int) -> list[Context]:
    """The rows with its largest activations, the largest first; of equal ones the earlier."""
    best = top(latent, most)
    places = (where[best].tolist() for where in latent.place)
    return [Context(*place) for place in zip(*places, latent.chunk.value[best].tolist(), strict=True)]


def in_row(latent: Seen, row: int) -> np.ndarray:
    """Its activations at every position of a row, 0 at BOS."""
    position = np.arange(latent.grid.context_size)
    return values_at(latent, np.zeros_like(position), np.full_like(position, row), position)


class HeadDictionary(NamedTuple):
    """The dictionaries of single heads whose atoms are shown beside latents."""

    key: str
    dictionary: BlockDiagonal
    agreement: pd.DataFrame
    """`Decomposed.agreement`"""


def dashboards(
    model: "HookedTransformer", attention: Attention, measurements: HeadMeasurements, key: str, concat: Dictionary,
    chosen: np.ndarray, shares: xr.Dataset, head_dictionary: HeadDictionary | None, config: HeadsConfig,
    text: Callable[[int], str],
) -> tuple[str, pd.DataFrame]:  # fmt: skip
    """The page of the first `config.dashboards` of the `chosen` latents, or of all where they are named, and their
    attributions by source.

    `key` of the dictionary in the study, `shares` what the stage made of it; `text` of a token id. The table has a row
    for every head and source token of each text shown.
    """
    n_heads = len(attention.W_O)
    encoder, decoder = encoder_by_head(concat, n_heads), decoder_by_head(concat, n_heads)
    named = not isinstance(config.latents, str) and len(config.latents)
    latents = chosen[: max(config.dashboards, named)].tolist()
    w = encoder[:, :, latents].to(model.cfg.device)
    read = de_embedding(model, attention.to(model.cfg.device), w).cpu()  # (H, m, V)
    directions = torch.einsum("mhd,hde->me", decoder[latents], attention.W_O).to(model.cfg.device)
    promoted = logit_effects(model, directions).cpu()
    hooks = [f"blocks.{attention.layer}.attn.{name}" for name in ("hook_pattern", "hook_v")]

    @functools.cache
    def pattern_and_values(row: int) -> tuple[Tensor, Tensor]:
        """(H, P, P) and (P, G, d), of one row of text."""
        tokens = torch.from_numpy(measurements.rows[row].astype(np.int64))[None].to(model.cfg.device)
        pattern, values = read_hooks(model, tokens, hooks)
        return pattern[0].cpu(), values[0].cpu()

    renderer = _Renderer(measurements, config, functools.cache(text))
    parts = []
    rows = [_sources_table(-1, 0, Context(0, 0, 0.0), np.zeros((n_heads, 1)))[:0]]  # columns, whatever is shown
    for m, i in enumerate(latents):
        of_latent = seen(measurements, measurements.latents[key][:, [i]])
        left = [f"<h3>latent {i}, active on {of_latent.chunk.fired[0]:,} tokens</h3>"]
        left.append(_share_table(shares.sel(latent=i), read[:, m], renderer.text))
        up, down = _tokens(promoted[m], renderer.text), _tokens(-promoted[m], renderer.text)
        left.append(f'<p class="note">promotes {up}<br>demotes {down}</p>')
        for number, context in enumerate(top_contexts(of_latent, config.contexts)):
            by_token = by_source(*pattern_and_values(context.row), encoder[:, :, i])
            attribution = by_token[:, context.position].numpy()  # (H, P)
            left.append(renderer.active(context, of_latent))
            left.append(renderer.line(context, attribution.sum(0), f"attribution, sum {attribution.sum():.3g}"))
            left.append(renderer.sources(context, attribution))
            rows.append(_sources_table(i, number, context, attribution))
        right = _atoms(renderer, head_dictionary, i) if head_dictionary is not None else []
        both = "".join(f"<div>{chr(10).join(side)}</div>" for side in (left, right))
        parts.append(f'<section id="latent-{i}"><div class="beside">{both}</div></section>')
    of_heads = "" if head_dictionary is None else f" in atoms of single heads, {head_dictionary.key}"
    title = html.escape(f"Latents of {key}{of_heads}")
    begin = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n<h1>{title}</h1>\n<p>{html.escape(ABOUT)}</p>"
    )
    return "\n".join([begin, *parts]) + "\n</html>\n", pd.concat(rows, ignore_index=True)


def _atoms(renderer: "_Renderer", head_dictionary: HeadDictionary, latent: int) -> list[str]:
    """The first atoms of a latent, and the texts on which they are most active."""
    parts = []
    for _, atom in head_dictionary.agreement[head_dictionary.agreement["latent"] == latent].head(ATOMS).iterrows():
        number = int(atom["head"]) * head_dictionary.dictionary.heads[0].d_sae + int(atom["atom"])
        of_atom = seen(renderer.measurements, renderer.measurements.latents[head_dictionary.key][:, [number]])
        agrees = f"Jaccard {atom['jaccard']:.2f}, correlation {atom['correlation']:.2f}"
        parts.append(f"<h3>head {int(atom['head'])}, latent {int(atom['atom'])}</h3>")
        parts.append(
            f'<p class="note">coefficient {atom["coefficient"]:.3g}, cosine {atom["cosine"]:.2f}; fires on '
            f"{of_atom.chunk.fired[0]:,} tokens, {int(atom['tokens_together']):,} of them with the latent; {agrees}</p>"
        )
        for context in top_contexts(of_atom, renderer.config.contexts):
            parts.append(renderer.active(context, of_atom))
    return parts


ABOUT = (
    "Left a latent of the dictionary on all heads, right its first atoms in the heads' own dictionaries (non-negative "
    "orthogonal matching pursuit over all heads). Under each text of the latent its direct feature attribution: what "
    "each source token gives to the pre-activation at the outlined token, by all heads. Orange above 0, blue below."
)


class _Renderer(NamedTuple):
    measurements: HeadMeasurements
    config: HeadsConfig
    text: Callable[[int], str]

    def line(self, context: Context, values: np.ndarray, label: str) -> str:
        """The text around a context, each token shaded by `values` (P,) over the largest of those shown."""
        ids = self.measurements.rows[context.row]
        first = max(0, context.position - self.config.window)
        end = min(len(ids), context.position + self.config.window + 1)
        largest = float(np.abs(values[first:end]).max()) or 1.0
        parts = []
        for position in range(first, end):
            value = float(values[position])
            colour = "213,94,0" if value > 0 else "0,114,178"
            style = f' style="background:rgba({colour},{abs(value) / largest:.2f})"' if value else ""
            at = ' class="at"' if position == context.position else ""
            token = html.escape(visible(self.text(int(ids[position]))))
            parts.append(f'<span{at}{style} title="{position}: {value:.3g}">{token}</span>')
        return f'<div class="text">{"".join(parts)}</div><p class="note">{html.escape(label)}</p>'

    def active(self, context: Context, latent: Seen) -> str:
        """`line` of the activations of a latent."""
        return self.line(context, in_row(latent, context.row), f"activation {context.value:.3g}")

    def sources(self, context: Context, attribution: np.ndarray) -> str:
        """The largest terms of `attribution` (H, P), and what each head adds."""
        ids = self.measurements.rows[context.row]
        heads, positions = np.unravel_index(np.argsort(-np.abs(attribution), axis=None)[:SOURCES], attribution.shape)
        terms = [
            f"{attribution[h, s]:+.2f} head {h} ← “{visible(self.text(int(ids[s])))}” ({context.position - s} back)"
            for h, s in zip(heads, positions, strict=True)
        ]
        by_head = ", ".join(f"{h}: {value:+.2f}" for h, value in enumerate(attribution.sum(1)))
        return f'<p class="note">by head {by_head}<br>{html.escape("; ".join(terms))}</p>'


def _sources_table(latent: int, number: int, context: Context, attribution: np.ndarray) -> pd.DataFrame:
    n_heads = len(attribution)
    end = context.position + 1
    columns: dict[str, Any] = {"latent": latent, "context": number, "row": context.row, "position": context.position}
    columns |= {"activation": context.value, "head": np.repeat(np.arange(n_heads), end)}
    columns |= {"source": np.tile(np.arange(end), n_heads), "attribution": attribution[:, :end].ravel()}
    return pd.DataFrame(columns)


def _share_table(shares: xr.Dataset, read: Tensor, text: Callable[[int], str]) -> str:
    """Shares of one latent by head, and the tokens whose embeddings each head reads most, `read` (H, V)."""
    names = [name.replace("_", " ") for name in MEASURES]
    head = "".join(f"<th>{name}</th>" for name in ("head", *names, "reads"))
    lines = []
    for h, of_head in enumerate(read):
        cells = "".join(f"<td>{100 * float(s):.0f} %</td>" for s in shares["share"].sel(head=h).values)
        lines.append(f'<tr><td>{h}</td>{cells}<td class="tokens">{_tokens(of_head, text)}</td></tr>')
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _tokens(values: Tensor, text: Callable[[int], str]) -> str:
    ids = torch.argsort(values, descending=True, stable=True)[:TOKENS].tolist()
    return html.escape(" ".join(f"“{visible(text(i))}”" for i in ids))
