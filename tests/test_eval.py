"""Scores against plain loops over transformers' logits; sampling that no batch changes; files of answers."""

import copy
import itertools
import json
import math
import os
import socket
import subprocess
import sys
from random import Random

import numpy as np
import pytest
import torch
from conftest import M, V, make_lm, make_pairs, make_sae, nudge
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

import benchmarks
import eval_diversity
import fpo
import losses
import presets
from data import Pairs, load_pairs
from sae import ARRAYS

WORDS = [f"w{i}" for i in range(8, V)]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<u>' if m['role'] == 'user' else '<a>' }} {{ m['content'] }}"
    "{{ '<end>' }}{% endfor %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def make_tokenizer():
    """A word a token, for the tiny model: 1 and 7 end a response."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<u>", "<a>", "x", "<end>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins by spaces
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    special["additional_special_tokens"] = ["<u>", "<a>", "<end>"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def lm():
    model = nudge(make_lm())
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)  # 7 is the template's end
    return model


@pytest.fixture(scope="module")
def sae():
    return make_sae()


def by_hand(lm, reference, sae, pairs):
    """Per pair and side: log-probabilities, KL, entropy, features; one unpadded response at a time."""
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
            p = logits[0, len(prompt) - 1 : -1].softmax(-1)
            row[f"entropy_{name}"] = -(p * p.log()).sum().item()
            row[f"lengths_{name}"] = len(y)
            pooled = []
            for model in (lm, reference):
                hidden = model(ids, output_hidden_states=True).hidden_states[2]  # layer 1's output
                pooled.append(losses.pool_features(sae.encode(hidden), (labels != -100).roll(-1, 1)))
            row[f"mse_{name}"] = losses.feature_mse(*pooled, k=12).item()
            for whose, c in zip(("policy", "reference"), pooled, strict=True):
                row[f"activations_{whose}_{name}"] = sorted(c[0].tolist(), reverse=True)[:5]
        rows.append(row)
    return rows


@torch.no_grad()
def test_scores_against_plain_loops(lm, sae, tokenizer):
    pairs, reference = make_pairs(9, seed=4), make_lm()
    policy = fpo.Policy(copy.deepcopy(lm), [sae], [(1, "res")])
    policy.hold_reference(copy.deepcopy(reference))
    rows = by_hand(lm, reference, sae, pairs)
    for layout, max_pairs in (("separate", 2), ("shared", 4)):
        table = eval_diversity.evaluate_pairs(policy, pairs, k=12, top=5, layout=layout, max_pairs=max_pairs)
        assert len(table) == 2 * 8
        for name, column in table.items():
            expected = torch.tensor([row[name] for row in rows], dtype=torch.float64)
            assert torch.allclose(column, expected, rtol=1e-5, atol=3e-5), name
    scores = eval_diversity.evaluate(policy, tokenizer, pairs, k=12, top=5, beta=0.3, layout="shared")
    share = lambda test: sum(map(test, rows)) / 9  # noqa: E731
    mean = lambda r, name, s: r[f"{name}_{s}"] / r[f"lengths_{s}"]  # noqa: E731
    average = lambda f: pytest.approx(sum(map(f, rows)) / 9, rel=1e-4)  # noqa: E731
    assert scores["accuracy"] == share(lambda r: mean(r, "logps", "chosen") > mean(r, "logps", "rejected"))
    assert scores["accuracy_sum"] == share(lambda r: r["logps_chosen"] > r["logps_rejected"])
    assert scores["reward_accuracy"] == share(lambda r: r["ratio_chosen"] > r["ratio_rejected"])
    assert scores["reward_accuracy_mean"] == share(
        lambda r: mean(r, "ratio", "chosen") > mean(r, "ratio", "rejected")
    )
    assert scores["kl_rejected"] == average(lambda r: r["kl_rejected"])
    assert scores["mse_chosen"] == average(lambda r: r["mse_chosen"])
    for name in ("kl", "mse"):  # the absolute value is of each pair: signs differ here
        differences = [r[f"{name}_rejected"] - r[f"{name}_chosen"] for r in rows]
        assert min(differences) < 0 < max(differences)
        assert scores[f"{name}_margin"] == pytest.approx(0.3 * sum(map(abs, differences)) / 9, rel=1e-4)
    total = lambda name: sum(r[f"{name}_chosen"] + r[f"{name}_rejected"] for r in rows)  # noqa: E731
    assert scores["teacher_forced_entropy"] == pytest.approx(total("entropy") / total("lengths"), rel=1e-5)
    for whose in ("policy", "reference"):  # by rank: each response sorted by itself, then the mean
        sides = [r[f"activations_{whose}_{s}"] for r in rows for s in ("chosen", "rejected")]
        by_rank = [sum(column) / 18 for column in zip(*sides, strict=True)]
        assert scores[f"activations_{whose}"] == pytest.approx(by_rank, rel=1e-4)


@torch.no_grad()
def test_entropy_and_kl_of_a_uniform_model():
    """Logits 0: log π(y) = -|y| log V, entropy log V a token, KL(ref ‖ uniform) = |y| log V - Σ H(ref)."""
    pairs, uniform, known = make_pairs(5, seed=2), make_lm(), make_lm()
    uniform.model.norm.weight.fill_(-1.0)  # Gemma's final norm multiplies by 1 + weight
    policy = fpo.Policy(uniform)
    policy.hold_reference(known)
    ours = eval_diversity.evaluate_pairs(policy, pairs, layout="shared")
    alone = eval_diversity.evaluate_pairs(fpo.Policy(make_lm()), pairs, layout="separate")
    for side in ("chosen", "rejected"):
        whole = ours[f"lengths_{side}"] * math.log(V)
        assert torch.allclose(ours[f"logps_{side}"], -whole) and torch.allclose(
            ours[f"entropy_{side}"], whole
        )
        assert torch.allclose(ours[f"kl_{side}"], whole - alone[f"entropy_{side}"], rtol=1e-5)
        assert (ours[f"kl_{side}"] > 1).all(), "the known model is far from uniform"


def test_intervals_of_a_share_are_binomial():
    """A resampled share of n hits and misses is binomial: exact quantiles; a ratio of equals has no width."""
    n, hits = 200, 150
    hit = torch.tensor([1.0] * hits + [0.0] * (n - hits))
    one, length = torch.ones(n), torch.arange(1.0, n + 1)
    columns = {"share": (hit, one), "ratio": (3 * length, length)}
    scores = eval_diversity.summary([columns], bootstrap=4000, seed=1)
    assert scores["share"] == 0.75 and scores["ratio"] == pytest.approx(3)
    chances = [math.comb(n, i) * 0.75**i * 0.25 ** (n - i) for i in range(n + 1)]
    below = list(itertools.accumulate(chances))
    exact = [next(i for i, c in enumerate(below) if c >= q) / n for q in (0.025, 0.975)]
    assert scores["intervals"]["share"] == pytest.approx(exact, abs=1.01 / n)
    assert scores["intervals"]["ratio"] == pytest.approx([3, 3])
    assert scores == eval_diversity.summary([columns], bootstrap=4000, seed=1)
    assert "intervals" not in eval_diversity.summary([columns])


# ---------------------------------------------------------------------------- sampling
def draw(lm, tokenizer, prompts, **options):
    return eval_diversity.sample_responses(lm, tokenizer, prompts, **options)


def test_sampling_depends_on_seed_alone(lm, tokenizer):
    """Other batch sizes and company: the same responses; another seed: others. 40 tokens come in parts."""
    prompts = [pair.tolist() for pair in (make_pairs(7, seed=2)[i][0] for i in range(7))]
    options = {"samples": 3, "max_new_tokens": 40}
    first, totals = draw(lm, tokenizer, prompts, batch_size=21, **options)
    other, other_totals = draw(lm, tokenizer, prompts, batch_size=4, **options)
    assert first == other and torch.allclose(totals, other_totals, rtol=1e-5)
    assert first != draw(lm, tokenizer, prompts, seed=1, **options)[0]
    assert first[:2] == draw(lm, tokenizer, prompts[:2], **options)[0]
    flat = [r for many in first for r in many]
    assert len({tuple(r) for r in flat}) > 15, "samples of a prompt differ"
    ended = [r for r in flat if r[-1] in (1, 7)]
    assert {r[-1] for r in ended} == {1, 7} and any(len(r) > 16 for r in ended)
    assert all(1 not in r[:-1] and 7 not in r[:-1] for r in flat)
    assert all(len(r) == 40 for r in flat if r not in ended)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_draws_from_the_nucleus(lm, tokenizer, temperature):
    """Frequencies of the first token against the model's, cut to the smallest set that reaches p."""
    prompt, n = [2, 5, 9, 30], 3000
    options = {"samples": n, "max_new_tokens": 1, "top_p": 0.6, "temperature": temperature}
    out, _ = draw(lm, tokenizer, [prompt], batch_size=500, **options)
    p = (lm(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
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


def test_nucleus_at_the_boundary():
    """p = 0.75 of 1/2, 1/4, 1/8, …: two tokens just reach it; 0.76 needs a third. Equals: all or none."""
    p, n = torch.tensor([[0.125, 0.5, 0.0625, 0.25, 0.0625]]), 2000
    flat = torch.full((1, 8), 1 / 8)
    inside = ((p, 0.75, {1, 3}), (p, 0.76, {0, 1, 3}), (p, 0.3, {1}), (p, 0.9, set(range(5))))
    for chances, top_p, kept in (*inside, (p, 1.0, set(range(5))), (flat, 0.75, set(range(8)))):
        noise = [torch.Generator().manual_seed(i) for i in range(n)]
        sampler = eval_diversity._Sampler(torch.ones(n), top_p, noise)
        drawn = sampler(None, chances.log().expand(n, -1)).argmax(-1)
        assert set(drawn.tolist()) == kept, top_p
        mass = sum(chances[0, token].item() for token in kept)
        for token in kept:  # as likely among themselves as before the cut
            share = chances[0, token].item() / mass
            assert abs((drawn == token).float().mean() - share) < 5 * math.sqrt(share / n), (top_p, token)
        entropy = -(chances * chances.log()).sum().item()  # of all of it, not of the cut
        assert sampler.entropy[0][0].item() == pytest.approx(entropy, rel=1e-5)
        assert torch.allclose(sampler.logps[0], chances[0, drawn].log())
    assert -(p * p.log()).sum().item() == pytest.approx(1.875 * math.log(2))


def test_temperature_zero_is_greedy_row_by_row(lm, tokenizer):
    """A temperature for each prompt: at 0 the most likely tokens, whatever the others' is."""
    prompts = [[2, 5, 9, 30], [2, 40, 41]]
    out, _ = draw(lm, tokenizer, prompts, samples=2, temperature=[0.0, 1.5], max_new_tokens=10)
    ids = list(prompts[0])
    while len(ids) < 14 and ids[-1] not in (1, 7):
        ids.append(lm(torch.tensor([ids])).logits[0, -1].argmax().item())
    assert out[0] == [ids[4:], ids[4:]] and out[1][0] != out[1][1]


@torch.no_grad()
def test_entropies_are_of_the_whole_distribution(lm, tokenizer):
    """Entropy and predictive entropy of sampled responses, against log_softmax of plain logits."""
    pairs, policy = make_pairs(5, seed=6), fpo.Policy(copy.deepcopy(lm))
    options = {"samples": 3, "max_new_tokens": 20, "seed": 3}
    scores = eval_diversity.evaluate(
        policy, tokenizer, pairs, prompts=4, bootstrap=200, layout="shared", **options
    )
    prompts = eval_diversity.unique_prompts(pairs, 4)
    drawn, totals = draw(policy.lm, tokenizer, prompts, **options)
    entropy = tokens = surprise = surprise_per_token = 0
    for i, s in itertools.product(range(4), range(3)):
        prompt, y = prompts[i], drawn[i][s]
        log_p = lm(torch.tensor([[*prompt, *y]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        h, logp = -(log_p.exp() * log_p).sum().item(), log_p[range(len(y)), y].sum().item()
        assert totals[i, s].tolist() == pytest.approx([h, logp, len(y)], rel=1e-4)
        entropy, tokens, surprise = entropy + h, tokens + len(y), surprise - logp
        surprise_per_token -= logp / len(y)
    assert scores["entropy"] == pytest.approx(entropy / tokens, rel=1e-5)
    assert scores["predictive_entropy"] == pytest.approx(surprise / 12, rel=1e-5)
    assert scores["predictive_entropy_per_token"] == pytest.approx(surprise_per_token / 12, rel=1e-5)
    assert scores["response_tokens"] == tokens / 12
    for name in ("entropy", "predictive_entropy", "nll_chosen", "distinct_2"):
        low, high = scores["intervals"][name]
        assert low <= scores[name] <= high


def test_distinct_and_self_bleu_by_hand():
    texts = ["a b a", "a b", "c"]  # words a b a a b c; pairs ab ba ab
    assert eval_diversity.distinct(texts, 1) == 3 / 6
    assert eval_diversity.distinct(texts, 2) == 2 / 3
    assert eval_diversity.distinct(["a"], 2) == 0
    assert eval_diversity.distinct(["a a a"] * 4, 1) == 1 / 12
    totals = torch.tensor([[[2.0, -3.0, 2], [4.0, -8.0, 4]], [[1.0, -1.0, 1], [5.0, -2.0, 4]]]).double()
    columns = eval_diversity.sample_columns([["a b", "a b"], ["c", "d"]], totals)
    scores = eval_diversity.summary([columns])
    assert scores["entropy"] == pytest.approx(12 / 11), "over all tokens"
    assert scores["predictive_entropy"] == 14 / 4
    assert scores["predictive_entropy_per_token"] == pytest.approx((1.5 + 2 + 1 + 0.5) / 4)
    assert scores["distinct_1"] == (0.5 + 1) / 2
    pytest.importorskip("sacrebleu")
    assert eval_diversity.self_bleu(["a b c d e"] * 3) == pytest.approx(100)
    assert eval_diversity.self_bleu(["a b c d", "e f g h"]) < 10
    # Four words, of three and two in common: 2-grams 2 of 3, 3-grams 1 of 2, 4-grams smoothed 1/2 of 1.
    expected = 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert eval_diversity.self_bleu(["a b c x", "a b c y"]) == pytest.approx(expected, rel=1e-4)


def test_self_bleu_is_sacrebleu_of_each_against_the_others():
    sacrebleu, random = pytest.importorskip("sacrebleu"), Random(0)
    bleu, words = sacrebleu.BLEU(effective_order=True), ["a", "b,", "c d", "e.", "f-g", "1,2", "", '"q"']
    for _ in range(30):
        many = range(random.randint(2, 9))
        texts = [" ".join(random.choices(words, k=random.randint(0, 9))) + "\n" for _ in many]
        each = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
        assert eval_diversity.self_bleu(texts) == pytest.approx(sum(each) / len(each), abs=1e-9), texts


# ---------------------------------------------------------------------------- features
def test_feature_statistics_against_plain_loops(lm, sae):
    """Mean of pooled features over responses, and the largest at a token; of SFT records, and of pairs."""
    policy, whole = fpo.Policy(copy.deepcopy(lm), [sae], [(1, "res")]), make_pairs(7, seed=5)
    rows = [whole[i] for i in range(7)]
    for sft, pairs in ((True, Pairs([(x.tolist(), y.tolist(), []) for x, y, _ in rows])), (False, whole)):
        pooled, largest = [], torch.zeros(M)
        for x, *ys in rows:
            for y in ys[: 1 if sft else 2]:
                with torch.no_grad():
                    hidden = lm(torch.cat([x, y])[None].long(), output_hidden_states=True).hidden_states[2]
                c = sae.encode(hidden[0, len(x) - 1 : -1])
                pooled.append(c.mean(0))
                largest = torch.maximum(largest, c.amax(0))
        mean, top = eval_diversity.feature_statistics(policy, pairs, layout="separate", max_pairs=3)
        assert torch.allclose(mean, torch.stack(pooled).mean(0).double(), atol=1e-5)
        assert torch.allclose(top, largest, atol=1e-4)


def test_chosen_features_where_the_answer_is_known():
    mean_a, mean_b = torch.tensor([0.0, 5, 4, 0, 1, 3]), torch.tensor([0.0, 4.5, 1, 2, 0, 3])
    largest_a = torch.tensor([0.0, 9, 5, 1, 8, 7])
    choose = lambda **o: eval_diversity.choose_features(mean_a, largest_a, mean_b, **o)  # noqa: E731
    assert choose(n=2) == [2, 4] and choose(n=6) == [2, 4, 1], "differences 3, 1, 0.5; none at or below 0"
    assert choose(n=3, criterion="token") == [1, 4], "9, 8, 7 at a token; 5's mean is no higher in A"
    random = choose(n=9, criterion="random", seed=3)
    assert sorted(random) == [1, 2, 3, 4, 5] and random == choose(n=9, criterion="random", seed=3)
    assert len({tuple(choose(n=2, criterion="random", seed=s)) for s in range(20)}) > 5


# ---------------------------------------------------------------------------- the benchmarks' files
THEIRS = {"output": "theirs", "generator": "other", "dataset": "koala"}
ALPACA = [{"instruction": "w10 w9", **THEIRS}, {"instruction": "w11 w9", **THEIRS}]
ARENA = [{"uid": "a1", "category": "hard_prompt", "prompt": "w20 w21"}, {"uid": "a2", "prompt": "w22"}]
ARENA_2024 = [{"question_id": "b1", "category": "c", "cluster": "d", "turns": [{"content": "w20"}]}]
MT = [
    {"question_id": 81, "category": "writing", "turns": ["w30 w31", "w32"]},
    {"question_id": 111, "category": "math", "turns": ["w33", "w34"]},
]


@pytest.fixture(scope="module")
def talker():
    """Another random model, whose greedy answers are many different words."""
    model = make_lm(seed=4, tie_word_embeddings=False)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return model


def exported(lm, tokenizer, kind, questions, tmp_path, **options):
    path = tmp_path / ("q.json" if kind == "alpaca_eval" else "q.jsonl")
    lines = "\n".join(map(json.dumps, questions))
    path.write_text(json.dumps(questions) if kind == "alpaca_eval" else lines)
    read = benchmarks.read_questions(kind, path)
    return eval_diversity.export(lm, tokenizer, kind, read, model="ours", max_new_tokens=12, **options)


def greedy(lm, ids):
    """The most likely continuation, without the token that ends it."""
    start = len(ids)
    while len(ids) < start + 12 and ids[-1] not in (1, 7):
        ids = [*ids, lm(torch.tensor([ids])).logits[0, -1].argmax().item()]
    return [token for token in ids[start:] if token not in (1, 7)]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_answers_in_each_benchmarks_format(talker, tokenizer, tmp_path):
    options = {"temperature": 0.0}
    text = lambda question: tokenizer.decode(  # noqa: E731
        greedy(talker, ids_of(tokenizer, f"<bos> <u> {question} <end> <a>")), skip_special_tokens=True
    )
    alpaca = exported(talker, tokenizer, "alpaca_eval", ALPACA, tmp_path, **options)
    for question, answer in zip(ALPACA, alpaca, strict=True):
        told = text(question["instruction"])
        assert answer == {**question, "output": told, "generator": "ours"} and told
    arena = exported(talker, tokenizer, "arena_hard", ARENA, tmp_path)
    for question, answer in zip(ARENA, arena, strict=True):
        assert {*answer} == {"uid", "ans_id", "model", "messages", "tstamp"}
        assert answer["uid"] == question["uid"] and answer["model"] == "ours"
        user, said = answer["messages"]
        assert user == {"role": "user", "content": question["prompt"]} and said["role"] == "assistant"
        assert said["content"] == {"answer": text(question["prompt"])}, "greedy without --temperature"
    (old,) = exported(talker, tokenizer, "arena_hard", ARENA_2024, tmp_path)
    assert {*old} == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert old["choices"] == [{"index": 0, "turns": [{"content": text("w20")}]}]
    (record,) = exported(talker, tokenizer, "records", [{"prompt": "w20"}], tmp_path, **options)
    assert record == {"prompt": "w20", "response": text("w20")}


def test_second_turn_follows_the_models_own_first(talker, tokenizer, tmp_path):
    """Greedy by hand over the whole talk; the first turn's end stands once, between answer and question."""
    answers = exported(talker, tokenizer, "mt_bench", MT, tmp_path, temperature=0.0)
    for question, answer in zip(MT, answers, strict=True):
        assert {*answer} == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert answer["question_id"] == question["question_id"] and answer["model_id"] == "ours"
        (choice,) = answer["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == 2
        opening, then = (f"<u> {turn} <end> <a>" for turn in question["turns"])
        talk = ids_of(tokenizer, f"<bos> {opening}")
        first = greedy(talker, talk)
        first = tokenizer.decode(first, skip_special_tokens=True)
        second = greedy(talker, [*talk, *ids_of(tokenizer, first), 7, *ids_of(tokenizer, then)])
        assert choice["turns"] == [first, tokenizer.decode(second, skip_special_tokens=True)]
        alone = greedy(talker, ids_of(tokenizer, f"<bos> {then}"))
        assert second != alone, "this test can't tell"
    # Without a temperature, the benchmark's own: math is greedy, writing is not.
    writing, maths = zip(
        *(exported(talker, tokenizer, "mt_bench", MT, tmp_path, seed=seed) for seed in range(3)), strict=True
    )
    assert all(answer["choices"] == answers[1]["choices"] for answer in maths)
    assert len({str(answer["choices"]) for answer in writing}) > 1


def test_questions_that_are_none(tmp_path):
    path = tmp_path / "q.jsonl"
    for kind, line, what in (
        ("mt_bench", {"prompt": "w1"}, "question_id"),
        ("arena_hard", {"uid": "1"}, "prompt"),
        ("alpaca_eval", {"prompt": "w1"}, "instruction"),
        ("mt_bench", {"question_id": 1, "category": "math", "turns": [["w1"]]}, "turns"),
    ):
        path.write_text(json.dumps(line))
        with pytest.raises(ValueError, match=rf"q\.jsonl.*{kind}.*{what}"):
            benchmarks.read_questions(kind, path)
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        benchmarks.read_questions("alpaca_eval", tmp_path / "nowhere.json")


# ---------------------------------------------------------------------------- the script
@pytest.fixture(scope="module")
def folder(tmp_path_factory, talker, sae, tokenizer):
    """A directory with a policy, its reference, an SAE and pairs; the flags that name them."""
    folder = tmp_path_factory.mktemp("eval")
    for name, model in (("policy", talker), ("reference", nudge(talker))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    np.savez(folder / "sae.npz", **{name: getattr(sae, name).numpy() for name in ARRAYS})
    with open(folder / "pairs.jsonl", "w") as file:
        for pair in (make_pairs(21, seed=3)[i] for i in range(21)):
            words = (" ".join(WORDS[token % len(WORDS)] for token in part.tolist()) for part in pair)
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), words, strict=True))) + "\n")
    return folder


def flags_of(folder, **flags):
    """--model, --dataset and --sae of the folder, and others."""
    own = {"model": folder / "policy", "dataset": folder / "pairs.jsonl", "sae": folder / "sae.npz"}
    words = ["--sae_layer", "1"]
    for name, value in (own | flags).items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def test_features_make_a_weights_file(folder, sae, capsys):
    """Answers of w20 against those of w30: the table, and the file as train.py's reader takes it."""
    for name, word in (("a", "w20"), ("b", "w30")):
        lines = [json.dumps({"prompt": f"w{i}", "response": f"{word} w{i}"}) for i in range(40, 48)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    sets, found, weights = (folder / "a.jsonl", folder / "b.jsonl"), folder / "found.json", folder / "w.json"
    options = {"find_features": sets, "features": 6, "weights": weights, "weight_outside": 0.25}
    eval_diversity.main(flags_of(folder, json=found, **options))
    rows = json.loads(found.read_text())["features"]
    assert len(rows) == 6 and all(row["mean_a"] > row["mean_b"] for row in rows)
    assert f"{rows[0]['feature']:>8}{rows[0]['mean_a']:>12.4f}" in capsys.readouterr().out
    (w,) = presets.load_feature_weights(weights, [sae])
    assert w[[row["feature"] for row in rows]].tolist() == [1.0] * 6 and (w == 0.25).sum() == sae.m - 6


def test_script_on_two_ranks(folder):
    """Two processes: the same scores and intervals as one, in the files."""
    few = {"prompts": 5, "samples": 3, "max_new_tokens": 20, "features_top": 4, "bootstrap": 50}
    few["reference"] = folder / "reference"
    words = [sys.executable, eval_diversity.__file__, *flags_of(folder, json=folder / "two.json", **few)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    where = {**os.environ, **where, "OMP_NUM_THREADS": "1"}
    options = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    ranks = [subprocess.Popen(words, env={**where, "RANK": rank}, **options) for rank in "01"]
    eval_diversity.main(flags_of(folder, json=folder / "one.json", train_pairs=folder / "pairs.jsonl", **few))
    for rank in ranks:
        errors = rank.communicate(timeout=120)[1]
        assert rank.returncode == 0, errors
    one, two = (json.loads((folder / f"{name}.json").read_text()) for name in ("one", "two"))
    assert set(one.pop("made_by")) == set(two.pop("made_by")) == {"command", "commit", "hardware"}
    again, ends, ends_two = one.pop("train"), one.pop("intervals"), two.pop("intervals")
    assert one.keys() == two.keys() and len(one["activations_reference"]) == 4 and len(ends) > 15
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    for name in ends:
        assert ends_two[name] == pytest.approx(ends[name], rel=1e-3, abs=1e-6), name
    assert again["accuracy"] == one["accuracy"] and "entropy" not in again, "the same pairs as training pairs"


def test_files_for_each_temperature(folder):
    (folder / "q.json").write_text(json.dumps([{"instruction": "w20 w21", "dataset": "d"}]))
    out, options = folder / "out/ours.json", {"export": "alpaca_eval", "questions": folder / "q.json"}
    eval_diversity.main(flags_of(folder, out=out, temperature=(0.2, 1), max_new_tokens=9, **options))
    for name in ("ours_t0.2", "ours_t1"):
        (answer,) = json.loads((folder / f"out/{name}.json").read_text())
        assert answer["generator"] == name and answer["dataset"] == "d" and answer["output"]


@pytest.mark.parametrize(
    "flags, what",
    [
        (["--top_p", "0"], "--top_p 0.0"),
        (["--samples", "-1"], "--samples -1"),
        (["--prompts", "0"], "--prompts 0"),
        (["--temperature", "0.5"], "--temperature"),
        (["--export", "mt_bench"], "--questions"),
        (["--export", "alpaca_eval", "--questions", "q", "--out", "a.jsonl"], ".json"),
        (["--export", "records", "--questions", "q", "--out", "a.jsonl", "--temperature", "-1"], "-1.0"),
        (["--weights", "w.json"], "--find_features"),
        (["--weight_inside", "nan"], "--weight_inside nan"),
    ],
)
def test_wrong_flags_name_themselves(flags, what):
    with pytest.raises(ValueError, match=what.replace(".", r"\.")):
        eval_diversity.parse_args(["--preset", "toy", *flags])


def test_exported_records_are_read_again(tokenizer, tmp_path):
    """They are a set of responses for --find_features: the SFT format of data.load_pairs."""
    eval_diversity.write_lines(tmp_path / "r.jsonl", [{"prompt": "w20 w21", "response": "w30"}])
    pairs = load_pairs(str(tmp_path / "r.jsonl"), tokenizer, sft=True)
    assert [part.tolist() for part in pairs[0]][1:] == [[*ids_of(tokenizer, "w30"), 7], []]
