"""What the README says is so: its functions exist, its commands parse, its snippet runs."""

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line.split("#")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()
]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+\.\w+)`", README))))
def test_names_exist(name):
    """Every `module.function` is a function of that module, every `file.py` a file."""
    module, attribute = name.split(".")
    if attribute in ("py", "txt", "json", "jsonl"):
        assert attribute != "py" or (ROOT / name).exists()
    else:
        assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c])
def test_training_commands_parse(command, monkeypatch, tmp_path):
    """The flags of each command are train.py's."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.replace("\\", ""))
    args = train.parse_args(words[words.index("train.py") + 1 :])
    assert args.method in command or "--method" not in command


def test_snippet_runs():
    """The copied loss: by hand, u = 0.1/5 (-10 + 12) - 0.1/5 (-11 + 11) - 0.5 (0.03 - 0.02) = 0.035."""
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert float(re.search(r"[\d.]+", out.getvalue())[0]) == pytest.approx(0.6758, abs=1e-4)


def test_main_job_and_tests_are_one_line_each():
    """What .ci/run reads from here."""
    assert sum(c.startswith("pip install") and c.endswith("&& pytest") for c in COMMANDS) == 1
    assert sum(c.startswith("pip install") and c.endswith("--preset toy") for c in COMMANDS) == 1
