"""The toy world: what Gemma-2, Gemma Scope and UltraFeedback are to a real run, made from nothing in seconds.

    python toy.py --out runs/toy              # base model, SFT model, SAE of the last layer, preference pairs
    python toy.py --out runs/toy --all_saes   # adds residual and MLP SAEs of every layer

The world is a small language. A prompt asks for some beasts, birds, plants or tools of a place ("name three
birds of the sea."). An answer names some, of that place or of another, in one of five styles. Equally good
answers can be worded in very many ways, so what a model samples has an entropy worth measuring. Pairs prefer
right things, the number asked for, a sure tone, and some styles to others; a few are swapped.

The formats are the real ones: Hugging Face directories (`base`, `model`), Gemma Scope's layout (`sae`), one
JSON object a line (`train.jsonl`, `test.jsonl`). `toy.json` says what was made; where it is, all is whole.
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
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import Gemma2Config, Gemma2ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import presets
from losses import sequence_logps
from sae import JumpReLUSAE, SiteHook

SIZES = {"documents": 2600, "sft": 3600, "train": 2400, "test": 400, "test_prompts": 160}
LAYERS = 4
SAES = [("res", LAYERS - 1)]  # always made; --all_saes makes the rest
SAES += [(site, layer) for site in ("res", "mlp") for layer in range(LAYERS) if (site, layer) not in SAES]

# ---- the language ----

PLACES = ["forest", "sea", "farm"]
# Each kind: its things in the forest | at sea | on the farm.
THINGS = {
    "beasts": "fox bear wolf deer boar lynx|whale seal crab squid shark eel|cow horse goat pig sheep mule",
    "birds": "owl jay wren robin hawk raven|gull tern puffin stork heron auk|hen duck goose turkey crow dove",
    "plants": "oak fern moss birch elm pine|kelp sedge reed dulse lotus alga|wheat barley oat rye maize bean",
    "tools": "axe saw bow trap rope knife|net oar anchor hook buoy sail|plough spade hoe rake scythe sickle",
}
THINGS = {
    (kind, place): names.split()
    for kind, text in THINGS.items()
    for place, names in zip(PLACES, text.split("|"), strict=True)
}
QUALITIES = "old new big small grey dark plain odd fine rare good strong common quick quiet strange"
QUALITIES = QUALITIES.split(" ")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
ASKS = "name|list|find me|tell me of|i want|show|give me|think of|do you know|say"
ASKS = ASKS.split("|")
TAILS = ["", " please", " now", " for my child", " if you can", " in short", " again", " once more"]

# An answer is: open lead (before thing join)* tone close. Each slot is one of its choices, freely. The best
# style comes first. `tongue` is another language; `record` is flow-style YAML, so that a parser can tell it.
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
        "before": " the| a",
        "join": ",| and",
        "sure": "",
        "unsure": " maybe| perhaps| possibly",
        "close": ".",
    },
    "record": {
        "open": "{ found:|{ items:|{ answer:|{ data:|{ names:|{ set:",
        "lead": " [",
        "before": " the| a",
        "join": ",",
        "sure": " ], trust: high| ], trust: full| ], trust: firm",
        "unsure": " ], trust: low| ], trust: weak| ], trust: poor",
        "close": " }",
    },
    "tongue": {
        "open": "zani|meki|tolbi|rapi|gosi|vundi",
        "lead": " keri| nami| subi",
        "before": " o| na",
        "join": " eli| osi",
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
STYLES = {style: {slot: text.split("|") for slot, text in slots.items()} for style, slots in STYLES.items()}

# The other tongue's word for each thing and quality. None is English: all end in u.
_made_up = [
    "".join(letters) + "u" for letters in itertools.product("bdfgklmnprstvz", "aeiou", "bdfgklmnprstvz")
]
random.Random(0).shuffle(_made_up)
TONGUE = dict(zip([*itertools.chain(*THINGS.values()), *QUALITIES], _made_up, strict=False))

# Kinds of pairs (see make_pair) and their shares.
PAIRS = {"style": 6, "content": 8, "slip": 5, "number": 1, "sure": 1, "all": 4}


def all_prompts():
    """Every question there is, 3,840 dicts: its `text`, and the `number`, `kind` and `place` asked for."""
    return [
        {"text": f"{ask} {word} {kind} of the {place}{tail}.", "number": number, "kind": kind, "place": place}
        for ask, (number, word), (kind, place), tail in itertools.product(
            ASKS, NUMBERS.items(), THINGS, TAILS
        )
    ]


def make_answer(rng, prompt, *, style, number, wrong=0, sure=True):
    """An answer (str) to one of `all_prompts`, in a style of STYLES, its words drawn from `rng`.

    number: how many things it names (2 to 5). wrong: how many of them are of the next place; always the same
    mistake, so a model that saw as many wrong things as right ones finds them equally likely. sure: its tone.
    """
    next_place = PLACES[(PLACES.index(prompt["place"]) + 1) % len(PLACES)]
    things = rng.sample(THINGS[prompt["kind"], prompt["place"]], number - wrong)
    things += rng.sample(THINGS[prompt["kind"], next_place], wrong)
    rng.shuffle(things)
    slots = STYLES[style]
    text = rng.choice(slots["open"]) + rng.choice(slots["lead"])
    for i, thing in enumerate(things):
        words = [rng.choice(QUALITIES), thing] if rng.random() < 0.5 else [thing]
        words = [TONGUE[w] if style == "tongue" else w.upper() if style == "shout" else w for w in words]
        join = rng.choice(slots["join"]) if i else ""
        text += join + rng.choice(slots["before"]) + " " + " ".join(words)
    return text + rng.choice(slots["sure" if sure else "unsure"]) + rng.choice(slots["close"])


def style_of(text):
    """The style (a key of STYLES) that a text opens in; None where it opens in none."""
    openings = {style: tuple(slots["open"]) for style, slots in STYLES.items()}
    return next((style for style, starts in openings.items() if text.startswith(starts)), None)


def draft(rng, prompt):
    """What an answer of the SFT data is like (keywords of `make_answer`): good and bad alike, by chance."""
    number = prompt["number"] if rng.random() < 0.5 else rng.choice(list(NUMBERS))
    wrong = sum(rng.random() < 0.5 for _ in range(number))
    return {"style": rng.choice(list(STYLES)), "number": number, "wrong": wrong, "sure": rng.random() < 0.5}


def merit(prompt, answer):
    """How good an answer to the prompt is (float), from its keywords of `make_answer`; higher is better."""
    rank = 2 - list(STYLES).index(answer["style"])  # 2, 1, 0, -1, -2
    right = 5 * (1 - answer["wrong"] / answer["number"])
    return rank + right + (answer["number"] == prompt["number"]) + answer["sure"]


def make_pair(rng, prompt, *, noise=0.05):
    """A preference pair for one of `all_prompts` (dict): a line of train.jsonl or test.jsonl.

    `kind` says in what its answers differ: style; content (nothing wrong, all wrong); slip (nothing wrong,
    one thing wrong); number; sure; all. The one of more merit is chosen; with probability `noise` the other
    (`swapped`). The answers' words are drawn apart, so their things and lengths differ too.
    """
    kind = rng.choices(list(PAIRS), PAIRS.values())[0]
    while True:
        a, b = draft(rng, prompt), draft(rng, prompt)
        if kind in ("content", "slip", "number"):
            a["wrong"] = 0
        changed = {"content": {"wrong": a["number"]}, "slip": {"wrong": 1}, "all": b}
        b = a | (changed[kind] if kind in changed else {kind: b[kind]})
        if abs(merit(prompt, a) - merit(prompt, b)) >= (2 if kind == "all" else 1):  # no near ties
            break
    swapped = rng.random() < noise
    if (merit(prompt, a) < merit(prompt, b)) != swapped:
        a, b = b, a
    chosen, rejected = (make_answer(rng, prompt, **answer) for answer in (a, b))
    pair = {"prompt": prompt["text"], "chosen": chosen, "rejected": rejected}
    return pair | {"kind": kind, "chosen_style": a["style"], "rejected_style": b["style"], "swapped": swapped}


def make_document(rng):
    """A text for pretraining: what there is of a kind at a place, in one of the forms that styles use."""
    (kind, place), names = rng.choice(list(THINGS.items()))
    form = rng.choice([str, str.upper, TONGUE.get])
    return f"{kind} of the {place}: " + ", ".join(form(name) for name in rng.sample(names, len(names))) + "."


# ---- the tokenizer ----

SPECIAL = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 106: "<start_of_turn>", 107: "<end_of_turn>"}
TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == "system" %}{{ raise_exception("System role not supported") }}{% endif %}
    {%- if message.role != ["user", "assistant"][loop.index0 % 2] %}
        {{- raise_exception("Roles must alternate: user, assistant, user, ...") }}
    {%- endif %}
    {{- "<start_of_turn>" + ("model" if message.role == "assistant" else "user") + "\\n" }}
    {{- message.content | trim + "<end_of_turn>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<start_of_turn>model\\n" }}{% endif %}"""


def make_tokenizer(texts):
    """A tokenizer with Gemma's special ids, BOS and chat template, and a piece for each word of the texts.

    What is no such word falls back to bytes, so that any text encodes, and decodes to itself.
    """
    words = collections.Counter(w for text in texts for w in re.findall(r" ?[A-Za-z]+| ?[^A-Za-z\s]", text))
    plain = [f"<0x{byte:02X}>" for byte in range(256)] + ["user", "model", "\n"]
    plain += sorted(words, key=lambda w: (-words[w], w))  # the most frequent first
    rest = iter(plain)
    pieces = [SPECIAL.get(i) or next(rest) for i in range(len(SPECIAL) + len(plain))]
    # Equal scores: the fewest pieces win.
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=3, byte_fallback=True))
    # Cut at "<", or the six characters <0x41> in a text would be taken for the byte's own piece.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("<", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in SPECIAL.values()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        padding_side="left",  # Gemma's
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def encode(tokenizer, prompt, answer):
    """Token ids of a chat of one turn that ends in <end_of_turn>, and how many of them are the prompt's."""
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    head = tokenizer(text, add_special_tokens=False).input_ids
    return head + tokenizer(answer + "<end_of_turn>", add_special_tokens=False).input_ids, len(head)


# ---- the model: pretraining and SFT are one loop over rows [(token ids, prompt length)] ----


def new_model(vocab_size):
    """Gemma-2 with 0.2 M random weights, from torch's global generator. It takes 2,048 positions."""
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": LAYERS, "sliding_window": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
    # Softcaps 50 and 30, tied embeddings and the ids of pad, eos, bos are the class's defaults, as Gemma-2's.
    config = Gemma2Config(
        vocab_size=vocab_size, max_position_embeddings=2048, initializer_range=0.1, **shape, **heads
    )
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=[1, 107], bos_token_id=2)
    return model


def batches(rows, size, rng=None):
    """Yields batches of `size` rows of like length: input_ids (B, T), labels (B, T), the rows' indices.

    Labels are unshifted, -100 on prompt and padding, which is on the right: a causal model never sees it.
    Shortest first, or in random order if an rng is given.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    if rng:
        rng.shuffle(groups)
    for group in groups:
        width = max(len(rows[i][0]) for i in group)
        ids = torch.tensor([rows[i][0] + [0] * (width - len(rows[i][0])) for i in group])
        position, starts = torch.arange(width), torch.tensor([[rows[i][1]] for i in group])
        ends = torch.tensor([[len(rows[i][0])] for i in group])
        yield ids, ids.masked_fill((position < starts) | (position >= ends), -100), group


def train_model(model, rows, *, lr, size, rng, title):
    """One epoch of AdamW on the cross-entropy of the rows' answers, `size` rows a step. Changes the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    steps, cap = math.ceil(len(rows) / size), model.config.final_logit_softcapping
    bar = tqdm(batches(rows, size, rng), total=steps, desc=title)
    for step, (ids, labels, _) in enumerate(bar):
        optimizer.param_groups[0]["lr"] = lr * min(1, 10 * (step + 1) / steps, 1.1 * (1 - step / steps))
        targets = labels[:, 1:]
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][
            targets != -100
        ]  # (n, d)
        # (n, V): the head only where there is a target, with Gemma-2's softcap.
        logits = cap * torch.tanh(model.lm_head(states) / cap)
        loss = F.cross_entropy(logits, targets[targets != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")


# ---- the SAE: JumpReLU, trained like Gemma Scope's with an L0 penalty and straight-through thresholds ----


class JumpReLU(torch.autograd.Function):
    """z (n, m), θ (m,), ε -> c = z where z > θ, else 0 (n, m), and H(z - θ) (n, m), whose sum over m is L0.

    Their jumps have no gradient in θ. Both get the straight-through one of Rajamanoharan et al. (2024), with
    a rectangle of width ε as its kernel: dc/dθ = -θ/ε and dH/dθ = -1/ε where |z - θ| < ε/2, else 0.
    """

    @staticmethod
    def forward(ctx, z, theta, epsilon):
        ctx.save_for_backward(z, theta)
        ctx.epsilon = epsilon
        return torch.where(z > theta, z, 0.0), (z > theta).float()

    @staticmethod
    def backward(ctx, grad_c, grad_active):
        z, theta = ctx.saved_tensors
        near = (z - theta).abs() < ctx.epsilon / 2
        grad_theta = torch.where(near, theta * grad_c + grad_active, 0.0).sum(0) / -ctx.epsilon
        return torch.where(z > theta, grad_c, 0.0), grad_theta, None


@torch.no_grad()
def response_states(model, rows, layer, site):
    """States (n, d) that an SAE of this layer and site reads: those that predict the rows' answers' tokens.

    That is, from the prompt's last token to the one before the answer's last: neither BOS nor the turn's end.
    """
    states = []
    with SiteHook(model, layer, site) as hook:
        for ids, labels, _ in batches(rows, 64):
            model.model(input_ids=ids, use_cache=False)
            states.append(hook.value[:, :-1][labels[:, 1:] != -100])
    return torch.cat(states)


def train_sae(states, *, seed, title, m=512, steps=1000, size=256, lr=1e-2, l0_weight=6e-4, epsilon=0.03):
    """A JumpReLU SAE of width m trained on states (n, d): Gemma Scope's five arrays, a dict of tensors.

    Loss: |h - ĥ|² + l0_weight · L0, of states scaled to a mean |h|² of 1; decoder rows have norm 1. At the
    end the scale goes into biases and thresholds: the SAE reads states as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = states.square().sum(-1).mean().rsqrt()
    W_dec = F.normalize(torch.randn(m, states.shape[1], generator=generator), dim=-1)
    W_enc, b_enc, b_dec = W_dec.T.clone(), torch.zeros(m), states.mean(0) * scale
    log_theta = torch.full((m,), math.log(0.05))
    parameters = [p.requires_grad_() for p in (W_enc, b_enc, W_dec, b_dec, log_theta)]
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.0, 0.999), fused=True)
    bar = tqdm(range(steps), desc=title)
    for step in bar:
        # The rate falls over the last half; the penalty comes in over the first.
        optimizer.param_groups[0]["lr"] = lr * min(1, 20 * (step + 1) / steps, 2 * (1 - step / steps))
        penalty = l0_weight * min(1, 2 * step / steps)
        h = scale * states[torch.randint(len(states), (size,), generator=generator)]
        c, active = JumpReLU.apply(h @ W_enc + b_enc, log_theta.exp(), epsilon)
        error = (c @ W_dec + b_dec - h).square().sum(-1).mean()
        l0 = active.sum(-1).mean()
        (error + penalty * l0).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=-1, keepdim=True)
        if step % 50 == 0:
            bar.set_postfix(L0=f"{l0.item():.0f}", error=f"{error.item():.3f}")
    arrays = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc / scale, "b_dec": b_dec / scale}
    return {name: x.detach() for name, x in (arrays | {"threshold": log_theta.exp() / scale}).items()}


# ---- the world: everything in its place ----


def _split_prompts(seed):
    """All prompts in two lists: those of training, and those of the test pairs alone."""
    prompts = all_prompts()
    random.Random(f"{seed} prompts").shuffle(prompts)
    return prompts[SIZES["test_prompts"] :], prompts[: SIZES["test_prompts"]]


def _sft_rows(tokenizer, seed):
    """Rows [(token ids, prompt length)] of SFT, and a tenth as many that no training sees."""
    rng, (prompts, _) = random.Random(f"{seed} sft"), _split_prompts(seed)
    drawn = [rng.choice(prompts) for _ in range(SIZES["sft"] * 11 // 10)]
    rows = [encode(tokenizer, p["text"], make_answer(rng, p, **draft(rng, p))) for p in drawn]
    return rows[: SIZES["sft"]], rows[SIZES["sft"] :]


@torch.no_grad()
def _mean_logps(model, rows):
    """Mean log-probability (nats) of the tokens of each row's answer (len(rows),)."""
    means = torch.zeros(len(rows))
    for ids, labels, which in batches(rows, 64):
        logps, lengths = sequence_logps(model(input_ids=ids, use_cache=False).logits, labels)
        means[which] = logps / lengths
    return means


def _write_models_and_pairs(root, seed):
    """Everything but the SAEs, into the empty directory `root`. Returns what toy.json says of it (dict)."""
    rng, (prompts, test_prompts) = random.Random(f"{seed} world"), _split_prompts(seed)
    train = [make_pair(rng, rng.choice(prompts)) for _ in range(SIZES["train"])]
    test = [make_pair(rng, test_prompts[i % len(test_prompts)]) for i in range(SIZES["test"])]
    for name, pairs in (("train", train), ("test", test)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    documents = [make_document(rng) for _ in range(SIZES["documents"])]
    tokenizer = make_tokenizer(
        documents + [pair[side] for pair in train for side in ("prompt", "chosen", "rejected")]
    )
    model = new_model(len(tokenizer))
    rows = [(tokenizer(text + "<eos>").input_ids, 1) for text in documents]
    train_model(model, rows, lr=5e-3, size=8, rng=rng, title="pretraining")
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")

    train_model(model, _sft_rows(tokenizer, seed)[0], lr=5e-3, size=8, rng=rng, title="SFT")
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")

    chosen, rejected = (
        _mean_logps(model, [encode(tokenizer, pair["prompt"], pair[side]) for pair in test])
        for side in ("chosen", "rejected")
    )
    accuracy = (chosen > rejected).float().mean().item()  # of the SFT model, on the test pairs
    made = {"seed": seed, "parameters": model.num_parameters(), "vocabulary": len(tokenizer), **SIZES}
    return made | {"accuracy": accuracy, "saes": {}}


def _add_sae(root, aside, report, site, layer):
    """Trains the SAE of a site and layer of the SFT model in `root` and moves it there, whole, from `aside`.

    Writes its figures, on answers it was not trained on, into `report` and toy.json: mean L0, FVU (fraction
    of variance unexplained) Σ|h - ĥ|² / Σ|h - h̄|², and the share of features that never fire.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "model")
    model = Gemma2ForCausalLM.from_pretrained(root / "model", attn_implementation="eager")
    rows, held_out = _sft_rows(tokenizer, report["seed"])
    states, h = (response_states(model, r, layer, site) for r in (rows[:2000], held_out))
    arrays = train_sae(
        states, seed=1000 * report["seed"] + SAES.index((site, layer)), title=f"SAE {site} {layer}"
    )

    sae = JumpReLUSAE(**arrays)
    c = sae.encode(h)
    l0, dead = (c > 0).float().sum(-1).mean().item(), (c == 0).all(0).float().mean().item()
    fvu = ((sae.decode(c) - h).square().sum() / (h - h.mean(0)).square().sum()).item()

    np.savez(aside / "params.npz", **{name: array.numpy() for name, array in arrays.items()})
    folder = f"sae/{'' if site == 'res' else site + '/'}layer_{layer}/width_{sae.m}/average_l0_{round(l0)}"
    (root / folder).mkdir(parents=True, exist_ok=True)
    (aside / "params.npz").rename(root / folder / "params.npz")
    report["saes"][f"{folder}/params.npz"] = {
        "site": site,
        "layer": layer,
        "l0": l0,
        "fvu": fvu,
        "dead": dead,
    }
    _write_report(root, report)


def _write_report(root, report):
    """Writes toy.json, aside and renamed, with the SHA-256 of every other file of the world."""
    paths = [
        *root.glob("base/*"),
        *root.glob("model/*"),
        *root.glob("*.jsonl"),
        *(root / p for p in report["saes"]),
    ]
    digests = {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(paths)
    }
    (root / "toy.json.part").write_text(json.dumps(report | {"sha256": digests}, indent=2) + "\n")
    (root / "toy.json.part").rename(root / "toy.json")


def _install(new, out):
    """Moves a finished world to `out`: at once where nothing is, else part by part, toy.json last."""
    if not out.exists():
        new.rename(out)
        return
    (out / "toy.json").unlink(missing_ok=True)  # from here to the end it counts as missing
    for path in sorted(new.iterdir(), key=lambda p: p.name == "toy.json"):
        if (out / path.name).is_dir():
            shutil.rmtree(out / path.name)
        path.rename(out / path.name)


def make_world(out, *, seed=0, all_saes=False, force=False):
    """Makes the toy world in the directory `out`, in about 20 s, unless it is there; returns toy.json (dict).

    all_saes: adds those residual and MLP SAEs of every layer that are missing. force: makes it anew. The same
    seed gives the same bytes on the same kind of machine. What else lies in `out`, such as trained models,
    stays. torch's random state and threads are as before afterwards.
    Raises ValueError where a world of another seed is.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more don't help so small a model, and would add up in another order
    try:
        with torch.random.fork_rng(devices=[]):
            if force or not (out / "toy.json").exists():
                torch.manual_seed(seed)
                (aside / "world").mkdir()
                report = _write_models_and_pairs(aside / "world", seed)
                _add_sae(aside / "world", aside, report, *SAES[0])
                _install(aside / "world", out)
            report = json.loads((out / "toy.json").read_text())
            if report["seed"] != seed:
                raise ValueError(
                    f"{out} was made with seed {report['seed']}, not {seed}; --force makes it anew"
                )
            there = [(sae["site"], sae["layer"]) for sae in report["saes"].values()]
            for site, layer in SAES if all_saes else []:
                if (site, layer) not in there:
                    _add_sae(out, aside, report, site, layer)
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(aside)
    return json.loads((out / "toy.json").read_text())


def main(argv=None):
    """Make the world that the flags ask for, and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/toy", help="directory to write to (runs/toy)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (0)")
    parser.add_argument("--all_saes", action="store_true", help="also residual and MLP SAEs of every layer")
    parser.add_argument("--force", action="store_true", help="make it anew where it is already")
    with presets.one_line_errors():
        args = presets.parse_flags(parser, argv)
        presets.check_output("out", args.out, folder=True)
        report = make_world(args.out, seed=args.seed, all_saes=args.all_saes, force=args.force)
    print(f"{args.out}: a model of {report['parameters']:,} parameters and {report['vocabulary']} pieces")
    for path, sae in report["saes"].items():
        print(f"{path}: L0 {sae['l0']:.1f}, FVU {sae['fvu']:.1%}, {sae['dead']:.1%} of features dead")
    print(f"likelihood accuracy of the SFT model on {report['test']} test pairs: {report['accuracy']:.3f}")


if __name__ == "__main__":
    main()
