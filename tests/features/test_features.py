"""Tables of latents against what a few lines of NumPy, autograd's model and plain loops say of the same activations."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from stores import contents, tokens_instance, weights_of, write_receipt

from saeflow.config import FeaturesConfig, ModelConfig
from saeflow.dictionaries import BlockDiagonal, Dictionary, Spec, save_dictionary
from saeflow.dictionaries.sae import build
from saeflow.features import lookup as lookup_module
from saeflow.features import open_features
from saeflow.features.artifact import COLUMNS
from saeflow.features.effects import Samples, Task, loss_increases
from saeflow.features.firings import Firings
from saeflow.features.job import features_jobs
from saeflow.features.order import largest, lowest, uniform
from saeflow.features.reader import Features, FeaturesError
from saeflow.features.text import Text
from saeflow.jobs.job import Job
from saeflow.models.attention import fused_attention
from saeflow.models.loading import load_model
from saeflow.models.splicing import flattened, read_hooks
from saeflow.planning.graph import Instance, Plan
from saeflow.text.tokens import open_tokens

D, N_LATENTS, P, FIRST = 32, 48, 32, 1
IN, OUT, Z = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out", "blocks.0.attn.hook_z"
PROCESSING = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}
ROWS = 24
SETTINGS = FeaturesConfig(
    n_tokens=ROWS * (P - FIRST), batch_rows=5, top=4, intervals=5, per_interval=2, before=3, after=2, bins=7, tokens=3,
    logits=4, neighbours=5, neighbour_tokens=300, effect_samples=3, seed=7,
)  # fmt: skip
DEAD, ONCE, ALWAYS = 3, 4, 5


def dictionary(
    kind: str = "sae", activation: str = "relu", hook: str = OUT, seed: int = 0, **fields: Any
) -> Dictionary:
    """Random weights; `fields` of the spec."""
    g = torch.Generator().manual_seed(seed)
    d = fields.pop("d", D)
    W_enc, W_dec = torch.randn(d, N_LATENTS, generator=g), torch.randn(N_LATENTS, d, generator=g)
    b_enc, b_dec = -0.5 * torch.rand(N_LATENTS, generator=g), 0.1 * torch.randn(d, generator=g)
    hook_in = IN if kind == "transcoder" else hook
    k = 5 if activation == "topk" else None
    spec = Spec(kind, activation, d, d, N_LATENTS, hook_in, hook, k=k, **fields)  # type: ignore[arg-type]
    return build(spec, W_enc, b_enc, W_dec, b_dec)


@pytest.fixture(scope="module")
def model(neox_folder: Path) -> Any:
    return load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder), **PROCESSING), "cpu")


@pytest.fixture(scope="module")
def tables(neox_folder: Path, tokens_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Makes the tables of dictionaries by name in one job, or in one each."""

    def make(dictionaries: dict[str, Dictionary], each_alone: bool = False, **changed: Any) -> dict[str, Features]:
        root = tmp_path_factory.mktemp("features")
        plan = Plan("tiny", {"features": {}}, {}, results=str(root))
        (root / "tokens").mkdir()
        (root / "tokens/held").symlink_to(tokens_folder)
        plan.stages["tokens"] = {"held": tokens_instance("held", neox_folder)}
        settings = dataclasses.asdict(dataclasses.replace(SETTINGS, **changed))
        settings.pop("make")
        for name, made in dictionaries.items():
            folder = root / "train" / name
            folder.mkdir(parents=True)
            save_dictionary(made, folder)
            write_receipt(folder, "train")
            config = {"features": settings, "model": {"weights": weights_of(neox_folder), **PROCESSING}}
            needs = {"train": [name], "tokens": ["held"]}
            plan.stages["features"][name] = Instance("features", name, config, needs, {"model": str(neox_folder)})
        jobs = [Job(instance, plan, "cpu") for instance in plan.stages["features"].values()]
        for some in [[job] for job in jobs] if each_alone else [jobs]:
            features_jobs(some)
        return {job.path.name: open_features(job.path) for job in jobs}

    return make


@dataclasses.dataclass
class Dense:
    """Activations (R, P, n) of all latents on the rows looked at, float64, 0 at BOS, and the rows."""

    f: np.ndarray
    tokens: np.ndarray
    document: np.ndarray
    row: np.ndarray

    def of(self, latent: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, positions and values where it fires, in order."""
        row, position = np.nonzero(self.f[..., latent])
        return row, position, self.f[row, position, latent]


def dense(model: Any, made: Dictionary, tokens_folder: Path) -> Dense:
    row, rows = open_tokens(tokens_folder).spread_rows(ROWS, SETTINGS.seed)
    f = []
    for start in range(0, ROWS, SETTINGS.batch_rows):  # as many at once as the stage runs: sums are then in its order
        tokens = torch.from_numpy(rows.tokens[start : start + SETTINGS.batch_rows].astype(np.int64))
        with fused_attention(model), torch.no_grad():
            (value,) = read_hooks(model, tokens, [made.spec.hook_name])
        x = flattened(value[:, FIRST:], made.spec.hook_head_index)
        f.append(made.encode(x).view(len(tokens), P - FIRST, -1))
    whole = np.concatenate([np.zeros((ROWS, FIRST, made.d_sae)), torch.cat(f).double().numpy()], axis=1)
    return Dense(whole, rows.tokens, rows.document, row)


def with_odd_latents(model: Any, tokens_folder: Path) -> Dictionary:
    """One that has a latent that never fires, one that does once, and one that always does."""
    made = dictionary()
    W_enc, b_enc = made.W_enc.clone(), made.b_enc.clone()
    b_enc[DEAD], b_enc[ALWAYS] = -1e4, 1e3
    g = torch.Generator().manual_seed(0)
    gap = 0.0
    while gap < 1e-2:  # where rows begin alike, some tokens have the same activations
        W_enc[:, ONCE], b_enc[ONCE] = torch.randn(D, generator=g), 0.0
        made = build(made.spec, W_enc, b_enc, made.W_dec, made.b_dec)
        second, highest = np.sort(dense(model, made, tokens_folder).f[..., ONCE], axis=None)[-2:]
        gap = highest - second
    b_enc[ONCE] = -(highest + second) / 2
    return build(made.spec, W_enc, b_enc, made.W_dec, made.b_dec)


def heads() -> BlockDiagonal:
    return BlockDiagonal([dictionary("sae", "topk", Z, seed=h, hook_head_index=h, d=8) for h in range(4)])


@pytest.fixture(scope="module")
def kinds(model: Any, tokens_folder: Path) -> dict[str, Dictionary]:
    return {
        "odd": with_odd_latents(model, tokens_folder),
        "topk": dictionary("sae", "topk", "blocks.1.hook_resid_pre", 1),
        "transcoder": dictionary("transcoder", "relu", seed=2),
        "heads": heads(),
        "head": dictionary("sae", "relu", Z, 3, hook_head_index=2, d=8),
    }


@pytest.fixture(scope="module")
def made(tables: Callable[..., Any], kinds: dict[str, Dictionary]) -> dict[str, Features]:
    return tables(kinds)


@pytest.fixture(scope="module")
def truth(model: Any, kinds: dict[str, Dictionary], tokens_folder: Path) -> dict[str, Dense]:
    return {name: dense(model, one, tokens_folder) for name, one in kinds.items()}


KINDS = ("odd", "topk", "transcoder", "heads", "head")


@pytest.mark.parametrize("name", KINDS)
def test_numbers_of_firing_are_those_of_the_dense_activations(
    name: str, made: dict[str, Features], truth: dict[str, Dense]
) -> None:
    table, true = made[name].table, truth[name]
    n_tokens = ROWS * (P - FIRST)
    for latent in range(len(table)):
        row, position, value = true.of(latent)
        found = table.iloc[latent]
        assert found["fired"] == len(value) and found["frequency"] == len(value) / n_tokens
        assert found["n_documents"] == len(set(true.document[row, position]))
        ids = true.tokens[row, position]
        assert found["n_distinct_tokens"] == len(set(ids))
        if not len(value):
            assert np.isnan([found[c] for c in ("mean", "std", "min", "max", "q50", "mean_position", "effect")]).all()
            assert [len(found[c]) for c in ("tokens", "token_fired", "near_firing")] == [0, 0, 0]
            continue
        wanted = {"mean": value.mean(), "std": value.std(), "min": value.min(), "max": value.max()}
        wanted |= {"mean_position": position.mean()}
        wanted |= {f"q{100 * q:02.0f}": np.quantile(value, q) for q in (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)}
        for column, number in wanted.items():
            assert found[column] == pytest.approx(number, rel=1e-5, abs=1e-6), (latent, column)
        often = sorted({(-int((ids == i).sum()), int(i)) for i in ids})[:3]
        assert found["tokens"].tolist() == [i for _, i in often]
        assert found["token_fired"].tolist() == [-n for n, _ in often]
        occurrences = [(true.tokens[:, FIRST:] == i).sum() for _, i in often]
        np.testing.assert_allclose(found["token_share"], [-n / o for (n, _), o in zip(often, occurrences, strict=True)])
        np.testing.assert_allclose(found["token_mean"], [value[ids == i].mean() for _, i in often], rtol=1e-5)


def test_odd_latents_are_what_they_are(made: dict[str, Features]) -> None:
    table = made["odd"].table
    assert table["fired"][[DEAD, ONCE, ALWAYS]].tolist() == [0, 1, ROWS * (P - FIRST)]
    assert made["odd"].index["n_live"] == (table["fired"] > 0).sum() < len(table)
    dead, once = made["odd"][DEAD], made["odd"][ONCE]
    assert dead.top == [] and not any(dead.intervals) and dead.histogram.sum() == 0 and len(dead.raised) == 4
    assert len(once.top) == 1 and [len(i) for i in once.intervals] == [0, 0, 0, 0, 1]
    assert once.top[0].value == once.intervals[4][0].value == pytest.approx(once.row["max"])
    assert once.top[0].quantile == 0 and once.histogram.tolist() == [0] * 6 + [1]
    assert once.row["effect_tokens"] == 1 and np.isnan(once.row["effect_error"]) and np.isfinite(once.row["effect"])


@pytest.mark.parametrize("name", KINDS)
def test_examples_are_the_strongest_and_some_of_every_interval(
    name: str, made: dict[str, Features], truth: dict[str, Dense]
) -> None:
    window, true = SETTINGS.before + 1 + SETTINGS.after, truth[name]
    for feature in list(made[name])[::3]:
        row, position, value = true.of(feature.latent)
        best: dict[tuple[int, int], tuple[float, int, int]] = {}
        for r, p, v in zip(row, position, value, strict=True):
            best[r, p // window] = max(best.get((r, p // window), (0, 0, 0)), (v, -r, -p))
        strongest = sorted(best.values(), reverse=True)[: SETTINGS.top]
        assert [(e.row, e.position) for e in feature.top] == [(true.row[-r], -p) for _, r, p in strongest]
        edges = np.linspace(0, value.max(initial=0), SETTINGS.intervals + 1)
        for i, examples in enumerate(feature.intervals):
            last = i == SETTINGS.intervals - 1
            inside = int(((value >= edges[i]) & ((value < edges[i + 1]) | last)).sum())
            assert len(examples) == min(inside, SETTINGS.per_interval)
            assert all(edges[i] - 1e-6 <= e.value <= edges[i + 1] + 1e-6 for e in examples)
        histogram = np.histogram(value, SETTINGS.bins, (0, value.max(initial=1e-9)))[0]
        assert feature.histogram.tolist() == histogram.tolist()
        edges = np.arange(17) * P // 16
        assert feature.positions.tolist() == np.histogram(position, edges)[0].tolist()
        for e in itertools.chain(feature.top, *feature.intervals):
            r = int(np.flatnonzero(true.row == e.row)[0])
            begin, end = max(0, e.position - 3), min(P, e.position + 3)
            assert e.at == e.position - begin and e.document == true.document[r, e.position]
            np.testing.assert_array_equal(e.activations, true.f[r, begin:end, feature.latent].astype(np.float32))
            assert e.value == e.activations[e.at] and e.quantile == pytest.approx((value < e.value).mean(), abs=1e-6)
            assert len(e.tokens) == end - begin


def test_random_examples_are_drawn_evenly() -> None:
    """Each item of a group is among the lowest as often as any other, whatever the group's size."""
    group = np.repeat([0, 1, 2], [1, 50, 2000])
    hits = np.zeros(len(group))
    for seed in range(400):
        key = uniform(seed, group, np.arange(len(group)))
        found = lowest(group, key, 5, 4)
        assert np.bincount(group[found], minlength=4).tolist() == [1, 5, 5, 0]
        wanted = [i for g in range(3) for i in sorted(np.flatnonzero(group == g), key=lambda i: key[i])[:5]]
        assert found.tolist() == wanted
        hits[found] += 1
    assert hits[0] == 400 and np.abs(hits[1:51] / 400 - 0.1).max() < 0.06 and hits[51:].max() < 10


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_the_decoder_rows(
    name: str, made: dict[str, Features], kinds: dict[str, Dictionary], model: Any
) -> None:
    """The mean logits of a final residual stream and of that with a bit of the direction are compared, norm by hand."""
    table, one = made[name].table, kinds[name]
    W = one.W_dec.double()
    if name == "heads":
        W = torch.einsum("nhd,hde->ne", W.view(len(W), 4, 8), model.blocks[0].attn.W_O.double())
    if name == "head":
        W = W @ model.blocks[0].attn.W_O[2].double()
    centred = W - W.mean(1, keepdim=True)
    effects = (centred * model.ln_final.w.double()) @ model.unembed.W_U.double()
    effects = (effects - effects.mean(1, keepdim=True)).numpy()
    for latent in range(0, len(table), 5):
        order = np.argsort(-effects[latent])
        assert table["raised"][latent].tolist() == order[:4].tolist()
        assert table["lowered"][latent].tolist() == order[::-1][:4].tolist()
        np.testing.assert_allclose(table["raised_by"][latent], effects[latent][order[:4]], rtol=1e-4)
        np.testing.assert_allclose(table["lowered_by"][latent], effects[latent][order[::-1][:4]], rtol=1e-4)


def test_a_hook_that_leads_nowhere_has_no_logits(tables: Callable[..., Any]) -> None:
    hook = "blocks.0.attn.hook_q"
    found = tables({"q": dictionary(hook=hook)}, effect_samples=0)["q"]
    assert set(found.index["left_out"]) == {"raised", "effect"} and hook in found.index["left_out"]["raised"]
    assert not any(map(len, found.table["raised"])) and found.table["effect"].isna().all()


@pytest.mark.parametrize("name", KINDS)
def test_neighbours_are_the_nearest(
    name: str, made: dict[str, Features], kinds: dict[str, Dictionary], truth: dict[str, Dense]
) -> None:
    table, W = made[name].table, kinds[name].W_dec.double().numpy()
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    fires = truth[name].f[:, FIRST:].reshape(-1, len(W)) > 0
    edges = np.arange(301) * len(fires) // 300
    fires = fires[np.random.default_rng(SETTINGS.seed).integers(edges[:-1], edges[1:])]
    for i in range(len(W)):
        np.testing.assert_allclose(table["near_decoder_cosine"][i], np.sort(cosine[i])[::-1][:5], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(cosine[i][table["near_decoder"][i]], table["near_decoder_cosine"][i], atol=1e-6)
        both, either = (fires & fires[:, [i]]).sum(0), (fires | fires[:, [i]]).sum(0)
        jaccard = both / np.maximum(either, 1)
        jaccard[i] = 0
        order = [j for j in np.lexsort((np.arange(len(W)), -jaccard.astype(np.float32))) if jaccard[j] > 0][:5]
        assert table["near_firing"][i].tolist() == order
        np.testing.assert_allclose(table["near_firing_jaccard"][i], jaccard[order], rtol=1e-6)


def test_shares_of_heads(made: dict[str, Features], kinds: dict[str, Dictionary]) -> None:
    share = made["heads"].profiles["head_share"].values
    assert share.shape == (4 * N_LATENTS, 4)
    np.testing.assert_array_equal(share, np.repeat(np.eye(4), N_LATENTS, axis=0))
    assert made["heads"].table["head"].tolist() == np.repeat(range(4), N_LATENTS).tolist()
    assert (made["head"].table["head"] == 2).all() and made["topk"].table["head"].isna().all()
    assert "head_share" not in made["topk"].profiles


@pytest.mark.parametrize("name", KINDS)
def test_effects_are_those_of_passes_in_which_one_token_alone_is_changed(
    name: str, kinds: dict[str, Dictionary], truth: dict[str, Dense], model: Any
) -> None:
    """Whole passes with the model's own attention, a pass a sample."""
    check_effects(model, kinds[name], truth[name])


def test_effects_in_every_architecture(model_folder: Path, tokens_folder: Path) -> None:
    """One after another, of the first layer, so that attention above it sees what is changed."""
    found = load_model(model_folder, ModelConfig("tiny", path=str(model_folder), **PROCESSING), "cpu")
    one = dictionary(hook="blocks.0.hook_resid_pre", seed=6)
    check_effects(found, one, dense(found, one, tokens_folder))


def check_effects(model: Any, one: Dictionary, true: Dense) -> None:
    """Of firings drawn at random, several at one token among them."""
    row, position, latent = np.nonzero(true.f[:, : P - 1])
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(len(row), 14, replace=False))
    chosen = np.unique(np.concatenate([chosen, np.flatnonzero((row == row[0]) & (position == position[0]))[:3]]))
    row, position, latent = row[chosen], position[chosen], latent[chosen]
    text = Text(true.tokens, true.document, true.row, FIRST)
    value = true.f[row, position, latent].astype(np.float32)
    samples = Samples(latent, text.grid().number(row, position), value)
    (found,) = loss_increases(model, [Task(one, samples)], text, batch_rows=3)
    wanted = [_rise(model, one, true, *each) for each in zip(latent, row, position, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert np.abs(wanted).max() > 1e-3


def test_effects_in_the_table(made: dict[str, Features], kinds: dict[str, Dictionary], truth: dict[str, Dense],
                              model: Any) -> None:  # fmt: skip
    """Means and errors over all that a latent fires on, where that is not more than are sampled; how many are."""
    table, true, one = made["odd"].table, truth["odd"], kinds["odd"]
    predicted = {i: [(r, p) for r, p, _ in zip(*true.of(i), strict=True) if p < P - 1] for i in range(one.d_sae)}
    few = [i for i in predicted if 1 <= len(predicted[i]) <= SETTINGS.effect_samples]
    assert ONCE in few
    for i in few:
        rises = [_rise(model, one, true, i, int(r), int(p)) for r, p in predicted[i]]
        assert table["effect"][i] == pytest.approx(np.mean(rises), abs=2e-5)
        if len(rises) > 1:
            assert table["effect_error"][i] == pytest.approx(np.std(rises, ddof=1) / len(rises) ** 0.5, abs=2e-5)
    assert table["effect_tokens"].tolist() == [min(3, len(places)) for places in predicted.values()]


def _rise(model: Any, one: Dictionary, true: Dense, latent: int, r: int, p: int) -> float:
    """Loss at one position with the latent taken out there, less that without."""
    tokens, spec = torch.from_numpy(true.tokens[[r]].astype(np.int64)), one.spec
    written = torch.tensor(true.f[r, p, latent], dtype=torch.float32) * one.W_dec[latent]

    def ablate(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        here = x[0, p] if spec.hook_head_index is None else x[0, p, spec.hook_head_index]
        here -= written.view(here.shape)
        return x

    with torch.no_grad():
        passes = [model.run_with_hooks(tokens, fwd_hooks=h)[0, p] for h in ([], [(spec.hook_name_out, ablate)])]
    clean, ablated = (-logits.log_softmax(0)[tokens[0, p + 1]].item() for logits in passes)
    return ablated - clean


def _predicted(true: Dense, latent: int) -> list[tuple[int, int]]:
    row, position, _ = true.of(latent)
    return [(int(r), int(p)) for r, p in zip(row, position, strict=True) if p < P - 1]


def test_the_same_bytes_whatever_is_done_at_once(
    tables: Callable[..., Any],
    made: dict[str, Features],
    kinds: dict[str, Dictionary],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In jobs of their own, with firings on disk in many parts, by two threads."""
    monkeypatch.setattr(lookup_module, "HELD", 300)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = tables(kinds, each_alone=True)
    finally:
        torch.set_num_threads(before)
    names = ("latents.parquet", "examples.parquet", "tokens.parquet", "index.json")
    for name, one in made.items():
        assert not (again[name].folder / "firings").exists()
        for file in names:
            assert (one.folder / file).read_bytes() == (again[name].folder / file).read_bytes(), (name, file)
        assert contents(one.folder / "profiles.zarr") == contents(again[name].folder / "profiles.zarr")


def test_firings_come_back_latent_by_latent(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    f = np.where(rng.random((200, 23)) < 0.1, rng.standard_normal((200, 23)), 0).astype(np.float32)
    f[:, 7] = 0
    for segment, block, at_once in ((10**9, 200, 23), (50, 13, 5), (1, 1, 1)):
        firings = Firings(23, tmp_path / f"{segment}", segment)
        for start in range(0, 200, block):
            token, latent = np.nonzero(f[start : start + block])
            firings.add(len(f[start : start + block]), token, latent, f[start + token, latent])
        chunks = list(firings.chunks(at_once))
        assert [chunk.first for chunk in chunks] == list(range(0, 23, at_once))
        assert (tmp_path / f"{segment}").exists() == (segment < 10**9)
        for chunk in chunks:
            for i, (a, b) in enumerate(zip(chunk.start[:-1], chunk.start[1:], strict=True)):
                np.testing.assert_array_equal(chunk.token[a:b], np.flatnonzero(f[:, chunk.first + i]))
                np.testing.assert_array_equal(chunk.value[a:b], f[chunk.token[a:b], chunk.first + i])


def test_the_largest_of_equal_ones_are_the_first() -> None:
    values = torch.tensor([[0.0, -1.0, 0.0, 2.0, 0.0, -torch.inf], [-3.0, -2.0, -2.0, -2.0, -9.0, -4.0]])
    found, place = largest(values, 3)
    assert place.tolist() == [[3, 0, 2], [1, 2, 3]] and found.tolist() == [[2, 0, 0], [-2, -2, -2]]
    g = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    assert (largest(g, 7)[0] == g.sort(1, descending=True)[0][:, :7].numpy()).all()


def test_more_is_asked_than_there_is(tables: Callable[..., Any], tokens_folder: Path) -> None:
    sizes = {"n_tokens": 10**6, "neighbour_tokens": 10**6, "top": 900, "logits": 900, "neighbours": 900, "tokens": 900}
    found = tables({"all": dictionary(seed=4)}, **sizes, per_interval=10**4, before=100, after=100)["all"]
    assert found.index["n_rows"] == open_tokens(tokens_folder).n_rows
    feature = found[1]
    assert len(feature.top) == len({(e.row) for e in feature.top}) <= found.index["n_rows"]
    assert sum(map(len, feature.intervals)) == feature.row["fired"]
    assert len(feature.raised) == 300 and len(feature.near["decoder"]) == N_LATENTS - 1


def test_what_cannot_be_ablated_says_why(tables: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens import SAE

    from saeflow.dictionaries.saelens_classes import SAELensDictionary

    config = {"d_in": D, "d_sae": N_LATENTS, "device": "cpu", "dtype": "float32", "architecture": "standard"}
    sae = SAE.from_dict(
        {**config, "normalize_activations": "layer_norm", "metadata": {"hook_name": OUT, "model_name": "tiny"}}
    )
    spec = Spec("sae", "saelens", D, D, N_LATENTS, OUT, OUT, saelens="standard", apply_b_dec_to_input=True)
    found = tables({"scaled": SAELensDictionary(spec, sae), "plain": dictionary()})
    assert "normalises activations by layer_norm at run time" in found["scaled"].index["left_out"]["effect"]
    assert found["scaled"].table["effect"].isna().all() and found["plain"].table["effect"].notna().any()
    monkeypatch.setattr("saeflow.features.job.can_stand_alone", lambda model: False)
    found = tables({"plain": dictionary()})
    assert "not plain causal attention" in found["plain"].index["left_out"]["effect"]


def test_nothing_is_asked(tables: Callable[..., Any]) -> None:
    """Of a dictionary of one latent, too."""
    one = Spec("sae", "relu", D, D, 1, OUT, OUT)
    single = build(one, torch.ones(D, 1), torch.ones(1), torch.ones(1, D), torch.zeros(D))
    nothing = dict.fromkeys(("per_interval", "before", "after", "tokens", "logits", "neighbours", "effect_samples"), 0)
    for found in tables({"some": dictionary(), "single": single}, **nothing).values():
        feature = found[0]
        assert feature.top[0].tokens == [feature.top[0].text] and not any(feature.intervals)
        assert feature.raised == feature.lowered == feature.tokens == [] and not any(feature.near.values())
        assert found.index["left_out"] == {n: f"features.{o} is 0" for n, o in _SIZES.items()}


_SIZES = {"effect": "effect_samples", "raised": "logits"}


def test_a_dictionary_of_one_latent_has_no_neighbours(tables: Callable[..., Any]) -> None:
    one = Spec("sae", "relu", D, D, 1, OUT, OUT)
    found = tables({"single": build(one, torch.ones(D, 1), torch.ones(1), torch.ones(1, D), torch.zeros(D))})["single"]
    assert len(found) == 1 and not any(found[0].near.values()) and len(found[0].raised) == SETTINGS.logits


def test_activations_below_0_count(tables: Callable[..., Any], model: Any, tokens_folder: Path, tmp_path: Path) -> None:
    """AbsTopK keeps the largest by size; also, what only SAELens computes."""
    from sae_lens import SAE

    config = {"d_in": D, "d_sae": N_LATENTS, "k": 4, "device": "cpu", "dtype": "float32"}
    metadata = {"hook_name": OUT, "model_name": "tiny"}
    sae = SAE.from_dict({**config, "architecture": "abstopk", "metadata": metadata})
    random = dictionary(seed=5)
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(sae, name).copy_(getattr(random, name))
    from saeflow.dictionaries.saelens_classes import SAELensDictionary

    spec = Spec("sae", "saelens", D, D, N_LATENTS, OUT, OUT, k=4, saelens="abstopk", apply_b_dec_to_input=True)
    one = SAELensDictionary(spec, sae)
    found = tables({"abs": one})["abs"]
    true = dense(model, one, tokens_folder)
    both = [i for i in range(N_LATENTS) if true.of(i)[2].min(initial=0) < 0 < true.of(i)[2].max(initial=0)]
    assert both
    for latent in both[:5]:
        _, _, value = true.of(latent)
        feature = found[latent]
        assert feature.row["min"] == pytest.approx(value.min()) and feature.row["fired"] == len(value)
        assert abs(feature.top[0].value) == pytest.approx(np.abs(value).max())
        ends = (min(0, value.min()), max(0, value.max()))
        assert feature.histogram.tolist() == np.histogram(value, SETTINGS.bins, ends)[0].tolist()
        assert feature.row["q50"] == pytest.approx(np.quantile(value, 0.5), rel=1e-5)
    assert found.table["effect"].notna().sum() == (found.table["effect_tokens"] > 0).sum() > 10


def test_text_is_stored_as_it_is(made: dict[str, Features], tmp_path: Path) -> None:
    from saeflow.features.artifact import latents_table, write_latents

    hostile = ["</script><b>", "a\x00b", "\u202eabc", "\x1b[31m", "&amp;", "\n\t\r", '"\\', "\ufffd", "🌊", ""]
    columns = {"tokens": [np.arange(10)], "token_fired": [np.ones(10)]}
    table = latents_table(columns | {"latent": np.array([0])}, 1)
    write_latents(tmp_path, table, made["topk"].profiles[["histogram"]].load(), [], lambda token: hostile[token])
    assert pq.read_table(tmp_path / "tokens.parquet")["text"].to_pylist() == hostile


def test_files_say_what_is_in_them(made: dict[str, Features], kinds: dict[str, Dictionary]) -> None:
    for name, found in made.items():
        index = json.loads((found.folder / "index.json").read_text())
        assert index["dictionary_key"] == name and index["kind"] == kinds[name].spec.kind and index["left_out"] == {}
        assert set(index["columns"]) == set(COLUMNS) == set(found.table.columns)
        examples = pq.ParquetFile(found.folder / "examples.parquet")
        assert examples.num_row_groups == -(-kinds[name].d_sae // index["latents_per_group"])
        latents = examples.read()["latent"].to_numpy()
        assert (np.diff(latents) >= 0).all()
        ids = {*examples.read()["token_ids"].combine_chunks().flatten().to_pylist()}
        assert ids <= found.token_texts.keys()
        assert len(found) == kinds[name].d_sae


def test_what_is_not_there_is_said(made: dict[str, Features], tmp_path: Path) -> None:
    with pytest.raises(FeaturesError, match=r"no index\.json.*features=all"):
        open_features(tmp_path)
    with pytest.raises(IndexError, match="which has 48: 0 to 47"):
        made["topk"][48]


def test_the_page_names_every_column() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/features.md").read_text()
    named = {name for line in page.splitlines() if line.startswith("| `") for name in line.split("|")[1].split("`")}
    assert COLUMNS.keys() <= named
