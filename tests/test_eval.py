"""Scores against plain loops over transformers' own logits, and sampling that no batch can change."""

import copy
import math

import pytest
import torch
from conftest import make_lm, make_pairs, make_sae, nudge
from transformers import GenerationConfig

import eval_diversity
import fpo
import losses


class Tokenizer:
    """All that sampling needs of one."""

    pad_token_id, eos_token_id = 0, 1


@pytest.fixture(scope="module")
def lm():
    model = nudge(make_lm())
    model.generation_config = GenerationConfig(eos_token_id=[1, 7], pad_token_id=0)
    return model


@pytest.fixture(scope="module")
def sae():
    return make_sae()


def by_hand(lm, reference, sae, pairs):
    """Per pair and side: log-probabilities, KL and pooled features of one unpadded response at a time."""
    rows = []
    for i in range(len(pairs)):
        row = {}
        for side, name in ((1, "chosen"), (2, "rejected")):
            prompt, y = pairs[i][0].long(), pairs[i][side].long()
            ids = torch.cat([prompt, y])[None]
            labels = torch.cat([torch.full_like(prompt, -100), y])[None]
            logits, ref_logits = lm(ids).logits, reference(ids).logits
            row[f"logps_{name}"] = losses.sequence_logps(logits, labels)[0].item()
            row[f"ratio_{name}"] = row[f"logps_{name}"] - losses.sequence_logps(ref_logits, labels)[0].item()
            row[f"kl_{name}"] = losses.sequential_kl(logits, ref_logits, labels).item()
            row[f"lengths_{name}"] = len(y)
            pooled = []
            for model in (lm, reference):
                hidden = model(ids, output_hidden_states=True).hidden_states[2]  # layer 1's output
                pooled.append(losses.pool_features(sae.encode(hidden), (labels != -100).roll(-1, 1)))
            row[f"mse_{name}"] = losses.feature_mse(*pooled, k=12).item()
        rows.append(row)
    return rows


@torch.no_grad()
def test_scores_against_plain_loops(lm, sae):
    pairs, reference = make_pairs(9, seed=4), make_lm()
    policy = fpo.Policy(copy.deepcopy(lm), [sae], [(1, "res")])
    policy.hold_reference(copy.deepcopy(reference))
    rows = by_hand(lm, reference, sae, pairs)
    for layout, max_pairs in (("separate", 2), ("shared", 4)):
        table = eval_diversity.evaluate_pairs(policy, pairs, k=12, layout=layout, max_pairs=max_pairs)
        for name, column in table.items():
            assert column.tolist() == pytest.approx([row[name] for row in rows], rel=1e-5, abs=2e-5), name
        scores = eval_diversity.pair_scores(table)
    share = lambda test: sum(map(test, rows)) / 9  # noqa: E731
    mean = lambda r, name, s: r[f"{name}_{s}"] / r[f"lengths_{s}"]  # noqa: E731
    assert scores["accuracy"] == share(lambda r: mean(r, "logps", "chosen") > mean(r, "logps", "rejected"))
    assert scores["accuracy_sum"] == share(lambda r: r["logps_chosen"] > r["logps_rejected"])
    assert scores["reward_accuracy"] == share(lambda r: r["ratio_chosen"] > r["ratio_rejected"])
    assert scores["kl_rejected"] == pytest.approx(sum(r["kl_rejected"] for r in rows) / 9, rel=1e-5)
    assert scores["mse_chosen"] == pytest.approx(sum(r["mse_chosen"] for r in rows) / 9, rel=1e-4)


def test_sampling_depends_on_seed_alone(lm):
    """Other batch sizes and company: the same responses; another seed: others."""
    prompts = [pair.tolist() for pair in (make_pairs(7, seed=2)[i][0] for i in range(7))]
    draw = lambda **o: eval_diversity.sample_responses(
        lm, Tokenizer, prompts, samples=3, max_new_tokens=12, **o
    )  # noqa: E731
    first = draw(batch_size=21)
    assert first == draw(batch_size=4) and first != draw(seed=1)
    assert (
        first[2:3]
        == eval_diversity.sample_responses(lm, Tokenizer, prompts, samples=3, max_new_tokens=12)[2:3]
    )
    flat = [r for many in first for r in many]
    assert len({tuple(r) for r in flat}) > 15, "samples of a prompt differ"
    ended = [r for r in flat if r[-1] in (1, 7)]
    assert all(1 not in r[:-1] and 7 not in r[:-1] for r in flat) and all(
        len(r) == 12 for r in flat if r not in ended
    )


def test_sampling_draws_from_the_nucleus(lm):
    """Frequencies of the first token against the model's probabilities, cut to the smallest set that reaches p."""
    prompt, n = [2, 5, 9, 30], 3000
    out = eval_diversity.sample_responses(
        lm, Tokenizer, [prompt], samples=n, max_new_tokens=1, top_p=0.6, batch_size=500
    )
    p = lm(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    kept, total = [], 0.0
    for token in p.argsort(descending=True).tolist():
        if total >= 0.6:
            break
        kept.append(token)
        total += p[token].item()
    counts = torch.bincount(torch.tensor([r[0] for r in out[0]]), minlength=len(p)).tolist()
    assert sum(counts[token] for token in kept) == n and 2 < len(kept) < len(p)
    for token in kept:
        expected = p[token].item() / total
        assert abs(counts[token] / n - expected) < 5 * math.sqrt(expected / n), token


@torch.no_grad()
def test_entropy_is_of_the_whole_distribution(lm):
    """Mean over sampled tokens of the full next-token entropy, against log_softmax of plain logits."""
    pairs, policy = make_pairs(5, seed=6), fpo.Policy(copy.deepcopy(lm))
    scores = eval_diversity.evaluate(
        policy, Tokenizer, pairs, prompts=4, samples=2, max_new_tokens=9, seed=3, layout="shared", max_pairs=3
    )
    prompts = eval_diversity.unique_prompts(pairs, 4)
    drawn = eval_diversity.sample_responses(
        policy.lm, Tokenizer, prompts, samples=2, max_new_tokens=9, seed=3
    )
    total = tokens = 0
    for prompt, many in zip(prompts, drawn, strict=True):
        for y in many:
            log_p = lm(torch.tensor([[*prompt, *y]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total += -(log_p.exp() * log_p).sum().item()
            tokens += len(y)
    assert scores["entropy"] == pytest.approx(total / tokens, rel=1e-5)
