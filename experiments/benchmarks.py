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
import train
from eval_diversity import sample_responses
from train import refuse

# Each benchmark's temperature; MT-Bench's differs in some categories.
TEMPERATURES = {"alpaca_eval": 0.7, "arena_hard": 0.0, "mt_bench": 0.7}
MT_BENCH = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}


def read_questions(kind, path) -> list[tuple[dict, list[str]]]:
    """(record, the user's turns) of each question in a benchmark's file. UserError for anything else."""
    questions, where = [], path
    try:
        text = Path(path).read_text()
        lines = [line for line in text.split("\n") if line.strip()]
        for record in json.loads(text if path.endswith(".json") else f"[{','.join(lines)}]"):
            where = f"{path}, record {len(questions) + 1}"
            if kind == "mt_bench":
                turns = record["turns"] if record["question_id"] and record["category"] else []
            elif kind == "arena_hard" and "uid" not in record:  # its files of 2024
                turns = [turn["content"] for turn in record["turns"]] if record["question_id"] else []
            else:
                turns = [record["instruction" if kind == "alpaca_eval" else "prompt"]]
            if not turns or not all(isinstance(turn, str) for turn in turns):
                refuse(f"turns {turns!r:.80}")
            questions.append((record, turns))
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(f"--questions {where}: no question of {kind}: {error!r}")
    return questions or refuse(f"--questions {path}: there is none")


def answer_record(kind, question, turns, answers, model) -> dict:
    """A question's answers as a benchmark's tool reads them, `model` by name; every turn is text."""
    if kind == "alpaca_eval":
        answer = {"instruction": turns[0], "output": answers[0], "generator": model}
        return answer | {"dataset": question.get("dataset", "")}
    number = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([model, turns, answers])).hex  # same answer, same id
    if kind == "arena_hard" and "uid" in question:  # its style control: add_markdown_info.py adds the counts
        said = {"role": "assistant", "content": {"answer": answers[0]}}
        answer = {"uid": question["uid"], "ans_id": number, "model": model}
        answer["messages"] = [{"role": "user", "content": turns[0]}, said]
    else:  # MT-Bench, and Arena-Hard of 2024
        said = answers if kind == "mt_bench" else [{"content": text} for text in answers]
        answer = {"question_id": question["question_id"], "answer_id": number, "model_id": model}
        answer["choices"] = [{"index": 0, "turns": said}]
    return answer | {"tstamp": time.time()}


def answer_all(lm, tokenizer, kind, questions, *, temperature=None, seed=0, **sampling) -> list[list[str]]:
    """The answers to each of `read_questions`, one a turn; each turn sees the model's own earlier answers.

    Without `temperature` it is the benchmark's own. `sampling` is what `sample_responses` takes.
    """
    chat, talks, groups = data.Chat(tokenizer), [[] for _ in questions], {}
    for i, (question, turns) in enumerate(questions):
        own = (MT_BENCH if kind == "mt_bench" else {}).get(question.get("category"), TEMPERATURES[kind])
        for turn in range(len(turns)):  # what has one turn's number and one temperature is sampled together
            groups.setdefault((turn, own if temperature is None else temperature), []).append(i)
    for (turn, heat), here in sorted(groups.items()):
        for i in here:
            talks[i].append({"role": "user", "content": questions[i][1][turn]})
        prompts = [chat.ids(talks[i], ask=True) for i in here]
        options = {"temperature": heat, "top_p": 1.0, "seed": 2 * seed + turn, **sampling}
        for i, (tokens,) in zip(here, sample_responses(lm, tokenizer, prompts, **options), strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            talks[i].append({"role": "assistant", "content": text})
    return [[message["content"] for message in talk[1::2]] for talk in talks]


def main(argv=None):
    """Answer a benchmark: a file for each temperature."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error, add = refuse, parser.add_argument
    add("--kind", required=True, choices=TEMPERATURES, help="format of questions and answers")
    add("--model", required=True, help="Hugging Face directory or hub name")
    add("--questions", required=True, help="the benchmark's: a JSON list (.json) or JSON lines")
    add("--out", required=True, help="file of answers; its name is the model's name there")
    add("--temperature", type=float, nargs="+", help="a file each (Fig. 3); none: the benchmark's own")
    add("--max_new_tokens", type=int, default=1024, help="longest answer (1024)")
    add("--sample_batch", type=int, default=32, help="answers sampled at once (32)")
    add("--seed", type=int, default=0, help="of sampling (0)")
    args = parser.parse_args(argv)
    if min(args.max_new_tokens, args.sample_batch) < 1 or min(args.seed, *(args.temperature or [0])) < 0:
        refuse("--max_new_tokens, --sample_batch: must be at least 1; --seed, --temperature: at least 0")
    kind, out, heats = args.kind, Path(args.out), args.temperature or [None]
    if out.suffix != (".json" if kind == "alpaca_eval" else ".jsonl"):
        refuse(f"--out {out}: AlpacaEval reads a .json file, the others .jsonl")
    data.check_output("out", out, folder=False)

    device = data.start_processes()
    questions = read_questions(kind, args.questions)
    tokenizer = data.load_tokenizer(args.model)
    lm = train.load_lm(args.model, device, dtype=train.torch_dtype(train.Config(), device))
    sampling = {name: getattr(args, name) for name in ("max_new_tokens", "sample_batch", "seed")}
    for heat in heats:
        path = out if len(heats) == 1 else out.with_name(f"{out.stem}_t{heat:g}{out.suffix}")
        answers = answer_all(lm, tokenizer, kind, questions, temperature=heat, **sampling)
        answered = zip(questions, answers, strict=True)
        records = [answer_record(kind, *question, said, path.stem) for question, said in answered]
        if data.ranks()[0] == 0:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            data.write_text(path, json.dumps(records, indent=1) if kind == "alpaca_eval" else lines)
            print(f"{path}: {len(records)} answers")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run_script(main)
