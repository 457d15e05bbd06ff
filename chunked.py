"""What would be (N, V) logits and (N, m) features, a slice at a time: exact, and made again in the backward.

    token_statistics   log π, KL, entropy of N tokens from their states, over slices of the vocabulary
    pooled_features    c̄ (Eq. 5, Eq. 10), over slices of the tokens

Both are plain functions of tensors; losses.py and sae.py hold what they are compared with in the tests.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # so that this file can be copied
    from sae import JumpReLUSAE

VOCABULARY_SLICE = {"cuda": 8192, "cpu": 1024}  # columns of logits at once
TOKEN_SLICE = 1024  # tokens whose features are made at once


# ---------------------------------------------------------------------------- the head
def _product(a, b):
    """a @ b, summed and returned in float32 (float64 where given)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(torch.float32, a.dtype)
    return a.to(wide) @ b.to(wide)


def _logits(states, weight, softcap):
    """(N, c) logits of a slice of the vocabulary, float32 or wider."""
    z = _product(states, weight.T)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _softmax(states, weight, softcap, logsumexp):
    """(N, c) probabilities of a slice, and d logits / d (states @ weight.T) (None: 1)."""
    z = _product(states, weight.T)
    if softcap is None:
        return z.sub_(logsumexp[:, None]).exp_(), None
    t = z.div_(softcap).tanh_()
    p = torch.add(-logsumexp[:, None], t, alpha=softcap).exp_()
    return p, t.square_().neg_().add_(1)


class _TokenStatistics(torch.autograd.Function):
    """Log-probability, KL and entropy of N tokens over slices of the vocabulary, made again in the backward.

    Memory beyond the inputs is a few (N, slice) blocks and the gradients themselves; each slice of the
    weight's gradient is written once.
    """

    @staticmethod
    def forward(ctx, states, weight, targets, softcap, ref_states, ref_weight, chunk, entropy):
        N, V = len(states), len(weight)
        rows = torch.arange(N, device=states.device)
        wide = torch.promote_types(torch.float32, states.dtype)
        new = lambda value: torch.full((N,), value, dtype=wide, device=states.device)  # noqa: E731
        # Running maximum, Σ exp(z - max), and Σ exp(z - max)·x, of the policy and of the reference.
        top, mass, inner = new(-torch.inf), new(0.0), new(0.0)
        ref_top, ref_mass, ref_inner = new(-torch.inf), new(0.0), new(0.0)
        chosen, ref_chosen = new(0.0), new(0.0)  # the target's logit
        for v in range(0, V, chunk):
            z = _logits(states, weight[v : v + chunk], softcap)
            here = (targets >= v) & (targets < v + z.shape[1])
            place = (rows, (targets - v).clamp(0, z.shape[1] - 1))
            chosen = torch.where(here, z[place], chosen)
            if ref_states is not None:
                z_ref = _logits(ref_states, ref_weight[v : v + chunk], softcap)
                ref_chosen = torch.where(here, z_ref[place], ref_chosen)
                ref_top, ref_mass, ref_inner = _online(ref_top, ref_mass, ref_inner, z_ref, z_ref - z)
            top, mass, inner = _online(top, mass, inner, z, z if entropy else None)
        logsumexp = top + mass.log()
        ref_logsumexp = ref_top + ref_mass.log()
        ctx.save_for_backward(states, weight, targets, ref_states, ref_weight, logsumexp, ref_logsumexp)
        ctx.softcap, ctx.chunk = softcap, chunk
        kl = ref_logps = H = None
        if ref_states is not None:
            kl, ref_logps = ref_inner / ref_mass - ref_logsumexp + logsumexp, ref_chosen - ref_logsumexp
            ctx.mark_non_differentiable(ref_logps)
        if entropy:
            H = logsumexp - inner / mass
            ctx.mark_non_differentiable(H)
        return chosen - logsumexp, kl, ref_logps, H

    @staticmethod
    def backward(ctx, g_logp, g_kl, *_):
        states, weight, targets, ref_states, ref_weight, logsumexp, ref_logsumexp = ctx.saved_tensors
        rows = torch.arange(len(states), device=states.device)
        d_states = torch.zeros_like(states, dtype=logsumexp.dtype)
        d_weight = torch.empty_like(weight)
        for v in range(0, len(weight), ctx.chunk):
            W = weight[v : v + ctx.chunk]
            p, slope = _softmax(states, W, ctx.softcap, logsumexp)
            if ref_states is None:  # d log p(y) / dz = 1[y] - p
                g = p.mul_(-g_logp[:, None])
            else:  # d KL(ref || p) / dz = p - p_ref
                p_ref, _ = _softmax(ref_states, ref_weight[v : v + ctx.chunk], ctx.softcap, ref_logsumexp)
                g = p.mul_((g_kl - g_logp)[:, None]).sub_(p_ref.mul_(g_kl[:, None]))
            here = (targets >= v) & (targets < v + g.shape[1])
            g[rows, (targets - v).clamp(0, g.shape[1] - 1)] += torch.where(here, g_logp, 0.0)
            g = (g if slope is None else g.mul_(slope)).to(states.dtype)
            if g.dtype == d_states.dtype:  # in place, where nothing needs a wider sum
                d_states.addmm_(g, W)
                torch.mm(g.T, states, out=d_weight[v : v + ctx.chunk])
            else:
                d_states += _product(g, W)
                d_weight[v : v + ctx.chunk] = _product(g.T, states)
        return d_states.to(states.dtype), d_weight, *(None,) * 6


def _online(top, mass, inner, z, x):
    """Fold a slice into the running maximum, Σ exp(z - top) and Σ exp(z - top)·x."""
    higher = torch.maximum(top, z.amax(1))
    scale, e = (top - higher).exp(), (z - higher[:, None]).exp()
    return higher, mass * scale + e.sum(1), inner * scale + ((e * x).sum(1) if x is not None else 0.0)


def token_statistics(
    states, weight, targets, *, softcap=None, ref_states=None, ref_weight=None, entropy=False
):
    """Log-probabilities of N tokens, and the KL and entropy of their distributions, without (N, V) logits.

    Statistics are float32 whatever the inputs. The slices' width depends on the device alone: the same states
    give the same bits in the reference pass and in training.

    Args:
        states: (N, d), the transformer's last hidden states that predict the tokens.
        weight: (V, d), the output embedding; states and weight get gradients.
        targets: (N,) token ids, all of them real: positions that don't count (-100) are left out before.
        softcap: logits are softcap·tanh(logits / softcap); None: as they are.
        ref_states, ref_weight: (N, d), (V, d) of the reference: gives the KL of TDPO, Eq. 3.
        entropy: also the entropy of each distribution (no gradient).
    Returns:
        log π(token) (N,); KL(ref ‖ policy) (N,), log π_ref(token) (N,) and entropy (N,) in nats, each or
        None.
    """
    chunk = VOCABULARY_SLICE["cuda" if states.is_cuda else "cpu"]
    return _TokenStatistics.apply(states, weight, targets, softcap, ref_states, ref_weight, chunk, entropy)


# ---------------------------------------------------------------------------- the SAE's features
class _PooledFeatures(torch.autograd.Function):
    """Mean SAE features per response, over chunks of tokens; backward makes the features it needs again."""

    @staticmethod
    def forward(ctx, states, W_enc, b_enc, threshold, owner, lengths, chunk, most):
        ctx.save_for_backward(states, W_enc, b_enc, threshold, owner, lengths)
        ctx.chunk, ctx.most = chunk, most
        pooled = torch.zeros(len(lengths), W_enc.shape[1], dtype=W_enc.dtype, device=states.device)
        for i in range(0, len(states), chunk):
            z = torch.addmm(b_enc, states[i : i + chunk].to(W_enc.dtype), W_enc)
            c = torch.where(z > threshold, z, 0.0)
            pooled.addmm_(_mean_matrix(owner[i : i + chunk], lengths, W_enc.dtype), c)
        return pooled

    @staticmethod
    def backward(ctx, g):
        states, W_enc, b_enc, threshold, owner, lengths = ctx.saved_tensors
        if ctx.most is not None and ctx.most * len(g) < W_enc.shape[1]:
            size, most = g.abs().amax(0), ctx.most * len(g)
            columns = size.topk(most).indices
            W_enc, b_enc, threshold = W_enc[:, columns], b_enc[columns], threshold[columns]
            # Should more features have a gradient than was promised, it must not go wrong in silence.
            g = g[:, columns].masked_fill((size != 0).sum() > most, torch.nan)
        d_states = torch.empty_like(states)
        for i in range(0, len(states), ctx.chunk):
            z = torch.addmm(b_enc, states[i : i + ctx.chunk].to(W_enc.dtype), W_enc)
            d_c = _mean_matrix(owner[i : i + ctx.chunk], lengths, W_enc.dtype).T @ g
            d_states[i : i + ctx.chunk] = torch.where(z > threshold, d_c, 0.0) @ W_enc.T
        return d_states, *(None,) * 7


def _mean_matrix(owner, lengths, dtype):
    """(responses, n): 1 / |y| where a token belongs to the response. Its product sums in a fixed order."""
    mine = owner == torch.arange(len(lengths), device=owner.device)[:, None]
    return mine.to(dtype) / lengths.clamp(min=1)[:, None]


def pooled_features(states, sae: "JumpReLUSAE", owner, lengths, most=None):
    """c̄: the SAE's features averaged over each response's positions (Eq. 5, Eq. 10).

    Args:
        states: (N, d), what the SAE reads at the N positions; gradient goes to them alone.
        owner: (N,) which response a position belongs to.
        lengths: (responses,) positions of each.
        most: promise that no more features of a response get a gradient (2 k of Eq. 10): the backward then
            makes those columns alone, of m. A broken promise gives NaN gradients. None: any may.
    Returns:
        (responses, m) float32.
    """
    return _PooledFeatures.apply(
        states, sae.W_enc, sae.b_enc, sae.threshold, owner, lengths, TOKEN_SLICE, most
    )
