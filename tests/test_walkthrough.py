"""The walkthrough runs from its first cell to its last, and its numbers by hand are the project's."""

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def outputs(notebook):
    """The outputs of all cells, and all that they print as one text."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return found, "".join(output.text for output in found if output.output_type == "stream")


@pytest.mark.slow
def test_walkthrough_runs_and_is_committed_as_it_runs(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = ROOT / "walkthrough.ipynb"
    committed = nbformat.read(path, as_version=4)
    run = copy.deepcopy(committed)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/toy").symlink_to(world)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(run, timeout=300, kernel_name="python3", coalesce_streams=True, resources=where).execute()
    (ours, text), (theirs, committed_text) = outputs(run), outputs(committed)

    # What the notebook computes by hand is what the project's functions give.
    sums = re.findall(r"^pair \d, \w+ +\d+ +(\S+) +(\S+) ", text, re.MULTILINE)
    assert len(sums) == 4 and all(
        float(hand) == pytest.approx(float(policy), abs=2e-4) for hand, policy in sums
    )
    after, by_dpo_loss = re.search(r"after ten steps: (\S+)\n.*dpo_loss: (\S+)", text).groups()
    assert float(by_dpo_loss) == pytest.approx(float(after), abs=2e-4) and float(after) < 0.1
    by_hand, by_function = map(float, re.findall(r"D_FPO by \w+ +(\S+)", text))
    assert by_function == pytest.approx(by_hand, abs=2e-5) and by_hand > 0.01
    losses = re.findall(r"^  (?:fpo|dpo|simpo|tdpo2) .* (\S+) +(\S+)$", text, re.MULTILINE)
    assert len(losses) == 8  # four methods, two pairs
    assert all(float(project) == pytest.approx(float(hand), abs=2e-4) for hand, project in losses)

    # The committed outputs are this code's (numbers and samples can differ from machine to machine).
    assert [output.output_type for output in ours] == [output.output_type for output in theirs]
    assert ours[0].data["text/html"] == theirs[0].data["text/html"]
    assert path.stat().st_size < 600_000
    assert not re.search(r"stderr|Traceback|/home/|/root/|/tmp/|\d(?:it/s| ms)", committed_text)
