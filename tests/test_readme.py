"""What README and docs say is so: links, names, commands, tables from files, examples that run.

python tests/test_readme.py     renews line links and tables of results
"""

import argparse
import contextlib
import importlib
import inspect
import io
import json
import re
import shlex
import statistics
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
ASSETS, README = ROOT / "assets", (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line.split(" #")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()
]
for page in PAGES.values():
    COMMANDS += re.findall(r"`((?:python|torchrun) [^`]+)`", page)
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
    assert len(README.splitlines()) <= 200 and len(LINK.findall(README)) >= 12


# ---------------------------------------------------------------------------- names, commands
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_linked_files_and_headings_exist(path):
    for target in set(re.findall(r"\]\(((?!http)[^)]+)\)", PAGES[path])):
        file, _, heading = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), target
        if heading and not re.fullmatch(r"L\d+", heading):
            titles = re.findall(r"^#+ (.*)$", place.read_text(), flags=re.M)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], (
                target
            )


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


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if SCRIPT.search(c)}))
def test_commands_parse(command, monkeypatch, tmp_path):
    """The flags of every command are its script's, with values that it takes."""
    monkeypatch.chdir(tmp_path)
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
    found = [json.loads(path.read_text()) for path in sorted(ASSETS.glob("*.json"))]
    parts = [
        part
        for whole in found
        for part in ([whole] if {"made_by", "commit"} & set(whole) else whole.values())
    ]
    assert len(parts) >= 8
    for part in parts:
        made = part.get("made_by", part)
        assert re.fullmatch(r"[0-9a-f]{7,}", made["commit"]) and made["command"].startswith("python ")
        assert "CPU" in made["hardware"]


@pytest.mark.parametrize("what", ["comparison", "control", "ablation"])
def test_tables_are_those_of_the_rows(what):
    """Mean and deviation over seeds, anew from results.json, of the first column that every run has."""
    rows, text = (
        json.loads((ASSETS / "results.json").read_text())[what]["rows"],
        (ASSETS / f"{what}.md").read_text(),
    )
    accuracy = {}
    for row in rows:
        accuracy.setdefault(row["name"], []).append(100 * row["scores"]["accuracy"])
    several = [values for values in accuracy.values() if len(values) > 1]
    assert len(several) >= 6
    for values in several:
        assert f"| {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} |" in text


# ---------------------------------------------------------------------------- examples
def test_eq_10_by_hand():
    """The README's worked example: I_k = {0, 1, 2}, D = 2.625."""
    from losses import feature_mse

    policy, reference = (torch.tensor([v]) for v in ([0.0, 3.0, 1.0, 0.0], [2.0, 2.5, 0.0, 0.0]))
    assert (
        feature_mse(policy, reference, k=2).item()
        == ((0 - 2) ** 2 + (3 - 2.5) ** 2 + (1 - 0) ** 2) / 2
        == 2.625
    )
    for part in ("[0, 3, 1, 0]", "[2, 2.5, 0, 0]", "{0, 1, 2}", "2.625"):
        assert part in README


def test_snippet_runs():
    """The copied loss: by hand, u = 0.1/5 (-10 + 12) - 0.1/5 (-11 + 11) - 0.5 (0.03 - 0.02) = 0.035."""
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert float(re.search(r"[\d.]+", out.getvalue())[0]) == pytest.approx(0.6758, abs=1e-4)


def copy(name):
    """A function of losses.py from its source alone, in a module that has torch and F and nothing else."""
    import losses

    fresh = {"torch": torch, "F": F}
    exec(inspect.getsource(getattr(losses, name)), fresh)
    return fresh[name]


LOSSES = ["sft_loss", "dpo_loss", "simpo_loss", "simpo_kl_loss", "tdpo1_loss", "tdpo2_loss", "fpo_loss"]


@pytest.mark.parametrize("name", LOSSES)
def test_copied_loss_in_another_trainers_step(name):
    """A batch of padded logits and Hugging Face labels, an optimizer: the loss falls over a few steps."""
    torch.manual_seed(0)
    B, T, V, m = 4, 7, 11, 12
    labels = torch.randint(V, (2 * B, T))
    labels[:, :2], labels[1, 5:] = -100, -100  # the prompt; padding
    body, head = torch.nn.Embedding(T, 16), torch.nn.Linear(16, V)
    sequence_logps, sequential_kl = copy("sequence_logps"), copy("sequential_kl")
    pool, feature_mse, loss_of = copy("pool_features"), copy("feature_mse"), copy(name)
    encode = torch.randn(16, m)
    position = torch.arange(T).expand(2 * B, T)
    with torch.no_grad():
        reference = head(body(position))
        old_features = pool((body(position) @ encode).relu(), labels != -100)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.5)
    with torch.no_grad():  # away from the reference, so that every term is at work
        head.weight += 0.1 * torch.randn_like(head.weight)
    history = []
    for _ in range(12):
        h = body(position)
        logits = head(h)
        (w, l), (n_w, n_l) = (x.chunk(2) for x in sequence_logps(logits, labels))
        ref_w, ref_l = sequence_logps(reference, labels)[0].chunk(2)
        kl = sequential_kl(logits, reference, labels).chunk(2)
        mse = feature_mse(pool((h @ encode).relu(), labels != -100), old_features, k=4).chunk(2)
        there = {"policy_chosen_logps": w, "policy_rejected_logps": l, "logps": w, "lengths": n_w}
        there |= {"reference_chosen_logps": ref_w, "reference_rejected_logps": ref_l}
        there |= {"chosen_lengths": n_w, "rejected_lengths": n_l, "chosen_kl": kl[0], "rejected_kl": kl[1]}
        there |= {"chosen_mse": mse[0], "rejected_mse": mse[1], "beta": 0.5, "alpha": 0.5, "gamma": 0.5}
        wanted = inspect.signature(loss_of).parameters
        loss = loss_of(**{key: value for key, value in there.items() if key in wanted}).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0] - 0.01 and torch.tensor(history).isfinite().all()


if __name__ == "__main__":
    for path, text in PAGES.items():
        path.write_text(renewed(text))
