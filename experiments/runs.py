"""Trainings, their scores and measures as processes: which flag goes to which, and what a run leaves.

A run is a training, with a seed, and what scores it. Its commands are lists of words, so a path may hold
anything. A flag of the user's goes to every child that knows it, in the child's own spelling; before the
first run every command is read by its child's own parser.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import eval_diversity
import runtime
import settings
from eval_diversity import SHARED
from experiments import control, figures
from runtime import refuse
from settings import TABLE_5

FIELDS = {field.name for field in dataclasses.fields(settings.Config)}
# Flags that each run gets from here; and those of eval_diversity.py that may be given besides train.py's.
SET_HERE = ("seed", "method", "reference", "eval_kl", "features_top", "json", "train_pairs")
SAMPLING = ("prompts", "max_new_tokens", "top_p", "sample_batch", "bootstrap")
PARSERS = {"train": settings.parse_args, "eval_diversity": eval_diversity.parse_args}
PARSERS["experiments.control"] = control.parse_args


# ---------------------------------------------------------------------------- flags
def group_flags(words) -> dict[str, list[str]]:
    """{flag: its words, the first of them --flag}, in train.py's spelling; of a flag given twice the last."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [f"--{name}", *([value] if equals else [])]
        elif not found:
            refuse(f"{word}: neither a task nor a flag")
        else:
            found[name].append(word)
    return found


def field_of(flag: str) -> str:
    """The setting that a flag changes: `no_compile` is compile's."""
    return flag if flag in FIELDS else flag.removeprefix("no_")


def knows(child: str, flag: str) -> bool:
    """Whether a child takes a flag. child: the method or variant of a training, or "score", or "measure"."""
    field = field_of(flag)
    if child in ("score", "measure"):
        reads = (*SHARED, "dataset", "eval_dataset")
        return field in reads or (child == "score" and field in SAMPLING)
    if field == "alpha" and child in ("tdpo2", "simpo_kl"):  # another quantity's weight, in other units
        return False
    return field in FIELDS and TABLE_5.get(child, TABLE_5["fpo"]).get(field, True) is not None


def flags_for(args, child: str) -> list[str]:
    """Those of the user's words that a child takes. eval_diversity.py's --dataset is the held-out pairs."""
    given = {name: words for name, words in args.flags.items() if knows(child, name)}
    if child == "score":
        training, held_out = (given.pop(name, [None])[1:] for name in ("dataset", "eval_dataset"))
        given["train_pairs"] = ["--train_pairs", *training]  # without a value: the preset's pairs
        given |= {"dataset": ["--dataset", *held_out]} if held_out else {}
    return list(itertools.chain(*given.values()))


def check_commands(commands):
    """UserError for the first command that its child would refuse: its own parser reads it."""
    for command in commands:
        at = len(command) - command[::-1].index("-m")
        PARSERS[command[at]](command[at + 1 :])


# ---------------------------------------------------------------------------- runs
def name_of(method: str, flags) -> str:
    """A name for the runs of a line: the same settings, the same name, in whichever table."""
    return "_".join(re.findall(r"[\w.-]+", " ".join([method, *flags]).replace("--", "")))


def sft_command(args) -> list[str]:
    """The training of the model that all runs start from."""
    words = ["--method", "sft", "--preset", args.preset, "--out", str(Path(args.start).parent)]
    return [*args.python, "-m", "train", *words, *flags_for(args, "sft")]


def make_run(args, method: str, flags, seed: int) -> dict:
    """The commands of a training and its evaluation; `sft` is the start itself, which is only evaluated.

    method: one of train.py's, or a variant of FPO that experiments.control trains. flags: words for train.py.
    """
    name, preset = name_of(method, flags), ["--preset", args.preset]
    out = f"{args.out}/{name}_seed{seed}"
    models = ["--model", args.start if method == "sft" else f"{out}/model", "--reference", args.start]
    trainer = ["train", "--method"] if method in TABLE_5 else ["experiments.control", "--task"]
    training = [*args.python, "-m", *trainer, method, *preset, "--model", args.start, "--out", out]
    training += ["--seed", str(seed), "--eval_every", str(args.eval_every), "--eval_kl"]
    training += [*flags_for(args, method), *flags]
    scoring = [*args.python, "-m", "eval_diversity", *preset, *models, *flags_for(args, "score")]
    scoring += ["--seed", str(seed), "--samples", args.samples or "25"]
    scoring += ["--features_top", "50", "--json", f"{out}/scored.json"]
    measure = "styles" if args.task == "control" else "measure"
    measuring = ["python", "-m", "experiments.control", "--task", measure, *preset, *models]
    measuring += [*flags_for(args, "measure"), "--json", f"{out}/measured.json"]
    measuring += ["--seed", str(seed)] if args.task == "control" else []
    commands = [training] if method != "sft" else []
    if args.task != "frontier":  # training's own evaluations are enough there
        # lines with flags of their own are in no table that shows measures
        commands += [scoring] if flags and args.task != "control" else [scoring, measuring]
    return {"name": name, "method": method, "seed": seed, "folder": out, "commands": commands}


def read_json(path) -> dict:
    """What a JSON file holds; {} where there is none."""
    return json.loads(Path(path).read_text()) if Path(path).exists() else {}


def do_commands(commands, log: Path):
    """Commands in turn, what they say in a file. UserError, with the last of it, where one fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        for command in commands:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            words = [sys.executable, *command[1:]]
            if status := subprocess.run(words, stdout=file, stderr=file, env=env).returncode:
                said = log.read_text().strip().splitlines() or [""]
                told = [line for line in said if line.startswith("error")] or said  # torchrun adds more
                refuse(f"{log}: a command ended with status {status}: {told[-1]:.300}")


def do_run(run: dict) -> str:
    """The run's commands, unless run.json, which comes last, tells of the same. Its folder."""
    folder, began = Path(run["folder"]), time.perf_counter()
    if run.items() <= read_json(folder / "run.json").items():
        return run["folder"]
    (folder / "run.json").unlink(missing_ok=True)
    do_commands(run["commands"], folder / "log.txt")
    if run["method"] != "sft" and not (folder / "scores.json").exists():  # a signal ended it, with status 0
        refuse(f"{folder}: the training was stopped; the same command goes on with the others")
    made = runtime.made_by() | {"seconds": round(time.perf_counter() - began, 1)}
    runtime.write_json(folder / "run.json", run | made)
    return run["folder"]


def do_lines(args, lines) -> list[dict]:
    """Do the runs of some tables' lines, `at_once` side by side, and return what `collect` reads of each.

    Where one fails, those at work end, and no other begins.
    """
    weights = sorted(Path(args.start).glob("*.safetensors"))
    start = [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]
    runs = {}  # by folder: tables share runs
    for (_, method, flags, _), seed in itertools.product(lines, args.seeds):
        run = make_run(args, method, flags, seed) | {"start": start}
        runs[run["folder"]] = run
    with ThreadPoolExecutor(args.at_once) as pool:
        try:
            for number, folder in enumerate(pool.map(do_run, runs.values()), 1):
                print(f"{number} of {len(runs)} runs: {folder}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [collect(folder) for folder in runs]


def collect(folder: str) -> dict:
    """A run: its name, seed and folder, its scores, and those of held-out pairs over training, as lists."""
    names = ("run", "config", "scored", "measured")
    run, config, scores, measured = (read_json(f"{folder}/{name}.json") for name in names)
    change = measured.pop("feature_change", [])
    scores, curve = scores | measured, {}
    if "train" in scores:  # Table 2's protocol
        scores["train_accuracy"] = scores["train"]["accuracy"]
    if config:  # SFT is not trained
        steps, curve = figures.read_metrics(folder)
        scores["train_seconds"] = sum(config["batch_size"] / step["pairs_per_s"] for step in steps)
    # D_FPO that rounding makes, in the run's units.
    floor = (config.get("audit", {}).get("floor") or 0) / statistics.mean(config.get("units") or [1])
    row = {"name": run["name"], "seed": run["seed"], "scores": scores, "curve": curve, "floor": floor}
    return row | {"feature_change": change}
