"""What figures read of the Jacobian stage, and how they show its series: colours, panels, bars and legends."""

import json
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from saeflow.dictionaries.series import CONTROLS, NAMES, SEEDS, about_place, control, natural
from saeflow.dictionaries.settings import Settings, by_one_width, read_summaries, settings, tell_apart
from saeflow.figures.axes import PANELS_BESIDE, labelled, legend_below, subplots
from saeflow.figures.style import sequence, track
from saeflow.jobs.job import Job

EXAMPLE_TOKENS = 3
IDENTITY = ["panel", "jacobian_coefficient", "seed", "jacobian_key"]
FAITHFULNESS = {"explained_variance": "explained variance", "loss_recovered_zero": "CE loss recovered (zero ablation)"}
COSTS = {
    "explained_variance": "explained variance",
    "cosine": "cosine with the activation",
    "ce_increase": "CE over clean (nats)",
    "dead_fraction": "share of dead latents",
}
"""What a Jacobian coefficient may cost, of each SAE of a pair."""
NORMS = {"none": "|J|", "l1": "|J| / L1 norm", "l2": "|J| / L2 norm", "rms": "|J| / RMS of its token"}


class Studies(NamedTuple):
    """What the Jacobian stage measured, of pairs. Every table has the column `jacobian_key`."""

    summaries: pd.DataFrame
    """One row a study, with its `panel`: what distinguishes it besides coefficient and seeds; `beside_layer` is that
    without the layer. What evaluations of its dictionaries say has `_input` or `_output` added to its name."""
    tables: dict[str, pd.DataFrame]
    """By name: the stage's tables, of `contexts` the first window of each latent; `examples`, the Jacobians of a few
    tokens, one row an entry; and `signed`, how many entries of the stored tokens lie in bins of J."""

    def of(self, name: str) -> pd.DataFrame:
        """A table that begins with what identifies each row's study, studies in their order."""
        return self.summaries[IDENTITY].merge(self.tables[name], on="jacobian_key", sort=False)


def read_pairs(job: Job) -> Studies:
    """Raises `ValueError` where no study is of a pair."""
    evaluations, folders = read_summaries(job, "evaluate"), job.inputs("jacobian")
    held = {folder: settings(job.plan, "jacobian", folder.name) for folder in folders}
    needs = {folder: job.plan.instance("jacobian", folder.name).needs.get("tokens", [""]) for folder in folders}
    studies = read_studies(folders, evaluations, held, {folder: keys[0] for folder, keys in needs.items()})
    if studies.summaries.empty:
        raise ValueError("figures of Jacobians but jacobian_histogram need pairs: use dictionary=pair or jacobian")
    return studies


def read_labelled_histograms(job: Job) -> pd.DataFrame:
    folders = job.inputs("jacobian")
    return read_histograms(folders, {folder: settings(job.plan, "jacobian", folder.name) for folder in folders})


def read_studies(
    folders: Iterable[Path],
    evaluations: pd.DataFrame,
    held: Mapping[Path, Settings] | None = None,
    tokens: Mapping[Path, str] | None = None,
) -> Studies:
    """Reads the artifacts of the Jacobian stage; those of transcoders, which have no coefficient, are left out.

    `evaluations`: one row a dictionary, those of the pairs among them; by each study's folder `held`: its settings, and
    `tokens`: the key of its held-out tokens, '' of a text.
    """
    found = {folder: json.loads((folder / "summary.json").read_text()) for folder in folders}
    pairs = {f: summary for f, summary in found.items() if summary["kind"] == "pair"}  # others have no coefficient
    if not pairs:
        return Studies(pd.DataFrame(), {})
    more = {f: {"jacobian_key": f.name, "tokens_key": (tokens or {}).get(f, "")} for f in pairs}
    summaries = pd.DataFrame([s | {"control": control(s)} | more[f] for f, s in pairs.items()])

    def joined(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
        named = (table.assign(jacobian_key=f.name) for f, table in zip(pairs, tables, strict=True))
        return pd.concat(named, ignore_index=True)

    names = ("histogram", "log_histogram", "thresholds", "global_exceedance", "outputs", "linearity", "top_inputs")
    tables = {name: joined(pd.read_parquet(f / f"{name}.parquet") for f in pairs) for name in names}
    first = [("rank", "=", 1)]
    tables["contexts"] = joined(pd.read_parquet(f / "contexts.parquet", filters=first) for f in pairs)
    tables["examples"] = joined(map(_read_examples, pairs))
    tables["signed"] = joined(map(_read_signed, pairs))
    named = _with_panels(summaries, [(held or {}).get(f, {}) for f in pairs], evaluations)
    return Studies(_with_evaluations(named, evaluations), tables)


def read_histograms(folders: Iterable[Path], held: Mapping[Path, Settings] | None = None) -> pd.DataFrame:
    """`histogram.parquet` of every study, those of transcoders too, with `jacobian_key` and `label`.

    Studies that differ in their seeds alone have one label.
    """
    labels, about, tables = [], [], []
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        of = "transcoder"
        if summary["kind"] == "pair":  # others have neither k nor λ
            of = f"k = {summary['k']}, λ = {summary['jacobian_coefficient']:g}, {control(summary)}"
        sites = " → ".join(summary[c].split(".", 2)[-1].replace("hook_", "") for c in ("hook_name", "hook_name_out"))
        labels.append(f"layer {summary['layer']}, {sites}, {of}")
        about.append(about_study(summary, (held or {}).get(folder, {}), ""))
        tables.append(pd.read_parquet(folder / "histogram.parquet").assign(jacobian_key=folder.name))
    for label in dict.fromkeys(labels):
        mine = [n for n, one in enumerate(labels) if one == label]
        for n, said in zip(mine, tell_apart(by_one_width([about[n] for n in mine])), strict=True):
            labels[n] = ", ".join([label, *said])
    order = sorted(range(len(labels)), key=lambda n: (natural(labels[n]), n))
    return pd.concat(tables[n].assign(label=labels[n]) for n in order) if tables else pd.DataFrame()


def _with_evaluations(summaries: pd.DataFrame, evaluations: pd.DataFrame) -> pd.DataFrame:
    """Adds `FAITHFULNESS` and `COSTS` of both dictionaries of each study, on its own held-out tokens where these are
    known, and of a text's study on any; NaN where one was not evaluated."""
    names = [f"{name}{end}" for name in dict.fromkeys((*FAITHFULNESS, *COSTS)) for end in ("", "_low", "_high")]
    held = evaluations.reindex(columns=["train_key", "part", "tokens_key", *names])
    found: list[dict[str, Any]] = []
    for study in summaries.to_dict("records"):
        found.append({})
        for side, key in (("input", "train_key_in"), ("output", "train_key_out")):
            mine = held[(held["train_key"] == study[key]) & held["part"].fillna("").isin(["", side])]
            if study.get("tokens_key"):
                mine = mine[mine["tokens_key"].isin([study["tokens_key"], np.nan])]
            values = mine.iloc[0][names] if len(mine) else dict.fromkeys(names, np.nan)
            found[-1] |= {f"{name}_{side}": values[name] for name in names}
    return summaries.join(pd.DataFrame(found, index=summaries.index).astype(float))


def _with_panels(summaries: pd.DataFrame, held: list[Settings], evaluations: pd.DataFrame) -> pd.DataFrame:
    """Names each study by what differs between studies besides coefficient and seeds, '' where nothing does; in the
    order of the layers, trained models before their controls."""
    models = dict(evaluations[["train_key", "model_name"]].to_numpy()) if "model_name" in evaluations else {}
    rows = summaries.to_dict("records")
    about = [about_study(row, s, models.get(row["train_key_in"]) or "") for row, s in zip(rows, held, strict=True)]
    if len({one["model.weights"] for one in about if "model.weights" in one}) < 2:  # controls of one model say none
        about = [{path: value for path, value in one.items() if path != "model.weights"} for one in about]
    panels = tell_apart(by_one_width(about))
    beside = tell_apart(by_one_width([{p: v for p, v in one.items() if p != "layer"} for one in about]))
    named = summaries.assign(panel=[", ".join(said) for said in panels], beside_layer=[", ".join(b) for b in beside])
    order = list(CONTROLS.values())

    def place(n: int) -> tuple[Any, ...]:
        row = rows[n]
        return row["layer"], order.index(row["control"]), natural(", ".join(panels[n])), row["jacobian_coefficient"], n

    return named.iloc[sorted(range(len(rows)), key=place)].reset_index(drop=True)


def about_study(summary: Mapping[Hashable, Any], held: Settings, model: str) -> dict[str, Any]:
    """What tells a study from others, but for its coefficient and its seeds, those of a control among them."""
    prefix = f"blocks.{summary['layer']}."
    own: dict[str, Any] = {"layer": summary["layer"]} | about_place(held, str(held.get("model.name") or model))
    own |= {"control": control(summary), "dictionary.k": summary.get("k"), "d_sae": summary["d_sae"]}
    said = {"jacobian.at": "at", "jacobian.norm": "norm", "dictionary.jacobian_penalty": "jacobian_penalty"}
    own |= {path: summary[name] for path, name in said.items() if summary.get(name) is not None}
    own |= {name: str(summary[name]).removeprefix(prefix) for name in ("hook_name", "hook_name_out")}
    hashed = ("model.weights", "tokenizer")  # of a model, which has a name
    seeds = (*SEEDS, "model.randomise", "model.randomise_seed", "tracr.seed", "dictionary.jacobian_coefficient")
    own |= {path: value for path, value in held.items() if path not in (*hashed, *seeds, *NAMES, *own)}
    own.pop("control_seed", None)
    if of_tokens := _tokens_of(held):
        own = {path: value for path, value in own.items() if path not in _OF_TOKENS} | of_tokens
    if control(summary) == CONTROLS["none"] and "model.weights" in held:
        own["model.weights"] = held["model.weights"]
    return own


_OF_TOKENS = (
    "tokens.held_out_tokens",
    *(f"jacobian.{name}" for name in ("n_tokens", "text", "text_path", "text_tokens")),
)


def _tokens_of(held: Settings) -> dict[str, str]:
    """Which tokens a study is of, in words, as `tokens`; nothing where its settings are not known."""
    if text := held.get("jacobian.text"):
        ends = held["jacobian.text_tokens"]
        return {"tokens": (f"tokens {ends[0]} to {ends[1]} of " if ends else "") + f"“{text:.18}…”"}
    if "jacobian.n_tokens" in held:
        return {"tokens": f"{held['jacobian.n_tokens']:,} of {held['tokens.held_out_tokens']:,} held-out tokens"}
    return {}


def _read_examples(folder: Path) -> pd.DataFrame:
    """The entries of the first tokens: `token`, its `sequence` and `position`, `output`, `input`, `jacobian`."""
    import zarr

    group = zarr.open_group(folder / "tokens.zarr", mode="r")
    n = int(np.searchsorted(group["token"][:], EXAMPLE_TOKENS))  # type: ignore[index,arg-type]
    table = pd.DataFrame({name: group[name][:n] for name in ("token", "output", "input", "jacobian")})  # type: ignore[index]
    for place, name in enumerate(("sequence", "position"), start=1):
        of_token = np.asarray(group[name][:EXAMPLE_TOKENS])  # type: ignore[index]
        table.insert(place, name, of_token[table["token"].to_numpy()])
    return table


def _read_signed(folder: Path) -> pd.DataFrame:
    """`count_per_token` of the stored tokens' entries in the bins of the histogram and their mirror images, and
    `stored_tokens`; entries of 0 are not stored."""
    import zarr

    group = zarr.open_group(folder / "tokens.zarr", mode="r")
    edges = pd.read_parquet(folder / "histogram.parquet")["bin_right"].to_numpy()
    edges = np.concatenate([-edges[::-1], [0], edges])
    n = int(group.attrs["n_tokens"])  # type: ignore[arg-type]
    counts = np.histogram(group["jacobian"][:], edges)[0] / n  # type: ignore[index,arg-type]
    return pd.DataFrame({"bin_left": edges[:-1], "bin_right": edges[1:], "count_per_token": counts, "stored_tokens": n})


# -------------------------------------------------------------------- series
def coefficient_colours(table: pd.DataFrame) -> dict[float, Any]:
    """Colour by coefficient."""
    values = sorted(table["jacobian_coefficient"].unique())
    return dict(zip(values, sequence(len(values), 0.82, 0.02), strict=True))


def by_coefficient(rows: pd.DataFrame) -> list[tuple[float, pd.DataFrame]]:
    """From the baseline up."""
    found = sorted(map(float, rows["jacobian_coefficient"].unique()))
    return [(c, rows[rows["jacobian_coefficient"] == c]) for c in found]


def label_of(coefficient: float) -> str:
    return "λ = 0 (baseline)" if coefficient == 0 else f"λ = {coefficient:g}"


def by_panel(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Panels in the order of the studies."""
    return [(str(name), rows) for name, rows in table.groupby("panel", sort=False)]


def shown_panel(table: pd.DataFrame) -> str:
    """The panel that is shown where one is: the first of those with the most coefficients."""
    return max(by_panel(table), key=lambda one: one[1]["jacobian_coefficient"].nunique())[0]


def few_studies(summaries: pd.DataFrame) -> pd.DataFrame:
    """Of `shown_panel` one study a coefficient, at most four of them, the baseline and the largest included."""
    rows = summaries[summaries["panel"] == shown_panel(summaries)]
    by_coefficient = rows.drop_duplicates("jacobian_coefficient").sort_values("jacobian_coefficient")
    return by_coefficient.iloc[np.unique(np.linspace(0, len(by_coefficient) - 1, 4).round().astype(int))]


def over_seeds(rows: pd.DataFrame, by: str, value: str) -> pd.DataFrame:
    """Mean over seeds of `value`, the lowest of its lower ends, the highest of its upper ends; one row a `by`.

    `rows` are of one panel and coefficient, or differ in them by `by`. What bars then cover is what `covers` says."""
    names = {"value": (value, "mean"), "low": (f"{value}_low", "min"), "high": (f"{value}_high", "max")}
    return rows.groupby(by, sort=True).agg(**names).reset_index()


def covers(summaries: pd.DataFrame) -> str:
    """What intervals cover, as a note: documents, and the seeds where there are several."""
    seeds = summaries.groupby(["panel", "jacobian_coefficient"]).size()
    text = "bars and bands: 95 % interval over documents"
    if seeds.max() > 1:
        text += (
            f"; of several seeds (up to {seeds.max()}) the mean, from the lowest to the highest end of their intervals"
        )
    return text


def bars(axis: Axes, groups: list[str], series: dict[float, pd.DataFrame], colours: dict[float, Any]) -> None:
    """Grouped bars in percent, with intervals; a frame of `series` has a row a group."""
    width = 0.8 / max(len(series), 1)
    for n, (coefficient, rows) in enumerate(series.items()):
        at = np.arange(len(groups)) + (n - (len(series) - 1) / 2) * width
        value, low, high = (100 * rows[c].to_numpy() for c in ("value", "low", "high"))
        axis.bar(at, value, 0.9 * width, color=colours[coefficient], label=label_of(coefficient))
        errors = np.nan_to_num(np.maximum([value - low, high - value], 0))
        axis.errorbar(at, value, errors, fmt="none", ecolor="0.2", elinewidth=0.8, capsize=1.5)
    axis.set_xticks(range(len(groups)), groups)


def legend(figure: Figure, axes: Iterable[Axes], columns: int = 6, note: str = "") -> None:
    """Below everything: each label once, in the order of the first that has it, the baseline first."""
    unique = sorted(labelled(axes).items(), key=lambda item: _label_order(item[0]))
    legend_below(figure, dict(unique), columns, note)


def _label_order(label: str) -> float:
    found = re.match(r"λ = ([\d.e+-]+)", label)
    return float(found[1]) if found else 0.0


def paired_panels(places: int) -> tuple[Figure, list[np.ndarray]]:
    """Columns of two axes each, at most four beside one another, in bands as equal as can be."""
    bands = -(-places // PANELS_BESIDE)
    beside = -(-places // bands)
    figure, grid = subplots(2 * bands, beside, figsize=(max(4.4, 2.5 * beside), 4.4 * bands), squeeze=False)
    columns = [grid[2 * (n // beside) : 2 * (n // beside) + 2, n % beside] for n in range(bands * beside)]
    for column in columns[places:]:
        for axis in column:
            axis.set_axis_off()
    return figure, columns[:places]


def at_the_left(axis: Axes, text: str) -> str:
    """The text where the axis is the first of its row, which it says for all."""
    place = axis.get_subplotspec()
    return text if place is not None and place.is_first_col() else ""


def legend_of_lines(
    figure: Figure, colours: dict[float, Any], panels: list[str], more: Iterable[Line2D] = (), note: str = ""
) -> None:
    """A legend of colours (coefficients) and of dashes and markers (panels)."""
    handles = [Line2D([], [], color=colour, label=label_of(c)) for c, colour in colours.items()]
    if len(panels) > 1:
        handles += [Line2D([], [], color="0.3", label=panel, **track(n)) for n, panel in enumerate(panels)]
    legend_below(figure, [*handles, *more], columns=5 if len(panels) < 3 else 3, note=note)


def title(panel: str, text: str = "") -> str:
    return "\n".join(part for part in (panel, text) if part)
