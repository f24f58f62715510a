"""What is done for dead latents: AuxK, ghost gradients and resampling.

The first two are terms of the loss on the dead latents' own columns: their cost grows with how many are dead, and with
none it is nothing. Resampling sets dead latents anew, between steps.

Shapes: N tokens, d = `d_in`, p = `d_out`, n = `d_sae`, m dead latents.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from saeflow.kernels.step import AuxiliaryLossInput, Weights

REFRESH_STEPS = 16  # how often the list of dead latents is made anew; making it waits for a GPU


def auxk(inputs: AuxiliaryLossInput, dead: Tensor, coefficient: float, by_norm: bool) -> Tensor:
    """The error of the living, reconstructed by the d / 2 most active of the dead latents `dead` (m,), as a loss ().

    Gao et al. 2024, Appendix A.2, as in SAELens: no ReLU, scaled down in proportion where fewer than d / 2 are dead.
    """
    weights, centred, error, w = inputs
    encoder, b_enc, W_dec = (t.index_select(0, dead) for t in weights[:3])
    half = max(centred.shape[1] // 2, 1)
    pre = torch.addmm(b_enc, centred, encoder.T)
    if len(dead) > half:
        rank = pre.detach() * W_dec.detach().norm(dim=1) if by_norm else pre.detach()
        kept = torch.topk(rank, half, dim=1, sorted=False).indices
        pre = pre * torch.zeros_like(pre).scatter_(1, kept, 1.0)
    squares = (pre @ W_dec + error).square().sum(dim=1)  # the residual is -error
    return coefficient * min(len(dead) / half, 1.0) * (w @ squares)


def ghost(inputs: AuxiliaryLossInput, dead: Tensor) -> Tensor:
    """Ghost gradients: exp of the dead latents' pre-activations, scaled, reconstructs the error; as a loss ().

    Jermyn and Templeton (2024), in the form of the transcoder paper's code (`reference/transcoders_attention_tracr.md`
    §1.4), with the residual taken from the target, where that code took it from the input. Its value always equals the
    squared error; what counts is the direction of its gradient.
    """
    weights, centred, error, w = inputs
    encoder, b_enc, W_dec = (t.index_select(0, dead) for t in weights[:3])
    residual = -error
    norms = residual.norm(dim=1, keepdim=True)
    reconstruction = torch.addmm(b_enc, centred, encoder.T).exp() @ W_dec
    scale = (norms / (1e-6 + 2 * reconstruction.norm(dim=1, keepdim=True))).detach()
    squares = (reconstruction * scale - residual).square() / norms.clamp(min=1e-6)
    return (w[:, None] * error.square() * squares / (squares.detach() + 1e-6)).sum()


@torch.no_grad()
def resample(
    weights: Weights,
    moments: Iterable[Tensor],
    dead: Tensor,
    x: Tensor,
    y: Tensor,
    losses: Tensor,
    generator: torch.Generator,
    centred: bool,
    unit_norm: bool,
) -> None:
    """Sets the latents `dead` (m,) to tokens that are reconstructed badly, in place.

    x (M, d) and y (M, p) are M sampled tokens' inputs and targets, `losses` (M,) their squared errors. Tokens are drawn
    in proportion to the loss squared, without replacement. The latent then writes towards the token's target, and reads
    along its input with 0.2 times the mean norm of living encoder rows; its bias is 0, and Adam forgets it (`moments`:
    tensors whose row i belongs to latent i). Bricken et al. (2023), as Kissane et al. (2024): for an SAE both
    directions are x - b_dec. A transcoder reads along x less the mean of the sample and writes along y - b_dec.
    """
    m = min(len(dead), int(torch.count_nonzero(losses)))
    if m == 0:
        return
    dead = dead[:m]
    chosen = torch.multinomial(losses.double().square().cpu(), m, generator=generator).to(x.device)
    alive = torch.ones(len(weights.b_enc), dtype=torch.bool, device=x.device).index_fill_(0, dead, False)
    written = torch.nn.functional.normalize(y[chosen] - weights.b_dec, dim=1)
    read = written if centred else torch.nn.functional.normalize(x[chosen] - x.mean(dim=0), dim=1)
    encoder_norm, decoder_norm = 1.0, 1.0
    if alive.any():
        encoder_norm = float(weights.encoder[alive].norm(dim=1).mean())
        decoder_norm = 1.0 if unit_norm else float(weights.W_dec[alive].norm(dim=1).mean())
    weights.W_dec[dead] = written * decoder_norm
    weights.encoder[dead] = read * (0.2 * encoder_norm)
    weights.b_enc[dead] = 0.0
    for moment in moments:
        moment[dead] = 0.0
