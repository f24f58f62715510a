"""The blind set: what it shows, what it hides, and the scores of a filled-in sheet."""

import csv
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.models.test_architectures import TINY, run_all

from saeflow.config import BlindConfig, ConfigError, ModelConfig
from saeflow.dictionaries import Spec
from saeflow.dictionaries.sae import build
from saeflow.evaluation.blind import (
    BANDS,
    SheetError,
    _warn_of_sparsity,
    choose_features,
    examples,
    find_activations,
    names,
    p_value,
    read_sheet,
    score,
)
from saeflow.features.text import Text
from saeflow.models.loading import load_model
from saeflow.planning.expansion import compose

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = BlindConfig(n_features=4, n_examples=10, min_active=4, min_frequency=0.01)


def test_live_features_are_chosen() -> None:
    fired = np.array([0, 3, 4, 9, 10, 11, 500, 20, 30])
    chosen = choose_features(fired, 100, SETTINGS, seed=0)
    assert len(set(chosen)) == 4 and set(chosen) <= {2, 3, 4, 5, 6, 7, 8}
    assert {int(n) for seed in range(30) for n in choose_features(fired, 100, SETTINGS, seed)} == {2, 3, 4, 5, 6, 7, 8}
    assert set(choose_features(fired, 1000, SETTINGS, 0)) <= {5, 6, 7, 8}  # on more than a hundredth of the tokens
    with pytest.raises(ConfigError, match="a dictionary has 1 live features; lower it"):
        choose_features(fired, 10_000, SETTINGS, 0)


def test_examples_are_evenly_spaced_in_activation() -> None:
    value = np.concatenate([np.full(500, 0.01), np.linspace(0, 10, 101)[1:]])
    bands = examples(value, 25)
    assert [len(band) for band in bands] == [5, 5, 5, 5, 5]
    chosen = [value[i] for band in bands for i in band]
    assert chosen == sorted(chosen, reverse=True) and chosen[0] == 10
    np.testing.assert_allclose(chosen, np.linspace(10, 0.01, 25), atol=0.06)
    few = examples(np.array([1.0, 5.0, 5.0]), 25)
    assert sorted(i for band in few for i in band) == [0, 1, 2] and few[0] == [1, 2] and few[-1] == [0]


def test_activations_are_those_of_the_dictionary(neox_folder: Path, tmp_path: Path) -> None:
    model = load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder)), "cpu")
    g = torch.Generator().manual_seed(0)
    hook = "blocks.1.hook_mlp_out"
    made = build(Spec("sae", "relu", 32, 32, 20, hook, hook), torch.randn(32, 20, generator=g), -torch.ones(20),
                 torch.randn(20, 32, generator=g), torch.zeros(32))  # fmt: skip
    rows = np.random.default_rng(0).integers(1, 300, (7, 12))
    text = Text(rows, np.zeros_like(rows), np.arange(7), first=1)
    found = find_activations(model, made, np.array([11, 3]), text, 3, tmp_path / "firings")
    _, cache = model.run_with_cache(torch.from_numpy(rows), names_filter=[hook])
    f = torch.relu(cache[hook] @ made.W_enc + made.b_enc)
    f[:, 0] = 0  # BOS
    for number, feature in enumerate((11, 3)):
        here = slice(*found.chunk.start[number : number + 2])
        row, position = np.nonzero(f[..., feature].numpy())
        assert [where[here].tolist() for where in found.place] == [row.tolist(), position.tolist()]
        np.testing.assert_allclose(found.chunk.value[here], f[..., feature].numpy()[row, position], rtol=1e-4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, neox_folder: Path, corpus_file: Path) -> tuple[Path, Any]:
    """A blind set of an SAE and a transcoder, from the pipeline."""
    home = tmp_path_factory.mktemp("blind")
    chosen = ["model=local", f"model.path={neox_folder}", "corpus=local", f"corpus.path={corpus_file}", *TINY]
    asked = ["experiment=blind", "blind.n_features=4", "blind.min_frequency=0", "evaluation.resamples=5"]
    plan = compose(ROOT / "conf", [*asked, *chosen], results=str(home))
    run_all(plan)
    (key,) = plan.stages["blind"]
    return plan.folder("blind", key), plan


def test_nothing_shown_tells_the_dictionaries_apart(made: tuple[Path, Any]) -> None:
    folder, plan = made
    text = (folder / "dashboards.html").read_text()
    key = json.loads((folder / "secret/key.json").read_text())
    assert len(key) == 8 and sorted(entry["kind"] for entry in key.values()) == ["sae"] * 4 + ["transcoder"] * 4
    assert {entry["dictionary"] for entry in key.values()} == set(plan.stages["train"])
    shown = re.findall("<h2>(.*?)</h2>", text)
    assert shown == list(key) and [entry["kind"] for entry in key.values()] != ["sae"] * 4 + ["transcoder"] * 4
    around = re.sub("<code>.*?</code>", "", re.sub("<style>.*?</style>", "", text), flags=re.DOTALL)
    assert not re.search("[0-9]", re.sub("</?h[12]>", "", around).replace("utf-8", ""))
    assert not re.search("sae|transcoder|L1|blocks", around, re.IGNORECASE)
    assert set(re.findall('<div class="b">(.*?)</div>', text)) <= set(BANDS)
    with (folder / "sheet.csv").open() as file:
        sheet = list(csv.DictReader(file))
    assert [row["feature"] for row in sheet] == shown and not any(row["verdict"] for row in sheet)


def test_a_set_is_the_same_twice(made: tuple[Path, Any]) -> None:
    from saeflow.evaluation.blind import blind_job
    from saeflow.jobs.job import Job

    folder, plan = made
    files = ("dashboards.html", "sheet.csv", "secret/key.json")
    before = [(folder / name).read_bytes() for name in files]
    (instance,) = plan.stages["blind"].values()
    blind_job(Job(instance, plan, "cpu"))
    assert [(folder / name).read_bytes() for name in files] == before


def test_one_key_tells_nothing_of_the_next_set(made: tuple[Path, Any]) -> None:
    """Of other dictionaries, by the same settings: other names, and another order."""
    folder, plan = made
    from saeflow.evaluation.blind import blind_job
    from saeflow.jobs.job import Job

    (instance,) = plan.stages["blind"].values()
    known = json.loads((folder / "secret/key.json").read_text())
    other = dataclasses.replace(instance, key="other", identity=instance.identity[::-1])
    blind_job(Job(other, plan, "cpu"))
    key = json.loads((plan.folder("blind", "other") / "secret/key.json").read_text())
    assert key.keys().isdisjoint(known) and len(key) == len(known)
    orders = [[(one["kind"], one["feature"]) for one in secret.values()] for secret in (key, known)]
    assert orders[0] != orders[1]
    sets = [compose(ROOT / "conf", ["experiment=blind", f"dictionary.expansion={n}"]).stages["blind"] for n in (4, 8)]
    assert len({i.identity for table in sets for i in table.values()}) == 2


def test_a_set_of_unequal_sparsity_is_said_to_be_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "saeflow"):
        _warn_of_sparsity([29.3, 28.9])
        assert not caplog.text
        _warn_of_sparsity([40.8, 28.9])
    assert "an L0 of 28.9 and 40.8" in caplog.text


def test_names_are_letters() -> None:
    assert len(set(names(500, 0))) == 500 and all(re.fullmatch("[A-Z]{4}", name) for name in names(500, 0))
    assert names(5, 0) == names(5, 0) != names(5, 1)


KEY = {f"N{i}": {"dictionary": "ab"[i % 2], "kind": ["sae", "transcoder"][i % 2], "feature": i} for i in range(8)}


def sheet(path: Path, verdicts: list[str], free: list[str] | None = None, features: list[str] | None = None) -> Path:
    rows = zip(features or KEY, verdicts, free or [""] * 8, strict=True)
    path.write_text("feature,verdict,context_free,note\n" + "".join(f"{f},{v},{c},\n" for f, v, c in rows))
    return path


def test_scores_count_verdicts_by_dictionary(tmp_path: Path) -> None:
    verdicts = ["Interpretable ", "maybe", "interpretable", "interpretable", "uninterpretable", "maybe", "maybe",
                "interpretable"]  # fmt: skip
    free = ["yes", "yes", "no", "Yes", "", "", "", ""]
    table = score(read_sheet(sheet(tmp_path / "s.csv", verdicts, free), KEY)).set_index("dictionary")
    assert table.loc["a"].to_dict() == {
        "kind": "sae", "features": 4, "interpretable": 2, "maybe": 1, "uninterpretable": 1, "context_free": 1,
    }  # fmt: skip
    assert table.loc["b", "interpretable"] == 2 and table.loc["b", "maybe"] == 2 and table.loc["b", "context_free"] == 1


def test_the_test_is_fishers() -> None:

    for a, n, b, m in ((41, 50, 38, 50), (3, 10, 9, 12), (0, 5, 5, 5), (7, 7, 7, 7)):  # the first: the paper's
        table = pd.DataFrame({"interpretable": [a, b], "features": [n, m]})
        possible = range(max(0, a + b - m), min(n, a + b) + 1)
        ways = {x: math.comb(n, x) * math.comb(m, a + b - x) for x in possible}
        as_rare = sum(number for number in ways.values() if number <= ways[a])
        assert p_value(table) == pytest.approx(as_rare / math.comb(n + m, a + b))
    assert p_value(table.head(1)) is None


@pytest.mark.parametrize(
    ("verdicts", "free", "features", "message"),
    [
        (["maybe"] * 7 + ["yes"], None, None, r"line 9 \(N7\): verdict 'yes' is none of interpretable, maybe"),
        (["maybe"] * 7 + [""], None, None, r"line 9 \(N7\): verdict '' is none of"),
        (["maybe"] * 8, ["perhaps"] * 8, None, r"line 2 \(N0\): context_free 'perhaps' is neither yes nor no"),
        (["maybe"] * 8, None, ["N0"] * 8, "every feature once; missing: N1, N2"),
        (["maybe"] * 8, None, ["X"] * 8, r"line 2 \(X\): no such feature in the key"),
    ],
)
def test_a_sheet_that_is_not_whole_is_refused(
    verdicts: list[str], free: Any, features: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SheetError, match=message):
        read_sheet(sheet(tmp_path / "s.csv", verdicts, free, features), KEY)
