"""experiments/seeds.py: the split, what is chosen, the record and where it goes on, intervals by hand."""

import hashlib
import json
import re
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval_diversity
from experiments import seeds, split
from runtime import UserError
from sae import SAE, sae_figures

ROOT = Path(__file__).parent.parent


class Inline:
    """A pool whose work is done where it is handed in; it stands for ProcessPoolExecutor."""

    def __init__(self, *args, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def make_pair(prompt, chosen="yes", rejected="no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def make_line(name, seed=0, part="score", flags=(), **more):
    return {"set": part, "name": name, "task": "fpo", "seed": seed, "flags": list(flags), **more}


# ---------------------------------------------------------------------------- pairs
def test_the_public_file_and_its_joined_copy_give_the_same_pairs(tmp_path):
    """An input follows its instruction after an empty line; equal responses are left out."""
    public = [
        {"instruction": "Edit.", "input": "He go.", "output": "o", "rejected": "r", "chosen": "c"},
        {"instruction": "Add 1.", "input": "", "output": "o", "rejected": "2", "chosen": "Two."},
        {"instruction": "Same?", "input": "", "output": "o", "rejected": "x", "chosen": "x"},
    ]
    (tmp_path / "public.json").write_text(json.dumps(public, indent=4))
    joined = [make_pair("Edit.\n\nHe go.", "c", "r"), make_pair("Add 1.", "Two.", "2")]
    (tmp_path / "joined.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in joined))
    assert split.read_pairs(tmp_path / "public.json") == joined
    assert split.read_pairs(tmp_path / "joined.jsonl") == joined
    for text in ('[{"instruction": "x", "chosen": "y"}]', "[1]", "no pairs"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=r"--pairs .*bad\.json"):
            split.read_pairs(tmp_path / "bad.json")


def test_the_split_is_by_prompt_whole_and_the_same_in_any_order():
    prompts = [f"p{i % 30}" for i in range(40)]  # ten prompts have two pairs
    pairs = [make_pair(prompt, f"c{i}") for i, prompt in enumerate(prompts)]
    sets = split.split_pairs(pairs, 3, {"choose": 5, "score": 12})
    assert sets == split.split_pairs(pairs[::-1], 3, {"choose": 5, "score": 12})
    assert sets != split.split_pairs(pairs, 4, {"choose": 5, "score": 12})

    def place(prompt):
        """Where a prompt stands: the hash of what json makes of [3, "p7"]."""
        return hashlib.sha256(f'[3, "{prompt}"]'.encode()).hexdigest()

    order, found = sorted(set(prompts), key=place), [set(), set(), set()]
    sizes, counts = (5, 12, 40), [0, 0, 0]
    part = 0
    for prompt in order:  # prompt by prompt, until a set has enough
        part += counts[part] >= sizes[part]
        found[part].add(prompt)
        counts[part] += prompts.count(prompt)
    assert [{pair["prompt"] for pair in sets[name]} for name in ("choose", "score", "train")] == found
    assert [len(sets[name]) for name in ("choose", "score", "train")] == counts
    with pytest.raises(UserError, match="too few"):
        split.split_pairs(pairs, 3, {"choose": 5, "score": 36})


# ---------------------------------------------------------------------------- a random dictionary
def test_each_feature_of_a_random_sae_is_active_on_the_same_number_of_states():
    states = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) + 50
    arrays = seeds.random_sae(states, l0=1.6, width=16)
    sae = SAE(**arrays)
    active = (sae.encode(states) > 0).sum(0)  # 200 · 1.6 / 16, and by rounding perhaps the threshold's own
    assert set(active.tolist()) <= {20, 21}
    assert sae_figures(sae, states)["l0"] == pytest.approx(1.6, abs=16 / 200)
    z = (states - states.mean(0)) @ arrays["W_dec"].T
    assert torch.allclose(sae.encode(states).max(0).values, z.max(0).values, atol=1e-3)


def test_the_sets_are_written_by_a_command(tmp_path, monkeypatch, capsys):
    """Each pair is in one of them, as `--dataset` reads it; a bad file is named."""
    monkeypatch.setattr(split, "SIZES", {"choose": 2, "score": 3})
    pairs = [{"prompt": f"ask {i}", "chosen": "yes", "rejected": "no"} for i in range(9)]
    (tmp_path / "file.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = ["--pairs", str(tmp_path / "file.jsonl"), "--out", str(tmp_path / "sets")]
    split.main(words)
    lines = {name: (tmp_path / f"sets/{name}.jsonl").read_text().splitlines() for name in split.SIZES}
    lines["train"] = (tmp_path / "sets/train.jsonl").read_text().splitlines()
    assert {name: len(of) for name, of in lines.items()} == {"choose": 2, "score": 3, "train": 4}
    assert sorted(line for of in lines.values() for line in of) == [json.dumps(pair) for pair in pairs]
    assert "train.jsonl: 4 pairs" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--pairs no\.jsonl"):
        split.main(["--pairs", "no.jsonl", *words[2:]])


# ---------------------------------------------------------------------------- what is chosen
def trial(name, flag, number, **means):
    first = seeds.LINES[name][2]
    line = make_line(name, seeds.CHOOSING_SEED, "choose", [*first, flag, f"{number:g}"], means=means)
    return line | {"task": seeds.LINES[name][1]}


def test_alpha_and_learning_rate_are_chosen_by_their_rules():
    """From a record that has all trials; so no pool is needed."""
    shares, D = (0.8, 0.9, 0.879), (3e-5, 2e-5, 1e-5)  # 0.879 is more than 0.02 below
    runs = [
        trial("fpo", "--alpha", alpha, reward_accuracy=share, mse_rejected=d)
        for alpha, share, d in zip(seeds.ALPHAS, shares, D, strict=True)
    ]
    # Without the SAE D is 4e-1 / α, so 2e-5 is reached at 20,000: between 10,000 and 40,000.
    runs += [trial("no_sae", "--alpha", a, mse_rejected=0.4 / a) for a in (1e4, 4e4)]
    # The third rate is the most accurate, but writes worse than 1.5 + 0.1 nats a token.
    args = SimpleNamespace(lr=2e-5)  # SimPO's are a tenth and three tenths of it, and all
    rates = zip((2e-6, 6e-6, 2e-5), (0.6, 0.7, 0.9), (1.5, 1.59, 1.61), strict=True)
    runs += [trial("simpo", "--lr", rate, accuracy=share, nll_chosen=nll) for rate, share, nll in rates]
    runs.append({"set": "choose", **seeds.BEFORE, "means": {"nll_chosen": 1.5}})
    chosen = {
        name: seeds.choose_flags(args, None, {"runs": runs}, name) for name in ("fpo", "no_sae", "simpo")
    }
    assert chosen == {"fpo": ["--alpha", "10000"], "no_sae": ["--alpha", "20000"], "simpo": ["--lr", "6e-06"]}
    many = seeds.scored_runs(None, None, {"runs": runs}, "no_sae")
    assert [run["seed"] for run in many] == list(seeds.SEEDS)
    assert many[0]["flags"] == ["--sae", "OUT/sae_last", "--alpha", "20000"]


@pytest.mark.parametrize(
    "wanted, alpha, tried",
    [(1e-2, 100, 2), (1 / 30, 30, 3), (1 / 400, 400, 3), (1 / 2000, 640, 3), (1, 10, 3)],
)
def test_an_alpha_of_equal_distance_by_hand(wanted, alpha, tried):
    """D is 1 / α here: 40 and 160 are tried, then 10 or 640; beyond these the nearest, to two digits."""
    asked = []

    def distances(alphas):
        asked.extend(alphas)
        return [1 / alpha for alpha in alphas]

    assert seeds.equal_alpha(distances, wanted, 40) == alpha and len(asked) == tried


# ---------------------------------------------------------------------------- the record
def test_a_finished_run_is_not_done_again_and_a_failed_one_leaves_the_finished(tmp_path, monkeypatch, capsys):
    args, done, broken = SimpleNamespace(assets=tmp_path), [], {1}

    def do_run(args, run):
        if run["seed"] in broken:
            raise UserError(f"seed {run['seed']} failed")
        done.append(run["seed"])
        return run | {"means": {"accuracy": run["seed"] / 10}, "seconds": 1}

    monkeypatch.setattr(seeds, "do_run", do_run)
    of = {"model": "m", "pairs": "p", "split": {"seed": 0}, "training": "t", "torch": "2"}
    of["saes"] = {"last": {"digest": "a"}}
    many = [make_line("fpo", seed) for seed in (0, 1, 2)]
    record = seeds.open_record(tmp_path / "seeds.json", of)
    with pytest.raises(UserError, match="seed 1 failed"):
        seeds.do_runs(args, Inline(), record, many)
    record = seeds.open_record(tmp_path / "seeds.json", of | {"torch": "3"})  # another start
    assert {line["seed"] for line in record["runs"]} == {0, 2} and record["of"] == of
    broken.clear()
    lines = seeds.do_runs(args, Inline(), record, many)
    assert sorted(done) == [0, 1, 2]  # each once
    assert [line["means"]["accuracy"] for line in lines] == [0, 0.1, 0.2]  # as they were asked for
    other = seeds.do_runs(args, Inline(), record, [many[0] | {"flags": ["--beta", "2"]}])
    assert done[3:] == [0] and other[0]["flags"] == ["--beta", "2"]  # other flags are another run
    for key in ("model", "pairs", "split", "training"):
        with pytest.raises(UserError, match=rf"seeds\.json: its {key} is .*, here it is other") as error:
            seeds.open_record(tmp_path / "seeds.json", of | {key: "other"})
        assert "\n" not in str(error.value)
    more = seeds.open_record(tmp_path / "seeds.json", of | {"saes": {"middle": {"digest": "b"}}})
    assert set(more["of"]["saes"]) == {"last", "middle"}  # a later stage's
    with pytest.raises(UserError, match=r"its SAE last is .*'a'.*, here it is .*'b'"):
        seeds.open_record(tmp_path / "seeds.json", of | {"saes": {"last": {"digest": "b"}}})


# ---------------------------------------------------------------------------- intervals
def test_intervals_by_hand():
    """Of one seed and two pairs a draw takes one pair; else the variance is s²/S of seeds, s²/P of pairs."""
    assert seeds.interval(np.array([[0.0, 1.0]])) == (0.5, 0.0, 1.0)
    assert seeds.interval(np.full((5, 9), 3.0)) == pytest.approx((3, 3, 3))
    g = np.random.default_rng(1)
    of_seeds, of_pairs = g.normal(size=30), 4 * g.normal(size=400)
    mean, low, high = seeds.interval(of_seeds[:, None] + of_pairs)
    sd = (of_seeds.var(ddof=1) / 30 + of_pairs.var(ddof=1) / 400) ** 0.5
    assert mean == pytest.approx(of_seeds.mean() + of_pairs.mean())
    assert ((high - low) / 2) == pytest.approx(1.96 * sd, rel=0.06)


def test_differences_are_paired_over_seeds_and_pairs():
    """Of pairs that both methods rank alike nothing is left, however much they differ among themselves."""
    runs = []
    for seed, ours, theirs in ((2, "2200", "2000"), (0, "0022", "0002"), (1, "2222", None)):
        rest = {"reward_accuracy": ours, "kl_rejected": [100, 300, 0, 0], "D_rejected": [5, 5, 5, 5]}
        rest["means"] = {"teacher_forced_entropy": 2.0 + seed}
        runs.append(make_line("dpo_1", seed, accuracy=ours, **rest))
        if theirs:
            rest |= {"kl_rejected": [0, 200, 0, 0], "means": {"teacher_forced_entropy": 1.5 + seed}}
            runs.append(make_line("fpo", seed, accuracy=theirs, **rest))
    record = {"of": {}, "runs": runs}
    assert seeds.values(record, "dpo_1", "accuracy").tolist() == [
        [0, 0, 100, 100],
        [100] * 4,
        [100, 100, 0, 0],
    ]
    assert seeds.shared_seeds(record, "dpo_1", "fpo") == [0, 2]
    found = [seeds.difference(record, "dpo_1", "fpo", column) for column in seeds.COLUMNS]
    mean, low, high = found[0]  # a pair of four at each of the seeds 0 and 2
    assert mean == 25 and 0 <= low < 25 < high
    assert found[1] == (0, 0, 0) and found[3] == (0, 0, 0)  # equal at every seed and pair
    assert found[2][0] == 0.5  # one nat more on two pairs of four
    assert found[4] == (0.5, 0.5, 0.5)  # of each run: half a nat at both seeds


IN_README = {"DPO, β = 0.1": "dpo_0.1", "DPO, β = 1": "dpo_1", "TDPO-2": "tdpo2", "FPO, α = 0": "length"}
IN_README |= {"FPO, α = 10,000": "fpo_1e4", "FPO, α = 30,000": "fpo", "FPO, α = 30,000, β = 16": "fpo_16"}
IN_README |= {"FPO on hidden states in place of features": "no_sae"}


@pytest.mark.parametrize("model, folder", [("SmolLM2-135M", "assets"), ("Gemma-3-270M", "assets/gemma")])
def test_rows_of_the_readme_are_those_of_the_record(model, folder):
    """Mean ± deviation over the runs, to the digits that are printed."""
    runs = json.loads((ROOT / folder / "seeds.json").read_text())["runs"]
    runs = [run for run in runs if run["set"] == "score"]
    rows = re.split(r"\| \*\*|\n\n", (ROOT / "README.md").read_text().split(f"| **{model}**")[1])[0]
    first, *rows = rows.splitlines()
    before, first = re.fullmatch(r" \(accuracy before: ([\d.]+)\): (.*)", first).groups()
    assert [float(before)] == [round(100 * r["means"]["accuracy"], 1) for r in runs if r["name"] == "before"]
    columns = {"accuracy": 100, "reward_accuracy": 100, "kl_rejected": 1, "mse_rejected": 1e5}
    rows = [row.rstrip(" |").split(" | ") for row in (first, *(row[2:] for row in rows))]
    assert {row[0] for row in rows} | {"FPO, α = 30,000, β = 16"} == set(IN_README)  # of Gemma alone
    for label, of, *cells in rows:
        name = IN_README[label]
        assert int(of) == 5
        for cell, (column, factor) in zip(cells, columns.items(), strict=True):
            found = np.array([factor * run["means"][column] for run in runs if run["name"] == name])
            for told, ours in zip(cell.split(" ± "), (found.mean(), found.std(ddof=1)), strict=True):
                unit = 10.0 ** -len(told.partition(".")[2])
                assert float(told) == pytest.approx(ours, abs=0.501 * unit), (label, column)


@pytest.mark.parametrize("folder", ["assets", "assets/gemma", "assets/smollm2"])
def test_published_tables_are_those_of_the_record(folder):
    """Each number anew; one in the last digit is granted, as processors round differently."""
    folder = ROOT / folder
    record = json.loads((folder / "seeds.json").read_text())
    (legend,) = seeds.draw(record).legends  # which has every line but π_ref's
    named = {run["name"] for run in record["runs"] if run["set"] == "score"} - {"before"}
    assert len(legend.get_texts()) == len(named)
    tables = "\n".join(seeds.make_tables(record))
    published, number = (folder / "seeds.md").read_text(), r"[-+]?\d[\d.,]*(?:e[-+]\d+)?"
    assert re.sub(number, "", tables) == re.sub(number, "", published)
    ours, theirs = (re.findall(number, text.replace(",", "")) for text in (tables, published))
    assert len(ours) > 10 and list(map(float, ours)) == pytest.approx(list(map(float, theirs)), rel=0.011)


# ---------------------------------------------------------------------------- all of it
def test_from_a_file_to_tables(world, tmp_path, monkeypatch, capsys):
    """Toy model, one seed: the lines' scores are eval_diversity.py's, and a second start trains nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(seeds, "ProcessPoolExecutor", Inline)
    (tmp_path / "pairs.jsonl").write_text("".join((world / "train.jsonl").open().readlines()[:90]))
    small = {"SEEDS": (0,), "SAE_STEPS": 3, "WIDTH": 128}
    small |= {"ALPHAS": (1e4,), "STAGES": ((("last",), ["before", "fpo"]), ((), ["dpo_1"]))}
    small["TRAINING"] = seeds.TRAINING.replace("--steps 16", "--steps 2")
    for name, value in small.items():
        monkeypatch.setattr(seeds, name, value)
    monkeypatch.setattr(split, "SIZES", {"choose": 10, "score": 30})
    kept = []
    monkeypatch.setattr(seeds.shutil, "rmtree", lambda path, **options: kept.append(path))
    words = ["--model", str(world / "model"), "--pairs", "pairs.jsonl", "--lr", "3e-3"]
    seeds.main(words)
    record = json.loads((tmp_path / "assets/seeds.json").read_text())
    done = {(run["set"], run["name"]) for run in record["runs"]}
    assert done == {("choose", "fpo"), ("score", "before"), ("score", "fpo"), ("score", "dpo_1")}
    assert len(record["runs"]) == 4
    # The last model lies there still: the other script, by that run's own settings and unit, finds the same.
    flags = ["--model", f"{kept[-1]}/model", "--reference", str(world / "model"), "--samples", "0"]
    flags += ["--dataset", "runs/seeds/score.jsonl", "--json", "scored.json", "--bootstrap", "0"]
    eval_diversity.main(eval_diversity.parse_args(flags))
    expected, line = json.loads((tmp_path / "scored.json").read_text()), record["runs"][-1]
    for key in ("accuracy", "reward_accuracy", "kl_rejected", "mse_rejected", "nll_chosen"):
        assert line["means"][key] == pytest.approx(expected[key], rel=1e-3), key
    assert sum(map(int, line["accuracy"])) / 60 == pytest.approx(expected["accuracy"])
    assert len(line["D_rejected"]) == 30 and line["means"]["kl_rejected"] > 0
    table = (tmp_path / "assets/seeds.md").read_text()
    assert "| DPO, β = 1 | 1 |" in table and (tmp_path / "assets/seeds.svg").exists()
    monkeypatch.setattr(seeds, "do_run", None)
    seeds.main(words)  # nothing is left to do
    seeds.main([])  # the tables again, from the record alone
    assert (tmp_path / "assets/seeds.md").read_text() == table
    (tmp_path / "pairs.jsonl").write_text("".join((world / "train.jsonl").open().readlines()[:80]))
    with pytest.raises(UserError, match="its pairs is"):
        seeds.main(words)
