"""What the paper's theorem says of a trained model, and what each departure from the paper would change.

    python claims.py theorem       Theorem B.1 and Lemma B.7 along a run of FPO, on held-out pairs
    python claims.py departures    the trained model's D_FPO, as other implementations would have it

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

M counts none of 2 to 5, so it bounds nothing by itself: where rms(h) is small the inequality fails. And FPO
holds down D_FPO, of features averaged over a response; k D_FPO ≤ ‖Δc̄‖² ≤ mean ‖Δc‖² (Jensen) is the wrong
way round for the theorem. No KL exceeds 2 cap + log V, the ceiling: a bound above it says nothing.

Measured on the toy world (assets/claims.md): every bound holds at every position. Hoeffding's is about ten
times the KL, the lemma's a thousand times, the theorem's a million times and from step 10 on above the
ceiling everywhere; norm and softcap take three quarters off. The condition fails: an SAE that misses 2 % of
the states' variance misses about as much of their change as there is (‖Δe‖ ≈ ‖Δh‖).
"""

import argparse
import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

import fpo
import losses
import offline
import presets
import reproduce
import resume
from chunked import pooled_features
from data import collate, load_pairs
from sae import SiteHook

RUN = {"method": "fpo", "save_every": 5, "keep": 10_000, "eval_every": 0, "eval_samples": 0}
BOUNDS = {  # key: label, colour of its line
    "range": ("(max Δz − min Δz)² / 8", "#3a9d4f"),
    "lemma": ("½‖Δz‖² (Lemma B.7)", "#4c7fd9"),
    "theorem": ("(M²/2)‖Δc‖² (Theorem B.1)", "#d6336c"),
    "norm": ("… with final norm and softcap", "#d98324"),
    "whole": ("… and with Δe and ΔW", "#1fa3b5"),
}


# ---------------------------------------------------------------------------- what a model computes
@torch.no_grad()
def read_states(lm, pairs, n: int, **rows):
    """The last layer's states where the response tokens of the first `n` pairs are predicted.

    rows: layout and padding, as data.collate takes them.
    Returns h (N, d) in the model's dtype, as the block leaves it; owner (N,), which of the 2n responses a
    position belongs to: i for pair i's chosen, n + i for its rejected.
    """
    states, owners, last = [], [], lm.config.num_hidden_layers - 1
    for start in range(0, n, 8):
        batch = collate(pairs, range(start, min(n, start + 8)), **rows).to(lm.device)
        mask = fpo.attention_mask(batch, lm.config, lm.dtype)
        inputs = {"input_ids": batch.tokens, "position_ids": batch.positions, "attention_mask": mask}
        with SiteHook(lm, last) as hook:
            lm.model(**inputs, use_cache=False)
        states.append(hook.value.flatten(0, 1)[batch.state])
        owners.append(torch.cat([batch.index, n + batch.index])[batch.owner])
    return torch.cat(states), torch.cat(owners)


def logits_of(lm, h):
    """z (n, V), float64, as the model makes them of h (n, d): final norm, output embedding, softcap."""
    z, cap = lm.get_output_embeddings()(lm.model.norm(h)).double(), lm.config.final_logit_softcapping
    return z if cap is None else cap * torch.tanh(z / cap)


def sae_fit(sae, x) -> dict:
    """How an SAE fits x (N, d): FVU, Σ‖x − x̂‖² / Σ‖x − x̄‖², and L0, the mean number of active features."""
    error = active = 0.0
    for part in x.float().split(1024):
        c = sae.encode(part)
        error, active = error + (sae.decode(c) - part).double().square().sum(), active + (c > 0).sum()
    variance = (x.double() - x.double().mean(0)).square().sum()
    return {"FVU": (error / variance).item(), "L0": (active / len(x)).item()}


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

    h_ref, h (n, d), of the reference and of the policy; norms: of weight_norms. Also "dc", "de", "dh", the
    norms of Δc, Δe, Δh.
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
    share = lambda where: where.double().mean().item()  # noqa: E731
    for name in BOUNDS:
        bound = table[name]
        row[name] = {"mean": bound.mean().item(), "ratio": (bound / kl)[kl > 1e-12].median().item()}
        row[name] |= {"holds": share(kl <= bound), "below": share(bound < ceiling)}
    row["middle"] = (table["theorem"] / table["lemma"]).sqrt().nanmedian().item()
    return row | {"missed": (table["de"] / table["dh"]).nanmedian().item()}


def pooling(table, owner, c_ref, c, k: int) -> dict:
    """What pooling leaves of the features' change: of a response mean ‖Δc‖², ‖Δc̄‖² and k D_FPO; means.

    table: of position_bounds; owner (N,); c_ref, c (R, m), pooled.
    """
    counts, squares = owner.bincount(minlength=len(c)), table["dc"].square()
    mean = torch.zeros_like(squares[: len(c)]).index_add(0, owner, squares) / counts
    found = {"mean ‖Δc‖²": mean, "‖Δc̄‖²": (c - c_ref).square().sum(-1)}
    found["k D_FPO"] = k * losses.feature_mse(c, c_ref, k=k)
    return {name: value.mean().item() for name, value in found.items()}


def theorem(run) -> dict:
    """The theorem at every saved state of a run. run: of load_run."""
    h_ref, owner = read_states(run.reference, run.pairs, run.n, **run.rows)
    c_ref = pooled_features(h_ref, run.sae, owner, owner.bincount())
    cap, V = run.reference.config.final_logit_softcapping, len(run.reference.get_output_embeddings().weight)
    ceiling, rows = 2 * (cap or math.inf) + math.log(V), []
    for folder in tqdm(run.states, "theorem", unit=" states"):
        load_weights(run.policy, folder)
        norms = weight_norms(run.reference, run.policy, run.sae)
        h, _ = read_states(run.policy, run.pairs, run.n, **run.rows)
        parts = zip(h_ref.split(256), h.split(256), strict=True)
        parts = [position_bounds(run.reference, run.policy, run.sae, *part, norms) for part in parts]
        table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        c = pooled_features(h, run.sae, owner, owner.bincount())
        row = {"step": int(folder.name.removeprefix("step_")), **summarise(table, ceiling)}
        row |= {"fvu": sae_fit(run.sae, h)["FVU"], "pooled": pooling(table, owner, c_ref, c, run.settings.k)}
        rows.append(row | {"norms": {name: value.item() for name, value in norms.items()}})
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
    """c (R, m) with all but each row's n largest set to 0: what a cache of that size holds (--cache_top)."""
    top = c.topk(min(n, c.shape[1]))
    return torch.zeros_like(c).scatter(1, top.indices, top.values)


def departure(what: str, quantity: str, here, there) -> dict:
    """A line of the table; of D_FPO (R,) also there / here by response: median, 5th and 95th percentile."""
    line = {"departure": what, "quantity": quantity}
    if torch.is_tensor(here):
        ratio = (there / here)[here > 0].double()
        line["by_response"] = ratio.quantile(torch.tensor([0.5, 0.05, 0.95]).to(ratio)).tolist()
        here, there = here.mean().item(), there.mean().item()
    return line | {"here": here, "there": there, "change": there / here - 1}


@torch.no_grad()
def departures(run) -> dict:
    """Every departure on the run's last state, with its k, on its held-out pairs. run: of load_run."""
    load_weights(run.policy, run.states[-1])
    k, sae, models = run.settings.k, run.sae, (run.reference, run.policy)
    (h_ref, owner), (h, _) = (read_states(lm, run.pairs, run.n, **run.rows) for lm in models)
    pool = lambda x: pooled_features(x, sae, owner, owner.bincount())  # noqa: E731
    c_ref, c = pool(h_ref), pool(h)
    lines, mse = [], losses.feature_mse(c, c_ref, k=k)
    line = lambda what, there: lines.append(departure(what, "D_FPO", mse, there))  # noqa: E731

    prompt, chosen, rejected = run.pairs.bounds[: run.n].diff(dim=1).to(h.device).unbind(1)
    sizes = owner.bincount(), torch.cat([prompt + chosen, prompt + rejected])
    for batch in (1, 8, 32):
        both = (padded(x, *sizes, batch) for x in (c, c_ref))
        line(f"pooled over padding, pairs in batches of {batch}", losses.feature_mse(*both, k=k))
    y_ref, y = (lm.model.norm(x) for lm, x in zip(models, (h_ref, h), strict=True))
    fits, what = [sae_fit(sae, x) for x in (h_ref, y_ref)], "SAE behind the final norm"
    lines += [departure(what, f"{name}, reference", *(fit[name] for fit in fits)) for name in fits[0]]
    line(what, losses.feature_mse(pool(y), pool(y_ref), k=k))
    line("I_k: the policy's top k alone", policy_top_mse(c, c_ref, k))
    for n in (k, 4 * k):
        line(f"cache of the reference's top {n}", losses.feature_mse(c, keep_top(c_ref, n), k=k))
    active = (c_ref > 0).sum(1).double().mean().item()  # what the exact cache holds of a response
    return {"k": k, "m": sae.m, "active": active, "lines": lines}


# ---------------------------------------------------------------------------- the run
def load_weights(lm, folder):
    """Put a resume state's weights into the model. ValueError where they are not whole, as FSDP's are not."""
    stored = load_file(folder / "rank_0.safetensors", device=str(lm.device))
    for name, parameter in lm.named_parameters():
        value = stored.get(f"weight/lm.{name}")
        if value is None or value.shape != parameter.shape:
            raise ValueError(f"{folder}: no whole {name}; a run without --shard fsdp is needed")
        parameter.data.copy_(value)


def load_run(folder: Path, preset: str, pairs: int) -> argparse.Namespace:
    """A run of train.py: settings (its config.json), states, reference, policy, sae, pairs, n of them, rows.

    The toy's is trained if missing. Raises ValueError for a run without states, of an SAE that does not read
    the last layer's residual stream, or whose reference has changed since.
    """
    words = reproduce.command("train.py", 1, {"preset": preset, **RUN, "out": folder})
    missing = not (folder / "scores.json").exists()
    if missing and (preset != "toy" or subprocess.run(words).returncode):
        raise ValueError(f"--run {folder}: no finished run; to make it: {presets.shown(words)}")
    settings = argparse.Namespace(**json.loads((folder / "config.json").read_text()))
    states, device = resume.saved_states(folder), presets.start_processes()
    if not states:
        raise ValueError(f"--run {folder}: no states; train it with --save_every N --keep M")
    dtype, names = presets.DTYPES[settings.dtype], (settings.reference, settings.model)
    reference, policy = (presets.load_lm(name, device, dtype=dtype).eval() for name in names)
    found, last = (settings.sae_layer, settings.sae_site), policy.config.num_hidden_layers - 1
    if found != ([last], "res"):
        raise ValueError(f"--run {folder}: SAE of {found}; Theorem B.1 is of the last layer, [{last}], res")
    trained_against = json.loads((states[-1] / "state.json").read_text())["reference"]
    if trained_against != offline.digest(reference.state_dict()):
        raise ValueError(f"--run {folder}: {settings.reference} is not what it was trained against")
    tokenizer, limits = presets.load_tokenizer(settings.model), ("max_length", "max_prompt_length")
    data = load_pairs(settings.eval_dataset, tokenizer, **{name: getattr(settings, name) for name in limits})
    (sae,), _ = presets.load_saes(settings, device)
    return argparse.Namespace(
        settings=settings, states=states, reference=reference, policy=policy, sae=sae.to(device), pairs=data,
        n=min(len(data), pairs or len(data)), rows=presets.rows_of(settings, tokenizer, data, device),
    )  # fmt: skip


# ---------------------------------------------------------------------------- what comes out
def markdown(head, rows) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def theorem_table(record) -> str:
    """KL, its bounds, and what the theorem leaves out, at five states of the run."""
    every, columns = record["rows"], {}
    for row in (every[i] for i in sorted({round(len(every) ** (i / 4)) - 1 for i in range(5)})):
        cells = columns[f"step {row['step']}"] = {"KL(π_ref‖π_θ)": f"{row['kl']:.2g}"}
        for name, (label, _) in BOUNDS.items():
            cells[label] = "{mean:.2g} (× {ratio:.2g}; {holds:.0%}, {below:.0%})".format(**row[name])
        cells["M‖Δc‖ / ‖Δz‖, median"] = f"{row['middle']:.2g}"
        cells["‖Δe‖ / ‖Δh‖, median"] = f"{row['missed']:.2f}"
        cells["FVU of h_θ"] = f"{row['fvu']:.3f}"
        cells["‖ΔW‖₂ / ‖W_ref‖₂"] = f"{row['norms']['dW'] / row['norms']['W_ref']:.2g}"
        cells |= {name: f"{value:.2g}" for name, value in row["pooled"].items()}
    head = f"mean, nats (× median of bound / KL; share where it holds, is below {record['ceiling']:.1f})"
    return markdown([head, *columns], [[label, *(c[label] for c in columns.values())] for label in cells])


def departures_table(record) -> str:
    """Every departure: the value here, with it, and by response."""
    lines = []
    for line in record["lines"]:
        spread = "{:.3f} [{:.3f}, {:.3f}]".format(*line["by_response"]) if "by_response" in line else "–"
        values = f"{line['here']:.3g}", f"{line['there']:.3g}", f"{line['change']:+.1%}"
        lines.append([line["departure"], line["quantity"], *values, spread])
    head = ["departure", "of", "here", "with it", "change", "ratio by response: median [5 %, 95 %]"]
    counts = "k = {k} of {m} features; c̄_ref has {active:.0f} that are not 0.\n\n".format(**record)
    return counts + markdown(head, lines)


def draw_theorem(record):
    """KL and its bounds over training; beside them what pooling leaves of the features' change."""
    titles, rows = ["KL and its bounds", "what FPO holds down"], record["rows"]
    figure, (left, right) = reproduce.panels(titles, "training step", ["nats, mean", "activation², mean"])
    steps, lines = [row["step"] for row in rows], {"lw": 1.2}
    left.plot(steps, [row["kl"] for row in rows], color=reproduce.GREY, lw=3, label="KL(π_ref‖π_θ)")
    left.axhline(record["ceiling"], color=reproduce.GREY, ls=":", lw=1, label="2 cap + log V")
    for name, (label, colour) in BOUNDS.items():
        left.plot(steps, [row[name]["mean"] for row in rows], color=colour, label=label, **lines)
    for name, key in zip(rows[0]["pooled"], ("theorem", "lemma", "range"), strict=True):
        heights = [row["pooled"][name] for row in rows]
        right.plot(steps, heights, color=BOUNDS[key][1], label=name, **lines)
    for ax in (left, right):
        ax.set_yscale("log")
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "ncols": 2}
        ax.legend(**place, frameon=False, labelcolor=reproduce.GREY, fontsize=8)
    figure.set_figheight(4.4)
    return figure


def publish(path: Path, results: dict):
    """Write the results as JSON, their tables beside it as Markdown, the figure as SVG."""
    import matplotlib

    offline.write_json(path, results)
    tables = {"theorem": theorem_table, "departures": departures_table}
    texts = {what: table(results[what]) for what, table in tables.items() if what in results}
    how = "`{command}` (commit {commit}, seed {seed}, {pairs} pairs; {hardware}, {seconds:.0f} s)\n\n"
    text = "\n".join(how.format(**results[what]) + text for what, text in texts.items())
    offline.write_text(path.with_suffix(".md"), text)
    if "theorem" in results:
        with matplotlib.rc_context({"svg.hashsalt": "theorem"}):  # the same bytes for the same figure
            drawn = io.StringIO()
            draw_theorem(results["theorem"]).savefig(drawn, format="svg", metadata={"Date": None})
        offline.write_text(path.with_name("theorem.svg"), drawn.getvalue())
    print(*texts.values(), sep="\n")


def parse_args(argv=None):
    """Flags; what is not given follows from the preset."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=("theorem", "departures"))
    parser.add_argument("--preset", default="toy", choices=presets.PRESETS, help="of the run (toy)")
    parser.add_argument("--run", help="a run with its states (runs/PRESET/claims; the toy's is made)")
    parser.add_argument("--pairs", type=int, default=0, help="held-out pairs to take; 0: all")
    parser.add_argument("--json", default="assets/claims.json", help="file; table and figure go beside it")
    args = presets.parse_flags(parser, argv)
    args.run, args.json = Path(args.run or f"runs/{args.preset}/claims"), Path(args.json)
    if args.json.suffix != ".json":
        raise ValueError(f"--json {args.json}: must end in .json")
    presets.check_output("json", args.json, folder=False)
    return args


def main(argv=None):
    """Measure, write, print."""
    began = time.perf_counter()
    with presets.one_line_errors():
        args = parse_args(argv)
        results = json.loads(args.json.read_text()) if args.json.exists() else {}
        run = load_run(args.run, args.preset, args.pairs)
        found = {"theorem": theorem, "departures": departures}[args.what](run)
    how = {**presets.made_by(), "seed": run.settings.seed, "pairs": run.n}
    how |= {"seconds": round(time.perf_counter() - began, 1), "settings": vars(run.settings)}
    publish(args.json, results | {args.what: how | found})


if __name__ == "__main__":
    sys.exit(main())
