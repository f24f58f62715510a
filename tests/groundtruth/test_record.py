"""What the notebook prints of a dictionary, by SAELens's formulas, and latents by state, by hand."""

import numpy as np
import pytest
import torch

from saeflow.groundtruth.cases import get_case
from saeflow.groundtruth.labels import states
from saeflow.groundtruth.record import by_state, losses, state_names

PRE, ATTENTION = "blocks.0.hook_resid_pre", "blocks.1.hook_attn_out"


def test_losses_are_those_of_saelens_3() -> None:
    generator = torch.Generator().manual_seed(0)
    y, off, f = (torch.randn(50, n, generator=generator, dtype=torch.float64) for n in (6, 6, 9))
    out, f = y + 0.3 * off, f.relu()
    per_token_l2 = (out - y).pow(2).sum(-1)
    explained = 1 - per_token_l2 / (y - y.mean(0)).pow(2).sum(-1)
    found = losses(y.numpy(), out.numpy(), f.numpy())
    wanted = {
        "mse": torch.nn.functional.mse_loss(out, y, reduction="none").sum(-1).mean(),
        "l1": f.norm(p=1, dim=-1).mean(),
        "explained_variance": explained.mean(),
        "explained_variance_sd": explained.std(),
    }
    assert found == pytest.approx({name: value.item() for name, value in wanted.items()})


def test_a_token_at_the_mean_has_no_explained_variance_and_takes_part_in_the_rest() -> None:
    y = np.array([[1.0, 0], [-1, 0], [0, 0]])
    found = losses(y, np.zeros_like(y), np.ones((3, 2)))
    assert found == {"mse": pytest.approx(2 / 3), "l1": 2.0, "explained_variance": 0.0, "explained_variance_sd": 0.0}


def names_at(rows: np.ndarray, hook: str) -> list[str]:
    return state_names(get_case(3), rows, hook, states(get_case(3), rows, hook))


def test_states_have_the_names_that_the_notebook_gives_them() -> None:
    rows = get_case(3).rows()
    wanted = {f"{t}@{p}" for t in "abcx" for p in range(1, 5)} | {"BOS", "PAD"}
    assert set(names_at(rows, PRE)) == wanted
    fractions = {0.0} | {i / p for p in range(1, 5) for i in range(p + 1)}
    assert set(names_at(rows, ATTENTION)) == {f"frac_prevs={v:.3g}" for v in fractions}


def test_latents_by_state_are_counted_by_hand() -> None:
    case = get_case(3)
    rows = case.rows()
    x = case.program.token_id("x")
    f = np.zeros((rows.size, 3))
    at = ((rows == x) & (np.arange(5) == 2)).ravel()
    f[at, 1] = np.where(np.arange(at.sum()) % 2, 2.0, 0.0)
    found = by_state(names_at(rows, PRE), states(case, rows, PRE), f)
    (row,) = found.to_dict("records")
    assert (row["latent"], row["name"]) == (1, "x@2")
    assert (row["mean"], row["share"]) == (pytest.approx(f[at, 1].mean()), pytest.approx((f[at, 1] > 0).mean()))
    assert by_state(names_at(rows, PRE), states(case, rows, PRE), np.zeros((rows.size, 3))).empty
