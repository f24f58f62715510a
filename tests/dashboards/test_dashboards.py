"""What dashboards hold: read back, it is what the tables of latents say."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import contents
from tests.dashboards.made import HOSTILE, add, compared, made, plan_in, replaced
from tests.models.test_architectures import TINY
from tests.planning.test_plan import changed, home, plan_of  # noqa: F401

from saeflow.config import ConfigError
from saeflow.dashboards.comparisons import nearest, unit_rows
from saeflow.dashboards.job import dashboard
from saeflow.dashboards.scripts import APP, packed
from saeflow.features import open_features
from saeflow.jobs.job import Job
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan
from saeflow.planning.stages import stages

ROOT = Path(__file__).resolve().parents[2]
ARRAYS = {"Uint8Array": "u1", "Uint16Array": "<u2", "Uint32Array": "<u4", "Int32Array": "<i4", "Float32Array": "<f4"}


def read(file: Path) -> Any:
    """What a script registers, arrays as arrays; by nothing of the code that wrote it."""
    found = re.fullmatch(rb"saeflow\.register\((.*)\);\n", file.read_bytes())
    assert found and max(found[1]) < 127 and min(found[1]) >= 32, "a line of printable ASCII"

    def array(entry: dict[str, Any]) -> Any:
        if entry.keys() != {"type", "shape", "data"}:
            return entry
        return np.frombuffer(base64.b64decode(entry["data"]), ARRAYS[entry["type"]]).reshape(entry["shape"])

    return json.loads(found[1], object_hook=array)


def lists(column: dict[str, Any]) -> list[list[Any]]:
    return [part.tolist() for part in np.split(column["values"], column["offsets"][1:-1])]


def test_pieces_hold_what_the_table_of_latents_does(tmp_path: Path) -> None:
    folder = made(plan_in(tmp_path), "one", HOSTILE, n=300, labels=True, heads=4)
    features = open_features(tmp_path / "features/one")
    pieces = sorted(file.name for file in (folder / "data").iterdir())
    assert pieces == ["latents-0000.js", "latents-0001.js", "overview.js", "table.js"]
    for group, latents in (("0000", range(256)), ("0001", range(256, 300))):
        data = read(folder / f"data/latents-{group}.js")
        assert len(data["fired"]) == len(latents)
        raised, texts = lists(data["raised"]), data["texts"]
        tokens = [[texts[t] for t in one] for one in lists(data["token_ids"])]
        dense = np.zeros(len(data["token_ids"]["values"]), np.float32)
        dense[data["examples"]["active"]] = data["examples"]["active_value"]
        begin = data["token_ids"]["offsets"]
        for i, latent in enumerate(latents):
            one = features[latent]
            label = one.row["label"]
            assert data["latent"][i] == latent and data["label"][i] == (label if isinstance(label, str) else None)
            for name in ("fired", "max", "mean", "q50", "effect", "effect_error", "decoder_norm", "head"):
                np.testing.assert_array_equal(data[name][i], np.float32(one.row[name]))
            assert [texts[t] for t in raised[i]] == [text for text, _ in one.raised]
            np.testing.assert_array_equal(data["profiles"]["histogram"][i], one.histogram)
            np.testing.assert_array_equal(data["profiles"]["head_share"][i], features.profiles["head_share"][latent])
            shown = data["examples"]
            places = range(shown["offsets"][i], shown["offsets"][i + 1])
            wanted = [(None, e) for e in one.top] + [(k, e) for k, part in enumerate(one.intervals) for e in part]
            found = {}
            for e in places:
                interval = None if shown["interval"][e] < 0 else int(shown["interval"][e])
                values = dense[begin[e] : begin[e + 1]].tolist()
                found[interval, float(shown["value"][e])] = (tokens[e], values, int(shown["at"][e]))
            assert found == {(k, e.value): (e.tokens, e.activations, e.at) for k, e in wanted}


def test_the_table_holds_what_is_searched_and_sorted(tmp_path: Path) -> None:
    folder = made(plan_in(tmp_path), "one", HOSTILE, n=300, labels=True)
    features, data = open_features(tmp_path / "features/one"), read(folder / "data/table.js")
    table, texts = features.table, data["texts"]
    for name in ("fired", "max", "effect", "label_f1"):
        np.testing.assert_array_equal(data[name], table[name].astype(np.float32))
    for name in ("tokens", "raised", "lowered"):
        wanted = [[features.token_texts[t] for t in one] for one in table[name]]
        assert [[texts[t] for t in one] for one in lists(data[name])] == wanted
    labels = [*data["labels"], None]
    assert [labels[place] for place in data["label"]] == table["label"].astype(object).where(
        table["label"].notna(), None
    ).tolist()
    np.testing.assert_array_equal(data["raised_by"], [one[0] for one in table["raised_by"]])
    snippets = lists(data["snippet"])
    for latent, one in enumerate(features):
        place = data["snippet_of"][latent]
        assert data["snippet_of"][latent + 1] - place == bool(one.top)
        if one.top:
            example = one.top[0]
            begin = max(0, example.at - 6)
            assert [texts[t] for t in snippets[place]] == example.tokens[begin : example.at + 4]
            assert data["snippet_at"][place] == example.at - begin


def test_the_overview_says_what_it_is_of(tmp_path: Path) -> None:
    overview = read(made(plan_in(tmp_path), "one", HOSTILE) / "data/overview.js")
    assert overview["name"]["title"] == "ReLU + L1 SAE, L1 = 0.5, layer 3, mlp_out"
    assert overview["evaluation"]["loss_recovered_zero"] == 0.9 and overview["recovery"] is None
    assert overview["settings"] == {"seed": 0, "training.lr": 0.1}
    assert sorted(map(tuple, overview["made_from"])) == [(s, "one") for s in ("evaluate", "features", "train")]
    without = read(made(plan_in(tmp_path / "other"), "one", HOSTILE, evaluated=False) / "data/overview.js")
    assert without["evaluation"] is None


def test_all_is_there_and_the_same_twice(tmp_path: Path) -> None:
    found = []
    for where in ("one", "two"):
        plan = plan_in(tmp_path / where)
        found.append([contents(made(plan, name, HOSTILE, seed=seed)) for seed, name in enumerate("ab")])
        found[-1].append(contents(compared(plan)))
    names = {f"app/{file.name}": file.read_bytes() for file in APP.iterdir() if file.suffix in (".js", ".css")}
    for one, two in zip(*found, strict=True):
        for folder in (one, two):
            del folder["provenance.json"]
        assert one == two and names.items() <= one.items()
        for path in re.findall(rb'(?:src|href)="(app/[^"]+)"', one["index.html"]):
            assert path.decode() in one


def test_the_app_asks_for_nothing_from_elsewhere_and_makes_no_html_of_texts() -> None:
    for file in APP.iterdir():
        text = file.read_text()
        links = set(re.findall(r"https?://[^\s\"'`]+", text))
        assert links <= {"http://www.w3.org/2000/svg"}, (file.name, links)
        assert not re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|fetch\(", text
        )


@pytest.mark.parametrize("values", [[0, 255], [0, 256], [0, 65536], [-1, 70000], [0.5, np.nan], []])
def test_arrays_come_back(values: list[float]) -> None:
    array = np.array(values)
    entry = packed(array)
    found = np.frombuffer(base64.b64decode(entry["data"]), ARRAYS[entry["type"]]).reshape(entry["shape"])
    np.testing.assert_array_equal(found, array.astype(np.float32) if array.dtype.kind == "f" else array)


def test_nothing_is_shown_of_what_is_not_there(tmp_path: Path) -> None:
    """Of one latent, with no example, no logit and no neighbour."""
    config = replaced(top=1, intervals=1, per_interval=0, before=0, after=0)
    folder = made(plan_in(tmp_path), "one", ["a"], n=6, config=config, tokens_of={i: [] for i in (1, 5)})
    data = read(folder / "data/latents-0000.js")
    assert lists(data["raised"])[1] == lists(data["tokens"])[1] == []


# -------------------------------------------------------------------- comparisons
def test_matches_are_the_largest_cosines(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    g = torch.Generator().manual_seed(3)
    W = {name: torch.randn(n, 16, generator=g) for name, n in (("a", 50), ("b", 70))}
    W["b"][10] = 3 * W["a"][20]
    for seed, (name, rows) in enumerate(W.items()):
        dashboard(add(plan, name, ["x"], n=len(rows), seed=seed, W=rows))
    folder = compared(plan, matches=4)
    data, overview = read(folder / "data/match-0-1.js"), read(folder / "data/overview.js")
    unit = {name: (rows / rows.norm(dim=1, keepdim=True)).double().numpy() for name, rows in W.items()}
    for side, (one, other) in (("there", "ab"), ("back", "ba")):
        cosine = unit[one] @ unit[other].T
        cosine[:, [1, 5]] = -np.inf  # which never fire
        for i, row in enumerate(cosine):
            found = data[side]["latent"][i], data[side]["cosine"][i]
            if i in (1, 5):
                assert found[0].tolist() == [-1] * 4 and np.isnan(found[1]).all()
            else:
                assert found[0].tolist() == np.argsort(-row)[:4].tolist()
                np.testing.assert_allclose(found[1], -np.sort(-row)[:4], atol=1e-6)
    assert data["there"]["latent"][20][0] == 10 and data["there"]["cosine"][20][0] == pytest.approx(1)
    best = data["there"]["cosine"][:, 0]
    live = [i for i in range(50) if i not in (1, 5)]
    pair = overview["pairs"]["0-1"]
    assert pair["mean_largest_cosine"] == pytest.approx(best[live].mean(), rel=1e-6) and pair["n_live"] == 48
    assert pair["share_0.5"] == (best[live] >= 0.5).mean()
    mutual = [data["back"]["latent"][data["there"]["latent"][i][0]][0] == i for i in live]
    assert pair["share_mutual"] == np.mean(mutual)


def test_of_equal_ones_the_lower_and_of_nothing_none() -> None:
    W = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    unit = unit_rows(W, np.array([1, 1, 1, 0]))
    assert unit.tolist() == [[1, 0], [1, 0], [0, 0], [0, 0]]
    found = nearest(unit, unit, 3)
    assert found.latent.tolist() == [[0, 1, -1], [0, 1, -1], [-1] * 3, [-1] * 3]


# -------------------------------------------------------------------- plan
def test_dashboards_bring_their_tables_and_change_no_key(home: Path) -> None:  # noqa: F811
    before, after = plan_of(home), plan_of(home, "dashboards=all")
    assert changed(before, after) == {"features": 2, "dashboards": 2, "comparisons": 1}
    assert not before.stages["dashboards"] and len(after.batches["dashboards"]) == 1
    assert not changed(after, plan_of(home, "dashboards=all", "features=all"))
    assert changed(after, plan_of(home, "dashboards=all", "dashboards.matches=5")) == {"comparisons": 1}
    assert not changed(plan_of(home, "features=all"), plan_of(home, "features=all", "dashboards.matches=5"))
    with pytest.raises(ConfigError, match=r"dashboards\.matches=0 is out of range"):
        plan_of(home, "dashboards=all", "dashboards.matches=0")


def test_one_more_value_makes_one_dashboard_and_the_comparison(home: Path) -> None:  # noqa: F811
    more = plan_of(home, "dashboards=all", "dictionary.l1_coefficient=[1e-3,3e-3,1e-2]")
    found = changed(plan_of(home, "dashboards=all", "dictionary.l1_coefficient=[1e-3,3e-3]"), more)
    assert found == {"train": 1, "evaluate": 1, "features": 1, "dashboards": 1, "comparisons": 1, "figures": 1}


def run(plan: Plan) -> None:
    for stage in stages():
        for batch in plan.batches.get(stage) or [[key] for key in plan.stages[stage]]:
            if batch and stage not in ("figures", "heads"):
                stages()[stage].work([Job(plan.instance(stage, key), plan, "cpu") for key in batch])


@pytest.mark.slow
def test_every_kind_has_one(neox_folder: Path, corpus_file: Path, tmp_path: Path) -> None:
    """An SAE, a transcoder and one made elsewhere at one place, both sides of a pair, and all heads as one."""
    from saeflow.dictionaries import Spec, save_dictionary
    from saeflow.dictionaries.sae import build

    hook = "blocks.1.hook_mlp_out"
    g = torch.Generator().manual_seed(0)
    tensors = (torch.randn(size, generator=g) for size in ((32, 40), (40,), (40, 32), (32,)))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_dictionary(build(Spec("sae", "relu", 32, 32, 40, hook, hook), *tensors), theirs)
    config = json.loads((theirs / "cfg.json").read_text())
    del config["metadata"]["saeflow"]  # as SAELens writes it
    (theirs / "cfg.json").write_text(json.dumps(config))
    sweep = ["{dictionary:topk,site:mlp_out,dictionary.k:4}", "{dictionary:transcoder,site:mlp}"]
    sweep += ["{dictionary:pair,site:mlp,dictionary.k:4}", "{dictionary:heads_topk,site:attn_z,dictionary.k:4}"]
    sweep += [f"{{dictionary:foreign,site:mlp_out,dictionary.path:{theirs},dictionary.label:theirs}}"]
    chosen = ["model=local", f"model.path={neox_folder}", "corpus=local", f"corpus.path={corpus_file}", *TINY]
    chosen += [f"sweep=[{','.join(sweep)}]", "dashboards=all", "features.effect_samples=2", "features.n_tokens=300"]
    plan = compose(ROOT / "conf", [*chosen, "site.layer=1"], results=str(tmp_path / "results"))
    run(plan)
    overviews = {key: read(plan.folder("dashboards", key) / "data/overview.js") for key in plan.stages["dashboards"]}
    titles = sorted(one["name"]["title"] for one in overviews.values())
    assert len(titles) == 6 and titles[0].startswith("ReLU + L1 transcoder, L1 = ")
    assert [title for title in titles[1:] if not title.endswith("attn.z")] == [
        "TopK SAE, k = 4, input side of a pair, layer 1, ln2.normalized",
        "TopK SAE, k = 4, layer 1, mlp_out",
        "TopK SAE, k = 4, output side of a pair, layer 1, mlp_out",
        "theirs (ReLU + L1 SAE), layer 1, mlp_out",
    ]
    assert all(one["evaluation"]["l0"] > 0 for one in overviews.values())
    partners = {key: one["partner"] for key, one in overviews.items() if one["partner"]}
    assert len(partners) == 2 and all(partners[partners[key]] == key for key in partners)
    for key in partners:
        data = read(plan.folder("dashboards", key) / "data/latents-0000.js")
        assert data["near_jacobian"]["values"].size
    (of_heads,) = (key for key, one in overviews.items() if "attn.z" in one["name"]["title"])
    assert "head_share" in read(plan.folder("dashboards", of_heads) / "data/latents-0000.js")["profiles"]
    (comparison,) = plan.stages["comparisons"]
    found = read(plan.folder("comparisons", comparison) / "data/overview.js")
    names = [one["name"]["label"] for one in found["dictionaries"]]
    # of the SAE that is a side of the pair too, the dashboard that has its partners
    assert names[0].startswith("TopK SAE, k = 4") and names[0].endswith("output side of a pair")
    assert names[1].startswith("ReLU + L1 transcoder, L1 = 1") and names[2:] == ["theirs (ReLU + L1 SAE)"]
    assert len(found["pairs"]) == 6
    assert overviews[of_heads]["name"]["title"] == "TopK SAEs by head, k = 4, layer 1, attn.z"


def test_a_model_whose_algorithm_is_known(tmp_path: Path) -> None:
    chosen = ["experiment=tracr_case3", "sweep={model.tracr.method:compiled,site.hook_name:[blocks.0.hook_mlp_out]}"]
    chosen += ["training.n_tokens=20_000", "dashboards=all", "features.n_tokens=2000"]
    plan = compose(ROOT / "conf", chosen, results=str(tmp_path))
    assert not plan.stages["comparisons"]
    run(plan)
    (folder,) = (plan.folder("dashboards", key) for key in plan.stages["dashboards"])
    overview, data = read(folder / "data/overview.js"), read(folder / "data/table.js")
    assert overview["evaluation"] is None and overview["recovery"]["recovery"] is not None
    assert data["labels"] and not data["raised"]["values"].size and np.isnan(data["effect"]).all()
