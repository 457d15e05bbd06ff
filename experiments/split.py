"""Preference pairs of a public file, split by prompt into three sets: `choose`, `score` and `train`.

    python -m experiments.split --pairs instruction-data-with-preference.json --out FOLDER

The file is in rasbt/LLMs-from-scratch on GitHub, ch07/04_preference-tuning-with-dpo. FOLDER/train.jsonl then
is what `train.py --method sft` can make a model of before experiments/seeds.py compares methods on it.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import data
import runtime
from runtime import refuse

SEED, SIZES = 0, {"choose": 130, "score": 420}  # pairs at least; `train` has all others


def read_pairs(path) -> list[dict]:
    """{prompt, chosen, rejected} of a JSON list of {instruction, input, chosen, rejected}, or of JSONL lines.

    An input stands behind its instruction, after an empty line. Pairs of two equal responses are left out.
    """
    pairs = []
    try:
        text = Path(path).read_text()
        records = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
        for record in records:
            asked = data.question_of(record)[1]
            pair = {"prompt": asked, "chosen": record["chosen"], "rejected": record["rejected"]}
            if pair["chosen"] != pair["rejected"]:
                pairs.append(pair)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(f"--pairs {path}: no list of pairs of instruction, chosen and rejected: {error!r}")
    return pairs


def digest(value) -> str:
    """sha256 of a value that JSON can hold, the same for the same value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def split_pairs(pairs, seed: int, sizes: dict) -> dict[str, list[dict]]:
    """{set: its pairs}: `sizes` as they are named, at least so many pairs each, then `train`, all others.

    Prompts come in the order of the hash of seed and prompt, each with all its pairs: so no prompt is in two
    sets, and the order of the file does not matter.
    """
    order = sorted(pairs, key=lambda pair: (digest([seed, pair["prompt"]]), digest(pair)))
    sets: dict[str, list[dict]] = {name: [] for name in (*sizes, "train")}
    names = iter(sets)
    name, last = next(names), None
    for pair in order:
        if pair["prompt"] != last and len(sets[name]) >= sizes.get(name, math.inf):
            name = next(names)
        sets[name].append(pair)
        last = pair["prompt"]
    if not sets["train"]:
        refuse(f"{len(pairs)} pairs are too few: {sizes} of them are not for training")
    return sets


def write_pairs(path, pairs):
    """Pairs as JSON lines, as data.load_pairs and `--dataset` read them."""
    runtime.write_text(path, "".join(json.dumps(pair) + "\n" for pair in pairs))


def write_sets(file, out: Path) -> dict[str, list[dict]]:
    """The three sets of a file, each written to OUT/NAME.jsonl."""
    sets = split_pairs(read_pairs(file), SEED, SIZES)
    for name, pairs in sets.items():
        write_pairs(out / f"{name}.jsonl", pairs)
    return sets


def main(argv=None):
    """The sets of the file that is named, and their sizes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("--pairs", required=True, help="JSON list, or JSONL, of prompt, chosen and rejected")
    parser.add_argument("--out", default="runs/seeds", type=Path, help="folder of the sets (runs/seeds)")
    args = parser.parse_args(argv)
    runtime.check_output("out", args.out, folder=True)
    for name, pairs in write_sets(args.pairs, args.out).items():
        print(f"{args.out / name}.jsonl: {len(pairs)} pairs")


if __name__ == "__main__":
    runtime.run_script(main)
