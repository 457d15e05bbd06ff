"""Table 4, control by features: FPO with weight 1 on chosen features in D_FPO, and 0 on all others.

    python -m experiments.control        on the toy world: what is sampled where a style's features are held
    python -m experiments.control --responses A.jsonl B.jsonl --criterion token --preset gemma-2-2b …

The second finds the features of A's responses as against B's ({"prompt": …, "response": …} lines) and trains
with them; all other flags are train.py's. Table 4: --lr 2e-5 --batch_size 64 --schedule cosine --warmup_ratio
0.1, and --alpha 0 for a weight of 0 on all. Its data, whose own scorers judge the responses: google/IFEval;
DAMO-NLP-MT/multialpaca, allenai/WildChat, apple/mkqa; JailbreakBench/JBB-Behaviors, AdvBench (llm-attacks);
zeroshot/twitter-financial-news-sentiment.
"""

import argparse
import dataclasses
import itertools
import json
import time
from functools import partial
from pathlib import Path

import torch

import data
import eval_diversity
import fpo
import toy
import train
from experiments.reproduce import publish, table
from scale import pooled_features

HELD, ALPHA = ("polite", "shout"), 10.0  # the toy's most and least liked style


# ---------------------------------------------------------------------------- features
@torch.no_grad()
def feature_statistics(config, sides) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(mean (m,), largest (m,)) of the starting model's features over the chosen responses of each set.

    The mean is over responses, of the first SAE's pooled c̄ (Eq. 10); the largest is at a single token.
    sides: data.Pairs each.
    """
    device, tokenizer, found = data.start_processes(), data.load_tokenizer(config.model), []
    lm = train.load_lm(config.model, device, dtype=train.torch_dtype(config, device))
    policy = fpo.Policy(lm, *train.load_saes(config, device)).eval()
    sae, rows = policy.saes[0], train.rows_of(config, tokenizer, sides[0], device)
    for pairs in sides:
        total, largest = 0.0, 0.0
        for start in range(0, len(pairs), 16):
            batch = data.collate(pairs, range(start, min(start + 16, len(pairs))), **rows).to(device)
            h = policy.read_sites(batch)[0]  # (N, d), what the SAE reads
            c = pooled_features(h, sae, batch.owner, batch.lengths)  # (2B, m); no rejected ones: 0
            total = total + c.double().sum(0)
            largest = torch.clamp(sae.encode(h).amax(0), min=largest)
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


def weighted_loss(features, method, policy, reference, *, units=(), **settings):
    """fpo.method_loss with weight 1 on these features in D_FPO, and 0 on all others.

    A feature of weight 0 is set to 0 in policy and reference, and so is in no top k (Eq. 10).
    """
    weights = torch.zeros_like(policy.features[0][0])  # (m,)
    weights[features] = 1.0
    policy, reference = (s._replace(features=(s.features[0] * weights,)) for s in (policy, reference))
    return fpo.method_loss(method, policy, reference, units=units[:1], **settings)


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
def scores_of(model: str, config) -> dict:
    """Held-out accuracy; of 5 responses a held-out prompt entropy, and the share that opens in each style."""
    tokenizer, lm = data.load_tokenizer(model), train.load_lm(model, "cpu")
    pairs = train.load_data("eval_dataset", config, tokenizer)
    rows = train.rows_of(config, tokenizer, pairs, lm.device)
    right, one = fpo.pair_columns(fpo.score_pairs(fpo.Policy(lm), pairs, **rows))["accuracy"]
    prompts = dict.fromkeys(tuple(pairs.sampling_prompt(i).tolist()) for i in range(len(pairs)))
    prompts = [list(prompt) for prompt in prompts]
    drawn = eval_diversity.sample_responses(lm, tokenizer, prompts, samples=5, seed=config.seed)
    H, _, tokens = eval_diversity.response_statistics(lm, prompts, drawn, **rows).unbind(-1)
    texts = tokenizer.batch_decode([y for many in drawn for y in many], skip_special_tokens=True)
    styles = [toy.style_of(text) for text in texts]
    scores = {"accuracy": (right.sum() / one.sum()).item(), "entropy": (H.sum() / tokens.sum()).item()}
    return scores | {f"share_{style}": styles.count(style) / len(styles) for style in toy.STYLES}


def toy_control(args, train_flags):
    """Table 4 on the toy: D_FPO of a style's features alone, of as many by chance, of all, and of none."""
    args.task, args.began = "control", time.perf_counter()
    toy.make_world("runs/toy")
    labels = {"sft": "SFT", "none": "no constraint", "all": "all features", "random": "random features"}
    labels |= {style: f"{style} features" for style in HELD}
    rows, columns = [], ("accuracy", "entropy", *(f"share_{style}" for style in toy.STYLES))
    for seed, name in itertools.product(args.seeds, labels):
        flags = ["--preset", "toy", "--seed", str(seed), "--out", f"runs/toy/control/{name}_seed{seed}"]
        flags += ["--alpha", "0" if name == "none" else str(ALPHA), "--eval_every", "0", *train_flags]
        config, loss_function = train.parse_args(flags), fpo.method_loss
        if name in ("random", *HELD):
            criterion, style = ("random", HELD[0]) if name == "random" else (args.criterion, name)
            found = feature_statistics(config, style_sides(config, style))
            loss_function = partial(weighted_loss, choose_features(*found, criterion, seed=seed))
        if name != "sft":
            train.main(config, loss_function=loss_function)
        model = config.model if name == "sft" else f"{config.out}/model"
        rows.append({"name": name, "method": name, "seed": seed, "scores": scores_of(model, config)})
    lines, args.done = [(label, name, "", ()) for name, label in labels.items()], len(rows)
    publish(args, rows, {"Table 4 on the toy world": table(rows, lines, columns)}, {})


def parse_args(argv=None):
    """(our flags, the words that are train.py's)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag(
        "--responses", nargs=2, help="files of responses with the feature and without; none: the toy's table"
    )
    flag("--criterion", default="difference", choices=("difference", "token"), help="token: the paper's")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the toy's table (0 1 2)")
    flag("--assets", default="assets", help="folder of the toy's results.json and control.md (assets)")
    return parser.parse_known_args(argv)


def main(argv=None):
    """The toy's table; or one training on the features that tell two files of responses apart."""
    args, train_flags = parse_args(argv)
    if not args.responses:
        return toy_control(args, train_flags)
    config = train.parse_args(train_flags)
    data.start_processes()  # so that rank 0 tokenises for all
    tokenizer = data.load_tokenizer(config.model)
    # Responses without a rejected one are read as SFT's are.
    configs = [dataclasses.replace(config, method="sft", dataset=source) for source in args.responses]
    found = feature_statistics(config, [train.load_data("dataset", one, tokenizer) for one in configs])
    features = choose_features(*found, args.criterion)
    if data.ranks()[0] == 0:
        print(f"weight 1 on features {features}, 0 on all others")
    train.main(config, loss_function=partial(weighted_loss, features))


if __name__ == "__main__":
    data.run_script(main)
