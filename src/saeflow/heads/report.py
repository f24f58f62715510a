"""The numbers of a study of heads as text, for the terminal: `table.txt`."""

import math

import pandas as pd

from saeflow.evaluation.intervals import no_interval
from saeflow.heads.cross_terms import MODEL, NO_HEADS, WAYS
from saeflow.heads.folder import HeadStudy
from saeflow.heads.interference import lifted_medians
from saeflow.heads.samples import mean_interval
from saeflow.heads.shares import AGREEING

ATOMS = (1, 2, 4, 8, 16)


def report(study: HeadStudy) -> str:
    """Of a finished folder: everything that docs/heads.md cites."""
    s = study.summary
    parts = [
        f"layer {s['layer']}: {s['n_heads']} heads of {s['d_head']} in {s['d_model']} dimensions, "
        f"{s['n_tokens']:,} held-out tokens of {s['n_documents']} documents",
        _cosines(study),
        _angles(study),
        _ov(study),
        _cross_terms(study),
        *(_of_heads(study, key) for key in study.of_kind("heads")),
        *(_of_concat(study, key) for key in study.of_kind("concat")),
    ]
    return "\n\n".join(parts) + "\n"


def _text(table: pd.DataFrame, digits: int = 3) -> str:
    return table.to_string(index=False, float_format=lambda value: f"{value:.{digits}f}")


def _said(value: float, low: float | None, high: float | None) -> str:
    ends = "none" if low is None or high is None or pd.isna(low) else f"{low:.2f}, {high:.2f}"
    return f"{value:.2f} [{ends}]"


def _with_interval(values: pd.Series, low: pd.Series, high: pd.Series) -> list[str]:
    return [_said(*one) for one in zip(values, low, high, strict=True)]


def _cosines(study: HeadStudy) -> str:
    dataset = study.dataset("cosines")
    table = pd.DataFrame({"head": dataset["head"], "other": dataset["other_head"]})
    null = dataset["cosine_rotated"]
    for name, values in (("", dataset["cosine"]), (" rotated", null.mean("rotation"))):
        for quantile in (0.05, 0.5, 0.95):
            table[f"{100 * quantile:.0f} %{name}"] = values.sel(quantile=quantile).values
    medians = null.sel(quantile=0.5)
    table["50 % lowest"], table["highest"] = medians.min("rotation").values, medians.max("rotation").values
    return (
        "cosine of two heads' outputs, quantiles over tokens; rotated: each head by a random rotation, mean of "
        f"{null.sizes['rotation']}, and of these the lowest and the highest median\n{_text(table)}"
    )


def _ov(study: HeadStudy) -> str:
    dataset = study.dataset("ov")
    table = pd.DataFrame({"head": dataset["head"], "rank": dataset["rank"], "participation": dataset["participation"]})
    table["largest"] = dataset["singular_value"].max("index").values
    return "singular values of W_V W_O by head\n" + _text(table, 2)


def _angles(study: HeadStudy) -> str:
    dataset = study.dataset("angles")
    table = pd.DataFrame({"head": dataset["head"], "other": dataset["other_head"]})
    for name, label in (("angle", ""), ("angle_random", " random")):
        degrees = dataset[name] * 180 / math.pi
        table["smallest" + label], table["median" + label] = degrees.min("index").values, degrees.median("index").values
    return "principal angles of the row spaces of W_O, degrees; random: of random subspaces\n" + _text(table, 1)


def _cross_terms(study: HeadStudy) -> str:
    table = study.table("cross_terms")
    lines = ["CE loss without cross terms between heads: increase in nats, 95 % interval; beyond: over the control"]
    for source in dict.fromkeys(table["source"]):
        of_source = table[table["source"] == source].set_index(["way", "control"])
        name = "the model's heads" if source == MODEL else study.label(str(source))
        zeroed = of_source.loc[(NO_HEADS, False), "ce_increase"]
        lines.append(f"{name}: CE {of_source['ce_before'].iloc[0]:.4f}, all heads zeroed +{zeroed:.4f}")
        for way in WAYS:
            row, control = of_source.loc[(way, False)], of_source.loc[(way, True), "ce_increase"]
            lines.append(
                f"  {way:11s} {_interval(row, 'ce_increase')}, random change {control:+.4f}, beyond "
                f"{_interval(row, 'ce_beyond_control')}, size {row['relative_change']:.3f}"
            )
    return "\n".join(lines)


def _interval(row: pd.Series, name: str) -> str:
    if pd.isna(row[f"{name}_low"]):
        return f"{row[name]:+.4f} ({no_interval(row['n_documents'])})"
    return f"{row[name]:+.4f} [{row[f'{name}_low']:+.4f}, {row[f'{name}_high']:+.4f}]"


def _of_heads(study: HeadStudy, key: str) -> str:
    norms, spectra = study.dataset("norms", key), study.dataset("spectra", key)
    table = pd.DataFrame({"head": norms["head"], "mean norm": norms["decoder_norm"].mean("latent")})
    for matrix in spectra["matrix"].values:
        table[f"rank {matrix}"] = spectra["rank"].sel(matrix=matrix).values
        table[f"participation {matrix}"] = spectra["participation"].sel(matrix=matrix).values
    dataset = study.dataset("interference", key)
    pairs = pd.DataFrame({"head": dataset["head"], "other": dataset["other_head"]})
    pairs["rms cosine"] = dataset["mean_square"].values ** 0.5
    pairs["rotated"] = dataset["mean_square_rotated"].mean("rotation").values ** 0.5
    pairs["weighted"] = (dataset["total"] / dataset["weight"]).values
    null = dataset["total_rotated"] / dataset["weight"]
    pairs["rotated lowest"], pairs["highest"] = null.min("rotation").values, null.max("rotation").values
    pairs["if independent"] = (dataset["from_means"] / dataset["weight"]).values
    top = study.table("interference", key).sort_values("interference", key=abs, ascending=False, kind="stable").head(5)
    medians = lifted_medians(study.table("lifted", key))
    medians = medians.assign(said=_with_interval(medians["median"], medians["low"], medians["high"]))
    by_atoms = medians.pivot(index="rotated", columns="n_atoms", values="said").rename(columns={0: "in_row_space"})
    names = ["head", "latent", "other_head", "other_latent", "interference", "cosine", "tokens_together"]
    return "\n".join(
        [
            f"{study.label(key)} ({key}), rank {study.summary['dictionaries'][key]['rank_of_all']} of all heads as one",
            _text(table, 2),
            "cosines of lifted atoms between heads, root mean square and weighted by co-activation "
            f"(random directions: rms {dataset.attrs['d_model'] ** -0.5:.3f}; rotated: over {null.sizes['rotation']} "
            "random rotations of the heads)",
            _text(pairs, 4),
            "pairs of latents that interfere most",
            _text(top[names], 4),
            "latents of a head in another's lifted atoms: part of the norm that lies in its row space, and residual by "
            "number of atoms; medians over latents [95 % over draws of latents] of means over the other heads",
            _text(by_atoms.reset_index().rename_axis(columns=None), 3),
        ]
    )


def _of_concat(study: HeadStudy, key: str) -> str:
    dataset = study.dataset("measures", key)
    by_head = pd.DataFrame(dataset["mean_share"].values, columns=dataset["measure"].values)
    between = pd.DataFrame(
        {
            "decoder and": list(AGREEING[1:]),
            "rank correlation": dataset["rank_correlation"].sel(measure_a="decoder").values[1:],
            "same top head": dataset["top_agreement"].sel(measure_a="decoder").values[1:],
        }
    )
    parts = [
        f"{study.label(key)} ({key}), {dataset.attrs['n_latents']} latents, rank "
        f"{study.summary['dictionaries'][key]['rank_W_dec']}",
        "mean share of each head",
        _text(by_head.rename_axis("head").reset_index(), 3),
        f"do measures agree? (same top head by chance: {dataset.attrs['chance_of_top']:.2f})",
        _text(between, 2),
    ]
    summary = study.summary["dictionaries"][key]
    if "best_cosine" in summary:
        curves = study.table("curves", key)
        curves = curves[curves["n_atoms"].isin(ATOMS)]
        curves = curves.assign(said=_with_interval(curves["median"], curves["median_low"], curves["median_high"]))
        wide = curves.pivot(index=["of", "method", "dictionary"], columns="n_atoms", values="said").reset_index()
        agreed = study.table("agreement", key)
        of = ("jaccard", "correlation")
        names = ["cosine", *(f"{name}{more}" for name in of for more in ("_mean_of_head", "_best"))]
        first = agreed.groupby("rank")[names].mean()
        for name in of:
            by_rank = agreed.groupby("rank")[name]
            first[name] = [_said(values.mean(), *mean_interval(values.to_numpy())) for _, values in by_rank]
        first = first[["cosine", *sorted(first.columns.drop("cosine"))]].head(4).reset_index()
        cosines = ", ".join(
            f"{name} {_said(value, *summary['best_cosine_interval'][name])}"
            for name, value in summary["best_cosine"].items()
        )
        parts += [
            f"{summary['decomposed_latents']} latents decomposed in {study.label(summary['decomposed_in'])}; best "
            f"cosine of an atom with the top head's part: {cosines}",
            "relative residual by number of atoms: median over latents [95 % over draws of latents]",
            _text(wide.rename_axis(columns=None), 3),
            _coefficients(study, key),
            "agreement with the atoms by their order: means over latents [95 % over draws of latents]",
            _text(first.rename_axis(columns=None), 3),
        ]
    return "\n".join(parts)


def _coefficients(study: HeadStudy, key: str) -> str:
    """What notebook 001 prints of them: the largest, and that they give the latent back."""
    dataset = study.dataset("coefficients", key)
    largest = abs(dataset["coefficient"]).max("atom").where(dataset["size"] > 0) / dataset["size"]
    return (
        f"pseudo-inverse, all {dataset.sizes['atom']} coefficients of a head: the largest is "
        f"{float(largest.median()):.4f} of the norm of the latent's part (median over latents and heads), and they "
        f"leave {float(dataset['residual'].max()):.1e} of it at most"
    )
