"""SmolLM2 as `make model NAME=smollm2` fetches it; `make test-real` fetches it and runs these, which skip without."""

import json
from pathlib import Path

import pytest
import torch

from saeflow.config import ModelConfig
from saeflow.models.folder import read_geometry
from saeflow.models.loading import load_model
from saeflow.models.smollm2 import PROMPT
from saeflow.planning.expansion import compose

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "models/smollm2"
pytestmark = pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason="not fetched: make model NAME=smollm2")


@pytest.fixture(scope="module")
def hooked():
    return load_model(FOLDER, ModelConfig("smollm2", path=str(FOLDER)), "cpu")


def test_sizes_are_those_of_its_card() -> None:
    sizes = read_geometry(FOLDER)
    assert (sizes.n_layers, sizes.d_model, sizes.d_mlp, sizes.d_vocab) == (30, 576, 1536, 49152)
    assert (sizes.n_heads, sizes.n_key_value_heads, sizes.d_head, sizes.gated) == (9, 3, 64, True)


def test_it_knows_a_capital(hooked) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    row = torch.tensor([tokenizer.encode(PROMPT)])
    assert tokenizer.decode(hooked(row)[0, -1].argmax()) == " Paris"


def test_tokens_are_those_of_the_gguf_and_come_back() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "Naïve café, 1,234 €\n\tdef f(x):  return x**2  # 日本語 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(" Paris") == [7042]
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]  # digits one by one, and apart from spaces before them
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(tokenizer) == 49152


def test_the_folder_says_what_it_is() -> None:
    card = (FOLDER / "README.md").read_text()
    assert "instruct-tuned" in card
    assert "4 bits" in card
    assert json.loads((FOLDER / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_it_is_planned_by_its_content() -> None:
    rest = ["tokens.context_size=256", "site.layer=15"]
    plan = compose(ROOT / "conf", ["model=smollm2", *rest])
    copy = compose(ROOT / "conf", ["model=local", f"model.path={FOLDER}", "model.name=smollm2", *rest])
    assert plan.stages["train"].keys() == copy.stages["train"].keys()


@pytest.mark.parametrize("study", ["sparsity_faithfulness", "jsae", "heads"])
def test_a_study_of_it_is_planned(study: str) -> None:
    plan = compose(ROOT / "conf", [f"experiment=smollm2_{study}"])
    assert len(plan.stages["train"]) >= 4 and len(plan.stages["figures"]) == 1
    left_out = {"exclude" in instance.config["training"] for instance in plan.stages["train"].values()}
    assert left_out == ({True, False} if study == "sparsity_faithfulness" else {True})


def test_one_mlp_writes_the_massive_activation_and_another_takes_it_away(hooked) -> None:
    from saeflow.activations.norms import norms_by_layer
    from saeflow.text.tokenizer import open_tokenizer

    ids = open_tokenizer(FOLDER).encode((ROOT / "docs/training.md").read_text()).ids[: 2 * 63]
    tokens = torch.cat([torch.ones(2, 1, dtype=torch.int64), torch.tensor(ids).view(2, 63)], 1)  # its BOS has id 1
    table = norms_by_layer(hooked, tokens, ["hook_mlp_out", "hook_resid_post"]).set_index(["place", "layer"])["first"]
    written, stream = table["hook_mlp_out"], table["hook_resid_post"]
    assert written.idxmax() == 11 and written[11] > 300 and written[28] > 30
    assert (stream[11:28] > 30).all() and (stream[:11] < 15).all() and stream[29] < 15
