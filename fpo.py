"""One forward computes every statistic; `method_loss` turns the statistics into a loss.

Glossary, of B pairs
    symbol        name here                shape      place in the paper
    x, y_w, y_l   prompt, chosen, rejected            Sec. 2
    π_θ, π_ref    policy, reference                   Sec. 2
    log π(y|x)    logps                    (2·B,)      Eq. 7: sum over the response; B chosen, then B rejected
    |y|           lengths                  (2·B,)      Eq. 9: response tokens
    h             SiteHook.value           (R, L, d)  Eq. 5: what the SAE reads
    c̄             features                 (2·B, m)    Eq. 10: SAE features, mean over the response
    D_FPO         mse                      (2·B,)      Eq. 10
    D_TDPO        kl                       (2·B,)      Eq. 3: sequential KL(ref ‖ policy)

Where each equation is: Eqs. 3, 4, 7 to 9 and 11 are in losses.py, one function a method. Their log π and KL
come from scale.token_statistics, in slices. Eq. 5: sae.SAE.encode; scale.pooled_features, in slices.
Eq. 10: losses.feature_mse. Sec. 3: offline.py, then method_loss below.

After the transformer everything works on the N states that predict response tokens: no prompt, no padding,
and never the logits of all positions.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

import losses
from batches import Batch
from losses import METHODS, NEEDED, PER_TOKEN
from runtime import UserError
from sae import SiteHook
from scale import owner_matrix, pooled_features, token_statistics


class Statistics(NamedTuple):
    """What a model says of 2·B responses, chosen first. Fields that were not computed are None or empty."""

    logps: torch.Tensor  # (2·B,) log π(y|x), summed over the response's tokens
    lengths: torch.Tensor | None = None  # (2·B,) response tokens |y|
    features: tuple[torch.Tensor, ...] = ()  # per SAE (2·B, m), c̄: averaged over the response's positions
    kl: torch.Tensor | None = None  # (2·B,) sequential KL(ref ‖ policy), where the policy holds a reference
    entropy: torch.Tensor | None = None  # (2·B,) of the next-token distributions, summed as log π is, nats
    norms: tuple[torch.Tensor, ...] = ()  # per SAE (2·B,), ‖h‖² averaged over the response's positions


# ---------------------------------------------------------------------------- the transformer's mask
def attention_mask(batch: Batch, config, dtype):
    """What each token of the rows may see, in the form that the model's layers take.

    A token sees what comes before it in the same document, if that belongs to the prompt or to the same
    response; on sliding layers only within the window. The window is counted in positions: in a shared row
    the distance between two places says nothing.

    Args:
        batch: rows of (R, L).
        config: the text model's; its attention implementation is eager, sdpa or flex_attention.
    Returns:
        eager, sdpa: (R, 1, L, L) of `dtype`, which is added to the scores, so it is never boolean.
        flex_attention: a BlockMask. For models whose layers differ, a dict by layer type.
    """
    doc, segment, position = (x.int() for x in (batch.doc, batch.segment, batch.positions))
    window = getattr(config, "sliding_window", None)
    if window is not None and window >= batch.reach:  # no two positions of a document are that far apart
        window = None
    width = window or 0  # for layers that have one

    def visible(r, head, q, k):
        """Whether query q of row r sees key k where there is no window."""
        own = (segment[r, k] == 0) | (segment[r, k] == segment[r, q])
        return (k <= q) & (doc[r, k] == doc[r, q]) & own

    def near(r, head, q, k):
        """Whether it sees it within the window."""
        return visible(r, head, q, k) & (position[r, q] - position[r, k] < width)

    # flex_attention skips blocks of which nothing is seen; the others read a whole (L, L) mask.
    if config._attn_implementation == "flex_attention":
        masks = {seen: block_mask(batch, near if seen else visible, seen) for seen in {None, window}}
    else:
        masks = dense_masks(visible, position, window, dtype)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return masks[window]
    return {kind: masks[None if kind == "full_attention" else window] for kind in set(layer_types)}


def dense_masks(visible, position, window, dtype):
    """{None: mask, window: mask}, (R, 1, L, L) of `dtype`: 0 where a query sees a key, else its least."""
    row, index = (torch.arange(n, device=position.device) for n in position.shape)
    see = visible(row[:, None, None], 0, index[:, None], index)  # (R, L, L)
    masks = {}
    for seen in dict.fromkeys((None, window)):  # the whole mask first, from which the window takes some
        if seen is not None:
            see = see & (position[:, :, None] - position[:, None] < seen)
        scores = torch.zeros(see.shape, dtype=dtype, device=position.device)
        masks[seen] = scores.masked_fill_(~see, torch.finfo(dtype).min)[:, None]
    return masks


def block_mask(batch: Batch, visible, window=None) -> BlockMask:
    """The BlockMask of `visible`, from where documents and responses begin: no (L, L) tensor is made.

    What a query sees are at most two runs of places: in its own segment, up to itself; for a response also
    in the prompt. How many of them fall into each block of keys is summed over each block of queries.
    """
    doc, segment, position = (x.int() for x in (batch.doc, batch.segment, batch.positions))
    (R, L), size = doc.shape, 128
    place = torch.arange(L, dtype=torch.int32, device=doc.device).expand(R, L)

    def begins(new):
        """(R, L) the last place up to each one where `new` (R, L - 1), of all but the first, is true."""
        return F.pad(torch.where(new, place[:, 1:], 0), (1, 0)).cummax(1).values

    of_doc, of_segment = doc.diff() != 0, segment.diff() != 0
    start, own = begins(of_doc), begins(of_doc | of_segment)  # (R, L) of the document, of the segment
    prompt_end = begins(~of_doc & of_segment & (segment[:, :-1] == 0))
    first = own, torch.where(segment > 0, start, prompt_end)  # the first place of both runs
    last = place, prompt_end - 1
    counts = torch.zeros(R, L, L // size, dtype=torch.int32, device=doc.device)
    block = torch.arange(0, L, size, dtype=torch.int32, device=doc.device)
    for a, z in zip(first, last, strict=True):
        if window is not None:  # positions count from the run's first, which may be too far back
            a = a + (position - position.gather(1, a.long()) - window + 1).clamp(min=0)
        inside = torch.minimum(z[..., None] + 1, block + size) - torch.maximum(a[..., None], block)
        counts += inside.clamp(min=0)
    counts = counts.view(R, 1, L // size, size, L // size).sum(3)  # (R, 1, blocks of queries, blocks of keys)
    some, whole = (counts > 0) & (counts < size**2), counts == size**2
    (n, blocks), (n_whole, whole_blocks) = (
        (there.sum(-1, dtype=torch.int32), there.int().argsort(dim=-1, descending=True, stable=True).int())
        for there in (some, whole)
    )  # how many blocks each block of queries sees in part and wholly; and all blocks, those first
    return BlockMask.from_kv_blocks(
        n, blocks, n_whole, whole_blocks, BLOCK_SIZE=size, mask_mod=visible, seq_lengths=(L, L)
    )


# ---------------------------------------------------------------------------- one forward for everything
class Policy(nn.Module):
    """A causal language model, the frozen SAEs that read it, and perhaps a frozen reference beside it.

    The same forward, in the same dtype, makes the reference cache, trains and evaluates: so a policy that has
    not moved has reward 0 and D_FPO 0 within rounding. Only `lm` is in the module tree: SAEs and reference
    are neither trained nor saved.

    Args:
        lm: a Hugging Face decoder with `model.layers`; eager, sdpa or flex_attention.
        saes: SAEs, or objects with their `W_enc`, `b_enc`, `threshold`, `k`, `d` and `m`, on lm's device.
        sites: (layer, site) of each.
        fused: as scale.token_statistics takes it.
    """

    def __init__(self, lm, saes=(), sites=(), fused=None):
        super().__init__()
        if (attention := lm.config._attn_implementation) not in ("eager", "sdpa", "flex_attention"):
            raise UserError(f"attention {attention!r}: eager, sdpa or flex_attention is needed")
        # A state-space layer, say, would carry one packed document into the next.
        kinds = set(getattr(lm.config.get_text_config(), "layer_types", None) or ())
        if odd := kinds - {"full_attention", "sliding_attention"}:
            raise UserError(f"{type(lm).__name__}: layers of {odd}; only attention is understood")
        head = lm.get_output_embeddings()  # its weight alone is used, in slices
        if not hasattr(lm, "model") or head is None or getattr(head, "bias", None) is not None:
            raise UserError(f"{type(lm).__name__}: a decoder with `model` and a head without bias is needed")
        self.lm, self.saes, self.sites, self.fused = lm, tuple(saes), tuple(sites), fused
        self.dtype = lm.dtype  # of the products; scale.shard_policy's weights are float32 in any case
        # A module in a tuple is not a part of this one: the reference is not trained, saved or wrapped.
        self.reference: tuple[Policy, ...] = ()
        try:  # h of Eq. 5, as the forward passes by
            self._hooks = tuple(SiteHook(lm, layer, site) for layer, site in self.sites)
        except ValueError as error:
            raise UserError(str(error)) from error
        for hook, sae, where in zip(self._hooks, self.saes, self.sites, strict=True):
            if hook.d != sae.d:
                raise UserError(f"the SAE for {where} reads width {sae.d}, the model has {hook.d} there")

    def hold_reference(self, reference: "Policy | None"):
        """Keep π_ref, with the same SAEs: forward then gives its statistics and the KL. None: no more."""
        self.reference = () if reference is None else (reference.eval().requires_grad_(False),)

    def _read(self, batch):
        """(N, d) final states, (V, d) the head's weight and, per SAE, (N, d') sites; N as in Batch."""
        lm, hooks = self.lm, self._hooks
        mask = attention_mask(batch, lm.config.get_text_config(), lm.dtype)
        for hook in hooks:  # each fires once in this forward
            hook.enabled = True
        mixed = self.dtype == torch.bfloat16

        def widen(module, args, embedded):
            """bf16 layers add to a float32 residual stream: that it is not rounded too halves D's noise."""
            return embedded.float() if mixed else embedded

        autocast = torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=mixed)
        with autocast, lm.get_input_embeddings().register_forward_hook(widen):
            out = lm.model(
                input_ids=batch.tokens, position_ids=batch.positions, attention_mask=mask, use_cache=False
            ).last_hidden_state  # (R, L, d), after the final norm
        # Of all R·L places the N that predict a response's token are kept.
        sites = [cast(torch.Tensor, hook.value).flatten(0, 1)[batch.state] for hook in hooks]
        for hook in hooks:  # a checkpointed block runs again in the backward, and must not capture then
            hook.enabled, hook.value = False, None
        head = lm.get_output_embeddings().weight
        return out.flatten(0, 1)[batch.state].to(head.dtype), head, sites

    def read_sites(self, batch: Batch) -> list[torch.Tensor]:
        """Per SAE (N, d), what it reads of the policy where response tokens are predicted."""
        return self._read(batch)[2]

    def _pool(self, sites, batch):
        """Features c̄ (Eq. 10) and mean ‖h‖² of each response, per SAE: ((2·B, m), …), ((2·B,), …)."""
        owner, lengths = batch.owner, batch.lengths
        rounded = self.dtype == torch.bfloat16
        features = tuple(
            pooled_features(h, sae, owner, lengths, rounded) for h, sae in zip(sites, self.saes, strict=True)
        )
        mean = owner_matrix(owner, len(lengths), torch.float32) / lengths.clamp(min=1)[:, None]  # (2·B, N)
        return features, tuple(mean @ h.detach().float().square().sum(-1) for h in sites)

    def forward(self, batch: Batch, entropy=False) -> tuple[Statistics, Statistics | None]:
        """Returns the policy's statistics, and the reference's if one is held.

        entropy: also the entropies of the next-token distributions.
        """
        # ---- states: a held reference's first, without gradients (TDPO)
        softcap = getattr(self.lm.config.get_text_config(), "final_logit_softcapping", None)
        ref_states = ref_weight = None
        with torch.no_grad():
            for reference in self.reference:
                ref_states, ref_weight, ref_sites = reference._read(batch)
        states, weight, sites = self._read(batch)
        # ---- of each of the N tokens log π, KL, log π_ref, entropy (N,): the head, in slices
        logps, kl, ref_logps, H = token_statistics(
            states, weight, batch.target,
            softcap=softcap, ref_states=ref_states, ref_weight=ref_weight, entropy=entropy, fused=self.fused,
        )  # fmt: skip
        # ---- of each of the 2·B responses: sums as a product, in the same order every time, on any device
        belongs = owner_matrix(batch.owner, len(batch.lengths), logps.dtype)  # (2·B, N)
        kl, H = (None if x is None else belongs @ x for x in (kl, H))
        features, norms = self._pool(sites, batch)
        policy = Statistics(belongs @ logps, batch.lengths, features, kl, H, norms)
        if not self.reference:
            return policy, None
        with torch.no_grad():
            features, norms = self._pool(ref_sites, batch)
            return policy, Statistics(belongs @ ref_logps, batch.lengths, features, norms=norms)

    def plain_logps(self, batch: Batch) -> torch.Tensor:
        """(R,) log π of each row's targets, by transformers' own lm(…).logits on that row alone, unpadded.

        batch: of `separate` rows. What a user says within an SFT conversation is no target.
        """
        logps, length = [], batch.tokens.shape[1]
        for row, (tokens, segment) in enumerate(zip(batch.tokens, batch.segment, strict=True)):
            mine = batch.state // length == row  # of the N targets this row's, (N,)
            # The row's places that predict them, and its tokens without padding.
            places, tokens = batch.state[mine] % length, tokens[segment >= 0][None]
            logits = self.lm(input_ids=tokens, use_cache=False, logits_to_keep=places).logits[0]  # (n, V)
            log_pi = logits.float().log_softmax(-1).gather(1, batch.target[mine, None])
            logps.append(log_pi.sum())
        return torch.stack(logps)


# ---------------------------------------------------------------------------- method -> loss
def method_loss(
    method, policy_stats, reference_stats=None, *, beta, alpha=0.5, gamma=0.5, k=50, stop_gradient=True,
    units=(),
):  # fmt: skip
    """One method's loss per pair, from the statistics (Table 1, Table 6).

    Args:
        method: one of METHODS.
        policy_stats: Statistics of the policy, 2·B responses.
        reference_stats: of the reference: dpo, tdpo1, tdpo2 and fpo need them; others log D_FPO by them.
            Methods with a KL need policy_stats.kl, fpo the features of both.
        beta, alpha, gamma, k: as in Table 5; k of Eq. 10.
        stop_gradient: whether δ_FPO's chosen term is held constant (Table 3).
        units: per SAE s², by which D_FPO is divided (see `feature_distance`); none: as in Eq. 10.
    Returns:
        loss (B,), and a dict of (B,) values to log: rewards; mse, kl of chosen and rejected if there; the
        constraint δ where the method has one.
    """
    if method not in METHODS:
        raise UserError(f"method {method!r}: one of {', '.join(METHODS)}")
    # ---- what Table 1 is made of, (B,) each: w chosen, l rejected
    (w, l), (n_w, n_l) = policy_stats.logps.chunk(2), policy_stats.lengths.chunk(2)
    if method == "sft":
        return losses.sft_loss(w, n_w), {}
    if reference_stats is not None:
        ref_w, ref_l = reference_stats.logps.chunk(2)
    far = distances(policy_stats, reference_stats, k=k, units=units)  # KL, D_FPO: what the constraints are of
    absent = (cast(torch.Tensor, None),) * 2
    (kl_w, kl_l), (D_w, D_l) = (far[name].chunk(2) if name in far else absent for name in ("kl", "mse"))

    # ---- the method's row of Table 1, or of Table 6
    if method == "simpo":
        loss = losses.simpo_loss(w, l, n_w, n_l, beta=beta, gamma=gamma)
    elif method == "simpo_kl":
        loss = losses.simpo_kl_loss(w, l, n_w, n_l, kl_w, kl_l, beta=beta, gamma=gamma, alpha=alpha)
    elif method == "dpo":
        loss = losses.dpo_loss(w, l, ref_w, ref_l, beta=beta)
    elif method == "tdpo1":
        loss = losses.tdpo1_loss(w, l, ref_w, ref_l, kl_w, kl_l, beta=beta)
    elif method == "tdpo2":
        loss = losses.tdpo2_loss(w, l, ref_w, ref_l, kl_w, kl_l, beta=beta, alpha=alpha)
    else:
        options = {"beta": beta, "alpha": alpha, "stop_gradient": stop_gradient}
        loss = losses.fpo_loss(w, l, ref_w, ref_l, n_w, n_l, D_w, D_l, **options)

    # ---- what is logged
    values = {}
    for name, x in far.items():
        values[f"{name}_chosen"], values[f"{name}_rejected"] = x.chunk(2)
    if method in (*NEEDED, "fpo"):  # the constraint δ of Eq. 3, 4 or 11
        far_w, far_l = (D_w, D_l) if method == "fpo" else (kl_w, kl_l)
        values["constraint"] = (1 if method == "tdpo1" else alpha) * beta * (far_l - far_w)
    reward_w, reward_l = rewards(method, policy_stats, reference_stats, beta=beta).chunk(2)
    return loss, values | {"reward_chosen": reward_w, "reward_rejected": reward_l}


def distances(policy_stats, reference_stats, *, k, units) -> dict[str, torch.Tensor]:
    """How far the policy is from the reference: kl and mse (D_FPO), (2·B,) each, where they can be told."""
    far = {} if policy_stats.kl is None else {"kl": policy_stats.kl}
    if reference_stats is not None and policy_stats.features and reference_stats.features:
        far["mse"] = feature_distance(policy_stats.features, reference_stats.features, k=k, units=units)
    return far


def feature_distance(policy_features, reference_features, *, k, units=()):
    """(2·B,) D_FPO, Eq. 10, averaged over the SAEs where there are several (Table 7).

    Args:
        policy_features, reference_features: per SAE (2·B, m), pooled.
        units: per SAE s² = mean ‖h‖² of the reference's states: D / s² has no unit, so that an α means the
            same for models whose states have other lengths (ours, not the paper's). None given: D itself.
    """
    D = [losses.feature_mse(c, ref, k=k) for c, ref in zip(policy_features, reference_features, strict=True)]
    return torch.stack([d / unit for d, unit in zip(D, units or (1,) * len(D), strict=True)]).mean(0)


def rewards(method, policy_stats, reference_stats=None, *, beta):
    """(2·B,) each response's part of LPD and γ_ref: β log(π/π_ref), FPO's over |y|; SimPO's β/|y| log π."""
    n = policy_stats.lengths.clamp(min=1)
    if method in ("simpo", "simpo_kl"):
        return (beta * policy_stats.logps / n).detach()
    ratio = (policy_stats.logps - reference_stats.logps).detach()
    return beta * ratio / n if method in PER_TOKEN else beta * ratio
