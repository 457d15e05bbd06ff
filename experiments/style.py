"""Is what FPO constrains mostly style? Asked of the toy, whose answers are drawn from causes that are known.

    python -m experiments.style --models runs/toy/dpo/model runs/toy/fpo/model

Others found that preference training moves mostly features of style (docs/since.md).
Here answers are drawn with each cause by itself: style, the things named, whether they are what was asked
for, their number, the tone. How much of a feature's variance over answers a cause explains (η²) says what the
feature is of. Then, on the held-out pairs, whose features a trained model moves, and which of them I_k takes.
"""

import argparse
import random

import torch

import data
import fpo
import runtime
import toy
from batches import stream
from loading import load_lm
from sae import load_sae

AT_ONCE = 50  # answers, or pairs, of one forward
SITES = [(3, "res")]  # the toy's last layer, as in its preset


# ---------------------------------------------------------------------------- what a feature is of
def draw_answers(tokenizer, n: int, seed=0) -> tuple[data.Pairs, dict[str, torch.Tensor]]:
    """n answers to the toy's prompts, and their causes: {name: (n,) int64, the group}, drawn independently.

    `draft` alone would not do: there how many things are wrong depends on their number.
    """
    rng, rows, causes = random.Random(f"{seed} causes"), [], dict[str, list[int]]()
    styles, places = list(toy.STYLES), list(toy.THINGS)
    for _ in range(n):
        prompt, style, number = rng.choice(toy.PROMPTS), rng.choice(styles), rng.choice(list(toy.NUMBERS))
        right, sure = rng.random() < 0.5, rng.random() < 0.5
        wrong = 0 if right else number
        text = toy.make_answer(rng, prompt, style=style, number=number, wrong=wrong, sure=sure)
        chat = [{"role": "user", "content": prompt["text"]}]
        head = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        ids = tokenizer(text + "<end_of_turn>", add_special_tokens=False).input_ids
        rows.append((head, ids, []))
        # Things that are wrong are those of the next place, in THINGS' own order of places.
        place = (toy.PLACES.index(prompt["place"]) + (not right)) % len(toy.PLACES)
        things = places.index((prompt["kind"], toy.PLACES[place]))
        groups = {"style": styles.index(style), "things": things, "right": int(right)}
        for name, group in (groups | {"number": number, "tone": int(sure)}).items():
            causes.setdefault(name, []).append(group)
    return data.Pairs(rows), {name: torch.tensor(groups) for name, groups in causes.items()}


def explained(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """η² (m,): the variance of values (n, m) between groups (n,), as a share of all; else 0."""
    member = torch.nn.functional.one_hot(groups).to(values.dtype)  # (n, G)
    size = member.sum(0)  # (G,); a group without members adds nothing
    means = member.T @ values / size.clamp(min=1)[:, None]  # (G, m)
    between = (size[:, None] * (means - values.mean(0)) ** 2).sum(0)
    whole = ((values - values.mean(0)) ** 2).sum(0)
    return torch.where(whole > 0, between / whole.clamp(min=1e-30), 0.0)


@torch.no_grad()
def pooled(policy, pairs) -> torch.Tensor:
    """c̄ (2·n, m) of n pairs: all chosen responses, then all rejected ones (zeros where there is none)."""
    groups, sides = [range(i, min(i + AT_ONCE, len(pairs))) for i in range(0, len(pairs), AT_ONCE)], ([], [])
    for batch, _ in stream(pairs, groups, device="cpu"):
        for side, features in zip(sides, policy(batch)[0].features[0].double().chunk(2), strict=True):
            side.append(features)
    return torch.cat([*sides[0], *sides[1]])


# ---------------------------------------------------------------------------- what training moves
def shares(policy_features, reference_features, of_style, k: int) -> dict[str, float]:
    """How much of what is there, of what moved, and of what FPO takes of both, is of style.

    policy_features, reference_features (n, m), pooled; of_style (m,) bool. I_k is that of Eq. 10.
    """
    both = torch.stack([policy_features, reference_features])  # (2, n, m)
    top = both.topk(k, dim=-1)
    I_k = torch.zeros_like(both, dtype=torch.bool).scatter(-1, top.indices, top.values > 0).any(0)
    squares = (policy_features - reference_features) ** 2

    def share(weight):
        """Of weights (n, m), those of the features of style."""
        return ((weight * of_style).sum() / weight.sum()).item()

    return {
        "active": share((reference_features > 0).double()),  # of a response's active features
        "I_k": share(I_k.double()),  # of those that FPO compares
        "change": share(squares),  # of the squared change of all features
        "D_FPO": share(squares * I_k),  # of the squared change that FPO counts
    }


def main(argv=None):
    """Print of what the features are, and what share of each of `shares` is of style, for every model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = runtime.refuse
    flag = parser.add_argument
    flag("--models", nargs="+", required=True, help="models trained on the toy")
    flag("--reference", default="runs/toy/model", help="the model that training started from")
    flag("--answers", type=int, default=3000, help="answers that say what a feature is of")
    args = parser.parse_args(argv)
    if args.answers < 2:
        runtime.refuse(f"--answers {args.answers}: must be at least 2")
    tokenizer, sae = data.load_tokenizer(args.reference), load_sae("runs/toy/sae", layer=3, width="512")
    names = (args.reference, *args.models)
    policies = [fpo.Policy(load_lm(name, "cpu"), [sae], SITES).eval() for name in names]

    # ---- what each feature is of: the cause that explains most of its variance over answers
    answers, causes = draw_answers(tokenizer, args.answers)
    features = pooled(policies[0], answers)[: args.answers]  # (n, m); there are no rejected responses
    eta, variance = torch.stack([explained(features, groups) for groups in causes.values()]), features.var(0)
    cause = torch.where(variance > 0, eta.argmax(0), -1)  # (m,); -1: never active
    print(f"{'cause':<8} features of it   of all variance   largest η² of a feature")
    for i, name in enumerate(causes):
        whole = (eta[i] * variance).sum() / variance.sum()
        print(f"{name:<8} {(cause == i).sum():>14} {whole:>17.1%} {eta[i].max():>25.1%}")

    # ---- on the held-out pairs: the share of style
    pairs = data.load_pairs("runs/toy/test.jsonl", tokenizer)
    reference, *trained = (pooled(policy, pairs) for policy in policies)
    for name, moved in zip(args.models, trained, strict=True):
        found = shares(moved, reference, cause == 0, k=50)
        print(name, *(f"{what} {share:.1%}" for what, share in found.items()), sep="   ")


if __name__ == "__main__":
    runtime.run_script(main)
