"""Dictionaries in the layouts that other libraries publish: by those layouts' rules and formulas."""

import json
import pickle  # noqa: TID251 -- a file that must not be opened
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from saeflow.config import ConfigError
from saeflow.dictionaries import Dictionary, DictionaryError, Spec, load_dictionary, save_dictionary
from saeflow.dictionaries.foreign import Site, read_foreign, read_release
from saeflow.dictionaries.layouts import foreign_files, foreign_format
from saeflow.dictionaries.sae import build
from saeflow.jobs.job import Job
from saeflow.planning.expansion import compose

ROOT = Path(__file__).resolve().parents[2]
D, N_LATENTS, K = 32, 48, 5
OUT = "blocks.1.hook_mlp_out"
SAE, TRANSCODER = Site(OUT, OUT), Site("blocks.1.ln2.hook_normalized", OUT)
G = torch.Generator().manual_seed(0)
X = torch.randn(50, D, generator=G)
W_ENC, W_DEC = torch.randn(D, N_LATENTS, generator=G), torch.randn(N_LATENTS, D, generator=G)
B_ENC, B_IN, B_OUT = (torch.randn(size, generator=G) for size in (N_LATENTS, D, D))
W_SKIP, GATE, MAG, R_MAG = (torch.randn(s, generator=G) for s in ((D, D), N_LATENTS, N_LATENTS, N_LATENTS))


def top(pre: Tensor) -> Tensor:
    """ReLU, then the K largest."""
    f = pre.relu()
    return f * (f >= f.sort(dim=1).values[:, -K, None])


def check(dictionary: Dictionary, f: Tensor, y: Tensor, folder: Path) -> None:
    """Latents and output, as read and once written and opened again."""
    folder.mkdir()
    save_dictionary(dictionary, folder)
    for one in (dictionary, load_dictionary(folder)):
        torch.testing.assert_close(one.encode(X), f, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.forward(X), y, rtol=1e-5, atol=2e-5)
    assert 0 < (f > 0).double().mean() < 1


# -------------------------------------------------------------------- transcoder_circuits
@pytest.fixture
def circuits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Saves as `torch.save({"cfg": ..., "state_dict": ...})` with a configuration of that library's class."""

    def save(**fields: Any) -> Path:
        module, package = ModuleType("sae_training.config"), ModuleType("sae_training")
        config_class = type("LanguageModelSAERunnerConfig", (), {"__module__": "sae_training.config"})
        module.LanguageModelSAERunnerConfig = config_class  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "sae_training", package)
            patch.setitem(sys.modules, "sae_training.config", module)
            config = config_class()
            vars(config).update(
                {"d_in": D, "d_sae": N_LATENTS, "dtype": torch.float32, "device": torch.device("cpu"),
                 "model_name": "gpt2-small", "l1_coefficient": 1.4e-4, "use_ghost_grads": (True,)} | fields
            )  # fmt: skip
            tensors = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_IN}
            if fields.get("is_transcoder"):
                tensors["b_dec_out"] = B_OUT
            torch.save({"cfg": config, "state_dict": tensors}, tmp_path / "final.pt")  # noqa: TID251
        return tmp_path / "final.pt"

    return save


def test_transcoder_circuits(circuits: Any, tmp_path: Path) -> None:
    f = ((X - B_IN) @ W_ENC + B_ENC).relu()
    hooks = {"hook_point": TRANSCODER.hook_name, "out_hook_point": OUT}
    made = read_foreign(circuits(is_transcoder=True, **hooks), TRANSCODER)
    check(made, f, f @ W_DEC + B_OUT, tmp_path / "a")
    assert made.spec.l1_coefficient == 1.4e-4 and made.spec.origin.model_name == "gpt2-small"
    assert made.spec.origin.fold_ln and made.spec.kind == "transcoder"
    made = read_foreign(circuits(is_transcoder=False, hook_point=OUT), SAE)
    check(made, f, f @ W_DEC + B_IN, tmp_path / "b")
    with pytest.raises(DictionaryError, match="is an SAE: it needs a site with hook_name alone"):
        read_foreign(tmp_path / "final.pt", TRANSCODER)
    other = Site("blocks.0.hook_mlp_out", "blocks.0.hook_mlp_out")
    with pytest.raises(DictionaryError, match=f"reads {OUT} and writes {OUT}, but the site is blocks.0"):
        read_foreign(tmp_path / "final.pt", other)


class Attack:
    """Unpickled as pickle does it, writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_pickle_is_never_executed(tmp_path: Path, in_folder: bool) -> None:
    touched = tmp_path / "touched"
    file = tmp_path / ("ae.pt" if in_folder else "bad.pt")
    trainer = {"dict_class": "AutoEncoder", "layer": 1}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    attack = {"cfg": Attack(touched), "state_dict": {}, "bias": Attack(touched)}
    for save in (torch.save, lambda held, path: path.write_bytes(pickle.dumps(held))):  # noqa: TID251
        save(attack, file)
        with pytest.raises(DictionaryError, match=r"is not opened: .*Convert it with the library that made it"):
            read_foreign(tmp_path if in_folder else file, SAE)
    assert not touched.exists()
    pickle.loads(pickle.dumps(attack))
    assert touched.exists()  # it would have


# -------------------------------------------------------------------- dictionary_learning
def learned(folder: Path, dict_class: str, tensors: dict[str, Tensor], **trainer: Any) -> Path:
    folder.mkdir(exist_ok=True)
    held = {"dict_class": dict_class, "layer": 1, "lm_name": "EleutherAI/pythia-70m-deduped", "activation_dim": D}
    (folder / "config.json").write_text(json.dumps({"trainer": held | trainer, "buffer": {"ctx_len": 128}}))
    torch.save(tensors, folder / "ae.pt")  # noqa: TID251
    return folder


def linear(**biases: Tensor) -> dict[str, Tensor]:
    return {"encoder.weight": W_ENC.T.contiguous(), "decoder.weight": W_DEC.T.contiguous()} | biases


LEARNED = {
    "AutoEncoder": (
        linear(**{"encoder.bias": B_ENC, "bias": B_IN}),
        lambda: ((X - B_IN) @ W_ENC + B_ENC).relu(),
        B_IN,
    ),
    "AutoEncoderNew": (
        linear(**{"encoder.bias": B_ENC, "decoder.bias": B_OUT}),
        lambda: (X @ W_ENC + B_ENC).relu(),
        B_OUT,
    ),
    "AutoEncoderTopK": (
        linear(**{"encoder.bias": B_ENC, "b_dec": B_IN, "k": torch.tensor(K), "threshold": torch.tensor(0.3)}),
        lambda: top((X - B_IN) @ W_ENC + B_ENC),
        B_IN,
    ),
    "BatchTopKSAE": (
        linear(**{"encoder.bias": B_ENC, "b_dec": B_IN, "k": torch.tensor(K), "threshold": torch.tensor(6.0)}),
        lambda: (lambda f: f * (f > 6.0))(((X - B_IN) @ W_ENC + B_ENC).relu()),
        B_IN,
    ),
    "MatryoshkaBatchTopKSAE": (
        {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_IN, "threshold": torch.tensor(6.0)},
        lambda: (lambda f: f * (f > 6.0))(((X - B_IN) @ W_ENC + B_ENC).relu()),
        B_IN,
    ),
    "JumpReluAutoEncoder": (
        {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_OUT, "threshold": GATE.abs()},
        lambda: (lambda f: f * (f > GATE.abs()))(X @ W_ENC + B_ENC),
        B_OUT,
    ),
    "GatedAutoEncoder": (
        linear(decoder_bias=B_IN, gate_bias=GATE, mag_bias=MAG, r_mag=0.3 * R_MAG),
        lambda: ((X - B_IN) @ W_ENC + GATE > 0) * ((0.3 * R_MAG).exp() * ((X - B_IN) @ W_ENC) + MAG).relu(),
        B_IN,
    ),
}


@pytest.mark.parametrize("dict_class", LEARNED)
def test_dictionary_learning(dict_class: str, tmp_path: Path) -> None:
    tensors, encode, bias = LEARNED[dict_class]
    made = read_foreign(learned(tmp_path / "d", dict_class, tensors, k=K, l1_penalty=0.06), SAE)
    check(made, encode(), encode() @ W_DEC + bias, tmp_path / "again")
    assert made.spec.origin.fold_ln is False


def test_dictionary_learning_says_what_does_not_fit(tmp_path: Path) -> None:
    tensors, *_ = LEARNED["BatchTopKSAE"]
    unset = tensors | {"threshold": torch.tensor(-1.0)}
    with pytest.raises(DictionaryError, match="its threshold was never set"):
        read_foreign(learned(tmp_path, "BatchTopKSAE", unset), SAE)
    with pytest.raises(DictionaryError, match=r"is of layer 3, but the site is .*; set site.layer=3"):
        read_foreign(learned(tmp_path, "BatchTopKSAE", tensors, layer=3), SAE)
    with pytest.raises(DictionaryError, match="dict_class 'CrossCoder' cannot be read here"):
        read_foreign(learned(tmp_path, "CrossCoder", tensors), SAE)
    del tensors["b_dec"]
    with pytest.raises(DictionaryError, match="is not a whole dictionary_learning dictionary"):
        read_foreign(learned(tmp_path, "BatchTopKSAE", tensors), SAE)


# -------------------------------------------------------------------- sparsify
@pytest.mark.parametrize("transcodes", [False, True])
def test_sparsify(transcodes: bool, tmp_path: Path) -> None:
    folder = tmp_path / "layers.1.mlp"
    folder.mkdir()
    config = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": N_LATENTS,
              "k": K, "multi_topk": False, "skip_connection": transcodes,
              "transcode": transcodes, "d_in": D}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    tensors = {"encoder.weight": W_ENC.T.contiguous(), "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_IN}
    save_file(tensors | ({"W_skip": W_SKIP} if transcodes else {}), folder / "sae.safetensors")
    f = top((X if transcodes else X - B_IN) @ W_ENC + B_ENC)
    y = f @ W_DEC + B_IN + (X @ W_SKIP.T if transcodes else 0)
    site = Site("blocks.1.hook_resid_pre", OUT) if transcodes else SAE
    check(read_foreign(folder, site), f, y, tmp_path / "again")
    if transcodes:
        with pytest.raises(DictionaryError, match=r"with the norm's gain and bias, which .*hook_normalized lacks"):
            read_foreign(folder, TRANSCODER)


# -------------------------------------------------------------------- kissane
Z = "blocks.1.attn.hook_z"
KISSANE = {"act_name": Z, "act_size": D, "dict_size": N_LATENTS, "l1_coeff": 2.0, "seed": 49, "enc_dtype": "fp32"}
STATE = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_IN}


def kissane(folder: Path, config: dict[str, Any] | None = None, **tensors: Tensor) -> Path:
    """`gelu-2l_l12.00e+00_v78.pt`, a bare state dict, and its `_cfg.json`."""
    folder.mkdir(exist_ok=True)
    file = folder / "gelu-2l_l12.00e+00_v78.pt"
    torch.save(STATE | tensors, file)  # noqa: TID251
    if config is not None:
        (folder / "gelu-2l_l12.00e+00_v78_cfg.json").write_text(json.dumps(config))
    return file


def test_kissane(tmp_path: Path) -> None:
    file = kissane(tmp_path, KISSANE)
    assert foreign_format(file) == "kissane" and len(foreign_files(file, "kissane")) == 2
    f = ((X - B_IN) @ W_ENC + B_ENC).relu()
    made = read_foreign(file, Site(Z, Z))
    check(made, f, f @ W_DEC + B_IN, tmp_path / "again")
    assert made.spec.l1_coefficient == 2.0 and made.spec.origin.fold_ln is None  # no matter for values of heads
    with pytest.raises(DictionaryError, match=f"reads {Z} and writes {Z}, but the site is {OUT}"):
        read_foreign(file, SAE)
    torch.save(STATE, file, _use_new_zipfile_serialization=False)  # noqa: TID251 -- as torch did before 1.6
    assert foreign_format(file) == "kissane"
    with pytest.raises(DictionaryError, match=r"W_enc of shape \(32, 48\), but its _cfg.json says \(32, 47\)"):
        read_foreign(kissane(tmp_path, KISSANE | {"dict_size": 47}), Site(Z, Z))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.with_name(f"{file.stem}_cfg.json").unlink(), "lacks gelu-2l_.*_cfg.json, which .*=kissane"),
        (lambda file: kissane(file.parent, {"dict_size": 1}), "_cfg.json lacks act_name, act_size, l1_coeff: it is no"),
        (lambda file: file.with_name(f"{file.stem}_cfg.json").write_text("[1]"), "_cfg.json lacks any settings"),
        (lambda file: file.with_name(f"{file.stem}_cfg.json").write_text("{"), "_cfg.json cannot be read as JSON"),
        (lambda file: torch.save({"W_enc": W_ENC}, file), "holds no W_dec, b_dec, b_enc, which a .pt of .*=kissane"),  # noqa: TID251
        (
            lambda file: file.write_bytes(b"no pickle"),
            "holds no cfg, state_dict, which a .pt of .*=transcoder_circuits",
        ),
        (lambda file: kissane(file.parent, KISSANE | {"act_name": OUT}), f"is of {OUT}, but the site is {Z}"),
    ],
)
def test_a_kissane_dictionary_that_lacks_something_is_refused_by_the_plan(
    change: Any, message: str, tmp_path: Path
) -> None:
    file = kissane(tmp_path, KISSANE)
    change(file)
    with pytest.raises(ConfigError, match=message):
        compose(ROOT / "conf", ["dictionary=foreign", f"dictionary.path={file}", "site=attn_z", "site.layer=1"])


@torch.no_grad()
def test_kissane_latents_are_those_of_the_model_that_they_were_trained_on(
    gpt2_folder: Path, corpus_file: Path, tmp_path: Path
) -> None:
    """TransformerLens's default processing, which folds the biases of values into that of the output."""
    from transformer_lens import HookedTransformer

    from saeflow.config import ModelConfig
    from saeflow.dictionaries.foreign import foreign_job
    from saeflow.models.loading import load_model

    ours = load_model(gpt2_folder, ModelConfig("tiny", path=str(gpt2_folder)), "cpu")
    for attention in (block.attn for block in ours.blocks):
        attention.b_V += torch.randn(attention.b_V.shape, generator=G)
    theirs = HookedTransformer(ours.cfg, move_to_device=False)
    theirs.load_and_process_state_dict({k: v.clone() for k, v in ours.state_dict().items()}, fold_ln=True)
    tokens = torch.randint(0, 300, (3, 20), generator=G)
    x, trained_on = (m.run_with_cache(tokens)[1][Z].flatten(2).flatten(0, 1) for m in (ours, theirs))
    assert (x - trained_on).abs().max() > 0.5
    chosen = ["model=local", f"model.path={gpt2_folder}", "corpus=local", f"corpus.path={corpus_file}", *TINY]
    path = f"dictionary.path={kissane(tmp_path, KISSANE)}"
    plan = compose(ROOT / "conf", ["dictionary=foreign", path, "site=attn_z", *chosen], results=str(tmp_path))
    (instance,) = plan.stages["foreign"].values()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saeflow.dictionaries.foreign.open_model", lambda job: ours)
        (made,) = foreign_job(Job(instance, plan, "cpu"))
    f = ((trained_on - B_IN) @ W_ENC + B_ENC).relu()
    torch.testing.assert_close(made.encode(x), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.forward(x) - x, f @ W_DEC + B_IN - trained_on, rtol=1e-4, atol=1e-3)


# -------------------------------------------------------------------- SAELens
def test_old_saelens_folders(tmp_path: Path) -> None:
    """Version 3: a flat `cfg.json` with the training run's options."""
    from sae_lens import SAE as SAELensSAE

    old = {"model_name": "gelu-1l", "hook_name": OUT, "hook_layer": 1, "hook_head_index": None, "d_in": D,
           "d_sae": N_LATENTS, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
           "apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "normalize_activations": "none",
           "context_size": 128, "prepend_bos": True, "dtype": "torch.float32", "device": "cpu",
           "sae_lens_training_version": "3.20.0", "dataset_path": "c4", "architecture": "standard"}  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    save_file({"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_IN}, tmp_path / "sae_weights.safetensors")
    made = read_foreign(tmp_path, SAE)
    f = top((X - B_IN) @ W_ENC + B_ENC)
    check(made, f, f @ W_DEC + B_IN, tmp_path / "again")
    theirs = SAELensSAE.load_from_disk(tmp_path, device="cpu")
    torch.testing.assert_close(made.forward(X), theirs(X), rtol=1e-5, atol=1e-5)
    assert made.spec.k == K and made.spec.origin.context_size == 128
    with pytest.raises(DictionaryError, match="choose the site that it was made for"):
        read_foreign(tmp_path, Site("blocks.0.hook_mlp_out", "blocks.0.hook_mlp_out"))


def test_a_release_that_is_not_here_is_refused_with_what_to_do() -> None:
    with pytest.raises(DictionaryError, match=r"SAELens cannot get x of release no-such-release.*set dictionary.path"):
        read_release("no-such-release", "x", SAE)


# -------------------------------------------------------------------- as rows of the tables
def test_layouts_are_known_by_their_files(tmp_path: Path) -> None:
    learned(tmp_path / "dl", "AutoEncoder", {})
    assert foreign_format(tmp_path / "dl") == "dictionary_learning"
    assert [f.name for f in foreign_files(tmp_path / "dl", "dictionary_learning")] == ["config.json", "ae.pt"]
    with pytest.raises(ConfigError, match=r"is no dictionary that can be read here; these can: saelens: cfg.json"):
        foreign_format(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks cfg.json, which dictionary.format=saelens has"):
        foreign_files(tmp_path, "saelens")


TINY = [
    "tokens.context_size=32", "tokens.train_tokens=1024", "tokens.held_out_tokens=512", "tokens.held_out_fraction=0.3",
    "activations.chunk_tokens=256", "activations.shard_tokens=1024", "evaluation.resamples=20", "site.layer=1",
]  # fmt: skip


def test_foreign_dictionaries_stand_in_the_tables(neox_folder: Path, corpus_file: Path, tmp_path: Path) -> None:
    """Two of other libraries, evaluated and drawn; nothing is trained. A changed file is another dictionary."""
    from tests.models.test_architectures import run_all

    tensors, *_ = LEARNED["AutoEncoder"]
    one, other = (learned(tmp_path / n, "AutoEncoder", tensors, lm_name="tiny") for n in ("one", "other"))
    scaled = {name: t * (0.1 if "decoder" in name else 1) for name, t in tensors.items()}
    learned(tmp_path / "other", "AutoEncoder", scaled, lm_name="tiny")
    chosen = ["model=local", f"model.path={neox_folder}", "corpus=local", f"corpus.path={corpus_file}", *TINY]
    sweep = f"sweep={{dictionary:foreign,site:mlp_out,dictionary.path:[{one},{other}]}}"
    figures = "figures=[sparsity_faithfulness,paired_differences]"
    plan = compose(ROOT / "conf", [sweep, figures, *chosen], results=str(tmp_path / "results"))
    assert {s: len(t) for s, t in plan.stages.items() if t} == {
        "tokens": 2, "activations": 1, "foreign": 2, "baseline": 1, "evaluate": 2, "figures": 1,
    }  # fmt: skip
    run_all(plan)
    summaries = [json.loads((plan.folder("evaluate", k) / "summary.json").read_text()) for k in plan.stages["evaluate"]]
    assert [s["source"] for s in summaries] == ["one", "other"]
    assert summaries[0]["l0"] == summaries[1]["l0"] and summaries[0]["ce_replaced"] != summaries[1]["ce_replaced"]
    (key,) = plan.stages["figures"]
    table = (plan.folder("figures", key) / "sparsity_faithfulness.csv").read_text()
    assert "one (ReLU + L1 SAE)" in table and "other (ReLU + L1 SAE)" in table
    one.rename(tmp_path / "renamed")
    renamed = compose(ROOT / "conf", [sweep.replace(str(one), f"{tmp_path}/renamed"), figures, *chosen])
    changed = {stage for stage in plan.stages if plan.stages[stage].keys() != renamed.stages[stage].keys()}
    assert changed == {"figures"}  # which show the new name
    (figure,) = renamed.stages["figures"].values()
    assert sorted(figure.config["labels"].values()) == ["other", "renamed"]
    learned(one, "AutoEncoder", {name: 2 * t for name, t in scaled.items()}, lm_name="tiny")
    again = compose(ROOT / "conf", [sweep, figures, *chosen], results=str(tmp_path / "results"))
    assert len(again.stages["foreign"].keys() - plan.stages["foreign"].keys()) == 1


def test_a_foreign_dictionary_of_one_head(neox_folder: Path, corpus_file: Path, tmp_path: Path) -> None:
    """Its baseline ablates that head alone: less than all of them do."""
    from tests.models.test_architectures import run_all

    hook, d_head = "blocks.1.attn.hook_z", 8
    paths = []
    for size, head in ((d_head, 2), (D, None)):
        spec = Spec("sae", "relu", size, size, N_LATENTS, hook, hook, hook_head_index=head)
        made = build(spec, W_ENC[:size], B_ENC, W_DEC[:, :size].contiguous(), B_IN[:size])
        paths.append(tmp_path / f"of_{head}")
        paths[-1].mkdir()
        save_dictionary(made, paths[-1])
    assert read_foreign(paths[0], Site(hook, hook, 2)).spec.hook_head_index == 2
    with pytest.raises(DictionaryError, match=r"is of head 2, but the site's is 1; set site.head"):
        read_foreign(paths[0], Site(hook, hook, 1))
    chosen = ["model=local", f"model.path={neox_folder}", "corpus=local", f"corpus.path={corpus_file}", *TINY]
    sites = ",".join(
        f"{{dictionary:foreign,site:attn_z,dictionary.path:{path},site.head:{head}}}"
        for path, head in zip(paths, (2, "null"), strict=True)
    )
    plan = compose(ROOT / "conf", [f"sweep=[{sites}]", *chosen], results=str(tmp_path / "results"))
    assert len(plan.stages["baseline"]) == 2 and len(plan.stages["activations"]) == 1
    run_all(plan)
    summaries = [json.loads((plan.folder("evaluate", k) / "summary.json").read_text()) for k in plan.stages["evaluate"]]
    one, every = sorted(summaries, key=lambda s: s["hook_head_index"] is None)
    assert one["hook_head_index"] == 2 and one["ce_clean"] == every["ce_clean"]
    assert 0 < one["kl_zero"] < every["kl_zero"] and 0 < one["kl_mean"] < every["kl_mean"]


def test_a_foreign_dictionary_of_another_size_is_refused(neox_folder: Path, corpus_file: Path, tmp_path: Path) -> None:
    from saeflow.dictionaries.foreign import foreign_job

    wide = {"encoder.weight": torch.zeros(8, 64), "encoder.bias": torch.zeros(8), "bias": torch.zeros(64)}
    path = learned(tmp_path / "wide", "AutoEncoder", wide | {"decoder.weight": torch.zeros(64, 8)})
    chosen = ["model=local", f"model.path={neox_folder}", "corpus=local", f"corpus.path={corpus_file}", *TINY]
    plan = compose(ROOT / "conf", ["dictionary=foreign", f"dictionary.path={path}", *chosen], results=str(tmp_path))
    (instance,) = plan.stages["foreign"].values()
    with pytest.raises(ConfigError, match=f"has d_in=64 at {OUT}, but the model .* is 32 wide there"):
        foreign_job(Job(instance, plan, "cpu"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dictionary.path=/none"], "dictionary.path=/none: no such file or folder"),
        (["dictionary.release=r"], "dictionary.sae_id=None is out of range: it must be given with dictionary.release"),
        ([], "set exactly one of dictionary.path, dictionary.heads and dictionary.release"),
    ],
)
def test_what_cannot_be_read_is_refused_by_the_plan(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(ROOT / "conf", ["dictionary=foreign", *overrides], results=str(tmp_path))
