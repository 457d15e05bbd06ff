"""Tokenizers in the manner of families in use, and what pairs say when they are spelled by one of them.

They are made here: small vocabularies, and chat templates written anew. What tests expect comes from the
template's own rendering, never from data.py.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import data
from data import Chat, Pairs

BOS, START = 2, 106  # Gemma's ids
MERGES = [("\n", "g"), ("o", "o"), ("oo", "d")]  # "\ng": a line's end and a response's first letter

# ---------------------------------------------------------------- tokenizers
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}{{ '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM_2 = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
QWEN_3 = CHATML.replace(  # the answer to the last question opens with an empty thought, no other does
    "+ m.content", "+ ('<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' else '') + m.content"
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{% for m in turns %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and system is defined %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}"
    "{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
PHI_3 = (  # the text as a whole ends with EOS, an answer does not
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
SMOLVLM = (  # of a content that is no list it writes nothing, and says nothing
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize + ': ' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}<image>{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SKIPS_SYSTEM = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")


def fast(model, specials, words=(), *, template=None, prefix_space=None, **roles):
    """A tokenizer with special tokens and added words; of bytes, as GPT-2's, unless prefix_space is None."""
    raw = Tokenizer(model)
    if prefix_space is None:
        raw.normalizer = normalizers.Replace(" ", "▁")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        raw.decoder = decoders.Sequence(steps)
    else:
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
        raw.decoder = decoders.ByteLevel()
    special = dict.fromkeys([*specials, *roles.values()])
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    raw.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    if "<bos>" in special:
        raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **roles)
    tokenizer.chat_template = template
    return tokenizer


def gemma_tokenizer(template=None, words=()):
    """SentencePiece-like: merges may cross a line's end, any other character is bytes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = [*special, *"\n▁abcdefghijklmnopqrstuvwxyz.?<_>"]
    pieces += [f"<unused{i}>" for i in range(len(pieces), START)] + ["<start_of_turn>", "<end_of_turn>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)] + ["".join(pair) for pair in MERGES]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab, MERGES, byte_fallback=True, unk_token="<unk>")
    roles = {f"{name[1:-1]}_token": name for name in special}
    return fast(model, [*special, "<start_of_turn>", "<end_of_turn>"], words, template=template, **roles)


def byte_tokenizer(template=None, specials=(), words=(), prefix_space=False, **roles):
    """GPT-2-like: bytes and a few merges."""
    merges = [("o", "o"), ("h", "e"), ("Ċ", "Ċ"), ("Ġ", "y")]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges)
    return fast(model, specials, words, template=template, prefix_space=prefix_space, **roles)


IM = ["<|im_start|>", "<|im_end|>"]
HEADERS, LLAMA_BOS = ["<|start_header_id|>", "<|end_header_id|>"], "<|begin_of_text|>"
HARMONY = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]
PHI = ["<|user|>", "<|assistant|>", "<|end|>"]
SPACES = ["\n", "\n\n", "\n\n\n", "  ", "▁▁", "<b>", "</b>"]  # Gemma's and NeoX's tokenizers add such words
S = {"bos_token": "<s>", "eos_token": "</s>"}
FAMILIES = {
    "Gemma": gemma_tokenizer(GEMMA),
    "Gemma, spaces": gemma_tokenizer(GEMMA, SPACES),
    "Gemma, plain turns": byte_tokenizer(GEMMA, [], ["<start_of_turn>", "<end_of_turn>"], **S),
    "Llama-3": byte_tokenizer(LLAMA_3, HEADERS, bos_token=LLAMA_BOS, eos_token="<|eot_id|>"),
    "Qwen-3": byte_tokenizer(QWEN_3, IM, ["<think>", "</think>"], eos_token=IM[1]),
    "SmolLM2": byte_tokenizer(SMOLLM_2, bos_token=IM[0], eos_token=IM[1]),
    "Llama-2": byte_tokenizer(LLAMA_2, prefix_space=True, **S),
    "R1": byte_tokenizer(R1, ["<|User|>", "<|Assistant|>"], ["<think>"], **S),
    "Phi-3": byte_tokenizer(PHI_3, PHI, SPACES, eos_token="<|endoftext|>"),
    "SmolVLM": byte_tokenizer(SMOLVLM, [IM[0], "<image>"], eos_token="<end_of_utterance>"),
    "channels": byte_tokenizer(CHANNELS, HARMONY, eos_token="<|return|>"),
    "skips system": byte_tokenizer(SKIPS_SYSTEM, IM, eos_token=IM[1]),
}
GEMMA_IT = FAMILIES["Gemma"]
# SmolLM2's with another template, or another BOS.
OTHER_TEMPLATE = byte_tokenizer(CHATML, bos_token=IM[0], eos_token=IM[1])
OTHER_BOS = byte_tokenizer(SMOLLM_2, IM, eos_token=IM[1])
END_OF = {name: tokenizer.eos_token for name, tokenizer in FAMILIES.items()} | {"Phi-3": "<|end|>"}
END_OF |= {name: "<end_of_turn>" for name in FAMILIES if name.startswith("Gemma")}


# ---------------------------------------------------------------- records and pairs
def write(path, *records):
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def tokenised(*records, by=GEMMA_IT, sft=False, max_length=9999, max_prompt_length=9998):
    """Pairs of some records, by way of JSON, without a file."""
    options = {"sft": sft, "max_length": max_length, "max_prompt_length": max_prompt_length}
    lines = [json.dumps(record) for record in records]
    return Pairs(data.tokenise({"text": lines}, chat=Chat(by), **options))


def spell(pairs, i=0, by=GEMMA_IT):
    """A pair's prompt, chosen and rejected as the text that the template wrote."""
    return [by.decode(ids.tolist()) for ids in pairs[i]]


def spell_all(pairs, by=FAMILIES["SmolLM2"]):
    """The texts of all pairs."""
    return [spell(pairs, i, by) for i in range(len(pairs))]


def spell_targets(pairs, i=0, by=GEMMA_IT):
    """What follows an SFT prompt: (text, is target) of every run."""
    runs = []
    for token, mark in zip(pairs[i][1].tolist(), pairs.read(i, "is_target").tolist(), strict=True):
        if not runs or runs[-1][1] != bool(mark):
            runs.append(([], bool(mark)))
        runs[-1][0].append(token)
    return [(by.decode(ids), mark) for ids, mark in runs]


def T(*turns):
    """Messages, from "u:what the user says", "a:the assistant", "s:the system"."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def rendered(family, messages, **options):
    """Ids of a conversation's rendering, up to where its last turn ends: cut in its text, and tokenised."""
    tokenizer, end = FAMILIES[family], END_OF[family]
    no_system = family.startswith("Gemma") or family == "skips system"
    if no_system and messages[0]["role"] == "system":
        messages = T(f"u:{messages[0]['content']}\n\n{messages[1]['content']}") + messages[2:]
    if family == "SmolVLM":
        parts = [[{"type": "text", "text": message["content"]}] for message in messages]
        messages = [{**m, "content": content} for m, content in zip(messages, parts, strict=True)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    text = text if options else text[: text.rindex(end) + len(end)]
    return tokenizer(text, add_special_tokens=False).input_ids


ASK = "<bos><start_of_turn>user\nask me<end_of_turn>\n<start_of_turn>model\n"
HELLO = ASK.replace("ask me", "hi")
YES, BAD = T("u:ask me", "a:yes"), T("u:ask me", "a:bad")
GOOD = {"prompt": "ask me", "chosen": "yes", "rejected": "bad"}
TALK = T("u:hi", "a:a b", "u:more?", "a:c")
