"""The paper's tables and figures, what its review added, and methods at equal distance from the reference.

    python -m experiments.reproduce comparison    Table 2 right, Fig. 2 left, Fig. 3, Fig. 4 right; FPO by α
    python -m experiments.reproduce ablation      Tables 3, 6, 7; FPO without its parts; SAE afterwards; time
    python -m experiments.reproduce frontier      accuracy at equal KL and at equal D_FPO, over β and α
    python -m experiments.reproduce comparison --preset own --model SFT -- --dataset F --eval_dataset G ...

Flags after `--` are train.py's, for every run; its evaluation gets those that it takes too. No score is
computed here: train.py, eval_diversity.py and experiments.ablations run as processes, and the keys of what
they write are the tables' columns (accuracies in %, entropies and KL in nats). A run that is done is not
repeated. ± is the sample's deviation (n − 1) over seeds: over orders of the data and draws of samples.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import data
import train
from eval_diversity import SHARED

# One name and one colour a method; the colours are legible on white and on black.
LABELS = {"sft": ("SFT", "#8c8c8c"), "dpo": ("DPO", "#4c7fd9"), "tdpo1": ("TDPO-1", "#1fa3b5")}
LABELS |= {"tdpo2": ("TDPO-2", "#3a9d4f"), "simpo": ("SimPO", "#d98324"), "fpo": ("FPO", "#d6336c")}
METHODS, GREY = tuple(LABELS), "#7f7f7f"
LABELS |= {"simpo_kl": ("SimPO + KL", "#9a6cd0"), "free": ("FPO, α = 0", "#a9764a")}

# The paper's numbers, Gemma-2-2B on UltraFeedback, by the tables' columns: Tables 2 and 6; of the review the
# largest and smallest difference of token log-probabilities, and seconds of a run.
PAPER_COLUMNS = ("paper_accuracy", "paper_entropy", "paper_ends", "paper_seconds")
PAPER = {
    "dpo": (59.9, 1.66, "19, −25", 8609),
    "tdpo1": (63.2, 1.65),
    "tdpo2": (64.2, 1.68, "12, −13", 10420),
    "simpo": (63.4, 1.64, "28, −32", 7901),
    "simpo_kl": (63.6, 1.66),
    "fpo": (64.1, 1.68, "13, −15", 8290),
}
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
TABLE_7 |= {(0, 12, 25): (51.4, 1.66)}
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


# ---------------------------------------------------------------------------- one run
# A table's line is (label, method, flags of train.py, the paper's values). A run is a line with a seed.
def name_of(method: str, flags: str) -> str:
    """A name for the runs of a line: the same settings, the same name, in whichever table."""
    return "_".join(re.findall(r"[\w.-]+", f"{method} {flags.replace('--', '')}"))


def scoring_flags(train_flags: list[str]) -> str:
    """Those of train.py's flags that eval_diversity.py takes; its --dataset is the held-out pairs."""
    names = {f"--{name}": f"--{name}" for name in SHARED}
    names |= {"--dataset": "--train_pairs", "--eval_dataset": "--dataset"}
    words, keep = [] if "--dataset" in train_flags else ["--train_pairs"], False  # that is the preset's
    for word in train_flags:
        keep = word in names if word.startswith("--") else keep
        words += [names.get(word, word)] if keep else []
    return shlex.join(words)


def make_run(args, method: str, flags: str, seed: int) -> dict:
    """The commands of a training and its evaluation.

    Args:
        method: one of train.py's, or a variant of FPO that experiments.ablations trains; `sft` is the start
            itself, which is only evaluated.
    """
    name, preset, own = name_of(method, flags), f"--preset {args.preset}", shlex.join(args.train_flags)
    start, out, task = f"--model {args.start}", f"{args.out}/{name}_seed{seed}", f"train.py --method {method}"
    if method not in train.TABLE_5:
        task = f"-m experiments.ablations {method}"
    models = f"{start if method == 'sft' else f'--model {out}/model'} --reference {args.start}"
    python = "python"
    if args.ranks > 1:
        python += f" -m torch.distributed.run --standalone --nproc_per_node {args.ranks}"
    training = f"{python} {task} {preset} {start} --seed {seed} --out {out} --eval_every {args.eval_every}"
    scoring = f"{python} eval_diversity.py {preset} {models} {scoring_flags(args.train_flags)} --seed {seed}"
    scoring += f" --samples {args.samples} --features_top 50 --json {out}/scored.json"
    measuring = f"python -m experiments.ablations measure {preset} {own} {models} --json {out}/measured.json"
    commands = [] if method == "sft" else [f"{training} {own} {flags}"]
    if args.task != "frontier":  # training's own evaluations are enough there
        commands += [scoring] if flags else [scoring, measuring]
    commands = [" ".join(text.split()) for text in commands]
    return {"name": name, "method": method, "seed": seed, "folder": out, "commands": commands}


def read_json(path) -> dict:
    """What a JSON file holds; {} where there is no whole one."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def do_run(run: dict):
    """The run's commands in turn, output into log.txt; run.json comes last. UserError where one fails."""
    folder, began = Path(run["folder"]), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").unlink(missing_ok=True)
    with open(folder / "log.txt", "w") as log:
        for text in run["commands"]:
            words, env = [sys.executable, *shlex.split(text)[1:]], {**os.environ, "OMP_NUM_THREADS": "1"}
            if status := subprocess.run(words, stdout=log, stderr=log, env=env).returncode:
                raise data.UserError(f"{text}: ended with status {status}, see {folder / 'log.txt'}")
    made = {"commit": data.git_commit(), "hardware": data.hardware()}
    data.write_json(folder / "run.json", run | made | {"seconds": round(time.perf_counter() - began, 1)})


def do_lines(args, lines) -> list[dict]:
    """Do the runs of some tables' lines, `--at_once` side by side, and return their rows of results.json.

    A run is done if its run.json tells of the same commands, and of the same weights at the start.
    """
    weights = sorted(Path(args.start).glob("*.safetensors"))
    start = [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]
    runs = {}  # by folder: tables share runs
    for (_, method, flags, _), seed in itertools.product(lines, args.seeds):
        run = make_run(args, method, flags, seed) | {"start": start}
        runs[run["folder"]] = run
    todo = [run for run in runs.values() if not run.items() <= read_json(f"{run['folder']}/run.json").items()]
    args.done += len(todo)
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done before", flush=True)
    with ThreadPoolExecutor(args.at_once) as pool:
        for run, _ in zip(todo, pool.map(do_run, todo), strict=True):  # a failure cancels what has not begun
            print(run["folder"], flush=True)
    return [collect(folder) for folder in runs]


# ---------------------------------------------------------------------------- numbers
def collect(folder: str) -> dict:
    """A row of results.json: how a run was made, its scores, and those of held-out pairs over training."""
    folder = Path(folder)
    row, scores, config = (read_json(folder / f"{name}.json") for name in ("run", "scored", "config"))
    scores |= read_json(folder / "measured.json")
    scores.pop("feature_change", None)  # long: the figure reads it from the run's folder
    if "train" in scores:  # Table 2's protocol
        scores["train_accuracy"] = scores["train"]["accuracy"]
    row |= {"scores": scores, "curve": []}
    if row["method"] != "sft":
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        scores["train_seconds"] = sum(config["batch_size"] / step["pairs_per_s"] for step in steps)
        ends = read_json(folder / "scores.json")
        row["curve"].append({"step": 0, **ends["before"]})
        for step in steps[:-1]:
            held_out = {name[5:]: value for name, value in step.items() if name.startswith("eval_")}
            row["curve"] += [{"step": step["step"], **held_out}] if held_out else []
        row["curve"].append({"step": steps[-1]["step"], **ends["after"]})
    return row


def values_of(rows: list[dict], name: str, key: str) -> list[float]:
    """A score of every seed of the runs of this name."""
    return [row["scores"][key] for row in rows if row["name"] == name and key in row["scores"]]


def mean_deviation(values) -> tuple[float, float]:
    """Mean, and the sample's deviation (n − 1); NaN for that of a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def title(key: str) -> str:
    """A score's key as the head of a column."""
    share = "accuracy" in key or "share" in key or key == "fvu"
    return key.replace("_", " ") + (" (%)" if share else "")


def cell(values: list[float], key: str) -> str:
    """`mean ± deviation`, shares in %; of one seed the value alone, of none a dash."""
    if not values:
        return "–"
    factor = 100 if title(key).endswith("(%)") else 1
    mean, deviation = mean_deviation([factor * value for value in values])
    return f"{mean:.4g}" + (f" ± {deviation:.2g}" if len(values) > 1 else "")


def table(rows, lines, columns) -> str:
    """A Markdown table of means over seeds.

    Args:
        lines: (label, method, flags, the paper's values in the order of PAPER_COLUMNS).
        columns: keys of the scores, and some of PAPER_COLUMNS.
    """
    text = ["| " + " | ".join(["", *map(title, columns)]) + " |", "|---" + "|---:" * len(columns) + "|"]
    for label, method, flags, papers in lines:
        paper, cells = dict(zip(PAPER_COLUMNS, papers, strict=False)), [label]
        for key in columns:
            ours = cell(values_of(rows, name_of(method, flags), key), key)
            cells.append(str(paper.get(key, "–")) if key in PAPER_COLUMNS else ours)
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


# ---------------------------------------------------------------------------- figures
def draw(panels, **scale):
    """A row of panels over one legend, transparent, in mid-grey: legible on white and on black.

    Args:
        panels: (title, label of x, label of y, {method: (x, y, deviation or None)}); a line is shaded by one
            deviation.
        scale: of every axes, as `Axes.set` takes it.
    Returns: figure, at most 900 pixels wide.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(9.4, 1 + 4 * len(panels)), 3.4), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, xlabel, ylabel, lines) in zip(axes, panels, strict=True):
        for name, (x, y, deviation) in lines.items():
            label, colour = LABELS[name]
            ax.plot(x, y, color=colour, label=label)
            if deviation is not None:
                low, high = ([m + sign * d for m, d in zip(y, deviation, strict=True)] for sign in (-1, 1))
                ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.set(**scale)
        for text, write in ((title, ax.set_title), (xlabel, ax.set_xlabel), (ylabel, ax.set_ylabel)):
            write(text, color=GREY, fontsize=11)
        ax.patch.set_alpha(0)
        ax.tick_params(colors=GREY, which="both", labelsize=10)
        ax.spines[:].set_color(GREY)
        ax.spines[["top", "right"]].set_visible(False)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=7, frameon=False, labelcolor=GREY)
    return figure


def draw_curves(rows, key: str, what: str):
    """Fig. 3 (key "kl") or Fig. 4 right ("mse"): D of chosen, of rejected, and |β D(y_l) − β D(y_w)|.

    Each is a mean over held-out pairs, then over seeds. β is 0.1 for all methods.
    """
    panels = []
    for side in ("chosen", "rejected", "margin"):
        lines = {}
        for name in METHODS[1:]:
            points = {}  # step: value of each seed
            for point in (p for row in rows if row["name"] == name for p in row["curve"]):
                points.setdefault(point["step"], []).append(point[f"{key}_{side}"])
            lines[name] = (list(points), *zip(*map(mean_deviation, points.values()), strict=True))
        panels.append((side, "training step", "|β D(y_l) − β D(y_w)|" if side == "margin" else what, lines))
    return draw(panels)


def draw_features(rows):
    """Fig. 2 left, and what it leaves open: which features move.

    The 50 largest pooled activations by rank, of the first seed; and mean |c̄_θ − c̄_ref| of the 50 features
    that DPO moves most, in DPO's order, mean over seeds.
    """
    activations, change = {}, {}
    for name in METHODS:
        y = values_of(rows, name, "activations_policy")[0]
        activations[name] = range(1, len(y) + 1), y, None
        folders = [row["folder"] for row in rows if row["name"] == name]
        seeds = [read_json(f"{folder}/measured.json")["feature_change"] for folder in folders]
        change[name] = [statistics.mean(values) for values in zip(*seeds, strict=True)]  # (m,)
    most = sorted(range(len(change["dpo"])), key=lambda i: -change["dpo"][i])[:50]
    moved = {name: (range(1, len(most) + 1), [y[i] for i in most], None) for name, y in change.items()}
    ranks = ("feature, by its rank", "feature, by its rank under DPO")
    left = ("largest activations", ranks[0], "mean c̄", activations)
    return draw([left, ("moved by training", ranks[1], "mean |c̄_θ − c̄_ref|", moved)])


def publish(args, rows, tables: dict, figures: dict):
    """Write rows into results.json, the tables as TASK.md, the figures as SVG; print the tables."""
    import matplotlib

    assets, text = Path(args.assets), "\n".join(f"**{title}**\n\n{body}" for title, body in tables.items())
    assets.mkdir(parents=True, exist_ok=True)
    how = data.made_by() | {"runs": len(rows), "runs_done_now": args.done}
    how |= {"seconds": round(time.perf_counter() - args.began), "rows": rows}
    data.write_json(assets / "results.json", read_json(assets / "results.json") | {args.task: how})
    data.write_text(assets / f"{args.task}.md", text)
    for name, figure in figures.items():
        with matplotlib.rc_context({"svg.hashsalt": name}):  # the same bytes for the same figure
            figure.savefig(assets / f"{name}.svg", metadata={"Date": None})
    print(text)


# ---------------------------------------------------------------------------- the paper's, and the review's
def method_line(method: str) -> tuple:
    """A method by its preset."""
    return LABELS[method][0], method, "", PAPER.get(method, ())


def alpha_flags(alpha: float, preset=0.5) -> str:
    """FPO's α as a flag; none where it is the preset's."""
    return "" if alpha == preset else f"--alpha {alpha:g}"


def sae_line(preset: str, layers, site: str, paper) -> tuple:
    """FPO with SAEs on the paper's layers, or on the toy's in their place."""
    mine = [TOY_LAYER[layer] if preset == "toy" else layer for layer in layers]
    here, there = (" ".join(map(str, numbers)) for numbers in (mine, layers))
    flags = f"--sae_site {site} --sae_layer {here}"
    if preset != "toy":
        l0s = " ".join(str(GEMMA_L0[site][layer]) for layer in layers)
        flags += f" --sae google/gemma-scope-2b-pt-{site} --sae_l0 {l0s}"
    flags = "" if (site, there) == ("res", "25") else flags  # the preset's
    return f"{site}, layer {here} (paper: {there})", "fpo", flags, paper


def ablation_plan(preset: str) -> dict:
    """{title: lines} of Tables 3, 6 and 7."""
    layers, alphas = [], []
    for site, papers in TABLE_3_LAYERS.items():
        layers += [sae_line(preset, [layer], site, paper) for layer, paper in papers.items()]
    for alpha, (through, stopped) in TABLE_3_ALPHAS.items():
        flags = alpha_flags(alpha)
        alphas.append((f"α = {alpha:g}, no stop-gradient", "fpo", f"{flags} --no_stop_gradient", through))
        alphas.append((f"α = {alpha:g}, with stop-gradient", "fpo", flags, stopped))
    return {
        "Table 3, layer and site": layers,
        "Table 3, α and stop-gradient": alphas,
        "Table 6, SimPO + KL": [method_line(method) for method in ("fpo", "simpo_kl", "simpo", "tdpo2")],
        "Table 7, several layers": [sae_line(preset, layers, "res", p) for layers, p in TABLE_7.items()],
    }


ENTROPIES = ("entropy", "teacher_forced_entropy", "teacher_forced_entropy_all", "paper_entropy")
DISTANCES = ("kl_chosen", "kl_rejected", "mse_chosen", "mse_rejected")
OURS = ("accuracy", "accuracy_sum", "reward_accuracy", "reward_accuracy_sum", "reward_accuracy_mean")
MAIN = ("train_accuracy", "paper_accuracy", "accuracy", *ENTROPIES, "kl_rejected", "mse_rejected")
SAE_FIT = ("l0", "fvu", "cross_entropy", "cross_entropy_spliced")
TOKENS = ("chosen_largest", "chosen_smallest", "rejected_largest", "rejected_smallest", "paper_ends")


def comparison(args):
    """Table 2 right, Fig. 2 left, Fig. 3, Fig. 4 right: six methods; and FPO over α."""
    methods = [method_line(method) for method in METHODS]
    values = [factor * args.alpha for factor in ALPHAS]
    alphas = [(f"α = {alpha:g}", "fpo", alpha_flags(alpha, args.alpha), ()) for alpha in values]
    rows = do_lines(args, methods + alphas)
    tables = {
        "Table 2, right: accuracy": table(rows, methods, ("train_accuracy", "paper_accuracy", *OURS)),
        "Table 2, right: entropy": table(rows, methods, ENTROPIES),
        "Distance from the reference": table(rows, methods, DISTANCES),
        "FPO by α": table(rows, alphas, ("accuracy", "entropy", *DISTANCES)),
    }
    figures = {"kl": draw_curves(rows, "kl", "KL(ref‖policy) (nats)"), "features": draw_features(rows)}
    figures["mse"] = draw_curves(rows, "mse", "D_FPO (activation²)")
    publish(args, rows, tables, figures)


def equal_size_alpha(rows) -> float:
    """α at which FPO without the SAE ends with FPO's D_FPO: between STATE_ALPHAS' runs, in logarithms."""
    names = ["fpo", *(name_of("no_sae", f"--alpha {alpha:g}") for alpha in STATE_ALPHAS)]
    wanted, *D = (math.log(statistics.mean(values_of(rows, name, "mse_rejected"))) for name in names)
    D, alphas = zip(*sorted(zip(D, map(math.log, STATE_ALPHAS), strict=True)), strict=True)
    return float(f"{math.exp(np.interp(wanted, D, alphas)):.2g}")  # beyond them the nearest


def ablation(args):
    """Tables 3, 6 and 7, by the preset's SAE in every row; then what the review added."""
    if args.preset not in ("toy", "gemma-2-2b"):
        raise data.UserError(f"ablation --preset {args.preset}: Tables 3 and 7 are for toy and gemma-2-2b")
    plan, methods = ablation_plan(args.preset), [method_line(m) for m in METHODS]
    parts = [method_line("fpo"), ("no length normalisation", "no_length_norm", "", ())]
    parts += [(f"no SAE, α = {alpha:g}", "no_sae", f"--alpha {alpha:g}", ()) for alpha in STATE_ALPHAS]
    alpha = equal_size_alpha(do_lines(args, parts))
    parts.append((f"no SAE, α = {alpha:g}: FPO's D_FPO", "no_sae", f"--alpha {alpha:g}", ()))
    rows = do_lines(args, [*itertools.chain(*plan.values()), *parts, *methods])
    tables = {title: table(rows, lines, MAIN) for title, lines in plan.items()}
    tables |= {
        "FPO without its parts": table(rows, parts, (*OURS, *ENTROPIES[:3], "kl_rejected", "mse_rejected")),
        "The SAE before alignment (SFT) and after": table(rows, methods, SAE_FIT),
        "log π_θ − log π_ref of a token (nats)": table(rows, methods[1:], TOKENS),
        "Time of the training steps (s)": table(rows, methods[1:], ("train_seconds", "paper_seconds")),
    }
    publish(args, rows, tables, {})


# ---------------------------------------------------------------------------- the frontier
def accuracy_within(curve: list[dict], key: str, level: float) -> float:
    """A run's best held-out accuracy at a distance of at most `level`: at or between its evaluations."""
    found = [point["accuracy"] for point in curve if point[key] <= level]
    for before, after in itertools.pairwise(curve):
        if before[key] <= level < after[key]:
            share = (level - before[key]) / (after[key] - before[key])
            found.append(before["accuracy"] + share * (after["accuracy"] - before["accuracy"]))
    return max(found)


def best_within(rows, names, key: str, level: float) -> float:
    """The same of a method's best setting (`names`: those of its runs), by the mean over seeds."""
    found = []
    for name in names:
        curves = [row["curve"] for row in rows if row["name"] == name]
        found.append(statistics.mean(accuracy_within(curve, key, level) for curve in curves))
    return max(found)


def compare(rows, settings: dict, key: str) -> tuple[str, dict]:
    """A table of methods at distances that all of them reach, the best at the largest first; and its lines.

    Args:
        settings: {method: names of its runs}.
    """
    reach, found, lines = {}, [], {}
    for method, names in settings.items():
        reach[method] = max(point[key] for row in rows if row["name"] in names for point in row["curve"])
    most = min(reach.values())
    levels = [float(f"{share * most:.2g}") for share in (0.03, 0.1, 0.3, 1.0)]
    columns = [f"accuracy_within_{level:g}" for level in levels]
    for method, names in settings.items():
        best = [best_within(rows, names, key, level) for level in levels]
        found.append({"name": method, "scores": dict(zip(columns, best, strict=True))})
        grid = [most / 50 * (50 * reach[method] / most) ** (i / 40) for i in range(41)]
        lines[method] = grid, [best_within(rows, names, key, level) for level in grid], None
    ranked = []
    for row in sorted(found, key=lambda row: row["scores"][columns[-1]], reverse=True):
        label = f"{LABELS[row['name']][0]} ({len(settings[row['name']])} settings)"
        ranked.append((label, row["name"], "", ()))
    return table(found, ranked, columns), lines


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
        tables[f"Held-out accuracy at equal {what}"], lines = compare(rows, settings, key)
        panels.append(("", what, "accuracy, held out", lines))
    figure = draw(panels, xscale="log")
    for ax, key in zip(figure.axes, keys, strict=True):  # every evaluation, a point
        for method, names in settings.items():
            points = [point for row in rows if row["name"] in names for point in row["curve"][1:]]
            x, y = [point[key] for point in points], [point["accuracy"] for point in points]
            ax.scatter(x, y, s=6, color=LABELS[method][1], alpha=0.5, linewidths=0)
    publish(args, rows, tables, {"frontier": figure})


# ---------------------------------------------------------------------------- the script
def parse_args(argv=None):
    """Our flags up to `--`, and train.py's after it, which are checked. Defaults follow from the preset."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("task", choices=("comparison", "ablation", "frontier"))
    flag("--preset", default="toy", choices=train.PRESETS, help="train.py's (toy)")
    flag("--model", help="the SFT model that all start from (the preset's, made if missing)")
    flag("--seeds", type=int, nargs="+", help="(0 1 2; frontier 0 1)")
    flag("--steps", type=int, help="of every training (the preset's)")
    flag("--samples", type=int, default=25, help="responses a prompt for the entropy (25)")
    flag("--at_once", type=int, help="runs side by side, a thread each (1, without cards 2)")
    flag("--ranks", type=int, help="processes of a run, by torchrun (as many as cards; toy 1)")
    flag("--out", help="folder of all runs (runs/PRESET/reproduce)")
    flag("--assets", default="assets", help="folder of results.json, tables and figures (assets)")
    args = parser.parse_args(words[:cut])
    toy, args.train_flags = args.preset == "toy", words[cut + 1 :]
    cards = 0 if toy else torch.cuda.device_count()
    args.train_flags += ["--steps", str(args.steps)] if args.steps else []
    args.seeds = args.seeds or ([0, 1] if args.task == "frontier" else [0, 1, 2])
    args.eval_every = 200 if not toy else 10 if args.task == "frontier" else 25
    args.at_once, args.ranks = args.at_once or (1 if cards else 2), args.ranks or max(1, cards)
    args.out = args.out or f"runs/{args.preset}/reproduce"
    args.start = args.model or ("runs/toy/model" if toy else f"runs/{args.preset}/sft/model")
    args.alpha = train.parse_args(["--preset", args.preset, "--model", args.start, *args.train_flags]).alpha
    args.began, args.done = time.perf_counter(), 0  # done: runs that this call did
    return args


def main(argv=None):
    """What all runs start from, where it is missing; then the runs, the tables and the figures."""
    args, first = parse_args(argv), None
    if args.preset == "toy":
        first = "toy.py --out runs/toy" + (" --all_saes" if args.task == "ablation" else "")
    elif not args.model and not Path(args.start).is_dir():
        first = f"-m torch.distributed.run --standalone --nproc_per_node {args.ranks} train.py --method sft "
        first += f"--preset {args.preset}"
    if first:
        subprocess.run([sys.executable, *first.split()], check=True)
    {"comparison": comparison, "ablation": ablation, "frontier": frontier}[args.task](args)


if __name__ == "__main__":
    data.run_script(main)
