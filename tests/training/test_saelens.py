"""SAELens's training classes on our trainer: its losses, its files, resume, and a configuration in step with it."""

import dataclasses

import pytest
import torch
from stores import TRAINING, TRAINING_STORE, contents, training_plan, write_store

from saeflow.config import ConfigError, DictionaryConfig, TrainingConfig, build
from saeflow.dictionaries import Origin, load_dictionary
from saeflow.dictionaries.kinds.saelens import SAELENS
from saeflow.jobs.job import Job
from saeflow.training import loop as training
from saeflow.training.protocol import HookStatistics
from saeflow.training.saelens import SAELensTrainer

D, BATCH, STEPS = 8, 128, 60
HOOK = "blocks.0.hook_mlp_out"
OPTIONS = {
    "standard": {"l1_coefficient": 0.3},
    "gated": {"l1_coefficient": 0.3},
    "topk": {"k": 3},
    "abstopk": {"k": 3},
    "batchtopk": {"k": 3},
    "matryoshka_batchtopk": {"k": 3, "options": {"matryoshka_widths": [4, 8, 24]}},
    "jumprelu": {"options": {"l0_coefficient": 0.5, "jumprelu_bandwidth": 0.5}},
    "matching_pursuit": {"options": {"residual_threshold": 0.1, "max_iterations": 4}},
}
pytestmark = pytest.mark.slow
every_class = pytest.mark.parametrize("name", OPTIONS)


@pytest.fixture(scope="module")
def x():
    g = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(20, D, generator=g), dim=1)
    return ((torch.rand(1000, 20, generator=g) < 0.1) * torch.rand(1000, 20, generator=g)) @ atoms + 0.2


@pytest.fixture
def results(tmp_path, x):
    store = {HOOK: x}
    write_store(tmp_path / "activations" / TRAINING_STORE, store, chunk_tokens=64, shard_tokens=256)
    return tmp_path


def tree(name, **more):
    return {"kind": "sae", "activation": "saelens", "saelens": name, "expansion": 3, **OPTIONS[name], **more}


def trainer_of(name, x, options=None, **more):
    config = build(DictionaryConfig, tree(name, **more))
    spec = config.spec(D, D, HOOK, HOOK, 3, Origin())
    side = HookStatistics(x.mean(dim=0), float(x.norm(dim=1).mean()))
    asked = {"lr": 3e-3, "clip_grad_norm": 1.0, "log_every": 1} | (options or {})
    return SAELensTrainer(spec, TrainingConfig(STEPS * BATCH, BATCH, **asked), side, side)


def batches(x):
    g = torch.Generator().manual_seed(1)
    return [x[torch.randint(len(x), (BATCH,), generator=g)] for _ in range(STEPS)]


@every_class
def test_a_job_trains_it_and_what_it_writes_opens_here_and_in_saelens(name, results, x):
    from sae_lens import SAE

    plan = training_plan(results, [HOOK], {"it": tree(name)}, TRAINING | {"revive": "auxk", "dead_after_tokens": 1000})
    folder = results / "train" / "it"
    found = []
    for _ in range(2):
        training.train([Job(plan.instance("train", "it"), plan, "cpu")])
        found.append({name: held for name, held in contents(folder).items() if name != "provenance.json"})
    assert found[0] == found[1]
    dictionary = load_dictionary(folder)
    assert dictionary.spec.saelens == name and dictionary.spec.origin.context_size == 64
    with torch.no_grad():
        wanted = SAE.load_from_disk(folder, device="cpu")
        torch.testing.assert_close(dictionary.forward(x), wanted(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dictionary.encode(x), wanted.encode(x), rtol=1e-4, atol=1e-5)
        error = (dictionary.forward(x) - x).square().sum()
    assert error < 0.8 * (x - x.mean(dim=0)).square().sum()


@every_class
def test_its_losses_are_those_of_saelenss_trainer(name, x):
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from saeflow.training.saelens import training_sae

    trainer = trainer_of(name, x)
    theirs = training_sae(trainer.spec)
    config = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=STEPS * BATCH,
        device="cpu", autocast=False, lr=3e-3, lr_end=3e-4, lr_scheduler_name="constant", lr_warm_up_steps=0,
        adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=BATCH,
        dead_feature_window=1000, feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    peer = SAETrainer(config, theirs, iter([]))
    for batch in batches(x):
        trainer.train_step((batch,))
        wanted = peer.step(batch).loss.item()
        peer.n_training_steps += 1
        assert trainer.metrics.rows[-1]["loss"] == pytest.approx(wanted, rel=1e-4)
    for (name_, mine), other in zip(trainer.sae.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=lambda m, n=name_: f"{n}: {m}")


@every_class
def test_training_that_goes_on_from_its_state_is_the_same_training(name, x):
    options = {"revive": "auxk", "dead_after_tokens": 500, "l1_warm_up_steps": 20}
    whole, first, second = (trainer_of(name, x, options) for _ in range(3))
    given = batches(x)
    for batch in given:
        whole.train_step((batch,))
    for batch in given[:23]:
        first.train_step((batch,))
    second.restore(first.state())
    for batch in given[23:]:
        second.train_step((batch,))
    wanted = whole.state()
    assert all(torch.equal(held, wanted[key]) for key, held in second.state().items())


def test_scaling_is_folded_into_what_is_written(x):
    """Trained on scaled inputs, the finished dictionary gives on raw ones what training saw, scaled back."""
    for name in ("gated", "jumprelu", "matching_pursuit"):
        trainer = trainer_of(name, 10 * x, normalize_activations="expected_average_only_in")
        for batch in batches(10 * x):
            trainer.train_step((batch,))
        assert trainer.scale_in == pytest.approx(D**0.5 / float((10 * x).norm(dim=1).mean()))
        with torch.no_grad():
            seen = trainer.sae(10 * x * trainer.scale_in) / trainer.scale_in
        torch.testing.assert_close(trainer.finished().forward(10 * x), seen, rtol=1e-3, atol=1e-3)


def test_the_table_of_options_is_saelenss():
    import sae_lens
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
    from sae_lens.saes.sae import TrainingSAEConfig

    common = {field.name for field in dataclasses.fields(TrainingSAEConfig)}
    scheduled = {"l1_warm_up_steps", "l0_warm_up_steps"}  # training.l1_warm_up_steps
    assert sae_lens.__version__.startswith("6.")
    found = {
        name: {field.name for field in dataclasses.fields(config)} - common - scheduled
        for name, (_, config) in SAE_TRAINING_CLASS_REGISTRY.items()
    }
    assert {name: {amount, *others} for name, (amount, others) in SAELENS.items()} == found


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"saelens": "gatd"}, "must be one of standard, gated"),
        ({"saelens": "gated", "k": 3}, r"dictionary\.k=3"),
        ({"saelens": "topk"}, r"dictionary\.k=None"),
        (
            {"saelens": "gated", "l1_coefficient": 1.0, "options": {"lp_nrm": 2}},
            "lp_nrm; SAELens's gated has here: none",
        ),
        ({"saelens": "standard", "l1_coefficient": 1.0, "options": {"lp_nrm": 2}}, "did you mean 'lp_norm'"),
        ({"saelens": "jumprelu"}, r"options\.l0_coefficient=None"),
        ({"saelens": "topk", "k": 3, "kind": "transcoder"}, "SAELens trains no transcoder"),
        ({"saelens": "topk", "k": 3, "activation": "topk"}, "activation=saelens"),
        ({"saelens": "topk", "k": 3, "normalize_activations": "per_head"}, "expected_average_only_in"),
    ],
)
def test_what_cannot_be_trained_is_said_before_it_starts(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build(DictionaryConfig, {"kind": "sae", "activation": "saelens", "expansion": 3} | wrong)


def test_resampling_is_refused(x):
    with pytest.raises(ConfigError, match="only none and auxk"):
        trainer_of("gated", x, {"revive": "resample", "resample_steps": (5,)})
