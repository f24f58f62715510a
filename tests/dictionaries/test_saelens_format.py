"""What is written opens in the installed SAELens and computes the same there; one step's loss is SAELens's.

Importing SAELens takes about ten seconds.
"""

import json

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.optim import CoefficientScheduler, get_lr_scheduler

from saeflow.config import TrainingConfig
from saeflow.dictionaries import Origin, load_dictionary, save_dictionary
from saeflow.dictionaries.kinds.sae import SAEConfig
from saeflow.dictionaries.kinds.transcoder import TranscoderConfig
from saeflow.dictionaries.sae import build
from saeflow.kernels.step import Objective, Weights, take_step
from saeflow.training.trainer import l1_coefficient, learning_rate

ORIGIN = Origin("tiny", "0123abcd", False, True, False, 64, True)
HOOK_OUT = "blocks.0.hook_mlp_out"
CLASSES = {
    ("sae", "topk", 6): "TopKSAE",
    ("sae", "relu", 6): "StandardSAE",
    ("transcoder", "relu", 6): "Transcoder",
    ("transcoder", "relu", 4): "Transcoder",
    ("transcoder", "topk", 6): "TopKSAE",
    ("sae", "batchtopk", 6): "JumpReLUSAE",
    ("transcoder", "batchtopk", 4): "JumpReLUTranscoder",
    ("skip transcoder", "relu", 4): "SkipTranscoder",
    ("skip transcoder", "batchtopk", 4): "JumpReLUSkipTranscoder",
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_dictionary(kind, activation, p, hook_name="blocks.0.ln2.hook_normalized"):
    amount = {"l1_coefficient": 0.5} if activation == "relu" else {"k": 3}
    skip, kind = kind.startswith("skip"), kind.removeprefix("skip ")
    kind_config = TranscoderConfig if kind == "transcoder" else SAEConfig
    config = kind_config(kind, activation, d_sae=16, expansion=None, **amount, **({"skip": True} if skip else {}))
    spec = config.spec(6, p, hook_name, hook_name if kind == "sae" else HOOK_OUT, 0, ORIGIN)
    skip = {"W_skip": torch.randn(p, 6)} if skip else {}
    threshold = {"threshold": torch.rand(16)} if activation == "batchtopk" else {}
    tensors = (torch.randn(6, 16), torch.randn(16), torch.randn(16, p), torch.randn(p))
    return build(spec, *tensors, **skip, **threshold)


@pytest.mark.parametrize(("kind", "activation", "p"), CLASSES)
def test_saelens_opens_it_and_computes_the_same(tmp_path, kind, activation, p):
    dictionary = random_dictionary(kind, activation, p)
    save_dictionary(dictionary, tmp_path)
    theirs = SAE.load_from_disk(tmp_path)
    assert type(theirs).__name__ == CLASSES[kind, activation, p]
    x = torch.randn(40, 6)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), dictionary.encode(x))
        torch.testing.assert_close(theirs(x), dictionary.forward(x))
    metadata = theirs.cfg.metadata
    assert metadata.hook_name == "blocks.0.ln2.hook_normalized"
    assert metadata.hook_name_out == (None if kind == "sae" else HOOK_OUT)
    opened = load_dictionary(tmp_path)
    assert opened.spec == dictionary.spec and torch.equal(opened.forward(x), dictionary.forward(x))
    assert (metadata.model_name, metadata.context_size, metadata.prepend_bos) == ("tiny", 64, True)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_saelens_takes_activations_of_all_heads(tmp_path, activation):
    dictionary = random_dictionary("sae", activation, 6, "blocks.0.attn.hook_z")
    save_dictionary(dictionary, tmp_path)
    theirs = SAE.load_from_disk(tmp_path)
    z = torch.randn(5, 7, 3, 2)  # batch, position, head, d_head
    with torch.no_grad():
        wanted = dictionary.forward(z.reshape(-1, 6)).reshape(z.shape)
        torch.testing.assert_close(theirs(z), wanted)


def test_saelens_refuses_what_it_has_no_class_for_and_we_open_it(tmp_path):
    dictionary = random_dictionary("transcoder", "topk", 4)
    save_dictionary(dictionary, tmp_path)
    with pytest.raises(KeyError, match="topk_transcoder"):
        SAE.load_from_disk(tmp_path)
    x = torch.randn(5, 6)
    assert torch.equal(load_dictionary(tmp_path).forward(x), dictionary.forward(x))


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_we_open_what_saelens_writes(tmp_path, activation):
    ours = random_dictionary("sae", activation, 6)
    save_dictionary(ours, tmp_path)
    theirs = SAE.load_from_disk(tmp_path)
    del theirs.cfg.metadata.saeflow
    theirs.save_model(tmp_path / "again")
    opened = load_dictionary(tmp_path / "again")
    x = torch.randn(5, 6)
    assert torch.equal(opened.forward(x), ours.forward(x))
    assert (opened.spec.kind, opened.spec.k, opened.spec.hook_name) == ("sae", ours.spec.k, ours.spec.hook_name)
    assert opened.spec.origin == Origin(model_name="tiny", context_size=64, prepend_bos=True)


def test_metadata_of_the_written_config_survives_saelens(tmp_path):
    save_dictionary(random_dictionary("sae", "topk", 6), tmp_path)
    ours = json.loads((tmp_path / "cfg.json").read_text())["metadata"]["saeflow"]
    assert SAE.load_from_disk(tmp_path).cfg.metadata.saeflow == ours
    assert ours["origin"]["model_weights"] == "0123abcd"


# --------------------------------------------------------------- one step
def weights_of(sae):
    with torch.no_grad():
        return Weights(*(t.detach().clone() for t in (sae.W_enc.T.contiguous(), sae.b_enc, sae.W_dec, sae.b_dec)))


def disturb(sae):
    """Biases and decoder norms away from what they start at, so that nothing is 0 or equal by chance."""
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_(std=0.1)
        sae.W_dec.mul_(0.5 + torch.rand(sae.cfg.d_sae, 1))


def assert_same_step(sae, x, coefficients, step):
    given = TrainStepInput(x, coefficients, None, 0, False)
    output = sae.training_forward_pass(step_input=given)
    output.loss.backward()
    torch.testing.assert_close(step.loss, output.loss.detach(), rtol=1e-5, atol=1e-6)
    theirs = Weights(sae.W_enc.grad.T, sae.b_enc.grad, sae.W_dec.grad, sae.b_dec.grad)
    for name, mine, wanted in zip(Weights._fields, step.gradients, theirs, strict=False):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("sparse", [True, False])
def test_a_relu_step_is_a_step_of_saelens(sparse):
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=6, d_sae=16, l1_coefficient=0.5))
    disturb(sae)
    x = torch.randn(40, 6)
    step = take_step(Objective("relu", by_norm=True, centred=True), weights_of(sae), x, x, 0.5, sparse)
    assert_same_step(sae, x, {"l1": 0.5}, step)


@pytest.mark.parametrize("rescale", [True, False])
def test_a_topk_step_is_a_step_of_saelens(rescale):
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=6, d_sae=16, k=3, rescale_acts_by_decoder_norm=rescale))
    disturb(sae)
    x = torch.randn(40, 6)
    step = take_step(Objective("topk", 3, rescale, True), weights_of(sae), x, x)
    assert_same_step(sae, x, {}, step)


def test_a_batchtopk_step_is_a_step_of_saelens():
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=6, d_sae=16, k=3))
    disturb(sae)
    x = torch.randn(40, 6)
    step = take_step(Objective("batchtopk", 3, True, True), weights_of(sae), x, x)
    assert_same_step(sae, x, {}, step)
    assert 0.01 * step.smallest.item() == pytest.approx(sae.topk_threshold.item(), rel=1e-5)  # its rate is 0.01, from 0


@pytest.mark.parametrize(("warm_up", "decay"), [(0, 0), (5, 0), (0, 7), (5, 7)])
def test_the_learning_rate_follows_saelens(warm_up, decay):
    options = TrainingConfig(n_tokens=300, batch_size=10, lr=3e-4, lr_warm_up_steps=warm_up, lr_decay_steps=decay)
    optimiser = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_lr_scheduler(
        "constant",
        optimiser,
        training_steps=30,
        lr=3e-4,
        warm_up_steps=warm_up,
        decay_steps=decay,
        lr_end=3e-5,
        num_cycles=1,
    )
    for step in range(30):
        assert learning_rate(options, step, 30) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-6)
        optimiser.step()
        scheduler.step()


@pytest.mark.parametrize("warm_up", [0, 8])
def test_the_l1_coefficient_follows_saelens(warm_up):
    options = TrainingConfig(n_tokens=300, batch_size=10, l1_warm_up_steps=warm_up)
    spec = SAEConfig("sae", "relu", l1_coefficient=2.0).spec(6, 6, HOOK_OUT, HOOK_OUT, 0, ORIGIN)
    scheduler = CoefficientScheduler(warm_up_steps=warm_up, final_value=2.0)
    for step in range(20):
        assert l1_coefficient(spec, options, step) == pytest.approx(scheduler.value)
        scheduler.step()


@pytest.mark.parametrize(
    "change",
    [{"normalize_activations": "layer_norm"}, {"rescale_acts_by_decoder_norm": True}, {"apply_b_dec_to_input": False}],
)
def test_what_scales_at_run_time_opens_and_gives_what_saelens_gives(tmp_path, change):
    torch.manual_seed(0)
    TopKSAE(TopKSAEConfig(d_in=6, d_sae=16, k=3, metadata=SAEMetadata(hook_name="blocks.0.hook_mlp_out"))).save_model(
        tmp_path
    )
    config = json.loads((tmp_path / "cfg.json").read_text()) | change
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    x = torch.randn(20, 6)
    dictionary = load_dictionary(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(dictionary.forward(x), SAE.load_from_disk(tmp_path)(x))
    assert (dictionary.spec.activation == "topk") == (
        "apply_b_dec_to_input" in change and not config["rescale_acts_by_decoder_norm"]
    )
