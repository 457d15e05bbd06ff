"""What README and docs say is so: links, names, commands, tables from files, examples that run.

python tests/test_readme.py     renews line links and tables of results
"""

import argparse
import contextlib
import importlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
ASSETS, README = ROOT / "assets", (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line.split(" #")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()
]
for page in PAGES.values():
    COMMANDS += [c.replace("\n", " ") for c in re.findall(r"`((?:python|torchrun) [^`]+)`", page)]
LINK = re.compile(r"\[`(\w+)\.(\w+)`\]\(((?:\.\./)?(?:experiments/)?)(\w+)\.py#L(\d+)\)")
TABLE = re.compile(r"(<!-- table: assets/(\S+?)(?: (\d+))? -->\n).*?(<!-- end -->)", re.S)


# ---------------------------------------------------------------------------- what is generated
def renewed(text):
    """A page with its line links and tables as they should be."""

    def link(match):
        module, name, folder, file, _ = match.groups()
        source = (ROOT / ("experiments" if "experiments" in folder else "") / f"{file}.py").read_text()
        pattern = rf"(?:def|class) {name}\b|{name}\b.* = "
        line = next(i for i, text in enumerate(source.splitlines(), 1) if re.match(pattern, text))
        return f"[`{module}.{name}`]({folder}{file}.py#L{line})"

    def table(match):
        found = re.findall(r"(?:^\|.*\n)+", (ASSETS / match[2]).read_text(), flags=re.M)
        return match[1] + found[int(match[3] or 0)] + match[4]

    return TABLE.sub(table, LINK.sub(link, text))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_tables_are_as_the_files_say(path):
    """Else: python tests/test_readme.py."""
    for ours, expected in zip(PAGES[path].splitlines(), renewed(PAGES[path]).splitlines(), strict=True):
        assert ours == expected


def test_readme_is_short_and_links_the_equations():
    assert len(README.splitlines()) <= 230 and len(LINK.findall(README)) >= 12


# ---------------------------------------------------------------------------- names, commands
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_linked_files_and_headings_exist(path):
    for target in set(re.findall(r"\]\(((?!http)[^)]+)\)", PAGES[path])):
        file, _, heading = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), target
        if heading and not re.fullmatch(r"L\d+", heading):
            titles = re.findall(r"^#+ (.*)$", place.read_text().lower(), flags=re.M)
            assert heading in [re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles], target


@pytest.mark.parametrize(
    "name", sorted({n for page in PAGES.values() for n in re.findall(r"`(\w+\.\w+)`", page)})
)
def test_names_exist(name):
    """Every `module.function` is a function of that module, every `file.py` a file."""
    module, attribute = name.split(".")
    if attribute in ("py", "txt", "json", "jsonl", "cff", "ipynb", "md"):
        assert attribute in ("txt", "json", "jsonl", "md") or (ROOT / name).exists()
    elif (ROOT / f"{module}.py").exists():
        assert hasattr(importlib.import_module(module), attribute)


SCRIPT = re.compile(r"(?:(train|eval_diversity|toy)\.py|-m experiments\.(\w+))\s*(.*)")


# What stands on an earlier command's run is tested with it, below.
@pytest.mark.parametrize(
    "command", sorted({c for c in COMMANDS if SCRIPT.search(c) and "runs/NAME" not in c})
)
def test_commands_parse(command, monkeypatch, tmp_path):
    """The flags of every command are its script's, with values that it takes."""
    monkeypatch.chdir(tmp_path)
    Gemma2Config().save_pretrained("MODEL")  # all that any parser reads of a model
    name, experiment, words = SCRIPT.search(command).groups()
    module = importlib.import_module(name or f"experiments.{experiment}")
    if hasattr(module, "parse_args"):
        module.parse_args(shlex.split(words))
    elif words or experiment != "plan":  # which takes none
        parse = argparse.ArgumentParser.parse_args

        def parse_alone(*args):
            parse(*args)
            raise InterruptedError

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
        with pytest.raises(InterruptedError):
            module.main(shlex.split(words))


def test_main_job_and_tests_are_one_line_each():
    """What .ci/run reads from here."""
    assert sum(c.startswith("pip install") and c.endswith("&& pytest") for c in COMMANDS) == 1
    assert sum(c.startswith("pip install") and c.endswith("--preset toy") for c in COMMANDS) == 1


# ---------------------------------------------------------------------------- results
def test_results_say_how_they_were_made():
    """Every file of results names its command and a commit without changes on top of it."""
    found = [json.loads(path.read_text()) for path in sorted(ASSETS.rglob("*.json"))]
    parts = []  # a file is one part, or has several by name
    for whole in found:
        whole = whole.get("of", whole)  # what all its runs have in common
        parts += [whole] if {"made_by", "commit"} & set(whole) else whole.values()
    assert len(parts) >= 8
    for part in parts:
        made = part.get("made_by", part)
        assert re.fullmatch(r"[0-9a-f]{7,}", made["commit"]) and made["command"].startswith("python ")
        assert "CPU" in made["hardware"]


def cells(text):
    """{(row's label, place in its row): its numbers} of a table."""
    rows = [line.strip("|").split("|") for line in text.splitlines()[2:]]
    number = r"-?\d[\d.]*(?:e[-+]\d+)?"
    found = {(row[0].strip(), i): cell for row in rows for i, cell in enumerate(row[1:])}
    return {place: [float(x) for x in re.findall(number, cell)] for place, cell in found.items()}


@pytest.mark.parametrize("what", ["comparison", "ablation", "frontier", "control"])
def test_tables_are_those_of_the_rows(what):
    """Each cell of each published table, anew from results.json, whose numbers are rounded to six digits."""
    reproduce = importlib.import_module("experiments.reproduce")
    part, args = json.loads((ASSETS / "results.json").read_text())[what], reproduce.parse_args([what])
    plan, rows = reproduce.PLANS[what](args), part["rows"]
    if what == "ablation":
        plan = reproduce.ablation_plan(args, reproduce.equal_size_alpha(rows))
    if what == "control":  # whose rows have the names that lines had then
        ((lines, _),) = plan.values()
        then = {f"{name} features": name for name in ("all", "polite", "shout", "random")}
        then["no constraint"] = "free"
        now = {f"control_{then.get(line[0], 'sft')}": reproduce.name_of(*line[1:3]) for line in lines}
        rows = [row | {"name": now[row["name"]]} for row in rows]
    tables = {title: reproduce.table(rows, *columns) for title, columns in plan.items()}
    if what == "frontier":
        titles = {f"Held-out accuracy at equal {name}": key for key, name in reproduce.REACHED.items()}
        tables = {title: reproduce.compare(rows, part["settings"], key) for title, key in titles.items()}
    published = dict(re.findall(r"\*\*(.*?)\*\*\n\n((?:\|.*\n?)+)", (ASSETS / f"{what}.md").read_text()))
    assert published.keys() == tables.keys()
    rounded = 0.051 if what == "control" else 0  # its file was written with one digit
    for title, table in tables.items():
        ours, theirs = cells(table), cells(published[title])
        assert ours.keys() == theirs.keys() and sum(map(len, ours.values())) >= 9
        for place, numbers in ours.items():
            assert numbers == pytest.approx(theirs[place], rel=2e-3, abs=rounded), (title, place)


# ---------------------------------------------------------------------------- examples
def test_eq_10_by_hand():
    """The README's worked example: I_k = {0, 1, 2}, D = (2² + 0.5² + 1²) / 2."""
    policy, reference = torch.tensor([[0.0, 3.0, 1.0, 0.0]]), torch.tensor([[2.0, 2.5, 0.0, 0.0]])
    assert importlib.import_module("losses").feature_mse(policy, reference, k=2).item() == 2.625
    for part in ("[0, 3, 1, 0]", "[2, 2.5, 0, 0]", "{0, 1, 2}", "2.625"):
        assert part in README


def test_snippet_runs():
    """The copied loss: by hand, u = 0.1/5 (-10 + 12) - 0.1/5 (-11 + 11) - 0.5 (0.03 - 0.02) = 0.035."""
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert float(re.search(r"[\d.]+", out.getvalue())[0]) == pytest.approx(0.6758, abs=1e-4)


def test_any_model_in_three_commands(folder, fork):
    """An SAE, FPO, scores: the README's commands with fewer steps, on the toy's files under other names."""
    for old, new in {"model": "MODEL", "train.jsonl": "pairs.jsonl", "test.jsonl": "held_out.jsonl"}.items():
        (folder / new).symlink_to(folder / "runs/toy" / old)
    shorter = {"train_sae": "--width 128 --steps 200 --tokens 4000", "fpo": "--steps 3 --eval_every 0"}
    shorter |= {"eval_diversity.py": "--samples 1 --prompts 3 --bootstrap 0"}
    lines = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    commands = [line for line in lines if "MODEL" in line and "OWNER/REPO" not in line]
    assert len(commands) == len(shorter)
    for command, (what, flags) in zip(commands, shorter.items(), strict=True):
        assert what in command
        words = [
            str(ROOT / word) if word.endswith(".py") else word
            for word in shlex.split(command.replace("NAME", "MODEL"), comments=True)[1:]
        ]
        out = fork(folder, *words, *flags.split()).finish()
    # The scores that the last one prints are those with which FPO ended: the same pairs, SAE and units.
    scores = dict(re.findall(r"^(\w+) +(\S+)", out, flags=re.M))
    ended = json.loads((folder / "runs/MODEL/fpo/scores.json").read_text())["after"]
    assert {"accuracy", "reward_accuracy", "mse_rejected", "kl_rejected"} <= ended.keys()
    for name, value in ended.items():
        assert float(scores[name]) == pytest.approx(value, rel=2e-3), name


if __name__ == "__main__":
    for path, text in PAGES.items():
        path.write_text(renewed(text))
