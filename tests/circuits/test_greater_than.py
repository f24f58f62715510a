"""The greater-than study: its score in closed form, units against the model itself, prompts, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.circuits.test_circuits import transcoder

from saeflow.circuits.figures import GreaterThan, greater_than
from saeflow.circuits.greater_than import (
    Prompts,
    curves,
    prompts,
    ranked,
    run,
    score,
    units_of,
    with_units,
)
from saeflow.config import ConfigError, ModelConfig
from saeflow.models.greater_than import CONFIG, YEARS, sentences, tokenizer
from saeflow.models.loading import load_model
from saeflow.planning.expansion import compose
from saeflow.text.tokenizer import open_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(model_folder: Path) -> Any:
    return load_model(model_folder, ModelConfig("tiny", path=str(model_folder)), "cpu").to(torch.float64)


@pytest.fixture
def asked() -> Prompts:
    """A few years, of a model with 300 tokens."""
    tokens = torch.tensor([[0, 7, 20 + year, 9, 11] for year in range(12)])
    return Prompts(tokens, torch.arange(20, 32))


def test_the_score_is_1_for_later_years_and_known_for_others() -> None:
    n = 12
    later = torch.ones(n, n).triu(1) > 0
    assert score(torch.where(later, 0.0, -1e4)) == pytest.approx(1.0)
    assert score(torch.where(later, -1e4, 0.0)) == pytest.approx(-1.0)
    wanted = np.mean([((n - 1 - y) - (y + 1)) / n for y in range(1, n - 1)])  # uniform: counts of years
    assert score(torch.zeros(n, n)) == pytest.approx(wanted)


def test_all_neurons_are_the_model_and_all_latents_its_transcoder(model: Any, asked: Prompts) -> None:
    made = transcoder(1)
    found = units_of(model, made, asked)
    hook = made.spec.hook_name_out
    neurons, latents = found["neurons"], found["latents"]
    whole = with_units(neurons, torch.arange(neurons.activations.shape[-1]), hook)
    assert run(model, asked, whole) == pytest.approx(run(model, asked), abs=1e-10)

    def replace(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return made.forward(read[0].flatten(0, 1)).view(value.shape)

    read: list[torch.Tensor] = []
    by_hand = [(made.spec.hook_name, lambda value, hook: read.append(value)), (hook, replace)]
    logits = model.run_with_hooks(asked.tokens, fwd_hooks=by_hand)[:, -1, asked.years]
    assert run(model, asked, with_units(latents, torch.arange(made.d_sae), hook)) == pytest.approx(score(logits))
    none = with_units(neurons, torch.tensor([], dtype=torch.int64), hook)
    bias = [(hook, lambda value, hook: model.blocks[1].mlp.b_out.expand_as(value))]
    assert run(model, asked, none) == pytest.approx(run(model, asked, bias))


def test_units_are_ranked_by_variance_over_prompts_and_kept_one_by_one(model: Any, asked: Prompts) -> None:
    made = transcoder(1)
    units = units_of(model, made, asked)["latents"]
    variance = np.var(units.activations[:, -1].numpy(), axis=0)
    order = ranked(units)
    assert np.all(np.diff(variance[order.numpy()]) <= 0) and sorted(order.tolist()) == list(range(made.d_sae))
    curve, table = curves(model, made, asked)
    mine = curve[curve["units"] == "latents"].set_index("k")["score"]
    assert list(mine.index) == list(range(made.d_sae + 1))
    direct = with_units(units, order[:3], made.spec.hook_name_out)
    assert mine[3] == pytest.approx(run(model, asked, direct)) and mine.nunique() > 5
    rows = table[table["units"] == "latents"]
    np.testing.assert_allclose(rows["variance"], variance[order.numpy()])
    assert rows["unit"].tolist() == order.tolist()


def test_prompts_end_before_one_token_for_each_year(neox_folder: Path) -> None:
    made = tokenizer()
    asked = prompts(made, made.token_to_id("<|endoftext|>"))
    assert asked.tokens.shape == (100, 9) and len(set(asked.years.tolist())) == 100
    words = [made.id_to_token(int(i)) for i in asked.tokens[41]]
    assert words == ["<|endoftext|>", "The", "war", "lasted", "from", "17", "41", "to", "17"]
    assert made.id_to_token(int(asked.years[7])) == "07" and made.get_vocab_size() == CONFIG.vocab_size
    with pytest.raises(ConfigError, match="does not write the last two digits of a year as one token each after 'The"):
        prompts(open_tokenizer(neox_folder), 0)


def test_the_models_sentences_say_later_years_alone() -> None:
    text = sentences(20_000, seed=0)
    years = np.array([[int(word[2:]) for word in line.split() if word.startswith("17")] for line in text])
    assert (years[:, 1] > years[:, 0]).all() and len(np.unique(years[:, 1])) == 99 and text == sentences(20_000, 0)
    known = {*tokenizer().get_vocab()} - {*YEARS}
    assert {word for line in text for word in line.split() if not word.startswith("17")} <= known


def test_the_figure_has_a_line_for_latents_and_one_for_neurons() -> None:
    studies = pd.DataFrame({"place": "p", "series": "TC", "amount_name": "L1", "amount": 1.0, "point": "1",
                            "dictionary_key": ["a", "b"], "score_model": 0.9, "score_transcoder": 0.8})  # fmt: skip
    rows = [(key, units, k, score) for key, high in (("a", 0.8), ("b", 0.6))
            for units, top in (("latents", high), ("neurons", 0.5)) for k, score in ((0, 0.0), (1, top))]  # fmt: skip
    drawn, table = greater_than(
        GreaterThan(studies, pd.DataFrame(rows, columns=["dictionary_key", "units", "k", "score"]))
    )
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn.axes[0].get_lines()}
    assert lines["TC, L1 = 1 (2 seeds)"] == pytest.approx([0.0, 0.7]) and lines["neurons"] == [0.0, 0.5]
    assert len(table) == 8


def test_a_study_is_planned_for_every_transcoder_where_it_is_asked_for(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    digests = tmp_path_factory.getbasetemp() / "digests.json"
    plan = compose(ROOT / "conf", ["experiment=circuits", "figures=[greater_than]"], digests=digests)
    assert len(plan.stages["greater_than"]) == 4 and not plan.stages["circuits"]
    with pytest.raises(ConfigError, match=r"train it once: python scripts/train_greater_than\.py"):
        compose(ROOT / "conf", ["experiment=greater_than", "model.path=nowhere/models/greater_than"])
