"""Variants of FPO: Table 4's control by features, and what the review asked for; measures of a trained model.

    python -m experiments.control --task polite --preset toy --alpha 10 --out OUT    a style's features alone
    python -m experiments.control --responses A.jsonl B.jsonl --criterion token --preset gemma-2-2b …
    python -m experiments.control --task no_length_norm --preset toy --out OUT    sums of log π, as in DPO
    python -m experiments.control --task no_sae --preset toy --alpha 0.2 --out OUT    D of the states
    python -m experiments.control --task measure --preset toy --model OUT/model --reference SFT --json FILE

All other flags are train.py's. `python -m experiments.reproduce control` makes Table 4 of the toy. The second
command trains with weight 1 on the features that tell A's responses from B's, and 0 on all others (its files
are lines of {"prompt": …, "response": …}). Table 4: --lr 2e-5 --batch_size 64 --schedule cosine
--warmup_ratio 0.1, and --alpha 0 for a weight of 0 on all. Its data, whose own scorers judge the responses:
google/IFEval; DAMO-NLP-MT/multialpaca, allenai/WildChat, apple/mkqa; JailbreakBench/JBB-Behaviors, AdvBench
(llm-attacks); zeroshot/twitter-financial-news-sentiment. The held-out `mse_*` that a run of no_sae prints is
Eq. 10 on the states.
"""

import argparse
import dataclasses
from functools import partial
from types import SimpleNamespace

import torch

import data
import fpo
import loading
import losses
import runtime
import settings
import toy
import train
from batches import collate, stream
from eval_diversity import SHARED, sample_responses
from runtime import refuse
from sae import SiteHook, decoder_layers, sae_figures
from scale import pooled_features

PAIRS, PAIRS_AT_ONCE = 500, 8  # held-out pairs that are measured; their logits are made whole, (R, L, V)
MEASURES = ("measure", "styles")
TASKS = ("no_length_norm", "no_sae", "random", *toy.STYLES, *MEASURES)


# ---------------------------------------------------------------------------- losses
def loss_without_length_norm(method, policy, reference, **settings):
    """FPO with log π(y|x) in place of log π(y|x) / |y|; takes and returns what fpo.method_loss does."""
    policy = policy._replace(lengths=torch.ones_like(policy.lengths))
    return fpo.method_loss(method, policy, reference, **settings)


def loss_of_states(method, policy, reference, *, beta, alpha, gamma, k, stop_gradient, units=()):
    """FPO (Eq. 11) with D = mean over d of (h̄_θ − h̄_ref)², h̄ the SAE's input averaged over a response.

    Of several layers the mean. There is no top k: a state has no zeros, and its entries have signs.
    Statistics.features holds h̄ (2B, d) of each layer, which `state_encoder` leaves there. Takes and returns
    what fpo.method_loss does.
    """
    moved = zip(policy.features, reference.features, units or [1.0] * len(policy.features), strict=True)
    D = torch.stack([(h - ref.detach()).square().mean(-1) / unit for h, ref, unit in moved]).mean(0)  # (2B,)
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
def load_policies(config, names, pairs=None):
    """What measures models: a Policy of each name with the config's SAEs, pairs, and how rows are laid out.

    pairs: data.Pairs; none: the held-out ones.
    """
    device, tokenizer = runtime.start_processes(), data.load_tokenizer(config.model)
    saes, sites = loading.load_saes(config, device)
    pairs = loading.load_data("eval_dataset", config, tokenizer) if pairs is None else pairs
    saes, dtype = [sae.to(device) for sae in saes], loading.torch_dtype(config, device)  # the decoders too
    lms = [loading.load_lm(name, device, dtype=dtype) for name in names]
    policies = [fpo.Policy(lm, saes, sites).eval() for lm in lms]
    return policies, pairs, loading.choose_layout(config, pairs, device)


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
    # The splice is registered first, so SiteHook reads the rebuilt states.
    with decoder_layers(lm)[layer].register_forward_hook(splice), SiteHook(lm, layer) as hook:
        logits = lm(**rows, use_cache=False).logits.flatten(0, 1)[batch.state]  # (N, V)
    logps = logits.float().log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
    return logps, hook.value.flatten(0, 1)[batch.state]


@torch.no_grad()
def measure(config) -> dict:
    """What training did to the SAE's fit, to single tokens and to features, on the first held-out pairs.

    Returns, of the chosen responses' tokens, l0, fvu (sae.sae_figures) and cross_entropy (nats), also with
    the reconstruction in the states' place; the ends of a token's log π_θ − log π_ref, nats; feature_change:
    (m,) mean |c̄_θ − c̄_ref| over all responses. Of several SAEs the first is measured.
    """
    (policy, reference), pairs, row_options = load_policies(config, (config.model, config.reference))
    lm, ref_lm, sae, (layer, _) = policy.lm, reference.lm, policy.saes[0], policy.sites[0]

    columns: dict[str, list[torch.Tensor]] = {}
    for start in range(0, min(PAIRS, len(pairs)), PAIRS_AT_ONCE):
        indices = range(start, min(start + PAIRS_AT_ONCE, len(pairs)))
        batch = collate(pairs, indices, **row_options).to(lm.device)
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
    (policy,), _, row_options = load_policies(config, [config.model], sides[0])
    sae, found = policy.saes[0], []
    for pairs in sides:
        total = largest = torch.zeros(sae.m, device=policy.lm.device)
        groups = [range(start, min(start + 16, len(pairs))) for start in range(0, len(pairs), 16)]
        for batch, _ in stream(pairs, groups, device=policy.lm.device, **row_options):
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
        # pooled features are at least 0: a sum of 0 is active in neither
        active = (mean + mean_b).nonzero()[:, 0]
        return active[torch.randperm(len(active), generator=torch.Generator().manual_seed(seed))][:n].tolist()
    difference = mean - mean_b
    ranking = (difference if criterion == "difference" else largest).argsort(descending=True)[:n]
    return ranking[difference[ranking] > 0].tolist()


# ---------------------------------------------------------------------------- the toy world
def style_sides(config, style: str) -> list[data.Pairs]:
    """The training pairs' responses of a style, and all others, each as the chosen one of a pair.

    A style is told by how a response opens, as that of samples is: so nothing asks the record, which may be
    one that was left out, and what follows it.
    """
    tokenizer, sides = data.load_tokenizer(config.model), ([], [])
    pairs = loading.load_data("dataset", config, tokenizer)
    for prompt, *responses in (pairs[i] for i in range(len(pairs))):
        for response in responses:
            text = tokenizer.decode(response, skip_special_tokens=True)
            sides[0 if toy.style_of(text) == style else 1].append((prompt.tolist(), response.tolist(), []))
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
    """(our flags, the settings that all others make: settings.Config)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error, flag = refuse, parser.add_argument
    flag("--task", choices=TASKS, help="what to train or to measure")
    flag("--responses", nargs=2, help="instead: files of responses with the feature, and without")
    flag("--criterion", choices=("difference", "token"), help="of features (difference); token: the paper's")
    flag("--json", help="file that `measure` and `styles` write")
    args, words = parser.parse_known_args(argv)
    if (args.task is None) == (args.responses is None):
        one = "--task or --responses is needed, and not both"
        refuse(f"{one}; `python -m experiments.reproduce control` makes Table 4")
    chooses = args.task is None or args.task in toy.STYLES  # features, by a criterion
    for name, used in {"criterion": chooses, "json": args.task in MEASURES}.items():
        if getattr(args, name) is not None and not used:
            refuse(f"--{name} {getattr(args, name)}: --task {args.task} has no use for it")
    if args.task in MEASURES and not args.json:
        refuse(f"--task {args.task}: --json is needed, the file to write")
    if args.json:
        runtime.check_output("json", args.json, folder=False)
    known = {"preset", "model", "reference", "dataset", "eval_dataset", "seed", *SHARED}
    for word in (word for word in words if args.task in MEASURES and word.startswith("--")):
        if word[2:].split("=")[0].replace("-", "_") not in known:
            refuse(f"{word}: --task {args.task} trains nothing, and has no use for it")
    config = settings.parse_args(words)
    check(args, config)
    return args, config


def check(args, config):
    """UserError for settings of train.py that a task can't follow: each would be dropped in silence."""
    task, of_style = f"--task {args.task}", args.task in ("random", *toy.STYLES)
    task = task if args.task else "--responses"
    if config.method != "fpo":
        refuse(f"--method {config.method}: {task} is of FPO alone")
    if of_style and config.preset != "toy":
        refuse(f"{task} --preset {config.preset}: it is a style of the toy's responses")
    if len(config.sae_layer) > 1 and (of_style or args.responses):
        refuse(f"--sae_layer {config.sae_layer}: {task} chooses features of one layer")
    if args.task == "measure" and config.sae_site != "res":
        refuse(f"--sae_site {config.sae_site}: the reconstruction is spliced in at `res` alone")


def choose_sides(args, config) -> list[data.Pairs]:
    """Responses with the feature, and without, each as the chosen one of a pair."""
    if not args.responses:
        return style_sides(config, "polite" if args.task == "random" else args.task)
    tokenizer = data.load_tokenizer(config.model)  # without a rejected response they are read as SFT's are
    configs = [dataclasses.replace(config, method="sft", dataset=source) for source in args.responses]
    return [loading.load_data("dataset", one, tokenizer) for one in configs]


def main(argv=None):
    """One training of a variant, or measures of a model."""
    args, config = parse_args(argv)
    runtime.start_processes()
    loading.make_toy_world(config)
    if args.task in MEASURES:
        found = measure(config) if args.task == "measure" else style_shares(config)
        return runtime.write_json(args.json, found)
    if args.task == "no_length_norm":
        return train.main(config, loss_function=loss_without_length_norm)
    if args.task == "no_sae":
        encoders = [state_encoder(config)] * max(1, len(config.sae_layer))
        return train.main(config, loss_function=loss_of_states, encoders=encoders)
    criterion = "random" if args.task == "random" else args.criterion or "difference"
    statistics = feature_statistics(config, choose_sides(args, config))
    features = choose_features(*statistics, criterion, seed=config.seed)
    if runtime.ranks()[0] == 0:
        print(f"weight 1 on features {features}, 0 on all others")
    train.main(config, loss_function=partial(weighted_loss, features))


if __name__ == "__main__":
    runtime.run_script(main)
