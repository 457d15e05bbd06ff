"""Pairs -> batches of packed rows for the transformer, planned over steps and ranks, and made ahead.

    Batch    rows of tokens for the transformer; the response tokens, flat, for everything after it
    plan     a step's pairs -> every rank's micro-batches, few, so that none computes padding or waits

A row holds documents, one after the other. Two layouts give the same values up to rounding: "separate" makes
two documents of a pair, [prompt | chosen] and [prompt | rejected]; "shared" makes one, [prompt | chosen |
rejected], in which the rejected response's positions restart at the prompt's end, and neither response sees
the other. Positions start anew in each document, and a query sees the keys with

    k <= q,  doc[k] == doc[q]  and  segment[k] in {0, segment[q]}.
"""

import heapq
import math
import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from data import Pairs
from runtime import UserError


# ---------------------------------------------------------------------------- batches
class Batch(NamedTuple):
    """B pairs in R rows of L tokens, and their N response tokens, flat. Tensors are int64 but `weight`."""

    tokens: torch.Tensor  # (R, L)
    positions: torch.Tensor  # (R, L) from 0 in each document; the rejected response's from the prompt's end
    segment: torch.Tensor  # (R, L) 0 prompt, 1 chosen, 2 rejected, -1 padding
    doc: torch.Tensor  # (R, L) the document's number in the batch, -1 padding
    state: torch.Tensor  # (N,) which of the R·L places predicts the token: the one before it
    target: torch.Tensor  # (N,) the token
    owner: torch.Tensor  # (N,) which of the 2·B responses it belongs to: B chosen, then B rejected; sorted
    lengths: torch.Tensor  # (2·B,) targets of each response (0 for SFT's rejected)
    index: torch.Tensor  # type: ignore[assignment]  # (B,) the pairs' places in the data set
    weight: torch.Tensor  # (B,) float32, 1; 0 for a padding pair, which only keeps a rank busy
    reach: int  # positions of the longest sequence: a window of so many hides nothing

    def to(self, device) -> "Batch":
        """This batch on a device; from pinned memory without a wait."""
        return tree_map_only(torch.Tensor, lambda x: x.to(device, non_blocking=True), self)


def lay_out(lengths, row_tokens=None, row_multiple=1) -> tuple[list[int], int, int]:
    """Documents, given by their lengths, in R rows of L tokens: the place of each one's first token; R, L.

    row_tokens: pack into the fewest rows of at most this length, or the longest document's, filled evenly:
        the longest document first, each into the row with most room. None: each document by itself.
    row_multiple: L is a multiple of it.
    """
    order, most = sorted(range(len(lengths)), key=lambda d: -lengths[d]), max(row_tokens or 0, *lengths)
    # No fewer rows than hold all tokens, or than there are documents of which no two fit into one.
    fewest = max(math.ceil(sum(lengths) / most), sum(2 * length > most for length in lengths))
    n = len(lengths) if row_tokens is None else fewest
    while True:
        rows, heap = list[list[int]]([] for _ in range(n)), [(0, r) for r in range(n)]
        for d in order:
            filled, r = heap[0]
            heapq.heapreplace(heap, (filled + lengths[d], r))
            rows[r].append(d)
        longest = max(heap)[0]
        if longest <= most:  # at the latest where each document has a row
            break
        n += 1
    L, start = math.ceil(longest / row_multiple) * row_multiple, [0] * len(lengths)
    for r, row in enumerate(sorted(map(sorted, rows))):  # in the order given, as far as that can be
        place = r * L
        for d in row:
            start[d], place = place, place + lengths[d]
    return start, n, L


def collate(
    pairs, indices, *, layout="separate", row_tokens=None, row_multiple=1, pad_id=0, padding_pair=False,
    all_positions=False,
) -> Batch:  # fmt: skip
    """The Batch of B pairs, given by their places in the data set.

    layout: of a pair, as in this file's head; row_tokens, row_multiple: of the rows, as `lay_out` takes them.
    padding_pair: these pairs carry weight 0.
    all_positions: every token but a document's first is a target, in separate documents (for the entropy).
    """
    indices, pieces, parts = [int(i) for i in indices], [], []
    B, shared = len(indices), layout == "shared" and not all_positions
    # The pieces of each document; SFT has no rejected response, and one document in any layout.
    for b, i in enumerate(indices):
        prompt, chosen, rejected = pairs[i]
        one = shared or not len(rejected)
        for y_w, y_l in [(chosen, rejected)] if one else [(chosen, prompt[:0]), (prompt[:0], rejected)]:
            pieces += [prompt, y_w, y_l]
            parts.append((len(prompt), len(y_w), len(y_l), b))
    start, R, L = lay_out([sum(part[:3]) for part in parts], row_tokens, row_multiple)
    # Of each of the T tokens, as all below: its document, its place therein and among all R·L.
    size = torch.tensor(parts)[:, :3].sum(1)  # (D,)
    doc = torch.arange(len(parts)).repeat_interleave(size)
    t = torch.arange(len(doc)) - (size.cumsum(0) - size)[doc]
    place = torch.tensor(start)[doc] + t
    P, W, _, pair = torch.tensor(parts)[doc].T
    segment = torch.where(t < P, 0, torch.where(t < P + W, 1, 2))
    positions = torch.where(segment == 2, t - W, t)
    # Both first tokens of the responses are predicted by the prompt's last, all others by the one before.
    before = place - t + torch.where((t == P) | (t == P + W), P, t) - 1
    owner = torch.where((segment == 2) | (W == 0), B + pair, pair)  # without chosen it is rejected's
    learnt = torch.cat([pairs.read(i, "is_target") for i in indices]).bool()  # of the chosen responses
    is_target = (segment == 2).masked_scatter(segment == 1, learnt)
    at = (positions > 0 if all_positions else is_target).nonzero()[:, 0]
    at = at[owner[at].argsort(stable=True)]  # (N,) the targets among the T tokens, by response
    tokens = torch.cat(pieces)

    def in_rows(values, padding):
        """(T,) values at their tokens' places (R, L)."""
        return torch.full((R * L,), padding).index_put((place,), values).view(R, L)

    return Batch(
        in_rows(tokens, pad_id), in_rows(positions, 0), in_rows(segment, -1), in_rows(doc, -1), before[at],
        target=tokens[at], owner=owner[at], lengths=owner[at].bincount(minlength=2 * B),
        index=torch.tensor(indices), weight=torch.full((B,), 0.0 if padding_pair else 1.0),
        reach=int(positions.max()) + 1,
    )  # fmt: skip


# ---------------------------------------------------------------------------- steps
def padded_tokens(lengths, row_tokens=None, row_multiple=1, **_) -> int:
    """R·L, the tokens of a forward with padding, of documents given by their lengths."""
    if sum(lengths) <= (row_tokens or 0):  # one row: the answer without the search for it
        return math.ceil(sum(lengths) / row_multiple) * row_multiple
    R, L = lay_out(lengths, row_tokens, row_multiple)[1:]
    return R * L


def fits(lengths, max_tokens, row_tokens=None, row_multiple=1, **_) -> bool:
    """Whether these documents take at most so many tokens with padding; 0 for no limit."""
    longest = max(row_tokens or 0, *lengths) + row_multiple - 1  # of a row at most
    if max_tokens == 0 or len(lengths) * longest <= max_tokens:  # even with a row each
        return True
    return padded_tokens(lengths, row_tokens, row_multiple) <= max_tokens


def longest_first(indices, documents) -> list[int]:
    """Pairs by their tokens, the most first; equal ones by their places in the data set."""
    return sorted(map(int, indices), key=lambda i: (-sum(documents[i]), i))


def plan(indices, documents, ranks: int, *, max_tokens=0, **row_options) -> list[list[int]]:
    """Cut one step's pairs into few micro-batches; micro-batch j goes to rank j % ranks.

    The longest pair first, each to the rank with the fewest tokens so far: the ranks' sums are as equal as
    the shortest pairs make them. There it goes into the first micro-batch with room for it: long pairs stay
    together, short ones fill what is left. Every rank gets as many micro-batches, of which some may be empty.

    Args:
        documents: of each pair of the data set the lengths of its documents, as Pairs.documents gives them.
        max_tokens: of a micro-batch, padding counted; 0 for no limit. A pair of more tokens goes alone.
        row_options: as `collate` takes them.
    """
    heap, cut = [(0, r) for r in range(ranks)], list[list[list[int]]]([] for _ in range(ranks))
    for i in longest_first(indices, documents):
        total, r = heap[0]
        heapq.heapreplace(heap, (total + sum(documents[i]), r))
        for group in cut[r]:
            if fits([n for j in (*group, i) for n in documents[j]], max_tokens, **row_options):
                group.append(i)
                break
        else:
            cut[r].append([i])
    micro_steps = max(map(len, cut))
    return [groups[j] if j < len(groups) else [] for j in range(micro_steps) for groups in cut]


def work_of(groups, documents, ranks: int, *, waits_each=False, **row_options) -> tuple[int, int]:
    """(a step's tokens, the tokens that all ranks could compute in the time of the slowest, padding too).

    The first over the second is the step's fill. waits_each: ranks wait for the slowest at each micro-step
    (FSDP), not once a step. groups: as `plan` gives them; documents, row_options: as it takes them.
    """
    real = sum(n for group in groups for i in group for n in documents[i])
    idle = [] if all(groups) else min(documents, key=sum)  # the pair that keeps a rank busy
    lengths = [[n for i in group for n in documents[i]] or idle for group in groups]
    sizes = [padded_tokens(one, **row_options) for one in lengths]
    micro_steps = [sizes[j : j + ranks] for j in range(0, len(sizes), ranks)]
    slowest = sum(map(max, micro_steps)) if waits_each else max(map(sum, zip(*micro_steps, strict=True)))
    return real, ranks * slowest


# Most tokens of a forward without gradient: on a CPU what is larger falls out of its cache.
SCORED_TOKENS = {"cuda": 16384, "cpu": 2048}


def plan_for_one(pairs: Pairs, indices, device, *, max_tokens=0, **row_options) -> list[list[int]]:
    """Micro-batches of evaluation and Phase 1, of like lengths; any number of ranks makes the same.

    max_tokens, row_options: as `plan` takes them; the device has a limit of its own (SCORED_TOKENS).
    """
    limit = SCORED_TOKENS.get(torch.device(device).type, 2048)
    limit = min(max_tokens or limit, limit)
    # Not of all pairs: a data set is planned shard by shard.
    documents = dict(zip(indices, pairs.documents(row_options["layout"], indices), strict=True))
    groups = list[list[int]]()
    for i in longest_first(indices, documents):  # thousands of micro-batches: only the last one is tried
        if not groups or not fits([n for j in (*groups[-1], i) for n in documents[j]], limit, **row_options):
            groups.append([])
        groups[-1].append(i)
    return groups


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


def stream(pairs: Pairs, groups, *, device, lookup=None, **row_options):
    """(Batch, the reference's statistics or None) of each micro-batch, on the device, made ahead of its work.

    groups: lists of pair indices; an empty one becomes the shortest pair, of weight 0.
    lookup: a function of a batch's `index` that gives tensors, as a (named) tuple.
    row_options: layout and padding, as `collate` takes them.
    """

    def leave_group(_):
        """Of processes: torchrun signals a rank's whole group, and the rank itself ends its loader."""
        os.setpgrp()

    def load(group):
        """A micro-batch, and what is looked up for it; or the error, for the rank to raise as it is."""
        try:
            batch = collate(pairs, group or [pairs.shortest], padding_pair=not group, **row_options)
            return batch, None if lookup is None else lookup(batch.index)
        except UserError as error:
            return error

    workers = LOADERS.get(kind := torch.device(device).type, 0)
    loader = DataLoader(
        groups, batch_size=None, collate_fn=load, pin_memory=kind == "cuda", num_workers=workers,
        worker_init_fn=leave_group, multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    for made in loader:  # (Batch, statistics), from pinned memory without a wait
        if isinstance(made, UserError):
            raise made
        yield tree_map_only(torch.Tensor, lambda x: x.to(device, non_blocking=True), made)
