"""From text to tensors: the one path that training, the reference pass and the evaluation share.

    records (JSONL, or any data set of Hugging Face's library)
      -> messages    roles user, assistant, system, whatever the file calls them
      -> Pairs       token ids of prompt, chosen and rejected; each is tokenised by itself, so none merges
      -> Batch       rows of tokens for the transformer, and the response tokens, flat, for all after it

Two layouts of a batch hold the same pairs, and give the same values but for rounding:

    shared     one row per pair, the prompt computed once    [prompt | chosen | rejected]
    separate   one row per response                          [prompt | chosen], [prompt | rejected]

In a shared row the positions of the rejected response restart at the prompt's end, and neither response sees
the other: a query sees the keys with  k <= q,  doc[k] == doc[q]  and  segment[k] in {0, segment[q]}.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, fields, replace
from itertools import chain, islice

import torch
from jinja2 import TemplateError
from tqdm.auto import tqdm

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}
ROLES["system"] = "system"
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}  # file ending: reader

# For base models, whose tokenizer has no chat template: Gemma's turns where its tokens exist, else the
# format of the authors' code.
GEMMA_TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PLAIN_TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '\n<|' + m['role'] + '|>\n' + m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)
LEAST_PROMPT = 16  # tokens of a prompt that a long response can't push out: the opening of the answer's turn
CHUNK = 1000  # records that are tokenised in one call
LONGEST_TOKEN = 256  # characters: of a longer text only as many as can matter are tokenised


class Unusable(ValueError):
    """A record that is left out and counted, with the reason."""


# ---------------------------------------------------------------------------- records
def split_revision(name: str) -> tuple[str, str | None]:
    """(NAME, REVISION) of a hub name that may pin one, NAME@REVISION; an existing path is taken as it is."""
    if os.path.exists(name) or "@" not in name:
        return name, None
    before, revision = name.rsplit("@", 1)
    return before, revision


def read_records(source: str, split: str = "train"):
    """(where, record) of each record of a data set: a dict, and "file:line" or "name[i]" for messages.

    Args:
        source: a .jsonl, .json, .parquet or .arrow file, a local folder, or a hub id; NAME@REVISION:SPLIT.
        split: the split where `source` names none.
    Raises:
        ValueError: no such file, data set or split, or a line that is no JSON object.
    """
    name = source
    if not os.path.exists(source) and ":" in source:
        name, split = source.split(":", 1)
    name, revision = split_revision(name)
    reader = FORMATS.get(os.path.splitext(name)[1])
    if os.path.isfile(name):
        if reader is None:
            raise ValueError(f"data set {name!r}: the file must end in one of {', '.join(FORMATS)}")
    elif not os.path.isdir(name) and (reader or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)):
        raise ValueError(f"data set {name!r}: no such file or folder, and no hub id (OWNER/NAME)")
    if source.endswith(".jsonl"):
        yield from read_jsonl(source)
        return
    import datasets  # slow to import, and JSONL needs none of it

    try:
        files = name if reader else None
        table = datasets.load_dataset(reader or name, data_files=files, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds; the cause tells more
        reason = str(error.__cause__ or error) or f"nothing to read ({type(error).__name__})"
        raise ValueError(f"data set {name!r}, split {split!r}: {reason.splitlines()[0]}") from None
    for i, record in enumerate(table):
        yield f"{name}[{i}]", record


def read_jsonl(path: str):
    """(where, record) of each line of a JSON-lines file, but for blank ones. ValueError names a bad line."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: a JSON object is needed, not {type(record).__name__}")
            yield f"{path}:{number}", record


def to_messages(value, field: str, role: str) -> list[dict]:
    """A field as messages: text becomes one message of `role`; a list of messages is checked."""
    if value is None:
        raise Unusable(f"no field {field!r}")
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise ValueError(f"{field}: text or a list of messages is needed, not {type(value).__name__}")
    messages = []
    for message in value:
        given = message if isinstance(message, dict) else {}
        name, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
        if not (isinstance(name, str) and name in ROLES and isinstance(content, str)):
            needed = f"a message needs a role ({', '.join(ROLES)}) and a text as content"
            raise ValueError(f"{field}: {needed}, got {message!r:.80}")
        messages.append({"role": ROLES[name], "content": content})
    return messages


def dialogue(text: str) -> list[dict] | str:
    """HH-RLHF's "\\n\\nHuman: … \\n\\nAssistant: …" as messages; other text as it is."""
    before, *turns = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text)
    if before or not turns:
        return text
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [{"role": roles[name], "content": content} for name, content in pairs]


def to_pair(record: dict) -> list[list[dict]]:
    """[chosen, rejected] of a record: two conversations that differ in their last turn, the assistant's.

    Their common start is the prompt: in the two fields themselves (UltraFeedback, HH-RLHF), else the field
    `prompt`, text or messages.
    """
    sides = []
    for name in ("chosen", "rejected"):
        value = record.get(name)
        if isinstance(value, str) and record.get("prompt") is None:
            value = dialogue(value)
        messages = to_messages(value, name, "assistant")
        if not messages or messages[-1]["role"] != "assistant":
            raise Unusable(f"{name} does not end with the assistant's turn")
        sides.append(messages)
    if sides[0][:-1] != sides[1][:-1]:
        raise Unusable("chosen and rejected answer different prompts")
    prompt = sides[0][:-1] or to_messages(record.get("prompt"), "prompt", "user")
    if not any(message["content"].strip() for message in prompt):
        raise Unusable("prompt is empty")
    return [[*prompt, side[-1]] for side in sides]


def to_conversation(record: dict) -> list[dict]:
    """A record for SFT as messages: a preference record's chosen side, `messages`, or prompt and response."""
    if record.get("chosen") is not None:
        return to_pair({**record, "rejected": record["chosen"]})[0]
    if record.get("messages") is not None:
        messages = to_messages(record["messages"], "messages", "user")
    else:
        field = "completion" if record.get("completion") is not None else "response"
        messages = to_messages(record.get("prompt"), "prompt", "user")
        messages += to_messages(record.get(field), field, "assistant")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or roles[0] == "assistant":
        raise Unusable("no assistant's turn that answers something")
    return messages


# ---------------------------------------------------------------------------- tokens
class Renderer:
    """Chat messages to pieces of token ids, by the tokenizer's chat template; it gets one where it has none.

    A prompt is tokenised as servers do it, special tokens in its text included; BOS stands once, at its head.
    A response is plain text (a "<eos>" written in it stays text), and is ended once: by the special token
    that the template puts behind an assistant's turn, else by EOS.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        if tokenizer.chat_template is None:
            gemma = "<start_of_turn>" in tokenizer.get_vocab()
            tokenizer.chat_template = GEMMA_TURNS if gemma else PLAIN_TURNS
        try:
            self.text([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
            self.folds_system = False
        except Unusable:  # Gemma's template refuses a system turn: it goes before the user's text
            self.folds_system = True
        text = self.text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "\x00"}])
        behind = tokenizer(text.rpartition("\x00")[2], add_special_tokens=False).input_ids
        ends = [token for token in behind if token in tokenizer.added_tokens_decoder]
        self.end = ends[0] if ends else tokenizer.eos_token_id
        if self.end is None:
            raise ValueError("the tokenizer has no EOS, its chat template no end of an assistant's turn")
        self.end_text = tokenizer.convert_ids_to_tokens(self.end) if ends else ""
        # A tokenizer that puts BOS first by itself expects it, also where its template leaves it out.
        opening = tokenizer(text, add_special_tokens=False).input_ids[:1] + tokenizer("a").input_ids[:1]
        self.head = [tokenizer.bos_token_id] if tokenizer.bos_token_id in opening else []

    def text(self, messages: list[dict], **options) -> str:
        """The template's text. Raises Unusable where the template refuses the messages."""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except TemplateError as error:
            raise Unusable(f"the chat template refuses it: {error}") from None

    def fold_system(self, messages: list[dict]) -> list[dict]:
        """The messages, a leading system turn joined to the user's where the template knows no such role."""
        if not self.folds_system or messages[0]["role"] != "system":
            return messages
        asked = messages[1:2] if messages[1:] and messages[1]["role"] == "user" else []
        text = "\n\n".join(message["content"] for message in [messages[0], *asked])
        return [{"role": "user", "content": text}, *messages[1 + len(asked) :]]

    def pieces(self, messages: list[dict], *, last_only: bool = False) -> list[tuple[str, bool]]:
        """[(text, is response)]: what precedes an assistant's turn (each, or the last), and it, by turns."""
        messages, pieces, seen = self.fold_system(messages), [], ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or (last_only and i + 1 < len(messages)):
                continue
            before, whole = self.text(messages[:i], add_generation_prompt=True), self.text(messages[: i + 1])
            if not (before.startswith(seen) and whole.startswith(before)):
                raise ValueError("the chat template rewrites earlier turns: no telling prompt from response")
            turn = whole[len(before) :]
            turn = turn[: turn.rindex(self.end_text)] if self.end_text else turn
            pieces += [(before[len(seen) :], False), (turn, True)]
            seen = before + turn + self.end_text
        return pieces

    def encode(self, pieces: list[tuple[str, bool]]) -> list[list[int]]:
        """Token ids of each piece: responses with their end, others without BOS (unless it is the end)."""
        ids: list = [None] * len(pieces)
        dropped = set(self.head) - {self.end}
        for response in (False, True):  # special tokens written in a response are split
            at = [i for i, piece in enumerate(pieces) if piece[1] == response]
            # A lone surrogate can't be encoded: it becomes U+FFFD, as in any decoder.
            texts = [pieces[i][0].encode("utf-16", "surrogatepass").decode("utf-16", "replace") for i in at]
            options = {"add_special_tokens": False, "split_special_tokens": response, "verbose": False}
            rows = self.tokenizer(texts, **options).input_ids if texts else []
            for i, row in zip(at, rows, strict=True):
                ids[i] = [*row, self.end] if response else [token for token in row if token not in dropped]
        return ids


class Pairs:
    """Tokenised pairs in flat storage: 5 bytes a token, however many there are.

    Attributes:
        tokens: (total,) int32, the pairs one after the other, each as prompt, chosen, rejected.
        is_target: (total,) bool, what a loss is taken over: responses, but not the user turns within an SFT
            conversation.
        bounds: (n, 4) int64, where prompt, chosen and rejected (empty in SFT) start, and where the pair ends.
        notes: Counter of what was cut or left out, by reason.
    """

    def __init__(self, rows, notes=None):
        """rows: of each pair prompt, chosen, rejected token ids and (optional) the responses' target mask."""
        tokens, marks, sizes = [], [], []
        for prompt, chosen, rejected, *mask in rows:
            tokens.append(torch.tensor([*prompt, *chosen, *rejected], dtype=torch.int32))
            mask = mask[0] if mask else [True] * (len(chosen) + len(rejected))
            marks.append(torch.tensor([False] * len(prompt) + mask))
            sizes.append((len(prompt), len(chosen), len(rejected)))
        ends = torch.tensor(sizes).flatten().cumsum(0).view(-1, 3)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1, 2]])
        self.tokens, self.is_target = torch.cat(tokens), torch.cat(marks)
        self.bounds, self.notes = torch.cat([starts[:, None], ends], 1), Counter(notes)

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(prompt, chosen, rejected), token ids."""
        a, b, c, d = self.bounds[i].tolist()
        return self.tokens[a:b], self.tokens[b:c], self.tokens[c:d]

    def row_lengths(self, layout: str) -> torch.Tensor:
        """(n,) tokens that a pair takes: of its one row (shared), or of its two rows padded to one length."""
        prompt, chosen, rejected = self.bounds.diff(dim=1).unbind(1)
        if layout == "shared":
            return prompt + chosen + rejected
        return torch.where(rejected > 0, 2, 1) * (prompt + torch.maximum(chosen, rejected))

    def digest(self) -> str:
        """sha256 of tokens, targets and bounds: the data's part of a reference cache's identity."""
        digest = hashlib.sha256()
        for part in (self.tokens, self.is_target, self.bounds):
            digest.update(part.numpy().data)
        return digest.hexdigest()


def load_pairs(
    source: str, tokenizer, *, max_length=1024, max_prompt_length=512, sft=False, progress=False
) -> Pairs:
    """Read and tokenise a data set.

    Too long a pair loses the beginning of its prompt first (BOS stays): what is over `max_prompt_length`, and
    what its longer response (SFT: the first answer) needs, down to `LEAST_PROMPT` tokens; only then the ends
    of its responses. At least one response token always remains. Unusable records are left out, and counted
    in `.notes` by reason.

    Args:
        source: see `read_records`.
        max_length, max_prompt_length: tokens of prompt and one response, and of the prompt.
        sft: one response per record; of a conversation, every assistant turn.
    Raises:
        ValueError: what can't be read, by file, line and field; no usable record.
    """
    if not 0 < max_prompt_length < max_length:
        raise ValueError(
            f"max_prompt_length {max_prompt_length}: must be at least 1, and below max_length {max_length}"
        )
    notes: Counter[str] = Counter()
    records = tqdm(read_records(source), desc="tokenising", unit=" records", disable=not progress)
    rows = _rows(iter(records), Renderer(tokenizer), sft, (max_length, max_prompt_length), notes)
    first = next(rows, None)
    if first is None:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in notes.items())
        raise ValueError(f"data set {source!r}: no usable record; {reasons or 'it is empty'}")
    return Pairs(chain([first], rows), notes)


def _rows(records, renderer, sft, limits, notes):
    """(prompt, chosen, rejected, target mask) of each usable record; `notes` counts all that is changed."""
    while chunk := list(islice(records, CHUNK)):
        usable = []
        for where, record in chunk:
            try:
                usable.append(_shortened(_pieces(renderer, record, sft), limits))
            except Unusable as reason:
                notes[f"left out: {reason}"] += 1
            except Exception as error:
                raise ValueError(f"{where}: {error}") from None
        ids = iter(renderer.encode([piece for pieces in usable for piece in pieces]))
        for pieces in usable:
            prompt, *parts = islice(ids, len(pieces))
            prompt = prompt if prompt[:1] == renderer.head else renderer.head + prompt
            # SFT: later user turns stand within the response, and are no targets.
            mask = [response for part, (_, response) in zip(parts, pieces[1:], strict=True) for _ in part]
            longest = len(parts[0]) if sft else max(map(len, parts))
            chosen, rejected = (list(chain(*parts)), []) if sft else parts
            prompt, chosen, rejected = _cut(prompt, chosen, rejected, longest, renderer.head, limits, notes)
            if not prompt or chosen == rejected:
                notes["left out: " + ("identical responses" if prompt else "prompt is empty")] += 1
            else:
                yield prompt, chosen, rejected, mask[: len(chosen) + len(rejected)]


def _pieces(renderer, record, sft):
    """A record's texts: prompt, chosen, rejected; for SFT by turns what stands before an answer, and it."""
    if sft:
        return renderer.pieces(to_conversation(record))
    chosen, rejected = (renderer.pieces(messages, last_only=True) for messages in to_pair(record))
    return [*chosen, rejected[1]]


def _shortened(pieces, limits):
    """The texts without what `_cut` leaves nothing of: a prompt's far beginning, the others' far end."""
    most, prompt = (LONGEST_TOKEN * tokens for tokens in limits)
    (text, response), *others = pieces
    return [(text[-prompt:], response), *((text[:most], response) for text, response in others)]


def _cut(prompt, chosen, rejected, longest, head, limits, notes):
    """(prompt, chosen, rejected) cut as `load_pairs` says, with room for a response of `longest` tokens."""
    max_length, max_prompt_length = limits
    keep = min(max_prompt_length, max(max_length - longest, LEAST_PROMPT))
    if len(prompt) > keep:
        head = head[: keep - 1]  # BOS stays
        prompt = head + prompt[len(prompt) - keep + len(head) :]
        notes["prompt cut"] += 1
    room = max_length - len(prompt)
    if max(len(chosen), len(rejected)) > room:
        notes["response cut"] += 1
    return prompt, chosen[:room], rejected[:room]


# ---------------------------------------------------------------------------- batches
@dataclass
class Batch:
    """B pairs as rows for the transformer, and their N response tokens, flat, for all that follows it.

    Attributes:
        tokens, positions: (R, L) int64. Positions restart at the prompt's end for the rejected response.
        segment: (R, L) int64, 0 prompt, 1 chosen, 2 rejected, -1 padding.
        doc: (R, L) int64, which document (prompt and what is behind it) a token is of, -1 padding.
        state: (N,) int64, which of the R*L positions predicts the token: the one before it; for the first
            token of a response the prompt's last.
        target: (N,) int64, the response token itself.
        owner: (N,) int64, which of the 2B responses it belongs to: first B chosen, then B rejected. Sorted.
        lengths: (2B,) int64, target tokens of each response (0 for SFT's absent rejected).
        index: (B,) int64, the pairs' places in the data set.
        weight: (B,) float32, 1; 0 for a padding pair, which only keeps a rank busy.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    segment: torch.Tensor
    doc: torch.Tensor
    state: torch.Tensor
    target: torch.Tensor
    owner: torch.Tensor
    lengths: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor

    def to(self, device, non_blocking=True) -> "Batch":
        """This batch on a device; from pinned memory without waiting for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """This batch in page-locked memory (a DataLoader calls it)."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function) -> "Batch":
        return replace(self, **{field.name: function(getattr(self, field.name)) for field in fields(self)})


def collate(
    pairs: Pairs, indices, *, layout="separate", row_multiple=1, pack_to=0, pad_id=0, padding_pair=False
) -> Batch:
    """The Batch of some pairs.

    Args:
        indices: which pairs, B of them.
        layout: "shared" or "separate", as in this file's head.
        row_multiple: rows are padded to a multiple of it (flex_attention works in blocks of 128).
        pack_to: rows take further documents up to this length; 0: one document a row.
        padding_pair: these pairs carry weight 0.
    """
    indices = [int(i) for i in indices]
    B, documents = len(indices), []
    for b, i in enumerate(indices):
        prompt, chosen, rejected = pairs[i]
        marks = pairs.is_target[pairs.bounds[i, 1] : pairs.bounds[i, 3]].split([len(chosen), len(rejected)])
        sides = [(1, b, chosen, marks[0]), (2, B + b, rejected, marks[1])]
        rows = [sides] if layout == "shared" else [[side] for side in sides if len(side[2])]
        documents += [_document(prompt, row) for row in rows]
    places = []  # of each document its row, and where it starts there
    fill: list[int] = []  # of each row its length
    for document in documents:
        if not fill or fill[-1] + document.shape[1] > pack_to:
            fill.append(0)
        places.append((len(fill) - 1, fill[-1]))
        fill[-1] += document.shape[1]
    R, L = len(fill), math.ceil(max(fill) / row_multiple) * row_multiple
    # token, position, segment, owner, state, doc of every place
    grid = torch.tensor([pad_id, 0, -1, -1, 0, -1])[:, None, None].repeat(1, R, L)
    for n, ((r, start), document) in enumerate(zip(places, documents, strict=True)):
        here = grid[:, r, start : start + document.shape[1]]
        here[:5], here[5] = document, n
        here[4] += r * L + start  # from the document's places to those of all rows
    token, _, _, owner, state, _ = grid.flatten(1)
    at = owner.argsort(stable=True)[int((owner < 0).sum()) :]  # the targets' places, by owner
    return Batch(
        grid[0], grid[1], grid[2], grid[5], state=state[at], target=token[at], owner=owner[at],
        lengths=owner[at].bincount(minlength=2 * B), index=torch.tensor(indices),
        weight=torch.full((B,), 0.0 if padding_pair else 1.0),
    )  # fmt: skip


def _document(prompt, responses):
    """(5, n): token, position, segment, owner (-1: no target) and state of a prompt and what is behind it."""
    P = end = len(prompt)
    t = torch.arange(P)
    columns = [torch.stack([prompt, t, torch.zeros_like(t), torch.full_like(t, -1), torch.zeros_like(t)])]
    for segment, owner, y, is_target in responses:
        t = torch.arange(len(y))
        state = torch.where(t == 0, P - 1, end - 1 + t)  # both first tokens follow the prompt's last
        columns.append(
            torch.stack([y, P + t, torch.full_like(t, segment), torch.where(is_target, owner, -1), state])
        )
        end += len(y)
    return torch.cat(columns, 1)


# ---------------------------------------------------------------------------- steps
def micro_batches(indices, row_lengths, ranks: int, *, max_pairs=0, max_tokens=0) -> list[list[int]]:
    """Cut one global batch into micro-batches of similar lengths; micro-batch j goes to rank j % ranks.

    Their number is a multiple of `ranks`; where pairs are fewer than ranks, the last ones are empty.

    Args:
        indices: the global batch's pairs.
        row_lengths: (n,) tokens of each pair of the data set.
        max_pairs: most pairs of a micro-batch, 0 for no limit.
        max_tokens: most tokens of a micro-batch, each pair counted as long as the longest, 0 for no limit; a
            longer pair goes alone.
    """
    longest_first = sorted((int(i) for i in indices), key=lambda i: (-int(row_lengths[i]), i))
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
