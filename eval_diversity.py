"""Accuracy, diversity, distance from the reference; features that tell responses apart; benchmark answers.

    python eval_diversity.py --preset toy --model runs/toy/fpo/model --reference runs/toy/model --json a.json
    python eval_diversity.py --preset toy --find_features a.jsonl b.jsonl --weights weights.json
    python eval_diversity.py --model MODEL --export mt_bench --questions question.jsonl --out answers/a.jsonl

Scores, by their keys in --json. Of pairs:
    accuracy, accuracy_sum         chosen above rejected in log π(y|x) / |y|, in log π(y|x): share (Table 2)
    reward_accuracy, .._mean       the same of log π/π_ref: by sum (DPO's reward), per token (FPO's)
    nll_chosen                     -log π(y_w|x) / |y_w|, nats, mean over pairs
    teacher_forced_entropy         H of the next token at the responses' positions, nats, mean over tokens
    kl_chosen, kl_rejected         sequential KL(ref ‖ π), nats, mean over pairs (Fig. 3)
    mse_chosen, mse_rejected       D_FPO (Eq. 10), mean over pairs (Fig. 4)
    kl_margin, mse_margin          |β D(y_l) - β D(y_w)|, mean over pairs (Figs. 3, 4)
    activations_policy, .._reference   a response's largest pooled features, mean by rank (Fig. 2 left)
    train                          all this again of training pairs (--train_pairs; Table 2's protocol)
Of sampled responses:
    entropy                        H of the next token at their positions, nats, mean over tokens (Table 2)
    predictive_entropy, .._per_token   -log π(y|x); that over |y|; nats, mean over responses
    response_tokens                |y|, the turn's end counted
    distinct_1, distinct_2         different words, pairs of words over all, of a prompt's responses
    self_bleu                      0 to 100, of a response against the others to its prompt
And made_by: the command, commit and hardware.
Of each mean: intervals {key: [low, high]}, 95 %, by bootstrap over pairs or prompts.

Responses are sampled at temperature 1 from the nucleus (p = 0.95). Every entropy and log π is of the model's
whole distribution at temperature 1, before the cut. Ranks and batch sizes change nothing beyond rounding.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

import chunked
import fpo
import offline
import presets
from benchmarks import EXPORTS, MT_BENCH, answer_record, read_questions
from data import Pairs, Renderer, load_pairs, micro_batches


# ---------------------------------------------------------------------------- preference pairs
def _batches(policy, pairs, *, cache=None, max_tokens=0, max_pairs=0, progress=False, **rows):
    """This rank's (batch, cached reference), with the policy in evaluation mode; every rank gets as many."""
    rank, world = fpo.ranks()
    limits = {"max_pairs": max_pairs or 16, "max_tokens": max_tokens}
    groups = micro_batches(range(len(pairs)), pairs.row_lengths(rows["layout"]), world, **limits)[rank::world]
    was_training = policy.training
    policy.eval()
    batches = fpo.stream(pairs, groups, device=policy.lm.device, cache=cache, **rows)
    yield from tqdm(batches, "evaluating", len(groups), disable=not progress or rank > 0, leave=False)
    policy.train(was_training)


@torch.no_grad()
def evaluate_pairs(policy, pairs, *, cache=None, k=50, top=0, **budget_and_rows):
    """What a policy makes of every pair, in the data set's order, the same on every rank.

    The reference is the one that the policy holds, else the cache's, else there is none.

    Args:
        policy: fpo.Policy.
        cache: offline.ReferenceCache of these pairs.
        k: of D_FPO, Eq. 10.
        top: also each response's so many largest pooled features (of the first SAE), in order.
        budget_and_rows: micro-batches, as data.micro_batches and data.collate take them; progress.
    Returns:
        {name: (n,) float64}, for _chosen and _rejected. Always: logps, lengths, entropy (summed, nats).
        With a reference: ratio = log π/π_ref, and mse where there are SAEs. With a held one also kl. With
        `top`: activations_policy, activations_reference (n, top).
    """
    table = {}
    for batch, cached in _batches(policy, pairs, cache=cache, **budget_and_rows):
        says, reference = policy(batch, entropy=True)
        reference = reference or cached
        values = {"logps": says.logps, "lengths": says.lengths, "entropy": says.entropy}
        if says.kl is not None:
            values["kl"] = says.kl
        if reference is not None:
            values["ratio"] = says.logps - reference.logps
            if says.features and reference.features:
                values["mse"] = fpo.layer_mse(says.features, reference.features, k=k)
        for name, whose in (("policy", says), ("reference", reference)):
            if top and whose is not None and whose.features:
                c = whose.features[0]
                values[f"activations_{name}"] = c.topk(min(top, c.shape[1])).values
        for name, value in values.items():
            weight = batch.weight.view(-1, *[1] * (value.ndim - 1))  # 0: a padding pair
            for side, half in zip(("chosen", "rejected"), value.chunk(2), strict=True):
                zeros = half.new_zeros(len(pairs), *half.shape[1:], dtype=torch.float64)
                table.setdefault(f"{name}_{side}", zeros)[batch.index] += half * weight
    if dist.is_initialized():
        for name in sorted(table):
            dist.all_reduce(table[name])
    return {name: column.cpu() for name, column in table.items()}


def pair_columns(table, *, beta=0.1) -> dict:
    """Scores of an `evaluate_pairs` table: {key: (numerator (n,), denominator (n,))}; keys: this file's head.

    Args:
        beta: β of the margins |β D(y_l) - β D(y_w)| (Figs. 3, 4): one for all methods, to compare them.
    """
    sides = ("chosen", "rejected") if table["lengths_rejected"].any() else ("chosen",)
    one = torch.ones_like(table["logps_chosen"])
    per_token = lambda name, s: table[f"{name}_{s}"] / table[f"lengths_{s}"].clamp(min=1)  # noqa: E731
    columns = {"nll_chosen": (-per_token("logps", "chosen"), one)}
    if len(sides) == 2:
        above = lambda name: (table[f"{name}_chosen"] > table[f"{name}_rejected"]).double()  # noqa: E731
        higher = lambda name: (per_token(name, "chosen") > per_token(name, "rejected")).double()  # noqa: E731
        columns |= {"accuracy": (higher("logps"), one), "accuracy_sum": (above("logps"), one)}
        if "ratio_chosen" in table:
            columns["reward_accuracy"] = above("ratio"), one
            columns["reward_accuracy_mean"] = higher("ratio"), one
    total = lambda name: sum(table[f"{name}_{side}"] for side in sides)  # noqa: E731
    columns["teacher_forced_entropy"] = total("entropy"), total("lengths")
    for name in ("kl", "mse"):
        if f"{name}_chosen" in table:
            columns |= {f"{name}_{side}": (table[f"{name}_{side}"], one) for side in sides}
            if len(sides) == 2:
                margin = beta * table[f"{name}_rejected"] - beta * table[f"{name}_chosen"]
                columns[f"{name}_margin"] = margin.abs(), one
    return columns


def summary(groups, *, bootstrap=0, seed=0) -> dict:
    """{key: Σ numerator / Σ denominator}, and with `bootstrap` their 95 % intervals under "intervals".

    An interval goes from the 2.5th to the 97.5th percentile over so many resamples, with replacement, of a
    group's items: how the value varies with the pairs or prompts drawn, not with the seed of training.

    Args:
        groups: dicts of {key: (numerator (n,), denominator (n,))}; a group's n items are resampled together.
    """
    scores, intervals = {}, {}
    for columns in groups:
        parts = zip(*columns.values(), strict=True)
        numerator, denominator = (torch.stack(part, 1).double() for part in parts)  # (n, keys)
        scores |= dict(zip(columns, (numerator.sum(0) / denominator.sum(0)).tolist(), strict=True))
        g, n, draws = torch.Generator().manual_seed(seed), len(numerator), []
        for _ in range(bootstrap):
            times = torch.bincount(torch.randint(n, (n,), generator=g), minlength=n).double()  # (n,)
            draws.append((times @ numerator) / (times @ denominator))
        if draws:
            low, high = torch.stack(draws).quantile(torch.tensor([0.025, 0.975]).double(), dim=0).tolist()
            intervals |= {name: list(ends) for name, *ends in zip(columns, low, high, strict=True)}
    return {**scores, "intervals": intervals} if bootstrap else scores


# ---------------------------------------------------------------------------- sampled responses
class _Sampler(LogitsProcessor):
    """Temperature, nucleus and Gumbel noise: the largest logit inside the nucleus is an exact sample.

    Greedy decoding then draws it. A row's noise is of its own generator: other rows don't change its draws.
    The nucleus is the smallest set of tokens whose probability, at this temperature, reaches p (Holtzman et
    al. 2020): a token is inside while all likelier ones together are below p, so equals are in together.
    Noted at each step (rows,), at temperature 1 and uncut: entropy, and the drawn token's log-probability.
    """

    def __init__(self, temperature, top_p, generators):
        self.temperature, self.top_p, self.generators = temperature[:, None], top_p, generators
        self.entropy, self.logps = [], []

    def __call__(self, input_ids, scores):
        log_p = scores.float().log_softmax(-1)
        self.entropy.append(-(log_p.exp() * log_p).sum(-1))
        V = log_p.shape[1]
        u = torch.stack([torch.rand(V, generator=g, device=log_p.device) for g in self.generators])
        noisy = log_p - self.temperature * (-u.clamp(min=1e-30).log()).log()  # temperature 0: greedy
        token = noisy.argmax(-1, keepdim=True)
        p = (log_p / self.temperature.clamp(min=1e-6)).softmax(-1)
        while self.top_p < 1:  # without sorting the vocabulary: strike out what is drawn from outside
            likelier = torch.where(p > p.gather(1, token), p, 0).sum(-1, keepdim=True)
            outside = likelier >= self.top_p
            if not outside.any():
                break
            noisy = torch.where(outside, noisy.scatter(1, token, -torch.inf), noisy)
            token = noisy.argmax(-1, keepdim=True)
        self.logps.append(log_p.gather(1, token)[:, 0])
        return noisy


def _continue(lm, rows, sampler, *, steps, stops, pad):
    """(new tokens, Σ entropy, log π of them) for each row of token ids: up to a stop, `steps` at most."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=lm.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=lm.device)
    out = lm.generate(
        ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, repetition_penalty=1.0,
        eos_token_id=sorted(stops), pad_token_id=pad, logits_processor=LogitsProcessorList([sampler]),
    )  # fmt: skip
    notes = (torch.stack(note, 1).double().tolist() for note in (sampler.entropy, sampler.logps))
    for row, entropy, logps in zip(out[:, width:].tolist(), *notes, strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        yield row[:end], sum(entropy[:end]), sum(logps[:end])


def _draw(lm, prompts, jobs, *, temperature, max_new_tokens, top_p, seed, batch_size, stops, pad, bar):
    """{(prompt, sample): (token ids, Σ entropy, log π)} of these jobs.

    A quarter of the tokens is drawn at a time; then responses that have ended leave the batches.
    """
    noise = {job: torch.Generator(lm.device).manual_seed(hash((seed, *job)) % 2**62) for job in jobs}
    drawn = {job: ([], 0.0, 0.0) for job in jobs}
    done, quarter = 0, max(16, -(-max_new_tokens // 4))
    while jobs and done < max_new_tokens:
        steps = min(quarter, max_new_tokens - done)
        jobs = sorted(jobs, key=lambda job: (len(prompts[job[0]]), job))  # little padding
        for part in (jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)):
            heat = torch.tensor([temperature[p] for p, _ in part], device=lm.device)
            sampler = _Sampler(heat, top_p, [noise[job] for job in part])
            rows = [[*prompts[job[0]], *drawn[job][0]] for job in part]
            news = _continue(lm, rows, sampler, steps=steps, stops=stops, pad=pad)
            for job, new in zip(part, news, strict=True):
                drawn[job] = tuple(old + more for old, more in zip(drawn[job], new, strict=True))
        jobs = [job for job in jobs if drawn[job][0][-1] not in stops]
        bar.update(len(drawn) - len(jobs) - bar.n)
        done += steps
    return drawn


@torch.no_grad()
def sample_responses(
    lm, tokenizer, prompts, *, samples=1, max_new_tokens=256, top_p=0.95, temperature=1.0, seed=0,
    batch_size=128, progress=False,
):  # fmt: skip
    """Responses sampled by Hugging Face's generate, seeded by prompt and sample, split over the ranks.

    Args:
        prompts: P lists of token ids, BOS and the turn's opening included.
        temperature: one for all, or a list of one a prompt; 0 is greedy.
        seed: an int, or a tuple of them.
        batch_size: responses sampled at once: their keys and values are held.
    Returns:
        for each prompt `samples` lists of token ids, the token that ends the turn included where it came; and
        (P, samples, 3) float64: Σ_t H(π(·|x, y_<t)) and log π(y|x), nats, at temperature 1 and uncut; |y|.
    """
    rank, world = fpo.ranks()
    ends = lm.generation_config.eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), Renderer(tokenizer).end} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    heat = temperature if isinstance(temperature, list) else [temperature] * len(prompts)
    jobs = [(p, s) for p in range(len(prompts)) for s in range(samples)][rank::world]
    was_training, attention = lm.training, lm.config._attn_implementation
    lm.eval()
    lm.set_attn_implementation("eager")  # flex_attention would compile anew for every length
    with tqdm(total=len(jobs), desc="sampling", disable=not progress or rank > 0, leave=False) as bar:
        drawn = _draw(
            lm, prompts, jobs, temperature=heat, max_new_tokens=max_new_tokens, top_p=top_p, seed=seed,
            batch_size=batch_size, stops=stops, pad=pad, bar=bar,
        )  # fmt: skip
    lm.set_attn_implementation(attention)
    lm.train(was_training)
    if dist.is_initialized():
        parts = [None] * world
        dist.all_gather_object(parts, drawn)
        drawn = {job: response for part in parts for job, response in part.items()}
    by_prompt = [[drawn[p, s] for s in range(samples)] for p in range(len(prompts))]
    totals = [[(H, logp, len(y)) for y, H, logp in many] for many in by_prompt]
    return [[y for y, _, _ in many] for many in by_prompt], torch.tensor(totals, dtype=torch.float64)


def distinct(texts, n: int) -> float:
    """distinct-n (Li et al. 2016): different over all n-grams of some texts' words, split at white space."""
    words = [text.split() for text in texts]
    grams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def self_bleu(texts) -> float:
    """Self-BLEU (Zhu et al. 2018), 0 to 100: mean of each text's BLEU-4, sacrebleu's, against the others.

    A text of fewer than 4 words is scored by the n-grams it has. n-grams are counted once a text, not once
    for each of the texts that it is a reference of.
    """
    from sacrebleu import BLEU
    from sacrebleu.metrics.helpers import extract_all_word_ngrams

    tokenize = BLEU(effective_order=True).tokenizer
    grams, lengths = zip(*(extract_all_word_ngrams(tokenize(t.rstrip()), 1, 4) for t in texts), strict=True)
    most = {}  # n-gram: its second largest and its largest count in one text
    for counts in grams:
        for gram, count in counts.items():
            most[gram] = sorted((*most.get(gram, (0, 0)), count))[1:]
    scores = []
    for i, counts in enumerate(grams):
        correct, total = [0] * 4, [0] * 4
        for gram, count in counts.items():
            second, largest = most[gram]
            correct[len(gram) - 1] += second if count == largest else count  # clipped by the others' largest
            total[len(gram) - 1] += count
        n, others = lengths[i], lengths[:i] + lengths[i + 1 :]
        closest = min(others, key=lambda other, n=n: (abs(other - n), other))
        bleu = BLEU.compute_bleu(correct, total, n, closest, smooth_method="exp", effective_order=True)
        scores.append(bleu.score)
    return sum(scores) / len(scores)


def sample_columns(texts, totals) -> dict:
    """Scores of P prompts' responses, as {key: (numerator (P,), denominator (P,))}; keys: this file's head.

    predictive_entropy is the Monte-Carlo mean of -log π(y|x): H(π(·|x)) where responses are samples of π;
    those of its nucleus are likelier, and give less. .._per_token divides each response's by its own |y|.

    Args:
        texts: P lists of S texts.
        totals: (P, S, 3), as `sample_responses` gives it.
    """
    H, logp, length = totals.unbind(-1)
    one = torch.ones(len(texts))
    columns = {
        "entropy": (H.sum(1), length.sum(1)),
        "predictive_entropy": (-logp.mean(1), one),
        "predictive_entropy_per_token": (-(logp / length).mean(1), one),
        "response_tokens": (length.mean(1), one),
    }
    columns |= {f"distinct_{n}": (torch.tensor([distinct(many, n) for many in texts]), one) for n in (1, 2)}
    if totals.shape[1] > 1 and importlib.util.find_spec("sacrebleu"):
        columns["self_bleu"] = torch.tensor([self_bleu(many) for many in texts]), one
    return columns


def unique_prompts(pairs: Pairs, most: int) -> list[list[int]]:
    """The first `most` distinct prompts of a data set, as token ids."""
    prompts = dict.fromkeys(tuple(pairs[i][0].tolist()) for i in range(len(pairs)))
    return [list(prompt) for prompt in prompts][:most]


def evaluate(
    policy, tokenizer, pairs, *, cache=None, k=50, beta=0.1, top=0, prompts=100, samples=0,
    max_new_tokens=256, top_p=0.95, batch_size=128, seed=0, bootstrap=0, progress=False, **rows,
):  # fmt: skip
    """Scores of a policy, by the keys of this file's head: of pairs, and if samples > 0 of sampled responses.

    Args:
        policy, pairs, cache, k, top, rows: as `evaluate_pairs` takes them.
        beta: of the margins, see `pair_columns`. bootstrap: resamples for the intervals (`summary`), 0: none.
        prompts, samples: responses to each of so many of the pairs' distinct prompts.
    """
    table = evaluate_pairs(policy, pairs, cache=cache, k=k, top=top, progress=progress, **rows)
    groups = [pair_columns(table, beta=beta)]
    if samples:
        responses, totals = sample_responses(
            policy.lm, tokenizer, unique_prompts(pairs, prompts), samples=samples, top_p=top_p, seed=seed,
            max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        texts = [tokenizer.batch_decode(many, skip_special_tokens=True) for many in responses]
        groups.append(sample_columns(texts, totals))
    scores = summary(groups, bootstrap=bootstrap, seed=seed)
    for name in ("activations_policy", "activations_reference"):
        if f"{name}_chosen" in table:  # responses that are there: SFT has none rejected
            both = [table[f"{name}_{side}"][table[f"lengths_{side}"] > 0] for side in ("chosen", "rejected")]
            scores[name] = torch.cat(both).mean(0).tolist()
    return scores


# ---------------------------------------------------------------------------- features (Table 4)
@torch.no_grad()
def feature_statistics(policy, pairs, **budget_and_rows):
    """(mean (m,), largest (m,)) of the first SAE's features over a set of responses.

    Returns:
        mean over responses of the pooled feature c̄ (Eq. 10), and the largest activation at a single token.
    """
    sae = policy.saes[0]
    total = torch.zeros(sae.m + 1, dtype=torch.float64, device=policy.lm.device)
    largest = torch.zeros(sae.m, device=policy.lm.device)
    for batch, _ in _batches(policy, pairs, **budget_and_rows):
        states = policy.read_sites(batch)[0]  # (N, d), what the SAE reads
        pooled = chunked.pooled_features(states, sae, batch.owner, batch.lengths)
        there = (batch.lengths > 0).double() * batch.weight.repeat(2)
        total += torch.cat([there @ pooled.double(), there.sum()[None]])
        largest = torch.maximum(largest, sae.encode(states).amax(0))
    if dist.is_initialized():
        dist.all_reduce(total)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return (total[:-1] / total[-1]).cpu(), largest.cpu()


def choose_features(mean_a, largest_a, mean_b, *, n=50, criterion="difference", seed=0) -> list[int]:
    """At most `n` features that tell responses A from responses B, the clearest first.

    Args:
        mean_a, largest_a, mean_b: (m,), as `feature_statistics` gives them.
        criterion: "difference": the largest mean_a - mean_b above 0 (ours). "token": the n largest at a
            single token of A, less those whose mean is no higher over A (the paper's, as we read it).
            "random": drawn by `seed` from the features active in A or B (what a choice is compared with).
    """
    difference = mean_a - mean_b
    if criterion == "random":
        active = (mean_a + mean_b).nonzero()[:, 0]
        return active[torch.randperm(len(active), generator=torch.Generator().manual_seed(seed))][:n].tolist()
    ranking = (difference if criterion == "difference" else largest_a).argsort(descending=True)[:n]
    return ranking[difference[ranking] > 0].tolist()


# ---------------------------------------------------------------------------- benchmarks (Table 2, Fig. 3)
def export(lm, tokenizer, kind, questions, *, model, temperature=None, seed=0, **sampling) -> list[dict]:
    """A model's answers to questions of `read_questions`; each turn sees the model's own earlier answers.

    Args:
        kind: one of EXPORTS. model: the name it goes by.
        temperature: None: EXPORTS'; for MT-Bench its own, by category.
        sampling: max_new_tokens, top_p, batch_size, progress, as `sample_responses` takes them.
    """
    renderer = Renderer(tokenizer)
    temperature = EXPORTS[kind] if temperature is None else temperature
    talks = [[] for _ in questions]
    for turn in range(max(len(turns) for _, turns in questions)):
        here = [i for i, (_, turns) in enumerate(questions) if turn < len(turns)]
        prompts, heat = [], temperature
        for i in here:
            talks[i].append({"role": "user", "content": questions[i][1][turn]})
            pieces = renderer.pieces([*talks[i], {"role": "assistant", "content": "x"}])
            first, *rest = renderer.encode(pieces[:-1])  # all but the answer
            first = first if first[:1] == renderer.head else renderer.head + first
            prompts.append([*first, *(token for part in rest for token in part)])
        if heat is None:
            heat = [MT_BENCH.get(questions[i][0]["category"], 0.7) for i in here]
        options = {"temperature": heat, "seed": (seed, turn), **sampling}
        drawn, _ = sample_responses(lm, tokenizer, prompts, **options)
        for i, (tokens,) in zip(here, drawn, strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            talks[i].append({"role": "assistant", "content": text})
    answers = [[message["content"] for message in talk[1::2]] for talk in talks]
    return [answer_record(kind, *q, said, model) for q, said in zip(questions, answers, strict=True)]


# ---------------------------------------------------------------------------- the script
def add_flags(parser):
    """The flags of its own, in four groups."""
    score = parser.add_argument_group("scores").add_argument
    score("--beta", type=float, default=0.1, help="β of the margins, one for all methods (0.1)")
    train = {"nargs": "?", "const": "preset", "help": "training pairs too (Table 2): the preset's, or these"}
    score("--train_pairs", **train)
    score("--features_top", type=int, default=0, help="largest pooled features by rank; Fig. 2: 50 (0: none)")
    score("--bootstrap", type=int, default=1000, help="resamples for the intervals (1000); 0: none")
    score("--json", help="write all that is printed here")
    draw = parser.add_argument_group("sampling").add_argument
    draw("--prompts", type=int, help="distinct prompts to sample from (100); questions to export (all)")
    draw("--samples", type=int, default=25, help="responses a prompt for the entropies; 0: none (25)")
    draw("--max_new_tokens", type=int, help="longest response (the preset's; to export 1024)")
    draw("--top_p", type=float, help="nucleus (0.95; to export 1)")
    draw("--seed", type=int, default=0, help="of sampling, bootstrap and random features")
    find = parser.add_argument_group("features that tell A from B (Table 4), instead of scores").add_argument
    find("--find_features", nargs=2, metavar=("A", "B"), help="JSONL: prompt and response (or chosen)")
    criteria = ("difference", "token", "random")
    find("--criterion", default=criteria[0], choices=criteria, help="of means; token: the paper's")
    find("--features", type=int, default=50, help="at most so many (50)")
    find("--weights", help="write a file for train.py --feature_weights")
    find("--weight_inside", type=float, default=1.0, help="weight of the features found (1)")
    find("--weight_outside", type=float, default=0.0, help="weight of all others (0: they are free)")
    answer = parser.add_argument_group("answers to a benchmark, instead of scores").add_argument
    answer("--export", choices=EXPORTS, help="format; records: JSONL of prompt and response")
    answer("--questions", help="the benchmark's question file")
    answer("--out", help="file of answers; its name is the model's name there")
    answer("--temperature", type=float, nargs="+", help="a file each (0.7; Arena-Hard 0, MT-Bench its own)")


AT_LEAST_1 = ("prompts", "k", "features", "sample_batch", "max_new_tokens", "max_length", "max_prompt_length")
LEAST = dict.fromkeys(AT_LEAST_1, 1)  # of the other numbers 0


def parse_args(argv=None):
    """Flags over the preset's values."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    presets.shared_flags(parser)
    add_flags(parser)
    args = presets.parse_flags(parser, argv, LEAST)
    preset = presets.PRESETS[args.preset]
    args.dataset = args.dataset or preset["eval_dataset"]
    args.train_pairs = preset["dataset"] if args.train_pairs == "preset" else args.train_pairs
    for name, value in preset.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.model = args.model or presets.default_model(args.preset, "fpo")[0]
    if args.top_p is None:
        args.top_p = 1.0 if args.export else 0.95
    if args.max_new_tokens is None:
        args.max_new_tokens = 1024 if args.export and args.preset != "toy" else args.eval_tokens
    if args.prompts is None and not args.export:
        args.prompts = 100
    check_args(args)
    return args


def check_args(args):
    """Errors that need no model and no data: each names the value and what is allowed."""
    for name in ("json", "weights", "out"):
        if getattr(args, name) is not None:
            presets.check_output(name, getattr(args, name), folder=False)
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top_p {args.top_p}: must be above 0 and at most 1")
    if args.export and args.find_features:
        raise ValueError("--export and --find_features: one at a time")
    if args.export and not (args.questions and args.out):
        raise ValueError(f"--export {args.export}: --questions FILE and --out FILE are needed")
    if (args.questions or args.out or args.temperature) and not args.export:
        raise ValueError("--questions, --out, --temperature: only with --export; scores are of temperature 1")
    suffix = ".json" if args.export == "alpaca_eval" else ".jsonl"
    if args.export and Path(args.out).suffix != suffix:
        raise ValueError(f"--out {args.out}: {args.export} reads files that end in {suffix}")
    if args.weights and not args.find_features:
        raise ValueError(f"--weights {args.weights}: only with --find_features A B")


def write_lines(path, records):
    """Write JSON lines as `offline.write_text` does."""
    offline.write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def run_export(args, tokenizer, lm, questions, main_rank):
    """Answers of one model to a benchmark, a file for each temperature; the file's name is the model's."""
    for heat in args.temperature or [None]:
        out = Path(args.out)
        if len(args.temperature or ()) > 1:
            out = out.with_name(f"{out.stem}_t{heat:g}{out.suffix}")
        answers = export(
            lm, tokenizer, args.export, questions, model=out.stem, temperature=heat, seed=args.seed,
            top_p=args.top_p, max_new_tokens=args.max_new_tokens, batch_size=args.sample_batch,
            progress=main_rank,
        )  # fmt: skip
        if main_rank:
            (offline.write_json if out.suffix == ".json" else write_lines)(out, answers)
            print(f"{out}: {len(answers)} answers")


def run_features(args, policy, pairs_a, pairs_b, rows, main_rank):
    """The table of features that tell A from B, and the weights file."""
    mean_a, largest_a = feature_statistics(policy, pairs_a, progress=main_rank, **rows)
    mean_b, _ = feature_statistics(policy, pairs_b, progress=main_rank, **rows)
    columns, options = (mean_a, largest_a, mean_b), {"n": args.features, "seed": args.seed}
    found = choose_features(*columns, criterion=args.criterion, **options)
    papers = choose_features(*columns, criterion="token", **options)
    if not main_rank:
        return
    print(f"{'feature':>8}{'mean in A':>12}{'mean in B':>12}{'largest in A':>14}   *: criterion token")
    table = []
    for i in found:
        a, b, largest = mean_a[i].item(), mean_b[i].item(), largest_a[i].item()
        table.append({"feature": i, "mean_a": a, "mean_b": b, "largest_a": largest, "token": i in papers})
        print(f"{i:>8}{a:>12.4f}{b:>12.4f}{largest:>14.4f}   {'*' if i in papers else ''}")
    if args.json:
        offline.write_json(args.json, {"criterion": args.criterion, "features": table})
    if args.weights:
        weights = {str(i): args.weight_inside for i in found}
        offline.write_json(args.weights, {"default": args.weight_outside, "features": weights})
        print(f"{args.weights}: {len(found)} of {args.weight_inside:g}, else {args.weight_outside:g}")


def run_scores(args, tokenizer, policy, pairs, train, rows, main_rank):
    """All scores of one model, printed and written."""
    options = {"k": args.k, "beta": args.beta, "bootstrap": args.bootstrap, "progress": main_rank, **rows}
    scores = evaluate(
        policy, tokenizer, pairs, top=args.features_top, prompts=args.prompts, samples=args.samples,
        top_p=args.top_p, max_new_tokens=args.max_new_tokens, batch_size=args.sample_batch, seed=args.seed,
        **options,
    )  # fmt: skip
    if train is not None:
        scores["train"] = evaluate(policy, tokenizer, train, seed=args.seed, **options)
    if not main_rank:
        return
    for title, part in (("", scores), ("train ", scores.get("train", {}))):
        for name in (name for name, value in part.items() if isinstance(value, float)):
            ends = part.get("intervals", {}).get(name)
            interval = f"   [{ends[0]:.4f}, {ends[1]:.4f}]" if ends else ""
            print(f"{title + name:<32}{part[name]:>10.4f}{interval}")
    if args.samples > 1 and "self_bleu" not in scores:
        print("self_bleu is left out: pip install sacrebleu")
    if args.json:
        offline.write_json(args.json, scores | {"made_by": presets.made_by()})


def main(argv=None):
    """Score one model, with --reference against it too; or find features; or answer a benchmark."""
    with presets.one_line_errors():
        args = parse_args(argv)
    device = presets.start_processes()
    main_rank = fpo.ranks()[0] == 0
    presets.make_toy_world(args)
    with presets.one_line_errors():
        questions = read_questions(args.export, args.questions, args.prompts) if args.export else None
        size = presets.vocabulary_size(args.model, args.reference or args.model)
        tokenizer = presets.load_tokenizer(args.model)
        limits = {"max_length": args.max_length, "max_prompt_length": args.max_prompt_length}
        limits |= {"sft": bool(args.find_features), "progress": main_rank}
        sources = [] if questions else args.find_features or [args.dataset, args.train_pairs]
        sets = [source and load_pairs(source, tokenizer, **limits) for source in sources]
        for source, pairs in zip(sources, sets, strict=True):
            if source:
                presets.check_tokens(source, pairs, size)
        compare = args.reference and not (questions or args.find_features)
        with_saes = compare or (args.features_top and not questions) or args.find_features
        saes, sites = presets.load_saes(args, device) if with_saes else ([], [])
        dtype = presets.DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
        policy = fpo.Policy(presets.load_lm(args.model, device, dtype=dtype), saes, sites)
        if compare:
            policy.hold_reference(presets.load_lm(args.reference, device, dtype=dtype))
    if questions:
        run_export(args, tokenizer, policy.lm, questions, main_rank)
    else:
        rows = {"max_tokens": args.micro_batch_tokens, **presets.rows_of(args, tokenizer, sets[0], device)}
        if args.find_features:
            run_features(args, policy, *sets, rows, main_rank)
        else:
            run_scores(args, tokenizer, policy, *sets, rows, main_rank)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
