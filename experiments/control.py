"""Variants of FPO: Table 4's control by features, and what the review asked for; measures of a trained model.

    python -m experiments.control        Table 4 on the toy: what is sampled where a style's features are held
    python -m experiments.control --responses A.jsonl B.jsonl --criterion token --preset gemma-2-2b …
    python -m experiments.control --task no_length_norm --preset toy --out OUT    sums of log π, as in DPO
    python -m experiments.control --task no_sae --preset toy --alpha 0.2 --out OUT    D of the states
    python -m experiments.control --task polite --preset toy --alpha 10 --out OUT    a style's features alone
    python -m experiments.control --task measure --preset toy --model OUT/model --reference SFT --json FILE

All other flags are train.py's. The second trains with weight 1 on the features that tell A's responses from
B's ({"prompt": …, "response": …} lines), and 0 on all others. Table 4: --lr 2e-5 --batch_size 64 --schedule
cosine --warmup_ratio 0.1, and --alpha 0 for a weight of 0 on all. Its data, whose own scorers judge the
responses: google/IFEval; DAMO-NLP-MT/multialpaca, allenai/WildChat, apple/mkqa; JailbreakBench/JBB-Behaviors,
AdvBench (llm-attacks); zeroshot/twitter-financial-news-sentiment. The held-out `mse_*` that a run of no_sae
prints is Eq. 10 on the states.
"""

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import fpo
import loading
import losses
import runtime
import toy
import train
from batches import collate, stream
from eval_diversity import sample_responses
from experiments import reproduce
from sae import SiteHook, decoder_layers, sae_figures
from scale import pooled_features
from settings import parse_args as parse_run_args

PAIRS, PAIRS_AT_ONCE = 500, 8  # held-out pairs that are measured; their logits are made whole, (R, L, V)


# ---------------------------------------------------------------------------- losses
def loss_without_length_norm(method, policy, reference, **settings):
    """FPO with log π(y|x) in place of log π(y|x) / |y|; takes and returns what fpo.method_loss does."""
    policy = policy._replace(lengths=torch.ones_like(policy.lengths))
    return fpo.method_loss(method, policy, reference, **settings)


def loss_of_states(method, policy, reference, *, beta, alpha, gamma, k, stop_gradient, units=()):
    """FPO (Eq. 11) with D = mean over d of (h̄_θ − h̄_ref)², h̄ the SAE's input averaged over a response.

    There is no top k: a state has no zeros, and its entries have signs. Statistics.features holds h̄ (2B, d),
    which `state_encoder` leaves there. Takes and returns what fpo.method_loss does.
    """
    D = (policy.features[0] - reference.features[0].detach()).square().mean(-1)  # (2B,)
    D = D / units[0] if units else D
    parts = (policy.logps, reference.logps, policy.lengths, D)
    (w, l), (ref_w, ref_l), (n_w, n_l), (D_w, D_l) = (part.chunk(2) for part in parts)
    options = {"beta": beta, "alpha": alpha, "stop_gradient": stop_gradient}
    loss = losses.fpo_loss(w, l, ref_w, ref_l, n_w, n_l, D_w, D_l, **options)
    reward_w, reward_l = fpo.rewards("fpo", policy, reference, beta=beta).chunk(2)
    values = {"mse_chosen": D_w, "mse_rejected": D_l, "constraint": alpha * beta * (D_l - D_w)}
    return loss, values | {"reward_chosen": reward_w, "reward_rejected": reward_l}


def weighted_loss(features, method, policy, reference, *, units=(), **settings):
    """fpo.method_loss with weight 1 on these features in D_FPO, and 0 on all others.

    A feature of weight 0 is set to 0 in policy and reference, and so is in no top k (Eq. 10).
    """
    weights = torch.zeros_like(policy.features[0][0])  # (m,)
    weights[features] = 1.0
    policy, reference = (s._replace(features=(s.features[0] * weights,)) for s in (policy, reference))
    return fpo.method_loss(method, policy, reference, units=units[:1], **settings)


def state_encoder(config):
    """An encoder that gives the state itself: identity, no bias, and a threshold that everything exceeds."""
    device, d = runtime.start_processes(), loading.load_config(config.model).get_text_config().hidden_size
    b_enc, threshold = torch.zeros(d, device=device), torch.full((d,), -torch.inf, device=device)
    one = torch.eye(d, device=device)
    return SimpleNamespace(d=d, m=d, k=None, W_enc=one, b_enc=b_enc, threshold=threshold)


# ---------------------------------------------------------------------------- a trained model
def read(lm, batch, layer: int, sae=None):
    """log π of each response token (N,), nats, and the layer's states (N, d) where they are predicted.

    sae: its reconstruction takes the place of the layer's output, but for BOS, which no SAE knows.
    """

    def splice(module, args, output):
        """A forward hook."""
        h, *rest = output if isinstance(output, tuple) else (output,)  # h (R, L, d)
        rebuilt = h if sae is None else sae.decode(sae.encode(h)).to(h.dtype)
        rebuilt = torch.where((batch.positions == 0)[..., None], h, rebuilt)
        return (rebuilt, *rest) if isinstance(output, tuple) else rebuilt

    mask = fpo.attention_mask(batch, lm.config.get_text_config(), lm.dtype)
    rows = {"input_ids": batch.tokens, "position_ids": batch.positions, "attention_mask": mask}
    with decoder_layers(lm)[layer].register_forward_hook(splice), SiteHook(lm, layer) as hook:
        logits = lm(**rows, use_cache=False).logits.flatten(0, 1)[batch.state]  # (N, V)
    logps = logits.float().log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
    return logps, hook.value.flatten(0, 1)[batch.state]


@torch.no_grad()
def measure(config) -> dict:
    """What training did to the SAE's fit, to single tokens and to features, on the first held-out pairs.

    Returns, of the chosen responses' tokens, l0, fvu (sae.sae_figures) and cross_entropy (nats), also with
    the reconstruction in the states' place; the ends of a token's log π_θ − log π_ref, nats; feature_change:
    (m,) mean |c̄_θ − c̄_ref| over all responses.
    """
    device = runtime.start_processes()
    (sae, *_), ((layer, site), *_) = loading.load_saes(config, device)
    if site != "res":
        raise runtime.UserError(f"--sae_site {site}: the reconstruction is spliced in at `res` alone")
    sae.to(device)  # the decoder too
    tokenizer = data.load_tokenizer(config.model)
    pairs = loading.load_data("eval_dataset", config, tokenizer)
    rows = loading.choose_layout(config, pairs, device)
    names, dtype = (config.model, config.reference), loading.torch_dtype(config, device)
    lm, ref_lm = (loading.load_lm(name, device, dtype=dtype).eval() for name in names)

    columns: dict[str, list[torch.Tensor]] = {}
    for start in range(0, min(PAIRS, len(pairs)), PAIRS_AT_ONCE):
        batch = collate(pairs, range(start, min(start + PAIRS_AT_ONCE, len(pairs))), **rows).to(device)
        (logps, h), (ref_logps, ref_h) = read(lm, batch, layer), read(ref_lm, batch, layer)
        spliced, _ = read(lm, batch, layer, sae)
        chosen = batch.owner < len(batch.lengths) // 2  # (N,): the batch's first half of responses
        pooled, ref_pooled = (pooled_features(s, sae, batch.owner, batch.lengths) for s in (h, ref_h))
        here = {"cross_entropy": -logps[chosen], "cross_entropy_spliced": -spliced[chosen]}
        here |= {"chosen": (logps - ref_logps)[chosen], "rejected": (logps - ref_logps)[~chosen]}
        here |= {"states": h[chosen], "change": (pooled - ref_pooled).abs()}  # (n, d), (2B, m)
        for name, values in here.items():
            columns.setdefault(name, []).append(values)
    whole = {name: torch.cat(values) for name, values in columns.items()}
    found = sae_figures(sae, whole["states"])
    found |= {name: whole[name].mean().item() for name in ("cross_entropy", "cross_entropy_spliced")}
    for side in ("chosen", "rejected"):
        found |= {f"{side}_largest": whole[side].max().item(), f"{side}_smallest": whole[side].min().item()}
    return found | {"feature_change": whole["change"].mean(0).tolist()}


# ---------------------------------------------------------------------------- Table 4: features
@torch.no_grad()
def feature_statistics(config, sides) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(mean (m,), largest (m,)) of the starting model's features over the chosen responses of each set.

    The mean is over responses, of the first SAE's pooled c̄ (Eq. 10); the largest is at a single token.
    sides: data.Pairs each.
    """
    device, found = runtime.start_processes(), []
    lm = loading.load_lm(config.model, device, dtype=loading.torch_dtype(config, device))
    policy = fpo.Policy(lm, *loading.load_saes(config, device)).eval()
    sae, rows = policy.saes[0], loading.choose_layout(config, sides[0], device)
    for pairs in sides:
        total = largest = torch.zeros(sae.m, device=device)
        groups = [range(start, min(start + 16, len(pairs))) for start in range(0, len(pairs), 16)]
        for batch, _ in stream(pairs, groups, device=device, **rows):
            h = policy.read_sites(batch)[0]  # (N, d), what the SAE reads
            c = pooled_features(h, sae, batch.owner, batch.lengths)  # (2B, m); no rejected ones: 0
            total, largest = total + c.double().sum(0), torch.maximum(largest, sae.encode(h).amax(0))
        found.append(((total / len(pairs)).cpu(), largest.cpu()))
    return found


def choose_features(inside, outside, criterion: str, *, n=50, seed=0) -> list[int]:
    """At most `n` features that tell responses A from responses B, the clearest first.

    inside, outside: (mean (m,), largest (m,)) over A and over B, as `feature_statistics` gives them.
    criterion: "difference": the largest difference of the means, above 0 (ours). "token": the n largest at a
        single token of A, less those whose mean is no higher over A (the paper's, as we read it). "random":
        drawn by `seed` from the features active in A or B (what a choice is compared with).
    """
    (mean, largest), (mean_b, _) = inside, outside
    if criterion == "random":
        active = (mean + mean_b).nonzero()[:, 0]
        return active[torch.randperm(len(active), generator=torch.Generator().manual_seed(seed))][:n].tolist()
    difference = mean - mean_b
    ranking = (difference if criterion == "difference" else largest).argsort(descending=True)[:n]
    return ranking[difference[ranking] > 0].tolist()


# ---------------------------------------------------------------------------- the toy world
def style_sides(config, style: str) -> list[data.Pairs]:
    """The training pairs' responses of a style, and all others, each as the chosen one of a pair."""
    pairs, sides = data.load_pairs(config.dataset, data.load_tokenizer(config.model)), ([], [])
    records = map(json.loads, Path(config.dataset).read_text().splitlines())
    for (prompt, *responses), record in zip(pairs, records, strict=True):
        for name, response in zip(("chosen_style", "rejected_style"), responses, strict=True):
            sides[0 if record[name] == style else 1].append((prompt.tolist(), response.tolist(), []))
    return [data.Pairs(side) for side in sides]


@torch.no_grad()
def style_shares(config) -> dict:
    """The share of each style among 5 responses a held-out prompt, told by how they open."""
    tokenizer, lm = data.load_tokenizer(config.model), loading.load_lm(config.model, "cpu")
    pairs = loading.load_data("eval_dataset", config, tokenizer)
    prompts = dict.fromkeys(tuple(pairs.sampling_prompt(i).tolist()) for i in range(len(pairs)))
    prompts = [list(prompt) for prompt in prompts]
    drawn = sample_responses(lm, tokenizer, prompts, samples=5, seed=config.seed)
    texts = tokenizer.batch_decode([y for many in drawn for y in many], skip_special_tokens=True)
    styles = [toy.style_of(text) for text in texts]
    return {f"share_{style}": styles.count(style) / len(styles) for style in toy.STYLES}


def parse_args(argv=None):
    """(our flags, the words that are train.py's, or reproduce.py's)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = runtime.refuse
    flag, variants = parser.add_argument, ("no_length_norm", "no_sae", "random", *toy.STYLES)
    flag(
        "--task", choices=(*variants, "measure", "styles"), help="what to train or to measure; none: Table 4"
    )
    flag("--responses", nargs=2, help="files of responses with the feature, and without; none: on the toy")
    flag("--criterion", default="difference", choices=("difference", "token"), help="token: the paper's")
    flag("--json", help="file that `measure` and `styles` write")
    return parser.parse_known_args(argv)


def main(argv=None):
    """The toy's table; or one training of a variant; or measures of a model."""
    args, other_flags = parse_args(argv)
    if not args.task and not args.responses:
        if args.criterion != "difference":
            runtime.refuse(f"--criterion {args.criterion}: it needs --responses or a style as --task")
        return reproduce.main(["control", *other_flags])
    config = parse_run_args(other_flags)
    if args.task in ("measure", "styles") and not args.json:
        raise runtime.UserError(f"--task {args.task}: --json is needed, the file to write")
    runtime.start_processes()
    loading.make_toy_world(config)
    if args.task == "no_length_norm":
        return train.main(config, loss_function=loss_without_length_norm)
    if args.task == "no_sae":
        return train.main(config, loss_function=loss_of_states, encoders=[state_encoder(config)])
    if args.task in ("measure", "styles"):
        return runtime.write_json(
            args.json, measure(config) if args.task == "measure" else style_shares(config)
        )
    if args.responses:  # without a rejected one they are read as SFT's are
        tokenizer = data.load_tokenizer(config.model)
        configs = [dataclasses.replace(config, method="sft", dataset=source) for source in args.responses]
        sides = [loading.load_data("dataset", one, tokenizer) for one in configs]
    else:
        sides = style_sides(config, "polite" if args.task == "random" else args.task)
    criterion = "random" if args.task == "random" else args.criterion
    features = choose_features(*feature_statistics(config, sides), criterion, seed=config.seed)
    if runtime.ranks()[0] == 0:
        print(f"weight 1 on features {features}, 0 on all others")
    train.main(config, loss_function=partial(weighted_loss, features))


if __name__ == "__main__":
    runtime.run_script(main)
