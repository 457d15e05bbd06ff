"""experiments/card.sh and card.py, as far as no card is needed: the record, the other head, the commands."""

import json
import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT

import runtime
import scale
import settings
from experiments import bench, card


def test_each_result_is_kept_as_it_comes(tmp_path):
    """How a command ended and what it said; one that fails or takes too long ends nothing else."""
    out = tmp_path / "results.json"
    for name, limit, program in (
        ("good", 60, "print('so'); print('it is')"), ("bad", 60, "raise SystemExit(3)"),
        ("slow", 1, "import time; print('begun', flush=True); time.sleep(60)"),
    ):  # fmt: skip
        card.main(["record", str(out), name, str(limit), sys.executable, "-c", program])
    found = json.loads(out.read_text())
    assert [found[name]["status"] for name in ("good", "bad", "slow")] == [0, 3, None]
    assert found["good"]["said"] == ["so", "it is"] and found["slow"]["said"] == ["begun"]
    assert 1 <= found["slow"]["seconds"] < 30 and "commit" in found["made_by"]


def test_head_in_slices_of_tokens_is_ours():
    """Values and gradients, softcap and a last slice that is not full included."""
    torch.manual_seed(0)
    values, gradients = [], []
    targets, g = torch.randint(300, (50,)), torch.randn(50)
    states, weight = torch.randn(50, 16), torch.randn(300, 16)
    for way in (scale.token_statistics, card.head_in_token_slices):
        h, W = states.clone().requires_grad_(), weight.clone().requires_grad_()
        slices = {"size": 16} if way is card.head_in_token_slices else {}
        logps = way(h, W, targets, softcap=5.0, **slices)
        logps = logps if torch.is_tensor(logps) else logps[0]
        (logps * g).sum().backward()
        values.append(logps)
        gradients += [h.grad, W.grad]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(gradients[:2], gradients[2:], atol=1e-5, rtol=1e-4)


def test_first_step_beside_the_floor(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"loss": 0.69, "reward_chosen": 1e-4}\n{"loss": 0.6}\n')
    (tmp_path / "config.json").write_text('{"audit": {"floor": 0.002}}')
    assert card.step_1(tmp_path) == {"floor": 0.002, "loss": 0.69, "reward_chosen": 1e-4}


@pytest.mark.parametrize("what", ["head", "attention", "tail"])
def test_what_needs_a_card_says_so(what, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(runtime.UserError, match=what):
        card.main([what])


def test_the_commands_of_the_script_parse_and_fit_in_nine_minutes(monkeypatch, tmp_path):
    text, seconds, names = (ROOT / "experiments/card.sh").read_text(), 0, []
    variables = dict(re.findall(r'^(step|train)="(.*)"$', text, flags=re.M)) | {"file": "d", "model": "m"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")  # as torchrun sets it
    monkeypatch.setattr(bench, "load_config", lambda name: None)
    for line in re.findall(r"^run (.*)$", text, flags=re.M):
        for name, value in variables.items():
            line = line.replace(f'"${name}"', value).replace(f"${name}", value)
        name, limit, *words = shlex.split(line)
        seconds, names = seconds + int(limit), [*names, name]
        if "experiments.bench" in words:
            bench.parse_args(words[words.index("experiments.bench") + 1 :])
        elif "train.py" in words:
            settings.parse_args(words[words.index("train.py") + 1 :])
        else:
            assert {"experiments.card", "pytest"} & set(words), line
    assert len(set(names)) == len(names) >= 10
    assert "$" not in "".join(names) and seconds <= 9 * 60
