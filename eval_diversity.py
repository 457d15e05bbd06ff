"""Accuracy, diversity and distance from the reference of a trained model.

    python eval_diversity.py --preset toy --model runs/toy/fpo/model --reference runs/toy/model --json scores.json

Pairs:    `evaluate_pairs`, each value per pair; a reference gives rewards, sequential KL and D_FPO as well.
Samples:  `sample_responses`, then `response_entropy`: the entropy of the distribution the model itself gives
          (temperature 1, before any nucleus cut) at each token of responses sampled with nucleus p.
Both give the same values for any number of ranks and any batch size.
"""

import argparse
import sys

import torch
import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

import fpo
import presets
from data import Pairs, load_pairs, micro_batches


# ---------------------------------------------------------------------------- preference pairs
@torch.no_grad()
def evaluate_pairs(policy, pairs, *, cache=None, k=50, max_tokens=0, max_pairs=0, progress=False, **rows):
    """What a policy makes of every pair, in the data set's order, the same on every rank.

    The reference is the one that the policy holds, else the cache's, else there is none.

    Args:
        policy: fpo.Policy.
        cache: fpo.ReferenceCache of these pairs.
        k: of D_FPO, Eq. 10.
        max_tokens, max_pairs, rows: micro-batches, as data.micro_batches and data.collate take them.
    Returns:
        {name: (n,) float64}. Always: logps and lengths of chosen and rejected. With a reference: ratio_chosen,
        ratio_rejected = log π/π_ref, and mse_chosen, mse_rejected where there are SAEs. With a held one also
        kl_chosen, kl_rejected.
    """
    rank, world = fpo.ranks()
    device = policy.lm.device
    groups = micro_batches(range(len(pairs)), pairs.row_lengths(rows["layout"]), world, max_pairs=max_pairs or 16,
                           max_tokens=max_tokens)[rank::world]  # fmt: skip
    was_training, table = policy.training, {}
    policy.eval()
    batches = fpo.stream(pairs, groups, device=device, cache=cache, **rows)
    for batch, cached in tqdm(
        batches, "evaluating", len(groups), disable=not progress or rank > 0, leave=False
    ):
        policy_says, reference = policy(batch)
        reference = reference or cached
        values = {"logps": policy_says.logps, "lengths": policy_says.lengths}
        if reference is not None:
            values["ratio"] = policy_says.logps - reference.logps
            if policy_says.features and reference.features:
                values["mse"] = fpo.layer_mse(policy_says.features, reference.features, k=k)
        if policy_says.kl is not None:
            values["kl"] = policy_says.kl
        for name, value in values.items():
            for side, half in zip(("chosen", "rejected"), value.chunk(2), strict=True):
                column = table.setdefault(
                    f"{name}_{side}", torch.zeros(len(pairs), dtype=torch.float64, device=device)
                )
                # A pair is counted by one rank; padding pairs add nothing.
                column[batch.index] += half * batch.weight
    policy.train(was_training)
    if dist.is_initialized():
        for name in sorted(table):
            dist.all_reduce(table[name])
    return {name: column.cpu() for name, column in table.items()}


def pair_scores(table) -> dict[str, float]:
    """Means over pairs of `evaluate_pairs`' table, by the names of the JSON.

    accuracy: share of pairs whose chosen response has the higher mean log-probability (Table 2); accuracy_sum: the
    higher sum. reward_accuracy: share whose log π/π_ref is higher for the chosen (DPO's implicit reward);
    reward_accuracy_mean: per token (FPO's). nll_chosen: mean over pairs of the chosen response's NLL per token.
    """
    mean = {s: table[f"logps_{s}"] / table[f"lengths_{s}"].clamp(min=1) for s in ("chosen", "rejected")}
    scores, hits = {"nll_chosen": -mean["chosen"].mean().item()}, {}
    if table["lengths_rejected"].any():
        hits["accuracy"] = mean["chosen"] > mean["rejected"]
        hits["accuracy_sum"] = table["logps_chosen"] > table["logps_rejected"]
    if hits and "ratio_chosen" in table:
        ratio = {s: table[f"ratio_{s}"] / table[f"lengths_{s}"].clamp(min=1) for s in mean}
        hits["reward_accuracy"] = table["ratio_chosen"] > table["ratio_rejected"]
        hits["reward_accuracy_mean"] = ratio["chosen"] > ratio["rejected"]
    scores |= {name: hit.double().mean().item() for name, hit in hits.items()}
    for name in ("kl_chosen", "kl_rejected", "mse_chosen", "mse_rejected"):
        if name in table:
            scores[name] = table[name].mean().item()
    return scores


# ---------------------------------------------------------------------------- sampled responses
class _RowNoise(LogitsProcessor):
    """Gumbel noise from a generator of each row's own: the largest noisy logit is an exact sample (greedy decoding
    then draws it), and a row's draws don't depend on what else is in the batch."""

    def __init__(self, seeds, device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids, scores):
        noise = torch.stack(
            [torch.rand(scores.shape[1], generator=g, device=scores.device) for g in self.generators]
        )
        return scores.float() - (-noise.clamp(min=1e-30).log()).log()


class _Nucleus(LogitsProcessor):
    """Temperature, then the smallest set of tokens whose probability reaches p (Holtzman et al. 2020)."""

    def __init__(self, temperature, top_p):
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids, scores):
        scores = scores.float() / self.temperature
        if self.top_p >= 1:
            return scores
        order = scores.sort(descending=True)
        before = order.values.softmax(-1).cumsum(-1) - order.values.softmax(-1)
        cut = (before >= self.top_p).scatter(1, order.indices, before >= self.top_p)
        return scores.masked_fill(cut, -torch.inf)


@torch.no_grad()
def sample_responses(
    lm,
    tokenizer,
    prompts,
    *,
    samples=1,
    max_new_tokens=256,
    top_p=0.95,
    temperature=1.0,
    seed=0,
    batch_size=64,
    progress=False,
):
    """Responses sampled by Hugging Face's generate, seeded by prompt and sample, split over the ranks.

    Args:
        prompts: lists of token ids, BOS and the turn's opening included.
    Returns:
        For each prompt, `samples` lists of token ids; the token that ends the turn is included where it came.
    """
    rank, world = fpo.ranks()
    device = lm.device
    jobs = [(p, s) for p in range(len(prompts)) for s in range(samples)]
    mine = sorted(jobs[rank::world], key=lambda job: (len(prompts[job[0]]), job))  # little padding
    stops = lm.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    was_training, attention = lm.training, lm.config._attn_implementation
    lm.eval()
    lm.set_attn_implementation("eager")  # flex_attention would compile anew for every length
    done = []
    for start in tqdm(
        range(0, len(mine), batch_size), "sampling", disable=not progress or rank > 0, leave=False
    ):
        part = mine[start : start + batch_size]
        width = max(len(prompts[p]) for p, _ in part)
        ids = torch.tensor([[pad] * (width - len(prompts[p])) + list(prompts[p]) for p, _ in part])
        mask = torch.tensor([[0] * (width - len(prompts[p])) + [1] * len(prompts[p]) for p, _ in part])
        noise = _RowNoise([hash((seed, p, s)) % 2**62 for p, s in part], device)
        out = lm.generate(
            ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens, do_sample=False,
            logits_processor=LogitsProcessorList([_Nucleus(temperature, top_p), noise]), pad_token_id=pad,
        )  # fmt: skip
        for job, row in zip(part, out[:, width:].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            done.append((job, row[:end]))
    lm.set_attn_implementation(attention)
    lm.train(was_training)
    if dist.is_initialized():
        parts = [None] * world
        dist.all_gather_object(parts, done)
        done = [item for part in parts for item in part]
    by_job = dict(done)
    return [[by_job[p, s] for s in range(samples)] for p in range(len(prompts))]


@torch.no_grad()
def response_entropy(policy, pairs: Pairs, *, max_tokens=0, max_pairs=0, **rows) -> torch.Tensor:
    """(n, 3) float64 per response: Σ_t H(π(·|x, y_<t)) in nats, at temperature 1 over the whole vocabulary; log π(y|x);
    and the number of tokens."""
    rank, world = fpo.ranks()
    device = policy.lm.device
    groups = micro_batches(range(len(pairs)), pairs.row_lengths(rows["layout"]), world, max_pairs=max_pairs or 32,
                           max_tokens=max_tokens)[rank::world]  # fmt: skip
    table = torch.zeros(len(pairs), 3, dtype=torch.float64, device=device)
    was_training = policy.training
    policy.eval()
    for batch, _ in fpo.stream(pairs, groups, device=device, **rows):
        says, _ = policy(batch, entropy=True)
        B = len(batch.index)
        table[batch.index] += (
            torch.stack([says.entropy[:B], says.logps[:B], says.lengths[:B]], 1) * batch.weight[:, None]
        )
    policy.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(table)
    return table.cpu()


def unique_prompts(pairs: Pairs, most: int) -> list[list[int]]:
    """The first `most` distinct prompts of a data set, as token ids."""
    prompts = dict.fromkeys(tuple(pairs[i][0].tolist()) for i in range(len(pairs)))
    return [list(prompt) for prompt in prompts][:most]


def evaluate(
    policy, tokenizer, pairs, *, cache=None, k=50, prompts=100, samples=0, max_new_tokens=256, top_p=0.95, seed=0,
    progress=False, **rows,
):  # fmt: skip
    """`pair_scores`, and with samples > 0 the mean token entropy of sampled responses, under the JSON's keys."""
    scores = pair_scores(evaluate_pairs(policy, pairs, cache=cache, k=k, progress=progress, **rows))
    if samples:
        chosen = unique_prompts(pairs, prompts)
        responses = sample_responses(
            policy.lm, tokenizer, chosen, samples=samples, max_new_tokens=max_new_tokens, top_p=top_p, seed=seed,
            progress=progress,
        )  # fmt: skip
        drawn = Pairs([(p, r, []) for p, many in zip(chosen, responses, strict=True) for r in many])
        total = response_entropy(policy, drawn, **rows).sum(0)
        scores["entropy"] = (total[0] / total[2]).item()
    return scores


# ---------------------------------------------------------------------------- the script
def parse_args(argv=None):
    """Flags over the preset's values."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    presets.shared_flags(parser)
    score = parser.add_argument_group("scores")
    score.add_argument("--prompts", type=int, default=100, help="distinct prompts to sample from (100)")
    score.add_argument(
        "--samples", type=int, default=25, help="responses a prompt for the entropy; 0: none (25)"
    )
    score.add_argument("--max_new_tokens", type=int, help="longest sampled response")
    score.add_argument("--top_p", type=float, default=0.95, help="nucleus of the sampling (0.95)")
    score.add_argument("--seed", type=int, default=0, help="of the sampling")
    score.add_argument("--json", help="write the scores here")
    args = parser.parse_args(argv)
    for name, value in presets.PRESETS[args.preset].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.dataset = parser.parse_args(argv).dataset or presets.PRESETS[args.preset]["eval_dataset"]
    args.model = args.model or presets.default_model(args.preset, "fpo")[0]
    args.max_new_tokens = args.max_new_tokens or args.eval_tokens
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top_p {args.top_p}: must be above 0 and at most 1")
    for name in ("samples", "prompts", "k"):
        if getattr(args, name) < (name != "samples"):
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least {int(name != 'samples')}")
    return args


def main(argv=None):
    """Score one model; with --reference also against it."""
    with presets.one_line_errors():
        args = parse_args(argv)
    device = presets.start_processes()
    main_rank = fpo.ranks()[0] == 0
    presets.make_toy_world(args)
    with presets.one_line_errors():
        tokenizer = presets.load_tokenizer(args.model)
        limits = {"max_length": args.max_length, "max_prompt_length": args.max_prompt_length}
        pairs = load_pairs(args.dataset, tokenizer, progress=main_rank, **limits)
        saes, sites = presets.load_saes(args, device) if args.reference else ([], [])
        policy = fpo.Policy(presets.load_lm(args.model, device), saes, sites)
        if args.reference:
            policy.hold_reference(presets.load_lm(args.reference, device))
    scores = evaluate(
        policy, tokenizer, pairs, k=args.k, prompts=args.prompts, samples=args.samples, top_p=args.top_p,
        max_new_tokens=args.max_new_tokens, seed=args.seed, progress=main_rank,
        max_tokens=args.micro_batch_tokens, **presets.rows_of(args, tokenizer, pairs, device),
    )  # fmt: skip
    if main_rank:
        for name, value in scores.items():
            print(f"{name:<24}{value:.4f}")
        if args.json:
            fpo.write_json(args.json, scores)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
