"""data.py: every kind of record, cuts by hand, any input; the tokens are the template's own."""

import json
from collections import Counter

import pytest
from families import (
    ASK,
    BAD,
    BOS,
    FAMILIES,
    GEMMA_IT,
    GOOD,
    HELLO,
    TALK,
    YES,
    T,
    rendered,
    spell,
    spell_targets,
    tokenised,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import Pairs, load_pairs
from runtime import UserError

# ---------------------------------------------------------------- what records say
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
    (NO_USER, {**GOOD, "prompt": None, "system": "s"}),
    (NO_USER, {"chosen": T("s:s", "a:y"), "rejected": T("s:s", "a:n")}),
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
