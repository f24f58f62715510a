"""The job: everything about the heads of one layer and the dictionaries of them that an experiment has.

Dictionaries come in two kinds: `heads`, one for each head (`BlockDiagonal`), and `concat`, one of all heads together.
Each `concat` is decomposed in the `heads` whose L0, summed over heads, is nearest to its own (in log).
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import xarray as xr
from threadpoolctl import threadpool_limits

from saeflow.config import ConfigError, HeadsConfig
from saeflow.dictionaries import Dictionary
from saeflow.dictionaries.fitting import open_dictionary
from saeflow.dictionaries.heads import BlockDiagonal
from saeflow.heads.dashboards import HeadDictionary, dashboards
from saeflow.heads.decomposition import agreement, coefficients, decompose_latents, none_if_nan
from saeflow.heads.folder import HeadStudy
from saeflow.heads.geometry import MATRICES, decoder_norms, ov_spectra, principal_angles, rank, spectra
from saeflow.heads.interference import interference_dataset, lifted_table
from saeflow.heads.report import report
from saeflow.heads.samples import choose_latents
from saeflow.heads.shares import compare_measures
from saeflow.heads.study import by_head, measure, rotations_of
from saeflow.heads.weights import Attention, decoder_by_head, lifted, read_attention
from saeflow.jobs.job import Job
from saeflow.models.folder import read_geometry
from saeflow.models.opening import open_model
from saeflow.models.source import reading_model
from saeflow.storage.xarrays import write_dataset
from saeflow.text.tokenizer import open_tokenizer
from saeflow.text.tokens import open_tokens

log = logging.getLogger("saeflow")


def heads_job(job: Job) -> dict[str, Any]:
    """Makes the study that a job names; returns its summary. Raises `FitError` for dictionaries of another model."""
    config = HeadsConfig(**job.config["heads"])
    with reading_model(job) as folder:
        geometry, tokenizer = read_geometry(folder), open_tokenizer(folder)
    hook = job.config["hook_name"]
    if geometry.n_heads < 2:
        raise ConfigError(f"{folder} has {geometry.n_heads} head a layer, and heads are compared with one another")
    dictionaries, left_out = _open(job)
    rows = open_tokens(job.input("tokens"))
    n_rows = min(rows.n_rows, -(-config.n_tokens // rows.context_size))
    sequence, (tokens, document, _) = rows.spread_rows(n_rows, config.seed)
    model = open_model(job, rows.context_size)
    attention = read_attention(model, int(hook.split(".")[1]))
    log.info("%d dictionaries, %d tokens", len(dictionaries), tokens.size)
    measurements = measure(model, attention, dictionaries, tokens, document, rows.attributes["prepend_bos"], config)
    cosines = measurements.cosines.sel(quantile=0.5)
    summary: dict[str, Any] = {
        "layer": attention.layer,
        "hook_name": hook,
        **{name: getattr(geometry, name) for name in ("n_heads", "n_key_value_heads", "d_head", "d_model")},
        "n_tokens": int(tokens.size),
        "n_documents": len(np.unique(document)),
        "loss_documents": int(measurements.cross_terms["n_documents"].iloc[0]),
        "median_cosine": float(cosines["cosine"].median()),
        "median_cosine_rotated": float(cosines["cosine_rotated"].median()),
        "median_cosine_rotated_range": _range(cosines["cosine_rotated"]),
        "left_out": left_out,
        "dictionaries": {},
    }

    def text(token: int) -> str:
        return str(tokenizer.decode([token], skip_special_tokens=False))

    attention = attention.to("cpu")
    dictionaries = {key: one.to("cpu") for key, one in dictionaries.items()}
    heads = {key: one for key, one in dictionaries.items() if isinstance(one, BlockDiagonal)}
    l0 = {key: latents.nnz / latents.shape[0] for key, latents in measurements.latents.items()}
    with job.writing() as out:
        write_dataset(out / "cosines.zarr", measurements.cosines)
        write_dataset(out / "angles.zarr", principal_angles(attention.W_O))
        write_dataset(out / "ov.zarr", ov_spectra(attention.W_V, attention.W_O))
        measurements.cross_terms.to_parquet(out / "cross_terms.parquet")
        for key, one in dictionaries.items():
            of_one = out / "dictionaries" / key
            of_one.mkdir(parents=True)
            kind, (name, amount) = "heads" if key in heads else "concat", one.spec.amount
            entry = {"kind": kind, "amount_name": name, "amount": amount, "d_sae": one.d_sae, "seed": one.spec.seed}
            entry |= {"l0": l0[key]}
            summary["dictionaries"][key] = entry
            if key in heads:
                entry |= _write_heads(of_one, heads[key], measurements.latents[key], attention, config)
                continue
            decoder = decoder_by_head(one, len(attention.W_O)).double().numpy()
            shares = measurements.active[key].dataset(decoder, attention.W_O.double().numpy())
            entry |= _write_concat(of_one, one, shares, config)
            chosen = choose_latents(measurements.active[key].count, config)
            if not len(chosen):
                log.warning("%s has no latent that is active on %d tokens or more", key, config.min_active)
                continue
            head_dictionary = None
            if (matched := _nearest({name: l0[name] for name in heads}, l0[key])) is not None:
                write_dataset(of_one / "coefficients.zarr", coefficients(one, heads[matched], chosen))
                firing = agreement(measurements.latents[key][:, chosen], measurements.latents[matched])
                decomposed = decompose_latents(one, heads[matched], chosen, firing, config)
                entry |= {"decomposed_in": matched} | decomposed.summary
                decomposed.table.to_parquet(of_one / "decomposition.parquet")
                decomposed.curves.to_parquet(of_one / "curves.parquet")
                decomposed.agreement.to_parquet(of_one / "agreement.parquet")
                head_dictionary = HeadDictionary(matched, heads[matched], decomposed.agreement)
            shown = key, one, chosen, shares, head_dictionary
            page, sources = dashboards(model, attention, measurements, *shown, config, text)
            (of_one / "dashboards.html").write_text(page, encoding="utf-8")
            sources.assign(row=sequence[sources["row"]]).to_parquet(of_one / "attribution.parquet")
        (out / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
        (out / "table.txt").write_text(report(HeadStudy(out, summary)))
    return summary


def _open(job: Job) -> tuple[dict[str, Dictionary], list[str]]:
    """The dictionaries by key, and those that only SAELens can compute, which have no part in this."""
    found, left_out = {}, []
    for path in job.inputs("train") + job.inputs("foreign"):
        one = open_dictionary(path, job)
        if one.spec.activation == "saelens":
            log.warning("%s is left out: only SAELens can compute it, and it has no weights in these terms", path)
            left_out.append(path.name)
        else:
            found[path.name] = one
    if not found:
        raise ConfigError(f"none of the dictionaries can be studied here: {', '.join(left_out)}")
    for key, one in found.items():
        HeadsConfig(**job.config["heads"]).check_latents(one.d_sae, key)
    return found, left_out


def _nearest(heads: dict[str, float], l0: float) -> str | None:
    """The dictionary of the L0 nearest to `l0`, of those by key that fire."""
    live = [key for key, of_heads in heads.items() if of_heads > 0]
    return min(live, key=lambda key: abs(np.log(heads[key] / max(l0, 1e-9))), default=None)


def _write_heads(
    out: Path, one: BlockDiagonal, latents: sp.csc_array, attention: Attention, config: HeadsConfig
) -> dict[str, Any]:
    """Norms, spectra and interference of one dictionary of heads; latents of each head in the atoms of others."""
    norms = decoder_norms(one.heads)
    values = spectra(one.heads, attention.W_O)
    write_dataset(out / "norms.zarr", norms)
    write_dataset(out / "spectra.zarr", values)
    n_heads = len(attention.W_O)
    rotations = rotations_of(attention, config).numpy()
    atoms = [a.numpy() for a in lifted(one.heads, attention.W_O)]
    each = by_head(latents, n_heads)
    dataset, pairs = interference_dataset(each, atoms, rotations, config.top_pairs)
    write_dataset(out / "interference.zarr", dataset)
    pairs.to_parquet(out / "interference.parquet")
    size, most = one.heads[0].d_sae, max(1, config.n_latents // n_heads)
    chosen = [choose_latents(np.diff(f.indptr), config, h * size, most) for h, f in enumerate(each)]
    with threadpool_limits(1):  # on matrices this small a second thread costs more than it brings
        others = lifted_table(chosen, atoms, attention.W_O.double().numpy(), rotations[0], (1, 4, config.max_atoms))
    others.to_parquet(out / "lifted.parquet")
    return {
        "mean_decoder_norm": float(norms["decoder_norm"].mean()),
        **{f"rank_{matrix}": values["rank"].sel(matrix=matrix).values.tolist() for matrix in MATRICES},
        "rank_of_all": int(values["rank"].sel(matrix="D").sum()),
        "interference_over_weight": none_if_nan(dataset["total"].sum() / dataset["weight"].sum()),
        "interference_over_weight_rotated": _range(dataset["total_rotated"].sum("pair") / dataset["weight"].sum()),
    }


def _write_concat(out: Path, one: Dictionary, shares: xr.Dataset, config: HeadsConfig) -> dict[str, Any]:
    """Head shares of one dictionary of all heads."""
    compared = compare_measures(shares, config.min_active)
    write_dataset(out / "shares.zarr", shares)
    write_dataset(out / "measures.zarr", compared)
    singular_values = torch.linalg.svdvals(one.W_dec.double()).numpy()
    between = {"measure_a": "decoder", "measure_b": "dfa"}
    return {
        "rank_W_dec": rank(singular_values, tuple(one.W_dec.shape)),
        "ranked_latents": compared.attrs["n_latents"],
        "decoder_dfa_rank_correlation": none_if_nan(compared["rank_correlation"].sel(between)),
        "decoder_dfa_top_agreement": none_if_nan(compared["top_agreement"].sel(between)),
    }


def _range(values: xr.DataArray) -> list[float | None]:
    """The lowest and the highest."""
    return [none_if_nan(values.min()), none_if_nan(values.max())]
