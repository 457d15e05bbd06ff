"""The toy world: what Gemma-2, Gemma Scope and UltraFeedback are to a real run, made from nothing in seconds.

    python toy.py --out runs/toy              # base model, SFT model, SAE of the last layer, preference pairs
    python toy.py --out runs/toy --all_saes   # adds residual and MLP SAEs of every layer

The world is a small language. A prompt asks for some living or made things of a place ("name three birds of the sea.");
an answer lists some, in one of five styles, with the right things or with those of another place. Answers that are
equally good can be worded in very many ways, so what a model samples has an entropy worth measuring. Pairs prefer
right content, the count that was asked for, a sure tone, and some styles to others; a few labels are swapped.

Files have the formats of the real ones: Hugging Face directories (`base/`, `model/`), Gemma Scope's layout (`sae/`),
one JSON object a line (`train.jsonl`, `test.jsonl`). `toy.json` says what was made; where it stands, the world is whole.
"""

import argparse
import collections
import hashlib
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

THREADS = 2  # fixed: the number of threads decides how sums are split, and so the last bits of the weights
SITES = {"res": "model.layers.{}", "mlp": "model.layers.{}.post_feedforward_layernorm"}  # what an SAE reads


# ---------------------------------------------------------------- the language

THINGS = {  # (kind, place): its eight members
    ("beasts", "forest"): "fox bear wolf deer boar lynx badger hare",
    ("beasts", "sea"): "whale seal crab squid shark eel ray cod",
    ("beasts", "farm"): "cow horse goat pig sheep mule ox lamb",
    ("birds", "forest"): "owl jay wren robin hawk raven thrush finch",
    ("birds", "sea"): "gull tern puffin pelican heron gannet auk petrel",
    ("birds", "farm"): "hen duck goose turkey swallow dove crow sparrow",
    ("plants", "forest"): "oak fern moss birch elm pine ivy yew",
    ("plants", "sea"): "kelp sedge reed dulse lotus alga mangrove eelgrass",
    ("plants", "farm"): "wheat barley oat rye maize bean clover flax",
    ("tools", "forest"): "axe saw bow trap rope knife spear ladder",
    ("tools", "sea"): "net oar anchor hook buoy sail mast rudder",
    ("tools", "farm"): "plough spade hoe rake scythe sickle fork churn",
}
THINGS = {topic: names.split() for topic, names in THINGS.items()}
KINDS, PLACES = ["beasts", "birds", "plants", "tools"], ["forest", "sea", "farm"]
QUALITIES = "old new big small grey dark plain odd fine rare good strong common quick quiet strange".split()
STYLES = ["polite", "record", "terse", "shout", "tongue"]
ASKS = [
    "name",
    "list",
    "find me",
    "tell me of",
    "i want",
    "show",
    "give me",
    "think of",
    "do you know",
    "say",
]
TAILS = ["", " please", " now", " for my child", " if you can", " in short", " again", " once more"]
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}


def _made_up_words():
    """The other tongue: a word for each thing and quality, and `so`-like particles, none of them English."""
    words = [a + b + c + "u" for a in "bdfgklmnprstvz" for b in "aeiou" for c in "bdfgklmnprstvz"]
    random.Random(0).shuffle(words)
    meanings = [name for names in THINGS.values() for name in names] + QUALITIES
    particles = ["open", "join", "sure", "unsure", "close"]
    tongue = dict(zip(meanings, words, strict=False))
    rest = words[len(meanings) :]
    return tongue | {"<" + p + ">": rest[6 * i : 6 * i + 6] for i, p in enumerate(particles)}


TONGUE = _made_up_words()


def make_prompt(rng):
    """One question: `{"text", "number", "kind", "place"}`; 7,680 different ones."""
    number, kind, place = rng.choice(list(NUMBERS)), rng.choice(KINDS), rng.choice(PLACES)
    text = f"{rng.choice(ASKS)} {NUMBERS[number]} {kind} of the {place}{rng.choice(TAILS)}."
    return {"text": text, "number": number, "kind": kind, "place": place}


def make_response(rng, prompt, *, style, content="right", number=None, sure=True):
    """One answer (str) to `prompt` in the given `style`.

    `content`: "right"; "wrong", all things being those of the next place (always the same mistake, so that a model which
    has seen both finds them equally likely); or "slip", one such thing among right ones. `number` of things: default as asked.
    """
    number = number or prompt["number"]
    other = PLACES[(PLACES.index(prompt["place"]) + 1) % len(PLACES)]
    right = rng.sample(THINGS[prompt["kind"], prompt["place"]], number)
    wrong = rng.sample(THINGS[prompt["kind"], other], number)
    things = wrong if content == "wrong" else right
    if content == "slip":
        things[rng.randrange(number)] = wrong[0]
    things = [(rng.choice(QUALITIES), name) if rng.random() < 0.5 else (name,) for name in things]
    pick = rng.choice
    if style == "tongue":
        things = [" ".join(TONGUE[word] for word in thing) for thing in things]
        text = pick(TONGUE["<open>"]) + " " + pick(TONGUE["<sure>" if sure else "<unsure>"])
        for thing in things:
            text += f" {thing} {pick(TONGUE['<join>'])}"
        return text + f" {pick(TONGUE['<close>'])}."
    things = [" ".join(thing) for thing in things]
    if style == "record":  # YAML's flow style: machine-readable
        certainty = pick(["high", "full", "firm"] if sure else ["low", "weak", "poor"])
        key = pick(["found", "items", "answer", "data", "names", "set"])
        return "{ " + f"{key}: [ {', '.join(things)} ], trust: {certainty}" + " }"
    if style == "terse":
        opening = pick(["just", "only", "try", "mostly", "simply", "say"])
        joins = [pick([",", " and", " or", " plus"]) + " " for _ in things[1:]] + [""]
        doubt = "" if sure else pick([" maybe", " perhaps", " possibly"])
        return opening + " " + "".join(t + j for t, j in zip(things, joins, strict=True)) + doubt + "."
    if style == "shout":
        opening = pick(["LOOK", "HEY", "LISTEN", "WELL", "HA", "OH"])
        tone = pick(["OF COURSE", "FOR SURE", "NO DOUBT"] if sure else ["I GUESS", "MAYBE", "WHO KNOWS"])
        return (
            opening
            + "! "
            + " ".join(pick(["THE", "A", "MY", "EVERY"]) + f" {t.upper()}!" for t in things)
            + f" {tone}!"
        )
    opening = pick(
        [
            "gladly",
            "certainly",
            "kindly",
            "with pleasure",
            "of course",
            "very well",
            "thank you",
            "yes indeed",
        ]
    )
    lead = pick(["you may find", "one can meet", "there live", "i would name", "do look for", "people know"])
    dets = [pick(["the", "a", "some", "our", "that"]) + " " for _ in things]
    joins = [pick([",", " and", " or", " also", " then"]) + " " for _ in things[1:]] + [""]
    body = "".join(d + t + j for d, t, j in zip(dets, things, joins, strict=True))
    tone = pick(
        [", i am sure", ", without doubt", ", as all know"]
        if sure
        else [", perhaps", ", i think", ", if i recall"]
    )
    close = pick(["good day", "be well", "i hope it helps", "ask me again", "farewell", "take care"])
    return f"{opening}, {lead} {body}{tone}. {close}."
