"""The top pairs of latents for reading: a static HTML page and a LaTeX table, from the tables of `examples`.

The page shades each token by its value over the largest of its row (input latents green, output latents magenta, J
cyan above 0 and orange below) and underlines the largest, so that it can be read in black and white too. The LaTeX
file needs the packages booktabs, longtable and xcolor, and is to be `\\input` into a document of XeLaTeX or LuaLaTeX,
as the tokens of a byte-level tokenizer can be any character.
"""

import html
from typing import Any

import pandas as pd

from saeflow.dictionaries.series import CONTROLS, control
from saeflow.features.show import visible

SHOWN = 3  # windows of a latent or pair on the page; the Parquet tables hold all
STATISTICS = {"mean": "mean J", "mean_absolute": "mean |J|", "count": "number of tokens"}
_COLOURS = {"input": (0, 158, 115), "output": (204, 121, 167), "positive": (86, 180, 233), "negative": (213, 94, 0)}
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 72em; color: #111; }
table { border-collapse: collapse; margin: .6em 0 1.6em; }
th, td { padding: .15em .7em; text-align: right; border-bottom: 1px solid #ccc; }
caption { text-align: left; font-weight: 600; padding-bottom: .3em; }
.window { font: 12px/1.9 ui-monospace, monospace; white-space: pre-wrap; margin: .1em 0; }
.window b { display: inline-block; font: 11px system-ui, sans-serif; color: #444; width: 11em; }
.window span { padding: .1em 0; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.window .max { text-decoration: underline; font-weight: 600; }
section { break-inside: avoid; border-top: 1px solid #999; margin-top: 1.2em; }
h2 { margin-top: 2em; } h3 { font-size: 1em; margin: .7em 0 .2em; }
"""


# -------------------------------------------------------------------- HTML
def page(
    summary: dict[str, Any], pairs: pd.DataFrame, top_inputs: pd.DataFrame, contexts: pd.DataFrame,
    pair_contexts: pd.DataFrame,
) -> str:  # fmt: skip
    title = f"Top pairs of latents around the MLP of layer {summary['layer']}: {_arm(summary)}"
    parts = [
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style>\n<h1>{html.escape(title)}</h1>\n<p>{html.escape(describe(summary))}</p>",
    ]
    for statistic, name in STATISTICS.items():
        rows = pairs[pairs["statistic"] == statistic]
        parts.append(_table(f"Pairs by {name}", rows, ["rank", "output", "input", *_NUMBERS]))
    parts.append("<h2>Pairs and their contexts</h2>")
    by_pair = dict(list(pair_contexts.groupby(["output", "input"])))
    for _, row in pairs.drop_duplicates(["output", "input"]).iterrows():
        i, j = int(row["output"]), int(row["input"])
        parts.append(f'<section id="pair-{i}-{j}"><h3>input latent {j} → output latent {i}: {_numbers(row)}</h3>')
        for _, window in by_pair.get((i, j), pair_contexts[:0]).head(SHOWN).iterrows():
            parts.append(_window(window, "jacobian", f"J, largest {window['largest_jacobian']:.3g}"))
            for side in ("input", "output"):
                values = window[f"{side}_activations"]
                parts.append(_window(window, f"{side}_activations", f"{side} latent, {max(values):.3g}"))
        parts.append("</section>")
    parts.append("<h2>Outputs and their top inputs</h2>")
    by_latent = dict(list(contexts.groupby(["side", "latent"])))
    for output, rows in top_inputs.groupby("output", sort=False):
        parts.append(f"<section><h3>output latent {output}</h3>")
        parts += _latent_windows(by_latent, "output", int(str(output)))
        for _, row in rows.iterrows():
            parts.append(f"<h3>input latent {int(row['input'])}: {_numbers(row)}</h3>")
            parts += _latent_windows(by_latent, "input", int(row["input"]))
        parts.append("</section>")
    return "\n".join(parts) + "\n</html>\n"


_NUMBERS = {"count": "tokens", "mean": "mean J", "std": "std J", "mean_absolute": "mean |J|", "std_absolute": "std |J|"}


def describe(summary: dict[str, Any]) -> str:
    """What the pairs are of, for a caption: the dictionaries, the language model, the tokens, and how J is taken."""
    pair = f"{summary['hook_name']} (k = {summary['k']}) and {summary['hook_name_out']} (k = {summary['k_out']})"
    of = "tokens of a text" if "text" in summary else f"held-out tokens of {summary['n_documents']} documents"
    return (
        f"Dictionaries of {summary['d_sae']} latents at {pair}, Jacobian coefficient "
        f"{summary['jacobian_coefficient']:g}, of the {_model(summary)}; {summary['n_tokens']} {of}. J is taken "
        f"{summary['convention']}. Means and standard deviations are over the tokens on which both latents are active."
    )


def _model(summary: dict[str, Any]) -> str:
    """The language model: trained, or which control of which seed."""
    seed = summary.get("randomise_seed")
    return control(summary) + ("" if control(summary) == CONTROLS["none"] else f" (seed {seed})")


def _arm(summary: dict[str, Any]) -> str:
    """What tells one page from the next: the language model, the coefficient, whether the norm is left out."""
    ignored = ["norm ignored"] if summary["norm"] == "ignored" else []
    return ", ".join([_model(summary), f"λ = {summary['jacobian_coefficient']:g}", *ignored])


def _numbers(row: pd.Series) -> str:
    mean = f"mean J {row['mean']:.3g} ± {row['std']:.2g}, mean |J| {row['mean_absolute']:.3g}"
    return html.escape(f"{mean}, on {int(row['count'])} tokens")


def _table(caption: str, rows: pd.DataFrame, columns: list[str]) -> str:
    """The first of `columns` is the rank, which leads to the pair."""
    head = "".join(f"<th>{html.escape(_NUMBERS.get(c, c))}</th>" for c in columns)
    lines = []
    for _, row in rows.iterrows():
        link = f'<a href="#pair-{int(row["output"])}-{int(row["input"])}">{int(row["rank"])}</a>'
        cells = [f"{int(row[c])}" if c in ("output", "input", "count") else f"{row[c]:.4f}" for c in columns[1:]]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in (link, *cells)) + "</tr>")
    body = "\n".join(lines)
    return f"<table>\n<caption>{html.escape(caption)}</caption>\n<tr>{head}</tr>\n{body}\n</table>"


def _latent_windows(by_latent: dict[Any, pd.DataFrame], side: str, latent: int) -> list[str]:
    rows = by_latent.get((side, latent), pd.DataFrame()).head(SHOWN).iterrows()
    return [_window(row, "activations", f"{side} latent, {row['max_activation']:.3g}", side) for _, row in rows]


def _window(row: pd.Series, column: str, label: str, side: str | None = None) -> str:
    """A line of shaded tokens."""
    values = [float(value) for value in row[column]]
    largest = max(map(abs, values), default=0.0) or 1.0
    spans = []
    for token, value in zip(row["tokens"], values, strict=True):
        colour = side or column.split("_")[0]
        if column == "jacobian":
            colour = "positive" if value > 0 else "negative"
        red, green, blue = _COLOURS[colour]
        shade = f' style="background:rgba({red},{green},{blue},{abs(value) / largest:.2f})"' if value else ""
        marked = ' class="max"' if value and abs(value) == largest else ""
        title = f' title="{value:.3g}"' if value else ""
        spans.append(f"<span{marked}{shade}{title}>{html.escape(visible(token))}</span>")
    return f'<div class="window"><b>{html.escape(label)}</b>{"".join(spans)}</div>'


# -------------------------------------------------------------------- LaTeX
_ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "↵": r"$\hookleftarrow$", "→": r"$\rightarrow$",
}  # fmt: skip


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is; what cannot be printed becomes a question mark, as no font has it."""
    return "".join(_ESCAPES.get(c, c if c.isprintable() else "?") for c in text)


def latex(summary: dict[str, Any], pairs: pd.DataFrame, pair_contexts: pd.DataFrame) -> str:
    """A longtable of the pairs by mean J, each with the window of its largest |J|, tokens shaded by |J|."""
    caption = f"Pairs of latents by mean Jacobian entry, layer {summary['layer']}, {_arm(summary)}. {describe(summary)}"
    lines = [
        "% needs \\usepackage{booktabs,longtable,xcolor}",
        r"\definecolor{jacobianpositive}{RGB}{86,180,233}",
        r"\definecolor{jacobiannegative}{RGB}{213,94,0}",
        r"\providecommand{\jacobiantoken}[3]{{\setlength{\fboxsep}{1pt}\colorbox{#1!#2}{\strut #3}}}",
        r"\begin{longtable}{rrrrrrp{0.5\linewidth}}",
        rf"\caption{{{escape_latex(caption)}}}\\",
        r"\toprule",
        r"& output & input & tokens & mean $J$ & std & largest $|J|$ in context \\",
        r"\midrule",
        r"\endhead",
        r"\bottomrule",
        r"\endfoot",
    ]
    best = pair_contexts[pair_contexts["rank"] == 1]
    first = {(int(row["output"]), int(row["input"])): row for _, row in best.iterrows()}
    for _, row in pairs[pairs["statistic"] == "mean"].iterrows():
        key = (int(row["output"]), int(row["input"]))
        window = _latex_window(first[key]) if key in first else ""
        numbers = f"{int(row['count'])} & {row['mean']:.3f} & {row['std']:.3f}"
        lines.append(rf"{int(row['rank'])} & {key[0]} & {key[1]} & {numbers} & \footnotesize {window} \\")
    return "\n".join([*lines, r"\end{longtable}"]) + "\n"


def _latex_window(row: pd.Series) -> str:
    largest = max(abs(float(v)) for v in row["jacobian"])
    tokens = []
    for token, value in zip(row["tokens"], row["jacobian"], strict=True):
        text = escape_latex(visible(token)).replace(" ", r"\ ")
        if value:
            colour = "jacobianpositive" if value > 0 else "jacobiannegative"
            text = rf"\jacobiantoken{{{colour}}}{{{100 * abs(value) / largest:.0f}}}{{{text}}}"
        tokens.append(text)
    return r"\allowbreak{}".join(tokens)
