"""The house: which file imports which, how long each may be, how many flags there are."""

import ast
import dataclasses
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOOR = dict.fromkeys(("losses", "data", "sae", "scale"), 1) | {"fpo": 2, "toy": 2}
FLOOR |= {"offline": 3, "train": 4, "eval_diversity": 5}


def tracked(pattern):
    found = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in found.stdout.split() if (ROOT / name).exists()]


def arrows():
    """{(file, file that it imports)} among the files at the top."""
    found = set()
    for name in FLOOR:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found |= {(name, other) for other in names if other in FLOOR}
    return found


def test_arrows_point_down():
    """No file imports one of its own floor or above, so there is no circle; at most 20 arrows."""
    assert {path.stem for path in tracked("*.py") if path.parent == ROOT} == FLOOR.keys()
    assert all(FLOOR[name] > FLOOR[other] for name, other in arrows()), sorted(arrows())
    assert len(arrows()) <= 20


def test_what_there_is_to_read():
    """Lines that may not grow: those of the product, and of the tests."""
    lines = {path: len(path.read_text().splitlines()) for path in tracked("*.py")}
    tests = sum(n for path, n in lines.items() if path.parent.name == "tests")
    assert sum(lines.values()) - tests <= 5690 and tests <= 5400


def test_every_flag_has_a_help_text_and_there_are_at_most_46():
    import train

    fields = dataclasses.fields(train.Config)
    assert len(fields) <= 46 and all(len(field.metadata["help"]) > 0 for field in fields)
