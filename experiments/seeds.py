"""A real model with enough seeds: methods compared pair by pair and seed by seed, on three sets of pairs.

    python -m experiments.seeds --model MODEL --pairs instruction-data-with-preference.json
    python -m experiments.seeds    the tables and the figure again, from the record alone

MODEL: SmolLM2-135M-Instruct, or another after SFT. The pairs are split as experiments/split.py does: on
`choose` α and SimPO's learning rate are chosen, `score` is read for the results alone. A run is a training of
16 steps of 8 pairs, and the scores of every pair: a line of ASSETS/seeds.json, after which a later start goes
on. Another model takes another --assets and --out.

Differences between methods are paired: with one seed all see the same pairs in the same order, and all are
scored on the same pairs. `interval` says how far they can be trusted.
"""

import argparse
import functools
import gc
import itertools
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
import fpo
import metrics
import runtime
import settings
import train
from experiments import control, figures, reproduce, runs, split, train_sae
from loading import choose_layout, load_config, load_lm
from offline import sae_identity
from runtime import refuse
from sae import SAE, load_sae, sae_figures, write_sae

SEEDS, CHOOSING_SEED = (0, 1, 2, 3, 4), 9  # no run that is scored has the second
WIDTH, SAE_STEPS, TOKENS = 2048, 2000, 2048  # of the SAEs (3.6 times SmolLM2's d); most tokens of a forward
# Flags of every training; LR is --lr. Scores are made here, of single pairs: train.py's ends are 8 pairs.
TRAINING = "--batch_size 8 --steps 16 --lr LR --feature_scale rms --eval_every 0 --no_eval_kl --show 0"
TRAINING += f" --save_every 0 --no_activation_checkpointing --micro_batch_tokens {TOKENS}"


# ---------------------------------------------------------------------------- dictionaries
def random_sae(states, l0: float, width: int, seed: int = 0) -> dict:
    """Arrays of an SAE of random directions, each feature active on the same share of `states` (n, d).

    The share is l0 / width, so their mean number is `l0`. Directions are uniform on the sphere, of the states
    less their mean; a threshold is the quantile of its feature that leaves the share above it.
    """
    g, mean = torch.Generator().manual_seed(seed), states.mean(0)
    W_dec = torch.nn.functional.normalize(torch.randn(width, states.shape[1], generator=g), dim=-1)
    z, above = (states - mean) @ W_dec.T, round(len(states) * l0 / width)
    threshold = z.topk(above + 1, dim=0).values[-1].clamp(min=0)  # (m,): `above` states exceed it
    return {"W_enc": W_dec.T, "b_enc": -mean @ W_dec.T, "W_dec": W_dec, "b_dec": mean, "threshold": threshold}


def read_states(args, name: str, layer: int):
    """States (n, d) of a layer at the response tokens of a set's pairs: what an SAE there reads."""
    device, tokenizer = runtime.start_processes(), data.load_tokenizer(args.model)
    pairs, lm = data.load_pairs(str(args.out / f"{name}.jsonl"), tokenizer), load_lm(args.model, device)
    site = SimpleNamespace(d=lm.config.get_text_config().hidden_size)
    policy = fpo.Policy(lm.eval(), [site], [(layer, "res")])
    rows = choose_layout(SimpleNamespace(layout="auto"), pairs, device)
    return train_sae.read_states(policy, pairs, list(range(len(pairs))), rows, max_tokens=TOKENS)


def make_saes(args, places: dict[str, int]):
    """OUT/sae_NAME for each {name: layer}: of the training pairs' responses alone; `random` by `random_sae`.

    `made.json`, which comes last, has L0 and FVU on the choosing pairs, L0 and mean ‖h‖² on the training set.
    """
    read: dict[int, list] = {}
    for name, layer in places.items():
        folder = args.out / f"sae_{name}"
        if (folder / "made.json").exists():
            continue
        if layer not in read:
            read = {layer: [read_states(args, part, layer).cpu() for part in ("train", "choose")]}
        states, others = read[layer]  # (n, d) each
        if name == "random":  # as sparse as the first of them
            l0 = runs.read_json(args.out / "sae_last/made.json")["l0_of_training"]
            arrays = random_sae(states, l0, WIDTH)
        else:
            options = {"width": WIDTH, "steps": SAE_STEPS, "lr": 3e-3, "l0_weight": 1e-3}
            arrays = train_sae.train_centred(states.clone(), **options)
        sae = SAE(**arrays)
        made = {"layer": layer, "tokens": len(states), **sae_figures(sae, others)}
        norm = states.square().sum(-1).mean().item()
        made |= {"l0_of_training": sae_figures(sae, states)["l0"], "norm": norm}
        made["digest"] = sae_identity(sae, (layer, "res"))[-1]
        write_sae(folder, arrays, layer, "res", made["l0"])
        runtime.write_json(folder / "made.json", made)
        print(f"{folder}: {made}", flush=True)


# ---------------------------------------------------------------------------- one run
class Reference(fpo.Policy):
    """The frozen reference, which reads each batch once: scores of a set are made of the same batches."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen: dict[bytes, tuple] = {}  # {a batch's tokens: what `_read` returned}

    def _read(self, batch):
        """As fpo.Policy's: states, the head's weight and what the SAE reads; kept for the next run."""
        key = batch.tokens.cpu().numpy().tobytes()
        if key not in self.seen:
            self.seen[key] = super()._read(batch)
        return self.seen[key]


@functools.cache
def open_tools(model: str, out: Path) -> SimpleNamespace:
    """What every run is scored with: the reference, pairs of each set, and the first SAE with its unit."""
    device, tokenizer = runtime.start_processes(), data.load_tokenizer(model)
    pairs = {name: data.load_pairs(str(out / f"{name}.jsonl"), tokenizer) for name in split.SIZES}
    made = runs.read_json(out / "sae_last/made.json")
    sae = load_sae(str(out / "sae_last"), layer=made["layer"], width=None).to(device)
    parts = {"device": device, "sae": sae, "site": (made["layer"], "res"), "unit": made["norm"]}
    reference = Reference(load_lm(model, device), [sae], [parts["site"]])
    return SimpleNamespace(pairs=pairs, reference=reference, **parts)


def score(tools, model: str, method: str, name: str) -> dict:
    """A model's scores of every pair of a set, as a line of the record has them.

    accuracy and reward_accuracy (metrics.pair_columns, by the method's reward): a digit a pair, 2 where the
    chosen response is above, 1 for a tie, 0. kl_rejected: hundredths of a nat. D_rejected: D_FPO of the first
    SAE, whichever the run was trained with, in 1e-6 of the mean ‖h‖². means: of all columns, which is all
    that is kept of the choosing set.
    """
    policy, pairs = fpo.Policy(load_lm(model, tools.device), [tools.sae], [tools.site]), tools.pairs[name]
    policy.hold_reference(tools.reference)
    rows = choose_layout(SimpleNamespace(layout="auto"), pairs, tools.device)
    table = metrics.score_pairs(policy, pairs, units=[tools.unit], max_tokens=TOKENS, progress=True, **rows)
    columns = metrics.pair_columns(table, method=method)
    means = {key: (above.sum() / below.sum()).item() for key, (above, below) in columns.items()}
    line: dict = {"means": {key: float(f"{value:.5g}") for key, value in means.items()}}
    if name == "score":
        for key in ("accuracy", "reward_accuracy"):
            line[key] = "".join(map(str, (2 * columns[key][0]).int().tolist()))
        line["kl_rejected"] = (1e2 * columns["kl_rejected"][0]).round().int().tolist()
        line["D_rejected"] = (1e6 * columns["mse_rejected"][0]).round().int().tolist()
    return line


def do_run(args, run: dict) -> dict:
    """A training and its scores: the run's line of the record. What it writes is deleted.

    run: set, name, seed, flags (OUT is the folder), task: of train.py, control.py, or none: π_ref itself.
    """
    began, task, out = time.perf_counter(), run["task"], args.out / f"run_{os.getpid()}"
    tools = open_tools(args.model, args.out)
    if task == "none":
        return run | score(tools, args.model, "fpo", run["set"])
    words = [*args.training.split(), "--model", args.model, "--dataset", "OUT/train.jsonl"]
    words += ["--eval_dataset", "OUT/ends.jsonl", "--cache_dir", "OUT/reference"]
    words = [word.replace("OUT", str(args.out)) for word in (*words, *run["flags"])]
    words += ["--out", str(out), "--seed", str(run["seed"])]
    shutil.rmtree(out, ignore_errors=True)
    if task == "no_sae":
        control.main(["--task", task, *words])
    else:
        train.main(settings.parse_args(["--method", task, *words]))
    steps, _ = figures.read_metrics(out)
    shares = [step["constraint_share"] for step in steps[-10:] if "constraint_share" in step]
    line = run | score(tools, str(out / "model"), "fpo" if task == "no_sae" else task, run["set"])
    line["means"] |= {"constraint_share": round(sum(shares) / len(shares), 4)} if shares else {}
    shutil.rmtree(out)
    gc.collect()
    return line | {"seconds": round(time.perf_counter() - began), "commit": args.commit}


# ---------------------------------------------------------------------------- what is run, in this order
LAST, RANDOM, MIDDLE = (("--sae", f"OUT/sae_{name}") for name in ("last", "random", "middle"))
# {name: (label, task, flags, how the rest of its flags is chosen)}
LINES: dict[str, tuple] = {
    "before": ("before training", "none", (), None),
    "fpo": ("FPO", "fpo", LAST, "largest_alpha"),
    "no_sae": ("FPO without the SAE", "no_sae", LAST, "equal_distance"),
    "dpo_0.1": ("DPO, β = 0.1", "dpo", (*LAST, "--beta", "0.1"), None),
    "dpo_1": ("DPO, β = 1", "dpo", (*LAST, "--beta", "1"), None),
    "fpo_1e4": ("FPO", "fpo", (*LAST, "--alpha", "10000"), None),  # the presets' α
    "random": ("FPO, a random SAE", "fpo", RANDOM, "equal_distance"),
    "tdpo2": ("TDPO-2", "tdpo2", LAST, None),
    "length": ("FPO, α = 0: DPO divided by length", "fpo", (*LAST, "--alpha", "0"), None),
    "simpo": ("SimPO", "simpo", LAST, "learning_rate"),
    "middle": ("FPO, the middle layer's SAE", "fpo", MIDDLE, "equal_distance"),
    # Responses have 16 tokens on average: a β of 2 and 16 divided by them are of DPO's 0.1 and 1.
    "length_2": ("DPO divided by length, β = 2", "fpo", (*LAST, "--alpha", "0", "--beta", "2"), None),
    "length_16": ("DPO divided by length, β = 16", "fpo", (*LAST, "--alpha", "0", "--beta", "16"), None),
    "fpo_16": ("FPO, α = 30,000, β = 16", "fpo", (*LAST, "--alpha", "30000", "--beta", "16"), None),
}
# What the claims need comes first. (SAEs that a stage needs, its lines)
STAGES: tuple[tuple[tuple, list], ...] = (
    (("last",), list(LINES)[:6]),
    ((), ["length", "tdpo2"]),
    (("random",), ["random", "simpo"]),
    (("middle",), ["middle", "length_2"]),
    ((), ["length_16", "fpo_16"]),
)
ALPHAS = (3e3, 1e4, 3e4)
BEFORE = {"name": "before", "task": "none", "seed": 0, "flags": []}  # the reference, not trained


def choose_flags(args, pool, record, name: str) -> list[str]:
    """The flags that a line leaves open, chosen on the choosing set by trainings with one seed.

    largest_alpha: the largest α whose reward accuracy is at most 0.02 below the best. learning_rate: the most
    accurate of those that raise the NLL of the chosen response by at most 0.1 nats a token. equal_distance:
    the α at which D_FPO of the rejected ends where it does with the α that was chosen for FPO.
    """
    _, task, flags, rule = LINES[name]

    def trials(column, flag, numbers) -> list[float]:
        """A mean of the trainings with each of these numbers behind the flag."""
        run = {"set": "choose", "name": name, "task": task, "seed": CHOOSING_SEED}
        many = [run | {"flags": [*flags, flag, f"{number:g}"]} for number in numbers]
        return [line["means"][column] for line in do_runs(args, pool, record, many)]

    if rule == "largest_alpha":
        found = trials("reward_accuracy", "--alpha", ALPHAS)
        good = [alpha for alpha, share in zip(ALPHAS, found, strict=True) if share >= max(found) - 0.02]
        return ["--alpha", f"{max(good):g}"]
    if rule == "learning_rate":
        (before,) = do_runs(args, pool, record, [{"set": "choose"} | BEFORE])
        rates = [rate * args.lr for rate in (0.1, 0.3, 1)]
        nll, accuracy = (trials(column, "--lr", rates) for column in ("nll_chosen", "accuracy"))
        limit = before["means"]["nll_chosen"] + 0.1
        calm = [i for i, value in enumerate(nll) if value <= limit] or [0]
        return ["--lr", f"{rates[max(calm, key=lambda i: accuracy[i])]:g}"]
    alpha = choose_flags(args, pool, record, "fpo")
    run = {"set": "choose", "name": "fpo", "task": "fpo", "seed": CHOOSING_SEED, "flags": [*LAST, *alpha]}
    (line,) = do_runs(args, pool, record, [run])
    distances = functools.partial(trials, "mse_rejected", "--alpha")
    return ["--alpha", f"{equal_alpha(distances, line['means']['mse_rejected'], float(alpha[1])):g}"]


def equal_alpha(distances, wanted: float, alpha: float) -> float:
    """α at which D is `wanted`, to two digits. distances: D of each α of a list; it falls as α rises.

    Tried are `alpha` and 4 times that, and a third beyond them where `wanted` is.
    """
    alphas = [alpha, 4 * alpha]
    D = distances(alphas)
    if not min(D) <= wanted <= max(D):
        alphas.append(alpha / 4 if wanted > max(D) else 16 * alpha)
        D += distances(alphas[2:])
    return reproduce.alpha_at(wanted, D, alphas)


def scored_runs(args, pool, record, name: str) -> list[dict]:
    """A line's runs on the scoring set, one a seed, with what was chosen for it."""
    _, task, flags, rule = LINES[name]
    if task == "none":
        return [{"set": "score"} | BEFORE]
    chosen = choose_flags(args, pool, record, name) if rule else []
    run = {"set": "score", "name": name, "task": task, "flags": [*flags, *chosen]}
    return [run | {"seed": seed} for seed in SEEDS]


# ---------------------------------------------------------------------------- the record
def open_record(path, of: dict) -> dict:
    """The record at `path`, {"of": what its runs stand on, "runs": [a line each]}, or a new one.

    UserError where its runs stand on something else than `of`; the hardware may differ, and torch's version.
    """
    record = json.loads(Path(path).read_text()) if Path(path).exists() else {"of": of, "runs": []}
    for key in ("model", "pairs", "split", "training"):
        if (there := record["of"].get(key)) != of[key]:
            refuse(f"{path}: its {key} is {there}, here it is {of[key]}; take another --assets")
    for name, made in of["saes"].items():
        if (there := record["of"]["saes"].setdefault(name, made)) != made:
            refuse(f"{path}: its SAE {name} is {there}, here it is {made}; take another --assets")
    return record


def write_record(path, record: dict):
    """The record as JSON with a line for each run. Written aside and renamed."""
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in record["runs"])
    runtime.write_text(path, f'{{"of": {json.dumps(record["of"], indent=1)},\n"runs": [\n{lines}\n]}}\n')


def find(record: dict, run: dict) -> dict | None:
    """The run's line of the record, if it is done."""
    return next((line for line in record["runs"] if run.items() <= line.items()), None)


def do_runs(args, pool, record: dict, many: list[dict]) -> list[dict]:
    """The lines of some runs. What the record lacks is done by the pool, and written as each ends.

    Where one fails, no other begins; those at work end, and are written; then its error is raised.
    """
    futures = [pool.submit(do_run, args, run) for run in many if find(record, run) is None]
    failed = None
    for future in as_completed(futures):
        if future.cancelled():
            continue
        if error := future.exception():
            failed = failed or error
            for other in futures:
                other.cancel()
            continue
        line = future.result()
        record["runs"].append(line)
        write_record(args.assets / "seeds.json", record)
        print(time.strftime("%H:%M"), line["set"], line["name"], line["seed"], line["means"], flush=True)
    if failed:
        raise failed
    return [find(record, run) for run in many]


def stand_on(args, sets: dict, made: dict) -> dict:
    """What all runs of a record have in common. made: {SAE: its made.json}."""
    weights = [runtime.file_digest(path) for path in sorted(Path(args.model).glob("*.safetensors"))]
    of = {"model": weights or args.model, "file": runtime.file_digest(args.pairs)}
    of["pairs"] = split.digest(
        sorted(map(split.digest, itertools.chain(*sets.values())))
    )  # in any order, of either form
    of["split"] = {"seed": split.SEED, **{name: len(pairs) for name, pairs in sets.items()}}
    of |= {"training": args.training, "saes": made, "torch": torch.__version__, "at_once": args.at_once}
    return of | runtime.made_by()


# ---------------------------------------------------------------------------- what comes out
COLUMNS = {  # of the record: its factor, and the name in tables
    "accuracy": (50, "accuracy (%)"),
    "reward_accuracy": (50, "reward accuracy (%)"),
    "kl_rejected": (1e-2, "KL rejected (nats)"),
    "D_rejected": (1e-1, "D rejected / mean ‖h‖² (1e-5)"),
    "teacher_forced_entropy": (1, "entropy (nats)"),  # a token of the responses; of a run, not of each pair
}


def values(record: dict, name: str, column: str, seeds=SEEDS) -> np.ndarray:
    """(S, P) a column of this line's scored runs in its table's unit, of those of `seeds` that are done.

    P is 1 where the record has the run's mean alone.
    """
    mine = [run for run in record["runs"] if (run["set"], run["name"]) == ("score", name)]
    done = {run["seed"]: list(map(float, run.get(column) or [run["means"][column]])) for run in mine}
    return np.array([done[seed] for seed in seeds if seed in done]) * COLUMNS[column][0]


def interval(d, draws: int = 4000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of d (S, P), values of S seeds and P pairs: a 95 % interval by bootstrap over both.

    Each draw takes S − 1 of the seeds and, independently, P − 1 of the pairs, with replacement: with one item
    fewer than there are, the variance that each of the two adds is the unbiased estimate, s² / S and s² / P.
    """
    g, weights = np.random.default_rng(seed), []
    for n in d.shape:
        times = max(1, n - 1)
        weights.append(g.multinomial(times, [1 / n] * n, draws) / times)  # (draws, n)
    means = ((weights[0] @ d) * weights[1]).sum(1)
    return d.mean(), *np.quantile(means, (0.025, 0.975))


def shared_seeds(record, *names) -> list[int]:
    """The seeds that each of these lines has."""
    return [seed for seed in SEEDS if all(len(values(record, name, "accuracy", [seed])) for name in names)]


def difference(record, name: str, other: str, column: str) -> tuple[float, float, float]:
    """`interval` of one line less another, over the seeds that both have."""
    both = shared_seeds(record, name, other)
    return interval(values(record, name, column, both) - values(record, other, column, both))


def make_tables(record) -> list[str]:
    """Markdown tables: of means over seeds, and of all lines' differences from each of FPO's with the SAE."""
    done = [name for name in LINES if len(values(record, name, "accuracy"))]
    rows = [{"scores": run["means"], **run} for run in record["runs"] if run["set"] == "score"]
    rows = [row | {"scores": row["scores"] | {"D_1e-5": 1e5 * row["scores"]["mse_rejected"]}} for row in rows]
    columns = ("accuracy", "reward_accuracy", "kl_rejected", "D_1e-5")
    columns += ("teacher_forced_entropy", "nll_chosen", "constraint_share")
    tables = [reproduce.table(rows, [(label_of(record, name), name, (), ()) for name in done], columns)]
    for other in [name for name in ("fpo", "fpo_1e4") if name in done]:
        heads = [f"less {label_of(record, other)}", "seeds", *(head for _, head in COLUMNS.values())]
        text = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
        for name in [name for name in done if name not in ("before", other)]:
            found = [np.round(difference(record, name, other, column), 9) for column in COLUMNS]  # no -1e-17
            cells = [f"{mean:+.3g} [{low:.3g}, {high:.3g}]" for mean, low, high in found]
            seeds = str(len(shared_seeds(record, name, other)))
            text.append("| " + " | ".join([label_of(record, name), seeds, *cells]) + " |")
        tables.append("\n".join(text) + "\n")
    return tables


def label_of(record, name: str) -> str:
    """A line's label, with its α or learning rate where that was chosen."""
    flags = next(r["flags"] for r in record["runs"] if (r["set"], r["name"]) == ("score", name))
    flag, value = flags[-2:] or ("", 0)
    what = {"--alpha": "α =", "--lr": "lr"}
    told = flag in what and "α" not in LINES[name][0]
    return LINES[name][0] + (f", {what[flag]} {float(value):,g}" if told else "")


def draw(record):
    """Accuracies against KL and against D, a cross for each line: the 95 % intervals of its means."""
    names = [name for name in LINES if name != "before" and len(values(record, name, "accuracy"))]
    looks, panels = {"no_sae": "sft", "random": "simpo_kl", "middle": "tdpo1", "length": "free"}, []
    for y, x in itertools.product(("accuracy", "reward_accuracy"), ("kl_rejected", "D_rejected")):
        crosses = {}
        for name in names:
            method = name if name == "no_sae" else name.partition("_")[0]
            ends = (interval(values(record, name, key)) for key in (x, y))
            crosses[label_of(record, name)] = looks.get(method, method), *ends
        panels.append((COLUMNS[x][1], COLUMNS[y][1], crosses))
    return figures.draw_crosses(panels)


# ---------------------------------------------------------------------------- the command line
def parse_args(argv=None):
    """The flags; UserError for what no model and no data are needed to refuse."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error, flag = refuse, parser.add_argument
    flag("--model", help="a model after SFT, a directory or hub name; none: nothing is run")
    flag("--pairs", help="the file of pairs, as experiments/split.py reads it")
    flag("--lr", type=float, default=2e-5, help="learning rate; SimPO's is it or a fraction of it (2e-5)")
    flag("--out", default="runs/seeds", type=Path, help="folder of SAEs, reference and runs (runs/seeds)")
    most = 1 if torch.cuda.is_available() else os.cpu_count()
    flag("--at_once", type=int, default=most, help="runs side by side, a thread each (cores; CUDA: 1)")
    flag("--assets", default="assets", type=Path, help="folder of seeds.json, .md and .svg (assets)")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.pairs is None):
        refuse("--model and --pairs: both or none")
    if args.at_once < 1:
        refuse(f"--at_once {args.at_once}: must be at least 1")
    if not 0 < args.lr < np.inf:
        refuse(f"--lr {args.lr:g}: must be above 0")
    args.training = TRAINING.replace("LR", f"{args.lr:g}")
    for name in ("out", "assets"):
        runtime.check_output(name, getattr(args, name), folder=True)
    return args


def main(argv=None):
    """The split, the SAEs, every run that the record lacks; then the tables and the figure."""
    args = parse_args(argv)
    if args.model:
        # ---- three sets, and 8 pairs for the ends that train.py scores
        sets = split.write_sets(args.pairs, args.out)
        split.write_pairs(args.out / "ends.jsonl", sets["choose"][:8])
        # ---- a stage: its dictionaries, what its lines leave open, their runs
        layers = load_config(args.model).get_text_config().num_hidden_layers
        places = {"last": layers - 1, "random": layers - 1, "middle": layers // 2}
        args.commit = runtime.made_by()["commit"]
        # A thread each: two such runs take less time than one run of two threads after another.
        options = {"initializer": torch.set_num_threads, "initargs": (1,)}
        with ProcessPoolExecutor(args.at_once, multiprocessing.get_context("spawn"), **options) as pool:
            for saes, names in STAGES:
                make_saes(args, {name: places[name] for name in saes})
                made = {name: runs.read_json(args.out / f"sae_{name}/made.json") for name in saes}
                record = open_record(args.assets / "seeds.json", stand_on(args, sets, made))
                many = [run for name in names for run in scored_runs(args, pool, record, name)]
                do_runs(args, pool, record, many)  # all together: no core waits for a line's last seed
    if not (record := runs.read_json(args.assets / "seeds.json")):
        refuse(f"--assets {args.assets}: no seeds.json; --model and --pairs make one")
    runtime.write_text(args.assets / "seeds.md", text := "\n".join(make_tables(record)))
    figures.save(draw(record), args.assets / "seeds.svg")
    print(text)


if __name__ == "__main__":
    runtime.run_script(main)
