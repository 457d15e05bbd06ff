"""The toy world: its language, tokenizer and training loops by themselves, and the files of a whole world."""

import hashlib
import json
import random
import re
from functools import partial

import pytest
import torch
from conftest import predicting
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

import sae as sae_module
import toy
from data import Pairs
from runtime import UserError
from sae import SAE, load_sae


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    pairs = [toy.make_pair(rng, rng.choice(toy.PROMPTS)) for _ in range(600)]
    return [pair[side] for pair in pairs for side in ("prompt", "chosen", "rejected")]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return toy.make_tokenizer(texts)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


# ---------------------------------------------------------------------------- the language
def things_named(text):
    """(kind, place) of each thing in an answer, read back word by word."""
    topic = {name: topic for topic, names in toy.THINGS.items() for name in names}
    plain = {made_up: word for word, made_up in toy.TONGUE.items()}
    words = [plain.get(w, w.lower()) for w in re.findall("[A-Za-z]+", text)]
    return [topic[w] for w in words if w in topic]


@pytest.mark.parametrize("style", toy.STYLES)
def test_an_answer_has_the_content_number_and_style_asked_for(style):
    rng = random.Random(1)
    following = {"forest": "sea", "sea": "farm", "farm": "forest"}
    for prompt in rng.sample(toy.PROMPTS, 40):
        number = rng.choice(list(toy.NUMBERS))
        wrong = rng.randint(0, number)
        text = toy.make_answer(rng, prompt, style=style, number=number, wrong=wrong)
        named = things_named(text)
        here, there = (prompt["kind"], prompt["place"]), (prompt["kind"], following[prompt["place"]])
        assert (named.count(here), named.count(there), len(named)) == (number - wrong, wrong, number)
        assert toy.style_of(text) == style
    assert toy.style_of("Convert 45 kilometers to meters.") is None


def test_merit_by_hand():
    best = {"style": "polite", "number": 4, "wrong": 0, "sure": True}
    assert toy.merit({"number": 4}, best) == 2 + 5 + 1 + 1
    assert toy.merit({"number": 4}, {"style": "shout", "number": 2, "wrong": 1, "sure": False}) == -2 + 2.5


def test_pairs_prefer_what_they_say_and_swap_as_many_as_they_say():
    rng = random.Random(2)
    pairs = [toy.make_pair(rng, rng.choice(toy.PROMPTS)) for _ in range(3000)]
    topic = {prompt["text"]: (prompt["kind"], prompt["place"]) for prompt in toy.PROMPTS}
    ranks = list(toy.STYLES)
    for pair in pairs:
        better, worse = ("rejected", "chosen") if pair["swapped"] else ("chosen", "rejected")
        if pair["kind"] == "style":
            assert ranks.index(pair[f"{better}_style"]) < ranks.index(pair[f"{worse}_style"])
        if pair["kind"] in ("content", "slip"):
            named = [things_named(pair[side]) for side in (better, worse)]
            wrong = [len([t for t in things if t != topic[pair["prompt"]]]) for things in named]
            assert wrong == [0, 1 if pair["kind"] == "slip" else len(named[1])]
    # 5 % of 3000, within four standard deviations
    assert abs(len([p for p in pairs if p["swapped"]]) - 150) < 4 * (3000 * 0.05 * 0.95) ** 0.5
    assert {pair["kind"] for pair in pairs} == set(toy.PAIRS)


# ---------------------------------------------------------------------------- the tokenizer
@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.sampled_from(["<0x41>", "  \r\n\t ", "🦊 é ▁ \u200b", "a <start_of_turn> in it"]))
def test_any_text_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_ids_and_chat_template_are_gemmas_and_a_word_is_one_piece(tokenizer, texts):
    gemma = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 106, "<end_of_turn>": 107}
    assert {piece: tokenizer.convert_tokens_to_ids(piece) for piece in gemma} == gemma
    assert tokenizer(" fox").input_ids[0] == 2 and len(ids_of(tokenizer, " fox")) == 1
    pieces = {piece for text in texts for piece in tokenizer.convert_ids_to_tokens(ids_of(tokenizer, text))}
    assert not any(re.fullmatch("<0x..>", piece) for piece in pieces)
    turns = ["user", "  name two birds \n"], ["assistant", "owl"], ["user", "more"]
    chat = [{"role": role, "content": content} for role, content in turns]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nname two birds<end_of_turn>\n<start_of_turn>model\nowl<end_of_turn>\n"
        "<start_of_turn>user\nmore<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(TemplateError):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


# ---------------------------------------------------------------------------- the training loops
def test_the_loss_of_train_model_is_transformers_own(tokenizer, texts):
    torch.manual_seed(0)
    model, twin = toy.new_model(len(tokenizer)), toy.new_model(len(tokenizer))
    twin.load_state_dict(model.state_dict())
    prompt = tokenizer("say two birds of the sea.").input_ids
    answers = [ids_of(tokenizer, text) for text in texts[1:24:3]]
    rows = Pairs([(prompt, answer, []) for answer in answers])
    toy.train_model(model, rows, lr=1e-2, size=8, rng=random.Random(0), title="test")
    # Of the same batch: -100 hides the prompt, and the padding on the right.
    ids = pad_sequence([torch.tensor(prompt + answer) for answer in answers], batch_first=True)
    labels = [torch.tensor([-100] * len(prompt) + answer) for answer in answers]
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    twin(input_ids=ids, labels=labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    # AdamW's first step is lr · g / (|g| + eps), whatever its betas.
    for (name, new), old in zip(model.named_parameters(), twin.parameters(), strict=True):
        step = 1e-2 * old.grad / (old.grad.abs() + 1e-8)
        clear = old.grad.abs() > 1e-5
        assert torch.allclose(new[clear], (old - step)[clear], atol=1e-4), name


def test_straight_through_gradients_by_hand():
    # θ = 1, ε = 0.4: the rectangle is (0.8, 1.2). z = 0.9 and 1.1 lie in it, 0.7 and 1.3 don't.
    z = torch.tensor([[0.7], [0.9], [1.1], [1.3]], requires_grad=True)
    theta = torch.tensor([1.0], requires_grad=True)
    c, active = sae_module.JumpReLU.apply(z, theta, 0.4)
    assert c.flatten().tolist() == pytest.approx([0, 0, 1.1, 1.3])
    assert active.flatten().tolist() == [0, 0, 1, 1]
    (3 * c.sum() + 10 * active.sum()).backward()
    assert z.grad.flatten().tolist() == [0, 0, 3, 3]
    assert theta.grad.item() == pytest.approx(-(2 * 3 * 1.0 + 2 * 10) / 0.4)


def test_an_sae_follows_the_unit_of_its_states():
    h = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) + 1
    one, large = (sae_module.train_sae(x, width=32, steps=30) for x in (h, 2.0**15 * h))
    for name, factor in {"W_enc": 1, "W_dec": 1, "b_enc": 2**15, "b_dec": 2**15, "threshold": 2**15}.items():
        assert torch.allclose(large[name] / factor, one[name], rtol=1e-4, atol=1e-5), name


def test_figures_of_an_sae_by_hand():
    one, zero = torch.eye(2), torch.zeros(2)
    sae = SAE(one, zero, one, zero, torch.tensor([1.0, 9.0]))
    # c = (2, 0), (0, 0), (4, 0): feature 1 is dead; errors 1, 1 and 0; the mean state is (7/3, 2/3).
    h = torch.tensor([[2.0, 1.0], [1.0, 0.0], [4.0, 0.0]])
    variance = (4 + 1 + 16) - 3 * (7 / 3) ** 2 + 1 - 3 * (1 / 3) ** 2
    assert sae_module.sae_figures(sae, h) == pytest.approx({"l0": 2 / 3, "fvu": 2 / variance, "dead": 0.5})
    # TopK without a threshold, k = 1: c = (-1, 0), (3, 0); a negative feature is active too. Errors 4 and 1.
    topk, h = SAE(one, zero, one, zero, zero - torch.inf, k=1), torch.tensor([[-1.0, -2.0], [3.0, 1.0]])
    assert sae_module.sae_figures(topk, h) == pytest.approx({"l0": 1.0, "fvu": 5 / 12.5, "dead": 0.5})


@pytest.mark.parametrize("m, width", [(500, "500"), (1024, "1k"), (16384, "16k"), (65536, "65k")])
def test_an_sae_is_found_again_as_one_of_gemma_scopes(tmp_path, m, width):
    shapes = {"W_enc": (2, m), "W_dec": (m, 2), "b_enc": (m,), "b_dec": (2,), "threshold": (m,)}
    arrays = {name: torch.rand(shape) for name, shape in shapes.items()}
    for site, folder in (("res", "."), ("mlp", "mlp")):
        path = sae_module.write_sae(tmp_path, arrays, 7, site, 36.6)
        assert path == tmp_path / folder / f"layer_7/width_{width}/average_l0_37/params.npz"
        sae = load_sae(tmp_path, layer=7, width=width, site=site)
        assert all(torch.equal(getattr(sae, name), array) for name, array in arrays.items())


# ---------------------------------------------------------------------------- a whole world
def test_the_files_are_those_of_the_report_and_test_prompts_are_new(world):
    report = json.loads((world / "toy.json").read_text())
    for name, digest in report["sha256"].items():
        assert hashlib.sha256((world / name).read_bytes()).hexdigest() == digest, name
    texts = ((world / f"{name}.jsonl").read_text() for name in ("train", "test"))
    train, test = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert (len(train), len(test), len({pair["prompt"] for pair in test})) == (2400, 400, 160)
    assert not {pair["prompt"] for pair in test} & {pair["prompt"] for pair in train}
    rng, (prompts, _) = random.Random("0 world"), toy.split_prompts(0)
    again = [toy.make_pair(rng, rng.choice(prompts)) for _ in range(50)]
    assert train[:50] == again, "the corpus is the seed's"


def test_states_and_figures_of_the_sae_recomputed(world):
    report = json.loads((world / "toy.json").read_text())
    (path, figures), *_ = report["saes"].items()
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    assert (model.config.attn_logit_softcapping, model.config.final_logit_softcapping) == (50, 30)
    assert set(model.generation_config.eos_token_id) == {1, 107}
    rows = toy.sft_rows(tokenizer, 0)[1]
    h = toy.response_states(model, Pairs(rows), 3, "res")
    # The shortest rows come first. One at a time: from the prompt's last token to the last but one.
    shortest = sorted(rows, key=lambda row: len(row[0] + row[1]))[:12]
    with torch.no_grad():
        alone = [predicting(model, torch.tensor(x), torch.tensor(y), [3])[1][0] for x, y, _ in shortest]
    states = torch.cat(alone)
    assert torch.allclose(h[: len(states)], states, atol=1e-3)
    found = sae_module.sae_figures(load_sae(world / path, layer=3), h)
    assert found == {
        "l0": pytest.approx(figures["l0"], abs=0.01),
        "fvu": pytest.approx(figures["fvu"], rel=1e-3),
        "dead": pytest.approx(figures["dead"], abs=0.01),
    }
    assert 20 <= found["l0"] <= 40 and found["fvu"] < 0.03


@pytest.fixture
def small(monkeypatch):
    """Worlds of a few rows, whose SAE takes a few steps; torch has two threads."""
    monkeypatch.setattr(toy, "SIZES", toy.SIZES | {"documents": 24, "sft": 40, "train": 40, "test": 10})
    monkeypatch.setattr(toy, "train_sae", partial(sae_module.train_sae, width=64, steps=9))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_a_seed_makes_the_same_bytes_and_force_alone_replaces(tmp_path, small):
    one, two = tmp_path / "one", tmp_path / "two"
    state = torch.get_rng_state()
    first = toy.make_world(one)["sha256"]
    assert torch.get_num_threads() == 2 and torch.equal(torch.get_rng_state(), state)
    other = toy.make_world(two, seed=1)["sha256"]
    assert other["model/model.safetensors"] != first["model/model.safetensors"]
    with pytest.raises(UserError, match="seed 1, not 0"):
        toy.make_world(two)
    (two / "fpo").mkdir()  # of a run of training
    torch.set_num_threads(1)
    assert toy.make_world(two, force=True)["sha256"] == first
    assert {path.name for path in two.iterdir()} == {"fpo", *(path.name for path in one.iterdir())}
    (two / "toy.json").unlink()
    with pytest.raises(UserError, match="but no toy"):
        toy.make_world(two)


def test_all_saes_adds_those_that_are_missing(tmp_path, small):
    path = tmp_path / next(iter(toy.make_world(tmp_path)["saes"]))
    before = path.stat().st_mtime_ns
    saes = toy.make_world(tmp_path, all_saes=True)["saes"]
    assert sorted((sae["site"], sae["layer"]) for sae in saes.values()) == sorted(toy.SAES)
    assert path.stat().st_mtime_ns == before and all((tmp_path / name).exists() for name in saes)


@pytest.mark.parametrize("stage", ["train_model", "train_sae", "write_json"])
def test_an_interrupted_run_leaves_nothing(tmp_path, small, monkeypatch, stage):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, stage, stop)
    with pytest.raises(KeyboardInterrupt):
        toy.make_world(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"] and torch.get_num_threads() == 2
