"""Dictionaries that only SAELens computes (gated, AbsTopK, matching pursuit, and what scales at run time), behind the
interface of `Dictionary`. Importing this takes ten seconds.
"""

from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from torch import Tensor

from saeflow.dictionaries.sae import Dictionary, Scale
from saeflow.dictionaries.spec import DictionaryError, Spec

WRITTEN = 256  # latents that are decoded at once, each beside zeros for all others


class SAELensDictionary(Dictionary):
    """A dictionary that only SAELens computes: `sae` is its class for use."""

    def __init__(self, spec: Spec, sae: Any) -> None:
        self.spec, self.sae = spec, sae.eval().requires_grad_(False)
        self.sae.turn_off_forward_pass_hook_z_reshaping()  # heads come flattened

    @classmethod
    def load(cls, folder: Path, spec: Spec, device: str) -> "SAELensDictionary":
        """Raises `DictionaryError` for what SAELens cannot open."""
        try:
            return cls(spec, SAE.load_from_disk(folder, device=device))
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise DictionaryError(f"SAELens cannot open the dictionary in {folder}: {error}") from error

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self.sae.state_dict())

    def pre_activations(self, x: Tensor) -> Tensor:
        raise DictionaryError(f"SAELens's {self.spec.saelens} has no pre-activations that could stand for its latents")

    def encode(self, x: Tensor) -> Tensor:
        """x (N, d) -> activations of all latents (N, n), zeros included."""
        if x.shape[-1] != self.d_in:
            raise DictionaryError(f"this dictionary of {self.spec.hook_name} takes activations {self.d_in} wide")
        f: Tensor = self.sae.encode(x)
        return f.to_dense() if f.is_sparse else f

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        found: Tensor = self.sae.W_dec
        return found

    def writes(self, latents: Tensor, values: Tensor) -> Tensor:
        """Raises `DictionaryError` where it depends on what `encode` saw."""
        if self.sae.cfg.normalize_activations not in ("none", "expected_average_only_in"):
            raise DictionaryError(
                f"it normalises activations by {self.sae.cfg.normalize_activations} at run time, so that what a latent "
                "writes depends on the token"
            )
        nothing = values.new_zeros(1, self.d_sae)
        found = []
        for latent, value in zip(latents.split(WRITTEN), values.split(WRITTEN), strict=True):
            f = nothing.repeat(len(latent), 1).scatter_(1, latent[:, None], value[:, None])
            found.append(self.sae.decode(f) - self.sae.decode(nothing))
        return torch.cat(found) if found else values.new_zeros(0, self.d_out)

    def decode(self, f: Tensor, x: Tensor | None = None) -> Tensor:
        """f (N, n) -> (N, p). What SAELens scales at run time is scaled back by what `encode` saw last."""
        y: Tensor = self.sae.decode(f)
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), x)

    def to(self, device: str | torch.device) -> "SAELensDictionary":
        return type(self)(self.spec, self.sae.to(device))

    def with_scaling_folded(self, scale_in: Scale, scale_out: Scale) -> Dictionary:
        raise DictionaryError("scaling is folded into SAELens's classes by SAELens")

    def with_unit_decoder(self) -> Dictionary:
        raise DictionaryError("norms are folded into SAELens's classes by SAELens")
