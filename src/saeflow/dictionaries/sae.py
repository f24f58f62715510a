"""Sparse dictionaries that are ready to use: an SAE reconstructs a hook, a transcoder predicts one hook from another.

Both compute  f = act((x - c) W_enc + b_enc)  and  y = f W_dec + b_dec,  with c = b_dec for an SAE and 0 for a
transcoder; a skip transcoder adds x W_skip^T. act keeps what is above 0 (ReLU), the k largest of that (TopK), or what
is above a latent's threshold (JumpReLU; what BatchTopK becomes after training). The weights take raw activations;
whatever scaling was used in training is folded into them.

Shapes: N tokens, d = `d_in`, p = `d_out`, n = `d_sae`.
"""

import dataclasses

import torch
from torch import Tensor

from saeflow.dictionaries.spec import DictionaryError, Spec

Scale = float | Tensor
"""One factor, or one for each entry of an activation."""


class Dictionary:
    """What SAEs and transcoders share: `spec` and tensors, of which the last two are None where they have no part.

    W_enc (d, n), b_enc (n,), W_dec (n, p), b_dec (p,), W_skip (p, d), threshold (n,), at least 0.
    """

    def __init__(
        self,
        spec: Spec,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        W_skip: Tensor | None = None,
        threshold: Tensor | None = None,
    ) -> None:
        d, p, n = spec.d_in, spec.d_out, spec.d_sae
        wanted: dict[str, tuple[int, ...] | None] = {
            "W_enc": (d, n),
            "b_enc": (n,),
            "W_dec": (n, p),
            "b_dec": (p,),
            "W_skip": (p, d) if spec.skip else None,
            "threshold": (n,) if spec.activation == "jumprelu" else None,
        }
        self.spec, self.W_skip, self.threshold = spec, W_skip, threshold
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = W_enc, b_enc, W_dec, b_dec
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if (tensor if tensor is None else tuple(tensor.shape)) != shape:
                given = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise DictionaryError(f"{name} {given}, but the sizes say {shape}")

    def __repr__(self) -> str:
        spec, (name, amount) = self.spec, self.spec.amount
        sparse = "" if amount is None else f", {name} = {amount:g}"
        writes = f" to {spec.hook_name_out}" if spec.hook_name_out != spec.hook_name else ""
        sizes = f"{spec.d_in} to {spec.d_sae} latents to {spec.d_out}"
        return f"<{type(self).__name__} ({spec.activation}{sparse}) of {spec.hook_name}{writes}, {sizes}>"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

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
        if self.spec.activation != "topk" or self.spec.k is None:
            raise DictionaryError("top_latents needs a TopK dictionary; otherwise any number can be active: use encode")
        values, indices = torch.topk(self.pre_activations(x), self.spec.k, dim=1, sorted=False)
        return values.relu_(), indices

    def encode(self, x: Tensor) -> Tensor:
        """x (N, d) -> activations of all latents (N, n), zeros included."""
        if self.spec.activation == "topk":
            values, indices = self.top_latents(x)
            return values.new_zeros(x.shape[0], self.d_sae).scatter_(1, indices, values)
        pre = self.pre_activations(x)
        return pre.relu_() if self.threshold is None else pre.mul_(pre > self.threshold)

    def active(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, d) -> of all activations that are not 0 the token, the latent and the value, (A,) each, in the order of
        the tokens."""
        if self.spec.activation == "topk":
            values, indices = self.top_latents(x)
            token, place = values.nonzero(as_tuple=True)
            return token, indices[token, place], values[token, place]
        f = self.encode(x)
        token, latent = f.nonzero(as_tuple=True)
        return token, latent, f[token, latent]

    def writes(self, latents: Tensor, values: Tensor) -> Tensor:
        """What single latents add to the output: `latents` and their `values` (A,) -> (A, p)."""
        return values[:, None] * self.W_dec[latents]

    def decode(self, f: Tensor, x: Tensor | None = None) -> Tensor:
        """f (N, n) -> (N, p); a skip transcoder also needs the input x (N, d)."""
        return self._with_skip(torch.addmm(self.b_dec, f, self.W_dec), x)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, d) -> what it makes of the output hook (N, p). With TopK the decoder reads only the rows it needs."""
        if self.spec.activation != "topk":
            return self.decode(self.encode(x), x)
        return self.decode_top(*self.top_latents(x), x)

    def decode_top(self, values: Tensor, indices: Tensor, x: Tensor | None = None) -> Tensor:
        """`decode` of what `top_latents` gives: values and indices (N, k) -> (N, p)."""
        y = torch.nn.functional.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")
        return self._with_skip(y.add_(self.b_dec), x)

    def _with_skip(self, y: Tensor, x: Tensor | None) -> Tensor:
        if self.W_skip is None:
            return y
        if x is None:
            raise DictionaryError("a skip transcoder's output depends on its input: give decode both f and x")
        return y.addmm_(x, self.W_skip.T)

    def to(self, device: str | torch.device) -> "Dictionary":
        return type(self)(self.spec, **{name: t.to(device) for name, t in self.tensors.items()})

    def with_scaling_folded(self, scale_in: Scale, scale_out: Scale) -> "Dictionary":
        """The dictionary that takes x and gives y, made of this one, which takes x * scale_in and gives y * scale_out.

        Latents keep their values. An SAE has one scale s: (s x - b_dec) W_enc = (x - b_dec / s) s W_enc.
        """
        into = torch.as_tensor(scale_in, dtype=self.W_enc.dtype, device=self.W_enc.device).expand(self.d_in)
        out = torch.as_tensor(scale_out, dtype=self.W_enc.dtype, device=self.W_enc.device).expand(self.d_out)
        if self.spec.kind == "sae" and not torch.equal(into, out):
            raise DictionaryError(f"an SAE has one scale, got {scale_in} and {scale_out}")
        scaled = {"W_enc": self.W_enc * into[:, None], "W_dec": self.W_dec / out, "b_dec": self.b_dec / out}
        if self.W_skip is not None:
            scaled["W_skip"] = self.W_skip * into / out[:, None]
        return type(self)(self.spec, **(self.tensors | scaled))

    def with_unit_decoder(self) -> "Dictionary":
        """The same function with decoder rows of norm 1: each norm moves into its latent's encoder.

        A TopK that ranked latents by value times decoder norm then ranks them by value; one that ranked them by value,
        with rows of several norms, would become another.
        """
        norms = self.W_dec.norm(dim=1).clamp(min=1e-8)  # a row of zeros stays one
        scaled = {"W_enc": self.W_enc * norms, "b_enc": self.b_enc * norms, "W_dec": self.W_dec / norms[:, None]}
        if self.threshold is not None:
            scaled["threshold"] = self.threshold * norms
        return type(self)(self.spec, **(self.tensors | scaled))


class SAE(Dictionary):
    """Reconstructs its own input: c = b_dec where the spec says so, else 0."""

    def _centred(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.spec.apply_b_dec_to_input else x


class Transcoder(Dictionary):
    """Predicts the output of a layer from its input: c = 0."""


def build(spec: Spec, *tensors: Tensor | None, **named: Tensor | None) -> Dictionary:
    """The dictionary of the class that `spec.kind` names, of the tensors that `Dictionary` takes.

    What was trained as BatchTopK is from now on a JumpReLU.
    """
    if spec.activation == "batchtopk":
        spec = dataclasses.replace(spec, activation="jumprelu")
    return {"sae": SAE, "transcoder": Transcoder}[spec.kind](spec, *tensors, **named)  # type: ignore[arg-type]
