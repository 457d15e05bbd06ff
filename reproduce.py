"""The paper's tables and figures, one command each: train.py and eval_diversity.py over methods and settings.

    python reproduce.py comparison --preset toy   Table 2 right, Fig. 2 left, Fig. 3, Fig. 4 right; FPO over α
    python reproduce.py ablation --preset toy     Table 3 (layer × site, α × stop-gradient), Tables 6 and 7
    python reproduce.py control --preset toy      Table 4, on styles of the toy world; --real: the paper's

Nothing is trained or measured here: numbers are those of each run's metrics.jsonl, scores.json, scored.json;
they go with commands, commit, seed, hardware and seconds to results.json. A run that is done is not repeated.
A deviation is the sample's (n − 1) over seeds, that is over orders of the data and draws of the samples: the
SFT model that all start from is the same.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import offline
import presets
import train
from presets import git_commit, hardware, made_by, shown

# One name and one colour a method, everywhere; the colours are legible on white and on black.
METHODS = {"sft": ("SFT", "#8c8c8c"), "dpo": ("DPO", "#4c7fd9"), "tdpo1": ("TDPO-1", "#1fa3b5")}
METHODS |= {"tdpo2": ("TDPO-2", "#3a9d4f"), "simpo": ("SimPO", "#d98324"), "fpo": ("FPO", "#d6336c")}
GREY = "#7f7f7f"
ALPHAS = (0.0, 0.1, 0.5, 1.0, 2.0, 10.0, 50.0)

# The paper's accuracy (%) and entropy: Gemma-2-2B on UltraFeedback.
TABLE_2 = {"dpo": (59.9, 1.66), "tdpo1": (63.2, 1.65), "tdpo2": (64.2, 1.68), "simpo": (63.4, 1.64)}
TABLE_2["fpo"] = (64.1, 1.68)
TABLE_3_LAYERS = {
    "res": ((57.2, 1.645), (59.1, 1.612), (59.7, 1.644), (63.6, 1.680)),
    "mlp": ((57.4, 1.609), (61.3, 1.637), (62.4, 1.654), (63.4, 1.671)),
}
TABLE_3_ALPHAS = {  # α: without and with stop-gradient
    0.1: ((64.1, 1.630), (64.0, 1.652)),
    0.5: ((63.7, 1.642), (63.6, 1.680)),
    1.0: ((63.4, 1.666), (62.7, 1.682)),
    2.0: ((61.9, 1.643), (62.1, 1.679)),
}
TABLE_6 = {"fpo": (64.1, 1.68), "simpo_kl": (63.6, 1.66), "simpo": (63.4, 1.64), "tdpo2": (64.2, 1.68)}
TABLE_7 = {(25,): (64.1, 1.68), (0, 25): (62.1, 1.70), (12, 25): (61.9, 1.64), (24, 25): (58.2, 1.66)}
TABLE_7[0, 12, 25] = (51.4, 1.66)
# The toy's 4 layers stand for those of Gemma's 26 that Tables 3 and 7 name.
TOY_LAYER = {0: 0, 7: 0, 12: 1, 13: 1, 19: 2, 24: 2, 25: 3}
# Gemma Scope's L0 nearest to the authors' 55, by site and layer.
GEMMA_L0 = {
    "res": {0: 46, 7: 69, 12: 41, 13: 43, 19: 40, 24: 38, 25: 55},
    "mlp": {7: 60, 13: 47, 19: 50, 25: 59},
}

CONTROLLED, CONTROL_ALPHA = ("polite", "shout"), 10.0  # the toy's most and least liked style
REAL_CONTROL = """Table 4 on Gemma-2-2B. Write the responses that have the feature to A.jsonl, those that
have not to B.jsonl, as {"prompt": …, "response": …} lines, preference pairs to pairs.jsonl. The paper's data:
    formats    google/IFEval
    languages  DAMO-NLP-MT/multialpaca, allenai/WildChat, apple/mkqa
    safety     JailbreakBench/JBB-Behaviors, AdvBench (llm-attacks)
    sentiment  zeroshot/twitter-financial-news-sentiment
Then, with the paper's settings (without --feature_weights and with --alpha 0: the weight 0):
    python eval_diversity.py --preset gemma-2-2b --find_features A.jsonl B.jsonl --criterion token \\
        --weights weights.json
    torchrun --nproc_per_node 4 train.py --preset gemma-2-2b --method fpo --feature_weights weights.json \\
        --dataset pairs.jsonl --eval_dataset pairs.jsonl --lr 2e-5 --batch_size 64 --max_length 2048 \\
        --schedule cosine --warmup_ratio 0.1
The data sets' own scorers judge the responses. Not run here."""


# ---------------------------------------------------------------------------- one run
def start_model(preset: str) -> str:
    """The SFT model, which every method starts from and is measured against."""
    return "runs/toy/model" if preset == "toy" else f"runs/{preset}/sft/model"


def command(script: str, ranks: int, flags: dict) -> list[str]:
    """A command's words, in one process or torchrun's `ranks`. A list gives a flag many values, True none."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    words = [sys.executable, *(torchrun if ranks > 1 else []), script]
    for name, value in flags.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *(str(v) for v in values if v is not True)]
    return words


def make_run(args, name: str, method: str, seed: int, flags=None, *, watched=False) -> dict:
    """A training and its evaluation, not yet done. `sft` is the start itself: evaluated alone.

    flags: what differs from the preset. watched: held-out scores during training too (Fig. 3).
    """
    out, start = f"{args.out}/{name}_seed{seed}", start_model(args.preset)
    flags = {"method": method, "seed": seed, "model": start, **(flags or {}), "out": out}
    flags |= {"eval_every": args.eval_every, "eval_kl": True} if watched else {"eval_every": 0}
    flags |= {"eval_samples": 0}  # eval_diversity.py samples, by the paper's 25 a prompt
    flags |= {"steps": args.steps} if args.steps else {}
    scores = {"model": start if method == "sft" else f"{out}/model", "reference": start, "seed": seed}
    scores |= {"samples": args.samples, "features_top": 50, "train_pairs": True, "json": f"{out}/scored.json"}
    parts = [("train.py", flags)] * (method != "sft") + [("eval_diversity.py", scores)]
    commands = [command(script, args.ranks, {"preset": args.preset, **f}) for script, f in parts]
    return {"name": name, "method": method, "seed": seed, "folder": out, "commands": commands}


def weights_digest(model: str) -> str:
    """SHA-256 of a model's weights on disk."""
    whole = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        whole.update(path.read_bytes())
    return whole.hexdigest()


def finished(run: dict, start: str) -> bool:
    """Whether a run's results are there, of the same commands, settings and SFT model (`start`: its digest).

    config.json must say what train.py would take now, so a changed preset is a change too.
    """
    folder, (words, *_) = Path(run["folder"]), run["commands"]
    read = lambda name: json.loads((folder / name).read_text())  # noqa: E731
    try:
        record, _ = read("run.json"), read("scored.json")
        config, _ = (read("config.json"), read("scores.json")) if "train.py" in words else ({}, None)
    except (OSError, json.JSONDecodeError):
        return False
    settings = {}
    if "train.py" in words:
        settings = json.loads(json.dumps(vars(train.parse_args(words[words.index("train.py") + 1 :]))))
    same = all(config.get(name) == value for name, value in settings.items() if value is not None)
    return same and record["commands"] == [shown(c) for c in run["commands"]] and record["start"] == start


def do_run(run: dict, start: str, commit: str):
    """The run's commands in turn, output into log.txt; run.json comes last. RuntimeError where one fails."""
    folder, began = Path(run["folder"]), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("run.json", "scores.json", "scored.json"):  # an older run's must not pass for this one's
        (folder / name).unlink(missing_ok=True)
    with open(folder / "log.txt", "w") as log:
        for words in run["commands"]:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            status = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=env).returncode
            if status:
                raise RuntimeError(f"{shown(words)}\nended with status {status}: see {folder / 'log.txt'}")
    record = {"commands": [shown(c) for c in run["commands"]], "start": start, "commit": commit}
    record |= {"hardware": hardware(), "seconds": round(time.perf_counter() - began, 1)}
    offline.write_json(folder / "run.json", record)


def do_runs(args, runs: list[dict]) -> list[dict]:
    """Do the runs that are not finished, `--at_once` side by side; rows of results.json of all."""
    start, commit = weights_digest(start_model(args.preset)), git_commit()
    todo = [run for run in runs if not finished(run, start)]
    args.todo += len(todo)
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done before")
    with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        work = {pool.submit(do_run, run, start, commit): run for run in todo}
        try:
            for n, future in enumerate(concurrent.futures.as_completed(work), 1):
                future.result()
                print(f"{n}/{len(todo)}  {work[future]['folder']}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [collect(run) for run in runs]


# ---------------------------------------------------------------------------- numbers
def collect(run: dict) -> dict:
    """A row of results.json: how the run was made, its scores, and its held-out scores over training."""
    folder = Path(run["folder"])
    record, scores = (json.loads((folder / name).read_text()) for name in ("run.json", "scored.json"))
    row = {name: run[name] for name in ("name", "method", "seed")} | record | {"scores": scores, "curve": []}
    if (folder / "responses.jsonl").exists():
        scores |= style_shares((folder / "responses.jsonl").read_text().splitlines())
    if "train" in scores:  # Table 2's protocol
        scores["train_accuracy"] = scores["train"]["accuracy"]
    if "train.py" not in run["commands"][0]:
        return row
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = json.loads((folder / "scores.json").read_text())
    row["curve"].append({"step": 0, **ends["before"]})
    for step in steps[:-1]:
        held_out = {name[5:]: value for name, value in step.items() if name.startswith("eval_")}
        row["curve"] += [{"step": step["step"], **held_out}] if held_out else []
    row["curve"].append({"step": steps[-1]["step"], **ends["after"]})
    return row


def values_of(rows: list[dict], name: str, key: str) -> list[float]:
    """A score of every seed of the runs of this name."""
    return [row["scores"][key] for row in rows if row["name"] == name and key in row["scores"]]


def mean_deviation(values: list[float]) -> tuple[float, float]:
    """Mean, and the sample's deviation (n − 1); NaN for that of a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def cell(values: list[float], digits: int, scale: float = 1.0) -> str:
    """`mean ± deviation`; of one seed the value alone, of none "not run"."""
    if not values:
        return "not run"
    mean, deviation = mean_deviation([scale * value for value in values])
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


COLUMNS = {  # key of the scores: (title, digits, factor)
    "train_accuracy": ("accuracy, training (%)", 1, 100),
    "accuracy": ("accuracy, held out (%)", 1, 100),
    "reward_accuracy": ("reward accuracy (%)", 1, 100),
    "entropy": ("entropy (nats)", 3, 1),
    "kl_chosen": ("KL chosen (nats)", 1, 1),
    "kl_rejected": ("KL rejected (nats)", 1, 1),
    "mse_chosen": ("D_FPO chosen", 3, 1),
    "mse_rejected": ("D_FPO rejected", 3, 1),
}
SHORT = ("train_accuracy", "accuracy", "entropy", "kl_rejected", "mse_rejected")


def table(rows, lines, columns=tuple(COLUMNS)) -> str:
    """A Markdown table. lines: (label, name of the runs, the paper's (accuracy, entropy) or None)."""
    titles = [COLUMNS.get(key, (key.replace("_", " ") + " (%)",))[0] for key in columns]
    beside = ["paper: accuracy (%)", "paper: entropy"] if any(paper for *_, paper in lines) else []
    head = ["", *titles, *beside]
    text = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for label, name, paper in lines:
        ours = [cell(values_of(rows, name, key), *COLUMNS.get(key, ("", 1, 100))[1:]) for key in columns]
        text.append("| " + " | ".join([label, *ours, *map(str, (paper or "––") if beside else ())]) + " |")
    return "\n".join(text) + "\n"


# ---------------------------------------------------------------------------- figures
def panels(titles, xlabel: str, ylabels):
    """A row of panels, transparent, in mid-grey: legible in light and dark. Returns figure and axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.8 + 3.4 * len(titles), 3.4), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for ax, title, ylabel in zip(axes, titles, ylabels, strict=True):
        ax.set_title(title, color=GREY, fontsize=10)
        ax.set_xlabel(xlabel, color=GREY)
        ax.set_ylabel(ylabel, color=GREY)
        ax.patch.set_alpha(0)
        ax.tick_params(colors=GREY)
        ax.spines[:].set_color(GREY)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend(figure, ax):
    """The methods, once, under the panels."""
    lines, columns = ax.get_legend_handles_labels(), 3 * len(figure.axes)
    figure.legend(*lines, loc="outside lower center", ncols=columns, frameon=False, labelcolor=GREY)


def draw_accuracy_entropy(rows):
    """Table 2 right as a picture: one point a method, bars of one deviation."""
    figure, (ax,) = panels([""], "entropy of sampled tokens (nats)", ["accuracy, held out (%)"])
    for name, (label, colour) in METHODS.items():
        (x, dx), (y, dy) = (mean_deviation(values_of(rows, name, key)) for key in ("entropy", "accuracy"))
        ax.errorbar(x, 100 * y, 100 * dy, dx, fmt="o", color=colour, label=label)
    legend(figure, ax)
    return figure


def draw_curves(rows, key: str, what: str):
    """Fig. 3 (key "kl") or Fig. 4 right ("mse"): D of chosen, of rejected, and |β D(y_l) − β D(y_w)|.

    Each a mean over pairs; then means over seeds, shaded by one deviation, at the steps where held-out pairs
    were scored. β is 0.1 for all methods.
    """
    margin = "|β D(y_l) − β D(y_w)| " + what[what.rindex("(") :]  # in the same unit
    figure, axes = panels(["chosen", "rejected", "margin"], "training step", [what, what, margin])
    for name, (label, colour) in METHODS.items():
        points = {}  # step: of each seed (chosen, rejected, margin)
        for point in (p for row in rows if row["name"] == name for p in row["curve"]):
            values = [point[f"{key}_{panel}"] for panel in ("chosen", "rejected", "margin")]
            points.setdefault(point["step"], []).append(values)
        for panel, ax in enumerate(axes if points else []):
            statistic = [mean_deviation([seed[panel] for seed in step]) for step in points.values()]
            mean, deviation = zip(*statistic, strict=True)
            low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
            ax.plot(list(points), mean, color=colour, label=label)
            ax.fill_between(list(points), low, high, color=colour, alpha=0.2, linewidth=0)
    for ax in axes:
        ax.set_ylim(bottom=0)
    legend(figure, axes[0])
    return figure


def draw_alpha(rows):
    """α of FPO against rejected KL and entropy, of the first seed; at 0 there is no constraint."""
    figure, axes = panels(["", ""], "α", ["KL rejected (nats)", "entropy of sampled tokens (nats)"])
    for ax, key in zip(axes, ("kl_rejected", "entropy"), strict=True):
        heights = [values_of(rows, alpha_name(alpha), key)[0] for alpha in ALPHAS]
        ax.plot([f"{alpha:g}" for alpha in ALPHAS], heights, "o-", color=METHODS["fpo"][1])
    axes[0].set_ylim(bottom=0)
    return figure


def draw_activations(rows):
    """Fig. 2 left: the 50 largest pooled activations by rank, mean over responses, of the first seed."""
    figure, (ax,) = panels([""], "rank of the feature", ["mean activation"])
    for name, (label, colour) in METHODS.items():
        for heights in values_of(rows, name, "activations_policy")[:1]:
            ax.plot(range(1, len(heights) + 1), heights, color=colour, label=label)
    legend(figure, ax)
    return figure


def publish(args, rows, tables: dict, figures: dict):
    """Write rows into results.json, the tables as WHAT.md, the figures as SVG; print the tables."""
    import matplotlib

    assets, text = Path(args.assets), "\n".join(f"**{title}**\n\n{body}" for title, body in tables.items())
    assets.mkdir(parents=True, exist_ok=True)
    results = json.loads((assets / "results.json").read_text()) if (assets / "results.json").exists() else {}
    seconds = round(time.perf_counter() - args.began)
    how = made_by() | {"runs": len(rows), "runs_done_now": args.todo, "seconds": seconds}
    offline.write_json(assets / "results.json", results | {args.what: {**how, "rows": rows}})
    offline.write_text(assets / f"{args.what}.md", text)
    for name, figure in figures.items():
        with matplotlib.rc_context({"svg.hashsalt": name}):  # the same bytes for the same figure
            figure.savefig(assets / f"{name}.svg", metadata={"Date": None})
    written = ["results.json", f"{args.what}.md", *(f"{name}.svg" for name in figures)]
    print(text, *(assets / name for name in written), sep="\n")


# ---------------------------------------------------------------------------- what there is to run
def alpha_name(alpha: float) -> str:
    """The name of FPO's runs with this α; 0.5 is the preset's."""
    return "fpo" if alpha == 0.5 else f"fpo_alpha{alpha:g}"


def comparison(args):
    """Table 2 right, Fig. 2 left, Fig. 3, Fig. 4 right: six methods; and FPO over α, of the first seed."""
    runs = [make_run(args, m, m, seed, watched=True) for seed in args.seeds for m in METHODS]
    for alpha in ALPHAS:
        if alpha != 0.5:
            runs.append(make_run(args, alpha_name(alpha), "fpo", args.seeds[0], {"alpha": alpha}))
    rows = do_runs(args, runs)
    lines = [(label, name, TABLE_2.get(name)) for name, (label, _) in METHODS.items()]
    alphas = [(f"{alpha:g}", alpha_name(alpha), None) for alpha in ALPHAS]
    first = [row for row in rows if row["seed"] == args.seeds[0]]
    tables = {"Table 2, right": table(rows, lines), "FPO by α, first seed": table(first, alphas)}
    figures = {"accuracy_entropy": draw_accuracy_entropy(rows), "alpha": draw_alpha(rows)}
    figures["kl"] = draw_curves(rows, "kl", "KL(ref‖policy) of a response (nats)")
    figures["mse"] = draw_curves(rows, "mse", "D_FPO (activation²)")
    if values_of(rows, "fpo", "activations_policy"):
        figures["activations"] = draw_activations(rows)
    publish(args, rows, tables, figures)


def sae_setting(preset: str, layers, site="res") -> tuple[str, str, dict]:
    """SAEs on the paper's layers, or the toy's in their place: label, name of the runs, flags."""
    toy = preset == "toy"
    mine = [TOY_LAYER[layer] for layer in layers] if toy else list(layers)
    label = f"{site}, layer {', '.join(map(str, mine))}" + f" (paper: {', '.join(map(str, layers))})" * toy
    if (tuple(layers), site) == ((25,), "res"):
        return label, "fpo", {}
    flags, l0s = {"sae_layer": mine, "sae_site": site}, [GEMMA_L0[site][layer] for layer in layers]
    flags |= {} if toy else {"sae": f"google/gemma-scope-2b-pt-{site}", "sae_l0": l0s}
    return label, f"fpo_{site}{'_'.join(map(str, mine))}", flags


def ablation_plan(preset: str) -> dict:
    """{table: [(label, name, method, flags, the paper's (accuracy, entropy))]}."""
    plan = {"Table 3, layer and site": [], "Table 3, α and stop-gradient": []}
    for site, papers in TABLE_3_LAYERS.items():
        for layer, paper in zip((7, 13, 19, 25), papers, strict=True):
            label, name, flags = sae_setting(preset, [layer], site)
            plan["Table 3, layer and site"].append((label, name, "fpo", flags, paper))
    for alpha, papers in TABLE_3_ALPHAS.items():
        for stopped, paper in zip((False, True), papers, strict=True):
            flags = {} if alpha == 0.5 else {"alpha": alpha}
            flags |= {} if stopped else {"no_stop_gradient": True}
            name = alpha_name(alpha) + "_through" * (not stopped)
            label = f"α = {alpha:g}, {'with' if stopped else 'without'} stop-gradient"
            plan["Table 3, α and stop-gradient"].append((label, name, "fpo", flags, paper))
    names = {name: label for name, (label, _) in METHODS.items()} | {"simpo_kl": "SimPO + KL"}
    plan["Table 6, SimPO + KL"] = [(names[m], m, m, {}, paper) for m, paper in TABLE_6.items()]
    plan["Table 7, several layers"] = []
    for layers, paper in TABLE_7.items():
        label, name, flags = sae_setting(preset, layers)
        plan["Table 7, several layers"].append((label, name, "fpo", flags, paper))
    return plan


def ablation(args):
    """Tables 3, 6 and 7. Accuracy, entropy and distances of every row by the same SAE, the preset's."""
    plan, runs = ablation_plan(args.preset), {}
    for _, name, method, flags, _ in (line for lines in plan.values() for line in lines):
        for seed in args.seeds:  # the comparison's own runs are shared, as they were made there
            run = make_run(args, name, method, seed, flags, watched=not flags and name in METHODS)
            runs[run["folder"]] = run
    rows = do_runs(args, list(runs.values()))
    lines = lambda title: [(label, name, paper) for label, name, _, _, paper in plan[title]]  # noqa: E731
    publish(args, rows, {title: table(rows, lines(title), SHORT) for title in plan}, {})


def find_run(args, style: str, seed: int, criterion="difference") -> dict:
    """Not yet done: a file of features that tell a style's responses from others, or of as many by chance."""
    name, pairs = f"features_{criterion}_{style}", Path("runs/toy/train.jsonl").read_text().splitlines()
    out = f"{args.out}/{name}_seed{seed}"
    sides = [(pair["prompt"], pair[side], pair[f"{side}_style"])
             for pair in map(json.loads, pairs) for side in ("chosen", "rejected")]  # fmt: skip
    Path(out).mkdir(parents=True, exist_ok=True)
    files = [f"{out}/{style}.jsonl", f"{out}/others.jsonl"]
    for file, inside in zip(files, (True, False), strict=True):
        lines = [{"prompt": p, "response": r} for p, r, s in sides if (s == style) == inside]
        Path(file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = {"preset": args.preset, "model": start_model(args.preset), "find_features": files, "seed": seed}
    flags |= {"criterion": criterion, "json": f"{out}/scored.json", "weights": f"{out}/weights.json"}
    commands = [command("eval_diversity.py", 1, flags)]
    return {"name": name, "method": "", "seed": seed, "folder": out, "commands": commands}


def style_shares(lines) -> dict:
    """{"share_polite": …}: the share of responses (JSON lines) that open in each style of the toy world."""
    import toy

    styles = [toy.style_of(json.loads(line)["response"]) for line in lines]
    return {f"share_{style}": styles.count(style) / len(styles) for style in toy.STYLES}


def control(args):
    """Table 4 on the toy world: D_FPO of a style's features alone, of as many at random, of all, of none."""
    if args.real or args.preset != "toy":
        print(REAL_CONTROL)
        return
    finds = [find_run(args, style, args.seeds[0]) for style in CONTROLLED]
    finds += [find_run(args, CONTROLLED[0], seed, "random") for seed in args.seeds]
    do_runs(args, finds)
    arms = {"SFT": ("sft", {}), "no constraint": ("free", {"alpha": 0.0}), "all features": ("all", {})}
    arms |= {f"{style} features": (style, {"feature_weights": f"{finds[i]['folder']}/weights.json"})
             for i, style in enumerate(CONTROLLED)} | {"random features": ("random", {})}  # fmt: skip
    runs, lines = [], [(label, f"control_{name}", None) for label, (name, _) in arms.items()]
    for seed, found in zip(args.seeds, finds[len(CONTROLLED) :], strict=True):
        for name, flags in arms.values():
            flags = {"alpha": CONTROL_ALPHA} | flags
            flags |= {"feature_weights": f"{found['folder']}/weights.json"} if name == "random" else {}
            run = make_run(args, f"control_{name}", "sft" if name == "sft" else "fpo", seed, flags)
            answers = {"export": "records", "questions": "runs/toy/test.jsonl", "seed": seed}
            answers |= {"model": start_model("toy") if name == "sft" else f"{run['folder']}/model"}
            answers |= {"out": f"{run['folder']}/responses.jsonl", "preset": args.preset}
            run["commands"].append(command("eval_diversity.py", 1, answers))
            runs.append(run)
    rows = do_runs(args, runs)
    shares = [key for key in rows[0]["scores"] if key.startswith("share_")]
    title, columns = "Table 4 on the toy world", ["accuracy", "entropy", *shares]
    publish(args, rows, {title: table(rows, lines, columns)}, {})


def parse_args(argv=None):
    """Flags; those left out follow from the preset."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=("comparison", "ablation", "control"))
    parser.add_argument("--preset", default="toy", choices=("toy", "gemma-2-2b"), help="of the paper's (toy)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--steps", type=int, help="of every training (the preset's)")
    parser.add_argument("--eval_every", type=int, help="steps between points of Fig. 3 (toy 25, else 200)")
    parser.add_argument("--samples", type=int, default=25, help="responses a prompt for the entropy (25)")
    parser.add_argument("--at_once", type=int, help="runs side by side, a thread each (toy 2, else 1)")
    parser.add_argument("--ranks", type=int, help="processes of a run, by torchrun (toy 1, else 4)")
    parser.add_argument("--out", help="folder of all runs (runs/PRESET/reproduce)")
    parser.add_argument(
        "--assets", default="assets", help="folder of results.json, tables and figures (assets)"
    )
    parser.add_argument(
        "--real", action="store_true", help="control: print the commands for the paper's data"
    )
    least = dict.fromkeys(("steps", "eval_every", "samples", "at_once", "ranks"), 1)
    args = presets.parse_flags(parser, argv, least)
    args.began, args.todo = time.perf_counter(), 0  # runs that this call had to do
    toy = args.preset == "toy"
    for name, here, elsewhere in (("eval_every", 25, 200), ("at_once", 2, 1), ("ranks", 1, 4)):
        if getattr(args, name) is None:
            setattr(args, name, here if toy else elsewhere)
    args.out = args.out or f"runs/{args.preset}/reproduce"
    for name in ("out", "assets"):
        presets.check_output(name, getattr(args, name), folder=True)
    return args


def main(argv=None):
    """What all runs start from, then the runs, the tables and the figures."""
    with presets.one_line_errors():
        args = parse_args(argv)
    if args.preset == "toy":
        extra = {"all_saes": True} if args.what == "ablation" else {}
        subprocess.run(command("toy.py", 1, {"out": "runs/toy", **extra}), check=True)
    elif not args.real and not Path(start_model(args.preset)).is_dir():
        flags = {"method": "sft", "preset": args.preset, "out": f"runs/{args.preset}/sft"}
        subprocess.run(command("train.py", args.ranks, flags), check=True)
    {"comparison": comparison, "ablation": ablation, "control": control}[args.what](args)


if __name__ == "__main__":
    sys.exit(main())
