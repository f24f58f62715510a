"""Nine dictionaries evaluated together, against one at a time as notebook 004 does it and as SAELens does it.

Last line: {"embedded.naive_over_shared", "pythia410m_shape.naive_over_shared", "embedded.saelens_over_shared",
"max_relative_difference", "peak_bytes", ...}.

`embedded`: four SAEs of the MLP's output and five transcoders (ReLU, 1,024 latents) at layer 2 of the embedded model,
held-out text. `pythia410m_shape`: the same at layer 15 of a random parallel-block model of 24 layers, 50,304 tokens of
vocabulary and context 128, d_model reduced to 256, 8,192 latents. naive: notebook 004's loop over dictionaries, with
the baselines as SAELens's `run_evals` computes them: for each dictionary and batch three full passes with all logits
(clean, replaced, zero-ablated), cross-entropy and KL. shared: baselines and evaluation as the workflow's jobs make
them, mean ablation, all other metrics and intervals included. saelens: SAELens's own `run_evals` of nine SAEs, on all
the tokens, over ours of the same. The largest relative difference is over l0, the losses (clean, replaced,
zero-ablated) and KL from the clean model.

peak_bytes: growth of memory in use, above the model, while a vocabulary of 50,257 with context 1,024 is evaluated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--tokens", type=int, default=8192, help="of the embedded model; a quarter of them of the other")
parser.add_argument("--only", choices=("embedded", "saelens", "pythia410m_shape", "peak"), help="one part")
parser.add_argument("--measure-peak", action="store_true", help=argparse.SUPPRESS)
args = parser.parse_args()
os.environ.update({"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
warnings.simplefilter("ignore")

import numpy as np  # noqa: E402 (after the number of threads is set)
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from saeflow.config import EvaluationConfig, ModelConfig  # noqa: E402
from saeflow.dictionaries import Dictionary, Spec  # noqa: E402
from saeflow.dictionaries.sae import build  # noqa: E402
from saeflow.evaluation.baseline import AblationSite, measure_baselines  # noqa: E402
from saeflow.evaluation.evaluate import EvaluationTask, evaluate  # noqa: E402
from saeflow.models.loading import load_model  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("l0", "ce_clean", "ce_replaced", "ce_zero", "kl")
Found = list[dict[str, float]]


def main() -> None:
    torch.set_num_threads(args.threads)
    if args.measure_peak:
        print(peak_bytes())
        return
    found: dict[str, float] = {}
    differences = [0.0]
    if args.only in (None, "embedded", "saelens"):
        folder = ROOT / "resources/model"
        model = load_model(folder, ModelConfig("embedded", path=str(folder)), "cpu")
        rows = held_out_rows(folder, args.tokens // 256)
    if args.only in (None, "embedded"):
        some = dictionaries(model, rows, layer=2, n_sae=1024)
        measure("embedded", model, rows, some, found, differences)
    if args.only in (None, "saelens"):
        saes = dictionaries(model, rows, layer=2, n_sae=1024, kinds=["sae"] * 9)
        seconds = alternate(
            {"saelens": lambda: saelens(model, saes, rows), "shared": lambda: shared(model, saes, rows)}
        )
        found["embedded.saelens_over_shared"] = seconds["saelens"] / seconds["shared"]
    if args.only in (None, "pythia410m_shape"):
        model = random_model(n_layers=24, d_model=256, n_heads=16, d_vocab=50304, n_ctx=128)
        rows = np.random.default_rng(0).integers(0, 50304, (max(1, args.tokens // 4 // 128), 128))
        some = dictionaries(model, rows, layer=15, n_sae=8192)
        measure("pythia410m_shape", model, rows, some, found, differences)
    found["max_relative_difference"] = max(differences)
    if args.only in (None, "peak"):
        command = [sys.executable, __file__, "--measure-peak", "--threads", str(args.threads)]
        found["peak_bytes"] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}))


def measure(
    name: str,
    model: Any,
    rows: np.ndarray,
    some: list[Dictionary],
    found: dict[str, float],
    differences: list[float],
) -> None:
    results: dict[str, Found] = {}

    def keep(side: str, made: Found) -> None:
        results[side] = made

    seconds = alternate(
        {
            "naive": lambda: keep("naive", naive(model, some, rows)),
            "shared": lambda: keep("shared", shared(model, some, rows)),
        }
    )
    for theirs, ours in zip(results["naive"], results["shared"], strict=True):
        differences += [abs(ours[n] - theirs[n]) / abs(theirs[n]) for n in NAMES]
    found[f"{name}.naive_over_shared"] = seconds["naive"] / seconds["shared"]
    found[f"{name}.shared_s"] = seconds["shared"]
    found[f"{name}.one_added_s"] = alternate({"one": lambda: shared(model, some[:1], rows)})["one"]


def alternate(sides: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each side; the first round is warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(args.repeats + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            took = time.perf_counter() - started
            print(f"repeat {repeat} {name}: {took:.2f} s", file=sys.stderr)
            if repeat:
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}


# -------------------------------------------------------------------- the sides
def shared(model: Any, some: list[Dictionary], rows: np.ndarray) -> Found:
    hook = some[0].spec.hook_name_out
    (baseline,) = measure_baselines(model, [AblationSite(hook, torch.zeros(model.cfg.d_model))], rows, True, 16)
    studies = [EvaluationTask(dictionary, baseline) for dictionary in some]
    return [e.summary for e in evaluate(model, studies, rows, True, EvaluationConfig(16))]


@torch.no_grad()
def naive(model: Any, some: list[Dictionary], rows: np.ndarray) -> Found:
    """Notebook 004's loop, with the clean and the zero-ablated pass that SAELens makes beside the replaced one."""
    found = []
    for dictionary in some:
        sums = dict.fromkeys(NAMES, 0.0)
        for tokens in torch.from_numpy(rows).split(16):
            acts: list[Tensor] = []

            def read(x: Tensor, hook: Any, acts: list[Tensor] = acts, dictionary: Dictionary = dictionary) -> None:
                acts.append(torch.relu(x @ dictionary.W_enc + dictionary.b_enc))

            def write(y: Tensor, hook: Any, acts: list[Tensor] = acts, dictionary: Dictionary = dictionary) -> Tensor:
                return acts[0] @ dictionary.W_dec + dictionary.b_dec

            hooks = [(dictionary.spec.hook_name, read), (dictionary.spec.hook_name_out, write)]
            zero = [(dictionary.spec.hook_name_out, lambda y, hook: torch.zeros_like(y))]
            logits, loss = model(tokens, return_type="both")
            logits_replaced, loss_replaced = model.run_with_hooks(tokens, return_type="both", fwd_hooks=hooks)
            _, loss_zero = model.run_with_hooks(tokens, return_type="both", fwd_hooks=zero)
            log_p, log_q = (v[:, :-1].log_softmax(-1) for v in (logits, logits_replaced))
            weight = len(tokens) / len(rows)
            sums["kl"] += weight * (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
            sums["l0"] += weight * (1.0 * (acts[0] > 0)).flatten(0, 1).sum(1).mean().item()
            sums["ce_clean"] += weight * loss.item()
            sums["ce_replaced"] += weight * loss_replaced.item()
            sums["ce_zero"] += weight * loss_zero.item()
        found.append(sums)
    return found


def saelens(model: Any, saes: list[Dictionary], rows: np.ndarray) -> None:
    from sae_lens import SAE
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    from saeflow.dictionaries import save_dictionary

    n_batches = -(-len(rows) // 16)
    config = EvalConfig(
        16, n_batches, True, True, n_batches, True, True, True, compute_featurewise_density_statistics=True
    )
    for dictionary in saes:
        with tempfile.TemporaryDirectory() as folder:
            save_dictionary(dictionary, folder)
            sae = SAE.load_from_disk(folder, device="cpu")
        batches = iter(torch.from_numpy(rows).split(16) * 2)
        store: Any = SimpleNamespace(get_batch_tokens=lambda _, batches=batches: next(batches))
        store.reset_input_dataset, store.context_size = (lambda: None), rows.shape[1]
        run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=False)


# -------------------------------------------------------------------- what is evaluated
def dictionaries(
    model: Any, rows: np.ndarray, layer: int, n_sae: int, kinds: list[str] | None = None
) -> list[Dictionary]:
    """Random ones whose latents fire on 2 to 42 % of the tokens."""
    hook_in, hook_out = f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out"
    d = model.cfg.d_model
    some = []
    _, cache = model.run_with_cache(torch.from_numpy(rows[:2]), names_filter=[hook_in, hook_out])
    for i, kind in enumerate(kinds or ["sae"] * 4 + ["transcoder"] * 5):
        g = torch.Generator().manual_seed(i)
        hook = hook_in if kind == "transcoder" else hook_out
        W_enc, W_dec = (torch.randn(shape, generator=g) / d**0.5 for shape in ((d, n_sae), (n_sae, d)))
        pre = cache[hook].flatten(0, 1) @ W_enc
        # Off the quantile, which may be a token's own value: rounding would decide whether the latent fires there.
        b_enc = 0.003 - torch.quantile(pre, 1 - 0.021 * 20 ** (i / 8), dim=0)
        scale = cache[hook_out].std() / ((pre + b_enc).relu() @ W_dec).std()
        spec = Spec(kind, "relu", d, d, n_sae, hook, hook_out, l1_coefficient=float(i))  # type: ignore[arg-type]
        some.append(build(spec, W_enc, b_enc, W_dec * scale, torch.zeros(d)))
    return some


def held_out_rows(folder: Path, n_rows: int) -> np.ndarray:
    from saeflow.text.corpus import read_documents
    from saeflow.text.tokenizer import load_tokenizer
    from saeflow.text.tokens import open_tokens, write_tokens

    with tempfile.TemporaryDirectory() as out:
        write_tokens(
            Path(out),
            read_documents(ROOT / "resources/corpus.jsonl.gz"),
            load_tokenizer(folder),
            split="held_out",
            n_rows=n_rows,
            context_size=256,
            prepend_bos=True,
            held_out_fraction=0.1,
            tokenizer_digest="",
        )
        return open_tokens(out)[:].astype(np.int64)


def random_model(n_layers: int, d_model: int, n_heads: int, d_vocab: int, n_ctx: int) -> Any:
    """A TransformerLens model with Pythia's kind of block, and random weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_ctx=n_ctx,
        d_head=d_model // n_heads,
        n_heads=n_heads,
        d_mlp=4 * d_model,
        d_vocab=d_vocab,
        act_fn="gelu",
        normalization_type="LN",
        positional_embedding_type="rotary",
        rotary_dim=d_model // n_heads // 4,
        parallel_attn_mlp=True,
        seed=0,
        device="cpu",
    )
    return HookedTransformer(config).eval().requires_grad_(False)


def peak_bytes() -> int:
    """Eight rows of 1,024 tokens at once, nine dictionaries."""
    model = random_model(n_layers=4, d_model=256, n_heads=16, d_vocab=50257, n_ctx=1024)
    rows = np.random.default_rng(0).integers(0, 50257, (8, 1024))
    some = dictionaries(model, rows, layer=2, n_sae=8192)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = memory("VmRSS")
    shared(model, some, rows)
    return memory("VmHWM") - before


def memory(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


main()
