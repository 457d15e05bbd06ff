"""The paper's tables and figures, what its review added, and methods at equal distance from the reference.

    python -m experiments.reproduce comparison    Table 2 right, Fig. 2 left, Fig. 3, Fig. 4 right; FPO by α
    python -m experiments.reproduce ablation      Tables 3, 6, 7; FPO without its parts; SAE afterwards; time
    python -m experiments.reproduce frontier      accuracy at equal KL and at equal D_FPO, over β and α
    python -m experiments.reproduce control       Table 4 on the toy
    python -m experiments.reproduce comparison --preset own --model SFT --dataset F --eval_dataset G ...

All other flags are train.py's, for every run. No score is computed here: train.py, eval_diversity.py and
experiments.control run as processes, on all cards that there are, and the keys of what they write are the
tables' columns (accuracies in %, entropies and KL in nats). A run that is done is not repeated. ± is the
sample's deviation (n − 1) over seeds: over orders of the data and draws of samples.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

import runtime
import toy
from eval_diversity import SHARED
from settings import PRESETS, TABLE_5
from settings import parse_args as parse_run_args

# Of each method the name, a colour legible on white and on black, and the paper's numbers of Gemma-2-2B, by
# the tables' columns (Tables 2 and 6; the review's largest and smallest log-ratio of a token, seconds).
PAPER_COLUMNS = ("paper_accuracy", "paper_entropy", "paper_ends", "paper_seconds")
LABELS = {
    "sft": ("SFT", "#8c8c8c", ()),
    "dpo": ("DPO", "#4c7fd9", (59.9, 1.66, "19, −25", 8609)),
    "tdpo1": ("TDPO-1", "#1fa3b5", (63.2, 1.65)),
    "tdpo2": ("TDPO-2", "#3a9d4f", (64.2, 1.68, "12, −13", 10420)),
    "simpo": ("SimPO", "#d98324", (63.4, 1.64, "28, −32", 7901)),
    "fpo": ("FPO", "#d6336c", (64.1, 1.68, "13, −15", 8290)),
    "simpo_kl": ("SimPO + KL", "#9a6cd0", (63.6, 1.66)),
    "free": ("FPO, α = 0", "#a9764a", ()),
}
METHODS, GREY = ("sft", "dpo", "tdpo1", "tdpo2", "simpo", "fpo"), "#7f7f7f"
# A table's line is (label, method, flags of train.py, the paper's values). A run is a line with a seed.
LINES = {method: (label, method, "", paper) for method, (label, _, paper) in LABELS.items()}
TABLE_3_LAYERS = {
    "res": {7: (57.2, 1.645), 13: (59.1, 1.612), 19: (59.7, 1.644), 25: (63.6, 1.680)},
    "mlp": {7: (57.4, 1.609), 13: (61.3, 1.637), 19: (62.4, 1.654), 25: (63.4, 1.671)},
}
TABLE_3_ALPHAS = {  # α: without and with stop-gradient
    0.1: ((64.1, 1.630), (64.0, 1.652)),
    0.5: ((63.7, 1.642), (63.6, 1.680)),
    1.0: ((63.4, 1.666), (62.7, 1.682)),
    2.0: ((61.9, 1.643), (62.1, 1.679)),
}
TABLE_7 = {(25,): (64.1, 1.68), (0, 25): (62.1, 1.70), (12, 25): (61.9, 1.64), (24, 25): (58.2, 1.66)}
TABLE_7[0, 12, 25] = (51.4, 1.66)
# The toy's 4 layers stand for those of Gemma's 26 that Tables 3 and 7 name.
TOY_LAYER = {0: 0, 7: 0, 12: 1, 13: 1, 19: 2, 24: 2, 25: 3}
# Gemma Scope's L0 nearest to the authors' 55, by site and layer.
GEMMA_L0 = {
    "res": {0: 46, 7: 69, 12: 41, 13: 43, 19: 40, 24: 38, 25: 55},
    "mlp": {7: 60, 13: 47, 19: 50, 25: 59},
}
ALPHAS = (0.0, 0.2, 1.0, 2.0, 4.0, 20.0, 100.0)  # of FPO, times the preset's
STATE_ALPHAS = (0.05, 0.15, 0.5, 2.0)  # of FPO without the SAE
BETAS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FRONTIER = {  # every β, every α for each (FPO's times the preset's); γ is the preset's
    "dpo": (BETAS, (None,)),
    "tdpo1": (BETAS, (None,)),
    "tdpo2": (BETAS[:4], (0.25, 0.5, 1.0)),
    "simpo": ((0.5, 2.0, 5.0, 10.0, 20.0, 50.0), (None,)),
    "free": ((0.1, 0.3, 1.0, 3.0, 10.0, 30.0), (0.0,)),
    "fpo": ((0.1, 1.0, 3.0, 10.0), (0.2, 1.0, 4.0)),
}

STYLE = dict.fromkeys(("axes.titlecolor", "axes.labelcolor", "axes.edgecolor", "legend.labelcolor"), GREY)
STYLE |= {"xtick.color": GREY, "ytick.color": GREY, "axes.titlesize": 11, "axes.labelsize": 11}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


# ---------------------------------------------------------------------------- runs
def name_of(method: str, flags: str) -> str:
    """A name for the runs of a line: the same settings, the same name, in whichever table."""
    return "_".join(re.findall(r"[\w.-]+", f"{method} {flags.replace('--', '')}"))


def scoring_flags(train_flags: list[str]) -> str:
    """Those of train.py's flags that eval_diversity.py takes; its --dataset is the held-out pairs."""
    names = {f"--{name}": f"--{name}" for name in SHARED}
    names |= {"--dataset": "--train_pairs", "--eval_dataset": "--dataset"}
    words, keep = [], False
    for word in train_flags:
        keep = word in names if word.startswith("--") else keep
        words += [names.get(word, word)] if keep else []
    return shlex.join(words if "--train_pairs" in words else ["--train_pairs", *words])  # alone: the preset's


def make_run(args, method: str, flags: str, seed: int) -> dict:
    """The commands of a training and its evaluation; `sft` is the start itself, which is only evaluated.

    method: one of train.py's, or a variant of FPO that experiments.control trains.
    """
    name, preset, own = name_of(method, flags), f"--preset {args.preset}", shlex.join(args.train_flags)
    out, task = f"{args.out}/{name}_seed{seed}", f"train.py --method {method}"
    if method not in TABLE_5:
        task = f"-m experiments.control --task {method}"
    models = f"--model {args.start if method == 'sft' else f'{out}/model'} --reference {args.start}"
    training = f"{args.python} {task} {preset} --model {args.start} --seed {seed} --out {out}"
    training += f" --eval_every {args.eval_every} --eval_kl {own} {flags}"
    scoring = f"{args.python} eval_diversity.py {preset} {models} {scoring_flags(args.train_flags)}"
    scoring += f" --seed {seed} --samples {args.samples} --features_top 50 --json {out}/scored.json"
    measure = "styles" if args.task == "control" else "measure"
    measuring = f"python -m experiments.control --task {measure} {preset} {own} {models}"
    measuring += f" --seed {seed}" * (args.task == "control") + f" --json {out}/measured.json"
    commands = [training] if method != "sft" else []
    if args.task != "frontier":  # training's own evaluations are enough there
        commands += [scoring] if flags and args.task != "control" else [scoring, measuring]
    commands = [" ".join(text.split()) for text in commands]
    return {"name": name, "method": method, "seed": seed, "folder": out, "commands": commands}


def read_json(path) -> dict:
    """What a JSON file holds; {} where there is none."""
    return json.loads(Path(path).read_text()) if Path(path).exists() else {}


def do_run(run: dict) -> str:
    """The run's commands in turn, unless run.json, which comes last, tells of the same. Its folder."""
    folder, began = Path(run["folder"]), time.perf_counter()
    if run.items() <= read_json(folder / "run.json").items():
        return run["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").unlink(missing_ok=True)
    with open(folder / "log.txt", "w") as log:
        for text in run["commands"]:
            words, env = [sys.executable, *shlex.split(text)[1:]], {**os.environ, "OMP_NUM_THREADS": "1"}
            if status := subprocess.run(words, stdout=log, stderr=log, env=env).returncode:
                raise runtime.UserError(f"{text}: ended with status {status}, see {folder / 'log.txt'}")
    made = runtime.made_by() | {"seconds": round(time.perf_counter() - began, 1)}
    runtime.write_json(folder / "run.json", run | made)
    return run["folder"]


def do_lines(args, lines) -> list[dict]:
    """Do the runs of some tables' lines, `at_once` side by side, and return their rows of results.json."""
    weights = sorted(Path(args.start).glob("*.safetensors"))
    start = [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]
    runs = {}  # by folder: tables share runs
    for (_, method, flags, _), seed in itertools.product(lines, args.seeds):
        run = make_run(args, method, flags, seed) | {"start": start}
        runs[run["folder"]] = run
    with ThreadPoolExecutor(args.at_once) as pool:
        for number, folder in enumerate(pool.map(do_run, runs.values()), 1):
            print(f"{number} of {len(runs)} runs: {folder}", flush=True)
    return [collect(folder) for folder in runs]


# ---------------------------------------------------------------------------- numbers
def collect(folder: str) -> dict:
    """A row of results.json: how a run was made, its scores, and those of held-out pairs over training."""
    files = ("run", "config", "scored", "measured", "scores")
    run, config, scores, measured, ends = (read_json(f"{folder}/{name}.json") for name in files)
    measured.pop("feature_change", None)  # long: the figure reads it from the run's folder
    scores, curve = scores | measured, []
    if "train" in scores:  # Table 2's protocol
        scores["train_accuracy"] = scores["train"]["accuracy"]
    if ends:  # SFT is not trained
        steps = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        scores["train_seconds"] = sum(config["batch_size"] / step["pairs_per_s"] for step in steps)
        held_out = {0: ends["before"]}
        for step in steps:
            found = {name[5:]: value for name, value in step.items() if name.startswith("eval_")}
            held_out |= {step["step"]: found} if found else {}
        held_out[steps[-1]["step"]] = ends["after"]
        curve = [{"step": step, **found} for step, found in held_out.items()]
    floor = (config.get("audit", {}).get("floor") or 0) / statistics.mean(config.get("units") or [1])
    return run | {"scores": scores, "curve": curve, "floor": floor}  # D_FPO that rounding makes


def values_of(rows: list[dict], name: str, key: str) -> list[float]:
    """A score of every seed of the runs of this name."""
    return [row["scores"][key] for row in rows if row["name"] == name and key in row["scores"]]


def table(rows, lines, columns) -> str:
    """A Markdown table of means over seeds, `mean ± deviation`; of one seed the value alone, of none a dash.

    columns: keys of the scores, shares in %, and some of PAPER_COLUMNS.
    """
    units = {key: "accuracy" in key or "share" in key or key == "fvu" for key in columns}  # whether in %
    heads = ["", *(key.replace("_", " ") + " (%)" * in_percent for key, in_percent in units.items())]
    text = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * len(columns) + "|"]
    for label, method, flags, papers in lines:
        paper, cells = dict(zip(PAPER_COLUMNS, papers, strict=False)), [label]
        for key, in_percent in units.items():
            values = [100 * v if in_percent else v for v in values_of(rows, name_of(method, flags), key)]
            mean = f"{statistics.mean(values):.4g}" if values else str(paper.get(key, "–"))
            cells.append(mean + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""))
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


# ---------------------------------------------------------------------------- figures
def draw(panels, legend_columns=7):
    """A row of panels over one legend, transparent, in mid-grey: legible on white and on black.

    panels: (title, label of x, label of y, {method, or any label: (x, y of each seed)}). A line is the mean
    over seeds, shaded by the sample's deviation. Returns the figure, at most 900 pixels wide.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(min(9.4, 1 + 4 * len(panels)), 3.4), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (title, xlabel, ylabel, lines) in zip(axes, panels, strict=True):
            ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
            ax.patch.set_alpha(0)
            for name, (x, seeds) in lines.items():
                label, colour, _ = LABELS.get(name, (name, None, ()))
                y = np.mean(seeds, 0)
                ax.plot(x, y, color=colour, label=label)
                if len(seeds) > 1:
                    d = np.std(seeds, 0, ddof=1)
                    ax.fill_between(x, y - d, y + d, color=colour, alpha=0.2, linewidth=0)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=legend_columns)
    return figure


def draw_curves(rows, key: str, what: str):
    """Fig. 3 (key "kl") or Fig. 4 right ("mse"): D of chosen, of rejected, and |β D(y_l) − β D(y_w)|.

    Each is a mean over held-out pairs, then over seeds. β is 0.1 for all methods.
    """
    panels = []
    for side in ("chosen", "rejected", "margin"):
        lines = {}
        for name in METHODS[1:]:
            curves = [row["curve"] for row in rows if row["name"] == name]
            values = [[point[f"{key}_{side}"] for point in curve] for curve in curves]
            lines[name] = [point["step"] for point in curves[0]], values
        floor = max(row.get("floor", 0) for row in rows)
        if key == "mse" and side != "margin" and floor > 0:
            lines["rounding alone"] = [0, max(point["step"] for point in curves[0])], [[floor, floor]]
        panels.append((side, "training step", "|β D(y_l) − β D(y_w)|" if side == "margin" else what, lines))
    return draw(panels)


def draw_features(rows):
    """Fig. 2 left, and what it leaves open: which features move.

    The 50 largest pooled activations by rank, of the first seed; and mean |c̄_θ − c̄_ref| of the 50 features
    that DPO moves most, in DPO's order, mean over seeds.
    """
    largest, change, rank = {}, {}, range(1, 51)
    for name in METHODS:
        mine = [row for row in rows if row["name"] == name]
        largest[name] = rank, [mine[0]["scores"]["activations_policy"]]
        seeds = [read_json(f"{row['folder']}/measured.json")["feature_change"] for row in mine]
        change[name] = np.mean(seeds, 0)  # (m,)
    most = np.argsort(-change["dpo"], kind="stable")[:50]
    moved = {name: (rank, [values[most]]) for name, values in change.items()}
    left = ("largest activations", "feature, by its rank", "mean c̄", largest)
    right = ("moved by training", "feature, by its rank under DPO", "mean |c̄_θ − c̄_ref|", moved)
    return draw([left, right])


def save(figure, path: Path):
    """A figure as SVG: the same bytes for the same figure."""
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


def publish(args, rows, tables: dict, figures: dict):
    """Write rows into results.json, the tables as TASK.md, the figures as SVG; print the tables."""
    assets, text = Path(args.assets), "\n".join(f"**{title}**\n\n{body}" for title, body in tables.items())
    results = read_json(assets / "results.json") | {args.task: runtime.made_by() | {"rows": rows}}
    runtime.write_json(assets / "results.json", results)
    runtime.write_text(assets / f"{args.task}.md", text)
    for name, figure in figures.items():
        save(figure, assets / f"{name}.svg")
    print(text)


# ---------------------------------------------------------------------------- the paper's, and the review's
def sae_line(preset: str, layers, site: str, paper) -> tuple:
    """FPO with SAEs on the paper's layers, or on the toy's in their place."""
    mine = [TOY_LAYER[layer] for layer in layers] if preset == "toy" else layers
    here, there = (" ".join(map(str, numbers)) for numbers in (mine, layers))
    flags = f"--sae_site {site} --sae_layer {here}"
    if preset != "toy":
        l0s = " ".join(str(GEMMA_L0[site][layer]) for layer in layers)
        flags += f" --sae google/gemma-scope-2b-pt-{site} --sae_l0 {l0s}"
    flags = "" if (site, there) == ("res", "25") else flags  # the preset's
    return f"{site}, layer {here} (paper: {there})", "fpo", flags, paper


ENTROPIES = ("entropy", "teacher_forced_entropy", "teacher_forced_entropy_all", "paper_entropy")
DISTANCES = ("kl_chosen", "kl_rejected", "mse_chosen", "mse_rejected")
OURS = ("accuracy", "accuracy_sum", "reward_accuracy", "reward_accuracy_sum", "reward_accuracy_mean")
MAIN = ("train_accuracy", "paper_accuracy", "accuracy", *ENTROPIES, "kl_rejected", "mse_rejected")
SAE_FIT = ("l0", "fvu", "cross_entropy", "cross_entropy_spliced")
TOKENS = ("chosen_largest", "chosen_smallest", "rejected_largest", "rejected_smallest", "paper_ends")


def comparison(args):
    """Table 2 right, Fig. 2 left, Fig. 3, Fig. 4 right: six methods; and FPO over α."""
    methods, alphas = [LINES[method] for method in METHODS], []
    for alpha in (factor * args.alpha for factor in ALPHAS):
        flags = "" if alpha == args.alpha else f"--alpha {alpha:g}"
        alphas.append((f"α = {alpha:g}", "fpo", flags, ()))
    plan = {
        "Table 2, right: accuracy": (methods, ("train_accuracy", "paper_accuracy", *OURS)),
        "Table 2, right: entropy": (methods, ENTROPIES),
        "Distance from the reference": (methods, DISTANCES),
        "FPO by α": (alphas, ("accuracy", "entropy", *DISTANCES)),
    }
    rows = do_lines(args, methods + alphas)
    figures = {"kl": draw_curves(rows, "kl", "KL(ref‖policy) (nats)"), "features": draw_features(rows)}
    figures["mse"] = draw_curves(rows, "mse", "D_FPO (activation²)")
    publish(args, rows, {title: table(rows, *parts) for title, parts in plan.items()}, figures)


def equal_size_alpha(rows) -> float:
    """α at which FPO without the SAE ends with FPO's D_FPO: between STATE_ALPHAS' runs, in logarithms."""
    names = ["fpo", *(name_of("no_sae", f"--alpha {alpha:g}") for alpha in STATE_ALPHAS)]
    wanted, *D = (np.log(statistics.mean(values_of(rows, name, "mse_rejected"))) for name in names)
    D, alphas = zip(*sorted(zip(D, np.log(STATE_ALPHAS), strict=True)), strict=True)
    return float(f"{np.exp(np.interp(wanted, D, alphas)):.2g}")  # beyond them the nearest


def ablation(args):
    """Tables 3, 6 and 7, by the preset's SAE in every row; then what the review added."""
    # ---- lines
    layers, alphas, methods = [], [], [LINES[method] for method in METHODS]
    for site, papers in TABLE_3_LAYERS.items():
        layers += [sae_line(args.preset, [layer], site, paper) for layer, paper in papers.items()]
    for alpha, (through, stopped) in TABLE_3_ALPHAS.items():
        flags = "" if alpha == args.alpha else f"--alpha {alpha:g}"
        alphas.append((f"α = {alpha:g}, no stop-gradient", "fpo", f"{flags} --no_stop_gradient", through))
        alphas.append((f"α = {alpha:g}, with stop-gradient", "fpo", flags, stopped))
    several = [sae_line(args.preset, layers, "res", paper) for layers, paper in TABLE_7.items()]
    parts = [LINES["fpo"], ("no length normalisation", "no_length_norm", "", ())]
    parts += [(f"no SAE, α = {alpha:g}", "no_sae", f"--alpha {alpha:g}", ()) for alpha in STATE_ALPHAS]
    alpha = equal_size_alpha(do_lines(args, parts))
    parts.append((f"no SAE, α = {alpha:g}: FPO's D_FPO", "no_sae", f"--alpha {alpha:g}", ()))
    # ---- tables
    plan = {
        "Table 3, layer and site": (layers, MAIN),
        "Table 3, α and stop-gradient": (alphas, MAIN),
        "Table 6, SimPO + KL": ([LINES[name] for name in ("fpo", "simpo_kl", "simpo", "tdpo2")], MAIN),
        "Table 7, several layers": (several, MAIN),
        "FPO without its parts": (parts, (*OURS, *ENTROPIES[:3], "kl_rejected", "mse_rejected")),
        "The SAE before alignment (SFT) and after": (methods, SAE_FIT),
        "log π_θ − log π_ref of a token (nats)": (methods[1:], TOKENS),
        "Time of the training steps (s)": (methods[1:], ("train_seconds", "paper_seconds")),
    }
    rows = do_lines(args, [line for lines, _ in plan.values() for line in lines])
    publish(args, rows, {title: table(rows, *parts) for title, parts in plan.items()}, {})


def control(args):
    """Table 4 on the toy: D_FPO of a style's features alone, of as many by chance, of all, and of none."""
    sides = {"all": "fpo", "random": "random", "polite": "polite", "shout": "shout"}
    lines = [LINES["sft"], ("no constraint", "fpo", "--alpha 0", ())]
    lines += [(f"{name} features", method, "--alpha 10", ()) for name, method in sides.items()]
    rows, columns = do_lines(args, lines), ("accuracy", "entropy", *(f"share_{s}" for s in toy.STYLES))
    publish(args, rows, {"Table 4 on the toy world": table(rows, lines, columns)}, {})


# ---------------------------------------------------------------------------- the frontier
def best_within(rows, names, key: str, level: float) -> float:
    """A method's best held-out accuracy at a distance of at most `level`: that of its best setting.

    names: of its runs, a setting each. Of a run the best counts, at or between its evaluations; of a setting
    the mean over seeds.
    """
    best = {name: [] for name in names}
    for row in (row for row in rows if row["name"] in best):
        found = [point["accuracy"] for point in row["curve"] if point[key] <= level]
        for before, after in itertools.pairwise(row["curve"]):
            if before[key] <= level < after[key]:
                ends = ([point[name] for point in (before, after)] for name in (key, "accuracy"))
                found.append(np.interp(level, *ends))
        best[row["name"]].append(max(found))
    return max(map(statistics.mean, best.values()))


def compare(rows, settings: dict, key: str) -> tuple[str, dict]:
    """A table of methods at distances that all of them reach, the best at the largest first; and its lines.

    settings: {method: names of its runs}.
    """
    reach = {}
    for method, names in settings.items():
        reach[method] = max(point[key] for row in rows if row["name"] in names for point in row["curve"])
    most = min(reach.values())
    levels = [float(f"{share * most:.2g}") for share in (0.03, 0.1, 0.3, 1.0)]
    best, lines, curves = [], [], {}
    for method, names in settings.items():
        found = {f"accuracy_within_{level:g}": best_within(rows, names, key, level) for level in levels}
        best.append({"name": method, "scores": found})
        lines.append((f"{LABELS[method][0]} ({len(names)} settings)", method, "", ()))
        grid = [most / 50 * (50 * reach[method] / most) ** (i / 40) for i in range(41)]
        curves[method] = grid, [[best_within(rows, names, key, level) for level in grid]]
    lines.sort(key=lambda line: -values_of(best, line[1], list(found)[-1])[0])
    return table(best, lines, found), curves


def frontier(args):
    """Methods at equal distance from the reference: the best of their settings, at any step of training."""
    lines, settings = [], {}
    for method, (betas, alphas) in FRONTIER.items():
        for beta, alpha in itertools.product(betas, alphas):
            alpha = alpha * args.alpha if method == "fpo" else alpha
            flags = f"--beta {beta:g}" + ("" if alpha is None else f" --alpha {alpha:g}")
            lines.append(("", "fpo" if method == "free" else method, flags, ()))
            settings.setdefault(method, []).append(name_of(lines[-1][1], flags))
    rows, tables, panels = do_lines(args, lines), {}, []
    keys = {"kl_rejected": "KL of the rejected (nats)", "mse_rejected": "D_FPO of the rejected (activation²)"}
    for key, what in keys.items():
        tables[f"Held-out accuracy at equal {what}"], curves = compare(rows, settings, key)
        panels.append(("", what, "accuracy, held out", curves))
    figure = draw(panels)
    for ax, key in zip(figure.axes, keys, strict=True):  # every evaluation, a point
        ax.set_xscale("log")
        for method, names in settings.items():
            points = [point for row in rows if row["name"] in names for point in row["curve"][1:]]
            x, y = [point[key] for point in points], [point["accuracy"] for point in points]
            ax.scatter(x, y, s=6, color=LABELS[method][1], alpha=0.5, linewidths=0)
    publish(args, rows, tables, {"frontier": figure})


def parse_args(argv=None):
    """Our flags, and train.py's, which are checked. Defaults follow from the preset."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("task", choices=("comparison", "ablation", "frontier", "control"))
    flag("--preset", default="toy", choices=PRESETS, help="train.py's (toy)")
    flag("--model", help="the SFT model that all start from (the preset's, made if missing)")
    flag("--seeds", type=int, nargs="+", help="(0 1 2; frontier 0)")
    flag("--samples", type=int, default=25, help="responses a prompt for the entropy (25)")
    flag("--out", help="folder of all runs (runs/PRESET/reproduce, or control)")
    flag("--assets", default="assets", help="folder of results.json, tables and figures (assets)")
    args, args.train_flags = parser.parse_known_args(argv)
    allowed = {"ablation": ("toy", "gemma-2-2b"), "control": ("toy",)}.get(args.task, PRESETS)
    if args.preset not in allowed:
        raise runtime.UserError(f"{args.task} --preset {args.preset}: one of {', '.join(allowed)}")
    for word in args.train_flags:  # a run has its own seed; scoring_flags takes names as train.py spells them
        if re.match(r"--(seed|method|reference)$|--\w*[-=]", word):
            raise runtime.UserError(
                f"{word}: not taken here; write --NAME VALUE, with _, and --seeds for seeds"
            )
    is_toy = args.preset == "toy"
    cards = 0 if is_toy else torch.cuda.device_count()
    many = f" -m torch.distributed.run --standalone --nproc_per_node {cards}"
    args.python, args.at_once = "python" + many * (cards > 1), 1 if cards else 2  # a thread each
    args.seeds = args.seeds or ([0] if args.task == "frontier" else [0, 1, 2])
    args.eval_every = 200 if not is_toy else 10 if args.task == "frontier" else 25
    # Control measures other things of the same settings: its runs are its own.
    args.out = args.out or f"runs/{args.preset}/{'control' if args.task == 'control' else 'reproduce'}"
    args.start = args.model or ("runs/toy/model" if is_toy else f"runs/{args.preset}/sft/model")
    args.alpha = parse_run_args(["--preset", args.preset, "--model", args.start, *args.train_flags]).alpha
    return args


def main(argv=None):
    """What all runs start from, where it is missing; then the runs, the tables and the figures."""
    args = parse_args(argv)
    if args.preset == "toy":
        toy.make_world("runs/toy", all_saes=args.task == "ablation")
    elif not args.model and not Path(args.start).is_dir():
        sft = f"{args.python} train.py --method sft --preset {args.preset}"
        subprocess.run([sys.executable, *sft.split()[1:]], check=True)
    tasks = {"comparison": comparison, "ablation": ablation, "frontier": frontier, "control": control}
    tasks[args.task](args)


if __name__ == "__main__":
    runtime.run_script(main)
