"""data.py: every format and every bad input, tokens by hand, batches by hand, and properties of random pairs.

The tokenizers are made here: letters, a few merges, and bytes for all else. `spell` writes token ids as text
again, so that what is expected can be read.
"""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import data
from data import LEAST_PROMPT, Pairs, collate, epoch_order, load_pairs, micro_batches, read_records

BOS, EOS, START, END = 2, 1, 106, 107  # Gemma's ids
MERGES = [("\n", "g"), ("o", "o"), ("oo", "d")]  # "\ng": a line's end and a response's first letter

# Gemma's instruction template in our words: no system role, turns alternate, contents are trimmed.
GEMMA_IT = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}{{ '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma_tokenizer(template=None, adds_bos=True):
    """SentencePiece-like: merges may cross a line's end, any other character is bytes."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>"])}
    for letter in "\n▁abcdefghijklmnopqrstuvwxyz.?<_>":
        vocab[letter] = len(vocab)
    vocab |= {f"<unused{i}>": i for i in range(len(vocab), START)}
    vocab |= {"<start_of_turn>": START, "<end_of_turn>": END}
    vocab |= {f"<0x{byte:02X}>": END + 1 + byte for byte in range(256)}
    for a, b in MERGES:
        vocab[a + b] = len(vocab)
    raw = Tokenizer(models.BPE(vocab, MERGES, byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
    tokenizer.chat_template = template
    return tokenizer


def byte_tokenizer(template=None, **special):
    """GPT-2-like: bytes alone, and the special tokens that are given by role (`eos_token="</s>"`)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in dict.fromkeys(special.values())])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def gemma():
    return gemma_tokenizer(GEMMA_IT)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Hugging Face's library keeps its copies here, not in the user's home."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def load(tmp_path, gemma):
    """Pairs of some records, by way of a file."""

    def load(*records, tokenizer=gemma, **options):
        return load_pairs(write(tmp_path / "data.jsonl", *records), tokenizer, **options)

    return load


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def spell(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(torch.as_tensor(ids).tolist())).replace("▁", " ")


def spell_pair(tokenizer, pairs, i=0):
    return [spell(tokenizer, ids) for ids in pairs[i]]


def spell_targets(tokenizer, pairs, i=0):
    """What SFT learns from, after the prompt: (text, is target) of every run."""
    a, start, _, end = pairs.bounds[i].tolist()
    runs = []
    for token, mark in zip(pairs.tokens[start:end], pairs.is_target[start:end].tolist(), strict=True):
        if not runs or runs[-1][1] != mark:
            runs.append(["", mark])
        runs[-1][0] += spell(tokenizer, [token])
    return spell(tokenizer, pairs.tokens[a:start]), [tuple(run) for run in runs]


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


# ---------------------------------------------------------------- preference data
ASK = "<bos><start_of_turn>user\nask me<end_of_turn>\n<start_of_turn>model\n"
PREFERENCES = {
    "standard": {"prompt": "ask me", "chosen": "good", "rejected": "bad"},
    "conversational": {"prompt": [user("ask me")], "chosen": [says("good")], "rejected": [says("bad")]},
    "implicit prompt": {
        "chosen": [user("ask me"), says("good")],
        "rejected": [user("ask me"), says("bad")],
    },
    "UltraFeedback-binarized": {
        "prompt": "ask me", "prompt_id": "f0", "score_chosen": 8.0, "score_rejected": 2.0,
        "messages": [user("ask me"), says("good")],
        "chosen": [user("ask me"), says("good")], "rejected": [user("ask me"), says("bad")],
    },
    "HH-RLHF": {
        "chosen": "\n\nHuman: ask me\n\nAssistant: good", "rejected": "\n\nHuman: ask me\n\nAssistant: bad",
    },
    "other names": {
        "chosen": [{"from": "human", "value": "ask me"}, {"from": "gpt", "value": "good"}],
        "rejected": [{"role": "user", "content": "ask me"}, {"role": "model", "content": "bad"}],
    },
    "spaces around": {"prompt": " ask me\n", "chosen": "good\n\n", "rejected": "\n bad"},
}  # fmt: skip


@pytest.mark.parametrize("record", PREFERENCES.values(), ids=PREFERENCES)
def test_preference_formats_give_the_same_pair(load, gemma, record):
    pairs = load(record)
    assert spell_pair(gemma, pairs) == [ASK, "good<end_of_turn>", "bad<end_of_turn>"]
    assert pairs.bounds.tolist() == [[0, 22, 25, 29]]  # 16 + "ask me"; "g" "ood" end; "b" "a" "d" end
    assert pairs.is_target.tolist() == [False] * 22 + [True] * 7


@pytest.mark.parametrize("kind", ["HH-RLHF", "messages", "prompt field"])
def test_several_turns(load, gemma, kind):
    start = [user("a"), says("b"), user("c")]
    texts = {"chosen": "good", "rejected": "bad"}
    if kind == "HH-RLHF":
        start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
        pairs = load({name: start + text for name, text in texts.items()})
    elif kind == "messages":
        pairs = load({name: [*start, says(text)] for name, text in texts.items()})
    else:
        pairs = load({"prompt": start, **texts})
    prompt = "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n" + ASK[5:]
    assert spell_pair(gemma, pairs)[0] == prompt.replace("ask me", "c")
    assert spell_pair(gemma, pairs)[1:] == ["good<end_of_turn>", "bad<end_of_turn>"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "lines.json", "parquet", "arrow", "folder"])
def test_files_of_every_kind(tmp_path, gemma, kind):
    import datasets

    records = [{"prompt": f"ask {x}", "chosen": "good", "rejected": "bad"} for x in "abc"]
    path = tmp_path / f"data.{kind}"
    if kind in ("jsonl", "lines.json"):
        write(path, *records)
    elif kind == "json":
        path.write_text(json.dumps(records, indent=1))
    elif kind == "parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    elif kind == "arrow":
        datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
        (path,) = (tmp_path / "saved").glob("*.arrow")
    else:  # a split for each file
        path.mkdir()
        write(path / "train.jsonl", {"prompt": "no", "chosen": "no", "rejected": "n"})
        write(path / "test.jsonl", *records)
        path = f"{path}:test"
    pairs = load_pairs(str(path), gemma)
    assert [spell_pair(gemma, pairs, i)[0] for i in range(len(pairs))] == [
        ASK.replace("me", x) for x in "abc"
    ]
    wheres = [where for where, _ in read_records(str(path))]
    assert wheres[1].endswith("data.jsonl:2" if kind == "jsonl" else "[1]")


@pytest.mark.parametrize(
    "source, expected",
    [
        ("owner/name", ("owner/name", None, "train", None)),
        ("owner/name:test_prefs", ("owner/name", None, "test_prefs", None)),
        ("owner/name@v1", ("owner/name", None, "train", "v1")),
        ("name@v1:train[:10]", ("name", None, "train[:10]", "v1")),
        ("{folder}", ("{folder}", None, "train", None)),
        ("{folder}:test", ("{folder}", None, "test", None)),
        ("{folder}/a@b.json:train[1:]", ("json", "{folder}/a@b.json", "train[1:]", None)),
    ],
)
def test_name_revision_and_split(tmp_path, monkeypatch, source, expected):
    def load_dataset(name, *, data_files, split, revision):
        calls.append((name, data_files, split, revision))
        return [GOOD]

    calls = []
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    write(tmp_path / "a@b.json", GOOD)
    fill = lambda text: text and text.replace("{folder}", str(tmp_path))  # noqa: E731
    ((where, record),) = read_records(fill(source))
    assert calls == [tuple(fill(part) for part in expected)] and record == GOOD
    assert where == f"{fill(source).partition(':')[0].partition('@v1')[0]}[0]"


# ---------------------------------------------------------------- SFT
HELLO = "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
TALK = [user("hi"), says("a b"), user("more?"), says("c")]
SFT = {
    "conversation": {"prompt": "hi", "prompt_id": "f0", "messages": TALK},  # UltraChat-200k has both
    "prompt and response": {"prompt": "hi", "response": "a b"},
    "prompt and completion": {"prompt": "hi", "completion": "a b"},
    "messages and completion": {"prompt": [user("hi")], "completion": [says("a b")]},
    "a preference's chosen side": {"prompt": "hi", "chosen": "a b", "rejected": "no"},
    "a conversation's chosen side": {"chosen": TALK, "rejected": [user("hi"), says("no")]},
    "HH-RLHF's chosen side": {"chosen": "\n\nHuman: hi\n\nAssistant: a b", "rejected": ""},
}


@pytest.mark.parametrize("name", SFT)
def test_sft_learns_every_turn_of_the_assistant_and_no_other(load, gemma, name):
    pairs = load(SFT[name], sft=True)
    expected = [("a b<end_of_turn>", True)]
    if "conversation" in name:
        expected += [("\n<start_of_turn>user\nmore?<end_of_turn>\n<start_of_turn>model\n", False)]
        expected += [("c<end_of_turn>", True)]
    assert spell_targets(gemma, pairs) == (HELLO, expected)
    assert len(pairs[0][2]) == 0


def test_sft_leaves_out_what_follows_the_last_answer(load, gemma):
    pairs = load({"messages": [user("hi"), says("a"), user("bye")]}, sft=True)
    assert spell_targets(gemma, pairs) == (HELLO, [("a<end_of_turn>", True)])


# ---------------------------------------------------------------- bad input
GOOD = PREFERENCES["standard"]
LEFT_OUT = [  # record, reason
    ({"chosen": "a", "rejected": "b"}, "no field 'prompt'"),
    ({"prompt": "a", "rejected": "b"}, "no field 'chosen'"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "no field 'rejected'"),
    ({"chosen": "before\n\nHuman: a\n\nAssistant: b", "rejected": "c"}, "no field 'prompt'"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
    ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt is empty"),
    ({"prompt": [user(" \n")], "chosen": "a", "rejected": "b"}, "prompt is empty"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "identical responses"),
    ({"prompt": "a", "chosen": "b ", "rejected": "b"}, "identical responses"),
    ({"prompt": "a", "chosen": [], "rejected": "b"}, "chosen does not end with the assistant's turn"),
    ({"prompt": "a", "chosen": "b", "rejected": [user("c")]},
     "rejected does not end with the assistant's turn"),
    (
        {"chosen": [user("a"), says("c")], "rejected": [user("b"), says("c")]},
        "chosen and rejected answer different prompts",
    ),
    ({"prompt": [user("a"), user("b")], "chosen": "c", "rejected": "d"},
     "the chat template refuses it: Roles must alternate"),
]  # fmt: skip


@pytest.mark.parametrize("bad, reason", LEFT_OUT)
def test_unusable_records_are_left_out_and_counted(load, gemma, bad, reason):
    pairs = load(bad, GOOD, bad, {**GOOD, "prompt": "me"})
    assert [spell_pair(gemma, pairs, i)[0] for i in (0, 1)] == [ASK, ASK.replace("ask ", "")]
    assert len(pairs) == 2 and pairs.notes == {f"left out: {reason}": 2}
    with pytest.raises(ValueError, match=r"data\.jsonl': no usable record; left out: .* \(2\)") as error:
        load(bad, bad)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"prompt": "a"}, "no field 'response'"),
        ({"messages": []}, "no assistant's turn that answers something"),
        ({"messages": [user("a")]}, "no assistant's turn that answers something"),
        ({"messages": [says("a"), user("b"), says("c")]}, "no assistant's turn that answers something"),
    ],
)
def test_unusable_records_for_sft(load, record, reason):
    assert load(record, GOOD, sft=True).notes == {f"left out: {reason}": 1}


WRONG = [  # line, message
    ("{'prompt': 1}", "not JSON: Expecting property name"),
    ('{"prompt": "a"', "not JSON"),
    ('{"prompt": "a\0"}', "not JSON: Invalid control character"),
    ("[" * 100_000, "not JSON"),
    ('["a", "b"]', "a JSON object is needed, not list"),
    ("7", "a JSON object is needed, not int"),
    (b'{"prompt": "\xff"}', "not JSON: 'utf-8' codec"),
    ({**GOOD, "prompt": 3}, "prompt: text or a list of messages is needed, not int"),
    ({**GOOD, "chosen": {"a": 1}}, "chosen: text or a list of messages is needed, not dict"),
    ({**GOOD, "rejected": ["text"]}, "rejected: a message needs .*, got 'text'"),
    (
        {**GOOD, "prompt": [{"role": "wizard", "content": "a"}]},
        r"prompt: .*\(user, human, .*system\).*wizard",
    ),
    ({**GOOD, "prompt": [{"role": ["user"], "content": "a"}]}, "prompt: a message needs a role"),
    ({**GOOD, "prompt": [{"content": "a"}]}, "prompt: a message needs a role"),
    (
        {**GOOD, "prompt": [{"role": "user", "content": 5}]},
        "prompt: a message needs .* a text as content, got",
    ),
    ({**GOOD, "prompt": [{"role": "user"}]}, "prompt: a message needs"),
]


@pytest.mark.parametrize("line, message", WRONG)
def test_wrong_files_are_errors_with_line_and_field(tmp_path, gemma, line, message):
    line = json.dumps(line) if isinstance(line, dict) else line
    path = tmp_path / "bad.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([good, b"", line if isinstance(line, bytes) else line.encode(), good]))
    with pytest.raises(ValueError, match=rf"bad\.jsonl:3: {message}"):
        load_pairs(str(path), gemma)


@pytest.mark.parametrize(
    "source, message",
    [
        ("missing.jsonl", "no such file"),
        ("missing.json", "no such file or folder"),
        ("./missing", "no such file or folder"),
        ("/missing:train", "data set '/missing': no such file or folder"),
        ("one/two/three", "no such file or folder, and no hub id"),
        ("bad name!", "no such file or folder, and no hub id"),
        ("", "no such file or folder, and no hub id"),
        ("nul\0byte", "no such file or folder, and no hub id"),
        ("owner/name:split", "data set 'owner/name', split 'split': "),  # well formed, but tests are offline
    ],
)
def test_sources_that_do_not_exist(tmp_path, monkeypatch, gemma, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pairs(source, gemma)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("data.csv", "a,b", r"must end in one of \.jsonl, \.json, \.parquet, \.arrow"),
        ("data.json", "[1, 2", "data.json', split 'train': Unexpected character"),
        ("data.json", "", "data.json', split 'train': nothing to read"),
        ("data.parquet", "PAR1", "data.parquet', split 'train': .*size"),
        ("data.arrow", "no", "data.arrow', split 'train': .*small"),
        ("data.jsonl", "\n\n", "no usable record; it is empty"),
    ],
)
def test_files_that_can_not_be_read(tmp_path, gemma, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_pairs(str(tmp_path / name), gemma)


def test_a_split_that_a_file_has_not(tmp_path, gemma):
    write(tmp_path / "data.json", GOOD)
    with pytest.raises(ValueError, match=r"data\.json', split 'test'.*train"):
        load_pairs(f"{tmp_path / 'data.json'}:test", gemma)


def test_nothing_to_end_a_response_with(load):
    with pytest.raises(ValueError, match="no EOS"):
        load(GOOD, tokenizer=byte_tokenizer())


def test_a_template_that_rewrites_what_was_said(load):
    """Prompt and response can't be told apart where an answer changes the turns before it."""
    turns = "{% for m in messages %}{{ m.content if WHOLE else m.content[:1] }}{% endfor %}"
    turns += "{{ eos_token if messages[-1].role == 'assistant' }}"
    message = r"data\.jsonl:1: the chat template rewrites earlier turns"
    question = byte_tokenizer(turns.replace("WHOLE", "m.role == 'assistant' or loop.last"), eos_token="</s>")
    with pytest.raises(ValueError, match=message):
        load(GOOD, tokenizer=question)
    answer = byte_tokenizer(turns.replace("WHOLE", "m.role == 'user' or loop.last"), eos_token="</s>")
    with pytest.raises(ValueError, match=message):
        load({"messages": TALK}, tokenizer=answer, sft=True)
    assert len(load(GOOD, tokenizer=answer)) == 1  # nothing of a single turn is rewritten


def test_a_template_that_is_broken(load):
    with pytest.raises(ValueError, match="chat template"):
        load(GOOD, tokenizer=byte_tokenizer("{% for %}", eos_token="</s>"))


# ---------------------------------------------------------------- special tokens
TEXTS = [
    "good",
    "",
    " ",
    "<eos>",
    "<bos>a",
    "a<end_of_turn>",
    "<end_of_turn>\n<start_of_turn>model\nno",
    "<pad>a",
]


@pytest.mark.parametrize("text", TEXTS)
def test_one_bos_and_one_end_whatever_is_written(load, gemma, text):
    pairs = load({"prompt": "a" + text, "chosen": text, "rejected": "z" + text})
    prompt, chosen, rejected = (ids.tolist() for ids in pairs[0])
    assert prompt[0] == BOS and prompt.count(BOS) == 1
    for ids, written in ((chosen, text), (rejected, "z" + text)):
        assert ids[-1] == END and not {BOS, EOS, START, END, 0} & set(ids[:-1])
        assert spell(gemma, ids[:-1]) == written.strip()  # and nothing of it is lost


@pytest.mark.parametrize("text", TEXTS)
def test_sft_has_one_bos_and_one_end_per_answer(load, gemma, text):
    talk = [user("a" + text), says(text), user("b" + text), says("c" + text)]
    pairs = load({"messages": talk}, sft=True)
    (answer, _), _, (other, _) = spell_targets(gemma, pairs)[1]
    assert pairs.tokens.tolist().count(BOS) == 1 and pairs.tokens[0] == BOS
    assert answer == text.strip() + "<end_of_turn>" and other == "c" + text.strip() + "<end_of_turn>"
    targets = pairs.tokens[pairs.is_target].tolist()
    assert targets.count(END) == 2 and not {BOS, EOS, START} & set(targets)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", [GEMMA_IT, GEMMA_IT.replace("{{ bos_token }}", "")])
def test_bos_where_the_template_or_the_tokenizer_puts_it(load, template, adds_bos):
    tokenizer = gemma_tokenizer(template, adds_bos)
    bos = adds_bos or "bos_token" in template
    prompt, *_ = spell_pair(tokenizer, load(GOOD, tokenizer=tokenizer))
    assert prompt == ASK[0 if bos else 5 :]


def test_tokens_do_not_merge_across_the_boundary(load, gemma):
    """Tokenised as one text, the prompt's last "\\n" and the response's first "g" are one token."""
    pairs = load(GOOD)
    prompt, chosen, rejected = (ids.tolist() for ids in pairs[0])
    joint = gemma(ASK + "good<end_of_turn>", add_special_tokens=False).input_ids
    assert gemma.convert_tokens_to_ids("\ng") in joint and joint != prompt + chosen
    assert spell(gemma, joint) == spell(gemma, prompt + chosen)
    assert prompt[-1] == gemma.convert_tokens_to_ids("\n")  # the same prompt for both, and for sampling
    assert prompt == gemma(ASK, add_special_tokens=False).input_ids
    assert chosen == [*gemma("good", add_special_tokens=False).input_ids, END]
    assert rejected == [*gemma("bad", add_special_tokens=False).input_ids, END]


# ---------------------------------------------------------------- templates
SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize("template", [GEMMA_IT, None])
def test_gemma_knows_no_system_role(load, template):
    """Its own template refuses one; ours, for the base model, as well: the text goes before the user's."""
    tokenizer = gemma_tokenizer(template)
    pairs = load(
        {**GOOD, "prompt": [SYSTEM, user("ask me")]}, {**GOOD, "prompt": [SYSTEM]}, tokenizer=tokenizer
    )
    assert spell_pair(tokenizer, pairs, 0)[0] == ASK.replace("ask me", "be kind\n\nask me")
    assert spell_pair(tokenizer, pairs, 1)[0] == ASK.replace("ask me", "be kind")
    talk = {"messages": [SYSTEM, *TALK]}
    prompt, runs = spell_targets(tokenizer, load(talk, tokenizer=tokenizer, sft=True))
    assert prompt == HELLO.replace("hi", "be kind\n\nhi") and len(runs) == 3


def test_a_base_gemma_gets_the_turns_of_the_tuned_one(load, tmp_path):
    base, tuned = gemma_tokenizer(None), gemma_tokenizer(GEMMA_IT)
    records = [GOOD, {"chosen": TALK, "rejected": [*TALK[:-1], says("d")]}]
    pairs = load(*records, tokenizer=base)
    assert pairs.digest() == load(*records, tokenizer=tuned).digest()
    base.save_pretrained(tmp_path / "saved")  # and keeps them
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert again.chat_template and load(*records, tokenizer=again).digest() == pairs.digest()


def test_plain_turns_without_template_and_gemma(load):
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    pairs = load({**GOOD, "prompt": [SYSTEM, *TALK[:3]]}, tokenizer=tokenizer)
    texts = [tokenizer.decode(ids.tolist()) for ids in pairs[0]]
    talk = "\n<|system|>\nbe kind\n<|user|>\nhi\n<|assistant|>\na b</s>\n<|user|>\nmore?\n<|assistant|>\n"
    assert texts == ["<s>" + talk, "good</s>", "bad</s>"]


def test_one_token_for_both_bos_and_eos(load):
    """GPT-2's: the ends of earlier answers are no second BOS."""
    tokenizer = byte_tokenizer(bos_token="<|end|>", eos_token="<|end|>")
    prompt, chosen, _ = load({**GOOD, "prompt": TALK[:3]}, tokenizer=tokenizer)[0]
    text = "<|end|>\n<|user|>\nhi\n<|assistant|>\na b<|end|>\n<|user|>\nmore?\n<|assistant|>\n"
    assert tokenizer.decode(prompt.tolist()) == text
    assert tokenizer.decode(chosen.tolist()) == "good<|end|>"


def test_a_template_that_ends_no_turn(load):
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", eos_token="</s>")
    pairs = load(GOOD, tokenizer=tokenizer)
    assert [tokenizer.decode(ids.tolist()) for ids in pairs[0]] == ["ask me\n", "good\n</s>", "bad\n</s>"]


def test_a_prompt_of_no_tokens(load):
    """Nothing would predict the first response token."""
    template = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"left out: prompt is empty \(1\)"):
        load(GOOD, tokenizer=byte_tokenizer(template, eos_token="</s>"))


# ---------------------------------------------------------------- odd text
@pytest.mark.parametrize(
    "text, read",
    [
        ("héllo 😀 日本", "héllo 😀 日本"),
        ("a\0b", "a\0b"),
        ("\ud800a\udfff", "\ufffda\ufffd"),  # halves of a surrogate pair
        ("\u200b\u202e\ufeff", "\u200b\u202e\ufeff"),
    ],
)
@pytest.mark.parametrize("sft", [False, True])
def test_odd_characters_arrive(load, gemma, text, read, sft):
    record = {"prompt": "x" + text, "chosen": text, "rejected": text + "."}
    prompt, chosen, rejected = load(record, sft=sft)[0]
    assert "x" + read in gemma.decode(prompt.tolist())
    assert gemma.decode(chosen[:-1].tolist()) == read and chosen[-1] == END
    assert sft or gemma.decode(rejected[:-1].tolist()) == read + "."


def test_a_million_characters(load, gemma):
    pairs = load(
        {"prompt": "go " * 10_000, "chosen": "good " * 200_000, "rejected": "b"},
        max_length=64,
        max_prompt_length=32,
    )
    assert [len(ids) for ids in pairs[0]] == [LEAST_PROMPT, 64 - LEAST_PROMPT, 2]


# ---------------------------------------------------------------- truncation
def lengths(load, prompt, chosen, rejected, max_length, max_prompt_length, **options):
    """(lengths after the cut, pairs, the uncut pairs) of a pair with that many tokens.

    16 tokens of the prompt are the turns': BOS, start, user (4 letters), newline; then end, newline, start,
    model (5 letters), newline. One token of a response is its end.
    """
    letters = "abcdefghijklmnopqrstuvwxyz" * 9
    record = {
        "prompt": letters[: prompt - 16],
        "chosen": "y" + letters[: chosen - 2],
        "rejected": "z" * (rejected - 1),
    }
    whole = load(record, max_length=9999, max_prompt_length=9998, **options)
    assert [len(ids) for ids in whole[0]] == [prompt, chosen, 0 if options else rejected]
    pairs = load(record, max_length=max_length, max_prompt_length=max_prompt_length, **options)
    return [len(ids) for ids in pairs[0]], pairs, whole


@pytest.mark.parametrize(
    "prompt, chosen, rejected, max_length, max_prompt_length, expected",
    [
        (30, 10, 20, 50, 49, (30, 10, 20)),  # it just fits
        (30, 10, 20, 49, 48, (29, 10, 20)),  # the prompt gives way, the responses stay whole
        (30, 10, 20, 37, 36, (17, 10, 20)),
        (30, 10, 20, 35, 34, (16, 10, 19)),  # not below LEAST_PROMPT: then the longer response
        (30, 10, 20, 24, 23, (16, 8, 8)),  # then both
        (30, 10, 20, 17, 16, (16, 1, 1)),
        (30, 10, 20, 16, 15, (15, 1, 1)),  # below LEAST_PROMPT: one response token remains
        (30, 10, 20, 2, 1, (1, 1, 1)),  # the least there is
        (30, 10, 20, 500, 20, (20, 10, 20)),  # max_prompt_length alone
        (30, 10, 20, 500, 1, (1, 10, 20)),
        (30, 10, 20, 16, 5, (5, 10, 11)),
    ],
)
def test_truncation(load, prompt, chosen, rejected, max_length, max_prompt_length, expected):
    got, pairs, whole = lengths(load, prompt, chosen, rejected, max_length, max_prompt_length)
    assert tuple(got) == expected
    x, y_w, y_l = (ids.tolist() for ids in whole[0])
    keep = expected[0]
    x = x if keep == prompt else ([BOS, *x[prompt - keep + 1 :]] if keep > 1 else x[-1:])
    assert [ids.tolist() for ids in pairs[0]] == [x, y_w[: expected[1]], y_l[: expected[2]]]
    cut = {"prompt cut": keep < prompt, "response cut": expected[1:] != (chosen, rejected)}
    assert pairs.notes == {reason: 1 for reason, done in cut.items() if done}


@pytest.mark.parametrize("sft", [False, True])
def test_endless_texts_are_cut_before_they_are_tokenised(load, monkeypatch, sft):
    """What is left of 300,000 characters is the same, and only as many go in as the limits may need."""
    endless = "good is it. " * 25_000
    record = {"prompt": "how " + endless, "chosen": endless, "rejected": "no " + endless}
    talk = {"messages": [user("how " + endless), says(endless), user(endless), says("b")]}
    limits, seen, encode = {"max_length": 60, "max_prompt_length": 30, "sft": sft}, [], data.Renderer.encode

    def noting(self, pieces):
        seen.append(max(len(text) for text, _ in pieces))
        return encode(self, pieces)

    monkeypatch.setattr(data.Renderer, "encode", noting)
    short = load(talk if sft else record, **limits)
    monkeypatch.setattr(data, "LONGEST_TOKEN", 10**9)
    whole = load(talk if sft else record, **limits)
    assert seen[0] == 60 * 256 and seen[1] > 300_000
    assert short.digest() == whole.digest() and short.notes == whole.notes and len(short[0][1]) == 44


def test_truncation_in_sft(load, gemma):
    """The first answer stays whole where the prompt can give way; cut is the end of the conversation."""
    assert lengths(load, 30, 20, 2, 40, 39, sft=True)[0] == [20, 20, 0]
    talk = {"messages": [user("d" * 20), says("a" * 9), user("bye"), says("b" * 50)]}
    prompt, runs = spell_targets(gemma, load(talk, sft=True, max_length=60, max_prompt_length=59))
    assert prompt == ASK.replace("ask me", "d" * 20)  # 36 tokens of 60; 10 for the answer leave 14
    assert runs[0] == ("a" * 9 + "<end_of_turn>", True)
    assert runs[1:] == [("\n<start_of_turn>user\nbye<end_of_turn>\n<start_of_turn>m", False)]
    pairs = load(talk, sft=True, max_length=48, max_prompt_length=47)
    assert [len(ids) for ids in pairs[0]] == [36, 12, 0] and int(pairs.is_target.sum()) == 10


def test_a_cut_that_makes_responses_identical(load):
    record = {"prompt": "a", "chosen": "same begin", "rejected": "same end"}
    assert load(record, GOOD, max_length=20, max_prompt_length=16).notes["left out: identical responses"] == 1


@pytest.mark.parametrize("limits", [(1, 1), (8, 8), (8, 9), (8, 0), (8, -1), (0, 0)])
def test_limits_that_leave_no_token(load, limits):
    with pytest.raises(ValueError, match=f"max_prompt_length {limits[1]}: .* max_length {limits[0]}"):
        load(GOOD, max_length=limits[0], max_prompt_length=limits[1])


# ---------------------------------------------------------------- storage
def test_more_records_than_are_tokenised_at_once(load, gemma, monkeypatch):
    monkeypatch.setattr("data.CHUNK", 3)
    names = [x + y for x in "abcd" for y in "efgh"]
    records = [{"prompt": name, "chosen": name + " a", "rejected": name} for name in names]
    records[4:4] = [{"prompt": "left out"}] * 4
    pairs = load(*records)
    assert [spell_pair(gemma, pairs, i) for i in range(len(pairs))] == [
        [ASK.replace("ask me", name), name + " a<end_of_turn>", name + "<end_of_turn>"] for name in names
    ]
    assert pairs.notes == {"left out: no field 'chosen'": 4}


def test_digest_is_of_tokens_targets_and_bounds():
    rows = ([2, 5, 6], [10, 11], [20]), ([2], [7], [8])
    digest = Pairs(rows).digest()
    assert (
        digest == Pairs([(*row, [True] * (len(row[1]) + len(row[2]))) for row in rows], {"note": 1}).digest()
    )
    others = [
        [([2, 5, 6], [10, 12], [20]), rows[1]],  # one token
        [([2, 5, 6], [10], [11, 20]), rows[1]],  # a boundary
        [([2, 5], [6, 10, 11], [20]), rows[1]],
        [([2, 5, 6], [10, 11], [20], [True, False, True]), rows[1]],  # a target
        [rows[1], rows[0]],
        [rows[0]],
    ]
    assert len({digest, *(Pairs(other).digest() for other in others)}) == 1 + len(others)


# ---------------------------------------------------------------- batches
PAIRS = Pairs([([2, 5, 6], [10, 11], [20, 21, 22]), ([2, 7], [30], [40, 41])])
FLAT = {  # the batch of pairs 1 and 0: the responses are 0 and 1 (chosen), 2 and 3 (rejected)
    "target": [30, 10, 11, 40, 41, 20, 21, 22], "owner": [0, 1, 1, 2, 2, 3, 3, 3], "lengths": [1, 2, 2, 3],
    "index": [1, 0], "weight": [1, 1],
}  # fmt: skip


def check(batch, **expected):
    for name, values in (FLAT | expected).items():
        assert getattr(batch, name).tolist() == values, name
        assert getattr(batch, name).dtype == (torch.float32 if name == "weight" else torch.int64)


def test_shared_rows_by_hand():
    batch = collate(PAIRS, [1, 0], layout="shared", row_multiple=4, pad_id=9)
    check(
        batch,
        tokens=[[2, 7, 30, 40, 41, 9, 9, 9], [2, 5, 6, 10, 11, 20, 21, 22]],
        positions=[[0, 1, 2, 2, 3, 0, 0, 0], [0, 1, 2, 3, 4, 3, 4, 5]],
        segment=[[0, 0, 1, 2, 2, -1, -1, -1], [0, 0, 0, 1, 1, 2, 2, 2]],
        doc=[[0, 0, 0, 0, 0, -1, -1, -1], [1] * 8],
        state=[1, 8 + 2, 8 + 3, 1, 3, 8 + 2, 8 + 5, 8 + 6],
    )


def test_separate_rows_by_hand():
    batch = collate(PAIRS, torch.tensor([1, 0]), padding_pair=True)
    check(
        batch,
        tokens=[[2, 7, 30, 0, 0, 0], [2, 7, 40, 41, 0, 0], [2, 5, 6, 10, 11, 0], [2, 5, 6, 20, 21, 22]],
        positions=[[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5]],
        segment=[[0, 0, 1, -1, -1, -1], [0, 0, 2, 2, -1, -1], [0, 0, 0, 1, 1, -1], [0, 0, 0, 2, 2, 2]],
        doc=[[0, 0, 0, -1, -1, -1], [1, 1, 1, 1, -1, -1], [2, 2, 2, 2, 2, -1], [3] * 6],
        state=[1, 12 + 2, 12 + 3, 6 + 1, 6 + 2, 18 + 2, 18 + 3, 18 + 4],
        weight=[0, 0],
    )


def test_packed_rows_by_hand():
    """Documents of 3, 4, 5 and 6 tokens, into rows of 7."""
    batch = collate(PAIRS, [1, 0], layout="separate", pack_to=7, pad_id=9)
    check(
        batch,
        tokens=[[2, 7, 30, 2, 7, 40, 41], [2, 5, 6, 10, 11, 9, 9], [2, 5, 6, 20, 21, 22, 9]],
        positions=[[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0], [0, 1, 2, 3, 4, 5, 0]],
        segment=[[0, 0, 1, 0, 0, 2, 2], [0, 0, 0, 1, 1, -1, -1], [0, 0, 0, 2, 2, 2, -1]],
        doc=[[0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 2, -1, -1], [3, 3, 3, 3, 3, 3, -1]],
        state=[1, 7 + 2, 7 + 3, 4, 5, 14 + 2, 14 + 3, 14 + 4],
    )
    one = collate(PAIRS, [1, 0], layout="shared", pack_to=13, row_multiple=16)
    check(
        one,
        tokens=[[2, 7, 30, 40, 41, 2, 5, 6, 10, 11, 20, 21, 22, 0, 0, 0]],
        positions=[[0, 1, 2, 2, 3, 0, 1, 2, 3, 4, 3, 4, 5, 0, 0, 0]],
        segment=[[0, 0, 1, 2, 2, 0, 0, 0, 1, 1, 2, 2, 2, -1, -1, -1]],
        doc=[[0] * 5 + [1] * 8 + [-1] * 3],
        state=[1, 7, 8, 1, 3, 7, 10, 11],
    )


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_sft_rows_by_hand(layout):
    """A user's turn within the conversation is seen, and is no target."""
    pairs = Pairs([([2, 5], [10, 11, 12, 13], [], [True, False, False, True]), ([2], [6], [])])
    check(
        collate(pairs, [0, 1], layout=layout),
        tokens=[[2, 5, 10, 11, 12, 13], [2, 6, 0, 0, 0, 0]],
        positions=[[0, 1, 2, 3, 4, 5], [0, 1, 0, 0, 0, 0]],
        segment=[[0, 0, 1, 1, 1, 1], [0, 1, -1, -1, -1, -1]],
        doc=[[0] * 6, [1, 1, -1, -1, -1, -1]],
        state=[1, 4, 6], target=[10, 13, 6], owner=[0, 0, 1], lengths=[2, 1, 0, 0], index=[0, 1],
    )  # fmt: skip
    assert pairs.row_lengths(layout).tolist() == [6, 2]


def test_row_lengths():
    assert PAIRS.row_lengths("shared").tolist() == [8, 5]
    assert PAIRS.row_lengths("separate").tolist() == [2 * 6, 2 * 4]


TOKENS = st.lists(st.integers(3, 99), min_size=1, max_size=6)
MAYBE_NONE = st.lists(st.integers(3, 99), max_size=5)
ROWS = st.lists(st.tuples(TOKENS, TOKENS, MAYBE_NONE), min_size=1, max_size=5)


@given(
    data=st.data(), layout=st.sampled_from(["shared", "separate"]), row_multiple=st.integers(1, 8),
    pack_to=st.integers(0, 40),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_every_response_token_once_and_what_its_state_sees(data, layout, row_multiple, pack_to):
    """What a state sees, by the mask in data.py's head, is prompt and response up to the token, exactly."""
    rows, pairs = data.draw(ROWS), []
    for x, y_w, y_l in rows:
        size = len(y_w) + len(y_l)
        mask = [True] * size if y_l else data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
        pairs.append((x, y_w, y_l, mask))
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
    batch = collate(Pairs(pairs), indices, layout=layout, row_multiple=row_multiple, pack_to=pack_to)

    expected = []  # (owner, target, the tokens before it)
    for side in (1, 2):
        for b, i in enumerate(indices):
            x, mask, y = pairs[i][0], pairs[i][3][len(pairs[i][1]) * (side - 1) :], pairs[i][side]
            owner = b + (side - 1) * len(indices)
            expected += [(owner, y[t], x + y[:t]) for t in range(len(y)) if mask[t]]
    L, got = batch.tokens.shape[1], []
    assert L % row_multiple == 0
    for owner, target, state in torch.stack([batch.owner, batch.target, batch.state], 1).tolist():
        r, q = divmod(state, L)
        segment = 1 + (owner >= len(indices))
        seen = batch.doc[r, : q + 1] == batch.doc[r, q]
        seen &= (batch.segment[r, : q + 1] == 0) | (batch.segment[r, : q + 1] == batch.segment[r, q])
        assert batch.segment[r, q] in (0, segment)
        assert batch.positions[r, : q + 1][seen].tolist() == list(range(int(seen.sum())))
        got.append((owner, target, batch.tokens[r, : q + 1][seen].tolist()))
    assert got == expected
    assert batch.lengths.tolist() == [sum(row[0] == n for row in expected) for n in range(2 * len(indices))]
    assert batch.index.tolist() == indices
    assert int((batch.doc >= 0).sum()) == int((batch.segment >= 0).sum())
    assert not batch.tokens[batch.segment < 0].any()
    if pack_to == 0:
        assert all(len(set(row.tolist()) - {-1}) == 1 for row in batch.doc)


SPECIAL = ["<bos>", "<eos>", "<end_of_turn>", "<start_of_turn>model\n", "<pad>", "\n\nHuman: ", "good", "\0"]
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=6)  # lone surrogates too
PIECES = st.lists(ANY_TEXT | st.sampled_from(SPECIAL), max_size=4).map("".join)


@given(texts=st.tuples(PIECES, PIECES, PIECES), longest=st.integers(2, 60), data=st.data(), sft=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_gives_a_sound_pair_or_a_reason(load, gemma, texts, longest, data, sft):
    max_length, max_prompt_length = longest, data.draw(st.integers(1, longest - 1))
    record = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
    try:
        pairs = load(record, sft=sft, max_length=max_length, max_prompt_length=max_prompt_length)
    except ValueError as error:
        assert "prompt is empty" in str(error) or "identical responses" in str(error)
        assert not texts[0].strip() or sft is False
        return
    prompt, chosen, rejected = (ids.tolist() for ids in pairs[0])
    assert prompt and chosen and (rejected or sft)
    assert len(prompt) <= max_prompt_length and len(prompt) + max(len(chosen), len(rejected)) <= max_length
    assert (
        prompt.count(BOS) == (1 if max_prompt_length > 1 and len(prompt) > 1 else 0) and BOS not in prompt[1:]
    )
    for ids, text in ((chosen, texts[1]), (rejected, texts[2])):
        assert not {BOS, EOS, START, 0} & set(ids) and END not in ids[:-1]
        if ids and ids[-1] == END:  # not cut: nothing of the text is lost
            read = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            assert gemma.decode(ids[:-1]).strip() == read.strip()


# ---------------------------------------------------------------- steps
def test_micro_batches_by_hand():
    sizes = torch.tensor([5, 9, 2, 9, 7, 3])
    cut = lambda *args, **options: micro_batches(range(6), sizes, *args, **options)  # noqa: E731
    assert cut(1) == [[1, 3, 4, 0, 5, 2]]  # the longest first
    assert cut(1, max_pairs=2) == [[1, 3], [4, 0], [5, 2]]
    assert cut(1, max_tokens=18) == [[1, 3], [4, 0], [5, 2]]  # 2 · 9, 2 · 7 (3 · 7 is too many), 2 · 3
    assert cut(1, max_tokens=8) == [[1], [3], [4], [0], [5, 2]]  # a longer pair goes alone
    assert cut(2) == [[1, 3, 4], [0, 5, 2]]
    assert cut(2, max_pairs=2) == [[1], [3], [4, 0], [5, 2]]  # three would leave a rank idle
    assert cut(4) == [[1], [3], [4, 0], [5, 2]]
    assert micro_batches(torch.tensor([4]), sizes, 3) == [[4], [], []]
    assert micro_batches([4, 1], sizes, 3) == [[1], [4], []]


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40), ranks=st.integers(1, 5), data=st.data(),
    max_pairs=st.integers(0, 6), max_tokens=st.integers(0, 200),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_micro_batches(sizes, ranks, data, max_pairs, max_tokens):
    indices = data.draw(st.lists(st.sampled_from(range(len(sizes))), unique=True, min_size=1))
    groups = micro_batches(
        torch.tensor(indices), torch.tensor(sizes), ranks, max_pairs=max_pairs, max_tokens=max_tokens
    )
    assert sorted(i for group in groups for i in group) == sorted(indices)
    assert len(groups) % ranks == 0
    for group in groups:
        longest = max((sizes[i] for i in group), default=0)
        assert not max_pairs or len(group) <= max_pairs
        assert not max_tokens or len(group) <= 1 or len(group) * longest <= max_tokens
    flat = [sizes[i] for group in groups for i in group]
    assert flat == sorted(flat, reverse=True)  # neighbours in length stay together
    full = [bool(group) for group in groups]
    assert full == sorted(full, reverse=True)  # the empty ones last
    assert all(full) or len(groups) == ranks or max(map(len, groups)) == 1


def test_epoch_order():
    orders = {
        (epoch, seed): tuple(epoch_order(50, epoch, seed).tolist()) for epoch in range(3) for seed in range(3)
    }
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len(set(orders.values())) == 9
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert tuple(epoch_order(50, 2, 1).tolist()) == orders[2, 1]
    assert torch.equal(state, torch.get_rng_state())  # nothing but its arguments counts, or is touched
