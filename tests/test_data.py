"""data.py: tokens against `apply_chat_template`, every kind of record, cuts by hand, any input.

The tokenizers are made here: small vocabularies, and chat templates written anew in the manner of families
in use. What is expected comes from the template's own rendering, never from data.py.
"""

import gzip
import json
import os
import random
import resource
import subprocess
import sys
import threading
import unittest.mock
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import Gemma2Config, PreTrainedTokenizerFast

import batches
import data
import runtime
from data import Chat, Pairs, load_pairs
from runtime import UserError

BOS, EOS, START, END = 2, 1, 106, 107  # Gemma's ids
MERGES = [("\n", "g"), ("o", "o"), ("oo", "d")]  # "\ng": a line's end and a response's first letter

# ---------------------------------------------------------------- tokenizers
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}{{ '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM_2 = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
QWEN_3 = CHATML.replace(  # the answer to the last question opens with an empty thought, no other does
    "+ m.content", "+ ('<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' else '') + m.content"
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{% for m in turns %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and system is defined %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}"
    "{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
PHI_3 = (  # the text as a whole ends with EOS, an answer does not
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
SMOLVLM = (  # of a content that is no list it writes nothing, and says nothing
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize + ': ' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}<image>{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SKIPS_SYSTEM = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")


def fast(model, specials, words=(), *, template=None, prefix_space=None, **roles):
    """A tokenizer with special tokens and added words; of bytes, as GPT-2's, unless prefix_space is None."""
    raw = Tokenizer(model)
    if prefix_space is None:
        raw.normalizer = normalizers.Replace(" ", "▁")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        raw.decoder = decoders.Sequence(steps)
    else:
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
        raw.decoder = decoders.ByteLevel()
    special = dict.fromkeys([*specials, *roles.values()])
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    raw.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    if "<bos>" in special:
        raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **roles)
    tokenizer.chat_template = template
    return tokenizer


def gemma_tokenizer(template=None, words=()):
    """SentencePiece-like: merges may cross a line's end, any other character is bytes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = [*special, *"\n▁abcdefghijklmnopqrstuvwxyz.?<_>"]
    pieces += [f"<unused{i}>" for i in range(len(pieces), START)] + ["<start_of_turn>", "<end_of_turn>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)] + ["".join(pair) for pair in MERGES]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab, MERGES, byte_fallback=True, unk_token="<unk>")
    roles = {f"{name[1:-1]}_token": name for name in special}
    return fast(model, [*special, "<start_of_turn>", "<end_of_turn>"], words, template=template, **roles)


def byte_tokenizer(template=None, specials=(), words=(), prefix_space=False, **roles):
    """GPT-2-like: bytes and a few merges."""
    merges = [("o", "o"), ("h", "e"), ("Ċ", "Ċ"), ("Ġ", "y")]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges)
    return fast(model, specials, words, template=template, prefix_space=prefix_space, **roles)


IM = ["<|im_start|>", "<|im_end|>"]
HEADERS, LLAMA_BOS = ["<|start_header_id|>", "<|end_header_id|>"], "<|begin_of_text|>"
HARMONY = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]
PHI = ["<|user|>", "<|assistant|>", "<|end|>"]
SPACES = ["\n", "\n\n", "\n\n\n", "  ", "▁▁", "<b>", "</b>"]  # Gemma's and NeoX's tokenizers add such words
S = {"bos_token": "<s>", "eos_token": "</s>"}
FAMILIES = {
    "Gemma": gemma_tokenizer(GEMMA),
    "Gemma, spaces": gemma_tokenizer(GEMMA, SPACES),
    "Gemma, plain turns": byte_tokenizer(GEMMA, [], ["<start_of_turn>", "<end_of_turn>"], **S),
    "Llama-3": byte_tokenizer(LLAMA_3, HEADERS, bos_token=LLAMA_BOS, eos_token="<|eot_id|>"),
    "Qwen-3": byte_tokenizer(QWEN_3, IM, ["<think>", "</think>"], eos_token=IM[1]),
    "SmolLM2": byte_tokenizer(SMOLLM_2, bos_token=IM[0], eos_token=IM[1]),
    "Llama-2": byte_tokenizer(LLAMA_2, prefix_space=True, **S),
    "R1": byte_tokenizer(R1, ["<|User|>", "<|Assistant|>"], ["<think>"], **S),
    "Phi-3": byte_tokenizer(PHI_3, PHI, SPACES, eos_token="<|endoftext|>"),
    "SmolVLM": byte_tokenizer(SMOLVLM, [IM[0], "<image>"], eos_token="<end_of_utterance>"),
    "channels": byte_tokenizer(CHANNELS, HARMONY, eos_token="<|return|>"),
    "skips system": byte_tokenizer(SKIPS_SYSTEM, IM, eos_token=IM[1]),
}
GEMMA_IT = FAMILIES["Gemma"]
END_OF = {name: tokenizer.eos_token for name, tokenizer in FAMILIES.items()} | {"Phi-3": "<|end|>"}
END_OF |= {name: "<end_of_turn>" for name in FAMILIES if name.startswith("Gemma")}


# ---------------------------------------------------------------- helpers
@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Hugging Face's library keeps its copies here, not in the user's home."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, *records):
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def tokenised(*records, by=GEMMA_IT, sft=False, max_length=9999, max_prompt_length=9998):
    """Pairs of some records, by way of JSON, without a file."""
    options = {"sft": sft, "max_length": max_length, "max_prompt_length": max_prompt_length}
    lines = [json.dumps(record) for record in records]
    return Pairs(data.tokenise({"text": lines}, chat=Chat(by), **options))


def spell(pairs, i=0, by=GEMMA_IT):
    """A pair's prompt, chosen and rejected as the text that the template wrote."""
    return [by.decode(ids.tolist()) for ids in pairs[i]]


def spell_all(pairs, by=FAMILIES["SmolLM2"]):
    """The texts of all pairs."""
    return [spell(pairs, i, by) for i in range(len(pairs))]


def spell_targets(pairs, i=0, by=GEMMA_IT):
    """What follows an SFT prompt: (text, is target) of every run."""
    runs = []
    for token, mark in zip(pairs[i][1].tolist(), pairs.read(i, "is_target").tolist(), strict=True):
        if not runs or runs[-1][1] != bool(mark):
            runs.append(([], bool(mark)))
        runs[-1][0].append(token)
    return [(by.decode(ids), mark) for ids, mark in runs]


def T(*turns):
    """Messages, from "u:what the user says", "a:the assistant", "s:the system"."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


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


def rendered(family, messages, **options):
    """Ids of a conversation's rendering, up to where its last turn ends: cut in its text, and tokenised."""
    tokenizer, end = FAMILIES[family], END_OF[family]
    no_system = family.startswith("Gemma") or family == "skips system"
    if no_system and messages[0]["role"] == "system":
        messages = T(f"u:{messages[0]['content']}\n\n{messages[1]['content']}") + messages[2:]
    if family == "SmolVLM":
        parts = [[{"type": "text", "text": message["content"]}] for message in messages]
        messages = [{**m, "content": content} for m, content in zip(messages, parts, strict=True)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    text = text if options else text[: text.rindex(end) + len(end)]
    return tokenizer(text, add_special_tokens=False).input_ids


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


# ---------------------------------------------------------------- what records say
ASK = "<bos><start_of_turn>user\nask me<end_of_turn>\n<start_of_turn>model\n"
YES, BAD = T("u:ask me", "a:yes"), T("u:ask me", "a:bad")
GOOD = {"prompt": "ask me", "chosen": "yes", "rejected": "bad"}
HUMAN = "\n\nHuman: ask me\n\nAssistant:"
PARTS = [{"type": "text", "text": "ask "}, {"type": "text", "text": "me", "image": None}]
PREFERENCES = {
    "standard": GOOD,
    "conversational": {"prompt": YES[:1], "chosen": YES[1:], "rejected": BAD[1:]},
    "implicit prompt": {"chosen": YES, "rejected": BAD},
    "UltraFeedback": {"prompt": "ask me", "score": 8.0, "messages": YES, "chosen": YES, "rejected": BAD},
    "question": {"question": "ask me", "chosen": "yes", "rejected": "bad", "input": "", "history": []},
    "input alone": {"input": "ask me", "instruction": None, "chosen": "yes", "rejected": "bad"},
    "JSON": {"chosen": json.dumps(YES), "rejected": json.dumps(BAD, indent=2)},
    "JSON of one message": {"prompt": json.dumps(YES[0]), **{k: GOOD[k] for k in ("chosen", "rejected")}},
    "other fields that say the same": {**GOOD, "question": " ask  me", "history": [["ask", "me"]]},
    "other fields, with who says it": {**GOOD, "conversations": [{"from": "human", "value": "ask me"}]},
    "another space": {"prompt": "ask me\n", "chosen": YES, "rejected": BAD},
    "HH-RLHF": {"chosen": f"{HUMAN} yes", "rejected": f"{HUMAN} bad"},
    "HH-RLHF, stripped": {"chosen": f"{HUMAN} yes".strip(), "rejected": f"{HUMAN} bad".strip()},
    "a transcript as prompt": {"prompt": HUMAN, "chosen": " yes", "rejected": " bad"},
    "transcripts everywhere": {"prompt": HUMAN, "chosen": f"{HUMAN} yes", "rejected": f"{HUMAN} bad"},
    "other names": {
        "chosen": [{"from": "human", "value": "ask me"}, {"from": "gpt", "value": "yes"}],
        "rejected": [{"role": "User", "content": "ask me"}, {"role": "MODEL", "content": "bad"}],
    },
    "parts of text": {**GOOD, "prompt": [{"role": "user", "content": PARTS}]},
    "empty fields": {"prompt": "", "system": "", "images": [], "chosen": YES, "rejected": BAD},
    "filled fields": {**GOOD, "chosen": [{**YES[1], "tool_calls": None, "reasoning_content": ""}]},
}


@pytest.mark.parametrize("record", PREFERENCES.values(), ids=PREFERENCES)
def test_preference_formats_give_the_same_pair(record):
    pairs = tokenised(record)
    assert spell(pairs) == [ASK, "yes<end_of_turn>", "bad<end_of_turn>"] and not pairs.notes
    assert pairs.sizes.tolist() == [[22, 4, 4]]  # 16 + "ask me"; "y" "e" "s" end; "b" "a" "d" end


TALK = T("u:hi", "a:a b", "u:more?", "a:c")
TRANSCRIPT = "\n\nHuman: hi\n\nAssistant: a b\n\nHuman: more?\n\nAssistant:"
PROMPTS = [  # record without its rejected side, prompt
    ({"prompt": T("s:s", "u:q"), "chosen": T("u:q", "a:y")}, T("s:s", "u:q")),
    ({"prompt": T("s:s"), "chosen": T("u:q", "a:y")}, T("s:s", "u:q")),
    ({"prompt": "q", "chosen": T("s:s", "a:y")}, T("s:s", "u:q")),
    ({"prompt": "q", "chosen": T("s:s", "u:q", "a:y")}, T("s:s", "u:q")),
    ({"prompt": "q", "system": "s", "chosen": "y"}, T("s:s", "u:q")),
    ({"system": "s", "chosen": T("s:s", "u:q", "a:y")}, T("s:s", "u:q")),
    ({"prompt": [{"role": "developer", "content": "s"}, *T("u:q")], "chosen": "y"}, T("s:s", "u:q")),
    ({"prompt": T("s:s", "u:q"), "system": "r", "chosen": "y"}, T("s:r\n\ns", "u:q")),
    ({"prompt": T("u:q", "a:a"), "chosen": T("u:r", "a:y")}, T("u:q", "a:a", "u:r")),
    ({"prompt": T("u:q", "a:a"), "chosen": T("u:q", "a:y")}, T("u:q", "a:a", "u:q")),  # asked twice
    ({"prompt": "q", "chosen": T("a:a", "u:r", "a:y")}, T("u:q", "a:a", "u:r")),
    ({"prompt": TALK[:3], "chosen": [TALK[2], *T("a:y")]}, TALK[:3]),  # the last question again
    ({"prompt": "hi", "chosen": [*TALK[:3], *T("a:y")]}, TALK[:3]),  # the first question alone
    ({"prompt": "more?", "chosen": [*TALK[:3], *T("a:y")]}, TALK[:3]),  # the last one alone
    ({"prompt": TRANSCRIPT, "chosen": "y"}, TALK[:3]),
    ({"chosen": f"{TRANSCRIPT} y"}, TALK[:3]),
    ({"system": "s", "question": "q", "chosen": "y"}, T("s:s", "u:q")),  # orca's
    ({"instruction": "i", "input": "q", "chosen": "y"}, T("u:i\n\nq")),
    ({"prompt": "q", "question": "q", "instruction": "q", "input": "q", "chosen": "y"}, T("u:q")),
    ({"question": "q", "chosen": T("u:q", "a:y")}, T("u:q")),
    ({"question": json.dumps(TALK[:3]), "chosen": "y"}, TALK[:3]),
    ({"prompt": '[{"role": "user"}]', "chosen": "y"}, T('u:[{"role": "user"}]')),  # JSON, but no messages
    ({"prompt": f"{YES} is a list", "chosen": "y"}, T(f"u:{YES} is a list")),
]


@pytest.mark.parametrize("record, expected", PROMPTS)
def test_the_prompt_is_all_that_precedes_the_response(record, expected):
    chosen = record["chosen"]
    rejected = f"{chosen}." if isinstance(chosen, str) else [*chosen[:-1], *T("a:y.")]
    assert data.to_pair({**record, "rejected": rejected}) == (expected, T("a:y", "a:y."))


def test_a_response_that_only_reads_like_a_transcript():
    record = {"prompt": "Write a play.", "chosen": "Human: q\n\nAssistant: y", "rejected": "no"}
    assert data.to_pair(record) == (T("u:Write a play."), T("a:Human: q\n\nAssistant: y", "a:no"))


HELLO = "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
SFT = {
    "conversation": {"prompt": "hi", "prompt_id": "f0", "messages": TALK},  # UltraChat-200k has both
    "conversation with an open end": {"messages": [*TALK, *T("u:bye")]},
    "chosen conversation with an open end": {"chosen": [*TALK, *T("u:bye")]},
    "prompt and response": {"prompt": "hi", "response": "a b"},
    "prompt and completion": {"prompt": "hi", "completion": "a b"},
    "messages and completion": {"prompt": TALK[:1], "completion": TALK[1:2]},
    "a preference's chosen side": {"prompt": "hi", "chosen": "a b", "rejected": "no"},
    "a conversation's chosen side": {"chosen": TALK, "rejected": T("u:hi", "a:no")},
    "a conversation as completion": {"prompt": "hi", "completion": TALK[1:]},
    "HH-RLHF's chosen side": {"chosen": "\n\nHuman: hi\n\nAssistant: a b", "rejected": ""},
}


@pytest.mark.parametrize("name", SFT)
def test_sft_learns_every_turn_of_the_assistant_and_no_other(name):
    pairs, expected = tokenised(SFT[name], sft=True), [("a b<end_of_turn>", True)]
    if "conversation" in name:
        expected += [("\n<start_of_turn>user\nmore?<end_of_turn>\n<start_of_turn>model\n", False)]
        expected += [("c<end_of_turn>", True)]
    assert spell(pairs)[0] == HELLO and spell(pairs)[2] == "" and not pairs.notes
    assert spell_targets(pairs) == expected


# ---------------------------------------------------------------- what can't be used
NO_TEXT, NO_ANSWER = "a message of role {}, or no text", "no field {!r} that ends with the assistant's turn"
OPEN, OTHER = "the prompt ends with the assistant's turn", "chosen and rejected answer different prompts"
MEDIA, CALL = "not a record of texts alone", [{"name": "f"}]
NO_USER = "the prompt has no user's turn, or no text"
PRINTED = "a conversation as Python prints it, not JSON"
NOT_READ = {  # field, records whose prompt it belongs to
    "system_prompt": [{**GOOD, "system_prompt": "be kind"}],
    "history": [{**GOOD, "history": [["hi", "a b"]]}, {**GOOD, "history": TALK[:2]}],
    "input": [{**GOOD, "input": "more"}, {"question": "ask me", **GOOD, "prompt": None, "input": "more"}],
    "instruction": [{**GOOD, "instruction": "be kind"}],
    "question": [{**GOOD, "question": "ask me?"}],
    "context": [{**GOOD, "context": {"text": ["a", "b"], "n": 7}}, {**GOOD, "context": 7}],
    "conversations": [{**GOOD, "conversations": T("u:ask me", "a:what?", "u:this")}],
}
IMAGE = [{"type": "image"}, {"type": "text", "text": "a"}]
LEFT_OUT = [  # reason, records
    (NO_USER, *({**GOOD, "prompt": value} for value in (None, "", T("u: \n"), T("s:s"), T("s:s", "u: ")))),
    (
        NO_USER,
        {**GOOD, "prompt": None, "system": "s"},
        {"chosen": T("s:s", "a:y"), "rejected": T("s:s", "a:n")},
    ),
    ("instruction and input are no texts", {"instruction": "a", "input": 3, "chosen": "b", "rejected": "c"}),
    (PRINTED, {**GOOD, "prompt": f"{YES[:1]}\n"}, {"chosen": f"{YES}", "rejected": f"{BAD}"}),
    (PRINTED, {**GOOD, "rejected": "[{'content': \"it's\",\n 'id': 1, 'role': 'assistant'}]"}),
    (PRINTED, {**GOOD, "chosen": "{'from': 'gpt', 'value': 'yes'}"}, {**GOOD, "system": f"{T('s:s')}"}),
    *((f"the field {name!r} is not read", *records) for name, records in NOT_READ.items()),
    (NO_ANSWER.format("chosen"), {"prompt": "a", "rejected": "b"}),
    (NO_ANSWER.format("chosen"), *({**GOOD, "chosen": value} for value in (None, [], TALK[:3]))),
    (NO_ANSWER.format("rejected"), {"prompt": "a", "chosen": "b"}),
    (NO_ANSWER.format("rejected"), *({**GOOD, "rejected": value} for value in (None, T("u:c"), T("s:c")))),
    ("identical responses", {**GOOD, "rejected": "yes"}, {**GOOD, "chosen": "bad "}),  # Gemma's turns trim
    (OPEN, {**GOOD, "prompt": T("u:a", "a:b")}, {**GOOD, "prompt": TALK}),
    (OTHER, {"chosen": T("u:a", "a:c"), "rejected": T("u:b", "a:c")}, {"chosen": TALK, "rejected": TALK[2:]}),
    ("Roles must alternate", {**GOOD, "prompt": T("u:a", "u:b")}, {**GOOD, "prompt": T("a:a", "u:b")}),
    (NO_TEXT.format("none"), {**GOOD, "prompt": 3}, {**GOOD, "chosen": {"a": 1}}, {**GOOD, "chosen": ["b"]}),
    (NO_TEXT.format("wizard"), {**GOOD, "prompt": [{"role": "wizard", "content": "a"}]}),
    (NO_TEXT.format("tool"), {**GOOD, "prompt": [*T("u:a"), {"role": "tool", "content": "4"}, *T("u:b")]}),
    (NO_TEXT.format("user"), *({**GOOD, "prompt": [{**YES[0], "content": x}]} for x in (5, None, IMAGE))),
    ("a message with tool_calls", {**GOOD, "chosen": [{**T("a:")[0], "tool_calls": CALL}]}),
    ("a message with function_call", {**GOOD, "rejected": [{**T("a:4")[0], "function_call": CALL[0]}]}),
    ("a message with reasoning_content", {**GOOD, "chosen": [{**T("a:4")[0], "reasoning_content": "2 + 2"}]}),
    ("a message with thinking", {**GOOD, "chosen": [{**T("a:4")[0], "thinking": "2 + 2"}]}),
    (MEDIA, {**GOOD, "images": ["a.png"]}, {**GOOD, "tools": CALL}, ["a", "b"], 7),
]


@pytest.mark.parametrize("reason, records", [(reason, records) for reason, *records in LEFT_OUT])
def test_odd_records_are_left_out_and_counted(reason, records):
    pairs = tokenised(*records, GOOD, *records, {**GOOD, "prompt": "me"})
    assert pairs.notes == {f"left out: {reason}": 2 * len(records)}
    assert [spell(pairs, i)[0] for i in range(len(pairs))] == [ASK, ASK.replace("ask ", "")]


def test_odd_records_for_sft():
    talks, reasons = ([], T("u:a"), T("a:a"), T("u:a", "a:a", "a:b")), Counter()
    records = [{"prompt": "a"}, *({"messages": talk} for talk in talks), GOOD]
    fields = ["response", "messages", "messages"]
    reasons.update(f"left out: {NO_ANSWER.format(field)}" for field in fields)
    reasons.update([f"left out: {OPEN}", f"left out: {NO_USER}"])
    assert tokenised(*records, sft=True).notes == reasons
    # What UltraChat calls its prompt is the first question; any other question must be in the conversation.
    talk = {"prompt": "hi", "question": "more?", "messages": TALK}
    pairs = tokenised(talk, {**talk, "question": "who?"}, sft=True)
    assert len(pairs) == 1 and pairs.notes == {"left out: the field 'question' is not read": 1}


LINES = [b"{'a': 1}", b'{"a": "b"', b'{"a": "b\0"}', b"[" * 100_000, b'{"a": "\xff"}', b"x\x85y"]


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_is_no_json_is_left_out(tmp_path, line):
    """Blank lines are nothing, a byte order mark too; half of the records may be odd, more end the run."""
    good, path = json.dumps({**GOOD, "chosen": "日"}, ensure_ascii=False).encode(), tmp_path / "bad.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([good, b"", line, b" ", good, line]))
    pairs = load_pairs(str(path), GEMMA_IT)
    assert spell(pairs, 1) == [ASK, "日<end_of_turn>", "bad<end_of_turn>"]
    assert len(pairs) == 2 and pairs.notes == {"left out: not JSON": 2}
    path.write_bytes(b"\n".join([good, b"", line, line]))
    with pytest.raises(UserError, match=r"bad\.jsonl': 1 usable records; left out: not JSON \(2\)"):
        load_pairs(str(path), GEMMA_IT)


# ---------------------------------------------------------------- files
KINDS = ["jsonl", "jsonl.gz", "json", "lines.json", "json.gz", "csv", "parquet", "arrow", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind(tmp_path, kind):
    records, path = [{**GOOD, "prompt": f"ask {x}"} for x in "abc"], tmp_path / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(records, indent=1))
    elif kind in ("csv", "parquet"):
        getattr(datasets.Dataset.from_list(records), f"to_{kind}")(path)
    elif kind == "arrow":
        datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
        (path,) = (tmp_path / "saved").glob("*.arrow")
    elif kind == "folder":  # a split for each file
        path.mkdir()
        write(path / "train.jsonl", {"prompt": "no", "chosen": "no", "rejected": "n"})
        write(path / "test.jsonl", *records)
        path = f"{path}:test"
    else:
        write(path, *records)
        if kind.endswith("gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    pairs = load_pairs(str(path), GEMMA_IT)
    expected = [[ASK.replace("me", x), "yes<end_of_turn>", "bad<end_of_turn>"] for x in "abc"]
    assert [spell(pairs, i) for i in range(len(pairs))] == expected
    if kind != "folder":
        assert spell(load_pairs(f"{path}:train[1:2]", GEMMA_IT)) == expected[1]


CSV = """prompt,chosen,rejected,n
NA,42,True,1
"null",007,1e5,
x,,NaN,2
ask me,"yes
",bad,3
"""


@pytest.mark.parametrize("kind", ["data.csv", "data.csv.gz", "folder"])
def test_every_field_of_a_csv_is_a_text(tmp_path, kind):
    """Numbers, NA and True are what someone said; a field that is empty is missing."""
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
        (path / "README.md").write_text("about")
    text = CSV.encode()
    (path / "train.csv" if kind == "folder" else path).write_bytes(
        gzip.compress(text) if "gz" in kind else text
    )
    pairs = load_pairs(str(path), FAMILIES["SmolLM2"])
    texts = [("NA", "42", "True"), ("null", "007", "1e5"), ("ask me", "yes\n", "bad")]
    said = [data.to_pair(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) for row in texts]
    assert pairs.notes == {f"left out: {NO_ANSWER.format('chosen')}": 1}
    for i, (prompt, answers) in enumerate(said):
        whole = [rendered("SmolLM2", [*prompt, answer]) for answer in answers]
        assert [torch.cat([pairs[i][0], y]).tolist() for y in pairs[i][1:]] == whole


ODD_NAMES = [
    "pairs[1].jsonl",
    "pairs1.jsonl",
    "p*.jsonl",
    "pa?.jsonl",
    "~p.jsonl",
    "{a,b}.jsonl",
    "[!p].jsonl",
]


def test_a_path_is_a_path(tmp_path, monkeypatch):
    """No other file is read than the one that is named, whatever its name says to a shell."""
    monkeypatch.chdir(tmp_path)
    for name in ODD_NAMES:
        write(name, {**GOOD, "prompt": name}, {**GOOD, "prompt": "second"})
    for name in ODD_NAMES:
        for source in (name, str(tmp_path / name)):
            (prompt, _, _), *rest = spell_all(load_pairs(source, FAMILIES["SmolLM2"]))
            assert name in prompt and len(rest) == 1
            assert "second" in spell_all(load_pairs(f"{source}:train[1:]", FAMILIES["SmolLM2"]))[0][0]
    for name in ("a::b.jsonl", "$HOME.jsonl", "d[1]/train.jsonl", "d*/train.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        write(name, GOOD)
        source = name.removesuffix("/train.jsonl")
        with pytest.raises(UserError, match=r"rename it; .* would be read as a pattern"):
            load_pairs(source, GEMMA_IT)


def test_a_folder_s_content_is_its_identity(tmp_path):
    """As a file's is: other words at the same time and of the same size are read anew."""
    path = tmp_path / "folder/train.jsonl"
    path.parent.mkdir()
    write(path, {**GOOD, "prompt": "abc"})
    first, stat = load_pairs(str(path.parent), FAMILIES["SmolLM2"]), path.stat()
    write(path, {**GOOD, "prompt": "abd"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = load_pairs(str(path.parent), FAMILIES["SmolLM2"])
    assert ["abc" in spell_all(first)[0][0], "abd" in spell_all(second)[0][0]] == [True, True]


def test_no_room_for_tokens(tmp_path, cache):
    """A full disk while the tokens are written: one line that names the place."""
    path = write(tmp_path / "data.jsonl", *[{**GOOD, "prompt": "x" * 500}] * 20)
    load_pairs(path, GEMMA_IT)  # the records are there now
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(UserError, match=f"{cache}: .*File too large"):
            load_pairs(path, FAMILIES["SmolLM2"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert len(load_pairs(path, FAMILIES["SmolLM2"])) == 20


def test_columns_of_mixed_kinds(tmp_path):
    """`datasets` encodes a column that holds texts and messages, and fills in the fields that others have."""
    odd = {**T("a:y")[0], "tool_calls": [{"a": 1}]}
    mixed = [GOOD, PREFERENCES["parts of text"], {**GOOD, "chosen": [odd]}]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    records = [{"chosen": YES, "rejected": [BAD[0], {**BAD[1], "tool_calls": x}]} for x in (None, "x", None)]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "filled.parquet")
    for name in ("mixed.json", "filled.parquet"):
        pairs = load_pairs(str(tmp_path / name), GEMMA_IT)
        assert spell(pairs, 0) == spell(pairs, 1) == [ASK, "yes<end_of_turn>", "bad<end_of_turn>"]
        assert pairs.notes == {"left out: a message with tool_calls": 1}


@pytest.mark.parametrize(
    "source, message",
    [
        ("missing.jsonl", "missing.jsonl"),
        ("./missing", "no such file or folder"),
        ("one/two/three", "no such file or folder"),
        ("owner/name:split", "data set 'owner/name:split' can't be loaded: "),  # tests are offline
        ("owner/name:config:split:more", "NAME:CONFIG:SPLIT"),
        ("data.xml", r"files end in \.jsonl, \.json, \.parquet, \.arrow, \.csv"),
        ("data.json", "data.json' can't be loaded: "),
        ("data.parquet", "data.parquet' can't be loaded: "),
        ("good.json:test", "test.*train"),  # its only split
        ("empty.jsonl", "0 usable records; it is empty"),
        ("configs", r"configs' can't be loaded: .*one.*two"),  # their names
    ],
)
def test_sources_that_can_not_be_read(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    contents = {"data.xml": "x", "data.json": "[1, 2", "data.parquet": "PAR1", "empty.jsonl": "\n\n"}
    for name, content in contents.items():
        Path(name).write_text(content)
    Path("configs").mkdir()
    for name in ("good", "configs/one", "configs/two"):
        write(f"{name}.json", GOOD)
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.json\n" for name in ("one", "two"))
    Path("configs/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(UserError, match=message) as error:
        load_pairs(source, GEMMA_IT)
    assert "\n" not in str(error.value)
    assert len(load_pairs("configs:two:train", GEMMA_IT)) == 1


def test_tokenised_once_for_what_the_tokens_depend_on(tmp_path, monkeypatch):
    """A second load reads the first one's tokens, notes included; another input is tokenised anew."""
    path, records = tmp_path / "data.jsonl", [GOOD, {**GOOD, "prompt": "x" * 40}, {"prompt": "a"}]
    limits, calls, encode = {"max_length": 60, "max_prompt_length": 50}, [], data.encode
    monkeypatch.setattr(data, "encode", lambda *args, **options: calls.append(0) or encode(*args, **options))

    def load(tokenizer=FAMILIES["SmolLM2"], **options):
        calls.clear()
        return load_pairs(str(path), tokenizer, **limits | options), len(calls)

    write(path, *records)
    pairs, count = load()
    assert count == 3 and pairs.notes == {"prompt cut": 1, f"left out: {NO_ANSWER.format('chosen')}": 1}
    again, count = load()
    assert count == 0 and again.notes == pairs.notes and again.digest() == pairs.digest()
    assert load(max_length=61)[1] == load(max_prompt_length=49)[1] == load(sft=True)[1] == 3
    assert load(byte_tokenizer(CHATML, bos_token=IM[0], eos_token=IM[1]))[1] == 3  # another template
    assert load(byte_tokenizer(SMOLLM_2, IM, eos_token=IM[1]))[1] == 3  # another BOS
    stat = path.stat()
    write(path, {**GOOD, "chosen": "bad", "rejected": "yes"}, *records[1:])  # other labels, at the same time
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed, count = load()
    assert count == 3 and changed[0][1].tolist() == pairs[0][2].tolist()


def test_processes_give_the_tokens_of_one(tmp_path, monkeypatch, cache):
    records = [{"prompt": str(i), "chosen": "y" * (i % 7), "rejected": "n"} for i in range(20)]
    one = load_pairs(write(tmp_path / "data.jsonl", *records, {"prompt": "a"}), GEMMA_IT)
    monkeypatch.setattr(data, "SHARE", 5)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache / "other"))
    several = load_pairs(str(tmp_path / "data.jsonl"), GEMMA_IT)
    assert len(list((cache / "other").rglob("cache-*.arrow"))) == 3
    assert several.digest() == one.digest() and several.notes == one.notes
    assert [spell(several, i) for i in range(20)] == [spell(one, i) for i in range(20)]


# ---------------------------------------------------------------- templates
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
    assert again.chat_template and tokenised(GOOD, talk, by=again).digest() == tokenised(GOOD, talk).digest()
    mixed = tokenised({"messages": T("s:be kind") + TALK}, sft=True)
    assert spell(mixed)[0] == HELLO.replace("hi", "be kind\n\nhi") and len(spell_targets(mixed)) == 3


def test_the_halos_format(tmp_path):
    """What a tokenizer without template gets that is not Gemma's, or on demand."""
    talk = "\n<|system|>\nbe kind\n<|user|>\nhi\n<|assistant|>\na b</s>\n<|user|>\nmore?\n<|assistant|>\n"
    plain, gemma, path = byte_tokenizer(**S), gemma_tokenizer(), write(tmp_path / "data.jsonl", GOOD)
    pairs = tokenised({**GOOD, "prompt": T("s:be kind") + TALK[:3]}, by=plain)
    assert spell(pairs, by=plain) == ["<s>" + talk, "yes</s>", "bad</s>"]
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
    ends = {
        name: Chat(tokenizer).tokenizer.decode(Chat(tokenizer).end) for name, tokenizer in FAMILIES.items()
    }
    assert ends == END_OF and not any(Chat(tokenizer).appends_end for tokenizer in FAMILIES.values())
    # As GLM's: special tokens before the answer, and none behind it.
    turns = "{% for m in messages %}{{ '<|' + m.role + '|>' + ('<think>' if m.role == 'assistant' else '') }}"
    turns += "{{ m.content + '\n\n' }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"
    by = byte_tokenizer(turns, [*PHI, "<think>"], ["\n\n"], eos_token="</s>")
    pairs = tokenised(GOOD, by=by)
    assert spell(pairs, by=by) == [
        "<|user|>ask me\n\n<|assistant|>",
        "<think>yes\n\n</s>",
        "<think>bad\n\n</s>",
    ]
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
    odd = byte_tokenizer(
        CHATML.replace("'<|im_end|>", "('' if 'bad' in m.content else '<|im_end|>') + '"), IM
    )
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


def test_which_template_it_is():
    names = {
        "Gemma's turns": gemma_tokenizer(),
        "the Halos format": byte_tokenizer(**S),
        "the model's own": GEMMA_IT,
    }
    for name, tokenizer in names.items():
        assert [Chat(tokenizer).name, Chat(tokenizer).name] == [name, name]  # also once the tokenizer has it


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


# ---------------------------------------------------------------- truncation
@pytest.mark.parametrize(
    "max_length, max_prompt_length, expected",
    [
        (50, 10, (30, 10, 20)),  # both fit: nothing is cut, whatever max_prompt_length is
        (49, 30, (30, 10, 19)),  # one too many: the prompt is within its own limit, so the response goes
        (49, 29, (29, 10, 20)),  # the prompt goes down to its limit
        (49, 12, (12, 10, 20)),
        (31, 12, (12, 10, 19)),  # then the longer response
        (20, 12, (12, 8, 8)),  # then both
        (13, 12, (12, 1, 1)),  # one response token remains
        (2, 1, (1, 1, 1)),  # the least there is: BOS
    ],
)
def test_truncation_by_hand(max_length, max_prompt_length, expected):
    """30, 10 and 20 tokens: 16 of a prompt are the turns' (BOS, start, user, newline; end, …), 1 the end."""
    record = {"prompt": "abcdefghijklmn", "chosen": "yabcdefhi", "rejected": "z" * 19}
    x, y_w, y_l = (ids.tolist() for ids in tokenised(record)[0])
    assert (len(x), len(y_w), len(y_l)) == (30, 10, 20)
    pairs = tokenised(record, max_length=max_length, max_prompt_length=max_prompt_length)
    keep, *cut = expected
    x = x if keep == 30 else [BOS, *x[30 - keep + 1 :]]
    assert [ids.tolist() for ids in pairs[0]] == [x, y_w[: cut[0]], y_l[: cut[1]]]
    done = {"prompt cut": keep < 30, "response cut": cut != [10, 20]}
    assert pairs.notes == {reason: 1 for reason in done if done[reason]}


def test_truncation_without_bos_and_in_sft():
    """No BOS: none is kept. SFT: the end of all that follows the first prompt goes, mask and all."""
    record, by = {**GOOD, "prompt": "x" * 40}, FAMILIES["Qwen-3"]
    short = tokenised(record, by=by, max_length=60, max_prompt_length=20)[0][0].tolist()
    assert short == tokenised(record, by=by)[0][0].tolist()[-20:]
    talk = {"messages": T("u:" + "d" * 20, "a:" + "a" * 9, "u:bye", "a:" + "b" * 50)}
    pairs = tokenised(talk, sft=True, max_length=60, max_prompt_length=36)
    assert spell(pairs)[0] == ASK.replace("ask me", "d" * 20)  # 36 of 60; 10 for the answer leave 14
    rest = ("\n<start_of_turn>user\nbye<end_of_turn>\n<start_of_turn>m", False)
    assert spell_targets(pairs) == [("a" * 9 + "<end_of_turn>", True), rest]
    assert pairs.notes == {"response cut": 1}
    same = {"prompt": "a", "chosen": "same begin", "rejected": "same end"}
    assert tokenised(same, max_length=20, max_prompt_length=16).notes["left out: identical responses"] == 1


@pytest.mark.parametrize("limits", [(1, 1), (8, 8), (8, 9), (8, 0), (8, -1)])
def test_limits_that_leave_no_token(limits):
    options = dict(zip(("max_length", "max_prompt_length"), limits, strict=True))
    with pytest.raises(UserError, match=f"{limits[1]}: from 1 to below max_length {limits[0]}"):
        load_pairs("a.jsonl", GEMMA_IT, **options)


ODD = ["<bos>", "<eos>", "<end_of_turn>", "<|im_end|>", "</s>", "\n\nHuman: ", "\n\nAssistant:", "good", "\0"]
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=6)  # lone surrogates too
TEXTS = st.lists(ANY_TEXT | st.sampled_from(ODD), max_size=4).map("".join)


@given(st.tuples(TEXTS, TEXTS, TEXTS), st.sampled_from(sorted(FAMILIES)), st.integers(2, 60), st.data())
@settings(max_examples=200, deadline=None)
def test_any_text_gives_the_template_s_tokens_or_a_reason(texts, family, longest, draw):
    record, by = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)), FAMILIES[family]
    limits = {"max_length": longest, "max_prompt_length": draw.draw(st.integers(1, longest - 1))}
    whole, cut = tokenised(record, by=by), tokenised(record, by=by, **limits)
    assert len(whole) + sum(note.startswith("left out") for note in whole.notes) == 1
    assert len(cut) <= len(whole)
    if len(whole):
        x, *sides = (ids.tolist() for ids in whole[0])
        prompt, answers = data.to_pair(record)
        assert [x + y for y in sides] == [rendered(family, [*prompt, answer]) for answer in answers]
    if len(cut):
        short, *short_sides = (ids.tolist() for ids in cut[0])
        assert short and all(short_sides) and len(short) + max(map(len, short_sides)) <= longest
        assert x[len(x) - len(short) + 1 :] == short[1:] and (x[0] == short[0] or x[0] != by.bos_token_id)
        assert [y[: len(z)] for y, z in zip(sides, short_sides, strict=True)] == short_sides


# ---------------------------------------------------------------- storage
ROWS = [([2, 5, 6], [10, 11], [20]), ([2], [7], [8])]


def test_digest_is_of_tokens_targets_and_sizes():
    digest = Pairs(ROWS).digest()
    assert Pairs([(*row, [1] * len(row[1])) for row in ROWS]).digest() == digest
    parts = data.pa.concat_tables([Pairs([row]).table for row in ROWS])
    assert Pairs(parts).digest() == digest and parts["tokens"].num_chunks == 2  # however it is divided
    others = [
        [([2, 5, 6], [10, 12], [20]), ROWS[1]],  # one token
        [([2, 5, 6], [10], [11, 20]), ROWS[1]],  # a boundary
        [([2, 5], [6, 10, 11], [20]), ROWS[1]],
        [([2, 5, 6], [10, 11], [20], [1, 0]), ROWS[1]],  # a target
        [ROWS[1], ROWS[0]],
        [ROWS[0]],
    ]
    assert len({digest, *(Pairs(other).digest() for other in others)}) == 1 + len(others)
    pairs = Pairs(parts.slice(0, 1))
    assert pairs.digest() == Pairs(ROWS[:1]).digest() and pairs.largest_token() == 20


# ---------------------------------------------------------------- files and ranks
def test_writing_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "new/a.json"
    runtime.write_json(path, {"π": 1})
    assert json.loads(path.read_text()) == {"π": 1} and [p.name for p in path.parent.iterdir()] == ["a.json"]
    with pytest.raises(UserError, match=r"new/a\.json/b"):
        runtime.write_text(path / "b", "text")
    for keep in (False, True):
        with pytest.raises(UserError, match="half: disk full"), runtime.writing(tmp_path / "half", keep=keep):
            (tmp_path / "half").write_text("be")
            raise OSError("disk full")
        assert (tmp_path / "half").exists() == keep


HOLDER = "import filelock, sys; _ = filelock.FileLock(sys.argv[1]).acquire(); print(1, flush=True); input()"


def test_a_folder_is_held_by_one_process(tmp_path, capsys):
    with runtime.lock_folder(tmp_path), runtime.lock_folder(tmp_path):  # a process may hold it again
        pass
    words = [sys.executable, "-c", HOLDER, tmp_path / "lock"]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "1\n"
    (watchdog := threading.Timer(20, other.kill)).start()  # who waits here would wait for ever
    with pytest.raises(UserError, match="another process writes there"):
        runtime.lock_folder(tmp_path)
    watchdog.cancel()
    released = []
    threading.Timer(0.3, lambda: released.append(True) or other.communicate("\n")).start()
    with runtime.lock_folder(tmp_path, wait=True) as lock:
        assert released and lock.is_locked and other.wait(10) == 0
        assert "another process works there; waiting" in capsys.readouterr().out


def test_outputs_are_tried_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    runtime.check_output("out", tmp_path / "a/b", folder=True)
    runtime.check_output("json", tmp_path / "file", folder=False)
    for path, folder in ((tmp_path, False), (tmp_path / "file", True), (tmp_path / "file/a", True)):
        with pytest.raises(UserError, match=r"--out .* can be written there"):
            runtime.check_output("out", path, folder=folder)


def test_an_error_is_one_line(monkeypatch, capsys):
    """Of every rank, with its number where there are several: another one may know of none."""
    monkeypatch.delenv("RANK", raising=False)
    for rank, said in (None, "error: no"), (0, "error (rank 0): no"), (1, "error (rank 1): no"):
        if rank is not None:
            monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as end:
            runtime.run_script(unittest.mock.Mock(side_effect=UserError("no")))
        assert end.value.code == 2 and capsys.readouterr().err.strip() == said


FAILS = """
import sys
import batches, data, runtime
batches.LOADERS["cpu"] = 1

def lookup(index):
    raise {"user": runtime.UserError, "other": RuntimeError}[sys.argv[1]]("no")

pairs = data.Pairs([([2, 3], [4], [5])])
runtime.run_script(lambda: list(batches.stream(pairs, [[0]] * 50, device="cpu", lookup=lookup)))
"""


@pytest.mark.parametrize("kind, status, last", [("user", 2, "error: no"), ("other", 1, "RuntimeError: no")])
def test_an_error_where_batches_are_made_ends_the_rank(kind, status, last):
    """As on a card, in another process: a rank that stayed for it would keep the others waiting for hours."""
    words = [sys.executable, "-c", FAILS, kind]
    folder = Path(data.__file__).parent
    ended = subprocess.run(words, capture_output=True, text=True, timeout=100, cwd=folder)
    said = ended.stderr.strip().splitlines()
    assert ended.returncode == status and said[-1] == last and (status == 1 or len(said) == 1)


def test_the_library_s_errors_name_what_failed():
    message = "model 'owner/name' can't be loaded: outer inner words"
    with pytest.raises(UserError, match=message), runtime.hub_errors("model", "owner/name"):
        raise OSError("outer\n inner") from ValueError("words")


def in_two_ranks(rank, folder):
    """One rank tokenises, the other finds it; both raise an error; numbers of batches are made equal."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    encode, calls = data.encode, []
    data.encode = lambda *args, **options: calls.append(0) or encode(*args, **options)
    pairs = load_pairs(f"{folder}/data.jsonl", GEMMA_IT)
    assert runtime.ranks() == (rank, 2)
    with pytest.raises(UserError, match="0 usable records"):
        load_pairs(f"{folder}/bad.jsonl", GEMMA_IT)
    assert batches.lockstep([[0]] * (1 + rank), "cpu") == [[[0], []], [[0], [0]]][rank]
    Path(f"{folder}/rank_{rank}").write_text(json.dumps([pairs.digest(), len(calls)]))


def test_one_rank_tokenises_for_all(tmp_path):
    write(tmp_path / "data.jsonl", GOOD, PREFERENCES["HH-RLHF"], {"prompt": "a"})
    write(tmp_path / "bad.jsonl", {"prompt": "a"})
    torch.multiprocessing.start_processes(in_two_ranks, (tmp_path,), nprocs=2, start_method="forkserver")
    (digest, calls), (other, more) = (json.loads((tmp_path / f"rank_{i}").read_text()) for i in (0, 1))
    assert digest == other and calls + more == 3 + 1
