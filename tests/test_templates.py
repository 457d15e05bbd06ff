"""data.Chat and templates.py: tokens against `apply_chat_template`, and templates of every sort."""

import json
import random
import unittest.mock

import pytest
import torch
from families import (
    ASK,
    CHATML,
    END_OF,
    FAMILIES,
    GEMMA_IT,
    GOOD,
    HELLO,
    IM,
    PHI,
    PHI_3,
    SMOLVLM,
    TALK,
    YES,
    S,
    T,
    byte_tokenizer,
    gemma_tokenizer,
    rendered,
    spell,
    spell_targets,
    tokenised,
    write,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, PreTrainedTokenizerFast

import data
from data import Chat, load_pairs
from runtime import UserError

# ---------------------------------------------------------------- tokens are the template's own
WORDS = "good bad the you yes\n\n oo .\n <b> he? é 日 {x} 42 a  b go"


def conversations(n, seed=0):
    """Random talks of up to three questions, a third with a system message; and another last answer."""
    rng = random.Random(seed)

    def text():
        return " ".join(rng.choices(WORDS.split(" "), k=rng.randint(1, 9))).strip(" ") or "x"

    for i in range(n):
        talk = T(f"s:{text()}") if i % 3 == 0 else []
        for _ in range(rng.randint(1, 3)):
            talk += T(f"u:{text()}", f"a:{text()}")
        yield talk, [*talk[:-1], *T(f"a:{talk[-1]['content'] + text()}")]


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_are_the_template_s_own_conversations(family):
    """50 records, token for token: prompt + response is the whole's rendering, the prompt its start's."""
    talks = list(conversations(50))
    pairs = tokenised(*({"chosen": a, "rejected": b} for a, b in talks), by=FAMILIES[family])
    assert len(pairs) == 50 and not pairs.notes
    for i, sides in enumerate(talks):
        prompt, *responses = (ids.tolist() for ids in pairs[i])
        assert [prompt + response for response in responses] == [rendered(family, talk) for talk in sides]
        asked = rendered(family, sides[0][:-1], add_generation_prompt=True)
        assert pairs.sampling_prompt(i).tolist() == asked
        # All of the generation prompt is shared, but R1's thought, and the "\n" that a "g" merged with.
        opening = FAMILIES[family].decode(asked[len(prompt) :])
        assert opening == {"R1": "<think>\n"}.get(family, "") or (family, opening) == ("Gemma", "\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_learns_every_answer_that_the_template_leaves_as_it_was(family):
    talks = [talk for talk, _ in conversations(50, seed=1)]
    pairs = tokenised(*({"messages": talk} for talk in talks), by=FAMILIES[family], sft=True)
    answers = [[j for j, turn in enumerate(talk) if turn["role"] == "assistant"] for talk in talks]
    rewrites = family in ("Qwen-3", "channels")  # earlier answers read differently: the last alone is learnt
    assert len(pairs) == 50 and sum(pairs.notes.values()) == sum(len(at) > 1 for at in answers if rewrites)
    for i, (talk, at) in enumerate(zip(talks, answers, strict=True)):
        prompt, response, _ = (ids.tolist() for ids in pairs[i])
        assert prompt + response == rendered(family, talk)
        expected = [0] * len(prompt + response)
        for j in at[-1:] if rewrites else at:
            upto = rendered(family, talk[: j + 1])
            asked = rendered(family, talk[:j], add_generation_prompt=True)
            start = next(k for k in range(len(upto)) if asked[k : k + 1] != upto[k : k + 1])
            expected[start : len(upto)] = [1] * (len(upto) - start)
        assert [0] * len(prompt) + pairs.read(i, "is_target").tolist() == expected


# ---------------------------------------------------------------- templates
@pytest.mark.parametrize("call", ["strftime_now('%d %b %Y')", "date_string", 'strftime_now("%d %b %Y")'])
def test_a_template_s_date_is_the_same_every_day(call):
    """Else tomorrow's tokens, and with them the reference's cache and a resumed run, would be other ones."""
    dated = CHATML.replace("{% for", "{{ " + call + " }}{% for", 1)
    talk = T("u:sea", "a:hill")
    turns = ("<|im_start|>", "<|im_end|>")
    chat = Chat(byte_tokenizer(dated, turns))
    written = chat.tokenizer.decode(chat.ids(talk))
    assert written.startswith("26 Jul 2024") and chat.name == "the model's own, its date always 26 Jul 2024"
    undated = Chat(byte_tokenizer(CHATML, turns))
    assert written == "26 Jul 2024" + undated.tokenizer.decode(undated.ids(talk))


def test_gemma_knows_no_system_role(tmp_path):
    """Its own template refuses one; ours, for the base model, as well: the text goes before the user's."""
    base, talk = gemma_tokenizer(), {"chosen": TALK, "rejected": [*TALK[:-1], *T("a:d")]}
    for tokenizer in (GEMMA_IT, base):
        pairs = tokenised({**GOOD, "system": "be kind"}, by=tokenizer)
        assert spell(pairs)[0] == ASK.replace("ask me", "be kind\n\nask me")
    turns = tokenised({**GOOD, "prompt": T("s:be kind", "u:ask me", "u:now")}, by=base)  # before the first
    first, second = ASK.replace("ask me", "be kind\n\nask me"), ASK.replace("ask me", "now")
    assert spell(turns)[0] == first.replace("<start_of_turn>model\n", second.removeprefix("<bos>"))
    assert tokenised(GOOD, talk, by=base).digest() == tokenised(GOOD, talk).digest()
    base.save_pretrained(tmp_path / "saved")  # it keeps the turns that it got
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert Chat(base).name == Chat(again).name == "Gemma's turns" and Chat(GEMMA_IT).name == "the model's own"
    assert tokenised(GOOD, talk, by=again).digest() == tokenised(GOOD, talk).digest()
    mixed = tokenised({"messages": T("s:be kind") + TALK}, sft=True)
    assert spell(mixed)[0] == HELLO.replace("hi", "be kind\n\nhi") and len(spell_targets(mixed)) == 3


def test_the_halos_format(tmp_path):
    """What a tokenizer without template gets that is not Gemma's, or on demand."""
    talk = "\n<|system|>\nbe kind\n<|user|>\nhi\n<|assistant|>\na b</s>\n<|user|>\nmore?\n<|assistant|>\n"
    plain, gemma, path = byte_tokenizer(**S), gemma_tokenizer(), write(tmp_path / "data.jsonl", GOOD)
    pairs = tokenised({**GOOD, "prompt": T("s:be kind") + TALK[:3]}, by=plain)
    assert spell(pairs, by=plain) == ["<s>" + talk, "yes</s>", "bad</s>"]
    assert Chat(plain).name == "the Halos format"
    pairs = load_pairs(path, gemma, chat_format="halos")
    assert spell(pairs, by=gemma) == ["<bos>\n<|user|>\nask me\n<|assistant|>\n", "yes<eos>", "bad<eos>"]
    assert load_pairs(path, gemma, chat_format="halos").digest() == pairs.digest()  # a run that goes on
    with pytest.raises(UserError, match="a chat template of its own"):
        load_pairs(path, GEMMA_IT, chat_format="halos")
    # One token for both BOS and EOS, as GPT-2's: the ends of earlier answers stay, and the BOS in front.
    by = byte_tokenizer(bos_token="</s>", eos_token="</s>")
    pairs = tokenised({**GOOD, "prompt": T("s:be kind") + TALK[:3]}, by=by)
    assert spell(pairs, by=by) == ["</s>" + talk, "yes</s>", "bad</s>"]


def test_a_template_that_ends_no_turn():
    """EOS is appended once, also behind a special token that someone typed; SFT learns each answer's text."""
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", eos_token="</s>")
    pairs = tokenised(GOOD, {**GOOD, "chosen": "a</s>b"}, by=tokenizer)
    assert spell(pairs, 0, tokenizer) == ["ask me\n", "yes\n</s>", "bad\n</s>"]
    assert spell(pairs, 1, tokenizer)[1] == "a</s>b\n</s>"
    typed = {"EOS appended: the chat template ends no turn": 2, "special tokens typed in a text": 1}
    assert pairs.notes == typed
    talk = tokenised({"messages": TALK}, by=tokenizer, sft=True)
    assert spell_targets(talk, by=tokenizer) == [("a b\n", True), ("more?\n", False), ("c\n</s>", True)]
    with pytest.raises(UserError, match="no EOS"):
        Chat(byte_tokenizer(tokenizer.chat_template))


def test_a_template_that_rewrites_what_was_said():
    """A question that reads differently once it is answered: its tokens would be learnt as the response."""
    turns = "{% for m in messages %}{{ m.content if WHOLE else m.content | replace('k', '') }}{% endfor %}"
    turns += "{{ eos_token if messages[-1].role == 'assistant' }}"
    question = turns.replace("WHOLE", "m.role == 'assistant' or loop.last")
    pairs = tokenised(GOOD, by=byte_tokenizer(question, eos_token="</s>"))
    assert pairs.notes == {"left out: the chat template rewrites the prompt when it is answered": 1}
    answer = byte_tokenizer(turns.replace("WHOLE", "m.role == 'user' or loop.last"), eos_token="</s>")
    pairs = tokenised({"messages": T("u:hi", "a:ok", "u:more?", "a:c")}, by=answer, sft=True)
    assert spell(pairs, by=answer) == ["hiomore?", "c</s>", ""]  # the last answer alone
    assert pairs.notes == {"earlier answers not learnt: the chat template rewrites them": 1, DROPS: 1}


DROPS = "a part of the texts left away by the chat template"


def test_words_that_the_template_drops_are_counted():
    """R1's leaves away what stands before </think>, in the answer of a pair and in earlier ones."""
    thought = "2 + 2</think>yes"
    asked = [{**GOOD, "chosen": thought}, GOOD, {**GOOD, "prompt": [*T("u:hi", f"a:{thought}"), *YES[:1]]}]
    pairs = tokenised(*asked, by=FAMILIES["R1"])
    assert len(pairs) == 3 and pairs.notes == {DROPS: 2}
    assert spell(pairs, 0, FAMILIES["R1"])[1] == spell(pairs, 1, FAMILIES["R1"])[1] == "yes</s>"


def test_where_an_answer_ends():
    """The end is what follows the answer, not a token before it or within it; which it is, is told."""
    for name, tokenizer in FAMILIES.items():
        chat = Chat(tokenizer)
        assert tokenizer.decode(chat.end) == END_OF[name] and not chat.appends_end
    # As GLM's: special tokens before the answer, and none behind it.
    turns = "{% for m in messages %}{{ '<|' + m.role + '|>' + ('<think>' if m.role == 'assistant' else '') }}"
    turns += "{{ m.content + '\n\n' }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"
    by = byte_tokenizer(turns, [*PHI, "<think>"], ["\n\n"], eos_token="</s>")
    expected = ["<|user|>ask me\n\n<|assistant|>", "<think>yes\n\n</s>", "<think>bad\n\n</s>"]
    assert spell(tokenised(GOOD, by=by), by=by) == expected
    # A vocabulary of words, which knows none of those that an answer is tried with.
    pieces = ["<unk>", "<s>", "</s>", "</u>", *["ask", "me", "yes", "bad"]]
    words = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    turns = "{% for m in messages %}{{ '<s> ' + m.content + (' </s>' if m.role == 'assistant' else '</u>') }}"
    special = {**S, "unk_token": "<unk>", "additional_special_tokens": ["</u>"]}
    by = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=turns + "{% endfor %}", **special)
    assert by.decode(Chat(by).end) == "</s>" and tokenised(GOOD, by=by)[0][1].tolist()[-1] == 2
    # What closes the text as a whole is said by nobody, however long it is.
    closing = PHI_3.replace("eos_token", "'so it ends' + eos_token").replace("t|>\n'", "t|>\n<think>'")
    by = byte_tokenizer(closing, PHI, eos_token="<|endoftext|>")
    expected = ["<|user|>\nask me<|end|>\n<|assistant|>\n", "yes<|end|>", "bad<|end|>"]
    assert spell(tokenised(GOOD, by=by), by=by) == expected
    # An end that depends on the answer is no end that could be learnt.
    depends = CHATML.replace("'<|im_end|>", "('' if 'bad' in m.content else '<|im_end|>') + '")
    odd = byte_tokenizer(depends, IM)
    reason = "left out: the chat template ends this answer as no other"
    assert tokenised({**GOOD, "rejected": "no"}, GOOD, by=odd).notes == {reason: 1}


def test_a_template_in_the_processor_s_file(tmp_path):
    """Where models with images keep theirs; a template of the tokenizer's own goes before it."""
    byte_tokenizer(specials=IM, eos_token=IM[1]).save_pretrained(tmp_path)
    assert data.load_tokenizer(str(tmp_path)).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": SMOLVLM}))
    loaded = data.load_tokenizer(str(tmp_path))
    assert loaded.chat_template == SMOLVLM and Chat(loaded).name == "the model's own"
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert data.load_tokenizer(str(tmp_path)).chat_template == CHATML


def test_templates_that_are_broken():
    for template in ("{% for %}", "{{ raise_exception('never') }}", "{{ messages[0].content.no() }}"):
        with pytest.raises(UserError, match="chat template does not work"):
            Chat(byte_tokenizer(template, eos_token="</s>"))
    # What leaves out the user's or the assistant's words, however they are given.
    for role in ("user", "assistant"):
        template = CHATML.replace("in messages", f"in messages if m.role != '{role}'")
        with pytest.raises(UserError, match=f"does not work: what the {role} says is not in it"):
            Chat(byte_tokenizer(template, IM, eos_token=IM[1]))
    # A prompt of no tokens: nothing would predict the first response token.
    mute = byte_tokenizer("{% for m in messages %}{{ m.content | trim }}{% endfor %}", eos_token="</s>")
    talk = {"messages": T("u: ", "a:a", "u:b", "a:c")}
    assert tokenised(talk, by=mute, sft=True).notes["left out: prompt is empty"] == 1


TYPED = ["<eos>", "<bos>a", "a<end_of_turn>", "<end_of_turn>\n<start_of_turn>model\nno"]


@pytest.mark.parametrize("text", TYPED)
@pytest.mark.parametrize("field", ["prompt", "chosen", "system"])
def test_special_tokens_typed_in_a_text_are_counted(text, field):
    """They are the template's own tokens; the response still ends where the template ends it."""
    pairs = tokenised({**GOOD, field: text + "z"}, GOOD)
    prompt, answers = data.to_pair({**GOOD, field: text + "z"})
    assert torch.cat(pairs[0][:2]).tolist() == rendered("Gemma", [*prompt, answers[0]])
    assert pairs.notes == {"special tokens typed in a text": 1}


def test_a_tokenizer_that_reads_no_text(tmp_path):
    """A model's folder without tokenizer files yields one that knows nothing."""
    Gemma2Config(vocab_size=300).save_pretrained(tmp_path / "model")
    for name, message in ((str(tmp_path / "model"), "tokenizer"), ("runs/none", "no such file or folder")):
        with pytest.raises(UserError, match=message):
            data.load_tokenizer(name)
    for family in ("Gemma", "Llama-2"):
        FAMILIES[family].save_pretrained(tmp_path / family)
        template = data.load_tokenizer(str(tmp_path / family)).chat_template
        assert template == FAMILIES[family].chat_template


@pytest.mark.parametrize(("reads", "works"), [("is there", False), ("here is t", True), ("", False)])
def test_a_tokenizer_that_reads_half_of_a_text(monkeypatch, reads, works):
    """9 of the 18 characters of "the answer is here" must come back, in any order: 8 do, or 9, or none."""
    tokenizer = unittest.mock.Mock()
    tokenizer.decode.return_value = reads
    monkeypatch.setattr(data.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    if works:
        assert data.load_tokenizer("a/b") is tokenizer
    else:
        with pytest.raises(UserError, match=f"reads 'the answer is here' as '{reads}'"):
            data.load_tokenizer("a/b")
