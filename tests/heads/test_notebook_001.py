"""The preset of notebook 001: its sizes and its recipes, as a plan."""

from pathlib import Path

import pytest
from conftest import write_plain_model

from saeflow.planning.expansion import compose
from saeflow.planning.explain import explain, sentence
from saeflow.planning.graph import Plan

ROOT = Path(__file__).resolve().parents[2]
GELU_2L = {  # the keys of the toy models on the hub that decide sizes
    "n_layers": 2, "d_model": 512, "d_mlp": 2048, "d_head": 64, "n_heads": 8, "n_ctx": 1024, "d_vocab": 48262,
    "act_fn": "gelu", "normalization": "LN", "shortformer_pos": False, "attn_only": False, "ln_eps": 1e-5,
    "tokenizer_name": "NeelNanda/gpt-neox-tokenizer-digits",
}  # fmt: skip


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = write_plain_model(tmp_path_factory.mktemp("gelu-2l"), GELU_2L)
    settings = ["experiment=notebook_001", f"model.path={folder}"]
    return compose(ROOT / "conf", settings, results=str(folder / "results"))


def test_it_has_the_notebooks_sizes(plan: Plan) -> None:
    (column,) = plan.stages["activations"].values()
    assert column.config["size"] == [8, 64] and column.config["hook_name"] == "blocks.1.attn.hook_z"
    assert column.config["tokens"]["context_size"] == 1024
    sizes = []
    for instance in plan.stages["train"].values():
        dictionary, training = instance.config["dictionary"], instance.config["training"]
        steps = training["n_tokens"] // training["batch_size"]
        width = 64 if dictionary["kind"] == "heads" else 512
        sizes.append((dictionary["kind"], width * dictionary["expansion"]))
        if dictionary["sparsity"] == "decoder_norm":  # the April recipe
            assert (training["n_tokens"], training["batch_size"], steps) == (983_044_096, 4096, 240_001)
            assert training["lr"] == 5e-5 and not dictionary["apply_b_dec_to_input"]
            assert training["l1_warm_up_steps"] == pytest.approx(0.05 * steps, rel=0.01)
            assert training["lr_decay_steps"] == pytest.approx(0.2 * steps, rel=0.01)
        else:
            assert training["lr"] == 1e-3 and training["revive"] == "resample"
            assert dictionary["l1_coefficient"] == 2.0
    assert sorted(sizes) == [("heads", 2048)] * 4 + [("sae", 16_384)] * 4


def test_one_study_compares_all_of_them(plan: Plan) -> None:
    (study,) = plan.stages["heads"].values()
    assert sorted(study.needs["train"]) == sorted(plan.stages["train"])
    assert len(plan.stages["evaluate"]) == 4 * 9 + 4  # each heads dictionary as a whole and by head
    said = sentence(explain(plan))
    assert "8 trainings" in said and "1 study of heads" in said
    assert explain(plan).bytes_to_cache == pytest.approx(983_040_000 * 512 * 2, rel=1e-3)
