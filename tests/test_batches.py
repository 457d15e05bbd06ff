"""batches.py: rows, batches and plans by hand; any pairs in any rows; ranks that wait for nobody."""

import math
import random
from collections import Counter

import pytest
import torch
from conftest import make_lm, make_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

import batches
import fpo
import metrics
import offline
from batches import collate, epoch_order, lay_out, padded_tokens, plan, plan_for_one, work_of
from data import Pairs

# ---------------------------------------------------------------- rows
PAIRS = Pairs([([2, 5, 6], [10, 11], [20, 21, 22]), ([2, 7], [30], [40, 41])])


def test_documents_of_a_pair():
    """Shared: prompt and both responses. Separate: with the prompt each. SFT has one response."""
    pairs = Pairs([([2, 5, 6], [10, 11], [20, 21, 22]), ([2, 7], [30], [40, 41]), ([2, 7], [30], [])])
    assert pairs.documents("shared") == [[8], [5], [3]]
    assert pairs.documents("separate") == [[5, 6], [3, 4], [3]]
    assert pairs.shortest == 2


@pytest.mark.parametrize(
    "lengths, how, start, R, L",
    [
        ([5, 8, 4], {}, [0, 8, 16], 3, 8),  # each by itself
        ([5, 8, 4], {"row_multiple": 3}, [0, 9, 18], 3, 9),
        ([5, 8, 4], {"row_tokens": 100, "row_multiple": 4}, [0, 5, 13], 1, 20),  # one row of 17
        ([5, 8, 4], {"row_tokens": 0}, [0, 8, 16], 3, 8),  # 17 in two rows of 8: no
        ([5, 8, 3], {"row_tokens": 0}, [0, 8, 5], 2, 8),
        ([4, 8, 4], {"row_tokens": 0}, [0, 8, 4], 2, 8),  # two halves in a row
        ([7, 6, 5, 4], {"row_tokens": 14}, [0, 11, 17, 7], 2, 11),  # 22 in two rows of one length
        ([7, 6, 5, 4], {"row_tokens": 10}, [0, 9, 18, 23], 3, 9),
    ],
)  # fmt: skip
def test_rows_by_hand(lengths, how, start, R, L):
    assert lay_out(lengths, **how) == (start, R, L)
    assert padded_tokens(lengths, layout="shared", **how) == R * L


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=40), row_tokens=st.none() | st.integers(0, 300),
    row_multiple=st.integers(1, 130),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_any_rows(lengths, row_tokens, row_multiple):
    """No two documents share a place, none crosses a row's end, and no row is longer than was asked."""
    start, R, L = lay_out(lengths, row_tokens, row_multiple)
    taken = Counter(place for a, n in zip(start, lengths, strict=True) for place in range(a, a + n))
    assert max(taken.values()) == 1 and max(taken) < R * L
    assert all(a // L == (a + n - 1) // L for a, n in zip(start, lengths, strict=True))
    most = max(row_tokens or 0, *lengths)
    assert L % row_multiple == 0 and most + row_multiple > L
    if row_tokens is None:
        assert len(lengths) == R
    else:  # at most what is needed if every row but one were half empty
        assert 2 * math.ceil(sum(lengths) / most) >= R
    if sum(lengths) <= (row_tokens or 0):
        assert R == 1


# ---------------------------------------------------------------- batches
SHARED = {  # pairs 1 and 0: the responses are 0 and 1 (chosen), 2 and 3 (rejected)
    "tokens": [[2, 7, 30, 40, 41, 9, 9, 9], [2, 5, 6, 10, 11, 20, 21, 22]],
    "positions": [[0, 1, 2, 2, 3, 0, 0, 0], [0, 1, 2, 3, 4, 3, 4, 5]],
    "segment": [[0, 0, 1, 2, 2, -1, -1, -1], [0, 0, 0, 1, 1, 2, 2, 2]],
    "doc": [[0, 0, 0, 0, 0, -1, -1, -1], [1] * 8],
    "state": [1, 8 + 2, 8 + 3, 1, 3, 8 + 2, 8 + 5, 8 + 6],
    "target": [30, 10, 11, 40, 41, 20, 21, 22], "owner": [0, 1, 1, 2, 2, 3, 3, 3], "lengths": [1, 2, 2, 3],
    "index": [1, 0], "weight": [1, 1], "reach": 6,
}  # fmt: skip
SEPARATE = SHARED | {
    "tokens": [[2, 7, 30, 9, 9, 9], [2, 7, 40, 41, 9, 9], [2, 5, 6, 10, 11, 9], [2, 5, 6, 20, 21, 22]],
    "positions": [[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5]],
    "segment": [[0, 0, 1, -1, -1, -1], [0, 0, 2, 2, -1, -1], [0, 0, 0, 1, 1, -1], [0, 0, 0, 2, 2, 2]],
    "doc": [[0, 0, 0, -1, -1, -1], [1, 1, 1, 1, -1, -1], [2, 2, 2, 2, 2, -1], [3] * 6],
    "state": [1, 12 + 2, 12 + 3, 6 + 1, 6 + 2, 18 + 2, 18 + 3, 18 + 4],
}
ALL = SEPARATE | {  # every token but a document's first is a target of its response
    "state": [0, 1, 12, 13, 14, 15, 6, 7, 8, 18, 19, 20, 21, 22],
    "target": [7, 30, 5, 6, 10, 11, 7, 40, 41, 5, 6, 20, 21, 22],
    "owner": [0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3], "lengths": [2, 4, 3, 5],
}  # fmt: skip
ONE_ROW = SHARED | {
    "tokens": [[2, 7, 30, 40, 41, 2, 5, 6, 10, 11, 20, 21, 22, 9, 9, 9]],
    "positions": [[0, 1, 2, 2, 3, 0, 1, 2, 3, 4, 3, 4, 5, 0, 0, 0]],
    "segment": [[0, 0, 1, 2, 2, 0, 0, 0, 1, 1, 2, 2, 2, -1, -1, -1]],
    "doc": [[0] * 5 + [1] * 8 + [-1] * 3],
    "state": [1, 5 + 2, 5 + 3, 1, 3, 5 + 2, 5 + 5, 5 + 6],
}
# Documents of 3, 4, 5 and 6 tokens: the last beside the first, the others in the second row.
TWO_ROWS = SEPARATE | {
    "tokens": [[2, 7, 30, 2, 5, 6, 20, 21, 22], [2, 7, 40, 41, 2, 5, 6, 10, 11]],
    "positions": [[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1, 2, 3, 4]],
    "segment": [[0, 0, 1, 0, 0, 0, 2, 2, 2], [0, 0, 2, 2, 0, 0, 0, 1, 1]],
    "doc": [[0, 0, 0, 3, 3, 3, 3, 3, 3], [1, 1, 1, 1, 2, 2, 2, 2, 2]],
    "state": [1, 13 + 2, 13 + 3, 9 + 1, 9 + 2, 3 + 2, 3 + 3, 3 + 4],
}
ALL_IN_TWO = TWO_ROWS | ALL | {name: TWO_ROWS[name] for name in ("tokens", "positions", "segment", "doc")}
ALL_IN_TWO |= {"state": [0, 1, 13, 14, 15, 16, 9, 10, 11, 3, 4, 5, 6, 7]}
BY_HAND = [  # how the pairs are laid out, the batch
    ({"layout": "shared", "row_multiple": 4}, SHARED),
    ({"layout": "separate", "padding_pair": True}, SEPARATE | {"weight": [0, 0]}),
    ({"layout": "shared", "all_positions": True}, ALL),
    ({"layout": "separate", "all_positions": True}, ALL),
    ({"layout": "shared", "row_tokens": 100, "row_multiple": 4}, ONE_ROW),
    ({"layout": "separate", "row_tokens": 9}, TWO_ROWS),
    ({"layout": "shared", "row_tokens": 9, "all_positions": True}, ALL_IN_TWO),
]


@pytest.mark.parametrize("how, expected", BY_HAND)
def test_batches_by_hand(how, expected):
    batch = collate(PAIRS, torch.tensor(expected["index"]), pad_id=9, **how)
    found = {name: x.tolist() if torch.is_tensor(x) else x for name, x in batch._asdict().items()}
    assert found == expected
    assert {x.dtype for x in batch[:-2]} == {torch.int64} and batch.weight.dtype == torch.float32


TOKENS = st.lists(st.integers(3, 99), min_size=1, max_size=6)


@given(rows=st.lists(st.tuples(TOKENS, TOKENS, TOKENS | st.just([])), min_size=1, max_size=5), data=st.data(),
       layout=st.sampled_from(["shared", "separate"]), row_multiple=st.integers(1, 8),
       row_tokens=st.none() | st.integers(0, 60))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_every_response_token_once_and_what_its_state_sees(rows, data, layout, row_multiple, row_tokens):
    """What a state sees, by the mask in batches.py's head, is prompt and response up to the token."""
    # In SFT, which has no rejected response, some tokens are no targets.
    marks = [st.integers(int(z != []), 1) for _, _, z in rows]
    masks = [[data.draw(mark) for _ in y] for (_, y, _), mark in zip(rows, marks, strict=True)]
    pairs = Pairs([(*row, mask) for row, mask in zip(rows, masks, strict=True)])
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
    shape = {"layout": layout, "row_multiple": row_multiple, "row_tokens": row_tokens}
    batch = collate(pairs, indices, **shape)
    documents = [n for i in indices for n in pairs.documents(layout)[i]]
    assert batch.tokens.numel() == padded_tokens(documents, **shape)
    expected = []  # (owner, target, the tokens before it)
    for side in (1, 2):
        for b, i in enumerate(indices):
            x, y, mask = rows[i][0], rows[i][side], masks[i] if side == 1 else [True] * len(rows[i][2])
            expected += [(b + (side - 1) * len(indices), y[t], x + y[:t]) for t in range(len(y)) if mask[t]]
    L, got = batch.tokens.shape[1], []
    assert L % row_multiple == 0
    for owner, target, state in torch.stack([batch.owner, batch.target, batch.state], 1).tolist():
        r, q = divmod(state, L)
        seen = batch.doc[r, : q + 1] == batch.doc[r, q]
        seen &= (batch.segment[r, : q + 1] == 0) | (batch.segment[r, : q + 1] == batch.segment[r, q])
        assert batch.segment[r, q] in (0, 1 + (owner >= len(indices)))
        assert batch.positions[r, : q + 1][seen].tolist() == list(range(int(seen.sum())))
        got.append((owner, target, batch.tokens[r, : q + 1][seen].tolist()))
    assert got == expected and batch.index.tolist() == indices
    assert batch.lengths.tolist() == [sum(row[0] == n for row in expected) for n in range(2 * len(indices))]
    assert torch.equal(batch.doc >= 0, batch.segment >= 0) and not batch.tokens[batch.segment < 0].any()
    assert batch.reach == batch.positions.max() + 1


def test_stream_gives_batches_and_what_is_looked_up():
    def lookup(index):
        return fpo.Statistics(index.double(), features=(index[:, None],))

    options = {"device": "cpu", "lookup": lookup, "layout": "shared"}
    (first, reference), (empty, other) = batches.stream(PAIRS, [[0, 1], []], **options)
    assert first.index.tolist() == [0, 1] and first.weight.tolist() == [1, 1] and first.doc.max() == 1
    assert isinstance(reference, fpo.Statistics) and reference.features[0].tolist() == [[0], [1]]
    # What keeps a rank busy is the shortest pair.
    assert empty.weight.tolist() == [0] and empty.index.tolist() == [1] and other.logps.tolist() == [1]
    assert [reference for _, reference in batches.stream(PAIRS, [[0]], device="cpu")] == [None]


# ---------------------------------------------------------------- steps
SIZES = [[5], [9], [2], [9], [7], [3]]
ROW = {"row_tokens": 1000}  # one row a forward


@pytest.mark.parametrize(
    "ranks, limits, expected",
    [
        (1, ROW, [[1, 3, 4, 0, 5, 2]]),  # the longest first
        (1, ROW | {"max_tokens": 18}, [[1, 3], [4, 0, 5, 2]]),  # 9 + 9, 7 + 5 + 3 + 2
        (1, ROW | {"max_tokens": 12}, [[1, 5], [3, 2], [4, 0]]),  # 9 + 3, 9 + 2, 7 + 5
        (1, ROW | {"max_tokens": 8}, [[1], [3], [4], [0, 5], [2]]),  # a longer pair goes alone
        (1, ROW | {"max_tokens": 16, "row_multiple": 4}, [[1, 4], [3, 0, 2], [5]]),  # 16, 16, 3 padded to 4
        # rows of one pair: 2 · 9, 2 · 7 (3 · 7 is too many)
        (1, {"max_tokens": 18}, [[1, 3], [4, 0], [5, 2]]),
        (2, ROW, [[1, 4, 2], [3, 0, 5]]),  # 9 and 9; 16 and 14; 16 and 17; 18 and 17
        (2, ROW | {"max_tokens": 14}, [[1, 2], [3, 0], [4], [5]]),  # 9 + 7 is too many, 9 + 2 is not
        (4, ROW, [[1], [3], [4, 2], [0, 5]]),
        (7, ROW, [[1], [3], [4], [0], [5], [2], []]),
    ],
)
def test_plans_by_hand(ranks, limits, expected):
    assert plan(torch.arange(6), SIZES, ranks, **limits) == expected


@given(
    documents=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=2), min_size=1, max_size=40),
    ranks=st.integers(1, 5), max_tokens=st.integers(0, 200), data=st.data(),
    row_tokens=st.none() | st.integers(0, 200), row_multiple=st.integers(1, 9),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_plans(documents, ranks, max_tokens, data, row_tokens, row_multiple):
    """Each pair once, no micro-batch too large, as many for each rank, and no rank could do with fewer."""
    indices = data.draw(st.lists(st.sampled_from(range(len(documents))), unique=True, min_size=1))
    rows = {"row_tokens": row_tokens, "row_multiple": row_multiple}
    groups = plan(torch.tensor(indices), documents, ranks, max_tokens=max_tokens, **rows)
    assert len(groups) % ranks == 0 and sorted(i for group in groups for i in group) == sorted(indices)
    for group in groups:
        lengths = [n for i in group for n in documents[i]]
        assert len(group) <= 1 or not max_tokens or padded_tokens(lengths, **rows) <= max_tokens
    # The shortest pair of a rank went to it when no rank had less: without it, it has no more than any.
    loads = [[sum(documents[i]) for group in groups[r::ranks] for i in group] for r in range(ranks)]
    assert max(sum(load) - min(load, default=0) for load in loads) <= min(map(sum, loads))


@pytest.mark.parametrize(
    "groups, ranks, how, expected",
    [
        ([[1], [5], [2], [3]], 2, {}, (9 + 3 + 2 + 9, 2 * (3 + 9))),  # once a step: 9 + 2, 3 + 9
        ([[1], [5], [2], [3]], 2, {"waits_each": True}, (23, 2 * (9 + 9))),
        ([[1, 4], [0, 5]], 2, {"row_multiple": 10}, (24, 2 * 20)),  # 16 padded to 20
        ([[1, 4], [0, 5]], 2, {"row_tokens": None}, (24, 2 * 2 * 9)),  # two rows of 9, two of 5
        ([[5], [1], [0], []], 2, {}, (3 + 9 + 5, 2 * (9 + 2))),  # with the shortest pair
    ],
)
def test_work_by_hand(groups, ranks, how, expected):
    assert work_of(groups, SIZES, ranks, **ROW | how) == expected


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_busy_alike(ranks):
    """Lengths spread as those of real pairs: sums within 5 % of the mean."""
    for seed in range(50):
        draw = random.Random(seed)
        documents = [[min(4096, int(draw.lognormvariate(5.5, 0.8)) + 8)] for _ in range(32)]
        groups = plan(range(32), documents, ranks, max_tokens=4096, row_tokens=16384, row_multiple=128)
        sums = [sum(documents[i][0] for i in group) for group in groups]
        loads, mean = [sum(sums[r::ranks]) for r in range(ranks)], sum(sums) / ranks
        if max(documents)[0] <= mean:
            assert max(loads) <= 1.05 * mean


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_few_micro_steps(ranks):
    """Long pairs, of which four to a dozen fill a micro-batch: at most 3 % above what their sums need."""
    found = needed = 0
    for seed in range(50):
        draw = random.Random(seed)
        documents = [[min(2048, int(draw.lognormvariate(6.7, 0.5)))] for _ in range(32)]
        rows = {"max_tokens": 4096, "row_tokens": 16384, "row_multiple": 128}
        found += len(plan(range(32), documents, ranks, **rows)) // ranks
        needed += math.ceil(sum(map(sum, documents)) / ranks / 4096)
    assert needed <= found <= 1.03 * needed


def test_scoring_takes_like_lengths_together():
    """Dense attention costs the square of the longest: of 1, …, 64 tokens each micro-batch is a run."""
    pairs = Pairs([([2], [4] * n, [5]) for n in range(1, 65)])
    groups = plan_for_one(pairs, range(64), "cpu", layout="shared", row_tokens=0, max_tokens=256)
    assert len(groups) > 8 and [i for group in groups for i in group] == list(range(63, -1, -1))


def test_any_number_of_ranks_scores_the_same_batches(monkeypatch):
    """Scores on 2 and 3 ranks, each made here in turn, are those on one to the last bit."""
    pairs, policy = make_pairs(9, longest=20), fpo.Policy(make_lm())
    tables, forwards = [], []
    policy.register_forward_hook(lambda *_: forwards.append(1))
    for world in (1, 2, 3):
        parts = []
        for rank in range(world):
            monkeypatch.setattr(metrics, "ranks", lambda rank=rank, world=world: (rank, world))
            rows = {"layout": "shared", "row_tokens": 64, "max_tokens": 128}
            parts.append(metrics.score_pairs(policy, pairs, **rows))
        assert len(forwards) == {1: 3, 2: 2 * 2, 3: 3 * 1}[world], "as many on each rank: FSDP would wait"
        forwards.clear()
        tables.append({name: sum(part[name] for part in parts) for name in parts[0]})
    assert len(plan_for_one(pairs, range(9), "cpu", **rows)) == 3  # so that two ranks get a padding pair
    for table in tables:
        assert all(torch.equal(table[name], tables[0][name]) for name in tables[0])
    assert tables[0]["logps_chosen"].max() < 0 and tables[0]["lengths_chosen"].min() > 0


def test_scoring_has_the_device_s_limit_too():
    pairs = Pairs([([2, 3], [4] * 400, [5] * 110)] * 40)  # 512 tokens each
    for device, limit, expected in (
        ("cpu", 0, [4] * 10), ("cpu", 8192, [4] * 10), ("cpu", 1024, [2] * 20),
        ("cuda", 0, [32, 8]), ("cuda", 8192, [16, 16, 8]),
    ):  # fmt: skip
        groups = plan_for_one(pairs, range(40), device, layout="shared", row_tokens=16384, max_tokens=limit)
        assert list(map(len, groups)) == expected, device


def test_a_plan_reads_each_pair_once(monkeypatch):
    """However many shards there are: else 61,000 pairs, 240 shards, are planned for minutes."""
    pairs, read, documents = make_pairs(40), [], Pairs.documents
    monkeypatch.setattr(Pairs, "documents", lambda *args: read.append(documents(*args)) or read[-1])
    monkeypatch.setattr(offline, "SHARD", 4)
    groups, ends = offline.shard_batches(pairs, range(10), "cpu", 0, {"layout": "separate"})
    assert sum(map(len, read)) == len(pairs) and len(ends) == 10
    assert sorted(i for group in groups for i in group) == list(range(40))


def test_epoch_order():
    orders = [tuple(epoch_order(50, epoch, seed).tolist()) for epoch in range(3) for seed in range(3)]
    assert len(set(orders)) == 9 and all(sorted(order) == list(range(50)) for order in orders)
    assert tuple(epoch_order(50, 2, 1).tolist()) == orders[7]  # its arguments alone count
