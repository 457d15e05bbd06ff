"""The files of AlpacaEval 2, Arena-Hard and MT-Bench: their questions, and answers as their tools read them.

    alpaca_eval   JSON list of instruction, output, generator, dataset
    arena_hard    JSON lines of answers, in its format of 2025 or, for its questions of 2024, of 2024
    mt_bench      JSON lines of answers, both turns
    records       JSON lines of prompt and response, of no benchmark

Table 2 and Fig. 3. eval_diversity.py --export samples the answers; the benchmarks' own tools judge them.
"""

import json
import time
import uuid
from pathlib import Path

from data import read_jsonl

EXPORTS = {"alpaca_eval": 0.7, "arena_hard": 0.0, "mt_bench": None, "records": 1.0}  # and their temperatures
# MT-Bench's temperatures by category; 0.7 in the others.
MT_BENCH = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}


def question_turns(kind, question) -> list[str]:
    """The user's turns in a record of a benchmark's file. Raises KeyError or TypeError where it is none."""
    if kind == "alpaca_eval":
        return [question["instruction"]]
    if kind == "mt_bench":
        return question["turns"] if question["question_id"] and question["category"] else []
    if kind == "arena_hard" and "uid" not in question:  # its files of 2024
        return [turn["content"] for turn in question["turns"]] if question["question_id"] else []
    return [question["prompt"]]


def read_questions(kind, path, most=None) -> list[tuple[dict, list[str]]]:
    """(record, the user's turns) of the first questions of a benchmark's file, a JSON list or JSON lines.

    Raises:
        ValueError: no such file, no JSON, or a record that is no question of that benchmark.
    """
    try:
        lines = str(path).endswith(".jsonl")
        records = read_jsonl(str(path)) if lines else enumerate(json.loads(Path(path).read_text()))
        records = list(records)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"questions {path}: a JSON list or a .jsonl file is needed: {error}") from None
    questions = []
    for where, record in records[:most]:
        try:
            turns = question_turns(kind, record)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, record {where}: no question of {kind}: {error}") from None
        if not (turns and all(isinstance(turn, str) for turn in turns)):
            raise ValueError(f"{path}, record {where}: no question of {kind}: turns {turns!r:.80}")
        questions.append((record, turns))
    if not questions:
        raise ValueError(f"questions {path}: there is none")
    return questions


def answer_record(kind, question, turns, answers, model) -> dict:
    """A question's answers as a benchmark's tool reads them, `model` by name; every turn is text.

    Arena-Hard's style control wants counts of tokens and Markdown too: its add_markdown_info.py adds them.
    """
    if kind == "alpaca_eval":
        answer = {"instruction": turns[0], "output": answers[0], "generator": model}
        return answer | {"dataset": question.get("dataset", "")}
    if kind == "records":
        return {"prompt": turns[0], "response": answers[0]}
    number = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([model, turns, answers])).hex  # same answer, same id
    if kind == "arena_hard" and "uid" in question:
        said = {"role": "assistant", "content": {"answer": answers[0]}}
        answer = {"uid": question["uid"], "ans_id": number, "model": model}
        answer["messages"] = [{"role": "user", "content": turns[0]}, said]
    else:
        said = answers if kind == "mt_bench" else [{"content": text} for text in answers]
        answer = {"question_id": question["question_id"], "answer_id": number, "model_id": model}
        answer["choices"] = [{"index": 0, "turns": said}]
    return answer | {"tstamp": time.time()}
