"""FPO on one page, of *Direct Preference Optimization Using Sparse Feature-Level Constraints* (2411.07618).

    python minimal.py    makes the toy world where it is missing; trains; held-out scores before and after

The whole method, without speed and without options. `fpo` is the loss: change it there. `phase_1` stores what
the frozen reference says, `train` is Phase 2. train.py makes the same steps at scale; a test compares them.

symbol        name here           shape        meaning
x, y_w, y_l   pairs[i]            token ids    Sec. 2: prompt, chosen and rejected response
log π(y|x)    logps               (2B,)        Eq. 7: summed over the response; B chosen, then B rejected
|y|           lengths             (2B,)        Eq. 9: tokens of the response
h             hook.value          (2B, T, d)   Eq. 5: the hidden state that the SAE reads
c             sae.encode(h)       (2B, T, m)   Eq. 5: sparse features
c̄             features            (2B, m)      Eq. 10: c averaged over the response
D_FPO         feature_mse(…)      (2B,)        Eq. 10

B pairs in a batch, T positions, V vocabulary, d hidden size, m features of the SAE.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import toy
from data import load_pairs, load_tokenizer
from losses import feature_mse, pool_features, sequence_logps
from sae import SiteHook, load_sae


class Responses(NamedTuple):
    """What a model says of the 2B responses of B pairs: first the chosen ones, then the rejected ones."""

    ids: Tensor  # (2B, T) x, then y, then padding
    labels: Tensor  # (2B, T) y; -100 at x and padding
    logits: Tensor  # (2B, T, V)
    logps: Tensor  # (2B,) log π(y|x), nats
    lengths: Tensor  # (2B,) |y|
    features: Tensor  # (2B, m) c̄


def forward(lm, hook, sae, pairs) -> Responses:
    """One forward of a model over B pairs (x, y_w, y_l), and all that the loss needs of it."""
    asked = [(x, y_w) for x, y_w, y_l in pairs] + [(x, y_l) for x, y_w, y_l in pairs]
    # Padding stands on the right, where no token of a causal model sees it: no attention mask is needed.
    ids = pad_sequence([torch.cat([x, y]) for x, y in asked], batch_first=True)  # (2B, T)
    targets = [torch.cat([torch.full_like(x, -100), y]) for x, y in asked]  # -100: not learnt
    labels = pad_sequence(targets, batch_first=True, padding_value=-100)  # (2B, T)
    logits = lm(input_ids=ids, use_cache=False).logits  # (2B, T, V); meanwhile the hook keeps h
    logps, lengths = sequence_logps(logits, labels)  # log π(y|x) and |y|, (2B,)
    # Position t predicts token t + 1, so the states of y's tokens begin at the last token of x.
    predicts = labels.roll(-1, dims=1) != -100  # (2B, T)
    features = pool_features(sae.encode(hook.value), predicts)  # c, Eq. 5; its mean c̄, Eq. 10
    return Responses(ids, labels, logits, logps, lengths, features)


def fpo(policy, ref_logps, ref_features, *, alpha=0.5, beta=0.1, k=50, stop_gradient=True, unit=1.0):
    """Eq. 11, the loss of each pair, (B,), by the terms of Table 1. α, β: Table 5; k: the authors' code.

    policy: Responses. ref_logps (2B,), ref_features (2B, m): what Phase 1 stored of the same responses.
    stop_gradient: whether there is sg in Eq. 11 (Table 3). unit: divides D_FPO (ours, not the paper's).
    """
    pi_w, pi_l = (policy.logps / policy.lengths).chunk(2)  # log π_θ(y_w|x) / |y_w|, log π_θ(y_l|x) / |y_l|
    ref_w, ref_l = (ref_logps / policy.lengths).chunk(2)  # the same of π_ref; all (B,)
    D_w, D_l = (feature_mse(policy.features, ref_features, k=k) / unit).chunk(2)  # D_FPO, Eq. 10
    lpd = beta * pi_w - beta * pi_l  # log probability difference, Table 1
    margin = beta * ref_w - beta * ref_l  # γ_ref-LN, Eq. 9
    D_w = D_w.detach() if stop_gradient else D_w  # sg(.): only D_l gets a gradient
    constraint = alpha * (beta * D_l - beta * D_w)  # δ_FPO, Eq. 11
    return -F.logsigmoid(lpd - margin - constraint)  # -log σ(u), Eq. 8


@torch.no_grad()
def phase_1(lm, hook, sae, pairs) -> list[tuple[Tensor, Tensor]]:
    """Of each pair log π_ref (2,) and c̄_ref (2, m), for y_w and y_l: then π_ref may go (Sec. 3)."""
    stored = []
    for pair in tqdm(pairs, "Phase 1"):
        reference = forward(lm, hook, sae, [pair])
        stored.append((reference.logps, reference.features))
    return stored


def train(
    lm, hook, sae, pairs, stored, *,
    loss=fpo, steps=100, batch_size=32, lr=3e-4, beta2=0.95, clip=1.0, warmup=10, seed=0,
) -> list[tuple[float, float, float]]:  # fmt: skip
    """Phase 2: changes `lm`, which starts as π_ref. Returns each step's loss, gradient norm, learning rate.

    loss: from Responses, log π_ref (2B,) and c̄_ref (2B, m) to (B,). The other defaults are the toy's.
    """
    optimizer = torch.optim.Adam(lm.parameters(), betas=(0.9, beta2))
    steps_per_epoch, history = -(-len(pairs) // batch_size), []  # rounded up: the last batch may be smaller
    for step in tqdm(range(steps), "Phase 2"):
        # The step's B pairs: each epoch visits all pairs once, in an order of its own.
        epoch, place = divmod(step, steps_per_epoch)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        batch = order[place * batch_size : (place + 1) * batch_size].tolist()

        # What the policy says of them now, and what the reference said: of all y_w, then of all y_l.
        policy = forward(lm, hook, sae, [pairs[i] for i in batch])
        ref_logps = torch.stack([stored[i][0] for i in batch], dim=1).flatten()  # (2, B), then (2B,)
        ref_features = torch.stack([stored[i][1] for i in batch], dim=1).flatten(0, 1)  # (2B, m)

        # The mean is E of Eq. 8. Its gradient is clipped; the learning rate rises over the first steps.
        mean = loss(policy, ref_logps, ref_features).mean()
        mean.backward()
        norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), clip)  # before clipping
        optimizer.param_groups[0]["lr"] = rate = lr * min(1, (step + 1) / warmup)
        optimizer.step()
        optimizer.zero_grad()
        history.append((mean.item(), norm.item(), rate))
    return history


@torch.no_grad()
def evaluate(lm, hook, sae, pairs, stored) -> dict[str, float]:
    """Of held-out pairs: how often y_w is likelier than y_l, per token; mean D_FPO of y_w and of y_l."""
    rows = []
    for pair, (_, ref_features) in zip(pairs, stored, strict=True):
        policy = forward(lm, hook, sae, [pair])
        pi_w, pi_l = policy.logps / policy.lengths
        rows.append([(pi_w > pi_l).item(), *feature_mse(policy.features, ref_features).tolist()])
    return dict(zip(("accuracy", "D(y_w)", "D(y_l)"), torch.tensor(rows).mean(0).tolist(), strict=True))


def main(folder="runs/toy"):
    """FPO on the toy world, as `train.py --method fpo --preset toy` does it."""
    toy.make_world(folder)  # unless it is there
    tokenizer = load_tokenizer(f"{folder}/model")
    pairs, held_out = (list(load_pairs(f"{folder}/{name}.jsonl", tokenizer)) for name in ("train", "test"))
    # The SFT model is π_ref, and π_θ at the start; loaded like this it has no dropout. Attention is eager
    # since the faster kind, sdpa, would leave out Gemma-2's softcap.
    lm = AutoModelForCausalLM.from_pretrained(f"{folder}/model", attn_implementation="eager")
    sae = load_sae(f"{folder}/sae", layer=3, width="512")  # frozen; reads the last block's output
    with SiteHook(lm, layer=3) as hook:  # keeps what this block leaves, at each forward
        stored, stored_held_out = (phase_1(lm, hook, sae, some) for some in (pairs, held_out))
        before = evaluate(lm, hook, sae, held_out, stored_held_out)
        train(lm, hook, sae, pairs, stored)
        after = evaluate(lm, hook, sae, held_out, stored_held_out)
    for name in before:
        print(f"held-out {name}: {before[name]:.4g} before, {after[name]:.4g} after")


if __name__ == "__main__":
    main()
