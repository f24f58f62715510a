"""What training works on and what it asks of trainers, whichever kind of dictionary they train.

Units. With `normalize_activations=expected_average_only_in` training sees the input times sqrt(d_in) over its mean
norm, as in SAELens, and a transcoder's target times sqrt(d_out) over *its* mean norm (SAELens trains no transcoders);
with `per_head` each head of a hook is scaled so by its own root mean square norm. So an L1 coefficient means the same
at every site. `loss`, `squared_error` and `sparsity` in the metrics are in these units; the finished dictionary takes
and gives raw activations.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from saeflow.config import ConfigError, DictionaryConfig, TrainingConfig
from saeflow.dictionaries.sae import Scale
from saeflow.dictionaries.spec import Spec
from saeflow.training.metrics import TrainingError

if TYPE_CHECKING:
    from saeflow.training.trainer import Trainer


class Batches(Protocol):
    """Where batches come from: `saeflow.activations.reader.BatchReader`, or anything that does this."""

    def iterate(self, start: int, n_steps: int, /) -> Iterator[tuple[Tensor, ...]]:
        """Batches `start` to `start + n_steps - 1`: (x,) for an SAE, (x, y) for a transcoder; x (N, d), y (N, p)."""
        ...


class PartOfBatches(NamedTuple):
    """What one of several dictionaries that share batches reads of them."""

    batches: Batches
    part: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

    def iterate(self, start: int, n_steps: int, /) -> Iterator[tuple[Tensor, ...]]:
        return map(self.part, self.batches.iterate(start, n_steps))


@dataclass(frozen=True)
class HookStatistics:
    """What training needs to know of the activations at one hook."""

    mean: Tensor
    """(d,)"""
    mean_norm: float
    head_norms: Tensor | None = None
    """(heads,): root mean square norm of each head; None where the hook has no heads."""

    def scale(self, normalize_activations: str | None, device: str = "cpu") -> Scale:
        """What activations are multiplied with: a number, or a vector (d,). A head that is 0 everywhere stays so by any
        factor; its is 1."""
        d = self.mean.numel()
        if normalize_activations == "per_head":
            if self.head_norms is None:
                raise ConfigError(
                    "dictionary.normalize_activations=per_head needs a hook with heads (attn.hook_z, hook_q, ...)"
                )
            d_head = d // len(self.head_norms)
            scales = torch.where(self.head_norms == 0, 1.0, math.sqrt(d_head) / self.head_norms)
            return scales.repeat_interleave(d_head).float().to(device)
        return math.sqrt(d) / self.mean_norm if normalize_activations == "expected_average_only_in" else 1.0

    @property
    def silent_heads(self) -> list[int]:
        """Those that are 0 on every token, as pruned heads are."""
        return [] if self.head_norms is None else (self.head_norms == 0).nonzero()[:, 0].tolist()

    def by_head(self) -> list["HookStatistics"]:
        """Each head of a hook with heads, whose mean norm stands for here by its root mean square norm."""
        assert self.head_norms is not None
        each = zip(self.mean.view(len(self.head_norms), -1), self.head_norms, strict=True)
        return [HookStatistics(mean, float(norm), norm[None]) for mean, norm in each]


class Inputs(NamedTuple):
    """What a job gives to the trainer of its dictionary's kind."""

    config: DictionaryConfig
    specs: list[Spec]
    """Of all that it trains as one."""
    training: TrainingConfig
    statistics: list[HookStatistics]
    """Of each hook that it reads."""
    device: str
    on_row: Callable[[dict[str, float]], None]
    block: Callable[[], Any]
    """Opens the language model's block between its hooks."""


Tables = dict[str, list[dict[str, Any]]]


class DictionaryTrainer(Protocol):
    """What the loop asks of a kind's trainer, which trains one dictionary or several as one."""

    @classmethod
    def of_job(cls, inputs: Inputs) -> "DictionaryTrainer": ...
    @property
    def parts(self) -> "dict[str, Trainer]": ...  # what is saved, by the name of its folder in the artifact
    @property
    def step(self) -> int: ...
    @property
    def n_steps(self) -> int: ...
    def train_step(self, batch: tuple[Tensor, ...]) -> None: ...
    def resamples_next(self) -> bool: ...
    def resample(self, batches: Batches) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def restore(self, state: dict[str, Tensor]) -> None: ...
    def tables(self) -> Tables: ...  # what is written beside the parts' metrics: rows, by the name of the file
    def text(self) -> str: ...  # the `table.txt` of the artifact, '' for none
    def summary(self) -> str: ...  # how training ended, for people


class SeveralTrainers:
    """Trains several dictionaries as one, step by step: what the trainers of such kinds share."""

    training: TrainingConfig
    described: str
    """Which several."""

    @property
    def parts(self) -> "dict[str, Trainer]":
        raise NotImplementedError

    @property
    def first(self) -> "Trainer":
        return next(iter(self.parts.values()))

    @property
    def step(self) -> int:
        return self.first.step

    @property
    def n_steps(self) -> int:
        return self.first.n_steps

    def resamples_next(self) -> bool:
        """Whether `resample` is to be called before the next step."""
        return self.first.resamples_next()

    def tables(self) -> Tables:
        return {}

    def text(self) -> str:
        return ""

    def state(self) -> dict[str, Tensor]:
        """All that the coming steps and the metrics depend on."""
        # parts may share memory, of which a checkpoint wants a copy each
        return {f"{name}.{key}": t.clone() for name, part in self.parts.items() for key, t in part.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes on from `state`. Raises `TrainingError` for another dictionary's."""
        names = {key.split(".")[0] for key in state if "." in key}
        if names != set(self.parts):
            raise TrainingError(
                f"this is the state of another dictionary: of {', '.join(sorted(names)) or 'one'}, not of "
                f"{self.described}"
            )
        for name, part in self.parts.items():
            part.restore({key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.")})
