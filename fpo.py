"""The method: one forward for everything, and from what it says each method's loss.

Glossary, of B pairs
    symbol        name here                shape      place in the paper
    x, y_w, y_l   prompt, chosen, rejected            Sec. 2
    π_θ, π_ref    policy, reference                   Sec. 2
    log π(y|x)    logps                    (2B,)      Eq. 7: sum over the response; B chosen, B rejected
    |y|           lengths                  (2B,)      Eq. 9: response tokens
    h             what a SiteHook captures (R, L, d)  Eq. 5: the residual stream as the SAE's layer leaves it
    c̄             features                 (2B, m)    Eq. 10: SAE features, mean over the response
    D_FPO         mse                      (2B,)      Eq. 10
    D_TDPO        kl                       (2B,)      Eq. 3: sequential KL(ref ‖ policy)
    γ_ref, δ      margin, constraint       (B,)       Eq. 8, Table 1

Where each equation is
    Eq. 3, 4    losses.tdpo1_loss, tdpo2_loss; their KL: losses.sequential_kl, in slices token_statistics
    Eq. 5       sae.JumpReLUSAE.encode; pooled in slices: pooled_features (both: chunked.py)
    Eq. 7       losses.dpo_loss
    Eq. 8       the last line of every loss in losses.py but sft_loss
    Eq. 9, 11   losses.fpo_loss
    Eq. 10      losses.feature_mse; over several SAEs layer_mse
    Sec. 3      Phase 1: offline.build_reference; Phase 2: offline.ReferenceCache.lookup, then method_loss

After the transformer everything works on the N states that predict response tokens: no prompt, no padding,
and never the logits of all positions.
"""

import signal
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.data import DataLoader

import losses
from chunked import pooled_features, token_statistics
from data import Batch, Pairs, collate
from sae import SiteHook

METHODS = ("sft", "dpo", "simpo", "simpo_kl", "tdpo1", "tdpo2", "fpo")
CACHED = ("dpo", "fpo")  # the reference is read from Phase 1's cache
NEEDED = ("tdpo1", "tdpo2", "simpo_kl")  # the model itself stays in memory: a KL needs its distributions


class Statistics(NamedTuple):
    """What a model says of 2B responses, chosen first, then rejected. Absent parts are None or empty.

    Attributes:
        logps: (2B,) log π(y|x), summed over the response's tokens.
        lengths: (2B,) response tokens |y|.
        features: per SAE (2B, m), features averaged over the response's positions.
        kl: (2B,) sequential KL(ref ‖ policy), where the policy holds a reference.
        entropy: (2B,) sum over the response's positions of the next-token distribution's entropy, nats.
    """

    logps: torch.Tensor
    lengths: torch.Tensor | None = None
    features: tuple[torch.Tensor, ...] = ()
    kl: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


# ---------------------------------------------------------------------------- the transformer's mask
def attention_mask(batch: Batch, config, dtype):
    """What each token of the rows may see, in the form that the model's layers take.

    Visible is what comes before, in the same document, and is the prompt's or the same response's; on sliding
    layers only within the window, counted in positions (in a shared row an index says nothing of distance).

    Args:
        batch: rows of (R, L).
        config: the model's; its attention implementation is eager or flex_attention.
    Returns:
        eager: (R, 1, L, L) of `dtype`, added to the scores, so never a boolean. flex_attention: a BlockMask.
        For models whose layers differ, a dict by layer type.
    """
    doc, segment, position = batch.doc, batch.segment, batch.positions
    R, L = doc.shape

    def mask_of(window):
        def visible(r, head, q, k):
            other = (segment[r, k] != 0) & (segment[r, k] != segment[r, q])
            see = (k <= q) & (doc[r, k] == doc[r, q]) & ~other
            return see if window is None else see & (position[r, q] - position[r, k] < window)

        if config._attn_implementation == "flex_attention":
            return create_block_mask(visible, R, None, L, L, device=doc.device)
        index = torch.arange(L, device=doc.device)
        see = visible(torch.arange(R, device=doc.device)[:, None, None], 0, index[:, None], index)
        scores = torch.zeros(see.shape, dtype=dtype, device=doc.device)
        return scores.masked_fill_(~see, torch.finfo(dtype).min)[:, None]

    window = getattr(config, "sliding_window", None)
    window = None if window is None or window >= L else window  # no position of a row reaches beyond it
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return mask_of(window)
    full = mask_of(None) if "full_attention" in layer_types or window is None else None
    alike = lambda kind: kind == "full_attention" or window is None  # noqa: E731
    return {kind: full if alike(kind) else mask_of(window) for kind in set(layer_types)}


# ---------------------------------------------------------------------------- one forward for everything
class Policy(nn.Module):
    """A causal language model, the frozen SAEs that read it, and perhaps a frozen reference beside it.

    The same forward, in the same dtype, makes the reference cache, trains and evaluates: so a policy that has
    not moved has reward 0 and D_FPO 0 within rounding. Only `lm` is in the module tree: SAEs and reference
    are neither trained nor saved.

    Args:
        lm: a Hugging Face decoder with `model.layers`; eager or flex_attention.
        saes: JumpReLUSAEs, on lm's device.
        sites: (layer, site) of each.
        k: of D_FPO: promises that features get gradients through it alone, at most 2 k of each response.
    """

    def __init__(self, lm, saes=(), sites=(), k=None):
        super().__init__()
        head = lm.get_output_embeddings()
        odd = [n for n in ("logit_scale", "logits_scaling") if getattr(lm.config, n, None) not in (None, 1.0)]
        if head is None or getattr(head, "bias", None) is not None or odd:
            raise ValueError(f"{type(lm).__name__}: its logits are not states @ weight.T {odd or ''}")
        if lm.config._attn_implementation not in ("eager", "flex_attention"):
            raise ValueError(f"attention {lm.config._attn_implementation!r}: eager or flex_attention needed")
        self.lm, self._most = lm, None if k is None else 2 * k
        self.saes, self.sites = tuple(saes), tuple(sites)
        self._hooks = self._hook(lm)
        self.reference: tuple = ()  # (lm,): a module in a tuple is not a part of this one
        self._reference_hooks: tuple[SiteHook, ...] = ()

    def _hook(self, lm):
        hooks = tuple(SiteHook(lm, layer, site) for layer, site in self.sites)
        for hook, sae, where in zip(hooks, self.saes, self.sites, strict=True):
            if hook.d != sae.d:
                raise ValueError(f"the SAE for {where} reads width {sae.d}, the model has {hook.d} there")
        return hooks

    def hold_reference(self, lm):
        """Keep a frozen reference: forward then gives its statistics too, and the KL. None lets it go."""
        for hook in self._reference_hooks:
            hook.remove()
        self.reference = () if lm is None else (lm.eval().requires_grad_(False),)
        self._reference_hooks = () if lm is None else self._hook(lm)

    def _read(self, lm, hooks, batch):
        """(N, d) final states and, per SAE, (N, d') sites, where response tokens are predicted."""
        mask = attention_mask(batch, lm.config, lm.dtype)
        for hook in hooks:
            hook.enabled = True
        out = lm.model(
            input_ids=batch.tokens, position_ids=batch.positions, attention_mask=mask, use_cache=False
        ).last_hidden_state
        sites = [hook.value.flatten(0, 1)[batch.state] for hook in hooks]
        for hook in hooks:  # a checkpointed block runs again in the backward: not for us
            hook.enabled, hook.value = False, None
        return out.flatten(0, 1)[batch.state], sites

    def read_sites(self, batch: Batch) -> list[torch.Tensor]:
        """Per SAE (N, d), what it reads of the policy where response tokens are predicted."""
        return self._read(self.lm, self._hooks, batch)[1]

    def forward(self, batch: Batch, entropy: bool = False) -> tuple[Statistics, Statistics | None]:
        """Statistics of the policy, and of the reference where one is held; `entropy`: of entropies too."""
        lm, reference = self.lm, self.reference[0] if self.reference else None
        softcap = getattr(lm.config, "final_logit_softcapping", None)
        ref_states = ref_weight = None
        if reference is not None:
            with torch.no_grad():
                ref_states, ref_sites = self._read(reference, self._reference_hooks, batch)
                ref_weight = reference.get_output_embeddings().weight
        states, sites = self._read(lm, self._hooks, batch)
        logps, kl, ref_logps, H = token_statistics(
            states, lm.get_output_embeddings().weight, batch.target,
            softcap=softcap, ref_states=ref_states, ref_weight=ref_weight, entropy=entropy,
        )  # fmt: skip
        # Sums over each response as a product: the same order every time, on any device.
        mine = batch.owner == torch.arange(len(batch.lengths), device=batch.owner.device)[:, None]
        total = lambda x: mine.to(x.dtype) @ x  # noqa: E731
        totals = [None if x is None else total(x) for x in (kl, H)]
        features = lambda read: tuple(  # noqa: E731
            pooled_features(h, sae, batch.owner, batch.lengths, self._most)
            for h, sae in zip(read, self.saes, strict=True)
        )
        policy = Statistics(total(logps), batch.lengths, features(sites), *totals)
        if reference is None:
            return policy, None
        with torch.no_grad():
            return policy, Statistics(total(ref_logps), batch.lengths, features(ref_sites))


# ---------------------------------------------------------------------------- ranks and streams
def ranks() -> tuple[int, int]:
    """(this process's rank, how many there are); (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    """Wait for the other ranks."""
    if dist.is_initialized():
        dist.barrier()


def lockstep(groups: list[list[int]], device) -> list[list[int]]:
    """This rank's micro-batches, then empty ones until every rank has as many: no collective hangs."""
    count = torch.tensor(len(groups), device=device)
    if dist.is_initialized():
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return groups + [[] for _ in range(int(count) - len(groups))]


LOADERS = {"cuda": 1, "cpu": 0}  # processes that make batches ahead


def _ignore_signals(_):  # torchrun signals a rank's whole group; the rank itself ends its loader
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def stream(pairs: Pairs, groups, *, device, cache=None, **rows):
    """(Batch, reference Statistics or None) of each micro-batch, on the device, made ahead of the GPU's work.

    Args:
        groups: lists of pair indices; an empty one becomes a padding pair of weight 0.
        cache: a ReferenceCache to look the pairs up in.
        rows: layout and padding, as `collate` takes them.
    """

    def load(group):
        batch = collate(pairs, group or [0], padding_pair=not group, **rows)
        return batch, None if cache is None else cache.lookup(batch.index)

    workers = LOADERS[kind := torch.device(device).type]
    loader = DataLoader(
        groups, batch_size=None, collate_fn=load, pin_memory=kind == "cuda", num_workers=workers,
        worker_init_fn=_ignore_signals, multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    for batch, reference in loader:
        if reference is not None:
            logps, _, features, *_ = reference
            features = tuple(c.to(device, non_blocking=True) for c in features)
            reference = Statistics(logps.to(device, non_blocking=True), features=features)
        yield batch.to(device), reference


# ---------------------------------------------------------------------------- method -> loss
def method_loss(
    method, policy, reference=None, *, beta, alpha=0.5, gamma=0.5, k=50, stop_gradient=True,
    feature_weights=None,
):  # fmt: skip
    """One method's loss per pair, from the statistics (Table 1, Table 6).

    Args:
        method: one of METHODS.
        policy: Statistics of the policy, 2B responses.
        reference: Statistics of the reference: dpo, tdpo1, tdpo2 and fpo need it; others log D_FPO by it.
        beta, alpha, gamma, k: as in Table 5; k of Eq. 10.
        stop_gradient: whether δ_FPO's chosen term is held constant.
        feature_weights: per SAE (m,), or None: weights of the squared differences (control, Table 4).
    Returns:
        loss (B,), and a dict of (B,) values to log: rewards; mse, kl of chosen and rejected if there.
    """
    w, l = policy.logps.chunk(2)
    n_w, n_l = policy.lengths.chunk(2)
    values = _distances(policy, reference, k, feature_weights)
    kls = (values["kl_chosen"], values["kl_rejected"]) if method in NEEDED else ()
    four = (w, l, *reference.logps.chunk(2)) if reference is not None else ()

    if method == "sft":
        return losses.sft_loss(w, n_w), values
    if method == "simpo":
        loss = losses.simpo_loss(w, l, n_w, n_l, beta=beta, gamma=gamma)
    elif method == "simpo_kl":
        loss = losses.simpo_kl_loss(w, l, n_w, n_l, *kls, beta=beta, gamma=gamma, alpha=alpha)
    elif method == "dpo":
        loss = losses.dpo_loss(*four, beta=beta)
    elif method == "tdpo1":
        loss = losses.tdpo1_loss(*four, *kls, beta=beta)
    elif method == "tdpo2":
        loss = losses.tdpo2_loss(*four, *kls, beta=beta, alpha=alpha)
    elif method == "fpo":
        ref_w, ref_l = reference.logps.chunk(2)
        loss = losses.fpo_loss(
            w, l, ref_w, ref_l, n_w, n_l, values["mse_chosen"], values["mse_rejected"],
            beta=beta, alpha=alpha, stop_gradient=stop_gradient,
        )  # fmt: skip
    else:
        raise ValueError(f"method {method!r}: one of {', '.join(METHODS)}")
    reward = rewards(method, policy, reference, beta=beta)
    values["reward_chosen"], values["reward_rejected"] = reward.chunk(2)
    return loss, values


def _distances(policy, reference, k, feature_weights):
    """{name: (B,)} of how far the policy is from the reference: KL and D_FPO of chosen and rejected."""
    values = {}
    if policy.kl is not None:
        values["kl_chosen"], values["kl_rejected"] = policy.kl.chunk(2)
    if reference is not None and policy.features and reference.features:
        mse = layer_mse(policy.features, reference.features, k=k, feature_weights=feature_weights)
        values["mse_chosen"], values["mse_rejected"] = mse.chunk(2)
    return values


def layer_mse(policy_features, reference_features, *, k, feature_weights=None):
    """(2B,) D_FPO, Eq. 10, averaged over the SAEs where there are several (Table 7)."""
    weights = feature_weights or (None,) * len(policy_features)
    triples = zip(policy_features, reference_features, weights, strict=True)
    return torch.stack([losses.feature_mse(c, ref, k=k, weights=w) for c, ref, w in triples]).mean(0)


def rewards(method, policy, reference=None, *, beta):
    """(2B,) each response's part of LPD and γ_ref: β log(π/π_ref), FPO's over |y|; SimPO's β/|y| log π."""
    n = policy.lengths.clamp(min=1)
    if method in ("simpo", "simpo_kl"):
        return (beta * policy.logps / n).detach()
    ratio = (policy.logps - reference.logps).detach()
    return beta * ratio / n if method == "fpo" else beta * ratio
