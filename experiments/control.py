"""Table 4, control by features: FPO with weight 1 on chosen features in D_FPO, and 0 on all others.

    python -m experiments.control        on the toy world: what is sampled where a style's features are held
    torchrun --nproc_per_node 4 -m experiments.control --criterion token --inside A.jsonl --outside B.jsonl \\
        -- --preset gemma-2-2b --dataset pairs.jsonl --eval_dataset held_out.jsonl --lr 2e-5 \\
        --batch_size 64 --schedule cosine --warmup_ratio 0.1

The second finds the features of A's responses as against B's ({"prompt": …, "response": …} lines) and trains
with them, with the paper's settings as train.py's flags (--alpha 0: a weight of 0 on all). The paper's data,
whose own scorers judge the responses: formats google/IFEval; languages DAMO-NLP-MT/multialpaca,
allenai/WildChat, apple/mkqa; safety JailbreakBench/JBB-Behaviors, AdvBench (llm-attacks); sentiment
zeroshot/twitter-financial-news-sentiment.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import torch

import data
import eval_diversity
import fpo
import losses
import toy
import train
from experiments.ablations import fpo_loss_with
from experiments.reproduce import publish, table
from scale import pooled_features

HELD, ALPHA = ("polite", "shout"), 10.0  # the toy's most and least liked style


# ---------------------------------------------------------------------------- features
@torch.no_grad()
def feature_statistics(policy, pairs, **rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean (m,), largest (m,)) of the first SAE's features over the chosen responses of some pairs.

    Returns:
        mean over responses of the pooled feature c̄ (Eq. 10), and the largest activation at a single token.
    """
    sae, total, largest = policy.saes[0], 0.0, 0.0
    for start in range(0, len(pairs), 16):
        batch = data.collate(pairs, range(start, min(start + 16, len(pairs))), **rows).to(policy.lm.device)
        states = policy.read_sites(batch)[0]  # (N, d), what the SAE reads
        pooled = pooled_features(states, sae, batch.owner, batch.lengths)  # (2B, m); no rejected ones: 0
        total = total + pooled.double().sum(0)
        largest = torch.clamp(sae.encode(states).amax(0), min=largest)
    return (total / len(pairs)).cpu(), largest.cpu()


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


def find_features(config, inside, outside, criterion: str) -> list[int]:
    """`choose_features` of the starting model's SAE on two sets of data.Pairs; each rank reads them all."""
    device, tokenizer = data.start_processes(), data.load_tokenizer(config.model)
    lm = train.load_lm(config.model, device, dtype=train.torch_dtype(config, device))
    policy = fpo.Policy(lm, *train.load_saes(config, device)).eval()
    rows = train.rows_of(config, tokenizer, inside, device)
    (mean_a, largest_a), (mean_b, _) = (
        feature_statistics(policy, side, **rows) for side in (inside, outside)
    )
    return choose_features(mean_a, largest_a, mean_b, criterion=criterion, seed=config.seed)


def weighted_loss(features: list[int]):
    """A loss function for train.main: FPO with weight 1 on these features in D_FPO, and 0 on all others."""

    def loss_function(method, policy, reference, *, beta, alpha, gamma, k, stop_gradient, units=()):
        c = policy.features[0]  # (2B, m)
        weights = c.new_zeros(c.shape[1])
        weights[features] = 1.0
        D = losses.feature_mse(c, reference.features[0], k=k, weights=weights)
        D = D / units[0] if units else D
        return fpo_loss_with(D, policy, reference, beta=beta, alpha=alpha, stop_gradient=stop_gradient)

    return loss_function


# ---------------------------------------------------------------------------- the toy world
def style_sides(config, style: str) -> tuple[data.Pairs, data.Pairs]:
    """The training pairs' responses of a style, and all others, each as the chosen one of a pair."""
    pairs, sides = data.load_pairs(config.dataset, data.load_tokenizer(config.model)), ([], [])
    records = map(json.loads, Path(config.dataset).read_text().splitlines())
    for (prompt, *responses), record in zip(pairs, records, strict=True):
        for name, response in zip(("chosen_style", "rejected_style"), responses, strict=True):
            sides[0 if record[name] == style else 1].append((prompt.tolist(), response.tolist(), []))
    return data.Pairs(sides[0]), data.Pairs(sides[1])


@torch.no_grad()
def scores_of(model: str, config) -> dict:
    """Held-out accuracy; of 5 responses a held-out prompt entropy, and the share that opens in each style."""
    tokenizer, lm = data.load_tokenizer(model), train.load_lm(model, "cpu")
    pairs = train.load_data("eval_dataset", config, tokenizer)
    rows = train.rows_of(config, tokenizer, pairs, lm.device)
    right, one = fpo.pair_columns(fpo.score_pairs(fpo.Policy(lm), pairs, **rows))["accuracy"]
    prompts = list(dict.fromkeys(tuple(pairs.sampling_prompt(i).tolist()) for i in range(len(pairs))))
    prompts = [list(prompt) for prompt in prompts]
    drawn = eval_diversity.sample_responses(lm, tokenizer, prompts, samples=5, seed=config.seed)
    H, _, tokens = eval_diversity.response_statistics(lm, prompts, drawn, **rows).unbind(-1)
    texts = tokenizer.batch_decode([y for many in drawn for y in many], skip_special_tokens=True)
    styles = [toy.style_of(text) for text in texts]
    scores = {"accuracy": (right.sum() / one.sum()).item(), "entropy": (H.sum() / tokens.sum()).item()}
    return scores | {f"share_{style}": styles.count(style) / len(styles) for style in toy.STYLES}


def toy_control(args):
    """Table 4 on the toy: D_FPO of a style's features alone, of as many by chance, of all, and of none."""
    toy.make_world(Path("runs/toy"))
    lines = [
        ("SFT", "sft"),
        ("no constraint", "none"),
        ("all features", "all"),
        ("random features", "random"),
    ]
    lines += [(f"{style} features", style) for style in HELD]
    rows, columns = [], ("accuracy", "entropy", *(f"share_{style}" for style in toy.STYLES))
    for seed, (_, name) in itertools.product(args.seeds, lines):
        flags = ["--preset", "toy", "--seed", str(seed), "--out", f"{args.out}/{name}_seed{seed}"]
        flags += ["--alpha", "0" if name == "none" else str(ALPHA), "--eval_every", "0", *args.train_flags]
        config, loss_function = train.parse_args(flags), fpo.method_loss
        if name in ("random", *HELD):
            criterion = "random" if name == "random" else args.criterion
            sides = style_sides(config, HELD[0] if name == "random" else name)
            loss_function = weighted_loss(find_features(config, *sides, criterion))
        if name != "sft":
            train.main(config, loss_function=loss_function)
        model = config.model if name == "sft" else f"{config.out}/model"
        rows.append({"name": name, "method": name, "seed": seed, "scores": scores_of(model, config)})
    lines, args.done = [(label, name, "", ()) for label, name in lines], len(rows)
    publish(args, rows, {"Table 4 on the toy world": table(rows, lines, columns)}, {})


def main(argv=None):
    """The toy's table; or one training on the features that tell two files of responses apart."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=style)
    flag = parser.add_argument
    flag("--inside", help="file of responses that have the feature; none: the toy's table")
    flag("--outside", help="file of responses that do not have it")
    flag("--criterion", default="difference", choices=("difference", "token"), help="token: the paper's")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the toy's table (0 1 2)")
    flag("--out", default="runs/toy/control", help="folder of the toy's runs (runs/toy/control)")
    flag("--assets", default="assets", help="folder of results.json and control.md (assets)")
    args = parser.parse_args(words[:cut])
    args.task, args.train_flags, args.began, args.done = "control", words[cut + 1 :], time.perf_counter(), 0
    if not args.inside:
        return toy_control(args)
    config = train.parse_args(args.train_flags)
    names = ("max_length", "max_prompt_length", "chat_format")
    limits, tokenizer = {name: getattr(config, name) for name in names}, data.load_tokenizer(config.model)
    sides = [data.load_pairs(source, tokenizer, sft=True, **limits) for source in (args.inside, args.outside)]
    features = find_features(config, *sides, args.criterion)
    if data.ranks()[0] == 0:
        print(f"weight 1 on features {features}, 0 on all others")
    train.main(config, loss_function=weighted_loss(features))


if __name__ == "__main__":
    data.run_script(main)
