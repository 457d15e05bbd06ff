"""What the README says is so: names and lines exist, commands parse, numbers come from files, the copies run.

python tests/test_readme.py     renews line links, line counts and tables of results in the README
"""

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
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line.split(" #")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()
]
COMMANDS += re.findall(r"`(python [^`]+)`", README)
LINK = re.compile(r"\[`(\w+)\.(\w+)`\]\((\w+)\.py#L(\d+)\)")
WORDS = {  # file of assets/: numbers of it that the README tells in words
    "ablation.md": r"from (71\.7) to (33\.1) nats|(?:ends at|with it at) ([\d.]+) %|\((82\.5) to (80\.8) %\)",
    "control.md": r"keeps ([\d.]+) % of its ([\d.]+) %|([\d.]+) % with (?:its own|random)",
    "claims.md": r"([-+]\d+\.\d%)|misses (0\.\d+) of the variance instead of (0\.\d+)",
}
TABLE = re.compile(r"(<!-- (\w+): .*? -->\n).*?(<!-- end -->)", re.S)


# ---------------------------------------------------------------------------- what is generated
def read(name):
    return json.loads((ASSETS / name).read_text())


def tables_in(name):
    """The Markdown tables of a file of assets/, in order."""
    return re.findall(r"(?:^\|.*\n)+", (ASSETS / name).read_text(), flags=re.M)


def comparison():
    return tables_in("comparison.md")[0]


def theorem():
    """KL and its bounds."""
    return "\n".join(tables_in("claims.md")[0].splitlines()[:8]) + "\n"


def real_text():
    """Held-out and training scores of the run on real text, with their intervals over pairs."""
    scores, sft = read("real_text.json"), read("real_text_sft.json")
    names = {"accuracy": "accuracy", "reward_accuracy_mean": "reward accuracy, per token (FPO's)"}
    names |= {"reward_accuracy": "reward accuracy, sums (DPO's)"}
    lines = [
        "| (95 % intervals over pairs) | SFT, held out | FPO, held out | FPO, training pairs |",
        "|---|---|---|---|",
    ]
    form = "{:.2f} [{:.2f}, {:.2f}]".format
    ends = lambda part, key: form(part[key], *part["intervals"][key])  # noqa: E731
    for key, label in names.items():
        start = f"{sft[key]:.2f}" if key == "accuracy" else "–"
        lines.append(f"| {label} | {start} | {ends(scores, key)} | {ends(scores['train'], key)} |")
    kl = [f"{part['kl_chosen']:.0f}, {part['kl_rejected']:.0f}" for part in (scores, scores["train"])]
    lines.append(f"| KL of chosen, rejected (nats a response) | 0 | {kl[0]} | {kl[1]} |")
    return "\n".join(lines) + "\n"


def speed():
    """What bench.py measured, from its --json files, each with its command."""
    peer, long = read("bench_peer.json"), read("bench_peer_long.json")
    scaled, saved = read("bench_scaled.json"), read("bench_scaled_checkpointing.json")
    head, phase_1, updates = read("bench_head.json"), read("bench_reference.json"), read("bench_updates.json")
    tiny, wide = peer["figures"]["tiny"], peer["figures"]["wide"]
    other = long["figures"]["tiny"]
    lines = ["| | measured | target | command |", "|---|---|---|---|"]
    add = lambda label, value, target, run: lines.append(  # noqa: E731
        f"| {label} | {value} | {target} | `{run['command'].split(' --json')[0]}` ({run['commit']}) |"
    )
    what = "DPO against TRL 1.16 (reference precomputed), pairs/s: 8 × (256 + 64) tokens, V = 4096; 32,768"
    value = "{:.2f} ×; {:.2f} ×".format(*(part["speed_ratio"] for part in (tiny, wide)))
    add(what, value, "≥ 2.6 ×; ≥ 5.5 ×", peer)
    add("the same, 128 + 256 tokens, V = 4096", f"{other['speed_ratio']:.2f} ×", "≥ 1.1 ×", long)
    memory = ", ".join(f"{part['memory_ratio']:.2f} ×" for part in (tiny, wide, other))
    add("peak memory against it, in these three", memory, "≤ 0.2 × at 32,768", peer)
    of = {"": (scaled, "≤ 0.75; ≤ 0.85"), ", activation checkpointing": (saved, "≤ 0.80; ≤ 0.85")}
    for note, (run, targets) in of.items():
        rows = {row["method"]: row for row in run["figures"]["scaled"]["methods"]}
        if not note:
            value = "{time/SimPO:.2f}; {memory/SimPO:.2f}".format(**rows["fpo"])
            add("FPO against SimPO: time; peak memory", value, "≤ 1.05; ≤ 1.02", run)
        ratios = [rows["fpo"][key] / rows["tdpo2"][key] for key in ("time/SimPO", "memory/SimPO")]
        add(f"FPO against TDPO-2{note}: time; peak memory", "{:.2f}; {:.2f}".format(*ratios), targets, run)
    ours = head["figures"][0]
    value = f"{100 * (ours['peak/dW'] - 1):.0f} %; {ours['time/plain']:.2f} ×"
    what = "head, V = 256,000, d = 2304, 1024 tokens: memory above inputs and dW; time against plain logits"
    add(what, value, "≤ 15 %; ≤ 1.15 ×", head)
    value = "{speed/bare:.2f} ×; {share:.2f} %".format(
        share=100 * phase_1["figures"]["tiny"]["lookup/step"], **phase_1["figures"]["tiny"]
    )
    add("Phase 1 against a bare forward; reading it back, of a step", value, "≥ 0.9 ×; < 1 %", phase_1)
    lost = [f"{100 * row['lost']:.1f} %" for row in updates["figures"]]
    value = f"{lost[0]} (Adam), {lost[2]} (RMSprop); {lost[1]}, {lost[3]}"
    add("updates lost at lr 5e-7 by bf16 weights; by ours", value, "0 %", updates)
    return "\n".join(lines) + "\n"


def files():
    """The files with their lines, from the first sentence of each docstring."""
    story = (
        "losses sae data fpo offline train chunked precision resume report presets eval_diversity benchmarks"
    )
    lines = ["| file | lines | what it tells |", "|---|---:|---|"]
    for name in f"{story} reproduce claims toy bench memory".split():
        text = (ROOT / f"{name}.py").read_text()
        about = re.match(r'"""(.*?)\n', text)[1].rstrip('".').replace("|", "\\|")
        lines.append(f"| [`{name}.py`]({name}.py) | {len(text.splitlines())} | {about} |")
    return "\n".join(lines) + "\n"


def renewed(text):
    """The README with its line links and generated tables as they should be."""

    def link(match):
        module, name, file, _ = match.groups()
        thing = getattr(importlib.import_module(module), name)
        if callable(thing):
            line = inspect.getsourcelines(thing)[1]
        else:
            source = (ROOT / f"{file}.py").read_text().splitlines()
            line = next(i for i, text in enumerate(source, 1) if re.match(rf"{name}\b.* = ", text))
        return f"[`{module}.{name}`]({file}.py#L{line})"

    text = TABLE.sub(lambda match: match[1] + globals()[match[2]]() + match[3], text)
    return LINK.sub(link, text)


def test_links_and_tables_are_as_the_files_say():
    """Else: python tests/test_readme.py."""
    fresh = renewed(README)
    for ours, expected in zip(README.splitlines(), fresh.splitlines(), strict=False):
        assert ours == expected
    assert fresh == README and len(LINK.findall(README)) > 15 and len(TABLE.findall(README)) == 5
    assert len(README.splitlines()) <= 300


# ---------------------------------------------------------------------------- names, commands
@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+\.\w+)`", README))))
def test_names_exist(name):
    """Every `module.function` is a function of that module, every `file.py` a file."""
    module, attribute = name.split(".")
    if attribute in ("py", "txt", "json", "jsonl", "cff"):
        assert attribute not in ("py", "cff") or (ROOT / name).exists()
    else:
        assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)", README))))
def test_linked_files_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if re.search(r"\b\w+\.py ", c)}))
def test_commands_parse(command, monkeypatch, tmp_path):
    """The flags of every command are its script's, with the values that it takes."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    (at,) = [i for i, word in enumerate(words) if word.endswith(".py")]
    script = importlib.import_module(words[at].removesuffix(".py").replace("tests/", "tests."))
    args = script.parse_args(words[at + 1 :])
    given = [word[2:] for word in words[at + 1 :] if word.startswith("--")]
    assert all(hasattr(args, name) for name in given)


def test_main_job_and_tests_are_one_line_each():
    """What .ci/run reads from here."""
    assert sum(c.startswith("pip install") and c.endswith("&& pytest") for c in COMMANDS) == 1
    assert sum(c.startswith("pip install") and c.endswith("--preset toy") for c in COMMANDS) == 1


# ---------------------------------------------------------------------------- results
def test_results_say_how_they_were_made():
    """Every file of results names its command and a commit without changes on top of it."""
    found = [read(path.name) for path in ASSETS.glob("*.json")]
    several = [{"comparison", "theorem"} & set(whole) for whole in found]  # files of more than one command
    parts = [whole.values() if many else [whole] for whole, many in zip(found, several, strict=True)]
    results = [part for whole in parts for part in whole]
    assert len(results) > 8
    for part in results:
        made = part.get("made_by", part)
        assert re.fullmatch(r"[0-9a-f]{7,}", made["commit"]) and made["command"].startswith("python ")
        assert "CPU" in made["hardware"]


@pytest.mark.parametrize("what", ["comparison", "control", "ablation"])
def test_tables_are_those_of_the_rows(what):
    """Mean and deviation over seeds, anew from results.json, of the first column that every run has."""
    rows, text = read("results.json")[what]["rows"], (ASSETS / f"{what}.md").read_text()
    accuracy = {}
    for row in rows:
        accuracy.setdefault(row["name"], []).append(100 * row["scores"]["accuracy"])
    several = [values for values in accuracy.values() if len(values) > 1]
    assert len(several) >= 6
    for values in several:
        assert f"| {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} |" in text


def test_numbers_in_words_are_the_files():
    """Those of the ablation, the control and the departures that the README tells without their tables."""
    said = {name: re.findall(pattern, README) for name, pattern in WORDS.items()}
    for name, numbers in said.items():
        text = (ASSETS / name).read_text()
        flat = [number for found in numbers for number in (found if isinstance(found, tuple) else (found,))]
        assert flat and all(number in text for number in flat), (name, flat)


def test_cheapest_row_again(world, tmp_path, monkeypatch):
    """The SFT row of the comparison, by its own command: equal but for another processor's rounding."""
    import eval_diversity

    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/toy").symlink_to(world)
    monkeypatch.chdir(tmp_path)
    row = next(r for r in read("results.json")["comparison"]["rows"] if r["name"] == "sft" and r["seed"] == 0)
    words = shlex.split(row["commands"][0])
    words[words.index("--json") + 1] = "again.json"
    assert words[:2] == ["python", "eval_diversity.py"]
    eval_diversity.main(words[2:])
    again = json.loads(Path("again.json").read_text())
    for name in ("accuracy", "nll_chosen", "entropy", "teacher_forced_entropy", "response_tokens"):
        assert again[name] == pytest.approx(row["scores"][name], rel=0.03), name
    assert again["kl_rejected"] == pytest.approx(0, abs=1e-4) and again["mse_rejected"] < 1e-8


# ---------------------------------------------------------------------------- copies
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
    (ROOT / "README.md").write_text(renewed(README))
