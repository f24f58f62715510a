"""Dictionaries of heads in the plan: one training, an evaluation of the whole and of every head; what is refused."""

from pathlib import Path

import pytest
from tests.planning.test_plan import changed, home  # noqa: F401 (home is a fixture)

from saeflow.config import ConfigError
from saeflow.config.defaults import set_apart
from saeflow.planning.digests import short_hash
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan
from saeflow.planning.stages import stages

HEADS = ["dictionary=heads", "training=april", "site=attn_z"]


def plan_of(home: Path, *overrides: str) -> Plan:  # noqa: F811
    return compose(home / "conf", list(overrides), results=str(home / "results"), digests=home / "digests.json")


def test_one_more_coefficient_is_one_training_and_the_evaluations_of_its_heads(home: Path) -> None:  # noqa: F811
    before = plan_of(home, *HEADS, "dictionary.l1_coefficient=[1,2]")
    after = plan_of(home, *HEADS, "dictionary.l1_coefficient=[1,2,4]")
    assert changed(before, after) == {"train": 1, "evaluate": 5, "heads": 1, "figures": 1}
    (key,) = after.stages["train"].keys() - before.stages["train"].keys()
    heads = {e.config.get("part"): e.needs for e in after.stages["evaluate"].values() if e.needs["train"] == [key]}
    assert list(heads) == [None, "head_0", "head_1", "head_2", "head_3"]
    for part, needs in heads.items():  # each against the ablation of the same scope
        (baseline,) = needs["baseline"]
        head = after.stages["baseline"][baseline].config["head"]
        assert head == (None if part is None else int(part[-1]))


def test_heads_and_concatenated_share_what_they_read_and_are_compared_with(home: Path) -> None:  # noqa: F811
    heads, both = plan_of(home, *HEADS), plan_of(home, "dictionary=[heads,concat]", *HEADS[1:])
    assert changed(heads, both) == {"train": 1, "evaluate": 1, "heads": 1, "figures": 1}
    (batch,) = {frozenset(t.needs["activations"]) for t in both.stages["train"].values()}
    assert len(batch) == 1


def test_both_recipes_are_one_sweep(home: Path) -> None:  # noqa: F811
    kissane = "{dictionary:[kissane/heads,kissane/concat],training:kissane,dictionary.l1_coefficient:[1,2]}"
    sweep = f"sweep=[{{dictionary:[heads,concat],training:april,dictionary.l1_coefficient:[2,5]}},{kissane}]"
    plan = plan_of(home, "site=attn_z", sweep)
    found = [instance.config for instance in plan.stages["train"].values()]
    assert len(found) == 8
    for config in found:
        dictionary, training = config["dictionary"], config["training"]
        april = dictionary["sparsity"] == "decoder_norm"
        assert dictionary.get("apply_b_dec_to_input", True) is not april
        n_steps = training["n_tokens"] // training["batch_size"]
        if april:
            assert n_steps == 240_001
            assert training["l1_warm_up_steps"] == n_steps // 20 and training["lr_decay_steps"] == n_steps // 5
            assert dictionary["normalize_activations"] == (
                "per_head" if dictionary["kind"] == "heads" else "expected_average_only_in"
            )
        else:
            assert (training["lr"], training["adam_beta1"], training["adam_beta2"]) == (1e-3, 0.0, 0.9999)
            assert training["resample_steps"] == [0, 50_000, 100_000, 150_000, 200_000]
            assert dictionary["normalize_activations"] == "none"


def test_the_study_of_recipes_is_a_plan(home: Path) -> None:  # noqa: F811
    plan = plan_of(home, "experiment=heads_recipes")
    assert {stage: len(plan.stages[stage]) for stage in ("activations", "train", "baseline", "evaluate")} == {
        "activations": 1, "train": 12, "baseline": 5, "evaluate": 36,
    }  # fmt: skip


def test_the_keys_of_other_dictionaries_stay_what_they_were(home: Path) -> None:  # noqa: F811
    for instance in plan_of(home, "dictionary=relu").stages["train"].values():
        assert "apply_b_dec_to_input" not in set_apart(instance.config)["dictionary"]
    uncentred = plan_of(home, "dictionary=relu", "+dictionary.apply_b_dec_to_input=false")
    assert changed(plan_of(home, "dictionary=relu"), uncentred)["train"] == 1


def test_one_head_can_be_trained_alone(home: Path) -> None:  # noqa: F811
    plan = plan_of(home, "site=attn_z", "dictionary=topk", "site.head=[1,3]", "stacks=[all]")
    assert [instance.config["head"] for instance in plan.stages["train"].values()] == [1, 3]
    assert sorted(instance.config["head"] for instance in plan.stages["baseline"].values()) == [1, 3]
    assert len(plan.stages["evaluate"]) == len(plan.stages["stack"]) == 2 and len(plan.stages["activations"]) == 1
    whole = plan_of(home, "site=attn_z", "dictionary=topk")
    (instance,) = whole.stages["train"].values()
    assert "head" not in instance.config


def test_heads_take_a_hth_of_the_arithmetic(home: Path) -> None:  # noqa: F811
    """Of one dictionary with as many latents in all; and one head a Hth of that."""
    heads = plan_of(home, "site=attn_z", "dictionary=heads_topk", "dictionary.k=4")
    concat = plan_of(home, "site=attn_z", "dictionary=topk", "dictionary.k=16")
    alone = plan_of(home, "site=attn_z", "dictionary=topk", "dictionary.k=4", "site.head=1")
    counted = [stages()["train"].operations(p, [*p.stages["train"].values()][:1]) for p in (concat, heads, alone)]
    assert counted[0] == pytest.approx(4 * counted[1]) and counted[1] == pytest.approx(4 * counted[2])


def test_a_blind_set_shows_heads_as_one(home: Path) -> None:  # noqa: F811
    plan = plan_of(home, "dictionary=[heads,concat]", *HEADS[1:], "blind={}")
    (blind,) = plan.stages["blind"].values()
    parts = [plan.stages["evaluate"][key].config.get("part") for key in blind.needs["evaluate"]]
    assert parts == [None, None]


def test_layers_of_heads_stack(home: Path) -> None:  # noqa: F811
    plan = plan_of(home, *HEADS, "site.layer=[0,1,3]", "stacks=[all]")
    (stack,) = plan.stages["stack"].values()
    assert stack.config["layers"] == [0, 1, 3] and len(stack.needs["train"]) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["dictionary=heads", "site=mlp_out"],
            r"kind=heads needs a hook with heads, and blocks.2.hook_mlp_out has none; these have: .*hook_z",
        ),
        (["dictionary=heads", "site=mlp"], "kind=heads reads one hook, but this site has two .* use site=attn_z"),
        (["dictionary=heads_topk", "dictionary.k=257"], "k=257 is more than d_sae=256 at each head of blocks.2.attn"),
        (
            ["dictionary=heads_topk", "training.revive=auxk"],
            "revive=auxk .* none or resample with dictionary.kind=heads",
        ),
        (
            ["dictionary=heads_topk", "dictionary.normalize_activations=expected_average_only_in"],
            "normalize_activations=expected_average_only_in .* none or per_head with kind=heads",
        ),
        (
            ["dictionary=relu", "site=mlp_out", "dictionary.normalize_activations=per_head"],
            "per_head needs a hook with",
        ),
        (["dictionary=heads_topk", "site.head=1"], "site.head=1 .* null with dictionary.kind=heads"),
        (["dictionary=topk", "site.head=4"], r"site.head=4 is out of range: blocks.2.attn.hook_z has heads 0 to 3"),
        (["dictionary=topk", "site=mlp_out", "+site.head=1"], "site.head=1 needs a hook with heads"),
        (["dictionary=concat", "site.head=1"], "expected_average_only_in .* none or per_head with site.head"),
        (["dictionary=saelens/topk", "dictionary.kind=heads"], "kind=heads .* sae with activation=saelens"),
        (["dictionary=saelens/topk", "+dictionary.apply_b_dec_to_input=false"], "true with activation=saelens"),
    ],
)
def test_what_cannot_be_trained_by_heads_is_refused(home: Path, overrides: list[str], message: str) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        plan_of(home, *([] if any(o.startswith("site=") for o in overrides) else ["site=attn_z"]), *overrides)


def test_only_what_was_saved_in_another_order_has_a_new_version(home: Path) -> None:  # noqa: F811
    """TopK over all heads, each with a scale of its own, ranked latents in other units than those it was saved in."""
    per_head, version = "dictionary.normalize_activations=per_head", stages()["train"].version
    plan = plan_of(home, "dictionary=[topk,batchtopk,relu,heads_topk]", "site=attn_z", per_head)
    alone = plan_of(home, "dictionary=topk", "site=attn_z", per_head, "site.head=1")
    scaled = plan_of(home, "dictionary=topk", "site=attn_z", "dictionary.normalize_activations=none")
    for made, instance in ((p, i) for p in (plan, alone, scaled) for i in p.stages["train"].values()):
        config = instance.config["dictionary"]
        needed = {stage: [made.stages[stage][key].identity for key in keys] for stage, keys in instance.needs.items()}
        mended = (config["kind"], config["activation"], config["normalize_activations"]) == ("sae", "topk", "per_head")
        assert (instance.version > version) is (mended and "head" not in instance.config)
        assert instance.identity == short_hash(["train", instance.version, set_apart(instance.config), needed], 32)
        assert instance.key.endswith(f"-{instance.identity[:8]}")
    assert len(plan.stages["train"]) == 4
