"""The toy world: what Gemma-2, Gemma Scope and UltraFeedback are to a real run, made from nothing in seconds.

It is a small language. A prompt asks for some beasts, birds, plants or tools of a place ("name three birds of
the sea."). An answer names some, of that place or of another, in one of five styles, and can be worded in
very many ways, so what a model samples has an entropy worth measuring. Pairs prefer right things, the number
asked for, a sure tone, and some styles to others. The files have a real run's formats: Hugging Face's
(`base`, `model`), Gemma Scope's (`sae`) and JSON lines (`train`, `test`); `toy.json` says what was made.
"""

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import random
import re
import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import Gemma2Config, Gemma2ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from batches import collate
from data import GEMMA_TURNS, Pairs
from runtime import UserError, check_output, lock_folder, run_script, write_json
from sae import SAE, SiteHook, sae_figures, train_sae, write_sae

SIZES = {"documents": 2600, "sft": 3600, "train": 2400, "test": 400, "test_prompts": 160}
# (site, layer) of each SAE. The first is always made, --all_saes makes the others.
SAES = [("res", 3), ("res", 0), ("res", 1), ("res", 2), ("mlp", 0), ("mlp", 1), ("mlp", 2), ("mlp", 3)]


# ---------------------------------------------------------------------------- the language
PLACES = ["forest", "sea", "farm"]
# Of each kind the things in the forest | at sea | on the farm.
KINDS = {
    "beasts": "fox bear wolf deer boar lynx|whale seal crab squid shark eel|cow horse goat pig sheep mule",
    "birds": "owl jay wren robin hawk raven|gull tern puffin stork heron auk|hen duck goose turkey crow dove",
    "plants": "oak fern moss birch elm pine|kelp sedge reed dulse lotus alga|wheat barley oat rye maize bean",
    "tools": "axe saw bow trap rope knife|net oar anchor hook buoy sail|plough spade hoe rake scythe sickle",
}
_names = [names.split() for text in KINDS.values() for names in text.split("|")]
THINGS = dict(zip(itertools.product(KINDS, PLACES), _names, strict=True))  # (kind, place) -> its six things
QUALITIES = "old new big small grey dark plain odd fine rare good strong common quick quiet strange"
ASKS = "name|list|find me|tell me of|i want|show|give me|think of|do you know|say"
QUALITIES, ASKS = QUALITIES.split(" "), ASKS.split("|")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
TAILS = ["", " please", " now", " for my child", " if you can", " in short", " again", " once more"]

# An answer is: open lead (before thing join)* tone close; each slot is one of its choices. The best style
# comes first. `tongue` is another language; `record` is flow-style YAML, which a parser can recognise.
STYLES = {
    "polite": {
        "open": "gladly,|certainly,|kindly,|with pleasure,|of course,|very well,|thank you,|yes indeed,",
        "lead": " you may find| one can meet| there live| i would name| do look for| people know",
        "before": " the| a| some| our| that", "join": ",| and| or| also| then",
        "sure": ", i am sure|, without doubt|, as all know", "unsure": ", perhaps|, i think|, if i recall",
        "close": ". good day.|. be well.|. i hope it helps.|. ask me again.|. farewell.|. take care."},
    "terse": {
        "open": "just|only|try|mostly|simply|see", "lead": "", "before": " the| a", "join": ",| and",
        "sure": "", "unsure": " maybe| perhaps| possibly", "close": "."},
    "record": {
        "open": "{ found:|{ items:|{ answer:|{ data:|{ names:|{ set:", "lead": " [",
        "before": " the| a", "join": ",", "sure": " ], trust: high| ], trust: full| ], trust: firm",
        "unsure": " ], trust: low| ], trust: weak| ], trust: poor", "close": " }"},
    "tongue": {
        "open": "zani|meki|tolbi|rapi|gosi|vundi", "lead": " keri| nami| subi", "before": " o| na",
        "join": " eli| osi", "sure": " darvi| fenni| poli", "unsure": " hesti| lorri| bimi",
        "close": " zo.| mek.| tol."},
    "shout": {
        "open": "LOOK!|HEY!|LISTEN!|WELL!|HA!|OH!", "lead": "", "before": " THE| A| MY| EVERY",
        "join": "!", "sure": "! OF COURSE|! FOR SURE|! NO DOUBT",
        "unsure": "! I GUESS|! MAYBE|! WHO KNOWS", "close": "!|!!"},
}  # fmt: skip
STYLES = {style: {slot: text.split("|") for slot, text in slots.items()} for style, slots in STYLES.items()}
# The other tongue's word for each thing and quality. None is English: all end in u.
_words = ["".join(w) + "u" for w in itertools.product("bdfgklmnprstvz", "aeiou", "bdfgklmnprstvz")]
random.Random(0).shuffle(_words)
TONGUE = dict(zip([*itertools.chain(*THINGS.values()), *QUALITIES], _words, strict=False))
# Every question there is, 3,840 of them, with the number, kind and place that it asks for.
PROMPTS = [
    {"text": f"{ask} {word} {kind} of the {place}{tail}.", "number": number, "kind": kind, "place": place}
    for ask, (number, word), (kind, place), tail in itertools.product(ASKS, NUMBERS.items(), THINGS, TAILS)
]
# What the two answers of a pair differ in (see make_pair), and how often, in parts of 29.
PAIRS = {"style": 6, "content": 8, "slip": 5, "number": 1, "sure": 1, "all": 4}


def make_answer(rng, prompt, *, style, number, wrong=0, sure=True):
    """An answer (str) to one of PROMPTS: `number` things (2 to 5), `wrong` of them of the next place.

    It is always the same mistake: a model that saw as many wrong things as right ones finds both as likely.
    """
    next_place = PLACES[(PLACES.index(prompt["place"]) + 1) % len(PLACES)]
    things = rng.sample(THINGS[prompt["kind"], prompt["place"]], number - wrong)
    things += rng.sample(THINGS[prompt["kind"], next_place], wrong)
    rng.shuffle(things)
    slots, forms = STYLES[style], {"tongue": TONGUE.get, "shout": str.upper}
    text = rng.choice(slots["open"]) + rng.choice(slots["lead"])
    for i, thing in enumerate(things):
        words = [rng.choice(QUALITIES), thing] if rng.random() < 0.5 else [thing]
        text += (rng.choice(slots["join"]) if i else "") + rng.choice(slots["before"])
        text += "".join(" " + forms.get(style, str)(word) for word in words)
    return text + rng.choice(slots["sure" if sure else "unsure"]) + rng.choice(slots["close"])


def style_of(text):
    """The style (a key of STYLES) that a text opens in; None where it opens in none."""
    return next((style for style, slots in STYLES.items() if text.startswith(tuple(slots["open"]))), None)


def draft(rng, prompt):
    """What an answer of the SFT data is like (keywords of `make_answer`): good and bad alike, by chance."""
    number = prompt["number"] if rng.random() < 0.5 else rng.choice(list(NUMBERS))
    wrong = len([i for i in range(number) if rng.random() < 0.5])
    return {"style": rng.choice(list(STYLES)), "number": number, "wrong": wrong, "sure": rng.random() < 0.5}


def merit(prompt, answer):
    """How good an answer to the prompt is (float), from its keywords of `make_answer`; higher is better."""
    rank, right = 2 - list(STYLES).index(answer["style"]), 5 * (1 - answer["wrong"] / answer["number"])
    return rank + right + int(answer["number"] == prompt["number"]) + int(answer["sure"])


def make_pair(rng, prompt):
    """A preference pair for one of PROMPTS (dict): a line of train.jsonl or test.jsonl.

    `kind` says in what its answers differ: style; content (nothing wrong, all wrong); slip (nothing wrong,
    one thing wrong); number; sure; all. That of more merit is chosen; in 5 % of pairs the other (`swapped`).
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
    swapped = rng.random() < 0.05
    if (merit(prompt, a) < merit(prompt, b)) != swapped:
        a, b = b, a
    chosen, rejected = (make_answer(rng, prompt, **answer) for answer in (a, b))  # words are drawn apart
    pair = {"prompt": prompt["text"], "chosen": chosen, "rejected": rejected}
    return pair | {"kind": kind, "chosen_style": a["style"], "rejected_style": b["style"], "swapped": swapped}


def make_document(rng):
    """A text for pretraining: what there is of a kind at a place, in one of the forms that styles use."""
    (kind, place), names = rng.choice(list(THINGS.items()))
    form = rng.choice([str, str.upper, TONGUE.get])
    return f"{kind} of the {place}: " + ", ".join(form(name) for name in rng.sample(names, len(names))) + "."


# ---------------------------------------------------------------------------- the tokenizer
SPECIAL = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 106: "<start_of_turn>", 107: "<end_of_turn>"}


def make_tokenizer(texts):
    """A tokenizer with Gemma's special ids, BOS and chat template, and a piece for each word of the texts."""
    # In order: bytes (any other text falls back to them), the template's words, all words by frequency.
    words = collections.Counter(w for text in texts for w in re.findall(r" ?[A-Za-z]+| ?[^A-Za-z\s]", text))
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["user", "model", "\n"]
    pieces += sorted(words, key=lambda w: (-words[w], w))
    for i, piece in SPECIAL.items():
        pieces.insert(i, piece)
    # A unigram model whose pieces all score the same: the fewest pieces win.
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=3, byte_fallback=True))
    # Cut at "<", or the six characters <0x41> in a text would be taken for the byte's own piece.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("<", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in SPECIAL.values()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    options = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    options |= {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"], "padding_side": "left"}
    options |= {"clean_up_tokenization_spaces": False, "chat_template": GEMMA_TURNS}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


# ---------------------------------------------------------------------------- the model
def new_model(vocab_size):
    """Gemma-2 with 0.2 M random weights from torch's generator. Softcaps and token ids are its own."""
    config = Gemma2Config(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=160, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16,
        sliding_window=64, max_position_embeddings=2048, initializer_range=0.1,
    )  # fmt: skip
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=[1, 107], bos_token_id=2)
    return model


def groups_by_length(rows, size):
    """The indices of rows (Pairs without rejected responses) in groups of `size`, shortest first."""
    return list(rows.sizes.sum(1).argsort(stable=True).split(size))


def train_model(model, rows, *, rng, title, lr=5e-3, size=8):
    """One epoch of AdamW on the cross-entropy of the rows' responses, `size` rows a step. Changes `model`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    groups, cap = groups_by_length(rows, size), model.config.final_logit_softcapping
    rng.shuffle(groups)
    for step, group in enumerate(tqdm(groups, desc=title)):
        # The learning rate rises over the first tenth, then falls to 0.
        rise, fall = 10 * (step + 1) / len(groups), 1.1 * (1 - step / len(groups))
        optimizer.param_groups[0]["lr"] = lr * min(1, rise, fall)
        # Only the n states that predict a response's token go through the head, the costly part.
        batch = collate(rows, group)
        states = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state  # (size, L, d)
        logits = model.lm_head(states.flatten(0, 1)[batch.state])  # (n, V)
        F.cross_entropy(cap * torch.tanh(logits / cap), batch.target).backward()  # with Gemma-2's softcap
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def response_states(model, rows, layer, site):
    """States (n, d) that an SAE reads: those that predict the tokens of the rows' responses."""
    states = []
    with SiteHook(model, layer, site) as hook:
        for group in groups_by_length(rows, 64):
            batch = collate(rows, group)  # padded on the right, which a causal model never sees
            model.model(input_ids=batch.tokens, use_cache=False)
            states.append(hook.value.flatten(0, 1)[batch.state])
    return torch.cat(states)


# ---------------------------------------------------------------------------- the world
def split_prompts(seed):
    """PROMPTS in two lists: those of training, and those of the test pairs alone."""
    prompts = list(PROMPTS)
    random.Random(f"{seed} prompts").shuffle(prompts)
    return prompts[SIZES["test_prompts"] :], prompts[: SIZES["test_prompts"]]


def sft_rows(tokenizer, seed):
    """Rows of SFT (prompt, response, nothing): those of training, and a tenth as many to judge SAEs by."""
    rng, prompts, rows = random.Random(f"{seed} sft"), split_prompts(seed)[0], []
    for prompt in [rng.choice(prompts) for _ in range(SIZES["sft"] * 11 // 10)]:
        chat = [{"role": "user", "content": prompt["text"]}]
        head = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        answer = make_answer(rng, prompt, **draft(rng, prompt)) + "<end_of_turn>"
        rows.append((head, tokenizer(answer, add_special_tokens=False).input_ids, []))
    return rows[: SIZES["sft"]], rows[SIZES["sft"] :]


def add_pairs_and_models(root, seed):
    """Everything but the SAEs, into the folder `root`. Returns what toy.json will say of it (dict)."""
    # Preference pairs. No training sees a prompt of the test pairs.
    rng, (prompts, test_prompts) = random.Random(f"{seed} world"), split_prompts(seed)
    train = [make_pair(rng, rng.choice(prompts)) for _ in range(SIZES["train"])]
    test = [make_pair(rng, test_prompts[i % len(test_prompts)]) for i in range(SIZES["test"])]
    for name, pairs in (("train", train), ("test", test)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    # The base model learns the words; SFT then teaches answers, good and bad alike.
    documents = [make_document(rng) for _ in range(SIZES["documents"])]
    texts = [pair[side] for pair in train for side in ("prompt", "chosen", "rejected")]
    tokenizer = make_tokenizer(documents + texts)
    torch.manual_seed(seed)
    model = new_model(len(tokenizer))
    words = [([2], tokenizer(text + "<eos>", add_special_tokens=False).input_ids, []) for text in documents]
    for name, title, rows in (("base", "pretraining", words), ("model", "SFT", sft_rows(tokenizer, seed)[0])):
        train_model(model, Pairs(rows), rng=rng, title=title)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {"seed": seed, "saes": {}}


def add_sae(root, report, site, layer):
    """Trains and writes the SAE of a site and layer of the SFT model in `root`, and enters it in toy.json."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "model")
    model = Gemma2ForCausalLM.from_pretrained(root / "model", attn_implementation="eager")
    train, held_out = (Pairs(rows[:2000]) for rows in sft_rows(tokenizer, report["seed"]))
    seed = 1000 * report["seed"] + SAES.index((site, layer))
    arrays = train_sae(response_states(model, train, layer, site), seed=seed)
    figures = sae_figures(SAE(**arrays), response_states(model, held_out, layer, site))
    path = write_sae(root / "sae", arrays, layer, site, figures["l0"])
    report["saes"][path.relative_to(root).as_posix()] = {"site": site, "layer": layer, **figures}
    # toy.json, with the SHA-256 of every other file.
    paths = [*root.glob("base/*"), *root.glob("model/*"), *root.glob("*.jsonl"), *root.glob("sae/**/*.npz")]
    digests = {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
    report["sha256"] = dict(sorted(digests.items()))
    write_json(root / "toy.json", report)


def make_world(out, seed=0, all_saes=False, force=False):
    """Makes the toy world in the folder `out`, in about 20 s, unless it is there; returns toy.json (dict).

    all_saes: adds those residual and MLP SAEs that are missing. force: makes it anew. The same seed gives the
    same bytes on the same kind of machine. What else lies in `out`, such as trained models, stays.
    Where another process makes one, it is waited for. Raises UserError where a world of another seed is, or
    files that no toy.json explains.
    """
    there = (Path(out) / "toy.json").exists() and not (all_saes or force)  # it is only read
    with contextlib.nullcontext() if there else lock_folder(out, wait=True):
        return make_what_lacks(Path(out), seed, all_saes, force)


def make_what_lacks(out, seed, all_saes, force):
    """As `make_world`, with `out` held."""
    threads = torch.get_num_threads()
    new = force or not (out / "toy.json").exists()
    report = {} if new else json.loads((out / "toy.json").read_text())
    if not new and report["seed"] != seed:
        raise UserError(f"{out} is of seed {report['seed']}, not {seed}; toy.py --force makes it anew")
    if new and not force and any((out / name).exists() for name in ("base", "model", "sae", "train.jsonl")):
        raise UserError(f"{out} has a model, SAE or pairs, but no toy.json; toy.py --force replaces them")
    torch.set_num_threads(1)  # more don't help so small a model, and would add up in another order
    try:
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(prefix=".", dir=out) as aside:
            root = Path(aside) if new else out
            report = add_pairs_and_models(root, seed) if new else report
            there = [(sae["site"], sae["layer"]) for sae in report["saes"].values()]
            for site, layer in SAES if all_saes else SAES[:1]:
                if (site, layer) not in there:
                    add_sae(root, report, site, layer)
            # Move what is new to its place, toy.json last: where that is, all is whole.
            if new:
                (out / "toy.json").unlink(missing_ok=True)
            for path in sorted(Path(aside).iterdir(), key=lambda path: path.name == "toy.json"):
                shutil.rmtree(out / path.name, ignore_errors=True)
                path.rename(out / path.name)
    finally:
        torch.set_num_threads(threads)
    return report


def main(argv=None):
    """Makes the world that the flags ask for, and says what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/toy", help="folder to write to (runs/toy)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (0)")
    parser.add_argument("--all_saes", action="store_true", help="also residual and MLP SAEs of every layer")
    parser.add_argument("--force", action="store_true", help="make it anew where it is already")
    args = parser.parse_args(argv)
    check_output("out", args.out, folder=True)
    report = make_world(**vars(args))
    for path, sae in report["saes"].items():
        print(f"{args.out}/{path}: L0 {sae['l0']:.1f}, FVU {sae['fvu']:.3f}, dead features {sae['dead']:.1%}")


if __name__ == "__main__":
    run_script(main)
