"""How tight Theorem B.1 is: `python -m experiments.theorem` trains FPO on the toy and measures it on the way.

Theorem B.1: under accurate reconstruction, with M = ‖W_outᵀ W_decᵀ‖₂ (the first step is Lemma B.7),

    KL(π_ref‖π_θ)  ≤  ½‖Δz‖²  ≤  (M²/2)‖Δc‖²

    symbol   here    shape    meaning, at a position that predicts a response token; Δ: policy − reference
    h        h       (N, d)   what the last layer leaves
    c        c       (N, m)   the SAE's features of h (Eq. 5)
    e        de: Δe  (N, d)   what the SAE misses: h = c W_dec + b_dec + e
    z        z       (N, V)   logits

The paper's z is h W_out, with W_outᵀ = E (V, d), the output embedding. Gemma-2's is cap · tanh(u Wᵀ / cap),
with u = h / rms(h) and W = E · (1 + the final norm's weight). What can be proved of each step:

1. KL = log E_ref[exp Δz] − E_ref[Δz] ≤ (max Δz − min Δz)² / 8 (Hoeffding) ≤ ½‖Δz‖²_∞ ≤ ½‖Δz‖².
2. The softcap's slope is at most 1: it can be left out.
3. ‖Δu‖ ≤ ‖Δh‖ / √(rms(h_θ) rms(h_ref)), as ‖a/‖a‖ − b/‖b‖‖² = (‖a − b‖² − (‖a‖ − ‖b‖)²) / (‖a‖‖b‖).
4. ‖Δh‖ ≤ ‖W_dec‖₂‖Δc‖ + ‖Δe‖. Accurate reconstruction means Δe = 0.
5. The head is trained too, which the theorem leaves out: ‖Δz‖ ≤ ‖W_ref‖₂‖Δu‖ + √d ‖ΔW‖₂.

M counts none of 2 to 5: where rms(h) is small the inequality fails. And FPO holds down pooled features, but
k D_FPO ≤ ‖Δc̄‖² ≤ mean ‖Δc‖² (Jensen) is the wrong way round. No KL exceeds 2 cap + log V, the ceiling.
"""

import argparse
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

import data
import fpo
import losses
import train
from experiments import reproduce
from scale import pooled_features
from toy import sae_figures

RUN = ["--preset", "toy", "--save_every", "5", "--eval_every", "0", "--out", "runs/toy/theorem"]
BOUNDS = ("range", "lemma", "theorem", "norm", "whole")
LINES = {"kl": "KL(π_ref‖π_θ)", "range": "(max Δz − min Δz)² / 8", "lemma": "½‖Δz‖² (Lemma B.7)"}
LINES |= {"theorem": "(M²/2)‖Δc‖² (Theorem B.1)", "norm": "… with final norm and softcap"}
LINES |= {"whole": "… and with Δe and ΔW", "middle": "M‖Δc‖ / ‖Δz‖, median", "missed": "‖Δe‖ / ‖Δh‖, median"}
LINES |= {"fvu": "FVU of h_θ", "moved": "‖ΔW‖₂ / ‖W_ref‖₂", "dc": "mean ‖Δc‖²", "pooled": "‖Δc̄‖²"}
LINES |= {"k_mse": "k D_FPO"}


# ---------------------------------------------------------------------------- what bounds the KL
def logits_of(lm, h):
    """z (n, V), float64, as the model makes them of h (n, d): final norm, output embedding, softcap."""
    z, cap = lm.get_output_embeddings()(lm.model.norm(h)).double(), lm.config.final_logit_softcapping
    return z if cap is None else cap * torch.tanh(z / cap)


@torch.no_grad()
def weight_norms(reference, policy, sae) -> dict:
    """The chain's spectral norms, float64: M (of the reference's head); of W_ref, ΔW and W_dec."""
    models, one = (reference, policy), torch.eye(sae.d, device=sae.W_dec.device)
    E_ref, E = (lm.get_output_embeddings().weight.double() for lm in models)
    W_ref, W = (X * (1 + lm.model.norm.weight.double()) for X, lm in zip((E_ref, E), models, strict=True))
    products = {"W_ref": (W_ref, one), "dW": (W - W_ref, one), "W_dec": (sae.W_dec, one)}
    products["M"] = sae.W_dec, E_ref
    norms = {}
    for name, (A, B) in products.items():  # ‖A Bᵀ‖₂ by their R factors: the product is never made
        R_A, R_B = (torch.linalg.qr(X.double(), mode="r").R for X in (A, B))
        norms[name] = torch.linalg.matrix_norm(R_A @ R_B.T, 2)
    return norms


@torch.no_grad()
def position_bounds(reference, policy, sae, h_ref, h, norms) -> dict:
    """KL(π_ref‖π_θ) of each position, nats, and what is to bound it, by the keys of BOUNDS: (n,), float64.

    h_ref, h (n, d), of the models `reference` and `policy`; norms: of weight_norms. Also "dc", "de", "dh",
    the norms of Δc, Δe, Δh.
    """
    z_ref, z = logits_of(reference, h_ref), logits_of(policy, h)
    log_ref, log_pi = z_ref.log_softmax(-1), z.log_softmax(-1)
    dz, dh = z - z_ref, h.double() - h_ref.double()
    dc = (sae.encode(h) - sae.encode(h_ref)).double()
    de = dh - dc @ sae.W_dec.double()
    dh, dc, de = (x.norm(dim=-1) for x in (dh, dc, de))
    eps = reference.config.rms_norm_eps
    rms_ref, rms = ((x.double().square().mean(-1) + eps).sqrt() for x in (h_ref, h))
    slope = norms["W_ref"] / (rms_ref * rms).sqrt()  # ‖W_ref‖₂‖Δu‖ ≤ slope ‖Δh‖
    return {
        "kl": (log_ref.exp() * (log_ref - log_pi)).sum(-1),
        "range": (dz.amax(-1) - dz.amin(-1)).square() / 8,
        "lemma": dz.square().sum(-1) / 2,
        "theorem": (norms["M"] * dc).square() / 2,
        "norm": (slope * norms["W_dec"] * dc).square() / 2,
        "whole": (slope * (norms["W_dec"] * dc + de) + sae.d**0.5 * norms["dW"]).square() / 2,
    } | {"dc": dc, "de": de, "dh": dh}


def summarise(table, owner, c_ref, c, *, k: int, ceiling: float) -> dict:
    """A state's figures, from position_bounds' table, owner (N,), and the pooled features c_ref, c (R, m).

    Of each bound: mean; median of bound / KL; shares of positions where it holds, and lies below the ceiling.
    Medians of M‖Δc‖ / ‖Δz‖ and ‖Δe‖ / ‖Δh‖. What pooling leaves: mean ‖Δc‖² of a response, ‖Δc̄‖², k D_FPO.
    """
    kl, row = table["kl"], {"kl": table["kl"].mean().item()}
    for name in BOUNDS:
        bound = table[name]
        row[name] = {"mean": bound.mean().item(), "ratio": (bound / kl)[kl > 1e-12].median().item()}
        row[name]["holds"] = (kl <= bound).double().mean().item()
        row[name]["below"] = (bound < ceiling).double().mean().item()
    row["middle"] = (table["theorem"] / table["lemma"]).sqrt().nanmedian().item()
    row["missed"] = (table["de"] / table["dh"]).nanmedian().item()
    total = table["dc"].new_zeros(len(c)).index_add(0, owner, table["dc"].square())
    row["dc"] = (total / owner.bincount()).mean().item()
    row["pooled"] = (c - c_ref).square().sum(-1).mean().item()
    row["k_mse"] = k * losses.feature_mse(c, c_ref, k=k).mean().item()
    return row


# ---------------------------------------------------------------------------- along a run
def states_of_run(config) -> list[Path]:
    """Train, and return the folders of all states. train.py keeps the last one: the others are copied."""
    kept = Path(config.out, "along")
    shutil.rmtree(kept, ignore_errors=True)

    def keep_states(*args, **settings):
        """fpo.method_loss, which train.py calls at every step."""
        for state in train.saved_states(config.out):
            shutil.copytree(state, kept / state.name, dirs_exist_ok=True)
        return fpo.method_loss(*args, **settings)

    train.main(config, loss_function=keep_states)
    return [*sorted(kept.glob("step_*")), *train.saved_states(config.out)]


@torch.no_grad()
def bounds(config, folders) -> dict:
    """The theorem on the held-out pairs of a run: `config`, and the `folders` of its states.

    The model is a Gemma-2, its SAE reads the last layer's residual stream, and states hold whole weights.
    """
    # What stays the same along the run: data, SAE, reference.
    device, tokenizer = data.start_processes(), data.load_tokenizer(config.model)
    (sae,), sites = train.load_saes(config, device)
    pairs = train.load_data("eval_dataset", config, tokenizer)
    n, rows = len(pairs), train.rows_of(config, tokenizer, pairs, device)
    batches = [data.collate(pairs, range(i, min(n, i + 8)), **rows).to(device) for i in range(0, n, 8)]
    # (N,) each position's response: i for pair i's chosen, n + i for its rejected.
    owner = torch.cat([torch.cat([b.index, n + b.index])[b.owner] for b in batches])
    dtype, source = train.torch_dtype(config, device), config.reference
    reference, policy = (train.load_lm(source, device, dtype=dtype).eval() for _ in range(2))
    reader, ref_reader = (fpo.Policy(lm, [sae.to(device)], sites) for lm in (policy, reference))
    h_ref = [ref_reader.read_sites(batch)[0] for batch in batches]
    c_ref = pooled_features(torch.cat(h_ref), sae, owner, owner.bincount())
    cap, V = reference.config.final_logit_softcapping, len(reference.get_output_embeddings().weight)
    ceiling, found = 2 * (cap or math.inf) + math.log(V), []
    for folder in tqdm(folders, "theorem", unit=" states"):
        weights = load_file(folder / "rank_0.safetensors", device=str(device))
        for name, parameter in policy.named_parameters():
            parameter.data.copy_(weights[f"weight/lm.{name}"])
        norms = weight_norms(reference, policy, sae)
        h = [reader.read_sites(batch)[0] for batch in batches]
        parts = [position_bounds(reference, policy, sae, *both, norms) for both in zip(h_ref, h, strict=True)]
        table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        c = pooled_features(torch.cat(h), sae, owner, owner.bincount())
        row = {"step": int(folder.name.removeprefix("step_")), "moved": (norms["dW"] / norms["W_ref"]).item()}
        row |= summarise(table, owner, c_ref, c, k=config.k, ceiling=ceiling)
        found.append(row | {"fvu": sae_figures(sae, torch.cat(h))["fvu"]})
    return {"positions": len(owner), "ceiling": ceiling, "rows": found, "seed": config.seed, "pairs": n}


# ---------------------------------------------------------------------------- what comes out
def markdown(record) -> str:
    """KL, its bounds and what the theorem leaves out, at five states of the run."""
    rows, shares = record["rows"], "{0[mean]:.2g} (× {0[ratio]:.2g}; {0[holds]:.0%}, {0[below]:.0%})"
    states = [rows[i] for i in sorted({round(len(rows) ** (i / 4)) - 1 for i in range(5)})]
    head = f"mean, nats (× median of bound / KL; share where it holds, is below {record['ceiling']:.1f})"
    lines = [[head, *(f"step {state['step']}" for state in states)], ["---", *["---:"] * len(states)]]
    for name, label in LINES.items():
        cell = shares if name in BOUNDS else "{:.3g}"
        lines.append([label, *(cell.format(state[name]) for state in states)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(record):
    """KL and its bounds over training: a figure."""
    rows, ceiling = record["rows"], record["ceiling"]
    curves = {"kl": [row["kl"] for row in rows]}
    curves |= {name: [row[name]["mean"] for row in rows] for name in BOUNDS}
    lines = {LINES[name]: ([row["step"] for row in rows], [values]) for name, values in curves.items()}
    lines["2 cap + log V"] = [rows[0]["step"], rows[-1]["step"]], [[ceiling, ceiling]]
    figure = reproduce.draw([("", "training step", "nats, mean", lines)], legend_columns=2)
    figure.set_size_inches(6, 4.4)
    figure.axes[0].set_yscale("log")
    return figure


def main(argv=None):
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = train.refuse
    parser.parse_args(argv)  # it has no flags but --help
    config, path = train.parse_args(RUN), Path("assets/theorem.json")
    found, page = bounds(config, states_of_run(config)) | data.made_by(), path.with_suffix(".md")
    text = "`{command}` (commit {commit}, seed {seed}, {pairs} pairs; {hardware})\n\n".format(**found)
    # What both files hold of an earlier version's other measurements stays there.
    _, *others = page.read_text().split("\n\n`python ") if page.exists() else [""]
    data.write_json(path, reproduce.read_json(path) | {"bounds": found})
    data.write_text(page, "\n`python ".join([text + markdown(found), *others]))
    reproduce.save(draw(found), path.with_suffix(".svg"))
    print(text + markdown(found))


if __name__ == "__main__":
    data.run_script(main)
