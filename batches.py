"""Pairs -> batches of rows for the transformer, planned over steps and ranks, and made ahead of its work.

    Batch    rows of tokens for the transformer; the response tokens, flat, for everything after it

Two layouts of a batch give the same values up to rounding. "separate" has two rows per pair, [prompt |
chosen] and [prompt | rejected]; "shared" has one, [prompt | chosen | rejected], in which the rejected
response's positions restart at the prompt's end, and neither response sees the other: a query sees the keys
with  k <= q,  doc[k] == doc[q]  and  segment[k] in {0, segment[q]}.
"""

import math
import signal
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from data import Pairs


# ---------------------------------------------------------------------------- batches
class Batch(NamedTuple):
    """B pairs as R rows of L tokens, and their N response tokens, flat. All int64 but `weight`."""

    tokens: torch.Tensor  # (R, L)
    positions: torch.Tensor  # (R, L) restart at the prompt's end for the rejected response
    segment: torch.Tensor  # (R, L) 0 prompt, 1 chosen, 2 rejected, -1 padding
    doc: torch.Tensor  # (R, L) the row's number, -1 padding
    state: torch.Tensor  # (N,) which of the R·L places predicts the token: the one before it
    target: torch.Tensor  # (N,) the token
    owner: torch.Tensor  # (N,) which of the 2·B responses it belongs to: B chosen, then B rejected; sorted
    lengths: torch.Tensor  # (2·B,) targets of each response (0 for SFT's rejected)
    index: torch.Tensor  # type: ignore[assignment]  # (B,) the pairs' places in the data set
    weight: torch.Tensor  # (B,) float32, 1; 0 for a padding pair, which only keeps a rank busy

    def to(self, device) -> "Batch":
        """This batch on a device; from pinned memory without a wait."""
        return Batch(*(x.to(device, non_blocking=True) for x in self))


def collate(
    pairs, indices, *, layout="separate", row_multiple=1, pad_id=0, padding_pair=False, all_positions=False
) -> Batch:
    """The Batch of B pairs, given by their places in the data set.

    row_multiple: rows are padded to a multiple of it (flex_attention works in blocks of 128).
    padding_pair: these pairs carry weight 0.
    all_positions: every token but a row's first is a target, always in separate rows (for the entropy).
    """
    indices, pieces, sizes = [int(i) for i in indices], [], []
    B, shared = len(indices), layout == "shared" and not all_positions
    # The pieces of each row, one after the other; SFT has no rejected response, and one row in any layout.
    for b, i in enumerate(indices):
        prompt, chosen, rejected = pairs[i]
        one = shared or not len(rejected)
        for y_w, y_l in [(chosen, rejected)] if one else [(chosen, prompt[:0]), (prompt[:0], rejected)]:
            pieces += [prompt, y_w, y_l]
            sizes.append((len(prompt), len(y_w), len(y_l), b))
    # Of each row, (R, 1): the tokens of prompt, chosen and rejected in it, and the pair's place in the batch.
    P, W, J, pair = torch.tensor(sizes).T[..., None]
    R, L = len(sizes), math.ceil(int((P + W + J).max()) / row_multiple) * row_multiple
    row, place = torch.arange(R)[:, None], torch.arange(L)
    there = place < P + W + J  # (R, L), as all below: False where a row is padding
    # Row by row the places that are no padding take the tokens in their order.
    tokens = torch.full((R, L), pad_id).masked_scatter(there, torch.cat(pieces))
    segment = torch.where(place < P, 0, torch.where(place < P + W, 1, 2)).where(there, -1)
    positions = torch.where(segment == 2, place - W, place).where(there, 0)
    # Both first tokens of the responses are predicted by the prompt's last, all others by the one before.
    before = torch.where((place == P) | (place == P + W), P, place) - 1
    owner = torch.where((segment == 2) | (W == 0), B + pair, pair)  # a row without chosen is rejected's
    learnt = torch.cat([pairs.read(i, "is_target") for i in indices]).bool()  # of the chosen responses
    is_target = (segment == 2).masked_scatter(segment == 1, learnt)
    at = (there & (place > 0) if all_positions else is_target).flatten().nonzero()[:, 0]
    at = at[owner.flatten()[at].argsort(stable=True)]  # (N,) the targets' places, by response
    owner = owner.flatten()[at]  # (N,)
    return Batch(
        tokens, positions, segment, doc=row.where(there, -1), state=(row * L + before).flatten()[at],
        target=tokens.flatten()[at], owner=owner, lengths=owner.bincount(minlength=2 * B),
        index=torch.tensor(indices), weight=torch.full((B,), 0.0 if padding_pair else 1.0),
    )  # fmt: skip


# ---------------------------------------------------------------------------- steps
def micro_batches(indices, row_lengths, ranks: int, *, max_pairs=0, max_tokens=0) -> list[list[int]]:
    """Cut one global batch into micro-batches of similar lengths; micro-batch j goes to rank j % ranks.

    Their number is a multiple of `ranks`; where pairs are fewer than ranks, the last ones are empty.
    row_lengths: (n,) tokens of each pair of the data set.
    max_pairs, max_tokens: of a micro-batch, each pair counted as long as the longest; 0 for no limit. A pair
    of more tokens goes alone.
    """
    rest = sorted((int(i) for i in indices), key=lambda i: (-int(row_lengths[i]), i))  # the longest first
    # No more than an equal share of the pairs, so that no rank is idle.
    cap, groups = min(max_pairs or len(rest), math.ceil(len(rest) / ranks)), list[list[int]]()
    while rest:
        fit = max(1, max_tokens // int(row_lengths[rest[0]])) if max_tokens else cap
        groups.append(rest[: min(cap, fit)])
        rest = rest[min(cap, fit) :]
    while len(groups) % ranks:  # halve the largest until every rank has as many; half of one pair is empty
        j = max(range(len(groups)), key=lambda j: len(groups[j]))
        half = (len(groups[j]) + 1) // 2
        groups[j : j + 1] = groups[j][:half], groups[j][half:]
    return sorted(groups, key=lambda group: not group)


def epoch_order(n: int, epoch: int, seed: int) -> torch.Tensor:
    """(n,) the order in which an epoch visits the pairs: a permutation by seed and epoch alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def lockstep(groups: list[list[int]], device) -> list[list[int]]:
    """This rank's micro-batches, then empty ones until every rank has as many: no collective hangs."""
    count = torch.tensor(len(groups), device=device)
    if dist.is_initialized():
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return groups + [[] for _ in range(int(count) - len(groups))]


LOADERS = {"cuda": 1, "cpu": 0}  # processes that make batches ahead


def stream(pairs: Pairs, groups, *, device, lookup=None, **rows):
    """(Batch, the reference's statistics or None) of each micro-batch, on the device, made ahead of its work.

    groups: lists of pair indices; an empty one becomes a padding pair of weight 0.
    lookup: a function of a batch's `index` that gives tensors, as a (named) tuple.
    rows: layout and padding, as `collate` takes them.
    """

    def ignore_signals(_):
        """torchrun signals a rank's whole group, and the rank itself ends its loader."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def load(group):
        """A micro-batch, and what is looked up for it."""
        batch = collate(pairs, group or [0], padding_pair=not group, **rows)
        return batch, None if lookup is None else lookup(batch.index)

    workers = LOADERS.get(kind := torch.device(device).type, 0)
    loader = DataLoader(
        groups, batch_size=None, collate_fn=load, pin_memory=kind == "cuda", num_workers=workers,
        worker_init_fn=ignore_signals, multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    for made in loader:  # (Batch, statistics), from pinned memory without a wait
        yield tree_map_only(torch.Tensor, lambda x: x.to(device, non_blocking=True), made)
