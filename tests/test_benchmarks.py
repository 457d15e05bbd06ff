"""experiments/benchmarks.py: greedy answers by hand, in each benchmark's own format."""

import json

import pytest
from conftest import greedy, make_lm
from test_eval import make_tokenizer

from experiments import benchmarks
from runtime import UserError

ALPACA = [{"instruction": "w10 w9", "output": "theirs", "generator": "other", "dataset": "koala"}]
ARENA = [{"uid": "a1", "category": "math", "prompt": "w20 w21"}, {"uid": "a2", "prompt": "w22"}]
MT = [
    {"question_id": 81, "category": "writing", "turns": ["w30 w31", "w32"]},
    {"question_id": 111, "category": "math", "turns": ["w33", "w34"]},
]
TOKENIZER = make_tokenizer()


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Asks a random model whose greedy answers are many different words, by the script."""
    monkeypatch.chdir(tmp_path)
    lm = make_lm(seed=4, tie_word_embeddings=False)
    lm.save_pretrained("lm")
    TOKENIZER.save_pretrained("lm")

    def ask(kind, questions, flags=""):
        ending, text = ".jsonl", "\n".join(map(json.dumps, questions))
        if kind == "alpaca_eval":
            ending, text = ".json", json.dumps(questions)
        (tmp_path / f"q{ending}").write_text(text)
        words = f"--kind {kind} --model lm --questions q{ending} --out ours{ending} {flags}"
        benchmarks.main([*words.split(), "--max_new_tokens", "12"])
        text = (tmp_path / f"ours{ending}").read_text()
        return json.loads(text) if ending == ".json" else [json.loads(line) for line in text.splitlines()]

    return lm, ask


def most_likely(lm, text):
    """The most likely continuation, without the token that ends it."""
    ids = TOKENIZER(f"<bos> {text} <end> <a>", add_special_tokens=False).input_ids
    return TOKENIZER.decode(greedy(lm, ids, 12), skip_special_tokens=True)


def test_answers_in_each_benchmarks_format(answers):
    lm, ask = answers
    told = {x: most_likely(lm, f"<u> {x}") for x in ("w10 w9", "w20 w21")}
    found = ask("alpaca_eval", ALPACA, "--temperature 0")
    assert found == [{**ALPACA[0], "output": told["w10 w9"], "generator": "ours"}]
    new, _ = ask("arena_hard", ARENA)  # greedy by itself
    assert {*new} == {"uid", "ans_id", "model", "messages", "tstamp"} and new["model"] == "ours"
    said = {"role": "assistant", "content": {"answer": told["w20 w21"]}}
    assert new["uid"] == "a1" and new["messages"] == [{"role": "user", "content": "w20 w21"}, said]


def test_second_turn_follows_the_models_own_first(answers):
    """Greedy by hand over the whole talk; the first turn's end stands once, between answer and question."""
    lm, ask = answers
    records = ask("mt_bench", MT, "--temperature 0")
    for question, record in zip(MT, records, strict=True):
        opening, then = (f"<u> {turn}" for turn in question["turns"])
        first = most_likely(lm, opening)
        second = most_likely(lm, f"{opening} <end> <a> {first} <end> {then}")
        assert second != most_likely(lm, then), "this test can't tell"
        assert record["choices"] == [{"index": 0, "turns": [first, second]}]
        assert record["question_id"] == question["question_id"] and record["model_id"] == "ours"
    # Without a temperature, the benchmark's own: math is greedy, writing is not.
    seeds = [ask("mt_bench", MT, f"--seed {seed}") for seed in range(3)]
    assert all(maths["choices"] == records[1]["choices"] for _, maths in seeds)
    assert len({str(writing["choices"]) for writing, _ in seeds}) > 1


def test_questions_that_are_none(answers):
    for kind, record, what in (
        ("mt_bench", {"turns": ["w1"]}, "question_id"),
        ("mt_bench", {"question_id": 1, "category": "math", "turns": [["w1"]]}, "turns"),
        ("arena_hard", {"uid": "1"}, "prompt"),
        ("alpaca_eval", {"prompt": "w1"}, "instruction"),
    ):
        with pytest.raises(UserError, match=rf"q\.json.*record 1.*{kind}.*{what}"):
            answers[1](kind, [record])


@pytest.mark.parametrize("flags", ["--seed -1", "--max_new_tokens 0", "--temperature -0.5", "--out a.txt"])
def test_wrong_values_are_named_before_the_model_is_read(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = f"--kind mt_bench --model nowhere --questions none.json --out a.jsonl {flags}"
    with pytest.raises(UserError, match=flags):
        benchmarks.main(words.split())
