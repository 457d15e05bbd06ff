"""The paper's tables and figures, what its review added, and methods at equal distance from the reference.

    python -m experiments.reproduce comparison    Table 2 right, Fig. 2 left, Fig. 3, Fig. 4 right; FPO by α
    python -m experiments.reproduce ablation      Tables 3, 6, 7; FPO without its parts; SAE afterwards; time
    python -m experiments.reproduce frontier      accuracy at equal KL and at equal D_FPO, over β and α
    python -m experiments.reproduce control       Table 4 on the toy
    python -m experiments.reproduce comparison --preset own --model SFT --dataset F --eval_dataset G ...
    python -m experiments.reproduce figures       the figures of results.json, drawn again; nothing is run
    python -m experiments.reproduce curves RUN ...    what any runs of train.py logged, side by side

All other flags are train.py's and eval_diversity.py's. A flag goes to every child that knows it: trainings
whose method has such a setting (α is FPO's alone, as a preset's is), scores, measures. What no child knows,
or a table sets itself, is refused, and every child's command is read by its own parser, before anything runs.

No score is computed here: train.py, eval_diversity.py and experiments.control run as processes, on all cards
that there are, and the keys of what they write are the tables' columns (accuracies in %, entropies and KL in
nats). A run that is done is not repeated. ± is the sample's deviation (n − 1) over seeds, which set the
order of the data and the samples.
"""

import argparse
import itertools
import statistics
from pathlib import Path

import numpy as np
import torch

import runtime
import settings
import toy
from experiments import figures, runs
from experiments.runs import name_of, read_json
from runtime import refuse

METHODS = ("sft", "dpo", "tdpo1", "tdpo2", "simpo", "fpo")
# The paper's numbers of Gemma-2-2B by the tables' columns (Tables 2 and 6; the review's largest and smallest
# log-ratio of a token, seconds).
PAPER_COLUMNS = ("paper_accuracy", "paper_entropy", "paper_ends", "paper_seconds")
PAPER: dict[str, tuple] = {
    "dpo": (59.9, 1.66, "19, −25", 8609),
    "tdpo1": (63.2, 1.65),
    "tdpo2": (64.2, 1.68, "12, −13", 10420),
    "simpo": (63.4, 1.64, "28, −32", 7901),
    "fpo": (64.1, 1.68, "13, −15", 8290),
    "simpo_kl": (63.6, 1.66),
}
# A table's line is (label, method, words for train.py, the paper's values). A run is a line with a seed.
LINES = {name: (look[0], name, (), PAPER.get(name, ())) for name, look in figures.LOOKS.items()}
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
REACHED = {"kl_rejected": "KL of the rejected (nats)", "mse_rejected": "D_FPO of the rejected"}
# Columns of the tables.
ENTROPIES = ("entropy", "teacher_forced_entropy", "teacher_forced_entropy_all", "paper_entropy")
DISTANCES = ("kl_chosen", "kl_rejected", "mse_chosen", "mse_rejected")
OURS = ("accuracy", "accuracy_sum", "reward_accuracy", "reward_accuracy_sum", "reward_accuracy_mean")
MAIN = ("train_accuracy", "paper_accuracy", "accuracy", *ENTROPIES, "kl_rejected", "mse_rejected")
SAE_FIT = ("l0", "fvu", "cross_entropy", "cross_entropy_spliced")
TOKENS = ("chosen_largest", "chosen_smallest", "rejected_largest", "rejected_smallest", "paper_ends")
CURVES = {"comparison": ("step", *(f"{d}_{y}" for d in ("kl", "mse") for y in ("chosen", "rejected", "gap")))}
CURVES["frontier"] = ("step", "accuracy", *REACHED)
# By task: presets that it is for (else all), and flags that its lines set.
PRESETS = {"ablation": ("toy", "gemma-2-2b"), "control": ("toy",)}
SET_BY_LINES = {
    "comparison": (),
    "ablation": ("sae", "sae_layer", "sae_site", "sae_l0", "stop_gradient"),
    "frontier": ("beta",),
    "control": ("alpha",),
}


# ---------------------------------------------------------------------------- lines: what a task trains
def sae_line(preset: str, layers, site: str, paper) -> tuple:
    """FPO with SAEs on the paper's layers, or on the toy's in their place."""
    here = [TOY_LAYER[layer] for layer in layers] if preset == "toy" else layers
    flags = ["--sae_site", site, "--sae_layer", *map(str, here)]
    if preset != "toy":
        l0s = [str(GEMMA_L0[site][layer]) for layer in layers]
        flags += ["--sae", f"google/gemma-scope-2b-pt-{site}", "--sae_l0", *l0s]
    if site == "res" and tuple(layers) == (25,):
        flags = []  # the preset's
    label, there = (" ".join(map(str, numbers)) for numbers in (here, layers))
    return f"{site}, layer {label} (paper: {there})", "fpo", tuple(flags), paper


def alpha_line(label: str, method: str, alpha: float, preset_alpha=None, paper=()) -> tuple:
    """A line at this α; the preset's is not spelled out, so that tables share its runs."""
    return label, method, () if alpha == preset_alpha else ("--alpha", f"{alpha:g}"), paper


def comparison_plan(args) -> dict:
    """{a table's title: (its lines, its columns)} of Table 2 right; and FPO over α."""
    methods = [LINES[method] for method in METHODS]
    alphas = [factor * args.alpha for factor in ALPHAS]
    by_alpha = [alpha_line(f"α = {alpha:g}", "fpo", alpha, args.alpha) for alpha in alphas]
    return {
        "Table 2, right: accuracy": (methods, ("train_accuracy", "paper_accuracy", *OURS)),
        "Table 2, right: entropy": (methods, ENTROPIES),
        "Distance from the reference": (methods, DISTANCES),
        "FPO by α": (by_alpha, ("accuracy", "entropy", *DISTANCES)),
    }


def ablation_plan(args, equal_alpha=None) -> dict:
    """Tables 3, 6 and 7, by the preset's SAE in every row; then what the review added.

    equal_alpha: α at which FPO without the SAE ends with FPO's D_FPO; none: not known yet.
    """
    layers, alphas, methods = [], [], [LINES[method] for method in METHODS]
    for site, papers in TABLE_3_LAYERS.items():
        layers += [sae_line(args.preset, [layer], site, paper) for layer, paper in papers.items()]
    for alpha, (through, stopped) in TABLE_3_ALPHAS.items():
        line = alpha_line(f"α = {alpha:g}, with stop-gradient", "fpo", alpha, args.alpha, stopped)
        flags = (*line[2], "--no_stop_gradient")
        alphas += [(f"α = {alpha:g}, no stop-gradient", "fpo", flags, through), line]
    several = [sae_line(args.preset, layers, "res", paper) for layers, paper in TABLE_7.items()]
    parts = [LINES["fpo"], ("no length normalisation", "no_length_norm", (), ())]
    parts += [alpha_line(f"no SAE, α = {alpha:g}", "no_sae", alpha) for alpha in STATE_ALPHAS]
    if equal_alpha:
        parts.append(alpha_line(f"no SAE, α = {equal_alpha:g}: FPO's D_FPO", "no_sae", equal_alpha))
    return {
        "Table 3, layer and site": (layers, MAIN),
        "Table 3, α and stop-gradient": (alphas, MAIN),
        "Table 6, SimPO + KL": ([LINES[name] for name in ("fpo", "simpo_kl", "simpo", "tdpo2")], MAIN),
        "Table 7, several layers": (several, MAIN),
        "FPO without its parts": (parts, (*OURS, *ENTROPIES[:3], "kl_rejected", "mse_rejected")),
        "The SAE before alignment (SFT) and after": (methods, SAE_FIT),
        "log π_θ − log π_ref of a token (nats)": (methods[1:], TOKENS),
        "Time of the training steps (s)": (methods[1:], ("train_seconds", "paper_seconds")),
    }


def control_plan(args) -> dict:
    """Table 4 on the toy: D_FPO of a style's features alone, of as many by chance, of all, and of none."""
    sides = {"all": "fpo", "random": "random", "polite": "polite", "shout": "shout"}
    lines = [LINES["sft"], alpha_line("no constraint", "fpo", 0)]
    lines += [alpha_line(f"{name} features", method, 10) for name, method in sides.items()]
    return {"Table 4 on the toy world": (lines, ("accuracy", "entropy", *(f"share_{s}" for s in toy.STYLES)))}


def frontier_plan(args) -> dict:
    """{method: (its settings, a line each, no columns)}."""
    plan = {}
    for method, (betas, alphas) in FRONTIER.items():
        name, lines = "fpo" if method == "free" else method, []
        for beta, alpha in itertools.product(betas, alphas):
            alpha = alpha * args.alpha if method == "fpo" else alpha
            flags = ["--beta", f"{beta:g}", *([] if alpha is None else ["--alpha", f"{alpha:g}"])]
            lines.append(("", name, tuple(flags), ()))
        plan[method] = lines, ()
    return plan


PLANS = {
    "comparison": comparison_plan,
    "ablation": ablation_plan,
    "frontier": frontier_plan,
    "control": control_plan,
}


def lines_of(plan: dict) -> list[tuple]:
    """All lines of a plan's tables."""
    return [line for lines, _ in plan.values() for line in lines]


# ---------------------------------------------------------------------------- tables
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


# ---------------------------------------------------------------------------- the frontier
def best_within(rows, names, key: str, level: float) -> float:
    """A method's best held-out accuracy at a distance of at most `level`: that of its best setting.

    names: of its runs, a setting each. Of a run the best counts, at or between its evaluations; of a setting
    the mean over seeds.
    """
    best = {name: [] for name in names}
    for row in (row for row in rows if row["name"] in best):
        points = list(zip(row["curve"][key], row["curve"]["accuracy"], strict=True))
        # each evaluation within the level; and where the curve crosses it, the point between two
        found = [accuracy for distance, accuracy in points if distance <= level]
        for (before, low), (after, high) in itertools.pairwise(points):
            if before <= level < after:
                found.append(np.interp(level, (before, after), (low, high)))
        best[row["name"]].append(max(found))
    return max(map(statistics.mean, best.values()))


def reach_of(rows, names, key: str) -> float:
    """The largest distance that any of these runs was scored at."""
    return max(max(row["curve"][key]) for row in rows if row["name"] in names)


def compare(rows, settings: dict, key: str) -> str:
    """A table of methods at distances that all of them reach, the best at the largest first.

    settings: {method: names of its runs}.
    """
    most = min(reach_of(rows, names, key) for names in settings.values())
    # from 3 % of what all methods reach to all of it
    levels = [float(f"{share * most:.2g}") for share in (0.03, 0.1, 0.3, 1.0)]
    best, lines = [], []
    for method, names in settings.items():
        found = {f"accuracy_within_{level:g}": best_within(rows, names, key, level) for level in levels}
        best.append({"name": method, "scores": found})
        lines.append((f"{LINES[method][0]} ({len(names)} settings)", method, (), ()))
    lines.sort(key=lambda line: -values_of(best, line[1], list(found)[-1])[0])
    return table(best, lines, found)


def draw_frontier(rows, settings: dict):
    """Each method's envelope: the best held-out accuracy within a distance, over its settings and steps."""
    panels = []
    for key, what in REACHED.items():
        reach = {method: reach_of(rows, names, key) for method, names in settings.items()}
        first, envelopes = min(reach.values()) / 50, {}
        for method, names in settings.items():
            # 41 levels, evenly spaced in logarithms
            grid = [first * (reach[method] / first) ** (i / 40) for i in range(41)]
            envelopes[method] = grid, [[best_within(rows, names, key, level) for level in grid]]
        panels.append(("", f"within this {what}", "best accuracy, held out", envelopes))
    return figures.draw(panels, log_x=True)


# ---------------------------------------------------------------------------- what comes out
def slim(row, columns, curve) -> dict:
    """What tables and figures need of a run, to six digits: a row of results.json."""
    kept = {key: row["scores"][key] for key in columns if key in row["scores"]}
    scores = {key: float(f"{value:.6g}") for key, value in kept.items()}
    lists = {key: [float(f"{value:.6g}") for value in row["curve"][key]] for key in curve if row["curve"]}
    return {"name": row["name"], "seed": row["seed"], "floor": row["floor"], "scores": scores, "curve": lists}


def features_of(rows) -> dict:
    """What `figures.draw_features` shows of runs, whose rows are whole."""
    mine = {name: [row for row in rows if row["name"] == name] for name in METHODS}
    change = {name: np.mean([row["feature_change"] for row in mine[name]], 0) for name in METHODS}  # (m,)
    most = np.argsort(-change["dpo"], kind="stable")[:50]
    largest = {name: mine[name][0]["scores"]["activations_policy"] for name in METHODS}
    moved = {name: change[name][most].tolist() for name in METHODS}
    return {"largest": largest, "moved": moved}


def publish(args, rows, plan: dict, tables: dict, **more):
    """Write rows into results.json, the tables as TASK.md, the figures as SVG; print the tables."""
    columns = dict.fromkeys(key for _, keys in plan.values() for key in keys)
    part = runtime.made_by() | {
        "rows": [slim(row, columns, CURVES.get(args.task, ())) for row in rows],
        **more,
    }
    assets, text = Path(args.assets), "\n".join(f"**{title}**\n\n{body}" for title, body in tables.items())
    runtime.write_json(assets / "results.json", read_json(assets / "results.json") | {args.task: part})
    runtime.write_text(assets / f"{args.task}.md", text)
    draw_figures(assets, {args.task: part})
    print(text)


def draw_figures(assets, results: dict):
    """The figures of these parts of results.json."""
    drawn = {}
    if part := results.get("comparison"):
        drawn["kl"] = figures.draw_distance(part["rows"], "kl", "KL(ref‖policy) (nats)", METHODS[1:])
        drawn["mse"] = figures.draw_distance(part["rows"], "mse", "D_FPO", METHODS[1:])
        drawn["features"] = figures.draw_features(part["features"])
    if part := results.get("frontier"):
        drawn["frontier"] = draw_frontier(part["rows"], part["settings"])
    for name, figure in drawn.items():
        figures.save(figure, Path(assets, f"{name}.svg"))


def alpha_at(wanted: float, D, alphas) -> float:
    """α at which D is `wanted`, to two digits: log D is taken as linear in log α; beyond all the nearest."""
    log_D, log_alpha = zip(*sorted(zip(np.log(D), np.log(alphas), strict=True)), strict=True)
    return float(f"{np.exp(np.interp(np.log(wanted), log_D, log_alpha)):.2g}")


def equal_size_alpha(rows) -> float:
    """α at which FPO without the SAE ends with FPO's D_FPO, from STATE_ALPHAS' runs."""
    names = ["fpo", *(name_of("no_sae", ("--alpha", f"{alpha:g}")) for alpha in STATE_ALPHAS)]
    wanted, *D = (statistics.mean(values_of(rows, name, "mse_rejected")) for name in names)
    return alpha_at(wanted, D, STATE_ALPHAS)


def run_task(args):
    """The runs of a task, then its tables and figures."""
    plan, more = PLANS[args.task](args), {}
    rows = runs.do_lines(args, lines_of(plan))
    if args.task == "ablation":  # one line more, which those runs tell
        # runs that are done are not repeated
        plan = ablation_plan(args, equal_size_alpha(rows))
        rows = runs.do_lines(args, lines_of(plan))
    if args.task == "frontier":
        more["settings"] = {name: [name_of(*line[1:3]) for line in part[0]] for name, part in plan.items()}
        titles = {f"Held-out accuracy at equal {what}": key for key, what in REACHED.items()}
        tables = {title: compare(rows, more["settings"], key) for title, key in titles.items()}
    else:
        tables = {title: table(rows, *part) for title, part in plan.items()}
    if args.task == "comparison":
        more["features"] = features_of(rows)
    publish(args, rows, plan, tables, **more)


# ---------------------------------------------------------------------------- the command line
def parse_args(argv=None):
    """Our flags, and `flags`, the children's by name. Defaults follow from the preset. All is checked."""
    about = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(allow_abbrev=False, **about)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    kind = {task: tasks.add_parser(task, allow_abbrev=False) for task in (*PLANS, "figures", "curves")}
    for each in (parser, *kind.values()):
        each.error = refuse
    for task in PLANS:
        flag = kind[task].add_argument
        flag("--preset", default="toy", choices=settings.PRESETS, help="train.py's (toy)")
        flag("--model", help="the SFT model that all start from (the preset's, made if missing)")
        flag("--seeds", type=int, nargs="+", help="(0 1 2; frontier 0)")
        flag("--samples", help="responses a prompt for the entropy (25)")
        flag("--out", help="folder of all runs (runs/PRESET/reproduce, or control)")
    for task in (*PLANS, "figures"):
        kind[task].add_argument("--assets", default="assets", help="folder of what comes out (assets)")
    kind["curves"].add_argument("runs", nargs="+", metavar="RUN", help="folder of a run: its --out")
    kind["curves"].add_argument("--svg", default="curves.svg", help="the figure's file (curves.svg)")
    args, words = parser.parse_known_args(argv)
    args.flags = runs.group_flags(words)
    if args.task in PLANS:
        fill_in(args)
        check(args)
    elif args.flags:
        refuse(f"--{next(iter(args.flags))}: {args.task} has no such flag")
    if args.task == "curves":
        runtime.check_output("svg", args.svg, folder=False)
    return args


def fill_in(args):
    """What follows from the preset: where all start, folders, seeds, how children are started, FPO's α."""
    is_toy = args.preset == "toy"
    # Control measures other things of the same settings: its runs are its own.
    args.out = args.out or f"runs/{args.preset}/{'control' if args.task == 'control' else 'reproduce'}"
    args.start = args.model or ("runs/toy/model" if is_toy else f"runs/{args.preset}/sft/model")
    args.makes_start = not (is_toy or args.model or Path(args.start).is_dir())
    args.seeds = args.seeds or ([0] if args.task == "frontier" else [0, 1, 2])
    args.eval_every = 200 if not is_toy else 10 if args.task == "frontier" else 25
    cards, shards = 0 if is_toy else torch.cuda.device_count(), args.flags.get("shard", [])[1:] == ["fsdp"]
    args.at_once = 1 if cards else 2  # a thread each
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(max(1, cards))]
    args.python = ["python", *(many if cards > 1 or shards else [])]
    words = ["--preset", args.preset, "--model", args.start]
    for name in ("alpha", "dataset", "eval_dataset", "sae"):  # α, and what the preset `own` must be given
        words += args.flags.get(name, [])
    args.alpha = settings.parse_args(words).alpha


def check(args):
    """UserError for what a task can't do, or would drop, before anything runs."""
    task, lines = args.task, lines_of(PLANS[args.task](args))
    allowed = PRESETS.get(task, settings.PRESETS)
    if args.preset not in allowed:
        refuse(f"{task} --preset {args.preset}: one of {', '.join(allowed)}")
    children = ({line[1] for line in lines} - {"sft"}) | ({"sft"} if args.makes_start else set())
    children |= set() if task == "frontier" else {"score", "measure"}
    for name, field in ((name, runs.field_of(name)) for name in args.flags):
        if field in (*runs.SET_HERE, *SET_BY_LINES[task]):
            which = "--seeds gives them" if name == "seed" else f"{task} sets it for each of its runs"
            refuse(f"--{name}: not taken here: {which}")
        if not any(runs.knows(child, name) for child in children):
            refuse(f"--{name}: no run of {task} has such a flag")
    if task == "frontier" and args.samples is not None:
        refuse(f"--samples {args.samples}: frontier samples nothing")
    if args.makes_start and (given := {"dataset", "eval_dataset"} & args.flags.keys()):
        told = f"train.py --method sft --preset {args.preset} makes it, from other data; then give --model"
        refuse(f"--{given.pop()}: {args.start} is not there; {told}")
    runtime.check_output("assets", args.assets, folder=True)
    commands = [runs.sft_command(args)] if args.makes_start else []
    for (_, method, flags, _), seed in itertools.product(lines, {min(args.seeds), max(args.seeds)}):
        commands += runs.make_run(args, method, flags, seed)["commands"]
    runs.check_commands(commands)


def main(argv=None):
    """What all runs start from, where it is missing; then the runs, the tables and the figures."""
    args = parse_args(argv)
    if args.task == "curves":
        figures.save(figures.draw_curves(args.runs), args.svg)
        return print(args.svg)
    if args.task == "figures":
        return draw_figures(args.assets, read_json(Path(args.assets, "results.json")))
    if args.preset == "toy":
        elsewhere = {"sae_layer", "sae_site"} & args.flags.keys()
        toy.make_world("runs/toy", all_saes=args.task == "ablation" or bool(elsewhere))
    elif args.makes_start:
        log = Path(args.start).parent / "log.txt"
        print(f"making {args.start}; its log is {log}", flush=True)
        runs.do_commands([runs.sft_command(args)], log)
    run_task(args)


if __name__ == "__main__":
    runtime.run_script(main)
