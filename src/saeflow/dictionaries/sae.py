"""Sparse dictionaries that are ready to use: an SAE reconstructs a hook, a transcoder predicts one hook from another.

Both compute  f = act((x - c) W_enc + b_enc)  and  y = f W_dec + b_dec,  with c = b_dec for an SAE and 0 for a
transcoder. The weights take raw activations; whatever scaling was used in training is folded into them.

Shapes: N tokens, d = `d_in`, p = `d_out`, n = `d_sae`.
"""

import torch
from torch import Tensor

from saeflow.dictionaries.spec import DictionaryError, Spec


class Dictionary:
    """What SAEs and transcoders share: W_enc (d, n), b_enc (n,), W_dec (n, p), b_dec (p,), and `spec`."""

    def __init__(self, spec: Spec, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> None:
        d, p, n = spec.d_in, spec.d_out, spec.d_sae
        wanted = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, p), "b_dec": (p,)}
        given = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        for name, shape in wanted.items():
            if tuple(given[name].shape) != shape:
                raise DictionaryError(f"{name} has shape {tuple(given[name].shape)}, but the sizes say {shape}")
        self.spec = spec
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = W_enc, b_enc, W_dec, b_dec

    @property
    def d_in(self) -> int:
        return self.spec.d_in

    @property
    def d_out(self) -> int:
        return self.spec.d_out

    @property
    def d_sae(self) -> int:
        return self.spec.d_sae

    def pre_activations(self, x: Tensor) -> Tensor:
        """x (N, d) -> (N, n), before the activation function."""
        if x.shape[-1] != self.d_in:
            raise DictionaryError(
                f"this dictionary of {self.spec.hook_name} takes activations {self.d_in} wide, got {tuple(x.shape)}; "
                "are they from another hook or model?"
            )
        return torch.addmm(self.b_enc, self._centred(x), self.W_enc)

    def _centred(self, x: Tensor) -> Tensor:
        return x

    def top_latents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, d) -> values (N, k) after ReLU, so some may be 0, and indices (N, k). Only with TopK."""
        if self.spec.k is None:
            raise DictionaryError("top_latents needs a TopK dictionary; with ReLU any number can be active: use encode")
        values, indices = torch.topk(self.pre_activations(x), self.spec.k, dim=1, sorted=False)
        return values.relu_(), indices

    def encode(self, x: Tensor) -> Tensor:
        """x (N, d) -> activations of all latents (N, n), zeros included."""
        if self.spec.activation == "relu":
            return self.pre_activations(x).relu_()
        values, indices = self.top_latents(x)
        return values.new_zeros(x.shape[0], self.d_sae).scatter_(1, indices, values)

    def decode(self, f: Tensor) -> Tensor:
        """f (N, n) -> (N, p)."""
        return torch.addmm(self.b_dec, f, self.W_dec)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, d) -> what it makes of the output hook (N, p). With TopK the decoder reads only the rows it needs."""
        if self.spec.activation == "relu":
            return self.decode(self.encode(x))
        values, indices = self.top_latents(x)
        y = torch.nn.functional.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")
        return y.add_(self.b_dec)

    def to(self, device: str | torch.device) -> "Dictionary":
        moved = (t.to(device) for t in (self.W_enc, self.b_enc, self.W_dec, self.b_dec))
        return type(self)(self.spec, *moved)

    def with_scaling_folded(self, scale_in: float, scale_out: float) -> "Dictionary":
        """The dictionary that takes x and gives y, made of this one, which takes x * scale_in and gives y * scale_out.

        Latents keep their values. An SAE has one scale s: (s x - b_dec) W_enc = (x - b_dec / s) s W_enc.
        """
        if self.spec.kind == "sae" and scale_in != scale_out:
            raise DictionaryError(f"an SAE has one scale, got {scale_in} and {scale_out}")
        return type(self)(self.spec, self.W_enc * scale_in, self.b_enc, self.W_dec / scale_out, self.b_dec / scale_out)

    def with_unit_decoder(self) -> "Dictionary":
        """The same function with decoder rows of norm 1: each norm moves into its latent's encoder.

        A TopK that ranked latents by value times decoder norm then ranks them by value.
        """
        norms = self.W_dec.norm(dim=1).clamp(min=1e-8)  # a row of zeros stays one
        return type(self)(self.spec, self.W_enc * norms, self.b_enc * norms, self.W_dec / norms[:, None], self.b_dec)


class SAE(Dictionary):
    """Reconstructs its own input: c = b_dec where the spec says so, else 0."""

    def _centred(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.spec.apply_b_dec_to_input else x


class Transcoder(Dictionary):
    """Predicts the output of a layer from its input: c = 0."""


def build(spec: Spec, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Dictionary:
    """The dictionary of the class that `spec.kind` names."""
    return {"sae": SAE, "transcoder": Transcoder}[spec.kind](spec, W_enc, b_enc, W_dec, b_dec)
