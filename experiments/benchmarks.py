"""Answers to AlpacaEval 2, Arena-Hard and MT-Bench (Table 2, Fig. 3), in files that their own tools judge.

python -m experiments.benchmarks --kind mt_bench --model MODEL --questions question.jsonl --out answers.jsonl
"""

import argparse
import json
import time
import uuid
from pathlib import Path

import torch.distributed as dist

import data
import loading
import runtime
from eval_diversity import sample_responses
from runtime import refuse
from settings import Config

# Each benchmark's temperature, MT-Bench's differs in some categories; and where a record has its questions.
TEMPERATURES = {"alpaca_eval": 0.7, "arena_hard": 0.0, "mt_bench": 0.7}
MT_BENCH = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
FIELDS = {"alpaca_eval": ["instruction"], "arena_hard": ["prompt", "uid"]}
FIELDS["mt_bench"] = ["turns", "question_id"]


def read_questions(kind, path) -> list[tuple[dict, list[str]]]:
    """(record, the user's turns) of each question in a benchmark's file. UserError for anything else."""
    questions, where = [], path
    try:
        text = Path(path).read_text()
        lines = [line for line in text.split("\n") if line.strip()]
        for record in json.loads(text if path.endswith(".json") else f"[{','.join(lines)}]"):
            where = f"{path}, record {len(questions) + 1}"
            asked, *_ = (record[field] for field in FIELDS[kind])
            turns = asked if kind == "mt_bench" else [asked]
            if not turns or not all(isinstance(turn, str) for turn in turns):
                refuse(f"turns {turns!r:.80}")
            questions.append((record, turns))
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(f"--questions {where}: no question of {kind}: {error!r}")
    return questions or refuse(f"--questions {path}: there is none")


def answer_record(kind, question, turns, answers, model) -> dict:
    """A question's answers as a benchmark's tool reads them, `model` by name."""
    if kind == "alpaca_eval":
        answer = {"instruction": turns[0], "output": answers[0], "generator": model}
        return answer | {"dataset": question.get("dataset", "")}
    number = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([model, turns, answers])).hex  # same answer, same id
    if kind == "arena_hard":  # its add_markdown_info.py adds the counts that style control needs
        said = {"role": "assistant", "content": {"answer": answers[0]}}
        answer = {"uid": question["uid"], "ans_id": number, "model": model}
        answer["messages"] = [{"role": "user", "content": turns[0]}, said]
    else:
        answer = {"question_id": question["question_id"], "answer_id": number, "model_id": model}
        answer["choices"] = [{"index": 0, "turns": answers}]
    return answer | {"tstamp": time.time()}


def answer_all(lm, tokenizer, kind, questions, *, temperature, seed, max_new_tokens) -> list[list[str]]:
    """The answers to each of `read_questions`, one a turn; each turn sees the model's own earlier answers.

    temperature: None is the benchmark's own.
    """
    chat, talks, groups = data.Chat(tokenizer), [[] for _ in questions], {}
    for i, (question, turns) in enumerate(questions):
        own = (MT_BENCH if kind == "mt_bench" else {}).get(question.get("category"), TEMPERATURES[kind])
        for turn in range(len(turns)):  # what has one turn's number and one temperature is sampled together
            groups.setdefault((turn, own if temperature is None else temperature), []).append(i)
    options = {"max_new_tokens": max_new_tokens, "top_p": 1.0, "sample_batch": 32}
    # First turns come before second ones, whose prompts hold the first answers.
    for (turn, heat), here in sorted(groups.items()):
        for i in here:
            talks[i].append({"role": "user", "content": questions[i][1][turn]})
        prompts = [chat.ids(talks[i], ask=True) for i in here]
        # Turns differ in their seed, and no two values of --seed share one.
        options |= {"temperature": heat, "seed": 2 * seed + turn}
        for i, (tokens,) in zip(here, sample_responses(lm, tokenizer, prompts, **options), strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            talks[i].append({"role": "assistant", "content": text})
    return [[message["content"] for message in talk[1::2]] for talk in talks]


def main(argv=None):
    """Answer a benchmark at one temperature."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error, add = refuse, parser.add_argument
    add("--kind", required=True, choices=TEMPERATURES, help="format of questions and answers")
    add("--model", required=True, help="Hugging Face directory or hub name")
    add("--questions", required=True, help="the benchmark's: a JSON list (.json) or JSON lines")
    add("--out", required=True, help="file of answers, .json or .jsonl; its name is the model's name there")
    add("--temperature", type=float, help="Fig. 3 has several; none: the benchmark's own")
    add("--max_new_tokens", type=int, default=1024, help="longest answer (1024)")
    add("--seed", type=int, default=0, help="of sampling (0)")
    args = parser.parse_args(argv)
    kind, out = args.kind, Path(args.out)
    runtime.check_output("out", out, folder=False)
    for name, low in (("max_new_tokens", 1), ("seed", 0), ("temperature", 0)):
        if (value := getattr(args, name)) is not None and value < low:
            refuse(f"--{name} {value}: must be at least {low}")
    if out.suffix != (".json" if kind == "alpaca_eval" else ".jsonl"):
        refuse(f"--out {out}: AlpacaEval reads a .json file, the others .jsonl")
    device, tokenizer = runtime.start_processes(), data.load_tokenizer(args.model)
    questions = read_questions(kind, args.questions)
    lm = loading.load_lm(args.model, device, dtype=loading.torch_dtype(Config(), device))
    sampling = {name: getattr(args, name) for name in ("temperature", "seed", "max_new_tokens")}
    answers = answer_all(lm, tokenizer, kind, questions, **sampling)
    answered = zip(questions, answers, strict=True)
    records = [answer_record(kind, *question, said, out.stem) for question, said in answered]
    if runtime.ranks()[0] == 0:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        runtime.write_text(out, json.dumps(records, indent=1) if kind == "alpaca_eval" else lines)
        print(f"{out}: {len(records)} answers")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    runtime.run_script(main)
