"""Dictionaries trained by other libraries' own code, on the embedded model, beside each other in tables and figures.

SAELens is there. sparsify and dictionary_learning train only where `make bench NAME=train_step` has installed them into
`.venv-bench`; what they save is tested by its layout in `test_foreign.py` in any case.
"""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tests.models.test_architectures import run_all
from torch import Tensor

from saeflow.config import ModelConfig
from saeflow.dictionaries import Dictionary, DictionaryError, load_dictionary, save_dictionary
from saeflow.dictionaries.foreign import Site, read_foreign
from saeflow.figures.registry import declared
from saeflow.heads.stage import SHOWN
from saeflow.models.loading import load_model
from saeflow.planning.expansion import compose
from saeflow.planning.stages import stages

ROOT = Path(__file__).resolve().parents[2]
MODEL, PEERS = ROOT / "resources" / "model", ROOT / ".venv-bench"
LAYER, D, LATENTS, K, CONTEXT = 1, 128, 256, 8, 32
HOOK = f"blocks.{LAYER}.hook_mlp_out"
SITE = Site(HOOK, HOOK)
AS_PUBLISHED = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}
"""What the others are trained on."""
SAELENS: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 0.3},
    "gated": {"l1_coefficient": 0.3},
    "topk": {"k": K},
    "batchtopk": {"k": K},
    "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [64, LATENTS]},
    "jumprelu": {"l0_coefficient": 0.3},
}


class Trained(NamedTuple):
    """A folder that a library saved, and what the library itself makes of `x` (N, d): `y` (N, d)."""

    path: Path
    x: Tensor
    y: Tensor


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(MODEL, ModelConfig("embedded", path=str(MODEL), **AS_PUBLISHED), "cpu")


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4096, (64, CONTEXT))


@pytest.fixture(scope="module")
def x(model: Any, tokens: np.ndarray) -> Tensor:
    """(N, d)"""
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.from_numpy(tokens), names_filter=[HOOK])
    return cache[HOOK].flatten(0, 1)


def by_trainer(architecture: str, x: Tensor, folder: Path) -> None:
    """SAELens's `SAETrainer`: checkpoints in `checkpoints`, one of them of its middle, and `for_use`."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    def batches() -> Any:
        for step in range(10_000):
            yield x[torch.randint(0, len(x), (256,), generator=torch.Generator().manual_seed(step))]

    sae_class, config_class = get_sae_training_class(architecture)
    torch.manual_seed(0)
    normal = "expected_average_only_in"
    sae = sae_class(config_class(d_in=D, d_sae=LATENTS, normalize_activations=normal, **SAELENS[architecture]))
    config = SAETrainerConfig(
        total_training_samples=256 * 40, train_batch_size_samples=256, device="cpu", lr=1e-3, lr_end=1e-3,
        checkpoint_path=str(folder / "checkpoints"), save_final_checkpoint=True, n_checkpoints=1,
        n_batches_for_norm_estimate=5, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    SAETrainer(config, sae, batches()).fit().save_inference_model(folder / "for_use")


@pytest.fixture(scope="module")
def by_saelens(x: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    from sae_lens import SAE

    found = {}
    for architecture in SAELENS:
        folder = tmp_path_factory.mktemp(architecture)
        by_trainer(architecture, x, folder)
        sae = SAE.load_from_disk(folder / "for_use")
        with torch.no_grad():
            found[architecture] = Trained(folder, x, sae(x))
    return found


@pytest.fixture(scope="module")
def by_runner(model: Any, tokens: np.ndarray, x: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """SAELens's language-model runner, which fills in the metadata."""
    from datasets import Dataset
    from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, StandardTrainingSAEConfig
    from sae_lens.config import LoggingConfig

    folder = tmp_path_factory.mktemp("by_runner")
    config: Any = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=D, d_sae=LATENTS, l1_coefficient=0.3), model_name="embedded", hook_name=HOOK,
        dataset_path="tokens", is_dataset_tokenized=True, streaming=False, context_size=CONTEXT, device="cpu",
        training_tokens=40 * 256, train_batch_size_tokens=256, store_batch_size_prompts=4, n_batches_in_buffer=16,
        lr=1e-3, logger=LoggingConfig(log_to_wandb=False), output_path=str(folder), checkpoint_path=None,
    )  # fmt: skip
    dataset = Dataset.from_dict({"tokens": tokens.tolist()})
    with warnings.catch_warnings():  # of few tokens, and of its own tensors
        warnings.simplefilter("ignore", UserWarning)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        LanguageModelSAETrainingRunner(config, override_dataset=dataset, override_model=model).run()
        for number, handler in handlers.items():  # it leaves its own
            signal.signal(number, handler)
    with torch.no_grad():
        return Trained(folder, x, SAE.load_from_disk(folder)(x))


def by_peers(library: str, tokens: np.ndarray, folder: Path) -> dict[str, Trained]:
    if not PEERS.is_dir():
        return {}
    np.save(folder / "tokens.npy", tokens)
    script = Path(__file__).with_name("train_by_peers.py")
    places = {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{PEERS}", "SPARSIFY_DISABLE_TRITON": "1"}
    command = [sys.executable, script, library, MODEL, folder / "tokens.npy", str(LAYER), folder]
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {file.stem: Trained(file.with_suffix(""), **load_file(file)) for file in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def by_others(tokens: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Trained]]:
    libraries = ("sparsify", "dictionary_learning")
    return {library: by_peers(library, tokens, tmp_path_factory.mktemp(library)) for library in libraries}


def check(made: Dictionary, trained: Trained, folder: Path) -> Dictionary:
    """As read, and once written and opened again, it computes what its library does; returns the latter."""
    save_dictionary(made, folder)
    again = load_dictionary(folder)
    for one in (made, again):
        found = one.forward(trained.x)
        assert (found - trained.y).norm() < 1e-5 * trained.y.norm()
    assert (again.spec.hook_name, again.spec.hook_name_out, again.spec.kind) == (HOOK, HOOK, "sae")
    assert 0 < (again.encode(trained.x) > 0).sum(dim=1).double().mean() < LATENTS
    return again


# -------------------------------------------------------------------- one by one
@pytest.mark.parametrize("saved", ["for_use", "checkpoints/final_10240"])
@pytest.mark.parametrize("architecture", SAELENS)
def test_what_saelens_trainer_saves(architecture: str, saved: str, by_saelens: Any, tmp_path: Path) -> None:
    """Its metadata knows no hook: the site does."""
    trained = by_saelens[architecture]
    config = json.loads((trained.path / saved / "cfg.json").read_text())
    assert "hook_name" not in config["metadata"]
    check(read_foreign(trained.path / saved, SITE), trained, tmp_path)


def test_a_checkpoint_of_the_middle_of_a_training_is_refused(by_saelens: Any) -> None:
    """The scale of its activations is not in its weights, and SAELens itself would leave it out without a word."""
    (middle,) = (p for p in (by_saelens["topk"].path / "checkpoints").iterdir() if "final" not in p.name)
    message = r"scaled by normalize_activations=expected_average_only_in, .*fold_activation_norm_scaling_factor"
    with pytest.raises(DictionaryError, match=message):
        read_foreign(middle, SITE)


@pytest.mark.parametrize("architecture", ["standard", "gated"])
def test_where_metadata_and_site_differ_it_is_refused(architecture: str, by_saelens: Any, tmp_path: Path) -> None:
    from sae_lens import SAE

    other, path = "blocks.2.hook_mlp_out", by_saelens[architecture].path / "for_use"
    pair = Site("blocks.1.hook_resid_pre", HOOK)
    with pytest.raises(DictionaryError, match="is an SAE: it needs a site with hook_name alone"):
        read_foreign(path, pair)
    sae: Any = SAE.load_from_disk(path)
    sae.cfg.metadata.hook_name = other
    sae.save_model(tmp_path)
    with pytest.raises(DictionaryError, match=f"reads {other} and writes {other}, but the site is {HOOK} to"):
        read_foreign(tmp_path, SITE)
    assert read_foreign(tmp_path, Site(other, other)).spec.hook_name == other


def test_a_head_that_metadata_leaves_open_is_the_sites(by_saelens: Any) -> None:
    site = Site("blocks.1.attn.hook_z", "blocks.1.attn.hook_z", 2)
    assert read_foreign(by_saelens["standard"].path / "for_use", site).spec.hook_head_index == 2


def test_what_saelens_runner_saves(by_runner: Trained, tmp_path: Path) -> None:
    made = check(read_foreign(by_runner.path, SITE), by_runner, tmp_path)
    assert (made.spec.origin.model_name, made.spec.origin.context_size) == ("embedded", CONTEXT)
    with pytest.raises(DictionaryError, match="choose the site that it was made for"):
        read_foreign(by_runner.path, Site("blocks.0.hook_mlp_out", "blocks.0.hook_mlp_out"))


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_transcoders_of_saelens(said: bool, skip: bool, x: Tensor, tmp_path: Path) -> None:
    """SAELens trains none, but has classes for them: with or without hooks in the metadata."""
    from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig, Transcoder, TranscoderConfig

    sae_class, config_class = (SkipTranscoder, SkipTranscoderConfig) if skip else (Transcoder, TranscoderConfig)
    site = Site("blocks.1.hook_resid_pre", HOOK)
    sae: Any = sae_class(config_class(d_in=D, d_sae=LATENTS, d_out=D, apply_b_dec_to_input=False))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    if said:
        sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = site[:2]
    sae.save_model(tmp_path)
    made = read_foreign(tmp_path, site)
    assert made.spec.kind == "transcoder" and made.spec.hook_name_out == HOOK
    with torch.no_grad():
        assert (made.forward(x) - sae(x)).norm() < 1e-5 * sae(x).norm()
    with pytest.raises(DictionaryError, match=r"is a transcoder: it needs|choose the site"):
        read_foreign(tmp_path, SITE)


def test_a_transcoder_that_only_saelens_computes_keeps_where_it_writes(x: Tensor, tmp_path: Path) -> None:
    """TopK by value times decoder norm: SAELens has it as an SAE whose metadata says where its output belongs."""
    from sae_lens import TopKSAE, TopKSAEConfig

    site = Site("blocks.1.hook_resid_pre", HOOK)
    config = TopKSAEConfig(d_in=D, d_sae=LATENTS, k=K, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False)
    sae: Any = TopKSAE(config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = site[:2]
    sae.save_model(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    save_dictionary(read_foreign(tmp_path / "theirs", site), tmp_path / "ours")
    made = load_dictionary(tmp_path / "ours")
    assert (made.spec.kind, made.spec.hook_name, made.spec.hook_name_out) == ("transcoder", *site[:2])
    with torch.no_grad():
        assert (made.forward(x) - sae(x)).norm() < 1e-5 * sae(x).norm()
    assert read_foreign(tmp_path / "ours", site).spec.hook_name_out == HOOK


@pytest.mark.skipif(not PEERS.is_dir(), reason="make bench NAME=train_step installs these libraries")
@pytest.mark.parametrize("library", ["sparsify", "dictionary_learning"])
def test_what_other_libraries_save(library: str, by_others: Any, tmp_path: Path) -> None:
    assert len(by_others[library]) == {"sparsify": 1, "dictionary_learning": 4}[library]
    for name, trained in by_others[library].items():
        (tmp_path / name).mkdir()
        check(read_foreign(trained.path, SITE), trained, tmp_path / name)


# -------------------------------------------------------------------- all in one experiment
def figures_of(*names: str) -> list[str]:
    return sorted(name for name, figure in declared().items() if figure.stage in names)


TINY = [
    "model=embedded", *(f"model.{name}=false" for name in AS_PUBLISHED), f"tokens.context_size={CONTEXT}",
    "tokens.train_tokens=2048", "tokens.held_out_tokens=1024", "activations.chunk_tokens=256",
    "activations.shard_tokens=1024", "evaluation.resamples=20",
]  # fmt: skip


def test_all_stand_in_one_table_and_in_every_figure(
    by_saelens: Any, by_runner: Trained, by_others: Any, tmp_path: Path
) -> None:
    """Nothing is trained here; each has its row, its loss, and its place in the figures."""
    paths = {name: trained.path / "for_use" for name, trained in by_saelens.items()} | {"by_runner": by_runner.path}
    paths |= {name: trained.path for made in by_others.values() for name, trained in made.items()}
    links = [tmp_path / name for name in paths]
    for link, path in zip(links, paths.values(), strict=True):
        link.symlink_to(path)  # a dictionary is called as its folder
    figures = figures_of("evaluate")
    assert {"notebook_004", "l0_histograms", "paired_differences"} <= set(figures)
    sweep = (
        f"sweep={{dictionary:foreign,site:mlp_out,site.layer:{LAYER},dictionary.path:[{','.join(map(str, links))}]}}"
    )
    plan = compose(ROOT / "conf", [sweep, f"figures=[{','.join(figures)}]", *TINY], results=str(tmp_path / "results"))
    assert not plan.stages["train"] and len(plan.stages["evaluate"]) == len(paths)
    run_all(plan)
    summaries = [json.loads((plan.folder("evaluate", k) / "summary.json").read_text()) for k in plan.stages["evaluate"]]
    assert sorted(s["source"] for s in summaries) == sorted(paths)
    assert all(s["ce_replaced"] > s["ce_clean"] == summaries[0]["ce_clean"] and s["l0"] > 0 for s in summaries)
    (key,) = plan.stages["figures"]
    folder = plan.folder("figures", key)
    for figure in figures:
        assert (folder / f"{figure}.png").stat().st_size > 5000
    histograms, table = (pd.read_csv(folder / f"{name}.csv") for name in ("l0_histograms", "notebook_004"))
    assert histograms["dictionary_key"].nunique() == len(paths)
    assert {"standard", "by_runner"} <= {series.split(" ")[0] for series in table["series"]}


@pytest.mark.slow
def test_figures_of_heads_and_stacks_of_foreign_dictionaries(
    neox_folder: Path, corpus_file: Path, tmp_path: Path
) -> None:
    """SAEs of the concatenated heads in both layers, by SAELens."""
    from sae_lens import StandardSAE, StandardSAEConfig

    paths = []
    for layer in (0, 1):
        sae: Any = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48, reshape_activations="hook_z"))
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(layer)))
        paths.append(tmp_path / f"layer_{layer}")
        sae.save_model(paths[-1])
    points = ",".join(
        f"{{dictionary:foreign,site:attn_z,site.layer:{layer},dictionary.path:{path}}}"
        for layer, path in enumerate(paths)
    )
    figures = [f for f in figures_of("heads", "stack", "evaluate") if f.removeprefix("heads_") not in SHOWN["heads"]]
    small = ["heads.n_latents=5", "heads.max_atoms=4", "heads.dashboards=2", "heads.min_active=2", "heads.resamples=20"]
    chosen = [
        "model=local",
        f"model.path={neox_folder}",
        "corpus=local",
        f"corpus.path={corpus_file}",
        *TINY[4:],
        *small,
    ]
    chosen += [
        "tokens.held_out_fraction=0.3",
        "tokens.held_out_tokens=512",
        "stacks=[all]",
        f"tokens.context_size={CONTEXT}",
    ]
    plan = compose(
        ROOT / "conf", [f"sweep=[{points}]", f"figures=[{','.join(figures)}]", *chosen], results=str(tmp_path)
    )
    counts = {stage: len(plan.stages[stage]) for stage in ("foreign", "train", "heads", "stack")}
    assert counts == {"foreign": 2, "train": 0, "heads": 2, "stack": 1}
    run_all(plan)
    (key,) = plan.stages["figures"]
    for figure in figures:
        assert (plan.folder("figures", key) / f"{figure}.png").is_file()


def test_only_transcoders_that_lost_their_hook_have_a_new_version(by_runner: Trained, tmp_path: Path) -> None:
    path, version = f"dictionary.path={by_runner.path}", stages()["foreign"].version
    found = {}
    for site in ("mlp_out", "mlp"):
        plan = compose(ROOT / "conf", ["dictionary=foreign", f"site={site}", path], results=str(tmp_path))
        (found[site],) = (instance.version for instance in plan.stages["foreign"].values())
    assert found == {"mlp_out": version, "mlp": version + 1}
