"""From text to tensors, the one path of training, reference pass and evaluation; helpers of files and ranks.

    records   JSON lines, or any data set that Hugging Face's `datasets` reads
    Chat      messages -> token ids, exactly those that the tokenizer's chat template writes
    Pairs     token ids of prompt, chosen and rejected, memory-mapped
    Batch     rows of tokens for the transformer; the response tokens, flat, for everything after it

Two layouts of a batch give the same values up to rounding. "shared" has one row per pair, [prompt | chosen |
rejected], the prompt computed once; "separate" has two rows, [prompt | chosen] and [prompt | rejected].
In a shared row the positions of the rejected response restart at the prompt's end, and neither response sees
the other: a query sees the keys with  k <= q,  doc[k] == doc[q]  and  segment[k] in {0, segment[q]}.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from jinja2 import TemplateError
from pyarrow import compute
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

# The ending of a local file, and the reader of `datasets`; JSON lines are parsed here, each by itself.
FORMATS = {".jsonl": "text", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}
ROLES |= {"system": "system", "developer": "system"}
TRANSCRIPT = re.compile(r"\n\nHuman:|\s*Human:.*\n\nAssistant:", re.DOTALL)  # HH-RLHF's
# What a conversation of plain texts can't express, in a record or in a message.
MEDIA = ("image", "images", "video", "videos", "audio", "audios", "tools")
NOT_TEXT = (*MEDIA, "tool_calls", "function_call", "reasoning", "reasoning_content", "thinking")

# For tokenizers without a chat template (base models): Gemma's turns, or the Halos format of the paper.
GEMMA_TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
HALOS_TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '\n<|' + m['role'] + '|>\n' + m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)

# One row per record; of one that is left out nothing but its notes.
COLUMNS = {
    "tokens": pa.list_(pa.int32()),  # prompt, chosen, rejected, one after the other
    "sizes": pa.list_(pa.int32()),  # how many tokens each of them has
    "is_target": pa.list_(pa.int8()),  # of chosen: 0 for what the user says within an SFT conversation
    "opening": pa.list_(pa.int32()),  # what the template adds to the prompt where a response is sampled
    "notes": pa.list_(pa.string()),  # what was changed, or why the record is left out
}
SCHEMA = pa.schema(COLUMNS)
SHARE = 2500  # records for which a process more pays


class UserError(ValueError):
    """What the user can mend: a wrong value, file, model or disk. `everywhere`: every rank raises it."""

    def __init__(self, message: str, everywhere: bool = True):
        super().__init__(message)
        self.everywhere = everywhere


class Unusable(Exception):
    """A record that is left out and counted, with the reason."""


# ---------------------------------------------------------------------------- records
def read_records(source: str):
    """The records of a data set, a memory-mapped `datasets.Dataset`; of a .jsonl file its lines, as `text`.

    source: a local file (FORMATS, also .gz) or folder, or a data set of the hub: NAME, NAME:SPLIT or
    NAME:CONFIG:SPLIT; the split is "train" unless named. UserError where there is none.
    """
    import datasets  # takes a second: only where data is read

    # At each colon but those of a slice, as in train[:100].
    name, *where = [source] if os.path.exists(source) else re.split(r":(?![^\[]*\])", source)
    *config, split = where or ["train"]
    # None: a folder, or a name of the hub.
    reader = FORMATS.get(Path(name.removesuffix(".gz")).suffix)
    if len(config) > 1 or (os.path.isfile(name) and reader is None):
        endings = ", ".join(FORMATS)
        raise UserError(f"data set {source!r}: files end in {endings}; others are NAME:CONFIG:SPLIT at most")
    cache, options = Path(datasets.config.HF_DATASETS_CACHE), {"data_files": name} if reader else {}
    if reader and os.path.isfile(name):  # its content, not its time, tells which copy in the cache is its own
        with open(name, "rb") as file:
            cache /= hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if reader == "text":  # a byte that is no UTF-8 becomes \xff, which is no JSON: only its line is left out
        options |= {"encoding": "utf-8-sig", "encoding_errors": "backslashreplace"}
    with hub_errors("data set", source):
        return datasets.load_dataset(reader or name, *config, split=split, cache_dir=str(cache), **options)


def to_messages(value, role: str, transcript: bool = True) -> list[dict]:
    """A field as messages {"role", "content"}: from a text of `role`, a transcript, or a list of messages."""
    if isinstance(value, str) and transcript and TRANSCRIPT.match(value):
        _, *turns = re.split(r"(?:^\s*|\n\n)(Human|Assistant): ?", value)
        # ["Human", text, "Assistant", text, …]
        value = [{"role": who, "content": text} for who, text in zip(turns[::2], turns[1::2], strict=True)]
    elif isinstance(value, str):
        value = [{"role": role, "content": value}]
    messages = []
    for given in [] if value is None else value if isinstance(value, list) else [value]:
        given = given if isinstance(given, dict) else {}  # without a role: refused below
        who = str(given.get("role") or given.get("from")).lower()
        content = given.get("value") if given.get("content") is None else given["content"]
        if isinstance(content, list) and all(part["type"] == "text" for part in content):
            content = "".join(part["text"] for part in content)
        odd = [field for field in NOT_TEXT if given.get(field)]
        if odd or who not in ROLES or not isinstance(content, str):
            raise Unusable(f"a message with {odd[0]}" if odd else f"a message of role {who:.20}, or no text")
        messages.append({"role": ROLES[who], "content": content})
    return messages


def join(*parts: list[dict]) -> list[dict]:
    """One conversation of parts that may repeat each other; the system speaks first, in one message."""
    talk: list[dict] = []
    # Each text of the system once, in order.
    system = dict.fromkeys(m["content"] for part in parts for m in part if m["role"] == "system")
    for part in parts:
        new = [message for message in part if message["role"] != "system"]
        # Compared without the white space around a text.
        said, saying = ([(m["role"], m["content"].strip()) for m in some] for some in (talk, new))
        if any(saying[i : i + len(said)] == said for i in range(len(new))):
            talk = new  # the part says all of it again
        else:  # the part may begin with what was said last
            again = next(n for n in range(len(new), -1, -1) if said[max(0, len(said) - n) :] == saying[:n])
            talk = talk + new[again:]
    return ([{"role": "system", "content": "\n\n".join(system)}] if system else []) + talk


def to_pair(record: dict, names=("chosen", "rejected")) -> tuple[list[dict], list[dict]]:
    """(prompt, the response of each of `names`), as messages.

    The prompt is everything that precedes the response, wherever the record says it: in `system`, in `prompt`
    (text, messages or a transcript), or in the fields of the responses (UltraFeedback, HH-RLHF).
    """
    prompt = to_messages(record.get("prompt") or None, "user")
    # A response that reads like a transcript is one only where the prompt is one, or is missing.
    transcript = not prompt or (isinstance(record["prompt"], str) and TRANSCRIPT.match(record["prompt"]))
    if prompt and prompt[-1]["role"] == "assistant" and not prompt[-1]["content"].strip():
        prompt.pop()  # "Assistant:", at a transcript's end
    sides = [to_messages(record.get(name), "assistant", bool(transcript)) for name in names]
    for name, side in zip(names, sides, strict=True):
        if not side or side[-1]["role"] != "assistant":
            raise Unusable(f"{name} does not end with the assistant's turn" if side else f"no field {name!r}")
    # What stands before the response must be the same on both sides.
    if any(side[:-1] != sides[0][:-1] for side in sides):
        raise Unusable("chosen and rejected answer different prompts")
    prompt = join(to_messages(record.get("system") or None, "system"), prompt, sides[0][:-1])
    if not any(message["content"].strip() for message in prompt):
        raise Unusable("prompt is empty")
    if prompt[-1]["role"] == "assistant":
        raise Unusable("the prompt ends with the assistant's turn")
    return prompt, [side[-1] for side in sides]


def to_conversation(record: dict) -> list[dict]:
    """A record for SFT as messages: a preference's chosen side, `messages`, or prompt and response."""
    if record.get("chosen") is None and record.get("messages") is not None:
        system = to_messages(record.get("system") or None, "system")
        messages = join(system, to_messages(record["messages"], "user"))
    else:
        # A pair with one side.
        names = [name for name in ("chosen", "completion") if record.get(name) is not None]
        prompt, answers = to_pair(record, (names or ["response"])[:1])
        messages = prompt + answers
    while messages and messages[-1]["role"] != "assistant":  # nothing answers it
        messages.pop()
    if not messages or messages[0]["role"] == "assistant":
        raise Unusable("no assistant's turn that answers something")
    return messages


# ---------------------------------------------------------------------------- tokens
def common(*rows: list[int]) -> int:
    """How many tokens all rows begin with alike."""
    columns = enumerate(zip(*rows, strict=False))
    return next((i for i, column in columns if len(set(column)) > 1), min(map(len, rows)))


class Chat:
    """A tokenizer and its chat template: messages -> exactly the token ids that the template writes.

    Nothing is tokenised alone, stripped or spelled out: prompt and response are parts of one conversation.

    chat_format: what a tokenizer without a template gets. "auto": Gemma's turns if it has their tokens, else
    the Halos format; "halos": that in any case.
    """

    def __init__(self, tokenizer, chat_format: str = "auto"):
        if tokenizer.chat_template is None:
            gemma = chat_format == "auto" and "<start_of_turn>" in tokenizer.get_vocab()
            tokenizer.chat_template = GEMMA_TURNS if gemma else HALOS_TURNS
        if chat_format != "auto" and tokenizer.chat_template != HALOS_TURNS:
            raise UserError(f"chat_format {chat_format!r}: the tokenizer has a chat template of its own")
        # Every special token but <unk>, which any text may hold.
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special.pop(tokenizer.unk_token_id, None)
        self.tokenizer, self.special, self.keeps_system = tokenizer, set(special), True
        self.typed = re.compile(
            "|".join(map(re.escape, special.values())) or "(?!)"
        )  # one of them, in a text
        # How a turn ends, seen from a short talk: by the template's last special token, else EOS is appended.
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        try:
            asked, whole = self.ids([user], ask=True), self.ids([user, answer])
        except Exception as error:
            raise UserError(f"the tokenizer's chat template does not work: {error}") from error
        ends = [token for token in whole[common(asked, whole) :] if token in special]
        self.appends_end, self.end = not ends, ends[-1] if ends else tokenizer.eos_token_id
        if self.end is None:
            raise UserError("the tokenizer has no EOS, its chat template no end of an assistant's turn")
        # A template may write the system's message, refuse it, or skip it in silence.
        try:
            one, other = (self.ids([{"role": "system", "content": text}, user], ask=True) for text in "cd")
            self.keeps_system = one != other
        except Exception:
            self.keeps_system = False

    def ids(self, messages: list[dict], ask: bool = False) -> list[int]:
        """Token ids of a conversation; `ask`: also of what opens the assistant's answer, for sampling."""
        if messages[0]["role"] == "system" and not self.keeps_system:  # it goes before the user's text
            asked = messages[1:2] if messages[1:] and messages[1]["role"] == "user" else []
            text = "\n\n".join(message["content"] for message in [messages[0], *asked])
            messages = [{"role": "user", "content": text}, *messages[1 + len(asked) :]]
        # It adds no special tokens of its own: BOS stands where the template writes it.
        quiet = {"return_dict": False, "tokenizer_kwargs": {"verbose": False}}
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=ask, **quiet)

    def pair(self, prompt: list[dict], answers: list[dict]) -> tuple[list[int], list[list[int]], list[int]]:
        """(prompt, each answer's response, what the template adds to the prompt to open an answer), as ids.

        The prompt is the longest start that the conversations share with the prompt's own rendering: all of
        it, unless the template opens an answer in another way than it writes one (with "<think>"). A response
        is the rest up to the last special token in it, which ends the turn.
        """
        asked, wholes = self.ids(prompt, ask=True), [self.ids([*prompt, answer]) for answer in answers]
        n, responses = common(asked, *wholes), []
        # All that was said must be shared, but for its last token, which may merge with what follows.
        if n < len(asked) and n + 1 < len(self.ids(prompt)):
            raise Unusable("the chat template rewrites the prompt when it is answered")
        for ids in wholes:
            # What follows the end, a line break say, opens no answer: it is left away.
            ends = [i for i in range(n, len(ids)) if ids[i] in self.special and not self.appends_end]
            responses.append(ids[n : ends[-1] + 1] if ends else ids[n:])
        return asked[:n], responses, asked[n:]

    def conversation(self, messages: list[dict], notes: list[str]):
        """As `pair`, for SFT: the response is all that follows the first answer's prompt; also its targets.

        An answer is a target if the ids of the conversation up to it are a start of the whole's.
        """
        answers = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
        # Each answer by itself: (tokens before it, [its tokens], …).
        turns = [self.pair(messages[:i], messages[i : i + 1]) for i in answers]
        whole = turns[-1][0] + turns[-1][1][0]
        kept = [(len(x), len(y), opening) for x, (y,), opening in turns if x + y == whole[: len(x) + len(y)]]
        if len(kept) < len(turns):
            notes.append("earlier answers not learnt: the chat template rewrites them")
        # The prompt ends where the first answer that is learnt begins.
        is_target = [int(any(0 <= i - x < y for x, y, _ in kept)) for i in range(len(whole))]
        start, _, opening = kept[0]
        return whole[:start], [whole[start:]], opening, is_target[start:]


def make_row(parts: list, is_target=None, opening=(), notes=()) -> dict:
    """A row of SCHEMA. parts: token ids of prompt, chosen and, but for SFT, rejected."""
    prompt, chosen, rejected = [*parts, []][:3]
    is_target = [1] * len(chosen) if is_target is None else [int(mark) for mark in is_target][: len(chosen)]
    sizes = [len(prompt), len(chosen), len(rejected)]
    values = ([*prompt, *chosen, *rejected], sizes, is_target, opening, notes)
    return dict(zip(COLUMNS, values, strict=True))


def encode(record: dict, chat: Chat, sft: bool, max_length: int, max_prompt_length: int) -> dict:
    """A record as a row of SCHEMA; Unusable, with the reason, where it must be left out."""
    if record.keys() == {"text"}:  # a line of a .jsonl file
        if not record["text"].strip():
            return {}  # a blank line: neither used nor counted
        try:
            record = json.loads(record["text"])
        except (ValueError, RecursionError):
            raise Unusable("not JSON") from None
    if not isinstance(record, dict) or any(record.get(field) for field in MEDIA):
        raise Unusable("not a record of texts alone")
    notes: list[str] = []
    is_target = None
    # Record -> messages -> token ids.
    if sft:
        messages = to_conversation(record)
        prompt, sides, opening, is_target = chat.conversation(messages, notes)
    else:
        asked, answers = to_pair(record)
        messages = asked + answers
        prompt, sides, opening = chat.pair(asked, answers)
    if any(chat.typed.search(message["content"]) for message in messages):
        notes.append("special tokens typed in a text")
    if chat.appends_end:
        sides = [[*side, chat.end] for side in sides]
        is_target = is_target and [*is_target, 1]
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
    chosen, *rejected = (side[:room] for side in sides)
    if not prompt or rejected == [chosen]:
        raise Unusable("identical responses" if prompt else "prompt is empty")
    return make_row([prompt, chosen, *rejected], is_target, opening, notes)


def tokenise(batch, **options) -> pa.Table:
    """Records, by columns, as rows of SCHEMA. An odd one is left out, and leaves its reason."""
    rows = []
    for record in zip(*batch.values(), strict=True):
        try:
            # Any error is that of the record: how many there are tells.
            rows.append(encode(dict(zip(batch, record, strict=True)), **options))
        except Exception as error:
            # Of other errors the kind alone: their texts differ from record to record, and would not add up.
            what = error if isinstance(error, (Unusable, TemplateError)) else type(error).__name__
            rows.append({"notes": [f"left out: {what!s:.100}"]})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


class Pairs:
    """Tokenised pairs. Their tokens stay on disk, memory-mapped: one copy serves all ranks.

    `sizes` (n, 3) int64: tokens of prompt, chosen and rejected (0 in SFT). `notes`: a Counter of what was
    changed or left out. rows: a table of SCHEMA, or lists of token ids for each pair, (prompt, chosen,
    rejected), perhaps with the target mask of chosen as a fourth.
    """

    def __init__(self, rows, notes=None):
        if not isinstance(rows, pa.Table):
            rows = pa.Table.from_pylist([make_row(row[:3], *row[3:]) for row in rows], schema=SCHEMA)
        self.table, sizes = rows, compute.list_flatten(rows["sizes"]).to_numpy()  # null where left out
        self.kept = compute.indices_nonzero(compute.is_valid(rows["sizes"])).to_pylist()  # (n,) rows
        self.sizes = torch.from_numpy(sizes.astype(np.int64)).view(-1, 3)
        self.notes = Counter(compute.list_flatten(rows["notes"]).to_pylist()) + Counter(notes)

    def __len__(self) -> int:
        return len(self.kept)

    def read(self, i: int, column: str) -> torch.Tensor:
        """One pair's list in a column, int64: some µs, wherever it stands on the disk."""
        values = self.table[column][self.kept[i]].values.to_numpy()
        return torch.from_numpy(values.astype(np.int64))

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        """(prompt, chosen, rejected), token ids."""
        return self.read(i, "tokens").split(self.sizes[i].tolist())

    def sampling_prompt(self, i: int) -> torch.Tensor:
        """The prompt as the template renders it for sampling, the answer opened."""
        return torch.cat([self[i][0], self.read(i, "opening")])

    def row_lengths(self, layout: str, multiple: int = 1) -> torch.Tensor:
        """(n,) tokens that a pair takes in rows padded to a `multiple`: in one row (shared), or in two."""
        prompt, chosen, rejected = self.sizes.unbind(1)
        shared = layout == "shared"
        # The longest row of a pair, padded, times its rows: SFT has one.
        row = prompt + (chosen + rejected if shared else torch.maximum(chosen, rejected))
        return (row + multiple - 1) // multiple * multiple * torch.where(shared | (rejected == 0), 1, 2)

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
    source: str, tokenizer, *, max_length=1024, max_prompt_length=512, sft=False, chat_format="auto"
) -> Pairs:
    """Read and tokenise a data set in parallel. The result stays on disk, for later runs and for other ranks.

    A pair that is too long is cut as the authors cut it: nothing while prompt and longer response fit
    `max_length`; else the prompt to `max_prompt_length` (its beginning goes, BOS stays), then the responses.
    sft: one response per record; of a conversation every assistant's turn. See `read_records`, `Chat`.

    Raises: UserError where nothing can be read, or more than half of the records are left out.
    """
    import datasets

    if not 0 < max_prompt_length < max_length:
        raise UserError(f"max_prompt_length {max_prompt_length}: from 1 to below max_length {max_length}")
    chat = Chat(tokenizer, chat_format)  # on every rank: it may give the tokenizer its template
    options = {"sft": sft, "max_length": max_length, "max_prompt_length": max_prompt_length}
    datasets.disable_progress_bars()
    with rank_0_first():
        records = read_records(source)
        # All that the tokens depend on. What `datasets` would hash of a tokenizer differs from run to run.
        rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(tokenizer.get_vocab())
        parts = [rules, tokenizer.special_tokens_map, tokenizer.chat_template, options]
        parts += [records._fingerprint, Path(__file__).read_text()]
        workers = min(os.cpu_count() or 1, len(records) // SHARE)  # a pool, and its bar, for large sets
        if workers > 1 and ranks()[0] == 0:
            datasets.enable_progress_bars()
        table = records.map(
            functools.partial(tokenise, chat=chat, **options),
            batched=True,
            remove_columns=records.column_names,
            features=datasets.Features.from_arrow_schema(SCHEMA),
            num_proc=workers if workers > 1 else None,  # any number finds what another has made
            new_fingerprint=hashlib.sha256(repr(parts).encode()).hexdigest()[:32],
            desc="tokenising",
        )
    pairs = Pairs(table.data.table)
    # The notes come from the table, so that they are the same when it was made by an earlier run.
    left_out = {note: count for note, count in pairs.notes.items() if note.startswith("left out")}
    if len(pairs) < max(1, sum(left_out.values())):
        reasons = "; ".join(f"{note} ({count})" for note, count in left_out.items()) or "it is empty"
        odd = (i for i, notes in enumerate(table["notes"], 1) if notes and notes[0] in left_out)
        reasons = f"{reasons:.500}; the first is number {next(odd, 0)}"
        raise UserError(f"data set {source!r}: {len(pairs)} usable records; {reasons}")
    return pairs


# ---------------------------------------------------------------------------- batches
@dataclass
class Batch:
    """B pairs as R rows of L tokens, and their N response tokens, flat. All int64 but `weight`."""

    tokens: torch.Tensor  # (R, L)
    positions: torch.Tensor  # (R, L) restart at the prompt's end for the rejected response
    segment: torch.Tensor  # (R, L) 0 prompt, 1 chosen, 2 rejected, -1 padding
    doc: torch.Tensor  # (R, L) the row's number, -1 padding
    state: torch.Tensor  # (N,) which of the R·L places predicts the token: the one before it
    target: torch.Tensor  # (N,) the token
    owner: torch.Tensor  # (N,) which of the 2B responses it belongs to: B chosen, then B rejected; sorted
    lengths: torch.Tensor  # (2B,) targets of each response (0 for SFT's rejected)
    index: torch.Tensor  # (B,) the pairs' places in the data set
    weight: torch.Tensor  # (B,) float32, 1; 0 for a padding pair, which only keeps a rank busy

    def to(self, device, non_blocking=True) -> "Batch":
        """This batch on a device; from pinned memory without waiting for the copy."""
        return Batch(**{name: x.to(device, non_blocking=non_blocking) for name, x in vars(self).items()})

    def pin_memory(self) -> "Batch":
        """This batch in page-locked memory (a DataLoader calls it)."""
        return Batch(**{name: x.pin_memory() for name, x in vars(self).items()})


def collate(
    pairs: Pairs, indices, *, layout="separate", row_multiple=1, pad_id=0, padding_pair=False,
    all_positions=False,
) -> Batch:  # fmt: skip
    """The Batch of B pairs, given by their places in the data set.

    Args:
        row_multiple: rows are padded to a multiple of it (flex_attention works in blocks of 128).
        padding_pair: these pairs carry weight 0.
        all_positions: every token but a row's first is a target, the prompt's too, in separate rows: for the
            entropy over all positions, in evaluation alone.
    """
    indices, pieces, marks, sizes = [int(i) for i in indices], [], [], []
    B, shared = len(indices), layout == "shared" and not all_positions
    # The pieces of each row, one after the other, and which of their tokens are targets.
    for b, i in enumerate(indices):
        (prompt, chosen, rejected), is_target = pairs[i], pairs.read(i, "is_target")
        none = prompt[:0]
        rows = [(chosen, rejected)] if shared else [(chosen, none), (none, rejected)]
        for y_w, y_l in rows if len(rejected) else rows[:1]:  # SFT has no rejected response
            pieces += [prompt, y_w, y_l]
            marks += [torch.zeros_like(prompt), is_target[: len(y_w)], torch.ones_like(y_l)]
            sizes.append((len(prompt), len(y_w), len(y_l), b))
    # Of each row, (R, 1): the tokens of prompt, chosen and rejected in it, and the pair's place in the batch.
    P, W, J, pair = torch.tensor(sizes).T[..., None]
    R, L = len(sizes), math.ceil(int((P + W + J).max()) / row_multiple) * row_multiple
    row, place = torch.arange(R)[:, None], torch.arange(L)
    there = place < P + W + J  # (R, L), as all below: False where a row is padding
    # Row by row the places that are no padding take the tokens in their order.
    tokens = torch.full((R, L), pad_id).masked_scatter(there, torch.cat(pieces))
    segment = torch.where(place < P, 0, torch.where(place < P + W, 1, 2)).where(there, -1)
    positions = torch.where(segment == 2, place - W, place).where(there, 0)
    # Both first tokens of the responses are predicted by the prompt's last, all others by the one before.
    before = torch.where((place == P) | (place == P + W), P, place) - 1
    owner = torch.where((segment == 2) | (W == 0), B + pair, pair)  # a row without chosen is rejected's
    is_target = torch.zeros(R, L, dtype=torch.int64).masked_scatter(there, torch.cat(marks))
    at = (there & (place > 0) if all_positions else is_target).flatten().nonzero()[:, 0]
    at = at[owner.flatten()[at].argsort(stable=True)]  # (N,) the targets' places, by response
    owner = owner.flatten()[at]  # (N,)
    return Batch(
        tokens, positions, segment, doc=row.where(there, -1), state=(row * L + before).flatten()[at],
        target=tokens.flatten()[at], owner=owner, lengths=owner.bincount(minlength=2 * B),
        index=torch.tensor(indices), weight=torch.full((B,), 0.0 if padding_pair else 1.0),
    )  # fmt: skip


# ---------------------------------------------------------------------------- steps
def micro_batches(indices, row_lengths, ranks: int, *, max_pairs=0, max_tokens=0) -> list[list[int]]:
    """Cut one global batch into micro-batches of similar lengths; micro-batch j goes to rank j % ranks.

    Their number is a multiple of `ranks`; where pairs are fewer than ranks, the last ones are empty.

    Args:
        row_lengths: (n,) tokens of each pair of the data set.
        max_pairs, max_tokens: of a micro-batch, each pair counted as long as the longest; 0 for no limit. A
            pair of more tokens goes alone.
    """
    longest_first = sorted((int(i) for i in indices), key=lambda i: (-int(row_lengths[i]), i))
    # No more than an equal share of the pairs, so that no rank is idle.
    cap = min(max_pairs or len(longest_first), math.ceil(len(longest_first) / ranks))
    groups: list[list[int]] = []
    for i in longest_first:
        full = not groups or len(groups[-1]) >= cap
        if full or (max_tokens and (len(groups[-1]) + 1) * int(row_lengths[groups[-1][0]]) > max_tokens):
            groups.append([])
        groups[-1].append(i)
    while len(groups) % ranks:  # split the largest until every rank has as many
        j = max(range(len(groups)), key=lambda j: len(groups[j]))
        half = (len(groups[j]) + 1) // 2
        if half == len(groups[j]):
            groups.append([])  # a single pair can't be split
        else:
            groups[j : j + 1] = groups[j][:half], groups[j][half:]
    return groups


def epoch_order(n: int, epoch: int, seed: int) -> torch.Tensor:
    """(n,) the order in which an epoch visits the pairs: a permutation by seed and epoch alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


LOADERS = {"cuda": 1, "cpu": 0}  # processes that make batches ahead


def ignore_signals(_):
    """For a loader's process: torchrun signals a rank's whole group, and the rank itself ends its loader."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def to_device(value, device):
    """A Batch or tensor, or a (named) tuple of them, on a device; from pinned memory without a wait."""
    if isinstance(value, tuple):
        parts = [to_device(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value if value is None else value.to(device, non_blocking=True)


def stream(pairs: Pairs, groups, *, device, lookup=None, **rows):
    """(Batch, the reference's statistics or None) of each micro-batch, on the device, made ahead of its work.

    Args:
        groups: lists of pair indices; an empty one becomes a padding pair of weight 0.
        lookup: a function of a batch's `index` that gives tensors, as a (named) tuple.
        rows: layout and padding, as `collate` takes them.
    """

    def load(group):
        batch = collate(pairs, group or [0], padding_pair=not group, **rows)
        return batch, None if lookup is None else lookup(batch.index)

    workers = LOADERS.get(kind := torch.device(device).type, 0)
    loader = DataLoader(
        groups, batch_size=None, collate_fn=load, pin_memory=kind == "cuda", num_workers=workers,
        worker_init_fn=ignore_signals, multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    for made in loader:  # (Batch, statistics)
        yield to_device(made, device)


# ---------------------------------------------------------------------------- ranks
def ranks() -> tuple[int, int]:
    """(this process's rank, how many there are); (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    """Wait for the other ranks."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def rank_0_first():
    """Rank 0 runs the block alone, then the others do, on errors too."""
    if ranks()[0] > 0:
        barrier()
    try:
        yield
    finally:
        if ranks()[0] == 0:
            barrier()


def lockstep(groups: list[list[int]], device) -> list[list[int]]:
    """This rank's micro-batches, then empty ones until every rank has as many: no collective hangs."""
    count = torch.tensor(len(groups), device=device)
    if dist.is_initialized():
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return groups + [[] for _ in range(int(count) - len(groups))]


def start_processes(device: str | None = None) -> torch.device:
    """Join torchrun's other processes, by gloo, on CUDA nccl; alone without it. Returns the rank's device."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    transformers_logging.disable_progress_bar()  # bars of half a second, one a rank
    if kind == "cuda":
        torch.cuda.set_device(place)
        torch._dynamo.config.recompile_limit = 64  # flex_attention: past it shapes run unfused, in silence
    if "RANK" in os.environ and not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # one torchrun, which may start its ranks again:
            # they would find the dead ones' addresses in the store that it keeps (pytorch/pytorch#135712)
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        options = {"store": store, "rank": rank, "world_size": world}
        options["device_id"] = place if kind == "cuda" else None
        patience = timedelta(hours=2)  # a rank may wait for a download, a slow disk, another run's cache
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=patience, **options)
    return place


# ---------------------------------------------------------------------------- files
def run_script(main):
    """Run a script's main(). A UserError ends it with one line on stderr and status 2: no traceback."""
    try:
        main()
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))  # of torchrun: the processes may not have joined yet
        if rank == 0 or not error.everywhere:
            tqdm.write(f"error (rank {rank}): {error}" if rank else f"error: {error}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def writing(path, keep: bool = False):
    """Name the path where a write fails. Unless `keep`, what was begun is removed: it may fill the disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            if not keep:
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        raise UserError(f"{path}: {error}", everywhere=False) from error


def write_text(path, text: str):
    """Write a file aside and rename it: a reader sees the old one or the new one."""
    aside = Path(f"{path}.{os.getpid()}.tmp")
    with writing(aside):
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text)
    aside.replace(path)


def write_json(path, value):
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def hold(folder, wait: bool = False):
    """Hold a folder alone, until the returned lock is released (it is a context) or the process ends.

    wait: for another process that holds it; else that is a UserError. A killed torchrun leaves its ranks at
    work: a run started again would write over theirs.
    """
    with writing(folder, keep=True):
        Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / "lock", is_singleton=True)  # of one process: runs may follow each other
    try:
        return lock.acquire(timeout=0)  # the system takes it back from a process that dies
    except Timeout:
        if not wait:
            busy = f"{folder}: another process writes there; end it, or choose another folder"
            raise UserError(busy, everywhere=False) from None
    print(f"{folder}: another process works there; waiting for it", flush=True)
    return lock.acquire()


def check_output(flag: str, path, *, folder: bool):
    """UserError where nothing can be written at `path`: before the work, not after it."""
    place = Path(path).absolute()
    there = next(p for p in ([place] if folder else []) + list(place.parents) if p.exists())
    if (place.is_dir() and not folder) or not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--{flag} {path}: no {'folder' if folder else 'file'} can be written there")


def hardware() -> str:
    """What this runs on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores"


def git_commit() -> str:
    """The commit, with a + where files differ from it; "unknown" outside a repository."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude", "*"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def made_by() -> dict:
    """What a file of results says of its making: command, commit, hardware."""
    script, *words = sys.argv
    parts = Path(script).parts[-2:]  # a module of a folder is started by -m
    name = ["-m", ".".join(parts).removesuffix(".py")] if parts[0] == "experiments" else [parts[-1]]
    command = shlex.join(["python", *name, *words])
    return {"command": command, "commit": git_commit(), "hardware": hardware()}


@contextlib.contextmanager
def hub_errors(what: str, name: str):
    """Turn the libraries' many errors about a model, tokenizer or data set into a UserError of one line."""
    try:
        yield
    except Exception as error:
        # The libraries say what to do (accept a licence, log in), in several lines, or in the cause.
        told = " ".join(f"{error} {error.__cause__ or ''}".split())[:400] or type(error).__name__
        if not os.path.exists(name) and (name.startswith((".", "/", "runs/")) or name.count("/") > 1):
            told = "no such file or folder, and a hub name is OWNER/NAME"
        raise UserError(f"{what} {name!r} can't be loaded: {told}") from error


def check_tokenizer(tokenizer, texts):
    """UserError where a tokenizer loses most of a text: that of a model's folder without its files."""
    for text in texts:
        # Characters in common, wherever they stand: spaces may move.
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
        if 2 * (Counter(text) & Counter(back)).total() < len(text):
            raise UserError(f"the tokenizer reads {text[:40]!r} as {back[:40]!r}: are its files missing?")


def load_tokenizer(name: str):
    """The tokenizer of a Hugging Face directory or repo; UserError where there is none that reads a text."""
    with hub_errors("tokenizer of", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    check_tokenizer(tokenizer, ["the answer is here"])
    return tokenizer
