"""The contexts in which each latent is most active, as a table and as a page that needs nothing but itself."""

import html

import numpy as np
import pandas as pd

from saeflow.groundtruth.cases import Case

TOP = 20


def top_contexts(case: Case, tokens: np.ndarray, activations: np.ndarray, top: int = TOP) -> pd.DataFrame:
    """Of rows `tokens` (N, P) and `activations` (N P, n): for each live latent up to `top` rows with `latent`, `rank`,
    `row`, `position`, `token`, `context` and `activation`, the most active first, equal ones in the rows' order."""
    words = [str(word) for word in case.program.vocabulary]
    contexts = [" ".join(words[i] for i in row) for row in tokens]
    found = []
    for latent in np.flatnonzero((activations > 0).any(0)):
        column = activations[:, latent]
        best = np.argsort(-column, kind="stable")[:top]
        best = best[column[best] > 0]
        rows, positions = np.divmod(best, tokens.shape[1])
        found.append(
            pd.DataFrame(
                {
                    "latent": latent,
                    "rank": np.arange(len(best)),
                    "row": rows,
                    "position": positions,
                    "token": [words[tokens[r, p]] for r, p in zip(rows, positions, strict=True)],
                    "context": [contexts[r] for r in rows],
                    "activation": column[best],
                }
            )
        )
    columns = ["latent", "rank", "row", "position", "token", "context", "activation"]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)


def page(title: str, labels: pd.DataFrame, contexts: pd.DataFrame) -> str:
    """Static HTML: a table of all latents with their labels, then each one's contexts, its own token marked."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in labels.columns)
    body = []
    for row in labels.to_dict("records"):
        cells = "".join(f"<td>{_cell(value)}</td>" for value in row.values())
        body.append(f'<tr id="row{row["latent"]}">{cells}</tr>')
    parts = [f"<table><tr>{head}</tr>{''.join(body)}</table>"]
    for latent, rows in contexts.groupby("latent"):
        label = labels.loc[labels["latent"] == latent, "label"]
        parts.append(f"<h2 id=latent{latent}>latent {latent}: {html.escape(str(label.iloc[0]))}</h2><table>")
        parts.append("<tr><th>activation</th><th>position</th><th>context</th></tr>")
        for position, context, activation in zip(rows["position"], rows["context"], rows["activation"], strict=True):
            words = [html.escape(word) for word in context.split(" ")]
            words[position] = f"<b>{words[position]}</b>"
            shown = " ".join(words)
            parts.append(f"<tr><td>{activation:.3f}</td><td>{position}</td><td>{shown}</td></tr>")
        parts.append("</table>")
    style = "body{font:14px sans-serif;margin:2em}td,th{padding:1px 10px;text-align:left}b{background:#fe9}"
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
        f"<h1>{html.escape(title)}</h1>{''.join(parts)}\n"
    )


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))
