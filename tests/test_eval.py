"""eval_diversity.py: scores against plain loops and closed forms, samples against their distribution."""

import copy
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import V, greedy, make_lm, make_pairs, make_sae, nudge, plain, predicting
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

import eval_diversity
import fpo
import losses
import metrics
import sampling
from data import Pairs
from eval_diversity import Settings, evaluate, sample_responses
from runtime import UserError
from sae import ARRAYS
from settings import Config, parse_args

WORDS = [*(f"w{i}" for i in range(8, V - 6)), "the", "answer", "is", "here", "one", "six"]  # Chat tries these
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


def make_settings(config=None, units=(), **changes):
    """Settings as parse_args leaves them, without a bootstrap."""
    settings = Settings(**{"bootstrap": 0, **changes})
    settings.config, settings.units = config or Config(k=12), list(units)
    return settings


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def lm():
    model = nudge(make_lm())
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)  # 7 is the template's end
    return model


# ---------------------------------------------------------------------------- pairs
@pytest.fixture(scope="module")
def nine(lm):
    """A policy that holds a reference, nine pairs, and what both say of them in plain form."""
    pairs, reference, sae = make_pairs(9, seed=4), make_lm(), make_sae()
    policy = fpo.Policy(copy.deepcopy(lm), [sae], [(1, "res")])
    policy.hold_reference(fpo.Policy(copy.deepcopy(reference), [sae], [(1, "res")]))
    with torch.no_grad():
        x = plain(lm, reference, [sae], [1], pairs)
    x["ratio"] = x["logps"] - x["ref_logps"]
    x["mse"] = losses.feature_mse(x["features0"], x["ref_features0"], k=12)
    return policy, pairs, x


def average(values):
    return pytest.approx(values.mean().item(), rel=1e-4)


def test_scores_against_plain_loops(nine, tokenizer):
    """Means over pairs; the reward is the method's own, D_FPO is in the run's units."""
    policy, pairs, x = nine
    scores = evaluate(policy, tokenizer, pairs, make_settings(beta=0.3, method="fpo"), layout="shared")

    def share(name, per_token=True):
        chosen, rejected = (x[name] / (x["lengths"] if per_token else 1)).chunk(2)
        return (chosen > rejected).sum().item() / 9

    assert (scores["accuracy"], scores["accuracy_sum"]) == (share("logps"), share("logps", False))
    assert scores["reward_accuracy"] == scores["reward_accuracy_mean"] == share("ratio")
    assert scores["reward_accuracy_sum"] == share("ratio", False)
    assert scores["nll_chosen"] == average((-x["logps"] / x["lengths"])[:9])
    for name in ("kl", "mse"):  # the absolute value is of each pair: signs differ here
        chosen, rejected = x[name].chunk(2)
        assert scores[f"{name}_chosen"] == average(chosen)
        assert scores[f"{name}_rejected"] == average(rejected)
        assert (rejected - chosen).min() < 0 < (rejected - chosen).max()
        assert scores[f"{name}_gap"] == average(0.3 * (rejected - chosen).abs())
    entropy = x["entropy"].sum() / x["lengths"].sum()
    assert scores["teacher_forced_entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    entropy = x["entropy_all"][9:].sum() / x["lengths_all"][9:].sum()
    assert scores["teacher_forced_entropy_all"] == pytest.approx(entropy.item(), rel=1e-5)
    settings = make_settings(method="simpo", units=[4.0])
    again = evaluate(policy, tokenizer, pairs, settings, layout="separate", max_tokens=100)
    assert again["reward_accuracy"] == share("logps") != share("ratio")
    assert again["mse_rejected"] == pytest.approx(scores["mse_rejected"] / 4, rel=1e-4)
    assert "reward_accuracy" not in evaluate(policy, tokenizer, pairs, make_settings(), layout="shared")


def test_features_against_plain_loops(nine, tokenizer):
    """The largest activations by rank, and which features moved: one response and one feature at a time."""
    policy, pairs, x = nine
    scores = evaluate(
        policy, tokenizer, pairs, make_settings(features_top=5), layout="shared", max_tokens=100
    )
    for whose, name in (("policy", "features0"), ("reference", "ref_features0")):
        by_rank = x[name].sort(descending=True).values[:, :5].mean(0)  # of each response sorted by itself
        assert scores[f"activations_{whose}"] == pytest.approx(by_rank.tolist(), rel=1e-4)
    after, before = x["features0"].tolist(), x["ref_features0"].tolist()  # 18 × M
    moved, m = [], len(after[0])
    for i in range(m):
        a, b = (sum(response[i] for response in many) / 18 for many in (after, before))
        on = sum(y[i] != 0 or z[i] != 0 for y, z in zip(after, before, strict=True))
        moved.append({"id": i, "before": b, "after": a, "responses": on})
    moved.sort(key=lambda row: -abs(row["after"] - row["before"]))
    assert min(row["after"] - row["before"] for row in moved[: m // 4]) < 0  # down, too
    everything = metrics.moved_features(policy, pairs, m, layout="separate")
    for found, n in ((scores["features_moved"], 5), (everything, m // 4)):
        for expected, row in zip(moved[:n], found[:n], strict=True):
            assert row == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in expected.items()}


A, B = range(10, 14), range(20, 22)


@pytest.fixture(scope="module")
def alternating():
    """A model that follows the 2 tokens of B by one of the 4 of A, and every other token by one of B.

    Its layers add nothing, so that the last token decides: its embedding is one of two unit vectors, and the
    head gives the allowed tokens logit 0, the others the softcap's least, -30.
    """
    lm = make_lm(tie_word_embeddings=False)
    with torch.no_grad():
        for layer in lm.model.layers:
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                norm.weight.fill_(-1.0)
        lm.model.embed_tokens.weight.zero_()[:, 0] = 1.0
        lm.model.embed_tokens.weight[list(B)] = torch.eye(lm.config.hidden_size)[1]
        lm.lm_head.weight.zero_()[:, :2] = -100.0
        lm.lm_head.weight[list(B), 0] = 0.0
        lm.lm_head.weight[list(A), 1] = 0.0
    lm.generation_config = GenerationConfig(eos_token_id=1)
    return lm


def test_three_entropies_in_closed_form(alternating, tokenizer):
    """The next token's entropy is log 2 after a prompt's or A's token, log 4 after B's; in bits 1 and 2."""
    pairs = Pairs([([2, 8, 12], [20, 21], [11, 20, 12, 13])])
    settings = make_settings(max_new_tokens=6, prompts=1)
    scores = evaluate(fpo.Policy(alternating), tokenizer, pairs, settings, samples=8, layout="shared")
    bit = math.log(2)
    # Positions: the prompt's last token and all of the response but its last: 1 + 2 and 1 + 1 + 2 + 1 bits.
    assert scores["teacher_forced_entropy"] == pytest.approx(8 / 6 * bit)
    # All of prompt and rejected response but the last token: 1 + 1 + 1, then 1 + 2 + 1.
    assert scores["teacher_forced_entropy_all"] == pytest.approx(7 / 6 * bit)
    # Six sampled tokens are B A B A B A, whichever: 1, 2, 1, 2, 1, 2 bits, and so is -log π.
    assert scores["entropy"] == pytest.approx(1.5 * bit)
    assert scores["predictive_entropy"] == pytest.approx(9 * bit)
    assert scores["predictive_entropy_per_token"] == pytest.approx(1.5 * bit)
    assert scores["response_tokens"] == 6


def test_intervals_of_a_share_are_binomial():
    """A resampled share of n hits and misses is binomial: exact quantiles; a ratio of equals has no width."""
    n, hits = 200, 150
    hit = torch.tensor([1.0] * hits + [0.0] * (n - hits))
    one, length = torch.ones(n), torch.arange(1.0, n + 1)
    columns = {"share": (hit, one), "ratio": (3 * length, length)}
    scores = metrics.summary([columns], bootstrap=4000, seed=1)
    assert scores["share"] == 0.75 and scores["ratio"] == pytest.approx(3)
    chances = [math.comb(n, i) * 0.75**i * 0.25 ** (n - i) for i in range(n + 1)]
    below = list(itertools.accumulate(chances))
    exact = [next(i for i, c in enumerate(below) if c >= q) / n for q in (0.025, 0.975)]
    assert scores["intervals"]["share"] == pytest.approx(exact, abs=1.01 / n)
    assert scores["intervals"]["ratio"] == pytest.approx([3, 3])
    assert scores == metrics.summary([columns], bootstrap=4000, seed=1)
    assert "intervals" not in metrics.summary([columns])


# ---------------------------------------------------------------------------- sampling
def test_samples_end_where_a_stop_token_came(lm, tokenizer):
    """Both stop tokens end a response, which has them; no other response is shorter than asked for."""
    prompts = [make_pairs(7, seed=2)[i][0].tolist() for i in range(7)]
    options = {"samples": 3, "max_new_tokens": 40, "sample_batch": 8}
    state = torch.random.get_rng_state()
    first = sample_responses(lm, tokenizer, prompts, **options)
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random numbers go on unchanged"
    assert first == sample_responses(lm, tokenizer, prompts, **options)
    assert first != sample_responses(lm, tokenizer, prompts, seed=1, **options)
    flat = [response for many in first for response in many]
    assert [len(many) for many in first] == [3] * 7
    assert len({tuple(response) for response in flat}) > 15, "samples of a prompt differ"
    ended = [response for response in flat if response[-1] in (1, 7)]
    assert {response[-1] for response in ended} == {1, 7}
    assert all(1 not in response[:-1] and 7 not in response[:-1] for response in flat)
    assert all(len(response) == 40 for response in flat if response not in ended)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_draws_from_the_nucleus(lm, tokenizer, temperature):
    """Frequencies of the first token against the model's, cut to the smallest set that reaches p.

    Neither the model's own generation config nor that batches draw one after the other changes them.
    """
    prompt, n = [2, 5, 9, 30], 3000
    theirs = GenerationConfig(eos_token_id=1, do_sample=True, top_k=2, min_p=0.9, repetition_penalty=9.0)
    lm.generation_config, ours = theirs, lm.generation_config
    options = {"samples": n, "max_new_tokens": 1, "top_p": 0.6, "temperature": temperature}
    (out,) = sample_responses(lm, tokenizer, [prompt], sample_batch=500, **options)
    assert lm.generation_config is theirs and out[:500] != out[500:1000]
    lm.generation_config = ours
    p = (lm(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    kept, total = [], 0.0
    for token in p.argsort(descending=True).tolist():
        if total >= 0.6:
            break
        kept.append(token)
        total += p[token].item()
    counts = torch.bincount(torch.tensor([response[0] for response in out]), minlength=V).tolist()
    assert sum(counts[token] for token in kept) == n and 2 < len(kept) < V
    for token in kept:
        expected = p[token].item() / total
        assert abs(counts[token] / n - expected) < 5 * math.sqrt(expected / n), token


def test_temperature_zero_is_greedy(lm, tokenizer):
    """Also for the shorter prompt of a batch, which is padded on the left."""
    prompts = [[2, 5, 9, 30, 44, 45, 46], [2, 40, 41]]
    out = sample_responses(lm, tokenizer, prompts, samples=2, temperature=0, max_new_tokens=10)
    for prompt, responses in zip(prompts, out, strict=True):
        assert responses == [greedy(lm, prompt, 10)] * 2


def test_nothing_is_sampled_that_has_no_place(lm, tokenizer, run):
    """More tokens than the model has positions for are refused; what training shows is cut there."""
    most = lm.config.max_position_embeddings
    records = [json.loads(line) for line in (run / "pairs.jsonl").read_text().splitlines()]
    # A prompt is a token a word; <bos>, <u>, <end> and <a> come with it.
    left = most - max(len(record["prompt"].split()) for record in records) - 4
    words = f"--model run/model --samples 2 --max_new_tokens {left + 1}".split()
    with pytest.raises(UserError, match=rf"--max_new_tokens {left + 1}: .* prompt: {left}$"):
        eval_diversity.main(eval_diversity.parse_args(words))
    short, prompt = copy.deepcopy(lm), [2, 5, 9, 30, 44, 45, 46]
    short.config.max_position_embeddings = len(prompt) + 4
    (said,) = sampling.greedy_answers(fpo.Policy(short), tokenizer, [prompt])
    ((answer,),) = sample_responses(lm, tokenizer, [prompt], temperature=0, max_new_tokens=4)
    assert said == tokenizer.decode(answer, skip_special_tokens=True)


@torch.no_grad()
def test_entropies_are_of_the_whole_distribution(lm, tokenizer):
    """Entropy and log π of responses from the nucleus, against log_softmax of plain logits."""
    prompts = [make_pairs(4, seed=6)[i][0].tolist() for i in range(4)]
    drawn = sample_responses(lm, tokenizer, prompts, samples=3, max_new_tokens=20, top_p=0.5)
    totals = eval_diversity.response_statistics(lm, prompts, drawn, layout="separate", max_tokens=90)
    for i, s in itertools.product(range(4), range(3)):
        y = drawn[i][s]
        log_p = predicting(lm, torch.tensor(prompts[i]), torch.tensor(y))[0].log_softmax(-1)
        h, logp = -(log_p.exp() * log_p).sum().item(), log_p[range(len(y)), y].sum().item()
        assert totals[i, s].tolist() == pytest.approx([h, logp, len(y)], rel=1e-4)


def test_distinct_and_self_bleu_by_hand():
    texts = ["a b a", "a b", "c"]  # words a b a a b c; pairs ab ba ab
    assert eval_diversity.distinct(texts, 1) == 3 / 6
    assert eval_diversity.distinct(texts, 2) == 2 / 3
    assert eval_diversity.distinct(["a"], 2) == 0
    totals = torch.tensor([[[2.0, -3.0, 2], [4.0, -8.0, 4]], [[1.0, -1.0, 1], [5.0, -2.0, 4]]]).double()
    columns = eval_diversity.sample_columns([["a b", "a b"], ["c", "d"]], totals)
    scores = metrics.summary([columns])
    assert scores["entropy"] == pytest.approx(12 / 11), "over all tokens"
    assert scores["predictive_entropy"] == 14 / 4
    assert scores["predictive_entropy_per_token"] == pytest.approx((1.5 + 2 + 1 + 0.5) / 4)
    assert scores["distinct_1"] == (0.5 + 1) / 2
    assert eval_diversity.self_bleu(["a b c d e"] * 3) == pytest.approx(100)
    assert eval_diversity.self_bleu(["a b c d", "e f g h"]) < 10
    # Four words, of three and two in common: 2-grams 2 of 3, 3-grams 1 of 2, 4-grams smoothed 1/2 of 1.
    expected = 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert eval_diversity.self_bleu(["a b c x", "a b c y"]) == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------- the script
@pytest.fixture
def run(tmp_path, lm, tokenizer, monkeypatch):
    """What train.py leaves: run/model, run/config.json; and beside it a reference, an SAE and pairs."""
    monkeypatch.chdir(tmp_path)
    for name, model in (("run/model", lm), ("reference", make_lm())):
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    np.savez("sae.npz", **{name: getattr(make_sae(), name).numpy() for name in ARRAYS})
    pairs = make_pairs(21, seed=3)
    with open("pairs.jsonl", "w") as file:
        for pair in (pairs[i] for i in range(21)):
            words = (" ".join(WORDS[token % len(WORDS)] for token in part.tolist()) for part in pair)
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), words, strict=True))) + "\n")
    words = "--method fpo --model reference --dataset pairs.jsonl --eval_dataset pairs.jsonl --sae sae.npz"
    words += " --sae_layer 1 --k 7 --max_length 99 --max_prompt_length 50"
    config = parse_args(words.split())
    (tmp_path / "run/config.json").write_text(json.dumps(vars(config) | {"units": [9.0]}))
    return tmp_path


@pytest.mark.parametrize("method", losses.METHODS)
def test_a_preset_s_models_are_scored_where_they_lie(tmp_path, monkeypatch, method):
    """By the command that train.py prints at its end: nothing is written there."""
    monkeypatch.chdir(tmp_path)
    words = ["--model", f"runs/toy/{method}/model", "--reference", "runs/toy/model", "--preset", "toy"]
    assert eval_diversity.parse_args(words).config.model == f"runs/toy/{method}/model"


def test_a_model_is_scored_as_it_was_trained(run):
    """Method, units, data, SAE and lengths are the run's; flags replace them, a preset the last three."""
    settings = eval_diversity.parse_args(["--model", "run/model"])
    assert settings.method == "fpo" and settings.units == [9.0]
    names = ("eval_dataset", "dataset", "sae", "sae_layer", "k", "max_length", "max_prompt_length")
    expected = ["pairs.jsonl", "pairs.jsonl", "sae.npz", [1], 7, 99, 50]
    assert [getattr(settings.config, name) for name in names] == expected
    words = ["--model", "run/model", "--method", "dpo", "--k", "8", "--dataset", "other.jsonl"]
    settings = eval_diversity.parse_args([*words, "--train_pairs", "third.jsonl"])
    found = [getattr(settings.config, name) for name in names]
    assert settings.method == "dpo" and found == ["other.jsonl", "third.jsonl", "sae.npz", [1], 8, 99, 50]
    words = ["--preset", "gemma-2-2b", "--model", "run/model", "--sae_layer", "1"]
    settings = eval_diversity.parse_args(words)
    assert settings.config.max_length == 2048 and "ultrafeedback" in settings.config.eval_dataset
    assert settings.method == "fpo" and settings.units == [9.0]
    words = ["--preset", "own", "--model", "run/model", "--sae", "sae.npz", "--dataset", "other.jsonl"]
    settings = eval_diversity.parse_args(words)  # no layer: found as training found it
    assert settings.config.sae_layer == [] and settings.units == [9.0]
    settings = eval_diversity.parse_args(["--model", "reference", "--dataset", "pairs.jsonl"])
    assert settings.method is None and settings.units == [] and settings.config.sae is None


WRONG = {
    "--top_p 0": "--top_p 0.0",
    "--samples -1": "--samples -1",
    "--prompts 0": "--prompts 0",
    "--beta nan": "--beta nan",
    "--reference=": "--reference ''",
    "--lr 1e-3": "--lr",
    "--k 0": "--k 0",
    "--method ppo": "ppo",
    "--preset other": "--preset other",
    "--model reference": "--dataset",
    "--model run/model --sae_layer 2": "--sae_layer",
    "--json .": "--json",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags_name_themselves(run, flags):
    with pytest.raises(UserError, match=re.escape(WRONG[flags])):
        eval_diversity.parse_args(flags.split())


def test_script_on_two_ranks(run, fork, capsys):
    """Two processes: the same scores, samples and intervals as one, in the files."""
    words = "--model run/model --reference reference --prompts 5 --samples 3 --max_new_tokens 20 --seed 2"
    words = f"{words} --sample_batch 4 --features_top 4 --bootstrap 50 --train_pairs --json".split()
    two = fork(run, eval_diversity.__file__, *words, "two.json", ranks=2)
    eval_diversity.main(eval_diversity.parse_args([*words, "one.json"]))
    printed = capsys.readouterr().out
    two.finish()
    one, two = (json.loads((run / path).read_text()) for path in ("one.json", "two.json"))
    assert set(one.pop("made_by")) == set(two.pop("made_by")) == {"command", "commit", "hardware"}
    again, ends, ends_two = one.pop("train"), one.pop("intervals"), two.pop("intervals")
    two.pop("train")
    moved, moved_two = one.pop("features_moved"), two.pop("features_moved")
    assert [f["id"] for f in moved] == [f["id"] for f in moved_two] and len(moved) == 4
    for f, g in zip(moved, moved_two, strict=True):
        assert f == pytest.approx(g, rel=1e-4, abs=1e-6)
        before_after = f"{f['before']:.4g} before, {f['after']:.4g} after"
        assert f"feature {f['id']}: {before_after}, on {f['responses']} resp" in printed
    assert one.keys() == two.keys() and len(one["activations_reference"]) == 4 and len(ends) > 15
    assert {"entropy", "teacher_forced_entropy_all", "reward_accuracy", "self_bleu"} <= one.keys()
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    for name in ends:
        assert ends_two[name] == pytest.approx(ends[name], rel=1e-3, abs=1e-6), name
    assert again["accuracy"] == one["accuracy"] and "entropy" not in again, "the same pairs as training pairs"
