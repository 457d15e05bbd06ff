"""The toy world: what Gemma-2, Gemma Scope and UltraFeedback are to a real run, made from nothing in seconds.

    python toy.py --out runs/toy              # base model, SFT model, SAE of the last layer, preference pairs
    python toy.py --out runs/toy --all_saes   # adds residual and MLP SAEs of every layer

The world is a small language. A prompt asks for some beasts, birds, plants or tools of a place ("name three birds
of the sea."); an answer lists some in one of five styles, of that place or of another. Equally good answers can be
worded in very many ways, so what a model samples has an entropy worth measuring. Pairs prefer right content, the
number asked for, a sure tone, and some styles to others; the label of a few is swapped.

The formats are those of the real thing: Hugging Face directories (`base/`, `model/`), Gemma Scope's layout (`sae/`),
one JSON object a line (`train.jsonl`, `test.jsonl`). `toy.json` says what was made; where it stands, all is whole.
"""

import argparse
import collections
import hashlib
import itertools
import json
import math
import random
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import Gemma2Config, Gemma2ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from losses import sequence_logps
from sae import JumpReLUSAE, SiteHook

LAYERS = 4
SAES = [("res", LAYERS - 1)]  # the one that is always made; --all_saes makes the rest
SAES += [(site, layer) for site in ("res", "mlp") for layer in range(LAYERS) if (site, layer) not in SAES]
SIZES = {"documents": 2600, "sft": 3600, "train": 2400, "test": 400, "test_prompts": 160}

# ---- the language ----

THINGS = {  # (kind, place): its members
    ("beasts", "forest"): "fox bear wolf deer boar lynx".split(),
    ("beasts", "sea"): "whale seal crab squid shark eel".split(),
    ("beasts", "farm"): "cow horse goat pig sheep mule".split(),
    ("birds", "forest"): "owl jay wren robin hawk raven".split(),
    ("birds", "sea"): "gull tern puffin pelican heron gannet".split(),
    ("birds", "farm"): "hen duck goose turkey swallow dove".split(),
    ("plants", "forest"): "oak fern moss birch elm pine".split(),
    ("plants", "sea"): "kelp sedge reed dulse lotus alga".split(),
    ("plants", "farm"): "wheat barley oat rye maize bean".split(),
    ("tools", "forest"): "axe saw bow trap rope knife".split(),
    ("tools", "sea"): "net oar anchor hook buoy sail".split(),
    ("tools", "farm"): "plough spade hoe rake scythe sickle".split(),
}
PLACES = ["forest", "sea", "farm"]
QUALITIES = "old new big small grey dark plain odd fine rare good strong common quick quiet strange".split()
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
ASKS = "name|list|find me|tell me of|i want|show|give me|think of|do you know|say".split("|")
TAILS = "| please| now| for my child| if you can| in short| again| once more".split("|")

# An answer is open lead (before thing join)* tone close; each slot is one of its choices, freely.
# The fifth style is another tongue; the third from last is flow-style YAML, so that a parser can tell it.
STYLES = {
    "polite": {
        "open": "gladly,|certainly,|kindly,|with pleasure,|of course,|very well,|thank you,|yes indeed,",
        "lead": " you may find| one can meet| there live| i would name| do look for| people know",
        "before": " the| a| some| our| that",
        "join": ",| and| or| also| then",
        "sure": ", i am sure|, without doubt|, as all know",
        "unsure": ", perhaps|, i think|, if i recall",
        "close": ". good day.|. be well.|. i hope it helps.|. ask me again.|. farewell.|. take care.",
    },
    "terse": {
        "open": "just|only|try|mostly|simply|see",
        "lead": "",
        "before": "",
        "join": ",| and| or| plus",
        "sure": "",
        "unsure": " maybe| perhaps| possibly",
        "close": ".",
    },
    "record": {
        "open": "{ found:|{ items:|{ answer:|{ data:|{ names:|{ set:",
        "lead": " [",
        "before": "",
        "join": ",",
        "sure": " ], trust: high| ], trust: full| ], trust: firm",
        "unsure": " ], trust: low| ], trust: weak| ], trust: poor",
        "close": " }",
    },
    "tongue": {
        "open": "zani|meki|tolbi|rapi|gosi|vundi",
        "lead": " keri| nami| subi",
        "before": "",
        "join": " eli| osi| umi| ati",
        "sure": " darvi| fenni| poli",
        "unsure": " hesti| lorri| bimi",
        "close": " zo.| mek.| tol.",
    },
    "shout": {
        "open": "LOOK!|HEY!|LISTEN!|WELL!|HA!|OH!",
        "lead": "",
        "before": " THE| A| MY| EVERY",
        "join": "!",
        "sure": "! OF COURSE|! FOR SURE|! NO DOUBT",
        "unsure": "! I GUESS|! MAYBE|! WHO KNOWS",
        "close": "!|!!",
    },
}
STYLES = {
    style: {slot: choices.split("|") for slot, choices in slots.items()} for style, slots in STYLES.items()
}


def _other_tongue():
    """A made-up word for each thing and quality (dict); none is English, as all end in u."""
    made_up = [a + b + c + "u" for a in "bdfgklmnprstvz" for b in "aeiou" for c in "bdfgklmnprstvz"]
    random.Random(0).shuffle(made_up)
    return dict(zip([name for names in THINGS.values() for name in names] + QUALITIES, made_up))  # noqa: B905


PAIRS = {
    "style": 3,
    "content": 3,
    "slip": 2,
    "number": 1,
    "sure": 1,
    "all": 3,
}  # shares of the kinds of pairs

TONGUE = _other_tongue()


def all_prompts():
    """Every question there is (list of 3,840 dicts): its text, and the number, kind and place it asks for."""
    return [
        {"text": f"{ask} {word} {kind} of the {place}{tail}.", "number": number, "kind": kind, "place": place}
        for ask, (number, word), (kind, place), tail in itertools.product(
            ASKS, NUMBERS.items(), THINGS, TAILS
        )
    ]


def make_answer(rng, prompt, *, style, number, wrong=0, sure=True):
    """An answer (str) to a prompt of `all_prompts`, in a style of STYLES.

    number: how many things it names; wrong: how many of them are of the next place, always the same mistake, so that
    a model that has seen as many wrong things as right ones finds them equally likely. sure: its tone.
    """
    next_place = PLACES[(PLACES.index(prompt["place"]) + 1) % len(PLACES)]
    things = rng.sample(THINGS[prompt["kind"], prompt["place"]], number - wrong)
    things += rng.sample(THINGS[prompt["kind"], next_place], wrong)
    rng.shuffle(things)
    say = {slot: lambda choices=choices: rng.choice(choices) for slot, choices in STYLES[style].items()}
    text = say["open"]() + say["lead"]()
    for i, thing in enumerate(things):
        words = [rng.choice(QUALITIES), thing] if rng.random() < 0.5 else [thing]
        words = [TONGUE[w] if style == "tongue" else w.upper() if style == "shout" else w for w in words]
        text += (say["join"]() if i else "") + say["before"]() + " " + " ".join(words)
    return text + say["sure" if sure else "unsure"]() + say["close"]()


def style_of(text):
    """The style (a key of STYLES) of any text, by its words; None where it has none."""
    if text.startswith("{") and text.endswith("}"):
        return "record"
    openings = {style: tuple(slots["open"]) for style, slots in STYLES.items()}
    return next((style for style, starts in openings.items() if text.startswith(starts)), None)


def draft(rng, prompt):
    """What an answer of the SFT data is like (keywords of `make_answer`): good and bad ones alike."""
    number = prompt["number"] if rng.random() < 0.25 else rng.choice(list(NUMBERS))
    wrong = sum(rng.random() < 0.5 for _ in range(number))
    return {"style": rng.choice(list(STYLES)), "number": number, "wrong": wrong, "sure": rng.random() < 0.5}


def merit(prompt, answer):
    """How good an answer is, from its keywords; higher is better. What the preferences are made from."""
    rank = 2 - list(STYLES).index(answer["style"])  # 2, 1, 0, -1, -2
    right = 4 * (1 - answer["wrong"] / answer["number"])
    return rank + right + (answer["number"] == prompt["number"]) + answer["sure"]


def make_pair(rng, prompt, *, noise=0.06):
    """A preference pair (dict), a line of train.jsonl or test.jsonl, for a prompt of `all_prompts`.

    `kind` tells in what its answers differ: style; content (nothing wrong against all wrong); slip (against one thing
    wrong); number; sure; or all. The one of more merit is chosen; with probability `noise` the other (`swapped`).
    """
    kind = rng.choices(list(PAIRS), PAIRS.values())[0]
    while True:
        a, b = draft(rng, prompt), draft(rng, prompt)
        if kind in ("content", "slip"):
            a["wrong"] = 0
            b = a | {"wrong": 1 if kind == "slip" else a["number"]}
        elif kind == "number":
            a["wrong"] = 0
            b = a | {"number": b["number"]}
        elif kind != "all":
            b = a | {kind: b[kind]}
        if merit(prompt, a) != merit(prompt, b):
            break
    if merit(prompt, a) < merit(prompt, b):
        a, b = b, a
    swapped = rng.random() < noise
    if swapped:
        a, b = b, a
    chosen, rejected = (make_answer(rng, prompt, **answer) for answer in (a, b))
    return {
        "prompt": prompt["text"],
        "chosen": chosen,
        "rejected": rejected,
        "kind": kind,
        "chosen_style": a["style"],
        "rejected_style": b["style"],
        "swapped": swapped,
    }


# ---- the tokenizer ----

SPECIAL = {
    0: "<pad>",
    1: "<eos>",
    2: "<bos>",
    3: "<unk>",
    106: "<start_of_turn>",
    107: "<end_of_turn>",
}  # Gemma's ids
TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == "system" %}{{ raise_exception("System role not supported") }}{% endif %}
    {%- if message.role != ["user", "assistant"][loop.index0 % 2] %}
        {{- raise_exception("Roles must alternate user/assistant, starting with user") }}
    {%- endif %}
    {{- "<start_of_turn>" + ("model" if message.role == "assistant" else "user") + "\\n" }}
    {{- message.content | trim + "<end_of_turn>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<start_of_turn>model\\n" }}{% endif %}
"""


def make_tokenizer(texts):
    """A tokenizer with Gemma's special ids, BOS and chat template, and a piece for each word of the texts.

    What is no such word falls back to bytes, so any text encodes, and decodes to itself.
    """
    words = collections.Counter(w for text in texts for w in re.findall(r" ?[A-Za-z]+| ?[^A-Za-z\s]", text))
    plain = [f"<0x{byte:02X}>" for byte in range(256)] + ["user", "model", "\n"]
    plain += sorted(words, key=lambda w: (-words[w], w))
    pieces = iter(plain)
    vocabulary = [SPECIAL.get(i) or next(pieces) for i in range(len(SPECIAL) + len(plain))]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -1.0) for piece in vocabulary], unk_id=3, byte_fallback=True)
    )
    # Cut at "<", or the six characters <0x41> of a text would be taken for the byte's own piece.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("<", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in SPECIAL.values()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        padding_side="left",  # Gemma's
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def make_document(rng):
    """A text (str) for pretraining: what there is of a kind at a place, in the forms that the styles use."""
    (kind, place), names = rng.choice(list(THINGS.items()))
    form = rng.choice([str, str.upper, TONGUE.get])
    return f"{kind} of the {place}: " + ", ".join(form(name) for name in rng.sample(names, len(names))) + "."


def encode(tokenizer, prompt, answer):
    """Token ids of a chat of one turn, and how many of them are the prompt's. The answer ends with <end_of_turn>."""
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    head = tokenizer(text, add_special_tokens=False).input_ids
    return head + tokenizer(answer + "<end_of_turn>", add_special_tokens=False).input_ids, len(head)


# ---- the model: pretraining, then SFT ----


def batches(rows, size, rng=None):
    """Rows [(ids, prompt length)] as batches of `size` of similar length: input_ids and labels (B, T), which rows.

    Labels are unshifted, -100 off the answer.
    Padded on the right, where a causal model is not disturbed. The order is random if an rng is given.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    if rng:
        rng.shuffle(chunks)
    for chunk in chunks:
        width = max(len(rows[i][0]) for i in chunk)
        ids, labels = torch.zeros(len(chunk), width, dtype=torch.long), torch.full((len(chunk), width), -100)
        for r, i in enumerate(chunk):
            row, start = rows[i]
            ids[r, : len(row)] = torch.tensor(row)
            labels[r, start : len(row)] = torch.tensor(row[start:])
        yield ids, labels, chunk


def train_model(model, rows, *, lr, size, rng, title):
    """One epoch of AdamW over rows [(ids, prompt length)]: cross-entropy of the answers' tokens. Changes the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    steps, cap = math.ceil(len(rows) / size), model.config.final_logit_softcapping
    bar = tqdm(batches(rows, size, rng), total=steps, desc=title, leave=False)
    for step, (ids, labels, _) in enumerate(bar):
        for group in optimizer.param_groups:  # warm-up over a tenth, then linearly down to nothing
            group["lr"] = lr * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps), 1)
        answers = labels[:, 1:] != -100
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][answers]  # (n, d)
        logits = cap * torch.tanh(model.lm_head(states) / cap)  # the head where a loss is, nowhere else
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][answers])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return loss.item()


def new_model(vocab_size):
    """Gemma-2 of 0.2 M parameters, random weights from the global generator. It takes 2,048 positions."""
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        initializer_range=0.1,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=64,
        max_position_embeddings=2048,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=[1, 107], bos_token_id=2)
    return model


# ---- the SAE: JumpReLU, trained with an L0 penalty and straight-through thresholds, as Gemma Scope's ----


class JumpReLU(torch.autograd.Function):
    """c = z where z > θ, else 0, and whether: z, θ (n, m), (m,) -> c, active (n, m).

    Neither jump has a gradient in θ; both get the straight-through one of Rajamanoharan et al. (2024), a rectangle
    of width `bandwidth` around θ: dc/dθ = -θ/ε, d active/dθ = -1/ε where |z - θ| < ε/2.
    """

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        active = z > threshold
        return torch.where(active, z, 0.0), active.float()

    @staticmethod
    def backward(ctx, grad_c, grad_active):
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.bandwidth / 2
        slope = torch.where(near, threshold * grad_c + grad_active, 0.0).sum(0) / -ctx.bandwidth
        return torch.where(z > threshold, grad_c, 0.0), slope, None


@torch.no_grad()
def response_states(model, rows, layer, site):
    """States (n, d) that an SAE of this layer and site reads: those that predict the answers' tokens of the rows.

    That is from the prompt's last token to the one before the answer's last: neither BOS nor the turn's end.
    """
    states = []
    with SiteHook(model, layer, site) as hook:
        for ids, labels, _ in batches(rows, 64):
            model.model(input_ids=ids, use_cache=False)
            states.append(hook.value[:, :-1][labels[:, 1:] != -100])
    return torch.cat(states)


def train_sae(
    states, *, rng, width=512, steps=1000, size=256, lr=1e-2, l0_weight=6e-4, bandwidth=0.03, title="SAE"
):
    """A JumpReLU SAE trained on states (n, d): the five arrays of Gemma Scope's files, a dict of tensors.

    Loss: ||h - ĥ||² + l0_weight · L0, of states scaled to a mean square norm of 1. Decoder rows have norm 1. At the end
    the scale is folded into biases and thresholds: the SAE reads states as they are, and its features have their unit.
    """
    scale = states.square().sum(-1).mean().rsqrt()
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    W_dec = torch.nn.functional.normalize(torch.randn(width, states.shape[1], generator=generator), dim=-1)
    sae = {
        "W_enc": W_dec.T.clone(),
        "W_dec": W_dec,
        "b_enc": torch.zeros(width),
        "b_dec": states.mean(0) * scale,
        "log_threshold": torch.full((width,), math.log(0.05)),
    }
    sae = {name: value.requires_grad_() for name, value in sae.items()}
    optimizer = torch.optim.Adam(sae.values(), lr=lr, betas=(0.0, 0.999), fused=True)
    bar = tqdm(range(steps), desc=title, leave=False)
    for step in bar:
        progress = step / steps
        for group in optimizer.param_groups:  # constant, then down over the last half
            group["lr"] = lr * min(1, 20 * progress + 0.05, 2.05 - 2 * progress)
        h = states[torch.randint(len(states), (size,), generator=generator)] * scale
        z = h @ sae["W_enc"] + sae["b_enc"]
        c, active = JumpReLU.apply(z, sae["log_threshold"].exp(), bandwidth)
        error = (c @ sae["W_dec"] + sae["b_dec"] - h).square().sum(-1).mean()
        l0 = active.sum(-1).mean()
        (error + min(1, 2 * progress) * l0_weight * l0).backward()  # the penalty comes in over the first half
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=-1, keepdim=True))
        if step % 50 == 0:
            bar.set_postfix(L0=f"{l0.item():.0f}", error=f"{error.item():.3f}")
    sae = {name: value.detach() for name, value in sae.items()}
    threshold = sae.pop("log_threshold").exp()
    sae["b_enc"], sae["b_dec"], sae["threshold"] = (
        x / scale for x in (sae["b_enc"], sae["b_dec"], threshold)
    )
    return sae


# ---- the world: everything in its place ----


def _log_likelihood(model, rows):
    """Mean log-probability of each row's answer tokens (len(rows),), nats."""
    means = torch.zeros(len(rows))
    with torch.no_grad():
        for ids, labels, which in batches(rows, 64):
            logps, lengths = sequence_logps(model(input_ids=ids, use_cache=False).logits, labels)
            means[which] = logps / lengths
    return means


def _sft_rows(tokenizer, prompts, seed):
    """Rows [(ids, prompt length)] of SFT, and as many more, a tenth, held out for the SAE's figures."""
    rng = random.Random(f"{seed} sft")
    drawn = [rng.choice(prompts) for _ in range(SIZES["sft"] * 11 // 10)]
    rows = [encode(tokenizer, p["text"], make_answer(rng, p, **draft(rng, p))) for p in drawn]
    return rows[: SIZES["sft"]], rows[SIZES["sft"] :]


def _prompts(seed):
    """All prompts in two lists: those of training, and those of the test pairs alone."""
    prompts = all_prompts()
    random.Random(f"{seed} prompts").shuffle(prompts)
    return prompts[SIZES["test_prompts"] :], prompts[: SIZES["test_prompts"]]


def _write_models_and_pairs(root, seed):
    """Everything but the SAEs, into the empty directory `root`. Returns the figures for toy.json."""
    rng = random.Random(f"{seed} world")
    prompts, test_prompts = _prompts(seed)
    pairs = {"train": [make_pair(rng, rng.choice(prompts)) for _ in range(SIZES["train"])]}
    pairs["test"] = [make_pair(rng, test_prompts[i % len(test_prompts)]) for i in range(SIZES["test"])]
    for name, lines in pairs.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    documents = [make_document(rng) for _ in range(SIZES["documents"])]
    texts = [pair[side] for pair in pairs["train"] for side in ("prompt", "chosen", "rejected")]
    tokenizer = make_tokenizer(documents + texts)
    model = new_model(len(tokenizer))
    rows = [(tokenizer(text + "<eos>").input_ids, 1) for text in documents]
    train_model(model, rows, lr=5e-3, size=8, rng=rng, title="pretraining")
    _save(model, tokenizer, root / "base")

    rows, _ = _sft_rows(tokenizer, prompts, seed)
    train_model(model, rows, lr=5e-3, size=8, rng=rng, title="SFT")
    _save(model, tokenizer, root / "model")

    chosen, rejected = (
        _log_likelihood(model, [encode(tokenizer, pair["prompt"], pair[side]) for pair in pairs["test"]])
        for side in ("chosen", "rejected")
    )
    return {
        "seed": seed,
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        **SIZES,
        "accuracy": (chosen > rejected).float().mean().item(),  # of the SFT model on the test pairs
        "saes": {},
    }


def _save(model, tokenizer, path):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _add_sae(root, aside, report, site, layer):
    """Trains the SAE of a site and layer of the SFT model in `root`, and puts it there, whole, from `aside`.

    Its figures, on answers it was not trained on, go into `report`, which is written: mean L0, FVU, that is
    Σ|h - ĥ|² / Σ|h - h̄|², and the share of features that never fire.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "model")
    model = Gemma2ForCausalLM.from_pretrained(root / "model", attn_implementation="eager")
    rows, held_out = _sft_rows(tokenizer, _prompts(report["seed"])[0], report["seed"])
    states = response_states(model, rows[:2000], layer, site)
    arrays = train_sae(
        states, rng=random.Random(f"{report['seed']} {site} {layer}"), title=f"SAE {site} {layer}"
    )

    sae, h = JumpReLUSAE(**arrays), response_states(model, held_out, layer, site)
    c = sae.encode(h)
    active = (c > 0).float()
    l0, dead = active.sum(-1).mean().item(), (active.sum(0) == 0).float().mean().item()
    fvu = ((sae.decode(c) - h).square().sum() / (h - h.mean(0)).square().sum()).item()

    (aside / "sae").mkdir(exist_ok=True)
    np.savez(aside / "sae" / "part.npz", **{name: array.numpy() for name, array in arrays.items()})
    folder = f"{'' if site == 'res' else site + '/'}layer_{layer}/width_{sae.m}/average_l0_{round(l0)}"
    path = root / "sae" / folder / "params.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    (aside / "sae" / "part.npz").rename(path)
    report["saes"][f"sae/{folder}/params.npz"] = {
        "site": site,
        "layer": layer,
        "l0": l0,
        "fvu": fvu,
        "dead": dead,
    }
    _write_report(root, report)


def _write_report(root, report):
    """toy.json, written aside and renamed: the last file of a world, with the digest of every other."""
    names = ["train.jsonl", "test.jsonl", *report["saes"]]
    names += [
        p.relative_to(root).as_posix() for part in ("base", "model") for p in sorted((root / part).iterdir())
    ]
    report["sha256"] = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names}
    (root / "toy.json.part").write_text(json.dumps(report, indent=2) + "\n")
    (root / "toy.json.part").rename(root / "toy.json")


def _install(new, out):
    """Moves the finished world `new` to `out`: at once where nothing is there, else part by part, toy.json last."""
    if not out.exists():
        new.rename(out)
        return
    (out / "toy.json").unlink(missing_ok=True)  # from here to the end it counts as missing
    for path in sorted(new.iterdir(), key=lambda p: p.name == "toy.json"):
        if (out / path.name).is_dir():
            shutil.rmtree(out / path.name)
        path.rename(out / path.name)


def make_world(out, *, seed=0, all_saes=False, force=False):
    """Makes the toy world in the directory `out` (about 20 s), unless it is there already; returns toy.json's dict.

    all_saes: adds residual and MLP SAEs of every layer that are missing. force: makes it anew. The same seed gives the
    same bytes, on machines whose torch computes alike. What else lies in `out`, such as trained models, stays.
    Raises ValueError where a world of another seed is there.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more don't help so small a model, and the sums would depend on their number
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with torch.random.fork_rng(devices=[]):
            if force or not (out / "toy.json").exists():
                torch.manual_seed(seed)
                new = aside / "world"
                new.mkdir()
                report = _write_models_and_pairs(new, seed)
                _add_sae(new, new, report, *SAES[0])
                _install(new, out)
            report = json.loads((out / "toy.json").read_text())
            if report["seed"] != seed:
                raise ValueError(
                    f"{out} was made with seed {report['seed']}, not {seed}; --force makes it anew"
                )
            there = [(figures["site"], figures["layer"]) for figures in report["saes"].values()]
            for site, layer in SAES if all_saes else []:
                if (site, layer) not in there:
                    _add_sae(out, aside, report, site, layer)
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(aside)
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="where to (runs/toy)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (0)")
    parser.add_argument("--all_saes", action="store_true", help="also residual and MLP SAEs of every layer")
    parser.add_argument("--force", action="store_true", help="make it anew where it is already")
    args = parser.parse_args()
    try:
        report = make_world(args.out, seed=args.seed, all_saes=args.all_saes, force=args.force)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.out}: a model of {report['parameters']:,} parameters, {report['vocabulary']} pieces")
    for path, sae in report["saes"].items():
        print(f"{path}: L0 {sae['l0']:.1f}, FVU {sae['fvu']:.1%}, {sae['dead']:.1%} of features dead")
    print(f"likelihood accuracy of the SFT model on {report['test']} test pairs: {report['accuracy']:.3f}")


if __name__ == "__main__":
    main()
