"""What a latent is worth where it fires: how much the loss rises when it is ablated at one token.

At a token on which it fires, what the latent writes is taken out of the model's own activation (what the dictionary
does not explain stays), and the cross-entropy of the prediction made there is compared with the clean one. Many tokens
of a row are ablated in one pass, none of which sees another's ablation (`saeflow.models.alone`).
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeflow.dictionaries import Dictionary
from saeflow.features.order import ranks
from saeflow.features.text import Text
from saeflow.jobs.progress import progress
from saeflow.kernels.next_token import cross_entropy
from saeflow.models.alone import each_alone
from saeflow.models.protocol import unembedding
from saeflow.models.splicing import CleanPass, flattened, run_clean, run_spliced

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


class Samples(NamedTuple):
    """Firings of one dictionary, (S,) each, sorted by token."""

    latent: np.ndarray
    token: np.ndarray
    value: np.ndarray


class Task(NamedTuple):
    dictionary: Dictionary
    samples: Samples


def loss_increases(
    model: "HookedTransformer", tasks: list[Task], text: Text, batch_rows: int
) -> list[np.ndarray]:  # fmt: skip
    """Of each task's samples the rise in loss, (S,) nats. No sample may be at the last position of a row."""
    found = [np.zeros(len(task.samples.token)) for task in tasks]
    rows_of = [text.grid().row_and_position(task.samples.token)[0] for task in tasks]
    # of the same rows whatever tasks there are, so that sums are in the same order
    wanted = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *rows_of]) // batch_rows)
    hooks = {task.dictionary.spec.hook_name_out for task in tasks}
    with each_alone(model) as recorder, torch.no_grad():
        for batch in progress(wanted, "ablating", len(wanted), "batches"):
            rows = np.arange(len(text.tokens))[batch * batch_rows :][:batch_rows]
            tokens = torch.from_numpy(text.tokens[rows].astype(np.int64)).to(model.cfg.device)
            recorder.clean = True
            clean = run_clean(model, tokens, hooks, hooks)
            recorder.clean = False
            some = [slice(*np.searchsorted(of_task, [rows[0], rows[-1] + 1])) for of_task in rows_of]
            parts = [Task(one, Samples(*(c[s] for c in of_one))) for (one, of_one), s in zip(tasks, some, strict=True)]
            for increase, here, rises in zip(found, some, _of_batch(model, parts, clean, rows[0], text), strict=True):
                increase[here] = rises
    return found


def _of_batch(
    model: "HookedTransformer", tasks: list[Task], clean: CleanPass, first_row: int, text: Text
) -> list[np.ndarray]:  # fmt: skip
    """Of the samples in a batch of rows. Those of all tasks of one site share passes, in which those at one token take
    turns."""
    places, finals = [], [clean.final.new_empty(0)] * len(tasks)
    for task in tasks:
        row, position = text.grid().row_and_position(task.samples.token)
        places.append(torch.from_numpy((row - first_row) * text.context_size + position).to(clean.final.device))
    sites: dict[tuple[str, int | None], list[int]] = {}
    for i, task in enumerate(tasks):
        spec = task.dictionary.spec
        sites.setdefault((spec.hook_name_out, spec.hook_head_index), []).append(i)
    for (hook, head), members in sites.items():
        of_site = torch.cat([places[i] for i in members])
        written = torch.cat([_written(tasks[i], clean.final.device) for i in members])
        after = _passes(model, clean, hook, head, of_site, written)
        for i, final in zip(members, after.split([len(places[i]) for i in members]), strict=True):
            finals[i] = final
    W_U, b_U, softcap = unembedding(model)
    used, where = torch.unique(torch.cat(places), return_inverse=True)
    target, before = clean.tokens.flatten(), clean.final.flatten(0, 1)
    ce = cross_entropy(W_U, b_U, softcap, target[used + 1], before[used])[where].split([len(place) for place in places])
    found = []
    for place, final, clean_ce in zip(places, finals, ce, strict=True):
        ablated = cross_entropy(W_U, b_U, softcap, target[place + 1], final)
        found.append((ablated.double() - clean_ce.double()).cpu().numpy())
    return found


def _written(task: Task, device: torch.device) -> Tensor:
    """(S, p)"""
    latent, value = (torch.from_numpy(column).to(device) for column in (task.samples.latent, task.samples.value))
    return task.dictionary.writes(latent, value)


def _passes(
    model: "HookedTransformer", clean: CleanPass, hook: str, head: int | None, place: Tensor, written: Tensor
) -> Tensor:
    """Final values (S, D) at `place` (S,) of a batch, where `written` (S, p) is taken out there alone."""
    order = np.argsort(place.cpu().numpy(), kind="stable")
    turn = np.empty_like(order)
    turn[order] = ranks(place.cpu().numpy()[order])
    before = flattened(clean.values[hook], head)
    finals = clean.final.new_empty(len(place), clean.final.shape[-1])
    for n in range(int(turn.max(initial=-1)) + 1):
        now = torch.from_numpy(turn == n).to(place.device)
        ablated = before.clone()
        ablated[place[now]] -= written[now]
        finals[now] = run_spliced(model, clean, hook, ablated, head).flatten(0, 1)[place[now]]
    return finals
