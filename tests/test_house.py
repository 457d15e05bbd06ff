"""The house: each file imports only files before it, and is of one sitting; every flag has its help."""

import ast
import dataclasses
import inspect
from pathlib import Path

import data
import settings

ROOT = Path(__file__).parent.parent
ORDER = ("runtime", "templates", "losses", "sae", "scale", "data", "batches", "toy", "minimal")
ORDER += (
    "fpo",
    "settings",
    "offline",
    "loading",
    "audit",
    "metrics",
    "sampling",
    "checkpoint",
    "train",
    "eval_diversity",
)


def imported(path):
    """Names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_arrows_point_down():
    """No file imports itself or one that stands after it, so there is no circle; none imports experiments."""
    there = {path.stem for path in ROOT.glob("*.py")}
    assert there == set(ORDER)
    for number, name in enumerate(ORDER):
        wrong = set(imported(ROOT / f"{name}.py")) & {*ORDER[number:], "experiments", "tests"}
        assert not wrong, f"{name}.py imports {wrong}"


def test_files_of_one_sitting():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py"), *ROOT.glob("tests/*.py")):
        assert len(path.read_text().splitlines()) <= 500, path.name


def test_a_data_set_is_cut_alike_from_a_run_and_from_a_notebook():
    """load_pairs' own limits are those of the settings."""
    limits = inspect.signature(data.load_pairs).parameters
    for name in ("max_length", "max_prompt_length"):
        assert limits[name].default == getattr(settings.Config, name)


def test_every_flag_has_a_help_text():
    assert all(field.metadata["help"] for field in dataclasses.fields(settings.Config))
