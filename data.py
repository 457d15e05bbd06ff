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

import torch
from tqdm.auto import tqdm

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}
ROLES["system"] = "system"

# For base models, whose tokenizer has no chat template: Gemma's turns where its tokens exist, else the
# format of the authors' code.
GEMMA_TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else "
    "m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PLAIN_TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '\n<|' + m['role'] + '|>\n' + m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)
LEAST_PROMPT = 16  # tokens of a prompt that a long response can't push out: the opening of the answer's turn


class Unusable(ValueError):
    """A record that is left out and counted, with the reason."""


# ---------------------------------------------------------------------------- records
def read_records(source: str, split: str = "train"):
    """(where, record) of each record of a data set: a dict, and "file:line" or "name[i]" for messages.

    Args:
        source: a .jsonl, .json, .parquet or .arrow file, a local folder, or a hub id; NAME:SPLIT chooses a split.
        split: the split where `source` names none.
    Raises:
        ValueError: no such file or split, or a line that is no JSON object.
    """
    if source.endswith(".jsonl"):
        yield from read_jsonl(source)
        return
    import datasets

    name, kind = (
        source,
        {".json": "json", ".parquet": "parquet", ".arrow": "arrow"}.get(os.path.splitext(source)[1]),
    )
    if not os.path.exists(source) and ":" in source:
        name, split = source.rsplit(":", 1)
    if not os.path.exists(name) and (kind or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"data set {name!r}: no such file or folder")
    try:
        options = {"data_files": name, "split": "train"} if kind else {"split": split}
        table = datasets.load_dataset(kind or name, **options)
    except Exception as error:  # the library raises many kinds; its message is the useful part
        raise ValueError(f"data set {name!r}, split {split!r}: {str(error).splitlines()[0]}") from None
    for i, record in enumerate(table):
        yield f"{name}[{i}]", record


def read_jsonl(path: str):
    """(where, record) of each line of a JSON-lines file, blank ones passed over. ValueError names a bad line."""
    if not os.path.isfile(path):
        raise ValueError(f"data set {path!r}: no such file")
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
        if not isinstance(message, dict):
            raise ValueError(f"{field}: a message needs role and content, got {message!r:.80}")
        name, content = (
            message.get(key, message.get(other)) for key, other in (("role", "from"), ("content", "value"))
        )
        if name not in ROLES:
            raise ValueError(f"{field}: role {name!r:.80} is none of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"{field}: content must be text, not {type(content).__name__}")
        messages.append({"role": ROLES[name], "content": content})
    return messages


def dialogue(text: str) -> list[dict]:
    """The format of HH-RLHF, "\\n\\nHuman: … \\n\\nAssistant: …", as messages; other text is one answer."""
    turns = re.split(r"\n\n(Human|Assistant): ?", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(turns[1::2], turns[2::2], strict=True)
    return [{"role": roles[name], "content": content} for name, content in pairs]


def to_pair(record: dict) -> tuple[list[dict], str, str]:
    """(prompt messages, chosen text, rejected text) of a record.

    The prompt is the field `prompt` (text or messages), or the start that two whole conversations share
    (UltraFeedback has both), or that of HH-RLHF's two dialogues.
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
    if not prompt:
        raise Unusable("prompt is empty")
    return prompt, sides[0][-1]["content"], sides[1][-1]["content"]


def to_conversation(record: dict) -> list[dict]:
    """A record for SFT as messages: a preference record's chosen side, `messages`, or prompt and response."""
    if record.get("chosen") is not None:
        prompt, chosen, _ = to_pair({**record, "rejected": record["chosen"]})
        return [*prompt, {"role": "assistant", "content": chosen}]
    if record.get("messages") is not None:
        messages = to_messages(record["messages"], "messages", "user")
    else:
        field = "completion" if record.get("completion") is not None else "response"
        messages = to_messages(record.get("prompt"), "prompt", "user")
        messages += to_messages(record.get(field), field, "assistant")
    if not any(message["role"] == "assistant" for message in messages):
        raise Unusable("no assistant turn to learn from")
    return messages


# ---------------------------------------------------------------------------- tokens
class Renderer:
    """Chat messages to pieces of token ids, by the tokenizer's own chat template.

    A prompt piece is tokenised with its special tokens. A response is plain text (a "<eos>" written in it stays
    text) and is ended once: by the special token that the template puts behind an assistant's turn, else by EOS.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        if tokenizer.chat_template is None:
            gemma = "<start_of_turn>" in tokenizer.get_vocab()
            tokenizer.chat_template = GEMMA_TURNS if gemma else PLAIN_TURNS
        try:
            self.text([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
            self.folds_system = False
        except Exception:  # Gemma's own template refuses a system turn: it goes before the user's text
            self.folds_system = True
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\x00"}]
        behind = tokenizer(self.text(turns).rsplit("\x00", 1)[1], add_special_tokens=False).input_ids
        ends = [token for token in behind if token in tokenizer.added_tokens_decoder]
        self.end = ends[0] if ends else tokenizer.eos_token_id
        if self.end is None:
            raise ValueError(
                "the tokenizer has no EOS token, and its chat template no end of the assistant's turn"
            )
        self.end_text = tokenizer.convert_ids_to_tokens(self.end) if ends else ""
        # A tokenizer that puts BOS first by itself expects it, also where its template leaves it out.
        self.adds_bos = tokenizer.bos_token_id in tokenizer("a").input_ids[:1]

    def text(self, messages: list[dict], **options) -> str:
        """The template's text."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def pieces(self, messages: list[dict], *, last_only: bool = False) -> list[tuple[str, bool]]:
        """[(text, is_response)]: what stands before each assistant turn (or the last), and that turn's text."""
        if self.folds_system and len(messages) > 1 and messages[0]["role"] == "system":
            text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            messages = [{"role": "user", "content": text}, *messages[2:]]
        pieces, done = [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or (last_only and i + 1 < len(messages)):
                continue
            before = self.text(messages[:i], add_generation_prompt=True)
            whole = self.text(messages[: i + 1])
            if not whole.startswith(before):
                raise ValueError("the chat template rewrites earlier turns: no telling prompt from response")
            turn = whole[len(before) :]
            turn = turn[: turn.rindex(self.end_text)] if self.end_text else turn
            pieces += [(before[done:], False), (turn, True)]
            done = len(before) + len(turn) + len(self.end_text)
        return pieces

    def encode(self, pieces: list[tuple[str, bool]]) -> list[list[int]]:
        """Token ids of every piece: one call for the prompts' and one for the responses'."""
        ids: list = [None] * len(pieces)
        for response in (False, True):
            at = [i for i, piece in enumerate(pieces) if piece[1] == response]
            # A lone surrogate can't be encoded: it becomes U+FFFD, as in any decoder.
            texts = [pieces[i][0].encode("utf-16", "surrogatepass").decode("utf-16", "replace") for i in at]
            options = {"add_special_tokens": False, "split_special_tokens": response}
            rows = self.tokenizer(texts, **options).input_ids if texts else []
            for i, row in zip(at, rows, strict=True):
                ids[i] = [*row, self.end] if response else row
        return ids

    def with_bos(self, prompt: list[int]) -> list[int]:
        """A first piece with BOS once, at its head, where the template or the tokenizer puts it there."""
        bos = self.tokenizer.bos_token_id
        if not (self.adds_bos or prompt[:1] == [bos]):
            return prompt
        return [bos, *(token for token in prompt if token != bos)]


class Pairs:
    """Tokenised pairs in flat storage: 5 bytes a token, however many there are.

    Attributes:
        tokens: (total,) int32, the pairs one after the other, each as prompt, chosen, rejected.
        is_target: (total,) bool, what a loss is taken over: responses, but not the user turns within an SFT
            conversation.
        bounds: (n, 4) int64, where prompt, chosen and rejected start, and where the pair ends. No rejected in SFT.
        notes: Counter of what was cut or left out, by reason.
    """

    def __init__(self, rows, notes=None):
        """rows: of each pair (prompt, chosen, rejected) token ids and (optional) the responses' target mask."""
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
    source, tokenizer, *, max_length=1024, max_prompt_length=512, sft=False, progress=False
) -> Pairs:
    """Read and tokenise a data set.

    Too long a pair loses the beginning of its prompt first (BOS stays): what is over `max_prompt_length`, then
    what its longer response needs, down to `LEAST_PROMPT` tokens; only then the responses' ends. At least one
    response token always remains. Records without a usable pair are left out; `.notes` counts reasons.

    Args:
        source: see `read_records`.
        max_length, max_prompt_length: tokens of prompt and one response, and of the prompt.
        sft: one response per record; of a conversation, every assistant turn.
    Raises:
        ValueError: what can't be read, by file, line and field; no usable record.
    """
    if not 0 < max_prompt_length < max_length:
        raise ValueError(
            f"max_prompt_length {max_prompt_length}: between 1 and max_length - 1 = {max_length - 1}"
        )
    renderer, notes, rows, chunk = Renderer(tokenizer), Counter(), [], []
    limits = (max_length, max_prompt_length, notes)
    first_reason = ""
    with tqdm(desc="tokenising", unit=" records", disable=not progress) as bar:
        for where, record in read_records(source):
            try:
                chunk.append(_pieces(renderer, record, sft))
            except Unusable as reason:
                notes[f"left out: {reason}"] += 1
                first_reason = first_reason or f"; {where}: {reason}"
            except Exception as error:  # a wrong field, or the chat template's own complaint
                raise ValueError(f"{where}: {error}") from None
            if len(chunk) == 1000:
                rows += _encode(renderer, chunk, sft, *limits)
                chunk = []
            bar.update()
        rows += _encode(renderer, chunk, sft, *limits)
    if not rows:
        raise ValueError(
            f"data set {source!r}: no usable record ({sum(notes.values())} left out{first_reason})"
        )
    return Pairs(rows, notes)


def _pieces(renderer, record, sft):
    """The text pieces of one record: [prompt, response, prompt, response, …] (SFT) or [prompt, chosen, rejected]."""
    if sft:
        return renderer.pieces(to_conversation(record))
    prompt, chosen, rejected = to_pair(record)
    answers = [[*prompt, {"role": "assistant", "content": text}] for text in (chosen, rejected)]
    before, first = renderer.pieces(answers[0], last_only=True)
    return [before, first, renderer.pieces(answers[1], last_only=True)[1]]


def _encode(renderer, chunk, sft, max_length, max_prompt_length, notes):
    """(prompt, chosen, rejected, target mask) of each record of a chunk, cut to the limits."""
    ids = iter(renderer.encode([piece for record in chunk for piece in record]))
    for record in chunk:
        first, *parts = [next(ids) for _ in record]
        prompt = renderer.with_bos(first)
        if sft:  # later user turns stand within the response, and are no targets
            chosen, rejected = [token for part in parts for token in part], []
            mask = [piece[1] for piece, part in zip(record[1:], parts, strict=True) for _ in part]
        else:
            (chosen, rejected), mask = parts, None
        longest = max(len(chosen), len(rejected)) if not sft else 1
        keep = min(max_prompt_length, max(max_length - longest, min(LEAST_PROMPT, max_length - 1)))
        if len(prompt) > keep:
            bos = prompt[:1] if prompt[0] == renderer.tokenizer.bos_token_id and keep > 1 else []
            prompt = bos + prompt[len(prompt) - keep + len(bos) :]
            notes["prompt cut"] += 1
        room = max_length - len(prompt)
        notes["response cut"] += (len(chosen) > room) + (len(rejected) > room)
        chosen, rejected = chosen[:room], rejected[:room]
        if chosen == rejected:
            notes["left out: identical responses"] += 1
        else:
            yield prompt, chosen, rejected, *([] if mask is None else [mask[:room]])


# ---------------------------------------------------------------------------- batches
@dataclass
class Batch:
    """B pairs as rows for the transformer, and their N response tokens, flat, for all that follows it.

    Attributes:
        tokens, positions: (R, L) int64. Positions restart at the prompt's end for the rejected response.
        segment: (R, L) int64, 0 prompt, 1 chosen, 2 rejected, -1 padding.
        doc: (R, L) int64, which document of the row a token belongs to, -1 padding.
        state: (N,) int64, which of the R*L positions predicts the token: the one before it; for a response's first
            token the prompt's last.
        target: (N,) int64, the response token itself.
        owner: (N,) int64, which of the 2B responses it belongs to: first B chosen, then B rejected. Sorted.
        lengths: (2B,) int64, target tokens of each response (0 for SFT's absent rejected).
        index: (B,) int64, the pairs' places in the data set.
        weight: (B,) float32, 1; 0 for a padding pair, that only keeps a rank busy.
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
        return replace(
            self,
            **{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)},
        )

    def pin_memory(self) -> "Batch":
        return replace(self, **{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


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
    docs, B = (
        [],
        len(indices),
    )  # a document: (tokens, positions, segment, [(owner, first target state, slice, mask)])
    for b, i in enumerate(indices):
        prompt, chosen, rejected = pairs[i]
        mask = pairs.is_target[pairs.bounds[i, 1] : pairs.bounds[i, 3]].split([len(chosen), len(rejected)])
        sides = [
            (s, o, y, m) for s, o, y, m in ((1, b, chosen, mask[0]), (2, B + b, rejected, mask[1])) if len(y)
        ]
        docs += (
            [_document(prompt, sides)]
            if layout == "shared"
            else [_document(prompt, [side]) for side in sides]
        )
    rows, fill = [], []
    for doc in docs:
        if not rows or fill[-1] + len(doc[0]) > pack_to:
            rows.append([]), fill.append(0)
        rows[-1].append(doc)
        fill[-1] += len(doc[0])
    L = math.ceil(max(fill) / row_multiple) * row_multiple
    tokens, positions = torch.full((len(rows), L), pad_id), torch.zeros(len(rows), L, dtype=torch.int64)
    segment, doc_id = torch.full((len(rows), L), -1), torch.full((len(rows), L), -1)
    flat = [None] * (2 * B)  # per response: (state, target)
    for r, row in enumerate(rows):
        at = 0
        for d, (ids, position, seg, responses) in enumerate(row):
            span = slice(at, at + len(ids))
            tokens[r, span], positions[r, span], segment[r, span], doc_id[r, span] = ids, position, seg, d
            for owner, state, target in responses:
                flat[owner] = (state + r * L + at, target)
            at += len(ids)
    flat = [pair or (torch.zeros(0, dtype=torch.int64),) * 2 for pair in flat]
    lengths = torch.tensor([len(target) for _, target in flat])
    return Batch(
        tokens, positions, segment, doc_id,
        state=torch.cat([state for state, _ in flat]), target=torch.cat([target for _, target in flat]),
        owner=torch.arange(2 * B).repeat_interleave(lengths), lengths=lengths,
        index=torch.tensor(indices), weight=torch.full((B,), 0.0 if padding_pair else 1.0),
    )  # fmt: skip


def _document(prompt, sides):
    """One prompt with its responses behind it: tokens, positions, segments; per response its owner, states, targets."""
    P = len(prompt)
    tokens, positions, segment, responses = (
        [prompt.long()],
        [torch.arange(P)],
        [torch.zeros(P, dtype=torch.int64)],
        [],
    )
    at = P
    for number, owner, y, mask in sides:
        states = torch.arange(at - 1, at + len(y) - 1)
        states[0] = P - 1  # both responses' first tokens are predicted by the prompt's last state
        responses.append((owner, states[mask], y[mask].long()))
        tokens.append(y.long())
        positions.append(torch.arange(P, P + len(y)))
        segment.append(torch.full((len(y),), number))
        at += len(y)
    return torch.cat(tokens), torch.cat(positions), torch.cat(segment), responses


# ---------------------------------------------------------------------------- steps
def micro_batches(indices, row_lengths, ranks: int, *, max_pairs=0, max_tokens=0) -> list[list[int]]:
    """Cut one global batch into micro-batches of similar lengths; micro-batch j goes to rank j % ranks.

    Their number is a multiple of `ranks`; where pairs are fewer than ranks, the last ones are empty.

    Args:
        indices: the global batch's pairs.
        row_lengths: (n,) tokens of each pair of the data set.
        max_pairs: most pairs of a micro-batch, 0 for no limit.
        max_tokens: most tokens of a micro-batch, padding counted, 0 for no limit; a longer pair goes alone.
    """
    longest_first = sorted((int(i) for i in indices), key=lambda i: (-int(row_lengths[i]), i))
    cap = min(max_pairs or len(longest_first), math.ceil(len(longest_first) / ranks))
    groups: list[list[int]] = []
    for i in longest_first:
        group = groups[-1] if groups else None
        full = group is None or len(group) >= cap
        if full or (max_tokens and (len(group) + 1) * int(row_lengths[group[0]]) > max_tokens):
            groups.append([])
        groups[-1].append(i)
    while len(groups) % ranks:  # split the largest until every rank has as many
        largest = max(range(len(groups)), key=lambda j: len(groups[j]))
        group = groups[largest]
        half = (len(group) + 1) // 2
        groups[largest : largest + 1] = [group[:half], group[half:]] if len(group) > 1 else [group, []]
    return groups


def epoch_order(n: int, epoch: int, seed: int) -> torch.Tensor:
    """(n,) the order in which an epoch visits the pairs: a permutation that depends on seed and epoch alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
