"""The toy world: its language, tokenizer and training loops by themselves, and the files of a whole world."""

import hashlib
import json
import random
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

import toy
from sae import load_sae


@pytest.fixture(scope="module")
def texts():
    rng, prompts = random.Random(0), toy.all_prompts()
    pairs = [toy.make_pair(rng, rng.choice(prompts)) for _ in range(600)]
    return [pair[side] for pair in pairs for side in ("prompt", "chosen", "rejected")]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return toy.make_tokenizer(texts)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


# ---- the language ----


def things_named(text):
    """(kind, place) of each thing in an answer, read back word by word."""
    topic = {name: topic for topic, names in toy.THINGS.items() for name in names}
    plain = {made_up: word for word, made_up in toy.TONGUE.items()}
    words = [plain.get(w, w.lower()) for w in re.findall("[A-Za-z]+", text)]
    return [topic[w] for w in words if w in topic]


@pytest.mark.parametrize("style", toy.STYLES)
def test_an_answer_has_the_content_number_and_style_asked_for(style):
    rng = random.Random(1)
    for prompt in rng.sample(toy.all_prompts(), 40):
        number = rng.choice(list(toy.NUMBERS))
        wrong = rng.randint(0, number)
        text = toy.make_answer(rng, prompt, style=style, number=number, wrong=wrong)
        named = things_named(text)
        here = (prompt["kind"], prompt["place"])
        following = {"forest": "sea", "sea": "farm", "farm": "forest"}
        there = (prompt["kind"], following[prompt["place"]])
        assert (named.count(here), named.count(there), len(named)) == (number - wrong, wrong, number)
        assert toy.style_of(text) == style
    assert toy.style_of("Convert 45 kilometers to meters.") is None


def test_merit_by_hand():
    prompt = {"number": 4}
    best = {"style": "polite", "number": 4, "wrong": 0, "sure": True}
    assert toy.merit(prompt, best) == 2 + 5 + 1 + 1
    assert toy.merit(prompt, {"style": "shout", "number": 2, "wrong": 1, "sure": False}) == -2 + 2.5


def test_pairs_prefer_what_they_say_and_swap_as_many_as_they_say():
    rng, prompts = random.Random(2), toy.all_prompts()
    pairs = [toy.make_pair(rng, rng.choice(prompts)) for _ in range(3000)]
    topic = {prompt["text"]: (prompt["kind"], prompt["place"]) for prompt in prompts}
    ranks = list(toy.STYLES)
    for pair in pairs:
        better, worse = ("rejected", "chosen") if pair["swapped"] else ("chosen", "rejected")
        if pair["kind"] == "style":
            assert ranks.index(pair[f"{better}_style"]) < ranks.index(pair[f"{worse}_style"])
        if pair["kind"] in ("content", "slip"):
            here = topic[pair["prompt"]]
            wrong = [sum(t != here for t in things_named(pair[side])) for side in (better, worse)]
            expected = 1 if pair["kind"] == "slip" else len(things_named(pair[worse]))
            assert wrong == [0, expected]
    # 5 % of 3000, within four standard deviations
    assert abs(sum(pair["swapped"] for pair in pairs) - 150) < 4 * (3000 * 0.05 * 0.95) ** 0.5
    assert {pair["kind"] for pair in pairs} == set(toy.PAIRS)


# ---- the tokenizer ----


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


@pytest.mark.parametrize(
    "text", ["\0", "🦊 é ▁ \u200b", "<0x41>", "  \r\n\t ", "a <start_of_turn> in a text", ""]
)
def test_awkward_text_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_ids_are_gemmas_and_a_word_of_the_language_is_one_piece(tokenizer, texts):
    gemma = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 106, "<end_of_turn>": 107}
    assert {piece: tokenizer.convert_tokens_to_ids(piece) for piece in gemma} == gemma
    assert tokenizer(" fox").input_ids[0] == 2 and len(ids_of(tokenizer, " fox")) == 1
    assert tokenizer.padding_side == "left" and 512 <= len(tokenizer) <= 1024
    pieces = {piece for text in texts for piece in tokenizer.convert_ids_to_tokens(ids_of(tokenizer, text))}
    assert not any(re.fullmatch("<0x..>", piece) for piece in pieces)


def test_chat_template_is_gemmas(tokenizer):
    chat = [
        {"role": "user", "content": "  name two birds \n"},
        {"role": "assistant", "content": "owl"},
        {"role": "user", "content": "more"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<bos><start_of_turn>user\nname two birds<end_of_turn>\n<start_of_turn>model\nowl<end_of_turn>\n"
        "<start_of_turn>user\nmore<end_of_turn>\n<start_of_turn>model\n"
    )
    for bad in ([{"role": "system", "content": "x"}], chat[1:], [chat[0], chat[0]]):
        with pytest.raises(TemplateError):
            tokenizer.apply_chat_template(bad, tokenize=False)


# ---- the training loops ----


def test_batches_hold_each_row_once_with_labels_on_its_answer():
    rng = random.Random(3)
    rows = [([rng.randint(1, 9) for _ in range(rng.randint(3, 12))], rng.randint(1, 2)) for _ in range(23)]
    seen = []
    for ids, labels, which in toy.batches(rows, 4, rng):
        for i, row, label in zip(which, ids.tolist(), labels.tolist(), strict=True):
            tokens, start = rows[i]
            padding = len(row) - len(tokens)
            assert row == tokens + [0] * padding
            assert label == [-100] * start + tokens[start:] + [-100] * padding
        seen += which
    assert sorted(seen) == list(range(23))


def digest_of_short_training(tokenizer, texts, seed):
    torch.manual_seed(seed)
    model = toy.new_model(len(tokenizer))
    rows = [toy.encode(tokenizer, "say two birds of the sea.", text) for text in texts[1:97:3]]
    toy.train_model(model, rows, lr=5e-3, size=8, rng=random.Random(seed), title="test")
    states = toy.response_states(model, rows, 3, "res")
    sae = toy.train_sae(states, seed=seed, title="test", m=64, steps=20)
    tensors = [*model.state_dict().values(), *sae.values()]
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def test_the_same_seed_trains_to_the_same_bytes(tokenizer, texts):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    digests = [digest_of_short_training(tokenizer, texts, seed) for seed in (0, 0, 1)]
    torch.set_num_threads(threads)
    assert digests[0] == digests[1] != digests[2]


def test_the_loss_of_train_model_is_transformers_own(tokenizer, texts):
    torch.manual_seed(0)
    model, twin = toy.new_model(len(tokenizer)), toy.new_model(len(tokenizer))
    twin.load_state_dict(model.state_dict())
    rows = [toy.encode(tokenizer, texts[0], text) for text in texts[1:24:3]]
    toy.train_model(model, rows, lr=1e-2, size=8, rng=random.Random(0), title="test")
    ids, labels, _ = next(toy.batches(rows, 8))
    twin(input_ids=ids, labels=labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    # AdamW's first step is lr · g / (|g| + eps), whatever its betas.
    for (name, new), old in zip(model.named_parameters(), twin.parameters(), strict=True):
        step = 1e-2 * old.grad / (old.grad.abs() + 1e-8)
        clear = old.grad.abs() > 1e-5
        assert torch.allclose(new[clear], (old - step)[clear], atol=1e-4), name


def test_states_are_those_that_predict_the_answer(tokenizer, texts):
    torch.manual_seed(0)
    model = toy.new_model(len(tokenizer))
    rows = [toy.encode(tokenizer, texts[0], text) for text in texts[1:13:3]]
    expected = []
    for ids, start in sorted(rows, key=lambda row: len(row[0])):  # one row at a time, no padding
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
        expected.append(states[start - 1 : len(ids) - 1])
    assert torch.allclose(toy.response_states(model, rows, 1, "res"), torch.cat(expected), atol=1e-4)


def test_straight_through_gradients_by_hand():
    # θ = 1, ε = 0.4: the rectangle is (0.8, 1.2). z = 0.9 and 1.1 lie in it, 0.7 and 1.3 don't.
    z = torch.tensor([[0.7], [0.9], [1.1], [1.3]], requires_grad=True)
    theta = torch.tensor([1.0], requires_grad=True)
    c, active = toy.JumpReLU.apply(z, theta, 0.4)
    assert c.flatten().tolist() == pytest.approx([0, 0, 1.1, 1.3]) and active.flatten().tolist() == [
        0,
        0,
        1,
        1,
    ]
    (3 * c.sum() + 10 * active.sum()).backward()
    assert z.grad.flatten().tolist() == [0, 0, 3, 3]
    assert theta.grad.item() == pytest.approx(-(2 * 3 * 1.0 + 2 * 10) / 0.4)


def test_an_sae_follows_the_unit_of_its_states():
    h = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) + 1
    one, eight = (toy.train_sae(x, seed=0, title="test", m=32, steps=30) for x in (h, 8 * h))
    for name, factor in {"W_enc": 1, "W_dec": 1, "b_enc": 8, "b_dec": 8, "threshold": 8}.items():
        assert torch.allclose(eight[name], factor * one[name], rtol=1e-4, atol=1e-5), name


# ---- a whole world ----


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_files_are_those_of_the_report_and_test_prompts_are_new(world):
    report = json.loads((world / "toy.json").read_text())
    for name, digest in report["sha256"].items():
        assert hashlib.sha256((world / name).read_bytes()).hexdigest() == digest, name
    train, test = (lines_of(world / f"{name}.jsonl") for name in ("train", "test"))
    prompts = {pair["prompt"] for pair in test}
    assert len(train) >= 2000 and len(test) >= 300 and len(prompts) >= 100
    assert not prompts & {pair["prompt"] for pair in train}
    assert 0.42 < report["accuracy"] < 0.58  # nothing to gain from likelihood before a method has run


def test_the_corpus_is_the_seeds(world):
    rng, (prompts, _) = random.Random("0 world"), toy._split_prompts(0)
    expected = [toy.make_pair(rng, rng.choice(prompts)) for _ in range(50)]
    assert lines_of(world / "train.jsonl")[:50] == expected


def test_models_load_as_any_hugging_face_model(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    assert tokenizer.decode(ids_of(tokenizer, "<0x41> 🦊\0")) == "<0x41> 🦊\0"
    for name in ("base", "model"):
        model = AutoModelForCausalLM.from_pretrained(world / name)
        config = model.config
        assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert set(model.generation_config.eos_token_id) == {1, 107}
    long = torch.randint(0, len(tokenizer), (1, 1200))
    assert model(input_ids=long, use_cache=False).logits.isfinite().all()


def test_the_saes_figures_recomputed_one_answer_at_a_time(world):
    report = json.loads((world / "toy.json").read_text())
    (path, figures), *_ = report["saes"].items()
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    sae = load_sae(world / "sae", layer=3, width="512")
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(512), atol=1e-5)

    states = []
    model.model.layers[3].register_forward_hook(lambda module, args, output: states.append(output[0]))
    _, held_out = toy._sft_rows(tokenizer, 0)
    with torch.no_grad():
        for ids, start in held_out:
            model(input_ids=torch.tensor([ids]), use_cache=False)
            states[-1] = states[-1][start - 1 : len(ids) - 1]
    h = torch.cat(states).double().numpy()
    p = {k: v.astype(np.float64) for k, v in np.load(world / path, allow_pickle=False).items()}
    z = h @ p["W_enc"] + p["b_enc"]
    c = z * (z > p["threshold"])
    residual = h - (c @ p["W_dec"] + p["b_dec"])
    assert (c > 0).sum(1).mean() == pytest.approx(figures["l0"], abs=0.01)
    fvu = (residual**2).sum() / ((h - h.mean(0)) ** 2).sum()
    assert fvu == pytest.approx(figures["fvu"], rel=1e-3)
    assert 20 <= figures["l0"] <= 40 and fvu < 0.03


class Interrupted(Exception):
    pass


def stop(*args, **kwargs):
    raise Interrupted


@pytest.mark.parametrize("stage", ["train_model", "train_sae", "_write_report"])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, stage):
    monkeypatch.setattr(
        toy, "SIZES", {"documents": 400, "sft": 40, "train": 40, "test": 10, "test_prompts": 5}
    )
    if stage != "train_model":
        monkeypatch.setattr(toy, "train_model", lambda *args, **kwargs: None)
    monkeypatch.setattr(toy, stage, stop)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(Interrupted):
            toy.make_world(tmp_path / "toy")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_installing_over_a_world_keeps_what_else_is_there(tmp_path, monkeypatch):
    new, out = tmp_path / "new", tmp_path / "toy"
    for root, text in ((new, "new"), (out, "old")):
        (root / "model").mkdir(parents=True)
        for name in ("model/config.json", "toy.json"):
            (root / name).write_text(text)
    (out / "fpo").mkdir()
    toy._install(new, out)
    assert [(out / n).read_text() for n in ("model/config.json", "toy.json")] == ["new", "new"]
    assert (out / "fpo").is_dir() and not list(new.iterdir())


def test_a_world_of_another_seed_is_refused(world):
    before = (world / "toy.json").read_bytes()
    with pytest.raises(ValueError, match="made with seed 0, not 5"):
        toy.make_world(world, seed=5)
    assert (world / "toy.json").read_bytes() == before
