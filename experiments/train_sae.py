"""An SAE for one's own model: a JumpReLU SAE trained on the model's states at the responses of real pairs.

    python -m experiments.train_sae --model MODEL --dataset pairs.jsonl --width 2048 --out runs/sae

The states are those that D_FPO reads (Eq. 10): at each response token, chosen and rejected, the state that
predicts it. Every tenth pair is held out, and judges the SAE: L0, the fraction of variance unexplained (FVU)
and the share of dead features. The file has Gemma Scope's layout, as train.py takes it.

What to look at: FVU well below 1 (0.2 or less) at an L0 that is small beside the width. If L0 is too large,
raise --l0_weight; if FVU is, lower it, or give more tokens and steps. An `error` in the bar (a batch's FVU)
far below the held-out FVU means too few tokens; many dead features: too large a width.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import data
import runtime
from batches import epoch_order, plan_for_one, stream
from fpo import Policy
from loading import choose_layout, load_lm
from runtime import refuse
from sae import MODULES, SAE, SiteHook, sae_figures, train_sae, write_sae


def choose_pairs(pairs, tokens):
    """Indices of pairs, at random until they have `tokens` response tokens: nine tenths, one held out."""
    order, total = [], 0
    for i in epoch_order(len(pairs), 0, 0).tolist():
        if total < tokens:
            order.append(i)
            total += len(pairs[i][1]) + len(pairs[i][2])
    if len(order) < 10:
        refuse(f"{len(order)} pairs are too few to hold a tenth out: give more --tokens or pairs")
    return [i for n, i in enumerate(order) if n % 10 != 9], order[9::10]


@torch.no_grad()
def read_states(policy, pairs, indices, row_options, max_tokens=4096):
    """States (n, d) that predict the response tokens of some pairs: what an SAE of the policy's site reads.

    row_options: layout and padding, as `loading.choose_layout` gives them.
    """
    groups, states = plan_for_one(pairs, indices, policy.lm.device, max_tokens=max_tokens, **row_options), []
    batches = stream(pairs, groups, device=policy.lm.device, **row_options)
    for batch, _ in tqdm(batches, "states", len(groups)):
        states += policy.read_sites(batch)  # without the head: no logits
    return torch.cat(states)


def train_centred(states, **settings):
    """`sae.train_sae` of states (n, d) less their mean, which then goes into the biases.

    So the loss weighs L0 against the states' variance: many models add a large constant to their states.
    Changes `states` in place.
    """
    mean = states.mean(0)
    arrays, mean = train_sae(states.sub_(mean), **settings), mean.cpu()
    # (h - mean) W_enc + b_enc = h W_enc + (b_enc - mean W_enc)
    arrays["b_enc"] -= mean @ arrays["W_enc"]
    arrays["b_dec"] += mean
    return arrays


def parse_args(argv=None):
    """The flags; UserError for values that no model and no data are needed to refuse."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error, add = refuse, parser.add_argument
    add("--model", required=True, help="Hugging Face directory or repo: best what training starts from")
    add("--dataset", required=True, help="preference pairs, as train.py takes them: best the training pairs")
    add("--layer", type=int, help="from 0 (the last one, as in the paper)")
    add("--width", type=int, required=True, help="number of features m; 2 to 8 times the hidden size")
    add("--out", required=True, help="folder that the SAE goes into")
    add("--site", default="res", choices=MODULES, help="residual stream, MLP or attention (res)")
    add("--tokens", type=int, default=200_000, help="response tokens, a tenth of them held out (200000)")
    add("--steps", type=int, default=2000, help="of 256 states each (2000)")
    add("--l0_weight", type=float, default=1e-3, help="what an active feature costs, in variances (1e-3)")
    args = parser.parse_args(argv)
    runtime.check_output("out", args.out, folder=True)
    if min(args.width, args.tokens, args.steps) < 1 or args.l0_weight < 0:
        refuse("--width, --tokens, --steps: must be at least 1; --l0_weight: at least 0")
    return args


def main(argv=None):
    """Reads states, trains an SAE on them, judges it on held-out ones, and writes it."""
    # ---- model and pairs
    args, device = parse_args(argv), runtime.start_processes()
    tokenizer, lm = data.load_tokenizer(args.model), load_lm(args.model, device).eval()
    if args.layer is None:
        args.layer = lm.config.get_text_config().num_hidden_layers - 1
    try:
        # A hook for a moment: whether there is such a site, and how wide it is.
        with SiteHook(lm, args.layer, args.site) as hook:
            site = SimpleNamespace(d=hook.d)  # more than its width is not asked of an SAE to read states
    except ValueError as error:
        refuse(f"--layer {args.layer}: {error}")
    there = Path(args.out, "" if args.site == "res" else args.site, f"layer_{args.layer}")
    if there.exists():  # of several train.py would take the one with the L0 nearest to 100
        refuse(f"--out {args.out}: it has an SAE there, {there}; take another folder")
    policy = Policy(lm, [site], [(args.layer, args.site)])
    pairs = data.load_pairs(args.dataset, tokenizer)

    # ---- states
    train, held_out = choose_pairs(pairs, args.tokens)
    row_options = choose_layout(SimpleNamespace(layout="auto"), pairs, device)
    states, others = (read_states(policy, pairs, indices, row_options) for indices in (train, held_out))
    del lm, policy
    print(f"{len(states):,} states of {len(train)} pairs to train on, {len(others):,} of others held out")

    # ---- the SAE, its file, and its figures on the states held out
    arrays = train_centred(states, width=args.width, steps=args.steps, lr=3e-3, l0_weight=args.l0_weight)
    figures = sae_figures(SAE(**arrays).to(device), others)
    with runtime.writing(args.out, keep=True):
        path = write_sae(args.out, arrays, args.layer, args.site, figures["l0"])
    print(f"held out: L0 {figures['l0']:.1f}, FVU {figures['fvu']:.3f}, dead features {figures['dead']:.1%}")
    print(path)


if __name__ == "__main__":
    runtime.run_script(main)
