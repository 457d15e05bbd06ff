"""What a feature is of, and what training moves, held to numbers computed by hand."""

import re

import pytest
import torch

import data
import toy
from experiments import style


def test_variance_between_groups_by_hand():
    """Values 0, 2 | 4, 6: the groups' means 1 and 5 lie 2 from 3, so 4 x 4 = 16 of 9 + 1 + 1 + 9 = 20."""
    values = torch.tensor([[0.0, 1.0, 3.0], [2.0, 1.0, 5.0], [4.0, 1.0, 3.0], [6.0, 1.0, 5.0]])
    eta = style.explained(values, torch.tensor([0, 0, 2, 2]))
    assert eta.tolist() == pytest.approx([16 / 20, 0.0, 0.0])  # the second never varies, the third within


def test_shares_by_hand():
    """k = 1: I_k is {0, 1} of the first response and {2} of the second; feature 0 alone is of style."""
    policy = torch.tensor([[1.0, 4.0, 0.5, 0.0], [0.0, 1.0, 3.0, 0.0]])
    reference = torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.5, 1.0, 2.0, 0.0]])
    found = style.shares(policy, reference, torch.tensor([True, False, False, False]), k=1)
    # squares: 4, 9, 0.25, 0 and 0.25, 0, 1, 0
    assert found == pytest.approx(
        {"active": 2 / 5, "I_k": 1 / 3, "change": 4.25 / 14.5, "D_FPO": 4 / (4 + 9 + 1)}
    )


def test_answers_are_as_their_causes_say(world):
    """Style, things and whether they are right, read off the text again."""
    tokenizer = data.load_tokenizer(str(world / "model"))
    answers, causes = style.draw_answers(tokenizer, 60)
    styles, things = list(toy.STYLES), list(toy.THINGS.items())
    for i in range(60):
        prompt, response, _ = (tokenizer.decode(ids, skip_special_tokens=True) for ids in answers[i])
        assert toy.style_of(response) == styles[causes["style"][i]]
        (kind, place), names = things[causes["things"][i]]
        assert f" {kind} of the " in prompt and (f" {place}" in prompt) == bool(causes["right"][i])
        form = {"tongue": toy.TONGUE.get, "shout": str.upper}.get(toy.style_of(response), str)
        named = sum(form(name) in re.findall(r"\w+", response) for name in names)
        assert named == causes["number"][i]
