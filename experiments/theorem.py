"""How tight Theorem B.1 is on a trained model, and what each departure from the paper would change.

    python -m experiments.theorem bounds        Theorem B.1 and Lemma B.7 along a run of FPO, held-out pairs
    python -m experiments.theorem departures    the trained model's D_FPO as other implementations have it

Theorem B.1: under accurate reconstruction, with M = ‖W_outᵀ W_decᵀ‖₂ (the first step is Lemma B.7),

    KL(π_ref‖π_θ)  ≤  ½‖Δz‖²  ≤  (M²/2)‖Δc‖²

    symbol   here    shape    meaning, at a position that predicts a response token; Δ: policy − reference
    h        h       (N, d)   what the last layer leaves
    c        c       (N, m)   the SAE's features of h (Eq. 5)
    e        de: Δe  (N, d)   what the SAE misses: h = c W_dec + b_dec + e
    z        z       (N, V)   logits
    W_outᵀ   E       (V, d)   the output embedding

The paper's z is h W_out. Gemma-2's is cap · tanh(u Wᵀ / cap), with u = h / rms(h), and W = E · (1 + the final
norm's weight). What can be proved of each step:

1. KL = log E_ref[exp Δz] − E_ref[Δz] ≤ (max Δz − min Δz)² / 8 (Hoeffding) ≤ ½‖Δz‖²_∞ ≤ ½‖Δz‖². The lemma
   holds; its ½ is the best constant of the maximum norm (of the Euclidean one it is ¼).
2. The softcap's slope is at most 1: it can be left out.
3. ‖Δu‖ ≤ ‖Δh‖ / √(rms(h_θ) rms(h_ref)), as ‖a/‖a‖ − b/‖b‖‖² = (‖a − b‖² − (‖a‖ − ‖b‖)²) / (‖a‖‖b‖).
4. ‖Δh‖ ≤ ‖W_dec‖₂‖Δc‖ + ‖Δe‖. Accurate reconstruction means Δe = 0.
5. The head is trained too, which the theorem leaves out: ‖Δz‖ ≤ ‖W_ref‖₂‖Δu‖ + √d ‖ΔW‖₂.

M counts none of 2 to 5: where rms(h) is small the inequality fails. FPO holds down features averaged over a
response; k D_FPO ≤ ‖Δc̄‖² ≤ mean ‖Δc‖² (Jensen) is the wrong way round for the theorem. No KL exceeds
2 cap + log V, the ceiling: a bound above it says nothing.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

import data
import fpo
import losses
import train
from scale import pooled_features
from toy import sae_figures

RUN = "runs/toy/theorem"
BOUNDS = {  # label, colour of the line
    "range": ("(max Δz − min Δz)² / 8", "#3a9d4f"),
    "lemma": ("½‖Δz‖² (Lemma B.7)", "#4c7fd9"),
    "theorem": ("(M²/2)‖Δc‖² (Theorem B.1)", "#d6336c"),
    "norm": ("… with final norm and softcap", "#d98324"),
    "whole": ("… and with Δe and ΔW", "#1fa3b5"),
}
LINES = {"kl": "KL(π_ref‖π_θ)", **{name: label for name, (label, _) in BOUNDS.items()}}  # of the table
LINES |= {"middle": "M‖Δc‖ / ‖Δz‖, median", "missed": "‖Δe‖ / ‖Δh‖, median", "fvu": "FVU of h_θ"}
LINES |= {"moved": "‖ΔW‖₂ / ‖W_ref‖₂", "dc": "mean ‖Δc‖²", "pooled": "‖Δc̄‖²", "k_mse": "k D_FPO"}


# ---------------------------------------------------------------------------- what a model computes
@torch.no_grad()
def read_states(policy, pairs, n: int, **rows):
    """What the SAE of `policy` reads where the response tokens of the first `n` pairs are predicted.

    rows: layout and padding, as data.collate takes them.
    Returns: h (N, d) in the model's dtype; owner (N,), which of the 2n responses a position belongs to: i for
    pair i's chosen, n + i for its rejected.
    """
    states, owners = [], []
    for start in range(0, n, 8):
        batch = data.collate(pairs, range(start, min(n, start + 8)), **rows).to(policy.lm.device)
        states += policy.read_sites(batch)
        owners.append(torch.cat([batch.index, n + batch.index])[batch.owner])
    return torch.cat(states), torch.cat(owners)


def logits_of(lm, h):
    """z (n, V), float64, as the model makes them of h (n, d): final norm, output embedding, softcap."""
    z, cap = lm.get_output_embeddings()(lm.model.norm(h)).double(), lm.config.final_logit_softcapping
    return z if cap is None else cap * torch.tanh(z / cap)


# ---------------------------------------------------------------------------- Theorem B.1
def spectral_norm(A, B) -> torch.Tensor:
    """‖A Bᵀ‖₂ of A (n, d) and B (k, d), float64. By their R factors: no (n, k) matrix is made."""
    R_A, R_B = (torch.linalg.qr(X.double(), mode="r").R for X in (A, B))
    return torch.linalg.matrix_norm(R_A @ R_B.T, 2)


@torch.no_grad()
def weight_norms(reference, policy, sae) -> dict:
    """The chain's spectral norms, float64: M (of the reference's head); of W_ref, ΔW and W_dec."""
    models, one = (reference, policy), torch.eye(sae.d, device=sae.W_dec.device)
    E_ref, E = (lm.get_output_embeddings().weight.double() for lm in models)
    W_ref, W = (X * (1 + lm.model.norm.weight.double()) for X, lm in zip((E_ref, E), models, strict=True))
    norms = {name: spectral_norm(X, one) for name, X in (("W_ref", W_ref), ("dW", W - W_ref))}
    return norms | {"W_dec": spectral_norm(sae.W_dec, one), "M": spectral_norm(sae.W_dec, E_ref)}


@torch.no_grad()
def position_bounds(reference, policy, sae, h_ref, h, norms) -> dict:
    """KL(π_ref‖π_θ) of each position, nats, and what is to bound it, by the keys of BOUNDS: (n,), float64.

    h_ref, h (n, d), of the models `reference` and `policy`; norms: of weight_norms. Also "dc", "de", "dh",
    the norms of Δc, Δe, Δh.
    """
    z_ref, z = logits_of(reference, h_ref), logits_of(policy, h)
    each = [x[:, None].expand(-1, 2, -1) for x in (z, z_ref)]  # a position is a response of one token
    kl = losses.sequential_kl(*each, torch.zeros(len(z), 2, dtype=torch.int64, device=z.device))
    dz, dh = z - z_ref, h.double() - h_ref.double()
    dc = (sae.encode(h) - sae.encode(h_ref)).double()
    de = dh - dc @ sae.W_dec.double()
    dh, dc, de = (x.norm(dim=-1) for x in (dh, dc, de))
    eps = reference.config.rms_norm_eps
    rms_ref, rms = ((x.double().square().mean(-1) + eps).sqrt() for x in (h_ref, h))
    slope = norms["W_ref"] / (rms_ref * rms).sqrt()  # ‖W_ref‖₂‖Δu‖ ≤ slope ‖Δh‖
    bounds = {
        "range": (dz.amax(-1) - dz.amin(-1)).square() / 8,
        "lemma": dz.square().sum(-1) / 2,
        "theorem": (norms["M"] * dc).square() / 2,
        "norm": (slope * norms["W_dec"] * dc).square() / 2,
        "whole": (slope * (norms["W_dec"] * dc + de) + sae.d**0.5 * norms["dW"]).square() / 2,
    }
    return {"kl": kl, **bounds, "dc": dc, "de": de, "dh": dh}


def summarise(table, ceiling: float) -> dict:
    """Of each bound: mean; median of bound / KL; shares of positions where it holds, and lies below the
    ceiling. Of M‖Δc‖ / ‖Δz‖ and ‖Δe‖ / ‖Δh‖ the medians. table: of position_bounds.
    """
    kl, row = table["kl"], {"kl": table["kl"].mean().item()}
    for name in BOUNDS:
        bound = table[name]
        row[name] = {"mean": bound.mean().item(), "ratio": (bound / kl)[kl > 1e-12].median().item()}
        row[name]["holds"] = (kl <= bound).double().mean().item()
        row[name]["below"] = (bound < ceiling).double().mean().item()
    row["middle"] = (table["theorem"] / table["lemma"]).sqrt().nanmedian().item()
    return row | {"missed": (table["de"] / table["dh"]).nanmedian().item()}


def pooling(dc, owner, c_ref, c, k: int) -> dict:
    """What pooling leaves of the features' change: of a response mean ‖Δc‖², ‖Δc̄‖² and k D_FPO; means.

    dc (N,) ‖Δc‖; owner (N,); c_ref, c (R, m), pooled.
    """
    mean = torch.zeros(len(c)).to(dc).index_add(0, owner, dc.square()) / owner.bincount(minlength=len(c))
    pooled, mse = (c - c_ref).square().sum(-1), losses.feature_mse(c, c_ref, k=k)
    return {"dc": mean.mean().item(), "pooled": pooled.mean().item(), "k_mse": k * mse.mean().item()}


def bounds(run) -> dict:
    """The theorem at every state of a run. run: of load_run."""
    sae, reference, policy = run.sae, run.reference.lm, run.policy.lm
    h_ref, owner = read_states(run.reference, run.pairs, run.n, **run.rows)
    c_ref = pooled_features(h_ref, sae, owner, owner.bincount())
    cap, V = reference.config.final_logit_softcapping, len(reference.get_output_embeddings().weight)
    ceiling, rows = 2 * (cap or math.inf) + math.log(V), []
    for folder in tqdm(run.states, "theorem", unit=" states"):
        load_weights(policy, folder)
        norms = weight_norms(reference, policy, sae)
        h, _ = read_states(run.policy, run.pairs, run.n, **run.rows)
        slices = zip(h_ref.split(256), h.split(256), strict=True)  # positions whose logits exist at once
        parts = [position_bounds(reference, policy, sae, *part, norms) for part in slices]
        table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        c = pooled_features(h, sae, owner, owner.bincount())
        row = {"step": int(folder.name.removeprefix("step_")), **summarise(table, ceiling)}
        row |= {"fvu": sae_figures(sae, h)["fvu"], "moved": (norms["dW"] / norms["W_ref"]).item()}
        rows.append(row | pooling(table["dc"], owner, c_ref, c, run.k))
    return {"positions": len(owner), "ceiling": ceiling, "rows": rows}


# ---------------------------------------------------------------------------- departures
def padded(c, lengths, row_lengths, batch: int):
    """Features pooled as the authors' code does: summed over the response, divided by the padded length.

    c (2n, m), averaged over the response; lengths (2n,) |y|; row_lengths (2n,) of prompt and response. Pairs
    i and n + i are batched together, `batch` pairs in order, all rows padded to the longest.
    """
    longest = row_lengths.view(2, -1).amax(0)  # (n,)
    longest = torch.cat([part.amax().expand(len(part)) for part in longest.split(batch)])
    return c * (lengths / longest.repeat(2))[:, None]


def policy_top_mse(c, c_ref, k: int):
    """D_FPO (R,) with I_k = topk(c̄_θ), the policy's alone, as in the authors' code; c, c_ref (R, m)."""
    top = c.topk(min(k, c.shape[1]))
    return torch.where(top.values > 0, (top.values - c_ref.gather(1, top.indices)).square(), 0.0).sum(1) / k


def keep_top(c, n: int):
    """c (R, m) with all but each row's n largest set to 0: what a cache of that size holds."""
    top = c.topk(min(n, c.shape[1]))
    return torch.zeros_like(c).scatter(1, top.indices, top.values)


def departure(what: str, quantity: str, here, there) -> dict:
    """A line of the table; of D_FPO (R,) also there / here by response: median, 5th and 95th percentile."""
    spread = dict.fromkeys(("median ratio", "5 %", "95 %"))
    if torch.is_tensor(here):
        ratio = (there / here)[here > 0].double()
        values = ratio.quantile(torch.tensor([0.5, 0.05, 0.95]).to(ratio)).tolist()
        spread, here, there = dict(zip(spread, values, strict=True)), here.mean().item(), there.mean().item()
    line = {"departure": what, "of": quantity, "here": here, "there": there}
    return line | {"change": there / here - 1} | spread


@torch.no_grad()
def departures(run) -> dict:
    """Every departure on the run's last state, with its k, on its held-out pairs. run: of load_run."""
    load_weights(run.policy.lm, run.states[-1])
    k, sae, policies = run.k, run.sae, (run.reference, run.policy)
    (h_ref, owner), (h, _) = (read_states(policy, run.pairs, run.n, **run.rows) for policy in policies)
    lengths = owner.bincount()
    c_ref, c = (pooled_features(x, sae, owner, lengths) for x in (h_ref, h))
    prompt, chosen, rejected = run.pairs.sizes[: run.n].to(h.device).unbind(1)
    row_lengths = torch.cat([prompt + chosen, prompt + rejected])
    y_ref, y = (policy.lm.model.norm(x) for policy, x in zip(policies, (h_ref, h), strict=True))
    behind_norm = (pooled_features(x, sae, owner, lengths) for x in (y, y_ref))

    here, others = losses.feature_mse(c, c_ref, k=k), {}
    for batch in (1, 8, 32):
        both = (padded(x, lengths, row_lengths, batch) for x in (c, c_ref))
        others[f"pooled over padding, pairs in batches of {batch}"] = losses.feature_mse(*both, k=k)
    others["SAE behind the final norm"] = losses.feature_mse(*behind_norm, k=k)
    others["I_k: the policy's top k alone"] = policy_top_mse(c, c_ref, k)
    for n in (k, 4 * k):
        others[f"cache of the reference's top {n}"] = losses.feature_mse(c, keep_top(c_ref, n), k=k)
    lines = [departure(what, "D_FPO", here, there) for what, there in others.items()]
    fits = [sae_figures(sae, x) for x in (h_ref, y_ref)]
    for name in ("fvu", "l0"):
        lines.append(departure("SAE behind the final norm", name, *(fit[name] for fit in fits)))
    active = (c_ref > 0).sum(1).double().mean().item()  # what the exact cache holds of a response
    return {"k": k, "m": sae.m, "active": active, "lines": lines}


# ---------------------------------------------------------------------------- the run
def make_run(out: Path, *flags):
    """Train FPO on the toy. Of its states train.py keeps the last; the others are copied to OUT/along."""
    along = out / "along"
    shutil.rmtree(along, ignore_errors=True)

    def loss_function(*args, **settings):  # train.py calls it at every step
        for state in train.saved_states(out):
            shutil.copytree(state, along / state.name, dirs_exist_ok=True)
        return fpo.method_loss(*args, **settings)

    words = ["--preset", "toy", "--save_every", "5", "--eval_every", "0", "--out", str(out), *flags]
    train.main(train.parse_args(words), loss_function=loss_function)


def load_weights(lm, folder):
    """Put a state's weights into the model. UserError where they are not whole, as FSDP's are not."""
    stored = load_file(folder / "rank_0.safetensors", device=str(lm.device))
    for name, parameter in lm.named_parameters():
        value = stored.get(f"weight/lm.{name}")
        if value is None or value.shape != parameter.shape:
            train.refuse(f"{folder}: no whole {name}; a run without --shard fsdp is needed")
        parameter.data.copy_(value)


def load_run(out: Path, n: int) -> SimpleNamespace:
    """A run of train.py: its states (those that make_run kept, and the last), and what it stands on.

    n: held-out pairs to take, 0 for all. UserError for a run without states, of an SAE that does not read the
    last layer's residual stream, or whose reference has changed since.
    """
    states = [*sorted((out / "along").glob("step_*")), *train.saved_states(out)]
    if not states:
        train.refuse(f"--run {out}: no states; train.py writes one with --save_every")
    meta = json.loads((states[-1] / "state.json").read_text())
    config, device = train.Config(**meta["settings"]), data.start_processes()
    (sae, *_), sites = train.load_saes(config, device)
    dtype, names = train.torch_dtype(config, device), (config.reference, config.model)
    lms = [train.load_lm(name, device, dtype=dtype).eval() for name in names]
    if sites != [(lms[0].config.num_hidden_layers - 1, "res")]:
        train.refuse(f"--run {out}: its SAE reads {sites}; Theorem B.1 is of the last layer's `res`")
    if meta["stands_on"]["reference"] != train.weights_digest(lms[0]):
        train.refuse(f"--run {out}: {config.reference} is not what it was trained against")
    tokenizer = data.load_tokenizer(config.model)
    pairs = train.load_data("eval_dataset", config, tokenizer)
    reference, policy = (fpo.Policy(lm, [sae.to(device)], sites) for lm in lms)
    return SimpleNamespace(
        states=states, reference=reference, policy=policy, sae=sae, k=config.k, seed=config.seed, pairs=pairs,
        n=min(len(pairs), n or len(pairs)), rows=train.rows_of(config, tokenizer, pairs, device),
    )  # fmt: skip


# ---------------------------------------------------------------------------- what comes out
def markdown(head, rows) -> str:
    """A Markdown table; the first column is text."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *([shown(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(value) -> str:
    """A cell: text, a number, or what `summarise` says of a bound."""
    if isinstance(value, dict):
        return "{mean:.2g} (× {ratio:.2g}; {holds:.0%}, {below:.0%})".format(**value)
    return f"{value:.3g}" if isinstance(value, float) else str(value or "–")


def table_of(task: str, record) -> str:
    """KL, its bounds and what the theorem leaves out at five states of the run; or every departure."""
    if task == "departures":
        counts = "k = {k} of {m} features; c̄_ref has {active:.0f} that are not 0.\n\n".format(**record)
        return counts + markdown(list(record["lines"][0]), [line.values() for line in record["lines"]])
    every = record["rows"]
    states = [every[i] for i in sorted({round(len(every) ** (i / 4)) - 1 for i in range(5)})]
    head = f"mean, nats (× median of bound / KL; share where it holds, is below {record['ceiling']:.1f})"
    rows = [[label, *(state[name] for state in states)] for name, label in LINES.items()]
    return markdown([head, *(f"step {state['step']}" for state in states)], rows)


def draw_bounds(record, path):
    """KL and its bounds over training, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    rows, grey = record["rows"], "#7f7f7f"
    lines = {LINES["kl"]: (grey, [row["kl"] for row in rows])}
    lines |= {
        label: (colour, [row[name]["mean"] for row in rows]) for name, (label, colour) in BOUNDS.items()
    }
    lines["2 cap + log V"] = "#bbbbbb", [record["ceiling"]] * len(rows)
    figure = Figure(figsize=(6, 4.4), layout="constrained")
    ax = figure.subplots()
    for label, (colour, y) in lines.items():
        ax.plot([row["step"] for row in rows], y, color=colour, label=label)
    ax.set(yscale="log", xlabel="training step", ylabel="nats, mean")
    for text in (ax.xaxis.label, ax.yaxis.label):
        text.set_color(grey)
    ax.tick_params(colors=grey, which="both")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=grey, fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "theorem"}):  # the same bytes for the same figure
        figure.savefig(path, transparent=True, metadata={"Date": None})


def main(argv=None):
    """Measure, write, print."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = train.refuse
    parser.add_argument("task", choices=("bounds", "departures"))
    parser.add_argument("--run", default=RUN, help=f"a run of train.py ({RUN}: the toy's, made if missing)")
    parser.add_argument("--pairs", type=int, default=0, help="held-out pairs to take (0: all)")
    parser.add_argument("--json", default="assets/theorem.json", help="file; table and figure go beside it")
    args = parser.parse_args(argv)
    out, path = Path(args.run), Path(args.json)
    data.check_output("json", path, folder=False)
    if args.run == RUN and not (out / "scores.json").exists():
        make_run(out)
    run = load_run(out, args.pairs)
    found = {"bounds": bounds, "departures": departures}[args.task](run)
    found |= {**data.made_by(), "seed": run.seed, "pairs": run.n, "seconds": time.perf_counter() - began}
    results = (json.loads(path.read_text()) if path.exists() else {}) | {args.task: found}
    how = "`{command}` (commit {commit}, seed {seed}, {pairs} pairs; {hardware}, {seconds:.0f} s)\n\n"
    text = "\n".join(how.format(**record) + table_of(task, record) for task, record in results.items())
    data.write_json(path, results)
    data.write_text(path.with_suffix(".md"), text)
    if args.task == "bounds":
        draw_bounds(found, path.with_suffix(".svg"))
    print(text)


if __name__ == "__main__":
    data.run_script(main)
