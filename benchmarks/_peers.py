"""One training step of the peers (SAELens, sparsify, dictionary_learning) on a given batch, from given weights.

Shapes as in the library: N tokens, d inputs, p outputs (p = d for an SAE), n latents. SAELens's loss, against which the
others' are described, is the squared error summed over p and averaged over N, plus, with L1,
l1 × mean_t Σ_i f_ti ‖W_dec,i‖. All peers: float32, on the device of the problem's weights, Adam with betas 0.9 and
0.999, constant learning rate, no warm-up of any kind, no normalisation of activations, no logging. The batch is never
changed.

SAELens is in .venv. The other two are installed by `install` when they are first asked for, with the tools that
`benchmarks/features.py` is compared with and that exports are for.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from _steps import Problem
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent / ".venv-bench"
PINS = (
    "eai-sparsify==1.3.3",
    "dictionary-learning==0.1.0",
    "natsort==8.4.0",  # imported by sparsify
    "schedulefree==1.4.1",  # imported by sparsify
    "sae-dashboard==0.8.0",
    "eindex-callum==0.1.2",  # imported by SAEDashboard, with the next four
    "dataclasses-json==0.6.7",
    "marshmallow==3.26.1",
    "typing-inspect==0.9.0",
    "mypy-extensions==1.2.0",
    "eai-delphi==0.1.3",  # this and the next are read by tests/export
    "circuit-tracer==0.5.0",
    "asyncer==0.0.8",  # imported by delphi, with the next
    "orjson==3.13.0",
)
MANY = 1_000_000_000  # steps or samples: a run whose end the benchmark does not reach


class Peer(Protocol):
    name: str

    def step(self, x: Tensor, y: Tensor) -> float | Tensor:
        """One step, the optimiser's included, on x (N, d) and y (N, p); the loss before it, as the library defines it.

        Of an SAE y is not read.
        """

    def weights(self) -> dict[str, Tensor]:
        """Copies of W_enc (d, n), b_enc (n,), W_dec (n, p), b_dec (p,) as they are now."""


# -------------------------------------------------------------------- SAELens
def saelens(problem: Problem) -> Peer:
    """`SAETrainer.step`, defaults of TopKTrainingSAE and StandardTrainingSAE; every kind.

    Returns the loss above. b_dec is subtracted from an SAE's input. Of TopK, latents compete by pre-activation times
    the norm of their decoder row (rescale_acts_by_decoder_norm), and its auxiliary loss is 0 until a latent has been
    silent for a thousand steps. The gradient's norm is clipped to 1; Adam is not fused.

    SAELens trains no transcoder: that is a subclass of its standard SAE which splits rows of (x, y). Joining them,
    which its user would do when reading, is part of `step`: one copy of x and y.
    """
    return _SAELens(problem)


class _SAELens:
    name = "saelens"

    def __init__(self, problem: Problem) -> None:
        size = {"d_in": problem.d_in, "d_sae": problem.d_sae, "device": problem.device}
        if problem.kind == "topk":
            self.sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(**size, k=problem.k))
        elif problem.kind == "l1":
            self.sae = StandardTrainingSAE(StandardTrainingSAEConfig(**size, l1_coefficient=problem.l1))
        else:
            config = _TranscoderConfig(
                **size, d_out=problem.d_out, l1_coefficient=problem.l1, apply_b_dec_to_input=False
            )
            self.sae = _Transcoder(config)
        fill(problem, W_enc=self.sae.W_enc, b_enc=self.sae.b_enc, W_dec=self.sae.W_dec, b_dec=self.sae.b_dec)
        training = SAETrainerConfig(
            total_training_samples=MANY,
            train_batch_size_samples=4096,  # only a count that is reported depends on it
            lr=problem.lr,
            lr_end=problem.lr,
            device=problem.device,
        )
        self.trainer = SAETrainer(training, self.sae, iter(()))  # `step` is given its batch

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        taken = self.trainer.step(torch.cat([x, y], dim=1) if isinstance(self.sae, _Transcoder) else x)
        self.trainer.n_training_steps += 1  # as `fit` does
        return taken.loss.detach()

    def weights(self) -> dict[str, Tensor]:
        return copies(W_enc=self.sae.W_enc, b_enc=self.sae.b_enc, W_dec=self.sae.W_dec, b_dec=self.sae.b_dec)


@dataclass
class _TranscoderConfig(StandardTrainingSAEConfig):
    d_out: int = 0

    @classmethod
    def architecture(cls) -> str:
        return "transcoder"


class _Transcoder(StandardTrainingSAE):
    """SAELens's standard SAE with a target of its own."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_dec = torch.nn.Parameter(torch.zeros(self.cfg.d_sae, self.cfg.d_out, device=self.device))
        self.b_dec = torch.nn.Parameter(torch.zeros(self.cfg.d_out, device=self.device))

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """As in SAELens's Transcoder: the base class would subtract 0 × b_dec, of another shape than the input."""
        return self.run_time_activation_norm_fn_in(self.hook_sae_input(sae_in.to(self.dtype)))

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x, y = step_input.sae_in.split([self.cfg.d_in, self.cfg.d_out], dim=1)
        feature_acts, hidden_pre = self.encode_with_hidden_pre(x)
        sae_out = self.decode(feature_acts)
        squared_error = self.mse_loss_fn(sae_out, y).sum(dim=-1).mean()
        losses = {"mse_loss": squared_error, **self.calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)}
        return TrainStepOutput(x, sae_out, feature_acts, hidden_pre, squared_error + losses["l1_loss"], losses)


# -------------------------------------------------------------------- sparsify
def sparsify(problem: Problem) -> Peer | None:
    """SparseCoder and what sparsify's Trainer does with it for one batch; TopK only.

    None for L1, which it does not have, and for a transcoder whose d_out is not d_in, which its SparseCoder cannot be.
    Its transcoder is TopK too: it takes `problem.k`, and is None without; l1 is not used.

    Returns the fraction of variance unexplained: the batch's squared error over that of predicting the batch's mean.
    That is SAELens's squared error over a constant of the batch, which Adam all but cancels. Latents compete by
    pre-activation. Of an SAE (not of a transcoder) b_dec is subtracted from the input, the decoder's rows are set to
    norm 1 before each step, and the gradient along them is removed. Nothing is clipped.

    Its defaults, but for the optimiser, Adam instead of signum, and fused, which its own Adam is not; and b_dec stays
    the given one, as when it fine-tunes, instead of the first batch's mean. Its bookkeeping of latents that fire is
    part of the step.
    """
    if problem.kind == "l1" or problem.k is None or problem.d_in != problem.d_out:
        return None
    return _Sparsify(problem, problem.k)


class _Sparsify:
    name = "sparsify"

    def __init__(self, problem: Problem, k: int) -> None:
        install()
        if problem.device == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # where Triton is installed, it would be given these tensors
        with redirect_stdout(sys.stderr):  # it prints that Triton is off; the last line of stdout is the benchmark's
            from sparsify import SparseCoder, SparseCoderConfig

        config = SparseCoderConfig(num_latents=problem.d_sae, k=k, transcode=problem.kind == "transcoder")
        self.coder: Any = SparseCoder(problem.d_in, config, device=problem.device)
        encoder = self.coder.encoder
        fill(problem, W_enc=encoder.weight.T, b_enc=encoder.bias, W_dec=self.coder.W_dec, b_dec=self.coder.b_dec)
        self.unit_norm = config.normalize_decoder and not config.transcode
        self.optimiser = torch.optim.Adam(self.coder.parameters(), lr=problem.lr, fused=True)
        self.did_fire = torch.zeros(problem.d_sae, dtype=torch.bool, device=problem.device)
        self.tokens_since_fired = torch.zeros(problem.d_sae, dtype=torch.long, device=problem.device)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """After `Trainer.fit`, its `hook` and what follows, with one micro-batch and auxk_alpha = 0."""
        if not self.coder.cfg.transcode:
            y = x
        if self.unit_norm:
            self.coder.set_decoder_norm_to_unit_norm()
        found = self.coder(x=x, y=y, dead_mask=None, total_variance=(y - y.mean(0)).pow(2).sum())
        self.did_fire[found.latent_indices.flatten()] = True
        (found.fvu + found.multi_topk_fvu / 8).backward()  # the second is 0
        if self.unit_norm:
            self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[self.did_fire] = 0
        self.did_fire.zero_()
        return found.fvu.detach()

    def weights(self) -> dict[str, Tensor]:
        encoder = self.coder.encoder
        return copies(W_enc=encoder.weight.T, b_enc=encoder.bias, W_dec=self.coder.W_dec, b_dec=self.coder.b_dec)


# -------------------------------------------------------------------- dictionary_learning
def dictionary_learning(problem: Problem) -> Peer | None:
    """`TopKTrainer.update` for TopK, `StandardTrainerAprilUpdate.update` for L1.

    None for a transcoder: its trainers have one tensor for input and target.

    Returns the loss above, of TopK plus 1/32 of an auxiliary loss that is 0 until a latent has been silent for ten
    million tokens. L1 is the same mathematics as SAELens's, clipping included. (StandardTrainer is not taken: it keeps
    the decoder's norms at 1 and penalises plain activations.) Of TopK, latents compete by pre-activation, the gradient
    along the decoder's columns is removed before clipping, and the columns are set to norm 1 after each step; so the
    first step starts from the decoder as given. b_dec is subtracted from the input. Adam is not fused.

    Steps are counted from 1: at step 0 TopKTrainer would replace b_dec by the batch's geometric median. Its running
    threshold for inference, updated after step 1000, is left out.
    """
    if problem.kind == "transcoder":
        return None
    return _DictionaryLearning(problem)


class _DictionaryLearning:
    name = "dictionary_learning"

    def __init__(self, problem: Problem) -> None:
        install()
        skip_init("dictionary_learning")
        from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
        from dictionary_learning.trainers.top_k import TopKTrainer

        common = {
            "steps": MANY,
            "activation_dim": problem.d_in,
            "dict_size": problem.d_sae,
            "layer": 0,
            "lm_name": "",
            "lr": problem.lr,
            "warmup_steps": 0,
            "device": problem.device,
        }
        if problem.kind == "topk":
            self.trainer: Any = TopKTrainer(**common, k=problem.k)
            self.b_dec = self.trainer.ae.b_dec
        else:
            self.trainer = StandardTrainerAprilUpdate(**common, l1_penalty=problem.l1, sparsity_warmup_steps=None)
            self.b_dec = self.trainer.ae.bias
        encoder, decoder = self.trainer.ae.encoder, self.trainer.ae.decoder
        fill(problem, W_enc=encoder.weight.T, b_enc=encoder.bias, W_dec=decoder.weight.T, b_dec=self.b_dec)
        self.steps = 0
        self.compute_loss, self.trainer.loss = self.trainer.loss, self.keep_loss

    def keep_loss(self, x: Tensor, step: int) -> Tensor:
        """Stands in for the trainer's `loss`, which of the two only TopKTrainer's `update` returns, as a float."""
        self.loss = self.compute_loss(x, step=step)
        return self.loss

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.steps += 1
        self.trainer.update(self.steps, x)
        return self.loss.detach()

    def weights(self) -> dict[str, Tensor]:
        encoder, decoder = self.trainer.ae.encoder, self.trainer.ae.decoder
        return copies(W_enc=encoder.weight.T, b_enc=encoder.bias, W_dec=decoder.weight.T, b_dec=self.b_dec)


def skip_init(package: str) -> None:
    """Makes a package's modules importable without running its __init__.

    dictionary_learning's imports its buffer, and that nnsight, which traces language models, is not installed, and
    which no trainer needs.
    """
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None
        module = ModuleType(package)
        module.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = module


# -------------------------------------------------------------------- helpers
@torch.no_grad()
def fill(problem: Problem, **parameters: Tensor) -> None:
    """The problem's weights into parameters, which keep the memory layout that their library gave them."""
    for name, parameter in parameters.items():
        given = getattr(problem, name)
        if given.shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(given.shape)}, and should be {tuple(parameter.shape)}")
        parameter.copy_(given)


def copies(**parameters: Tensor) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def install() -> None:
    """The peers outside of .venv, once, into .venv-bench, found after everything in .venv.

    Without their dependencies: torch, transformers and the like are .venv's. Raises `RuntimeError` if pip fails.
    """
    marker = FOLDER / ".installed"
    pins = "\n".join(PINS) + "\n"
    if not marker.is_file() or marker.read_text() != pins:
        print(f"installing into {FOLDER.name}: {', '.join(PINS)}", file=sys.stderr, flush=True)
        shutil.rmtree(FOLDER, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary", ":all:", "--target", str(FOLDER)]
        quiet = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "15"]
        done = subprocess.run([*pip, *quiet, *PINS], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"pip could not install the peers into {FOLDER}; they need a package index once, afterwards none. "
                f"It said:\n{done.stderr.strip()}"
            )
        marker.write_text(pins)
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
