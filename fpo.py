"""FPO's machinery: one forward for everything, the offline reference, and each method's loss from them.

Glossary, of B pairs
    symbol        name here                shape      place in the paper
    x, y_w, y_l   prompt, chosen, rejected            Sec. 2
    π_θ, π_ref    policy, reference                   Sec. 2
    log π(y|x)    logps                    (2B,)      Eq. 7: sum over the response; B chosen, B rejected
    |y|           lengths                  (2B,)      Eq. 9: response tokens
    h             what a SiteHook captures (R, L, d)  Eq. 5: the residual stream as the SAE's layer leaves it
    c̄             features                 (2B, m)    Eq. 10: SAE features, mean over the response's positions
    D_FPO         mse                      (2B,)      Eq. 10
    D_TDPO        kl                       (2B,)      Eq. 3: sequential KL(ref ‖ policy)
    γ_ref, δ      margin, constraint       (B,)       Eq. 8, Table 1

Where each equation is
    Eq. 3, 4    losses.tdpo1_loss, tdpo2_loss; their KL: losses.sequential_kl, on flat states token_statistics
    Eq. 5       sae.JumpReLUSAE.encode; pooled without keeping each token's features: pooled_features
    Eq. 7       losses.dpo_loss
    Eq. 8       the last line of every loss in losses.py
    Eq. 9, 11   losses.fpo_loss
    Eq. 10      losses.feature_mse; over several SAEs layer_mse
    Sec. 3      Phase 1: build_reference; Phase 2: ReferenceCache.lookup, then method_loss

After the transformer everything works on the N states that predict response tokens: no prompt, no padding,
and never the logits of all positions.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import losses
from data import Batch, Pairs, collate, micro_batches
from sae import JumpReLUSAE, SiteHook

METHODS = ("sft", "dpo", "simpo", "simpo_kl", "tdpo1", "tdpo2", "fpo")
CACHED = ("dpo", "fpo")  # the reference is read from Phase 1's cache
NEEDED = (
    "tdpo1",
    "tdpo2",
    "simpo_kl",
)  # the reference model stays in memory: the KL needs its whole distribution


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
            see = (
                (k <= q)
                & (doc[r, k] == doc[r, q])
                & ((segment[r, k] == 0) | (segment[r, k] == segment[r, q]))
            )
            return see if window is None else see & (position[r, q] - position[r, k] < window)

        if config._attn_implementation == "flex_attention":
            return create_block_mask(visible, R, None, L, L, device=doc.device)
        index = torch.arange(L, device=doc.device)
        see = visible(torch.arange(R, device=doc.device)[:, None, None], 0, index[:, None], index)
        return torch.zeros(see.shape, dtype=dtype, device=doc.device).masked_fill_(
            ~see, torch.finfo(dtype).min
        )[:, None]

    window = getattr(config, "sliding_window", None)
    window = None if window is None or window >= L else window  # no position of a row reaches beyond it
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return mask_of(window)
    full = mask_of(None) if "full_attention" in layer_types or window is None else None
    return {
        kind: full if kind == "full_attention" or window is None else mask_of(window)
        for kind in set(layer_types)
    }


# ---------------------------------------------------------------------------- the head
def _product(a, b):
    """a @ b, summed and returned in float32 (float64 where given)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(torch.float32, a.dtype)
    return a.to(wide) @ b.to(wide)


def _logits(states, weight, softcap):
    """(N, c) float32 logits of a slice of the vocabulary."""
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
    """Log-probability, KL and entropy of N tokens over slices of the vocabulary; backward makes each slice
    again.

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
        g_logp = torch.zeros_like(logsumexp) if g_logp is None else g_logp
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
        weight: (V, d), the output embedding; gradient goes to both.
        targets: (N,) token ids.
        softcap: logits are softcap·tanh(logits / softcap); None: as they are.
        ref_states, ref_weight: (N, d), (V, d) of the reference: gives the KL of TDPO, Eq. 3.
        entropy: also the entropy of each distribution (no gradient).
    Returns:
        log π(token) (N,); KL(ref ‖ policy) (N,), log π_ref(token) (N,) and entropy (N,) in nats, each or
        None.
    """
    chunk = 8192 if states.is_cuda else 1024
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


def pooled_features(states, sae: JumpReLUSAE, owner, lengths, most=None):
    """c̄: the SAE's features averaged over each response's positions (Eq. 5, Eq. 10).

    Args:
        states: (N, d), what the SAE reads at the N positions; gradient goes to them alone.
        owner: (N,) which response a position belongs to.
        lengths: (responses,) positions of each.
        most: promise that no more features of a response get a gradient (2 k of Eq. 10): the backward then
            makes those alone, a tenth of the work. A broken promise gives NaN gradients. None: any may.
    Returns:
        (responses, m) float32.
    """
    return _PooledFeatures.apply(states, sae.W_enc, sae.b_enc, sae.threshold, owner, lengths, 1024, most)


# ---------------------------------------------------------------------------- one forward for everything
class Policy(nn.Module):
    """A causal language model, the frozen SAEs that read it, and (TDPO, evaluation) a frozen reference beside
    it.

    The same forward, in the same dtype, makes the reference cache, trains and evaluates: so a policy that has
    not moved has reward 0 and D_FPO 0. Only `lm` is in the module tree: SAEs and reference are neither
    trained nor saved.

    Args:
        lm: a Hugging Face decoder with `model.layers`; eager or flex_attention.
        saes: JumpReLUSAEs, on lm's device.
        sites: (layer, site) of each.
        k: of D_FPO; a promise that features get a gradient through it alone, at most 2 k of a response.
    """

    def __init__(self, lm, saes=(), sites=(), k=None):
        super().__init__()
        head = lm.get_output_embeddings()
        odd = [n for n in ("logit_scale", "logits_scaling") if getattr(lm.config, n, None) not in (None, 1.0)]
        if head is None or getattr(head, "bias", None) is not None or odd:
            raise ValueError(f"{type(lm).__name__}: its logits are not states @ weight.T {odd or ''}")
        if lm.config._attn_implementation not in ("eager", "flex_attention"):
            raise ValueError(
                f"attention {lm.config._attn_implementation!r}: eager or flex_attention is needed"
            )
        self.lm, self._most = lm, None if k is None else 2 * k
        self._saes, self._sites = tuple(saes), tuple(sites)
        self._hooks = self._hook(lm)
        self._reference, self._reference_hooks = (), ()

    def _hook(self, lm):
        hooks = tuple(SiteHook(lm, layer, site) for layer, site in self._sites)
        for hook, sae, where in zip(hooks, self._saes, self._sites, strict=True):
            if hook.d != sae.d:
                raise ValueError(f"the SAE for {where} reads width {sae.d}, the model has {hook.d} there")
        return hooks

    def hold_reference(self, lm):
        """Keep a frozen reference: forward then gives its statistics too, and the KL. None lets it go."""
        for hook in self._reference_hooks:
            hook.remove()
        self._reference = () if lm is None else (lm.eval().requires_grad_(False),)
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

    def forward(self, batch: Batch, entropy: bool = False) -> tuple[Statistics, Statistics | None]:
        """Statistics of the policy, and of the reference where one is held."""
        lm, reference = self.lm, self._reference[0] if self._reference else None
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
        total = lambda x: None if x is None else mine.to(x.dtype) @ x  # noqa: E731
        features = lambda read: tuple(  # noqa: E731
            pooled_features(h, sae, batch.owner, batch.lengths, self._most)
            for h, sae in zip(read, self._saes, strict=True)
        )
        policy = Statistics(total(logps), batch.lengths, features(sites), total(kl), total(H))
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
    """This rank's micro-batches, followed by empty ones until every rank has as many (collectives must not
    wait).
    """
    count = torch.tensor(len(groups), device=device)
    if dist.is_initialized():
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return groups + [[] for _ in range(int(count) - len(groups))]


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

    cuda = torch.device(device).type == "cuda"
    loader = DataLoader(groups, batch_size=None, collate_fn=load, pin_memory=cuda, num_workers=int(cuda))
    for batch, reference in loader:
        if reference is not None:
            logps, _, features, *_ = reference
            features = tuple(c.to(device, non_blocking=True) for c in features)
            reference = Statistics(logps.to(device, non_blocking=True), features=features)
        yield batch.to(device), reference


# ---------------------------------------------------------------------------- Phase 1: the offline reference
SHARD = 256  # pairs to a file: what an interruption can lose


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over every tensor's name, type, shape and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def reference_identity(
    policy: Policy, pairs: Pairs, *, weights: str, arithmetic: dict, cache_top: int = 0
) -> dict:
    """All that the cached values depend on; learning rate, α, β, γ, k, method and folder are not among it.

    Args:
        weights: `digest` of the reference's state dict.
        arithmetic: what changes the rounding: row layout, device, compile.
        cache_top: features kept of each response, 0 for all that are not zero.
    """
    saes = []
    for sae, (layer, site) in zip(policy._saes, policy._sites, strict=True):
        encoder = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "threshold")}
        saes.append([layer, site, sae.m, digest(encoder)])
    config = policy.lm.config
    return {
        "version": 1,
        "tokens": pairs.digest(),
        "weights": weights,
        "dtype": str(policy.lm.dtype),
        "attention": config._attn_implementation,
        **arithmetic,
        "cache_top": cache_top if saes else 0,
        "saes": saes,
    }


def find_reference(cache_dir, identity: dict) -> Path:
    """The folder of a cache with this identity: one that has all its SAEs, perhaps more; else a new one."""
    for folder in sorted(Path(cache_dir).glob("*/")):
        if _serves(_manifest(folder), identity):
            return folder
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return Path(cache_dir) / key


def _serves(manifest: dict | None, identity: dict) -> bool:
    """Whether a cache of that manifest gives what this identity asks for."""
    if manifest is None or manifest["shard"] != SHARD:
        return False
    found, wanted = manifest["identity"], identity["saes"]
    fixed = [key for key in identity if key not in ("saes", "cache_top")]
    same = all(found.get(key) == identity[key] for key in fixed)
    features = not wanted or found.get("cache_top") == identity["cache_top"]
    return same and features and all(sae in found.get("saes", []) for sae in wanted)


def build_reference(
    policy: Policy, pairs: Pairs, cache_dir, identity: dict, *, max_tokens=0, max_pairs=0, **rows
):
    """Phase 1 (Sec. 3): run π_ref once over the pairs and store what the loss needs of it.

    Stored per pair: both sums of log-probabilities (β and the lengths are applied later) and both pooled
    feature vectors, sparse. Shards of `SHARD` pairs are split over the ranks, written aside and renamed;
    those already there are kept, so an interrupted pass goes on where it was.

    Args:
        policy: a Policy whose lm is the reference.
        identity: see `reference_identity`.
        max_tokens, max_pairs, rows: the micro-batches, as `data.micro_batches` and `data.collate` take them.
    Returns:
        ReferenceCache.
    """
    rank, world = ranks()
    device = policy.lm.device
    folder = find_reference(cache_dir, identity)
    barrier()  # every rank has looked before any writes
    lock = _lock(folder) if rank == 0 else None
    if rank == 0 and not _serves(_manifest(folder), identity):
        write_json(folder / "manifest.json", {"identity": identity, "pairs": len(pairs), "shard": SHARD})
    barrier()
    shards = [folder / f"shard_{s:05d}.safetensors" for s in range(-(-len(pairs) // SHARD))]
    missing = [s for s, path in enumerate(shards) if not _whole(path)]
    barrier()  # every rank has seen the same
    budget = {"max_pairs": max_pairs, "max_tokens": max_tokens}
    groups, ends = _shard_batches(pairs, missing[rank::world], rows["layout"], budget)
    groups = lockstep(groups, device)
    policy.eval()
    parts, dropped = [], []
    bar = tqdm(total=len(groups), desc="reference (Phase 1)", unit=" batches", disable=rank > 0 or not groups)
    with torch.no_grad(), bar:
        for i, (batch, _) in enumerate(stream(pairs, groups, device=device, **rows)):
            statistics, _ = policy(batch)
            if groups[i]:
                parts.append(_sparse(batch.index, statistics, identity["cache_top"], dropped))
            if i in ends:
                _write_shard(shards[ends[i]], parts)
                parts = []
            bar.update()
    if dropped and rank == 0:
        share, largest = (torch.stack(column) for column in zip(*dropped, strict=True))
        what = f"{share.mean():.2%} are dropped, the largest {largest.max():.3g}"
        print(f"--cache_top: of the squared activations {what}")
    barrier()
    if lock:
        lock.close()
    return ReferenceCache(folder, identity["saes"])


def _shard_batches(pairs, shards, layout, budget):
    """Micro-batches of some shards, one shard's after the other's; and which of them ends which shard."""
    lengths, groups, ends = pairs.row_lengths(layout), [], {}
    for shard in shards:
        members = range(shard * SHARD, min(len(pairs), (shard + 1) * SHARD))
        groups += micro_batches(members, lengths, 1, **budget)
        ends[len(groups) - 1] = shard
    return groups, ends


def _sparse(index, statistics, top, dropped):
    """Per pair of a batch: its index, both log-probabilities, per SAE the non-zero features of both sides.

    With `top` a response keeps its so many largest features; `dropped` then gets, of each batch, the share
    of the squared activations that was left out, and the largest activation among them.
    """
    logps = statistics.logps.cpu().view(2, -1).T
    kept = []
    for c in statistics.features:
        c = c.cpu()
        if top:
            best = c.topk(min(top, c.shape[1]))
            rest = c.scatter(1, best.indices, 0.0)
            dropped.append((rest.square().sum() / c.square().sum().clamp(min=1e-30), rest.max()))
            c = c - rest
        kept.append([[(row.nonzero()[:, 0].int(), row[row != 0]) for row in side] for side in c.chunk(2)])
    return [
        (i, logps[b], [[side[b] for side in sides] for sides in kept]) for b, i in enumerate(index.tolist())
    ]


def _write_shard(path, parts):
    """Pairs in order of their index; a feature vector is a run of ids and values, `counts` long."""
    pairs = sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
    tensors = {"logps": torch.stack([logps for _, logps, _ in pairs])}
    for s in range(len(pairs[0][2])):
        vectors = [vector for _, _, features in pairs for vector in features[s]]
        tensors[f"counts.{s}"] = torch.tensor([len(ids) for ids, _ in vectors]).view(-1, 2)
        tensors[f"ids.{s}"] = torch.cat([ids for ids, _ in vectors])
        tensors[f"values.{s}"] = torch.cat([values for _, values in vectors])
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(tensors, aside, metadata={"cache": path.parent.name})
    except SafetensorError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{aside}: {error}") from None
    checksum, stat = _checksum(aside), aside.stat()
    aside.replace(path)
    write_json(
        path.with_suffix(".json"), {"sha256": checksum, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    )


def _checksum(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _whole(path) -> bool:
    """Whether a shard is there, is this cache's, and has the bytes that were written.

    The checksum is taken where size or time are not those noted at the writing; lookups take it in any case.
    """
    try:
        note, stat = json.loads(path.with_suffix(".json").read_text()), path.stat()
        untouched = (note["size"], note["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
        if not untouched and note["sha256"] != _checksum(path):
            return False
        with safe_open(path, "pt") as file:
            return file.metadata()["cache"] == path.parent.name
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False


def _lock(folder):
    """Hold a cache folder alone: a second process that builds the same cache waits for the first, even a
    killed one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{folder}: another process builds this cache; waiting for it", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _manifest(folder) -> dict | None:
    """A cache's manifest; None where it is missing, not JSON or not of this form."""
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
        return manifest if {"identity", "pairs", "shard"} <= set(manifest) else None
    except (OSError, ValueError, TypeError):
        return None


def write_json(path, value):
    """Write JSON aside and rename: a reader sees the old file or the new one."""
    aside = Path(path).with_suffix(f".{os.getpid()}.tmp")
    aside.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(json.dumps(value, indent=1) + "\n")
    aside.replace(path)


class ReferenceCache:
    """Phase 2's reference: statistics of any pairs, read from the shards as they are asked for.

    Args:
        folder: what `build_reference` wrote.
        saes: the SAEs wanted, as in its identity; those of the cache may be more.
    """

    def __init__(self, folder, saes):
        self.folder = Path(folder)
        manifest = _manifest(self.folder)
        stored = manifest["identity"]["saes"]
        self.pairs, self.shard = manifest["pairs"], manifest["shard"]
        self.places = [(stored.index(sae), sae[2]) for sae in saes]  # (number in the shards, m)
        self._open = {}  # shard -> (file, log-probabilities, per SAE where each vector starts)

    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("shard_*.safetensors"))

    def _shard(self, number):
        if number not in self._open:
            path = self.folder / f"shard_{number:05d}.safetensors"
            note = path.with_suffix(".json")
            if not note.exists() or json.loads(note.read_text())["sha256"] != _checksum(path):
                note.unlink(missing_ok=True)
                raise ValueError(
                    f"{path}: not the bytes that were written; start again, and it is made again"
                )
            file = safe_open(path, "pt")
            starts = {}
            for s, _ in self.places:
                starts[s] = F.pad(file.get_tensor(f"counts.{s}").flatten().cumsum(0), (1, 0)).tolist()
            self._open[number] = file, file.get_tensor("logps"), starts
        return self._open[number]

    def lookup(self, index) -> Statistics:
        """Statistics of the B pairs at places `index` (B,): logps (2B,), features per SAE (2B, m)."""
        index = index.tolist()
        logps = torch.empty(2, len(index))
        features = tuple(torch.zeros(2 * len(index), m) for _, m in self.places)
        for b, i in enumerate(index):
            file, shard_logps, starts = self._shard(i // self.shard)
            row = i % self.shard
            logps[:, b] = shard_logps[row]
            for (s, _), dense in zip(self.places, features, strict=True):
                ids, values = file.get_slice(f"ids.{s}"), file.get_slice(f"values.{s}")
                for side in (0, 1):
                    a, z = starts[s][2 * row + side : 2 * row + side + 2]
                    dense[b + side * len(index), ids[a:z].long()] = values[a:z]
        return Statistics(logps.flatten(), features=features)


# ---------------------------------------------------------------------------- method -> loss
def method_loss(
    method,
    policy,
    reference=None,
    *,
    beta,
    alpha=0.5,
    gamma=0.5,
    k=50,
    stop_gradient=True,
    feature_weights=None,
):
    """One method's loss per pair, from the statistics (Table 1, Table 6).

    Args:
        method: one of METHODS.
        policy: Statistics of the policy, 2B responses.
        reference: Statistics of the reference; not needed by sft and simpo, whose values they only add to.
        beta, alpha, gamma, k: as in Table 5; k of Eq. 10.
        stop_gradient: whether δ_FPO's chosen term is held constant.
        feature_weights: per SAE (m,), or None: weights of the squared differences (the control experiment,
            Table 4).
    Returns:
        loss (B,), and a dict of (B,) values to log: rewards; mse, kl of chosen and rejected if there.
    """
    w, l = policy.logps.chunk(2)
    n_w, n_l = policy.lengths.chunk(2)
    values = _distances(policy, reference, k, feature_weights)
    kls = (values["kl_chosen"], values["kl_rejected"]) if method in NEEDED else None
    four = (w, l, *reference.logps.chunk(2)) if reference is not None else None

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
        mses = (values["mse_chosen"], values["mse_rejected"])
        loss = losses.fpo_loss(*four, n_w, n_l, *mses, beta=beta, alpha=alpha, stop_gradient=stop_gradient)
    else:
        raise ValueError(f"method {method!r}: one of {', '.join(METHODS)}")
    values["reward_chosen"], values["reward_rejected"] = rewards(method, policy, reference, beta=beta).chunk(
        2
    )
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
    """(2B,) what a method's LPD and γ_ref make of each response: β log(π/π_ref), by |y| for FPO; SimPO's
    β/|y| log π.
    """
    n = policy.lengths.clamp(min=1)
    if method in ("simpo", "simpo_kl"):
        return (beta * policy.logps / n).detach()
    ratio = (policy.logps - reference.logps).detach()
    return beta * ratio / n if method == "fpo" else beta * ratio
