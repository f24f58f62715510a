"""Pairs of SAEs that other libraries made: JSAE's checkpoints and any two of SAELens, studied against autograd."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from stores import tokens_instance, weights_of, write_receipt
from tests.jacobians.test_study import INTO, OUT, PROCESSING
from torch import Tensor

from saeflow.config import ConfigError, ModelConfig
from saeflow.dictionaries import DictionaryError, load_dictionary
from saeflow.dictionaries.foreign import Site, foreign_job, read_foreign
from saeflow.dictionaries.layouts import foreign_digest, foreign_format
from saeflow.jacobians.study import jacobian_job
from saeflow.jobs.job import Job
from saeflow.models.loading import load_model
from saeflow.models.splicing import read_hooks
from saeflow.planning.batches import resources
from saeflow.planning.digests import DigestCache
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.machine import notes

ROOT = Path(__file__).resolve().parents[2]
D, N, K = 32, 60, 5
JSAE = {
    "architecture": "standard", "is_pair": True, "use_jacobian_loss": True, "d_in": D, "d_sae": N, "dtype": "float32",
    "device": "cuda", "model_name": "pythia-70m-deduped", "randomize_llm_weights": False, "hook_layer": 1,
    "hook_name": "blocks.1.ln2.hook_normalized", "hook_head_index": None, "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": K}, "apply_b_dec_to_input": False, "finetuning_scaling_factor": False,
    "prepend_bos": True, "context_size": 2048, "normalize_activations": "none", "jacobian_coefficient": 0.5,
    "sparsity_metric": "l1",
}  # fmt: skip


def weights(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    drawn = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
    return {name: torch.randn(*shape, generator=g) / 5 for name, shape in drawn.items()}


def write_jsae(folder: Path, **fields: Any) -> Path:
    """As `SAEPair.save_model` does: the state dict of both, and of the MLP, which it does not read back."""
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(JSAE | fields))
    sides = {"": weights(1), "_out": weights(2)}
    tensors = {f"_{name}{side}": tensor for side, made in sides.items() for name, tensor in made.items()}
    save_file(tensors | {"mlp.W_in": torch.zeros(2)}, folder / "sae_weights.safetensors")
    return folder


def write_saelens(folder: Path, architecture: str, hook: str, seed: int) -> Path:
    folder.mkdir(parents=True)
    config = {"architecture": architecture, "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu",
              "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
              "metadata": {"sae_lens_version": "6.54.12", "hook_name": hook}}  # fmt: skip
    if architecture == "topk":
        config |= {"k": K, "rescale_acts_by_decoder_norm": False}
    tensors = weights(seed) | ({"threshold": torch.full((N,), 0.3)} if architecture == "jumprelu" else {})
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def pair_job(tmp_path: Path, model: Path, tokens: Path, paths: list[Path]) -> Job:
    """A Jacobian study of a pair that the stage `foreign` reads from `paths`."""
    sides = [{"release": None, "sae_id": None, "format": (f := foreign_format(path)), "content": foreign_digest(
        path, f, DigestCache(None))} for path in paths]  # fmt: skip
    of_model = {"weights": weights_of(model), **PROCESSING}
    config = sides[0] | {"output": sides[1], "hook_name": INTO, "hook_name_out": OUT, "head": None, "model": of_model}
    sources = {"foreign": str(paths[0]), "foreign_out": str(paths[1]), "model": str(model), "label": "theirs"}
    foreign = Instance("foreign", "theirs", config, {}, sources)
    study = {"jacobian": {"n_tokens": 40, "min_count": 1}, "model": of_model}
    jacobian = Instance("jacobian", "j", study, {"foreign": ["theirs"], "tokens": ["held"]}, {"model": str(model)})
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "held").symlink_to(tokens)
    stages = {"foreign": {"theirs": foreign}, "jacobian": {"j": jacobian}}
    plan = Plan("tiny", stages | {"tokens": {"held": tokens_instance("held", model)}}, {}, results=str(tmp_path))
    foreign_job(Job(foreign, plan, "cpu"))
    write_receipt(tmp_path / "foreign" / "theirs", "foreign")
    return Job(jacobian, plan, "cpu")


def encode(w: dict[str, Tensor], x: Tensor, activation: str, centred: bool) -> Tensor:
    """Latents (n,) of x (d,), by the formula of each library."""
    pre = (x - w["b_dec"] if centred else x) @ w["W_enc"] + w["b_enc"]
    if activation == "topk":
        kept = pre.topk(K).indices
        return torch.zeros_like(pre).index_put((kept,), pre[kept].relu())
    return pre * (pre > 0.3)


@pytest.mark.parametrize("library", ["jsae", "saelens"])
def test_a_pair_of_others_has_the_jacobian_of_autograd(
    library: str, tmp_path: Path, neox_folder: Path, tokens_folder: Path
) -> None:
    if library == "jsae":
        paths, kinds, centred = [write_jsae(tmp_path / "theirs")] * 2, ("topk", "topk"), False
    else:
        kinds, centred = ("jumprelu", "topk"), True
        paths = [write_saelens(tmp_path / h, k, h, s) for k, h, s in zip(kinds, (INTO, OUT), (1, 2), strict=True)]
    job = pair_job(tmp_path, neox_folder, tokens_folder, paths)
    summary = jacobian_job(job)
    assert (summary["train_key_in"], summary["train_key_out"], summary["kind"]) == ("theirs", "theirs", "pair")
    assert summary["jacobian_coefficient"] == (0.5 if library == "jsae" else 0.0)
    for side, hook in (("input", INTO), ("output", OUT)):
        spec = load_dictionary(tmp_path / "foreign" / "theirs" / side).spec
        assert (spec.hook_name, spec.origin.source) == (hook, "theirs")

    model = load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder)), "cpu").to(torch.float64)
    sae_in, sae_out = ({name: t.double() for name, t in weights(s).items()} for s in (1, 2))
    import zarr

    group = zarr.open_group(job.path / "tokens.zarr", mode="r")
    held = {name: torch.from_numpy(group[name][:]) for name in ("token", "output", "input", "jacobian")}
    rows = tokens_of(tokens_folder)
    x, y = (v[0, 1:6] for v in read_hooks(model, rows[:1], [INTO, OUT]))
    for t, (x_t, y_t) in enumerate(zip(x, y, strict=True)):
        s = encode(sae_in, x_t, kinds[0], centred)

        def moved(latents: Tensor, x_t: Tensor = x_t, s: Tensor = s) -> Tensor:
            value = x_t + (latents - s) @ sae_in["W_dec"]
            out = model.blocks[1].apply_mlp(value[None, None])[0, 0]
            return (out - sae_out["b_dec"] if centred else out) @ sae_out["W_enc"] + sae_out["b_enc"]

        on_out = encode(sae_out, y_t, kinds[1], centred) > 0
        wanted = torch.autograd.functional.jacobian(moved, s) * on_out[:, None] * (s > 0)
        mine = held["token"] == t
        found = torch.zeros(N, N).index_put((held["output"][mine].long(), held["input"][mine].long()),
                                            held["jacobian"][mine].float())  # fmt: skip
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def tokens_of(folder: Path) -> Tensor:
    """The rows that a study of 40 tokens takes."""
    from saeflow.text.tokens import open_tokens

    return torch.from_numpy(open_tokens(folder).spread_rows(2)[1].tokens).long()


def test_a_pair_in_one_file_says_what_it_cannot_be(tmp_path: Path) -> None:
    folder = write_jsae(tmp_path / "a")
    assert foreign_format(folder) == "jsae"
    one = read_foreign(folder, Site(OUT, OUT))
    assert one.spec.options == {"jacobian_coefficient": 0.5, "jacobian_penalty": "l1"} and one.spec.k == K
    torch.testing.assert_close(one.encode(weights(3)["W_dec"]), torch.stack([
        encode(weights(2), x, "topk", False) for x in weights(3)["W_dec"]]), rtol=1e-5, atol=1e-6)  # fmt: skip
    with pytest.raises(DictionaryError, match=r"holds SAEs of blocks.1.mlp.hook_in and blocks.1.hook_mlp_out, but the"):
        read_foreign(folder, Site("blocks.1.ln2.hook_normalized", "blocks.1.ln2.hook_normalized"))
    old = {"is_pair": None, "hook_name": None, "hook_point": "blocks.1.hook_resid_pre", "use_jacobian_loss": False}
    resid = Site("blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre")
    assert read_foreign(write_jsae(tmp_path / "b", **old), resid).spec.options["jacobian_coefficient"] == 0
    with pytest.raises(DictionaryError, match="only standard SAEs with TopK or ReLU"):
        read_foreign(write_jsae(tmp_path / "c", normalize_activations="layer_norm"), Site(OUT, OUT))
    with pytest.raises(DictionaryError, match=r"does not say with which Jacobian coefficient .* add jacobian_coeff"):
        read_foreign(write_jsae(tmp_path / "d", jacobian_coefficient=None), Site(OUT, OUT))


def test_a_pair_is_planned_by_content(tmp_path: Path) -> None:
    made = write_saelens(tmp_path / "in", "jumprelu", "h", 1), write_saelens(tmp_path / "out", "topk", "h", 2)
    settings = ["dictionary=foreign_pair", "site=mlp", "site.layer=1", f"dictionary.path={made[0]}"]
    plan = compose(ROOT / "conf", [*settings, f"dictionary.path_out={made[1]}"], str(tmp_path / "results"))
    counts = {stage: len(table) for stage, table in plan.stages.items() if table}
    assert counts == {
        "tokens": 2, "activations": 2, "foreign": 1, "jacobian": 1, "baseline": 2, "evaluate": 2, "figures": 1,
    }  # fmt: skip
    ((key, study),) = plan.stages["jacobian"].items()
    assert study.needs["foreign"] == list(plan.stages["foreign"]) and key.startswith("saelens.")
    assert sorted(e.config["part"] for e in plan.stages["evaluate"].values()) == ["input", "output"]
    assert resources(plan, "jacobian", [key])["mem_mb"] > 0 and not notes(plan)
    (made[1] / "cfg.json").write_text((made[1] / "cfg.json").read_text().replace("6.54.12", "6.54.13"))
    again = compose(ROOT / "conf", [*settings, f"dictionary.path_out={made[1]}"], str(tmp_path / "results"))
    assert again.stages["foreign"].keys() != plan.stages["foreign"].keys()
    with pytest.raises(ConfigError, match=r"dictionary.path_out=/nowhere: no such file or folder"):
        compose(ROOT / "conf", [*settings, "dictionary.path_out=/nowhere"], str(tmp_path / "results"))
    with pytest.raises(ConfigError, match=r"kind=foreign_pair needs a site with hook_name and hook_name_out"):
        compose(ROOT / "conf", [settings[0], "site=mlp_out", settings[3]], str(tmp_path / "results"))
