"""How tight Theorem B.1 is: `python -m experiments.theorem` trains FPO on the toy, and measures it.

Theorem B.1: under accurate reconstruction, with M = ‖W_outᵀ W_decᵀ‖₂ (the first step is Lemma B.7),

    KL(π_ref‖π_θ)  ≤  ½‖Δz‖²  ≤  (M²/2)‖Δc‖²

    symbol   here    shape    meaning, at a position that predicts a response token; Δ: policy − reference
    h        h       (N, d)   what the last layer leaves
    c        c       (N, m)   the SAE's features of h (Eq. 5)
    e        de: Δe  (N, d)   what the SAE misses: h = c W_dec + b_dec + e
    z        z       (N, V)   logits

The lemma holds for any logits: log E_ref[exp Δz] − E_ref[Δz] ≤ (max Δz − min Δz)² / 8 ≤ ½‖Δz‖² (Hoeffding).
The theorem's z is h W_out, with W_outᵀ = E (V, d), the output embedding, and its condition is Δe = 0. Gemma-2
has a final norm and a softcap between h and z, and training moves E: M counts none of them. And FPO holds
down pooled features, but k D_FPO ≤ ‖Δc̄‖² ≤ mean ‖Δc‖² (Jensen) is the wrong way round.
No KL exceeds 2 cap + log V, the ceiling.
"""

import argparse
import math
from pathlib import Path

import torch
from tqdm import tqdm

import losses
import runtime
import settings
import train
from batches import collate
from experiments.control import load_policies
from scale import pooled_features

STEPS = (5, 10, 20, 45, 100)  # the models that are measured: trained so far
RUN = ["--preset", "toy", "--eval_every", "0"]
LINES = {"kl": "KL(π_ref‖π_θ)", "lemma": "½‖Δz‖² (Lemma B.7)", "theorem": "(M²/2)‖Δc‖² (Theorem B.1)"}
LINES |= {"missed": "‖Δe‖ / ‖Δh‖, median", "dc": "mean ‖Δc‖²", "pooled": "‖Δc̄‖²", "k_mse": "k D_FPO"}


def logits_of(lm, h):
    """z (n, V), float64, as the model makes them of h (n, d): final norm, output embedding, softcap."""
    z, cap = lm.get_output_embeddings()(lm.model.norm(h)).double(), lm.config.final_logit_softcapping
    return z if cap is None else cap * torch.tanh(z / cap)


def product_norm(A, B):
    """‖A Bᵀ‖₂ of A (n, d) and B (p, d), float64, by their R factors: the product is never made."""
    R_A, R_B = (torch.linalg.qr(X.double(), mode="r").R for X in (A, B))
    return torch.linalg.matrix_norm(R_A @ R_B.T, 2)


@torch.no_grad()
def position_bounds(reference, policy, sae, h_ref, h) -> dict:
    """KL(π_ref‖π_θ) of each position, nats, the lemma's and the theorem's bound of it: (n,), float64.

    h_ref, h (n, d), of the models `reference` and `policy`. Also "dc", "de", "dh": the norms of Δc, Δe, Δh.
    """
    z_ref, z = logits_of(reference, h_ref), logits_of(policy, h)
    log_ref, log_pi = z_ref.log_softmax(-1), z.log_softmax(-1)
    dh, dc = h.double() - h_ref.double(), (sae.encode(h) - sae.encode(h_ref)).double()
    # Δe: the part of Δh that the decoder does not give back
    de = dh - dc @ sae.W_dec.double()
    dh, dc, de = (x.norm(dim=-1) for x in (dh, dc, de))
    M = product_norm(sae.W_dec, reference.get_output_embeddings().weight)
    kl = (log_ref.exp() * (log_ref - log_pi)).sum(-1)
    lemma = (z - z_ref).square().sum(-1) / 2
    return {"kl": kl, "lemma": lemma, "theorem": (M * dc).square() / 2, "dc": dc, "de": de, "dh": dh}


def summarise(table, owner, c_ref, c, *, k: int, ceiling: float) -> dict:
    """A model's figures, from position_bounds' table, owner (N,), and the pooled features c_ref, c (R, m).

    Of each bound: mean; median of bound / KL; shares of positions where it holds, and lies below the ceiling.
    The median of ‖Δe‖ / ‖Δh‖. What pooling leaves: mean ‖Δc‖² of a response, ‖Δc̄‖², k D_FPO.
    """
    kl, row = table["kl"], {"kl": table["kl"].mean().item()}
    for name in ("lemma", "theorem"):
        bound = table[name]
        # Below 1e-12 nats the ratio would be one of roundings.
        row[name] = {"mean": bound.mean().item(), "ratio": (bound / kl)[kl > 1e-12].median().item()}
        row[name]["holds"] = (kl <= bound).double().mean().item()
        row[name]["below"] = (bound < ceiling).double().mean().item()
    row["missed"] = (table["de"] / table["dh"]).nanmedian().item()
    # Σ_t ‖Δc_t‖² of each response, (R,)
    total = table["dc"].new_zeros(len(c)).index_add(0, owner, table["dc"].square())
    row["dc"] = (total / owner.bincount()).mean().item()
    row["pooled"] = (c - c_ref).square().sum(-1).mean().item()
    row["k_mse"] = k * losses.feature_mse(c, c_ref, k=k).mean().item()
    return row


@torch.no_grad()
def bounds(config) -> dict:
    """The theorem on the held-out pairs of a run, of a Gemma-2 whose SAE reads its last layer."""
    policies, pairs, row_options = load_policies(config, (config.reference, f"{config.out}/model"))
    n, models, sae = len(pairs), [policy.lm for policy in policies], policies[0].saes[0]
    batches = [collate(pairs, range(i, min(n, i + 8)), **row_options) for i in range(0, n, 8)]
    batches = [batch.to(models[0].device) for batch in batches]
    # (N,) each position's response: i for pair i's chosen, n + i for its rejected.
    owner = torch.cat([torch.cat([b.index, n + b.index])[b.owner] for b in batches])
    states = [[policy.read_sites(batch)[0] for batch in batches] for policy in policies]
    parts = [position_bounds(*models, sae, *both) for both in zip(*states, strict=True)]
    table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    pooled = [pooled_features(torch.cat(h), sae, owner, owner.bincount()) for h in states]
    text = models[0].config
    ceiling = 2 * (text.final_logit_softcapping or math.inf) + math.log(text.vocab_size)
    row = {"step": config.steps, "positions": len(owner), "pairs": n, "ceiling": ceiling}
    return row | summarise(table, owner, *pooled, k=config.k, ceiling=ceiling)


# ---------------------------------------------------------------------------- what comes out
def markdown(rows) -> str:
    """KL, its bounds and what the theorem leaves out, of each model."""
    head = f"mean, nats (× median of bound / KL; share where it holds, is below {rows[0]['ceiling']:.1f})"
    lines = [[head, *(f"step {row['step']}" for row in rows)], ["---", *["---:"] * len(rows)]]
    for name, label in LINES.items():
        shares = "{0[mean]:.2g} (× {0[ratio]:.2g}; {0[holds]:.0%}, {0[below]:.0%})"
        cell = shares if name in ("lemma", "theorem") else "{:.3g}"
        lines.append([label, *(cell.format(row[name]) for row in rows)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv=None):
    """Train, measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = runtime.refuse
    parser.parse_args(argv)  # it has no flags but --help
    rows, path = [], Path("assets/theorem.json")
    for steps in tqdm(STEPS, "theorem", unit=" models"):  # the same run each time, ended earlier or later
        config = settings.parse_args([*RUN, "--steps", str(steps), "--out", f"runs/toy/theorem/step_{steps}"])
        train.main(config)
        rows.append(bounds(config))
    made, text = runtime.made_by(), markdown(rows)
    runtime.write_json(path, made | {"rows": rows})
    runtime.write_text(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    runtime.run_script(main)
