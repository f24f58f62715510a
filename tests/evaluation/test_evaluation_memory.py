"""How much memory an evaluation takes for a large vocabulary, in a process of its own."""

import subprocess
import sys

CODE = """
from pathlib import Path
import numpy as np, torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from evaluating import evaluate_all
from saeflow.dictionaries import Spec
from saeflow.dictionaries.sae import build

torch.set_num_threads(1)
D, VOCABULARY, CONTEXT, OUT = 16, 50257, 1024, "blocks.0.hook_mlp_out"
model = HookedTransformer(HookedTransformerConfig(
    n_layers=1, d_model=D, n_ctx=CONTEXT, d_head=8, d_mlp=16, d_vocab=VOCABULARY, act_fn="gelu",
    normalization_type="LN", seed=0, device="cpu")).eval().requires_grad_(False)
g = torch.Generator().manual_seed(0)
sae = build(Spec("sae", "relu", D, D, 64, OUT, OUT), torch.randn(D, 64, generator=g), torch.zeros(64),
            torch.randn(64, D, generator=g), torch.zeros(D))
rows = np.random.default_rng(0).integers(0, VOCABULARY, (4, CONTEXT))
held = lambda name: next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if name in x)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = held("VmRSS")
found = evaluate_all(model, [sae], torch.zeros(D), rows, 4)[0].summary
print(held("VmHWM") - before, found["ce_clean"])
"""


def test_a_batch_of_logits_would_take_more_than_the_evaluation() -> None:
    """Vocabulary 50,257, context 1,024: logits of one pass over the four rows are 786 MiB."""
    done = subprocess.run([sys.executable, "-c", CODE], cwd=__file__.rsplit("/", 2)[0], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    growth_kib, ce_clean = done.stdout.split()
    assert int(growth_kib) < 500 * 1024, f"{int(growth_kib) / 1024:.0f} MiB"
    assert 10 < float(ce_clean) < 12
