"""`saeflow.jacobian` against notebook 003's loop, its einsum, and autograd over all latents; and as the docs use it."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.jacobians.test_study import INTO, OUT, relu_sae, topk_sae
from torch import Tensor

import saeflow
from saeflow.config import ModelConfig
from saeflow.dictionaries import Dictionary, DictionaryError, save_dictionary
from saeflow.dictionaries.sae import build
from saeflow.models.blocks import MLP
from saeflow.models.loading import load_model
from saeflow.models.splicing import read_hooks

DOUBLE, K = torch.float64, 6
G = torch.Generator().manual_seed(0)
WEIGHTS = [0.3 * torch.randn(shape, generator=G, dtype=DOUBLE) for shape in ((32, 20), (20,), (20, 32), (32,))]
X = torch.randn(5, 32, generator=G, dtype=DOUBLE)
SAES = topk_sae("in", k=K, seed=1, dtype=DOUBLE), topk_sae("out", k=K, seed=2, dtype=DOUBLE)


def by_the_notebook(sae_in: Dictionary, sae_out: Dictionary) -> tuple[Tensor, ...]:
    """Its `get_jacobian_slow` and `get_jacobian_fast`, as printed, (N, k_in, k_out) each; the same by autograd, as
    notebook 000 has it: all n x n of it at the latents, cut out; the latents, (N, k) each, and which output latents are
    above 0. Its encoders have no ReLU."""
    W_in, b_in, W_out, b_out = WEIGHTS
    wd1, w2e = sae_in.W_dec @ W_in, W_out @ sae_out.W_enc
    pre = sae_in.pre_activations(X)
    top, A = pre.topk(K, dim=1)
    hidden = (torch.zeros_like(pre).scatter_(1, A, top) @ sae_in.W_dec + sae_in.b_dec) @ W_in + b_in
    grad = (hidden > 0).double()
    values, B = sae_out.pre_activations(hidden.relu() @ W_out + b_out).topk(K, dim=1)
    slow = torch.zeros(len(X), K, K, dtype=DOUBLE)
    for t in range(len(X)):
        for o in range(K):
            for i in range(K):
                slow[t, i, o] = (wd1[A[t, i]] * grad[t] * w2e[:, B[t, o]]).sum()
    fast = torch.einsum("tim,tm,mto->tio", wd1[A], grad, w2e[:, B])

    def sandwich(latents: Tensor) -> Tensor:
        return sae_out.pre_activations(((latents @ sae_in.W_dec + sae_in.b_dec) @ W_in + b_in).relu() @ W_out + b_out)

    found = []
    for t in range(len(X)):
        latents = torch.zeros(sae_in.d_sae, dtype=DOUBLE).index_put((A[t],), top[t])
        whole = torch.autograd.functional.jacobian(lambda s: sandwich(s[None])[0], latents)
        found.append(whole[B[t]][:, A[t]].T)
    return slow, fast, torch.stack(found), A, B, values > 0


def dense(found: Any, n: int = 80) -> Tensor:
    """(N, n, n): by output and input latent."""
    made = torch.zeros(len(found.J), n, n, dtype=found.J.dtype)
    t = torch.arange(len(found.J))[:, None, None]
    return made.index_put_((t, found.outputs[:, :, None], found.inputs[:, None]), found.J, accumulate=True)


def test_the_notebooks_three_ways_find_the_same() -> None:
    assert SAES[0].pre_activations(X).topk(K, dim=1).values.min() > 0  # here a ReLU would do nothing
    slow, fast, automatic, A, B, positive = by_the_notebook(*SAES)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(automatic, slow, rtol=1e-12, atol=1e-12)
    found = saeflow.jacobian(*SAES, MLP("relu", *WEIGHTS), X, at="reconstruction")
    theirs = torch.zeros(len(X), 80, 80, dtype=DOUBLE)
    t = torch.arange(len(X))[:, None, None]
    theirs[t, B[:, :, None], A[:, None]] = slow.transpose(1, 2) * positive[:, :, None]
    torch.testing.assert_close(dense(found), theirs, rtol=1e-12, atol=1e-12)
    assert (found.J != 0).sum() > 0.5 * found.J.numel()


@pytest.mark.parametrize("kind", ["topk", "relu"])
@pytest.mark.parametrize("given", ["weights", "function"])
def test_every_entry_is_that_of_autograd_at_x(kind: str, given: str) -> None:
    saes = SAES if kind == "topk" else tuple(_double(relu_sae(h, seed=s)) for h, s in (("in", 1), ("out", 2)))
    W_in, b_in, W_out, b_out = WEIGHTS

    def f(value: Tensor) -> Tensor:
        return torch.nn.functional.gelu(value @ W_in + b_in) @ W_out + b_out

    found = saeflow.jacobian(*saes, MLP("gelu", *WEIGHTS) if given == "weights" else f, X)
    on = [sae.encode(values) > 0 for sae, values in zip(saes, (X, f(X)), strict=True)]
    wanted = through(f, *saes, X) * on[1][:, :, None] * on[0][:, None]
    torch.testing.assert_close(dense(found), wanted, rtol=1e-9, atol=1e-9)
    counted = (on[1].sum(1) * on[0].sum(1)) if kind == "relu" else torch.full((5,), K * K)
    assert torch.equal(found.n_entries, counted)


def through(f: Callable[[Tensor], Tensor], sae_in: Dictionary, sae_out: Dictionary, x: Tensor) -> Tensor:
    """(N, n, n): the Jacobian of f at each row of x by autograd, between all latents."""
    each = [torch.autograd.functional.jacobian(lambda v: f(v[None])[0], row) for row in x]
    return torch.stack([sae_out.W_enc.T @ J_f @ sae_in.W_dec.T for J_f in each])


def _double(sae: Dictionary) -> Dictionary:
    return build(sae.spec, **{name: tensor.double() for name, tensor in sae.tensors.items()})


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DictionaryError, match=r"x has shape \(5, 31\), but sae_in reads rows of 32 values"):
        saeflow.jacobian(*SAES, MLP("relu", *WEIGHTS), X[:, :31])
    gated = build(SAES[0].spec, **SAES[0].tensors)
    gated.spec = replace(gated.spec, activation="saelens", saelens="gated")
    with pytest.raises(DictionaryError, match="sae_out is a gated that only SAELens computes: use TopK, ReLU or Jump"):
        saeflow.jacobian(SAES[0], gated, MLP("relu", *WEIGHTS), X)


def test_the_snippet_of_the_docs_runs(tmp_path: Path, neox_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "jacobian.md").read_text()
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "saeflow.jacobian(" in code]
    saes = topk_sae(INTO, seed=1), topk_sae(OUT, seed=2)
    for name, sae in zip(("sae_in", "sae_out"), saes, strict=True):
        (tmp_path / name).mkdir()
        save_dictionary(sae, tmp_path / name)
    (tmp_path / "model").symlink_to(neox_folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet, names)
    model = load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder)), "cpu")
    x, y = (v[0] for v in read_hooks(model, torch.tensor([[0, 5, 17, 42]]), [INTO, OUT]))
    on = [sae.encode(values) > 0 for sae, values in zip(saes, (x, y), strict=True)]
    wanted = through(lambda v: model.blocks[1].apply_mlp(v[None])[0], *saes, x) * on[1][:, :, None] * on[0][:, None]
    torch.testing.assert_close(dense(names["found"]), wanted, rtol=1e-4, atol=1e-5)
