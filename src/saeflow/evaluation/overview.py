"""One table of all dictionaries of an experiment: what each is, how sparse and how faithful, `table.csv`, `table.html`.

The table is plain HTML; a click on a column's head sorts by it (twenty lines of JavaScript within the page, nothing
from elsewhere).
"""

import html
from collections.abc import Sequence
from typing import Any

import pandas as pd

from saeflow.config.training import DIVERGED
from saeflow.dictionaries.series import with_names
from saeflow.dictionaries.settings import Settings, differing, read_summaries, with_keys
from saeflow.jobs.job import Job

_WHAT = ["place", "series", "amount_name", "amount", "seed", "d_sae"]
_METRICS = {
    "l0": "L0",
    "ce_replaced": "CE",
    "ce_increase": "CE over clean",
    "loss_recovered_zero": "recovered of zero ablation",
    "explained_variance": "explained variance",
    "dead_fraction": "dead",
}
"""Of evaluations and, those that they have, of comparisons with a known algorithm."""
_WITH_ENDS = ("l0", "ce_increase", "loss_recovered_zero", "explained_variance")
_SAID = ("model.", "corpus.", "tokenizer", "tracr.", "dictionary.content", "dictionary.kind", "dictionary.activation")
"""Settings that the columns say already, or that are hashes of content."""
_AMOUNTS = ("dictionary.k", "dictionary.l1_coefficient", "dictionary.options.l0_coefficient")
_USELESS = "worse than the mean"
_STYLE = (
    "body{font:14px sans-serif;margin:1.5em}table{border-collapse:collapse}td,th{padding:.25em .7em;text-align:right}"
    "td.text,th.text{text-align:left}th{cursor:pointer;border-bottom:2px solid;vertical-align:bottom}"
    "tr:nth-child(even) td{background:#f4f4f4}small{color:#555}"
)
_SORT = """
for (const [i, head] of [...document.querySelectorAll("th")].entries()) {
  let down = false;
  head.onclick = () => {
    const body = document.querySelector("tbody"), value = row => row.cells[i].dataset.value ?? "";
    const compare = (a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort(compare));
    down = !down;
  };
}
"""


def overview(job: Job) -> tuple[pd.DataFrame, str]:
    """The table of the dictionaries whose evaluations, or comparisons with the truth, a job needs: in full, with every
    setting that differs between them, and as a page.

    In the order of the figures: place, series, amount, seed. `<metric>_low` and `_high` are intervals over documents.
    """
    found = [read_summaries(job, stage) for stage in ("evaluate", "recover")]
    table = with_keys(pd.concat([part for part in found if len(part)], ignore_index=True))
    settings = told_apart(list(table["settings"]))
    paths = list(settings[0]) if settings else []
    named = with_names(table.assign(settings_of=pd.Series(settings, dtype=object)))
    metrics = [
        name for metric in _METRICS if metric in named
        for name in (metric, *(f"{metric}{end}" for end in ("_low", "_high") if metric in _WITH_ENDS)) if name in named
    ]  # fmt: skip
    columns = [*_WHAT, "dictionary_key", *metrics]
    if "explained_variance" in named and (named["explained_variance"] < DIVERGED).any():
        named[_USELESS.replace(" ", "_")] = named["explained_variance"] < DIVERGED
        columns.append(_USELESS.replace(" ", "_"))
    extra = pd.DataFrame(list(named["settings_of"]), columns=paths, index=named.index)
    return named[columns].join(extra), page(job.plan.experiment, named)


def told_apart(rows: Sequence[Settings]) -> list[dict[str, Any]]:
    """Of each dictionary the settings that differ between them, by path, but for what columns of the table say already:
    the same paths for all."""
    paths = [p for p in differing(rows) if not p.startswith(_SAID) and p not in ("seed", *_AMOUNTS)]
    return [{path: _plain(held.get(path)) for path in paths} for held in rows]


def page(experiment: str, named: pd.DataFrame) -> str:
    """The table as HTML, of a table with its names (`with_names`)."""
    metrics = [name for name in _METRICS if name in named]
    seeds = named["seed"].nunique(dropna=False) > 1
    heads = [("place", True), ("dictionary", True), ("amount", False), *([("seed", False)] if seeds else [])]
    heads += [("latents", False), *((_METRICS[name], False) for name in metrics), ("key", True)]
    lines = ["".join(f"<th{' class=text' if text else ''}>{html.escape(name)}</th>" for name, text in heads)]
    for row in named.to_dict("records"):
        cells = [_cell(row["place"], row["place"], text=True), _cell(row["series"], row["series"], text=True)]
        amount = "" if pd.isna(row["amount"]) else f"{row['amount_name']} = {row['amount']:g}"
        cells.append(_cell(amount, row["amount"]))
        cells += [_cell(_form(row["seed"], "g"), row["seed"])] if seeds else []
        cells.append(_cell(_form(row["d_sae"], ",.0f"), row["d_sae"]))
        for name in metrics:
            form = ".1f" if name == "l0" else ".4f" if name.startswith("ce") else ".3f"
            ends = [row.get(f"{name}_{end}") for end in ("low", "high")] if name in _WITH_ENDS else [None]
            interval = "" if pd.isna(ends).any() else f" <small>[{', '.join(_form(end, form) for end in ends)}]</small>"
            failed = name == "explained_variance" and row[name] < DIVERGED
            interval += f" <strong>{_USELESS}</strong>" if failed else ""
            cells.append(_cell(_form(row[name], form), row[name], interval))
        lines.append("".join([*cells, _cell(row["dictionary_key"], row["dictionary_key"], text=True)]))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines[1:])
    title = f"Dictionaries of {html.escape(experiment)}"
    note = "In brackets: intervals over held-out documents, for these seeds. A click on a head sorts."
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>\n'
        f"<h1>{title}</h1>\n<p>{note} All numbers, and all settings that differ, are in <code>table.csv</code>.</p>\n"
        f"<table>\n<thead><tr>{lines[0]}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"
        f"<script>{_SORT}</script>\n</html>\n"
    )


def _cell(shown: str, value: Any, more: str = "", *, text: bool = False) -> str:
    """`value` is what is sorted by; `more` is HTML."""
    by = "" if pd.isna(value) else html.escape(str(value))
    return f'<td{" class=text" if text else ""} data-value="{by}">{html.escape(shown)}{more}</td>'


def _form(value: Any, form: str) -> str:
    return "" if pd.isna(value) else f"{value:{form}}"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, list) else value
