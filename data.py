"""From text to token ids, the one path of training, reference pass and evaluation.

A data set goes through three forms:

    records   JSON lines, or any data set that Hugging Face's `datasets` reads
    Chat      messages -> token ids, exactly those that the tokenizer's chat template writes
    Pairs     token ids of prompt, chosen and rejected, memory-mapped
"""

import contextlib
import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import torch
from filelock import FileLock
from jinja2 import TemplateError
from pyarrow import compute
from transformers import AutoTokenizer

from runtime import UserError, file_digest, hub_errors, writing
from templates import DAY, GEMMA_TURNS, HALOS_TURNS, dated

# The ending of a local file, and the reader of `datasets`; JSON lines are parsed here, each by itself.
FORMATS = {".jsonl": "text", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}
ROLES |= {"system": "system", "developer": "system"}
TRANSCRIPT = re.compile(r"\n\nHuman:|\s*Human:.*\n\nAssistant:", re.DOTALL)  # HH-RLHF's
WHO, WHAT = ("role", "from"), ("content", "value")  # a message's keys for who speaks, and for what is said
WORDS = (rf"(?=.*'({'|'.join(names)})'\s*:)" for names in (WHO, WHAT))
PRINTED = re.compile(rf"\s*\[?\s*\{{(?=\s*'){''.join(WORDS)}.*\}}\s*\]?\s*", re.DOTALL)  # by Python
# Where a record says its question: the first of these that it fills in.
QUESTIONS = (("prompt",), ("question",), ("instruction", "input"))
# Fields that belong to a prompt: a record with one that is not read, nor its text anywhere, is left out.
BELONGS = ("system_prompt", "history", "input", "instruction", "question", "context", "conversations")
# What a conversation of plain texts can't express, in a record or in a message.
MEDIA = ("image", "images", "video", "videos", "audio", "audios", "tools")
NOT_TEXT = (*MEDIA, "tool_calls", "function_call", "reasoning", "reasoning_content", "thinking")

# A row of tokens for each record; one that is left out has nothing but its notes.
SCHEMA = pa.schema(
    {
        "tokens": pa.list_(pa.int32()),  # prompt, chosen, rejected, one after the other
        "sizes": pa.list_(pa.int32()),  # how many tokens each of them has
        "is_target": pa.list_(pa.int8()),  # of chosen: 0 for what the user says within an SFT conversation
        "opening": pa.list_(pa.int32()),  # what the template adds to the prompt where a response is sampled
        "notes": pa.list_(pa.string()),  # what was changed, or why the record is left out
    }
)
SHARE = 2500  # records for which a process more pays


# ---------------------------------------------------------------------------- records
def reader_of(path) -> str | None:
    """The reader of `datasets` that a file's ending asks for."""
    return FORMATS.get(Path(str(path).removesuffix(".gz")).suffix)


def read_records(source: str):
    """The records of a data set, a memory-mapped `datasets.Dataset`; of a .jsonl file its lines, as `text`.

    source: a file (FORMATS, also .gz), a folder, or a name on the hub; perhaps with :SPLIT or :CONFIG:SPLIT.
    """
    colon = r":(?![^\[]*\])"  # but not that of a slice, as in train[:100]
    name, *where = [source] if os.path.exists(source) else re.split(colon, source)
    *config, split = where or ["train"]
    # The file, or all of the folder; none of a data set on the hub.
    files = sorted(path for path in [Path(name), *Path(name).rglob("*")] if path.is_file())
    reader = None if os.path.isdir(name) else reader_of(name)  # None: a folder, or a name of the hub
    if len(config) > 1 or (os.path.isfile(name) and reader is None):
        endings = ", ".join(FORMATS)
        raise UserError(f"data set {source!r}: files end in {endings}; others are NAME:CONFIG:SPLIT at most")
    # What `datasets` takes for a pattern: of a file's name most of it can be escaped.
    odd = re.search(r"::|\$" if reader else r"::|[$*?[]", os.path.abspath(name))
    if files and odd:
        raise UserError(f"data set {source!r}: rename it; {odd[0]!r} would be read as a pattern")
    cache, options, total = Path(datasets.config.HF_DATASETS_CACHE), dict[str, Any](), hashlib.sha256()
    with hub_errors("data set", source):
        for path in files:  # their content, not their time, tells which copy in the cache is their own
            total.update(f"{path.relative_to(name)} {file_digest(path)}".encode())
        cache /= total.hexdigest()[:16] if files else ""
        if reader:
            options["data_files"] = glob.escape(os.path.abspath(name))
        if reader == "text":  # a byte that is no UTF-8 becomes \xff, no JSON: only its line is left out
            options |= {"encoding": "utf-8-sig", "encoding_errors": "backslashreplace"}
        tables = [path for path in files if reader_of(path) == "csv"]
        if tables and {reader_of(path) for path in files} <= {"csv", None}:
            # Every field is a text, also NA, 7 and True; one that is empty is missing.
            names = pd.read_csv(tables[0], nrows=0).columns
            options["features"] = datasets.Features({column: datasets.Value("string") for column in names})
            options |= {"keep_default_na": False, "na_values": [""]}
        return datasets.load_dataset(reader or name, *config, split=split, cache_dir=str(cache), **options)


def read_text(text: str, role: str, transcript: bool) -> list:
    """The messages of a text: those that it holds as JSON, those of a transcript, or the one of `role`."""
    if text.lstrip().startswith(("[", "{")):
        with contextlib.suppress(ValueError, RecursionError):
            given = json.loads(text)
            given = given if isinstance(given, list) else [given]
            if given and all(isinstance(m, dict) and m.keys() & WHO and m.keys() & WHAT for m in given):
                return given
    if PRINTED.fullmatch(text):
        raise UserError("a conversation as Python prints it, not JSON")
    turns = [role, text]  # or ["Human", text, "Assistant", text, …]
    if transcript and TRANSCRIPT.match(text):
        turns = re.split(r"(?:^\s*|\n\n)(Human|Assistant): ?", text)[1:]
    return [{"role": who, "content": text} for who, text in zip(turns[::2], turns[1::2], strict=True)]


def to_messages(value, role: str, transcript: bool = True) -> list[dict]:
    """A field as messages {"role", "content"}: a text of `role`, a `transcript` if allowed, or messages."""
    if isinstance(value, str):
        value = read_text(value, role, transcript)
    messages = []
    for given in [] if value is None else value if isinstance(value, list) else [value]:
        given = given if isinstance(given, dict) else {}  # without a role: refused below
        who = str(given.get("role") or given.get("from")).lower()
        content = given.get("value") if given.get("content") is None else given["content"]
        if isinstance(content, list) and all(part["type"] == "text" for part in content):
            content = "".join(part["text"] for part in content)
        odd = [field for field in NOT_TEXT if given.get(field)]
        if odd or who not in ROLES or not isinstance(content, str):
            raise UserError(f"a message with {odd[0]}" if odd else f"a message of role {who:.20}, or no text")
        messages.append({"role": ROLES[who], "content": content})
    return messages


def join(talk: list[dict], more: list[dict]) -> list[dict]:
    """One conversation of two that may repeat each other, the system in front, each of its texts once."""
    system = dict.fromkeys(message["content"] for message in talk + more if message["role"] == "system")
    talk, more = ([message for message in part if message["role"] != "system"] for part in (talk, more))
    # Compared without the white space around a text: `more` says all of `talk` again, or begins with its end.
    said, again = ([(m["role"], m["content"].strip()) for m in part] for part in (talk, more))
    if not any(again[i : i + len(said)] == said for i in range(len(again))):
        overlap = max(n for n in range(len(said) + 1) if said[len(said) - n :] == again[:n])
        more = talk + more[overlap:]
    return ([{"role": "system", "content": "\n\n".join(system)}] if system else []) + more


def question_of(record: dict) -> tuple[tuple[str, ...], object]:
    """(names of the fields that a record's question is in, the question): QUESTIONS; ((), None) without."""
    for names in QUESTIONS:
        given = [record[name] for name in names if record.get(name)]
        if len(given) == 1:
            return names, given[0]
        if not all(isinstance(text, str) for text in given):
            raise UserError(f"{' and '.join(names)} are no texts")
        if given:
            return names, "\n\n".join(given)
    return (), None


def texts_within(value) -> Iterator[str]:
    """Every text of a field, however it holds them, with single spaces; of a message not who says it."""
    if isinstance(value, dict):
        value = [part for name, part in value.items() if name not in WHO]
    if isinstance(value, list):
        for part in value:
            yield from texts_within(part)
    elif value is not None:
        yield " ".join(str(value).split())


def to_pair(record: dict, sft: bool = False) -> tuple[list[dict], list[dict]]:
    """(prompt, the responses), as messages: chosen and rejected; for SFT one, the last in its conversation.

    The prompt is everything that precedes the response, wherever the record says it: in `system`, QUESTIONS
    (text, messages or a transcript), or in the fields of the responses (UltraFeedback, HH-RLHF).
    """
    names = ["chosen", "rejected"]
    if sft:
        given = (name for name in ("chosen", "messages", "completion") if record.get(name) is not None)
        names = [next(given, "response")]
    # `messages` is the whole conversation, whatever UltraChat calls its prompt.
    fields, asked = ((), None) if names == ["messages"] else question_of(record)
    prompt = to_messages(asked, "user")
    # A response that reads like a transcript is one only where the prompt is one, or is missing.
    transcript = not prompt or (isinstance(asked, str) and TRANSCRIPT.match(asked) is not None)
    if prompt and prompt[-1]["role"] == "assistant" and not prompt[-1]["content"].strip():
        prompt.pop()  # "Assistant:", at a transcript's end
    sides = [to_messages(record.get(name), "assistant", transcript) for name in names]
    while sft and sides[0] and sides[0][-1]["role"] != "assistant":
        sides[0].pop()  # no assistant answers it
    for name, side in zip(names, sides, strict=True):
        if not side or side[-1]["role"] != "assistant":
            raise UserError(f"no field {name!r} that ends with the assistant's turn")
    if sides[0][:-1] != sides[-1][:-1]:
        raise UserError("chosen and rejected answer different prompts")
    prompt = join(to_messages(record.get("system") or None, "system") + prompt, sides[0][:-1])
    if not any(message["content"].strip() for message in prompt if message["role"] != "system"):
        raise UserError("the prompt has no user's turn, or no text")
    if prompt[-1]["role"] == "assistant":
        raise UserError("the prompt ends with the assistant's turn")
    answers = [side[-1] for side in sides]
    # Nothing that belongs to the prompt is dropped in silence.
    read = "\n".join(texts_within(prompt + answers))
    for name in BELONGS:
        if name not in fields and any(text not in read for text in texts_within(record.get(name))):
            raise UserError(f"the field {name!r} is not read")
    return prompt, answers


# ---------------------------------------------------------------------------- tokens
def shared(*sequences) -> int:
    """How many items some sequences have in common at their start."""
    columns = enumerate(zip(*sequences, strict=False))
    return next((i for i, column in columns if len(set(column)) > 1), min(map(len, sequences)))


class Chat:
    """A tokenizer and its chat template: messages -> exactly the token ids that the template writes.

    Nothing is tokenised alone, stripped or spelled out: prompt and response are parts of one conversation.
    chat_format: what a tokenizer without a template gets. "auto": Gemma's turns if it has their tokens, else
    the Halos format; "halos": that in any case. `name`: which template it is; `end`: the token that ends an
    answer.
    """

    def __init__(self, tokenizer, chat_format: str = "auto"):
        if tokenizer.chat_template is None:
            gemma = chat_format == "auto" and "<start_of_turn>" in tokenizer.get_vocab()
            tokenizer.chat_template = GEMMA_TURNS if gemma else HALOS_TURNS
        if chat_format != "auto" and tokenizer.chat_template != HALOS_TURNS:
            raise UserError(f"chat_format {chat_format!r}: the tokenizer has a chat template of its own")
        ours = {GEMMA_TURNS: "Gemma's turns", HALOS_TURNS: "the Halos format"}
        self.tokenizer, self.name = tokenizer, ours.get(str(tokenizer.chat_template), "the model's own")
        self.template = dated(str(tokenizer.chat_template))
        if re.search(r"\b(strftime_now|date_string)\b", str(tokenizer.chat_template)):
            self.name += f", its date always {DAY:%d %b %Y}"
        # {id: text} of every added token but <unk>, which any text may hold; and of the special ones.
        tokens, unknown = tokenizer.added_tokens_decoder, tokenizer.unk_token_id
        added = {i: token.content for i, token in tokens.items() if i != unknown}
        self.special = {i: text for i, text in added.items() if tokens[i].special}
        # All that is said must be in the rendering. Some templates find it only in a list of parts.
        user, system = {"role": "user", "content": "what is this"}, {"role": "system", "content": "be kind"}
        talk = [user, {"role": "assistant", "content": "this is the answer"}]
        self.keeps_system, self.in_parts = True, False
        why = self.lost(talk)
        self.in_parts = why is not None
        if why and self.lost(talk):
            raise UserError(f"the tokenizer's chat template does not work: {why}")
        self.keeps_system = self.lost([system, user]) is None
        # An answer ends with the first added token after it that is not white space, special or not (of two
        # that begin there the longer). It and what follows it are the same after any answer.
        rest, ids = self.render(talk, tokenize=False).rpartition(talk[1]["content"])[2], self.ids(talk)
        words = {text: i for i, text in added.items() if text.replace("▁", " ").strip() and text in rest}
        end = min(words, key=lambda text: (rest.index(text), -len(text)), default="")
        places = [place for place, token in enumerate(ids) if token == words.get(end)]
        self.after = ids[places[-rest.count(end)] :] if places else []
        self.appends_end, self.end = not self.after, (self.after or [tokenizer.eos_token_id])[0]
        if self.end is None:
            raise UserError("the tokenizer has no EOS, its chat template no end of an assistant's turn")

    def render(self, messages: list[dict], **options):
        """A conversation by apply_chat_template, with its options: as token ids, or as a text."""
        if messages[0]["role"] == "system" and not self.keeps_system:  # it goes before the user's text
            asked = [message for message in messages[1:2] if message["role"] == "user"]
            text = "\n\n".join(message["content"] for message in [messages[0], *asked])
            messages = [{"role": "user", "content": text}, *messages[1 + len(asked) :]]
        if self.in_parts:
            parts = [[{"type": "text", "text": message["content"]}] for message in messages]
            messages = [{**m, "content": part} for m, part in zip(messages, parts, strict=True)]
        # It adds no special tokens of its own: BOS stands where the template writes it.
        options |= {"return_dict": False, "tokenizer_kwargs": {"verbose": False}}
        options |= {"chat_template": self.template, "date_string": f"{DAY:%d %b %Y}"}  # Llama 3's name
        return self.tokenizer.apply_chat_template(messages, **options)

    def lost(self, messages: list[dict]) -> str | None:
        """Why the rendering of a conversation does not hold all that is said in it; None where it does."""
        try:
            text = self.render(messages, tokenize=False)
        except Exception as error:  # whatever a template may do
            return str(error)
        silent = [message["role"] for message in messages if message["content"].strip() not in text]
        return f"what the {silent[0]} says is not in it" if silent else None

    def ids(self, messages: list[dict], ask: bool = False) -> list[int]:
        """Token ids of a conversation; `ask`: also of what opens the assistant's answer, for sampling."""
        return self.render(messages, add_generation_prompt=ask)

    def pair(self, prompt: list[dict], answers: list[dict]) -> tuple[list[int], list[list[int]], list[int]]:
        """Ids of the prompt, of each answer's response, and of what else opens an answer (R1's "<think>").

        The prompt is the longest start that the conversations share with the prompt's own rendering. A
        response is the rest, up to the token that ends its turn.
        """
        asked, wholes = self.ids(prompt, ask=True), [self.ids([*prompt, answer]) for answer in answers]
        n = shared(asked, *wholes)
        # ids(prompt) is all that was said: it must be shared, but for its last token, which may merge with
        # what follows. The rest of `asked` only opens the answer.
        if n < len(asked) and n + 1 < shared(asked, self.ids(prompt)):
            raise UserError("the chat template rewrites the prompt when it is answered")
        if any(ids[len(ids) - len(self.after) :] != self.after for ids in wholes):
            raise UserError("the chat template ends this answer as no other")
        # What follows the end, a line break say, opens no answer: it is left away.
        responses = [ids[n : len(ids) - len(self.after[1:])] for ids in wholes]
        return asked[:n], responses, asked[n:]


def make_row(prompt, chosen, rejected=(), is_target=None, opening=(), notes=()) -> dict:
    """A row of SCHEMA, from lists of token ids. is_target: None where all of chosen is one."""
    sizes = [len(prompt), len(chosen), len(rejected)]
    is_target = [1] * len(chosen) if is_target is None else is_target
    values = ([*prompt, *chosen, *rejected], sizes, is_target, opening, notes)
    return dict(zip(SCHEMA.names, values, strict=True))


def encode(record: dict, chat: Chat, sft: bool, max_length: int, max_prompt_length: int) -> dict:
    """A record as a row of SCHEMA; UserError, with the reason, where it must be left out."""
    if record.keys() == {"text"}:  # a line of a .jsonl file
        if not record["text"].strip():
            return {}  # a blank line: neither used nor counted
        try:
            record = json.loads(record["text"])
        except (ValueError, RecursionError):
            raise UserError("not JSON") from None
    if not isinstance(record, dict) or any(record.get(field) for field in MEDIA):
        raise UserError("not a record of texts alone")
    # Record -> messages -> token ids.
    asked, answers = to_pair(record, sft)
    prompt, sides, opening = chat.pair(asked, answers)
    is_target, notes = [1] * len(sides[0]), []
    # SFT: the earlier answers, the last first, move from the prompt to the response.
    for i in [i for i in range(len(asked) - 1, 0, -1) if sft and asked[i]["role"] == "assistant"]:
        before, (answer,), opens = chat.pair(asked[:i], asked[i : i + 1])
        between = prompt[len(before) + len(answer) :]  # what the user says after it
        if before + answer + between != prompt:
            notes.append("earlier answers not learnt: the chat template rewrites them")
            break
        is_target = [1] * len(answer) + [0] * len(between) + is_target
        prompt, sides, opening = before, [answer + between + sides[0]], opens
    if any(chat.lost([*asked, answer]) for answer in answers):
        notes.append("a part of the texts left away by the chat template")
    if any(text in message["content"] for text in chat.special.values() for message in asked + answers):
        notes.append("special tokens typed in a text")
    if chat.appends_end:
        sides, is_target = [[*side, chat.end] for side in sides], [*is_target, 1]
        notes.append("EOS appended: the chat template ends no turn")
    # As the authors cut: nothing while both fit, else the prompt (ours: its beginning), then the responses.
    longest = max(map(len, sides))
    if len(prompt) + longest > max_length and len(prompt) > max_prompt_length:
        bos = [token for token in prompt[:1] if token == chat.tokenizer.bos_token_id]
        prompt = bos + prompt[len(prompt) - max_prompt_length + len(bos) :]
        notes.append("prompt cut")
    room = max_length - len(prompt)  # at least 1, since max_prompt_length < max_length
    if longest > room:
        notes.append("response cut")
    chosen, rejected = [side[:room] for side in [*sides, []]][:2]  # SFT has no rejected response
    if not prompt or rejected == chosen:
        raise UserError("identical responses" if prompt else "prompt is empty")
    return make_row(prompt, chosen, rejected, is_target[:room], opening, notes)


def tokenise(batch: dict, **options) -> pa.Table:
    """Records, by columns, as rows of SCHEMA. An odd one is left out, and leaves its reason."""
    rows = []
    for record in zip(*batch.values(), strict=True):
        try:
            rows.append(encode(dict(zip(batch, record, strict=True)), **options))
        except Exception as error:  # any error is that of the record: how many there are tells
            # Of other errors the kind alone: their texts differ, and would not add up.
            what = error if isinstance(error, (UserError, TemplateError)) else type(error).__name__
            rows.append({"notes": [f"left out: {what!s:.100}"]})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


class Pairs:
    """Tokenised pairs, memory-mapped: one copy on the disk serves all ranks.

    `sizes` (n, 3) int64: tokens of prompt, chosen and rejected (0 in SFT). `notes`: a Counter of what was
    changed or left out. rows: a table of SCHEMA, or what `make_row` takes for each pair, as lists.
    """

    def __init__(self, rows):
        if not isinstance(rows, pa.Table):
            rows = pa.Table.from_pylist([make_row(*row) for row in rows], schema=SCHEMA)
        self.table, sizes = rows, compute.list_flatten(rows["sizes"]).to_numpy()  # null where left out
        self.kept = compute.indices_nonzero(compute.is_valid(rows["sizes"])).to_pylist()  # (n,) rows
        self.sizes = torch.from_numpy(sizes.astype("int64")).view(-1, 3)
        self.notes = Counter(compute.list_flatten(rows["notes"]).to_pylist())

    def __len__(self) -> int:
        return len(self.kept)

    def read(self, i: int, column: str) -> torch.Tensor:
        """One pair's list in a column, int64."""
        values = self.table[column][self.kept[i]].values.to_numpy()
        return torch.from_numpy(values.astype("int64"))

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        """(prompt, chosen, rejected), token ids."""
        return self.read(i, "tokens").split(self.sizes[i].tolist())

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def sampling_prompt(self, i: int) -> torch.Tensor:
        """The prompt as the template renders it for sampling, the answer opened."""
        return torch.cat([self[i][0], self.read(i, "opening")])

    def documents(self, layout: str, indices=None) -> list[list[int]]:
        """Of all pairs, or of these, the tokens of its documents: one (shared, or SFT) or two (separate)."""
        sizes = (self.sizes if indices is None else self.sizes[list(indices)]).tolist()
        if layout == "shared":
            return [[sum(three)] for three in sizes]
        return [[p + w, p + l] if l else [p + w] for p, w, l in sizes]

    @property
    def shortest(self) -> int:
        """The place of the pair with the fewest tokens: the cheapest one for a rank to be busy with."""
        return int(self.sizes.sum(1).argmin())

    def largest_token(self) -> int:
        """The largest token id."""
        return compute.max(compute.list_flatten(self.table["tokens"])).as_py()

    def digest(self) -> str:
        """sha256 of tokens, targets and sizes: the data's part of a reference cache's identity."""
        total = hashlib.sha256(self.sizes.numpy().data)
        for column in ("tokens", "is_target"):
            for chunk in self.table[column].chunks:  # however a file is divided, its bytes follow each other
                total.update(chunk.flatten().to_numpy())
        return total.hexdigest()


def load_pairs(
    source: str, tokenizer, *, max_length=2048, max_prompt_length=1024, sft=False, chat_format="auto"
) -> Pairs:
    """Read (`read_records`) and tokenise (`encode`) a data set. The result stays on disk, for the next run.

    sft: one response per record, and in a conversation every answer. chat_format: see `Chat`.
    Raises: UserError where nothing can be read, or more than half of the records are left out.
    """
    if not 0 < max_prompt_length < max_length:
        raise UserError(f"max_prompt_length {max_prompt_length}: from 1 to below max_length {max_length}")
    chat = Chat(tokenizer, chat_format)  # on every rank: it may give the tokenizer its template
    options = {"sft": sft, "max_length": max_length, "max_prompt_length": max_prompt_length}
    datasets.disable_progress_bars()
    records = read_records(source)
    # All that the tokens depend on. What `datasets` would hash of a tokenizer differs from run to run.
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(tokenizer.get_vocab())
    depends = [rules, tokenizer.special_tokens_map, chat.template, str(DAY), options]
    depends += [records._fingerprint, Path(__file__).read_text()]
    fingerprint = hashlib.sha256(repr(depends).encode()).hexdigest()[:32]
    workers = min(os.cpu_count() or 1, len(records) // SHARE)
    if workers:  # a pool, and its bar, for large sets
        datasets.enable_progress_bars()
    # One rank, of one run, tokenises; the others wait, and find the result.
    room = Path(datasets.config.HF_DATASETS_CACHE)
    with writing(room, keep=True), FileLock(room / f"{fingerprint}.lock"):
        table = records.map(
            tokenise,
            batched=True,
            fn_kwargs={"chat": chat, **options},
            remove_columns=records.column_names,
            features=datasets.Features.from_arrow_schema(SCHEMA),
            num_proc=workers or None,  # any number finds what another has made
            new_fingerprint=fingerprint,
            desc="tokenising",
        )
    pairs = Pairs(table.data.table)
    # The notes come from the table, so that they are the same when it was made by an earlier run.
    left_out = {note: count for note, count in pairs.notes.items() if note.startswith("left out")}
    if len(pairs) < max(1, sum(left_out.values())):
        reasons = "; ".join(f"{note} ({count})" for note, count in left_out.items()) or "it is empty"
        raise UserError(f"data set {source!r}: {len(pairs)} usable records; {reasons:.500}")
    return pairs


def load_tokenizer(name: str):
    """The tokenizer of a Hugging Face directory or repo; UserError where there is none that reads a text."""
    with hub_errors("tokenizer of", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.chat_template is None:  # a model with images may have it in its processor's file
            from transformers import ProcessorMixin  # takes 2 s

            files, _ = ProcessorMixin.get_processor_dict(name)
            tokenizer.chat_template = files.get("chat_template")
    text = "the answer is here"
    back = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
    # Characters in common, wherever they stand. A model's folder without tokenizer files knows none.
    if 2 * (Counter(text) & Counter(back)).total() < len(text):
        raise UserError(f"the tokenizer of {name!r} reads {text!r} as {back[:40]!r}: are its files missing?")
    return tokenizer
