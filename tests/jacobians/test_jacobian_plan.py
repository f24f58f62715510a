"""Jacobian pairs in the plan: what a coefficient adds, and the paper's settings as presets."""

from pathlib import Path

import pytest
import torch
from conftest import write_plain_model
from tests.planning.test_plan import ROOT, changed, home  # noqa: F401 (home is a fixture)

from saeflow.config import ConfigError, JacobianConfig
from saeflow.config.defaults import set_apart
from saeflow.dictionaries import Spec
from saeflow.dictionaries.initial import initial_weights
from saeflow.dictionaries.spec import DictionaryError
from saeflow.jacobians.stage import most_pairs
from saeflow.planning.expansion import compose
from saeflow.planning.explain import explain, sentence
from saeflow.planning.graph import Plan
from saeflow.planning.machine import notes
from saeflow.planning.stages import stages
from saeflow.text.tokenizer import load_tokenizer

PAIRS = ["dictionary=jacobian", "site=mlp"]


def plan_of(home: Path, *overrides: str) -> Plan:  # noqa: F811
    return compose(home / "conf", list(overrides), results=str(home / "results"), digests=home / "digests.json")


def test_one_more_coefficient_is_one_training_one_study_and_two_evaluations(home: Path) -> None:  # noqa: F811
    before = plan_of(home, *PAIRS, "dictionary.jacobian_coefficient=[0,1]")
    after = plan_of(home, *PAIRS, "dictionary.jacobian_coefficient=[0,1,2]")
    assert {name: changed(before, after)[name] for name in ("train", "jacobian", "evaluate", "figures")} == {
        "train": 1, "jacobian": 1, "evaluate": 2, "figures": 1,
    }  # fmt: skip
    parts = [e.config["part"] for e in after.stages["evaluate"].values()]
    assert sorted(parts) == ["input"] * 3 + ["output"] * 3


def test_what_concerns_pairs_alone_is_in_no_other_key(home: Path) -> None:  # noqa: F811
    options = ["dictionary=topk"]
    before = plan_of(home, *options)
    after = plan_of(home, *options, "training.jacobian_fraction=0.5", "training.jacobian_warm_up_steps=7")
    assert changed(before, after) == {}
    pairs = plan_of(home, *PAIRS)
    assert changed(pairs, plan_of(home, *PAIRS, "training.jacobian_fraction=0.5"))["train"] == 1


def test_a_site_that_is_no_mlp_is_refused(home: Path) -> None:  # noqa: F811
    hooks = ["site.hook_name=blocks.1.hook_resid_pre", "site.hook_name_out=blocks.1.hook_resid_post"]
    with pytest.raises(ConfigError, match="a Jacobian is that of one MLP"):
        plan_of(home, *PAIRS, *hooks)


def test_training_without_the_norm_needs_a_site_before_it(home: Path) -> None:  # noqa: F811
    ignored = ["dictionary=jacobian", "dictionary.jacobian_norm=ignored", "site.layer=1"]
    with pytest.raises(ConfigError, match=r"dictionary.jacobian_norm=ignored leaves the norm out of f, but f does not"):
        plan_of(home, *ignored, "site=mlp")
    before = [*ignored[:1], "site=mlp_before_norm", "site.layer=1", "site.hook_name=blocks.1.hook_resid_pre"]
    plain, without = plan_of(home, *before), plan_of(home, *before, ignored[1])
    assert changed(plain, without) == {"train": 1, "jacobian": 1, "evaluate": 2, "figures": 1}
    assert "jacobian_norm_ignored" in next(iter(without.stages["train"]))


# -------------------------------------------------------------------- a text in place of held-out tokens
PROMPT = "jacobian.text='It was a bright cold day in April, and the clocks were striking thirteen.'"


def test_a_text_is_a_row_with_its_own_key(tmp_path: Path) -> None:
    conf, results = ROOT / "conf", str(tmp_path)
    before = compose(conf, PAIRS, results)
    plan = compose(conf, [*PAIRS, PROMPT, "jacobian.text_tokens=[3,5]", "jacobian.n_tokens=7"], results)
    assert set(changed(before, plan)) == {"jacobian", "figures"}
    (study,) = plan.stages["jacobian"].values()
    tokenizer = load_tokenizer(ROOT / "resources" / "model")
    ids = tokenizer.tokenizer.encode(study.config["jacobian"]["text"], add_special_tokens=False).ids
    assert study.config["row"] == [tokenizer.bos_token_id, *ids][:6] and "tokens" not in study.needs
    assert "prompt." in study.key and "-3_5-" in study.key
    whole = compose(conf, [*PAIRS, PROMPT], results)
    assert [len(s.config["row"]) for s in whole.stages["jacobian"].values()] == [len(ids) + 1]
    (tmp_path / "prompt.txt").write_text(study.config["jacobian"]["text"])
    file = f"jacobian.text_path={tmp_path}/prompt.txt"
    assert compose(conf, [*PAIRS, file], results).stages["jacobian"].keys() == whole.stages["jacobian"].keys()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            [PROMPT, "jacobian.text_tokens=[3,99]"],
            r"has 25 tokens .* position 99 is not there; name positions below 25",
        ),
        (["jacobian.text=''"], r"has 1 tokens .* so position 1 is not there"),
        (["jacobian.text_path=nowhere.txt"], r"text_path=nowhere.txt cannot be read in .*\(--directory\): .*No such"),
        (["jacobian.text='" + "so it goes " * 200 + "'"], "the model's context is 256; name fewer"),
    ],
)
def test_a_text_that_cannot_be_studied_is_refused(settings: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(ROOT / "conf", [*PAIRS, *settings], str(tmp_path))


def test_positions_that_no_text_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"text_tokens=\[5, 3\] is out of range: .* from 1 up"):
        JacobianConfig(text="a", text_tokens=(5, 3))
    with pytest.raises(ConfigError, match=r"text_tokens=\[3, 5\] is out of range: it must be empty without"):
        JacobianConfig(text_tokens=(3, 5))
    with pytest.raises(ConfigError, match=r"set one of jacobian\.text and jacobian\.text_path, not both"):
        JacobianConfig(text="a", text_path="b")


# -------------------------------------------------------------------- the paper's settings
SIZES = {  # d_model, layers, heads, layer studied, latents, coefficients (0.5 k^2 / d_model)
    "pythia-70m": (512, 6, 8, 3, 32_768, [0, 1]),
    "pythia-160m-deduped": (768, 12, 12, 7, 49_152, [0, 0.667]),
    "pythia-410m-deduped": (1024, 24, 16, 15, 65_536, [0, 0.5]),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_papers_settings_are_a_plan(tmp_path: Path, name: str) -> None:
    d, layers, heads, layer, d_sae, coefficients = SIZES[name]
    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": d,
        "num_attention_heads": heads,
        "intermediate_size": 4 * d,
        "max_position_embeddings": 2048,
    }
    write_plain_model(tmp_path, config)
    settings = [f"model={name}", "experiment=jsae_paper", f"site.layer={layer}"]
    settings += [f"dictionary.jacobian_coefficient={coefficients}".replace(" ", "")]
    settings += [f"model.path={tmp_path}"]
    plan = compose(ROOT / "conf", settings, results=str(tmp_path / "results"))
    trained = [instance.config for instance in plan.stages["train"].values()]
    assert [c["dictionary"]["jacobian_coefficient"] for c in trained] == coefficients
    rule = 0.5 * 32**2 / d
    assert coefficients[1] == pytest.approx(rule, rel=1e-3)
    for config in trained:
        dictionary, training = config["dictionary"], config["training"]
        assert (dictionary["k"], d * dictionary["expansion"]) == (32, d_sae)
        assert (dictionary["squared_error"], dictionary["jacobian_at"]) == ("mean", "input")
        steps = training["n_tokens"] // training["batch_size"]
        assert (training["batch_size"], steps, training["lr"]) == (4096, 73_242, 5e-4)
        assert training["lr_warm_up_steps"] == steps // 100 and training["jacobian_warm_up_steps"] == steps // 20
        assert training["lr_decay_steps"] == steps // 5 and training["clip_grad_norm"] == 1.0
        assert config["hook_name"] == f"blocks.{layer}.mlp.hook_in" and dictionary["apply_b_dec_to_input"] is False
    bytes_each = 300_000_000 // 2048 * 2048 * d * 2
    assert explain(plan).bytes_to_cache == pytest.approx(2 * bytes_each, rel=1e-3)
    found = explain(plan)
    assert "2 trainings, 2 Jacobian studies" in sentence(found) and "device.flops" in sentence(found)
    encoders, products = 2 * 2 * 4096 * d * d_sae, 2 * 2 * 2 * d * d_sae * 4 * d  # of a step; products and gradients
    operations = stages()["train"].operations(plan, list(plan.stages["train"].values()))
    assert operations > 73_242 * (2 * encoders + products)
    assert operations < 1.2 * 73_242 * (2 * encoders + products)
    assert found.time.seconds > operations / 1e11


def test_notebook_000_at_its_own_size_is_a_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "num_hidden_layers": 6,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "max_position_embeddings": 2048,
    }
    write_plain_model(tmp_path, config)
    settings = ["experiment=notebook_000_pythia", f"model.path={tmp_path}"]
    plan = compose(ROOT / "conf", settings, results=str(tmp_path / "results"))
    for trained in plan.stages["train"].values():
        dictionary = trained.config["dictionary"]
        assert (dictionary["k"], 512 * dictionary["expansion"], dictionary["jacobian_norm"]) == (32, 16_384, "ignored")
        assert trained.config["hook_name"] == "blocks.3.hook_resid_pre"
    of_prompt = [study.config for study in plan.stages["jacobian"].values() if "row" in study.config]
    assert len(of_prompt) == 4 and all(config["jacobian"]["text_tokens"] == [11, 20] for config in of_prompt)
    assert all(config["jacobian"]["text"].startswith("Given the existence as uttered") for config in of_prompt)
    assert not caplog.records
    compose(ROOT / "conf", [*settings, "tokens.train_tokens=307_200"], results=str(tmp_path / "results"))
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "training.n_tokens=300000000 passes 977 times over tokens.train_tokens=307200"
    )


def test_a_plan_says_what_the_sums_of_pairs_need(tmp_path: Path) -> None:
    """As many as k x k a token, or all; beyond 5 million they lie on the disk, with a gigabyte of memory."""
    config = {
        "architectures": ["GPTNeoXForCausalLM"], "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
        "intermediate_size": 256, "max_position_embeddings": 256,
    }  # fmt: skip
    write_plain_model(tmp_path, config)
    settings = [
        f"model.path={tmp_path}",
        "dictionary=jacobian",
        "site=mlp",
        "dictionary.k=8",
        "dictionary.expansion=64",
    ]
    asked = {}
    for n_tokens, pairs in ((1000, 64_000), (60_000, 3_840_000), (1_000_000, 16_777_216)):
        tokens = ["tokens.held_out_tokens=2_000_000", f"jacobian.n_tokens={n_tokens}"]
        plan = compose(ROOT / "conf", [*settings, *tokens], results=str(tmp_path / "results"))
        (study,) = plan.stages["jacobian"].values()
        assert most_pairs(plan, study) == pairs
        asked[pairs] = stages()["jacobian"].resources(plan, [study])["mem_mb"]
        said = [note for note in notes(plan) if "pairs of latents" in note]
        assert len(said) == (pairs > 5_000_000)
    assert (
        f"{study.key} sums up to 16,777,216 pairs of latents, in files: 1000 MB of memory and up to 2.0 GB" in said[0]
    )
    assert asked[3_840_000] - asked[64_000] == pytest.approx(200 * (3.84 - 0.064), abs=1)
    assert asked[16_777_216] - asked[64_000] == pytest.approx(1000 - 200 * 0.064, abs=1)


def test_the_papers_first_weights() -> None:
    spec = Spec("sae", "topk", 64, 64, 4096, "h", "h", k=4, sparsity="unit_norm")
    weights = initial_weights(spec, torch.ones(64), 0, "jsae")
    bound = (6 / 64) ** 0.5
    assert weights.encoder.abs().max() <= bound and weights.encoder.abs().max() > 0.999 * bound
    assert weights.encoder.norm(dim=1).mean().item() == pytest.approx(2**0.5, rel=1e-2)
    torch.testing.assert_close(weights.W_dec, weights.encoder / weights.encoder.norm(dim=1, keepdim=True))
    assert not weights.b_dec.any() and not weights.b_enc.any()
    transcoder = Spec("transcoder", "topk", 64, 64, 128, "h", "g", k=4)
    with pytest.raises(DictionaryError, match=r"training\.initial=jsae is for SAEs"):
        initial_weights(transcoder, torch.ones(64), 0, "jsae")


# -------------------------------------------------------------------- the paper's site and encoder
def test_the_papers_experiment_reads_behind_the_gain_and_subtracts_no_b_dec() -> None:
    plan = compose(ROOT / "conf", ["experiment=jsae"])
    hooks = {pair.config["hook_name"] for pair in plan.stages["train"].values()}
    assert hooks == {f"blocks.{layer}.mlp.hook_in" for layer in range(4)}
    assert all(pair.config["dictionary"]["apply_b_dec_to_input"] is False for pair in plan.stages["train"].values())


def test_an_encoder_that_subtracts_b_dec_has_the_key_that_it_always_had(home: Path) -> None:  # noqa: F811
    plain = plan_of(home, *PAIRS)
    assert changed(plain, plan_of(home, *PAIRS, "dictionary.apply_b_dec_to_input=true")) == {}
    assert changed(plain, plan_of(home, *PAIRS, "dictionary.apply_b_dec_to_input=false"))["train"] == 1
    for kind in ("pair", "jacobian"):
        for planned in plan_of(home, f"dictionary={kind}", "site=mlp").stages["train"].values():
            assert "apply_b_dec_to_input" not in set_apart(planned.config)["dictionary"]
    sae = plan_of(home, "dictionary=topk", "dictionary.sparsity=unit_norm", "site=mlp_in", "dictionary.k=4")
    pair = plan_of(home, "dictionary=pair", "site=mlp", "dictionary.k=4")
    assert set(sae.stages["train"]) < set(pair.stages["train"])


def test_behind_a_gain_that_was_folded_away_there_is_no_site(home: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=r"mlp.hook_in is behind .* model.fold_ln=true .* set model.fold_ln=false"):
        plan_of(home, "dictionary=jacobian", "site=mlp_after_norm", "model.fold_ln=true")
    plan_of(home, "dictionary=jacobian", "site=mlp_after_norm")
