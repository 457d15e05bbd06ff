"""An SAE for one's own model: which states it is trained on, in which unit, and what the script prints."""

import re
import shutil

import pytest
import torch
from conftest import make_lm, make_pairs, make_sae
from transformers import AutoModelForCausalLM, AutoTokenizer

from batches import epoch_order
from data import Pairs, load_pairs
from experiments import train_sae
from fpo import Policy
from runtime import UserError
from sae import SAE, load_sae

ROWS = {"layout": "separate", "row_multiple": 1}


def test_every_tenth_pair_is_held_out_and_the_tokens_are_enough():
    sizes = [(1 + i % 7, 1 + i % 3) for i in range(100)]
    pairs = Pairs([([2], [5] * chosen, [6] * rejected) for chosen, rejected in sizes])
    learnt, held_out = train_sae.choose_pairs(pairs, 120)
    order = epoch_order(100, 0, 0).tolist()
    n = next(n for n in range(100) if sum(sum(sizes[i]) for i in order[:n]) >= 120)  # by hand: no fewer do
    assert held_out == order[9:n:10] and sorted(learnt + held_out) == sorted(order[:n])
    with pytest.raises(UserError, match="pairs are too few"):
        train_sae.choose_pairs(pairs, 9)


@pytest.mark.parametrize("layer, site, layout", [(3, "res", {"layout": "shared"}), (1, "mlp", {})])
def test_states_are_those_before_the_response_tokens_of_each_response(layer, site, layout):
    lm, pairs, indices = make_lm(), make_pairs(8), [5, 0, 2, 7, 6]
    reader = Policy(lm, [make_sae()], [(layer, site)])
    h = train_sae.read_states(reader, pairs, indices, ROWS | layout, max_tokens=60)
    block, seen = lm.model.layers[layer], []
    module = block if site == "res" else block.post_feedforward_layernorm
    module.register_forward_hook(lambda module, args, output: seen.append(output))
    for i in indices:
        prompt, *responses = pairs[i]
        for response in responses:  # each in a row of its own
            with torch.no_grad():
                lm(torch.cat([prompt, response])[None])
            seen.append(seen.pop()[0, len(prompt) - 1 : -1])
    # The order is the batches': sort both by the same projection.
    axis = torch.linspace(-1, 2, h.shape[1])
    ours, theirs = (states[(states @ axis).argsort()] for states in (h, torch.cat(seen)))
    assert len(ours) == len(theirs) and torch.allclose(ours, theirs, atol=1e-3)


def test_a_constant_in_the_states_changes_biases_alone():
    g = torch.Generator().manual_seed(0)
    h, constant = torch.randn(500, 8, generator=g), 500 * torch.eye(8)[3]  # an outlier dimension
    one = train_sae.train_centred(h.clone(), width=32, steps=30)
    other = train_sae.train_centred(h + constant, width=32, steps=30)
    for name in ("W_enc", "W_dec", "threshold"):
        assert torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-3), name
    first, second = SAE(**one), SAE(**other)
    shifted = second.decode(second.encode(h + constant)) - constant
    assert torch.allclose(shifted, first.decode(first.encode(h)), atol=0.01)


def test_from_a_model_and_pairs_to_an_sae(world, tmp_path, monkeypatch, capsys):
    shutil.copytree(world / "model", tmp_path / "mine")
    shutil.copy(world / "train.jsonl", tmp_path / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "mine", "--dataset", "pairs.jsonl", "--width", "128", "--out", "my sae"]
    train_sae.main([*flags, "--layer", "2", "--tokens", "4000", "--steps", "200"])
    *_, figures, path = capsys.readouterr().out.splitlines()
    with pytest.raises(UserError, match="--out my sae: it has an SAE there, my sae/layer_2; take another"):
        train_sae.main([*flags, "--layer", "2", "--width", "64"])
    l0, fvu, _ = (float(number) for number in re.findall(r"\d+\.\d+", figures))
    assert path == f"my sae/layer_2/width_128/average_l0_{round(l0)}/params.npz"
    # What it prints is of the pairs held out.
    lm = AutoModelForCausalLM.from_pretrained("mine", attn_implementation="eager")
    pairs = load_pairs("pairs.jsonl", AutoTokenizer.from_pretrained("mine"))
    sae = load_sae("my sae", layer=2, width="128")
    reader = Policy(lm, [sae], [(2, "res")])
    h = train_sae.read_states(reader, pairs, train_sae.choose_pairs(pairs, 4000)[1], ROWS)
    c = sae.encode(h)
    error = (sae.decode(c) - h).square().sum() / (h - h.mean(0)).square().sum()
    assert (c > 0).sum(1).double().mean().item() == pytest.approx(l0, abs=0.06)
    assert error.item() == pytest.approx(fvu, abs=0.002) and fvu < 0.3
    with pytest.raises(UserError, match="--layer 4"):
        train_sae.main([*flags, "--layer", "4"])
