"""Scores of pairs, as fractions whose means and intervals can be taken."""

import torch
import torch.distributed as dist
from tqdm import tqdm

import offline
from batches import plan_for_one, stream
from fpo import distances
from losses import PER_TOKEN
from runtime import ranks

# Nats by which another order of float32's sums changes a token's log-probability, at most. A product of d
# terms is off by about √d units of 2^-23, layers of them by a few times that: root mean squares were 47 units
# at d = 576 (30 layers), 4 to 7 at d = 32 and 64 (4 layers), with AVX-512, AVX2 and SSE4.1. What bf16 rounds
# is thousands of times coarser, but the same micro-batch gives the same bits (`shard_batches`).
ROUNDING = 256 * 2**-23

# FLOP/s of dense bf16 products, by a part of the card's name: the makers' figures.
BF16_PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def step_flops(lm, tokens: int, targets: int) -> int:
    """FLOPs that a step needs: 6 per weight and token; of the head's weights, only for the targets.

    A checkpointed layer's second forward and attention's products are left out, as MFU leaves them out.
    """
    table, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight  # perhaps the same
    body = sum(p.numel() for p in lm.parameters() if p is not table and p is not head)
    return 6 * (body * tokens + head.numel() * targets)


def peak_flops(device) -> float | None:
    """The card's FLOP/s in bf16; None where the card is not known, or there is none."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for card, peak in BF16_PEAK.items() if card in name), None)


@torch.no_grad()
def score_pairs(
    policy, pairs, *, lookup=None, k=50, units=(), top=0, max_tokens=0, progress=False, **row_options
) -> dict[str, torch.Tensor]:
    """What a policy makes of every pair, in the data set's order, the same on every rank.

    The reference is the one that the policy holds, else the cache's, else there is none.

    Args:
        lookup: ReferenceCache.lookup of these pairs, or None.
        top: also each response's so many largest pooled features (of the first SAE), in order.
        max_tokens, row_options: micro-batches, as `build_reference` takes them.
    Returns:
        {name: (n,) float64}, names ending in _chosen and _rejected. Always: logps, lengths, entropy (summed,
        nats). With a reference: ratio = log π/π_ref, and mse where there are SAEs. With a held one also kl.
        With `top`: activations_policy, activations_reference (n, top).
    """
    rank, world = ranks()
    # Phase 1's micro-batches: the log π of a policy that has not moved are the cache's, bit for bit.
    shards, device = range(-(-len(pairs) // offline.SHARD)), policy.lm.device
    groups, _ = offline.shard_batches(pairs, shards, device, max_tokens, row_options)
    groups += [[] for _ in range(-len(groups) % world)]  # as many for each rank
    was_training, table, mine = policy.training, dict[str, torch.Tensor](), groups[rank::world]
    policy.eval()
    batches = stream(pairs, mine, device=policy.lm.device, lookup=lookup, **row_options)
    shown = progress and rank == 0
    for batch, cached in tqdm(batches, "evaluating", len(mine), disable=None if shown else True, leave=False):
        policy_says, held = policy(batch, entropy=True)
        values = _response_values(policy_says, held or cached, k, units, top)
        for name, value in values.items():
            weight = batch.weight.view(-1, *[1] * (value.ndim - 1))  # 0: a padding pair
            for side, half in zip(("chosen", "rejected"), value.chunk(2), strict=True):
                zeros = half.new_zeros(len(pairs), *half.shape[1:], dtype=torch.float64)
                table.setdefault(f"{name}_{side}", zeros)[batch.index] += half * weight
    policy.train(was_training)
    if dist.is_initialized():
        for name in sorted(table):
            dist.all_reduce(table[name])
    return {name: column.cpu() for name, column in table.items()}


def _response_values(policy, reference, k, units, top):
    """{name: (2·B,) or (2·B, top)} of one batch, for `score_pairs`, from Statistics (reference: or None)."""
    values = {"logps": policy.logps, "lengths": policy.lengths, "entropy": policy.entropy}
    values |= distances(policy, reference, k=k, units=units)
    if reference is not None:
        values["ratio"] = policy.logps - reference.logps
    for name, says in (("policy", policy), ("reference", reference)):
        if top and says is not None and says.features:
            c = says.features[0]
            values[f"activations_{name}"] = c.topk(min(top, c.shape[1])).values
    return values


@torch.no_grad()
def moved_features(policy, pairs, top, *, max_tokens=0, progress=False, **row_options) -> list[dict]:
    """The `top` features of the first SAE whose pooled mean moved most from the held reference's; most first.

    Returns [{"id", "before", "after", "responses"}], the same on every rank: c̄ (Eq. 10) of the reference and
    of the policy, each a mean over all responses; and on how many responses either has the feature active.
    """
    rank, world = ranks()
    groups = plan_for_one(pairs, range(len(pairs)), policy.lm.device, max_tokens=max_tokens, **row_options)
    groups = groups[rank::world]  # this rank's
    # ---- of each feature: Σ before, Σ after, on how many responses
    sums = torch.zeros(3, policy.saes[0].m, dtype=torch.float64, device=policy.lm.device)  # (3, m)
    batches = stream(pairs, groups, device=policy.lm.device, **row_options)
    shown = progress and rank == 0
    policy.eval()
    for batch, _ in tqdm(batches, "features", len(groups), disable=None if shown else True, leave=False):
        after, before = (says.features[0] for says in policy(batch))  # (2·B, m) each
        active = (before != 0) | (after != 0)
        sums += torch.stack([before, after, active.float()]).sum(1)
    if dist.is_initialized():
        dist.all_reduce(sums)
    responses = int((pairs.sizes[:, 1:] > 0).sum())  # an SFT pair has one
    before, after = sums[:2] / responses
    ids = (after - before).abs().topk(min(top, len(before))).indices
    columns = (values[ids].tolist() for values in (before, after, sums[2]))
    return [
        {"id": i, "before": b, "after": a, "responses": int(n)}
        for i, b, a, n in zip(ids.tolist(), *columns, strict=True)
    ]


def pair_columns(table, *, method=None, beta=0.1) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Scores of a `score_pairs` table as fractions: {key: (numerator (n,), denominator (n,))}.

    Keys: accuracy, accuracy_sum (share of pairs whose chosen response has the higher log π(y|x) / |y|, or
    log π(y|x)); reward_accuracy_mean, reward_accuracy_sum (the same of log π/π_ref) and reward_accuracy (of
    the method's own reward); nll_chosen; teacher_forced_entropy; kl_*, mse_* and their gaps.

    Args:
        method: whose reward `reward_accuracy` is; None leaves it out.
        beta: β of the gaps |β D(y_l) - β D(y_w)| (Figs. 3, 4): one for all methods, to compare them.
    """
    one = torch.ones_like(table["logps_chosen"])
    n = {side: table[f"lengths_{side}"] for side in ("chosen", "rejected")}
    both = bool(n["rejected"].any())  # SFT has no rejected responses
    columns = {"nll_chosen": (-table["logps_chosen"] / n["chosen"].clamp(min=1), one)}

    def share_above(name, per_token):
        """Pairs whose chosen response is above the rejected one; a tie counts half.

        A tie is what the rounding of float32 can make of equals: errors of n tokens have any sign, so that
        their sum is off by √n · ROUNDING, and the mean by ROUNDING / √n.
        """
        # (n,) each; a response that is not there (SFT's rejected) has 0 tokens
        w, l = (table[f"{name}_{side}"] / (n[side].clamp(min=1) if per_token else 1) for side in n)
        variance = sum(1 / x.clamp(min=1) if per_token else x for x in n.values())
        return torch.where((w - l).abs() <= ROUNDING * variance.sqrt(), 0.5, (w > l).double()), one

    if both:
        columns |= {"accuracy": share_above("logps", True), "accuracy_sum": share_above("logps", False)}
        if "ratio_chosen" in table:
            columns["reward_accuracy_mean"] = share_above("ratio", True)
            columns["reward_accuracy_sum"] = share_above("ratio", False)
        own = "logps" if method in ("simpo", "simpo_kl") else "ratio"
        if method not in (None, "sft") and f"{own}_chosen" in table:
            columns["reward_accuracy"] = share_above(own, method in PER_TOKEN)
    # ---- entropy: a mean over tokens, hence a fraction of sums
    sides = ("chosen", "rejected") if both else ("chosen",)
    entropy, tokens = (sum(table[f"{name}_{side}"] for side in sides) for name in ("entropy", "lengths"))
    columns["teacher_forced_entropy"] = entropy, tokens
    # ---- distances: a mean over responses
    for name in ("kl", "mse"):
        if f"{name}_chosen" in table:
            columns |= {f"{name}_{side}": (table[f"{name}_{side}"], one) for side in sides}
            if both:
                gap = beta * table[f"{name}_rejected"] - beta * table[f"{name}_chosen"]
                columns[f"{name}_gap"] = gap.abs(), one
    return columns


def summary(groups, *, bootstrap=0, seed=0) -> dict:
    """{key: Σ numerator / Σ denominator} of groups of {key: (numerator (n,), denominator (n,))}.

    With `bootstrap` also "intervals": for each key the 2.5th and 97.5th percentile over so many resamples,
    with replacement, of a group's n items: how a value varies with the items, not with the seed of training.
    """
    scores, intervals = dict[str, float](), dict[str, list[float]]()
    for columns in groups:
        parts = zip(*columns.values(), strict=True)  # all numerators, all denominators
        numerator, denominator = (torch.stack(part, 1).double() for part in parts)  # (n, keys)
        scores |= dict(zip(columns, (numerator.sum(0) / denominator.sum(0)).tolist(), strict=True))
        g, n = torch.Generator().manual_seed(seed), len(numerator)
        # A resample is how often each item was drawn, (n,).
        drawn = (torch.randint(n, (n,), generator=g).bincount(minlength=n).double() for _ in range(bootstrap))
        draws = [(times @ numerator) / (times @ denominator) for times in drawn]
        if draws:
            low, high = torch.stack(draws).quantile(torch.tensor([0.025, 0.975]).double(), dim=0).tolist()
            intervals |= {name: list(ends) for name, *ends in zip(columns, low, high, strict=True)}
    return {**scores, "intervals": intervals} if bootstrap else scores
