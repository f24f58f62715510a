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
from saeflow.kernels.next_token import next_token_losses
from saeflow.models.alone import each_alone
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
    rows_of = [text.place(task.samples.token)[0] for task in tasks]
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
            for task, of_task, increase in zip(tasks, rows_of, found, strict=True):
                begin, end = np.searchsorted(of_task, [rows[0], rows[-1] + 1])
                some = Samples(*(column[begin:end] for column in task.samples))
                increase[begin:end] = _of_batch(model, task.dictionary, some, clean, rows, text)
    return found


def _of_batch(
    model: "HookedTransformer", dictionary: Dictionary, samples: Samples, clean: CleanPass, rows: np.ndarray, text: Text
) -> np.ndarray:
    """Of the samples in a batch of `rows`. Those at one token take turns."""
    spec, device = dictionary.spec, clean.final.device
    row, position = text.place(samples.token)
    place = torch.from_numpy((row - rows[0]) * text.context_size + position).to(device)  # (S,) in the batch
    latent, value = (torch.from_numpy(column).to(device) for column in (samples.latent, samples.value))
    written = dictionary.writes(latent, value)
    turn = torch.from_numpy(ranks(samples.token)).to(device)
    before = flattened(clean.values[spec.hook_name_out], spec.hook_head_index)
    finals = clean.final.flatten(0, 1).new_empty(len(place), clean.final.shape[-1])
    for n in range(int(turn.max()) + 1 if len(turn) else 0):
        now = turn == n
        ablated = before.clone()
        ablated[place[now]] -= written[now]
        final = run_spliced(model, clean, spec.hook_name_out, ablated, spec.hook_head_index)
        finals[now] = final.flatten(0, 1)[place[now]]
    return _increase(model, clean, place, finals)


def _increase(model: "HookedTransformer", clean: CleanPass, place: Tensor, finals: Tensor) -> np.ndarray:
    """Of final values (S, D) at places of a batch, (S,)."""
    W_U, b_U, softcap = model.unembed.W_U.contiguous(), model.unembed.b_U, model.cfg.output_logits_soft_cap
    before, target = clean.final.flatten(0, 1)[place], clean.tokens.flatten()[place + 1]
    ce, (ablated,) = next_token_losses(W_U, b_U, softcap, target, before, [finals])
    increase: np.ndarray = (ablated.ce.double() - ce.double()).cpu().numpy()
    return increase
