"""Scores of a model: accuracy, distance from the reference, and how diverse its sampled responses are.

    python eval_diversity.py --model runs/toy/fpo/model --reference runs/toy/model --json scores.json

Scores, by their keys in --json. Of pairs:
    accuracy, accuracy_sum         chosen above rejected in log π(y|x) / |y|, in log π(y|x): share of pairs
    reward_accuracy                the same for the reward of the method that trained the model (Table 1)
    reward_accuracy_sum, .._mean   the same for log π/π_ref: summed (DPO's reward), per token (FPO's)
    nll_chosen                     -log π(y_w|x) / |y_w|, nats, mean over pairs
    kl_chosen, kl_rejected         sequential KL(ref ‖ π), nats, mean over pairs (Fig. 3)
    mse_chosen, mse_rejected       D_FPO (Eq. 10), mean over pairs (Fig. 4)
    kl_gap, mse_gap                |β D(y_l) - β D(y_w)|, mean over pairs (Figs. 3, 4)
    activations_policy, .._reference   a response's largest pooled features, mean by rank (Fig. 2 left)
    features_moved                 those whose pooled mean changed most from the reference: id, before, after,
                                   and on how many responses it is active (--features_top)
    train                          all these again for training pairs (--train_pairs; Table 2's protocol)
Of sampled responses:
    predictive_entropy, .._per_token   -log π(y|x); that over |y|; nats, mean over responses
    response_tokens                |y|, the token that ends the turn included
    distinct_1, distinct_2         different words, pairs of words over all, among a prompt's responses
    self_bleu                      0 to 100, of a response against the others to its prompt
Three entropies of the next token, nats, each a mean over tokens (Table 2 does not say which it prints):
    entropy                        at the positions of sampled responses
    teacher_forced_entropy         at the positions of the pairs' responses
    teacher_forced_entropy_all     at those of prompt and rejected response, as in the authors' script
Also made_by: command, commit, hardware; and for each mean, intervals {key: [low, high]}, 95 %, by bootstrap
over pairs or prompts.

Responses are sampled at temperature 1 from the nucleus (p = 0.95). Every entropy and log π is of the model's
whole distribution at temperature 1, before that cut.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from sacrebleu import BLEU
from transformers import HfArgumentParser

import data
import fpo
import loading
import losses
import metrics
import runtime
from audit import audit_and_freeze
from metrics import summary
from runtime import refuse
from sampling import first_prompts, room, sample_responses
from settings import Config, flag
from settings import parse_args as parse_run_args

# ---------------------------------------------------------------------------- settings
# Flags that train.py reads and checks: they mean the same here.
SHARED = ("sae", "sae_layer", "sae_width", "sae_site", "sae_l0", "k", "max_length", "max_prompt_length")
SHARED += ("chat_format", "micro_batch_tokens", "layout", "dtype")


@dataclass
class Settings:
    """Every setting of an evaluation: the flags below, and in `config` those shared with train.py."""

    model: str | None = flag(None, "what is scored; none: the preset's SFT model")
    reference: str | None = flag(None, "the frozen π_ref; none: no KL, D_FPO, log π/π_ref")
    preset: str | None = flag(None, "of data, SAE and lengths; none: as the run that trained the model")
    method: Literal[None, *losses.METHODS] = flag(None, "whose reward is scored; none: as that run")
    dataset: str | None = flag(None, "pairs to score; none: the preset's held-out pairs")
    train_pairs: str | None = field(
        default=None,
        metadata={"help": "training pairs too: these or the preset's", "nargs": "?", "const": ""},
    )
    json: str | None = flag(None, "file for all that is printed")
    beta: float = flag(0.1, "β of the gaps; one for all methods, so that they can be compared")
    features_top: int = flag(0, "largest pooled features (Fig. 2: 50), and those that moved most; 0: none")
    bootstrap: int = flag(1000, "resamples for the intervals; 0: none")
    # samples: 25 a prompt from a nucleus of 0.95, as TDPO's paper does; 100 prompts, as FPO's text says
    samples: int = flag(25, "responses to a prompt; 0: none")
    prompts: int = flag(100, "distinct prompts to sample for")
    max_new_tokens: int = flag(256, "longest response")
    top_p: float = flag(0.95, "nucleus")
    seed: int = flag(0, "of sampling and bootstrap")
    sample_batch: int = flag(128, "responses sampled at once; another number draws other samples")
    # not flags: what follows from them
    config: Config = field(init=False)  # model, data, SAE, k, lengths, dtype
    units: list[float] = field(init=False)  # the run's s² for each SAE; empty: D_FPO is as in Eq. 10


def parse_args(argv=None) -> Settings:
    """The command line over the settings of the run that trained --model, or over those of --preset.

    Raises: UserError: a flag or value that is not allowed.
    """
    about = __doc__.split("\n\n")[0] + " Further flags, explained by `train.py --help`: --"
    parser = HfArgumentParser(Settings, description=about + ", --".join(SHARED), allow_abbrev=False)
    parser.error = refuse  # argparse's own prints a page
    own, rest = parser.parse_known_args(argv)
    settings = Settings(**vars(own))
    for word in rest:
        if word.startswith("--") and word[2:].split("=")[0].replace("-", "_") not in SHARED:
            refuse(f"{word}: no such flag; --help lists them all")
    check(settings)

    # ---- a model is scored on what it was trained on, unless --preset or single flags say otherwise
    run = run_of(settings.model)
    settings.method = settings.method or run.get("method")
    settings.units = list(run.get("units", ()))
    names = () if settings.preset else ("preset", *SHARED)
    if names and run.get("method") != "sft":  # SFT has conversations in place of pairs
        names += ("dataset", "eval_dataset")
    values = {name: run[name] for name in names if run.get(name)}
    given = {name: getattr(settings, name) for name in ("preset", "model", "reference")}
    given |= {"eval_dataset": settings.dataset, "dataset": settings.train_pairs}
    if settings.train_pairs is None:  # then these are not read, but must be there
        given["dataset"] = settings.dataset
    values |= {name: value for name, value in given.items() if value}
    # The method of `config` is one that reads pairs and needs no SAE.
    settings.config = parse_run_args(rest, {**values, "method": "dpo"})
    for name in ("sae_layer", "sae_site"):
        asked = getattr(settings.config, name)  # no layer: the one that training found too
        if settings.units and asked and asked != run[name]:
            refuse(f"--{name}: {settings.model} was trained with D_FPO in units of {run[name]}")
    return settings


def check(settings):
    """Errors that need no model and no data: each names the value and what is allowed."""
    for name, value in vars(settings).items():
        low = 1 if name in ("prompts", "max_new_tokens", "sample_batch") else 0
        if value == "" and name != "train_pairs":
            refuse(f"--{name} '': must not be empty")
        if isinstance(value, (int, float)) and not low <= value < 2**32:
            refuse(f"--{name} {value}: must be at least {low}, and below 2^32")
    if not 0 < settings.top_p <= 1:
        refuse(f"--top_p {settings.top_p}: must be above 0 and at most 1")
    if settings.json is not None:
        runtime.check_output("json", settings.json, folder=False)


def run_of(model: str | None) -> dict:
    """Settings and units of the run that trained a model: config.json in the folder that holds `model/`."""
    path = Path(model or "none/model").absolute().parent / "config.json"
    with runtime.hub_errors("the settings", str(path)):
        run = json.loads(path.read_text()) if path.exists() else {}
    return run if "method" in run else {}  # else it is not train.py's


# ---------------------------------------------------------------------------- sampled responses
def response_statistics(lm, prompts, responses, **budget_and_row_options) -> torch.Tensor:
    """(P, S, 3): Σ_t H(π(·|x, y_<t)) and log π(y|x), nats, and |y|, by one forward over what was sampled.

    So both are of the whole distribution at temperature 1, however the responses were drawn.
    """
    drawn = [(x, y, []) for x, many in zip(prompts, responses, strict=True) for y in many]  # none rejected
    table = metrics.score_pairs(fpo.Policy(lm), data.Pairs(drawn), **budget_and_row_options)
    columns = [table[f"{name}_chosen"] for name in ("entropy", "logps", "lengths")]
    return torch.stack(columns, -1).view(len(prompts), -1, 3)


def distinct(texts, n: int) -> float:
    """distinct-n (Li et al. 2016): different over all n-grams of some texts' words, split at white space."""
    words = [text.split() for text in texts]
    grams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def self_bleu(texts) -> float:
    """Self-BLEU (Zhu et al. 2018), 0 to 100: mean of sacrebleu's BLEU-4 of each text against the others."""
    bleu = BLEU(effective_order=True)  # a text of fewer than 4 words is scored by the n-grams it has
    scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
    return sum(scores) / len(scores)


def sample_columns(texts, totals) -> dict:
    """Scores of P lists of S texts, and of their `response_statistics` (P, S, 3), for `summary`.

    predictive_entropy is the Monte-Carlo mean of -log π(y|x): H(π(·|x)) where responses are samples of π;
    those of its nucleus are likelier, and give less. .._per_token divides each response's by its own |y|.
    """
    H, logp, length = totals.unbind(-1)
    means = {
        "predictive_entropy": -logp.mean(1),
        "predictive_entropy_per_token": -(logp / length).mean(1),
        "response_tokens": length.mean(1),
        "distinct_1": torch.tensor([distinct(many, 1) for many in texts]),
        "distinct_2": torch.tensor([distinct(many, 2) for many in texts]),
    }
    if totals.shape[1] > 1:
        means["self_bleu"] = torch.tensor([self_bleu(many) for many in texts])
    columns = {"entropy": (H.sum(1), length.sum(1))}
    return columns | {name: (values, torch.ones(len(texts))) for name, values in means.items()}


# ---------------------------------------------------------------------------- all scores
def evaluate(policy, tokenizer, pairs, settings, *, samples=0, **budget_and_row_options) -> dict:
    """Scores of a policy by the keys of this file's head, the same on every rank.

    Args:
        policy: fpo.Policy, holding the reference to compare with, if any.
        budget_and_row_options: max_tokens, and row_options as `collate` takes them.
    """
    # ---- pairs, at the responses' positions
    options = {"k": settings.config.k, "units": settings.units, "top": settings.features_top}
    table = metrics.score_pairs(policy, pairs, **options, **budget_and_row_options)
    groups = [metrics.pair_columns(table, method=settings.method, beta=settings.beta)]
    # ---- at all positions, by the model alone. The authors count padding too, and so depend on the batch.
    row_options = budget_and_row_options | {"layout": "separate", "all_positions": True}
    whole = metrics.score_pairs(fpo.Policy(policy.lm), pairs, **row_options)
    groups[0]["teacher_forced_entropy_all"] = whole["entropy_rejected"], whole["lengths_rejected"]
    # ---- samples, for the first distinct prompts
    if samples:
        prompts = first_prompts(pairs, settings.prompts)
        names = ("top_p", "max_new_tokens", "seed", "sample_batch")
        options = {name: getattr(settings, name) for name in names}
        responses = sample_responses(policy.lm, tokenizer, prompts, samples=samples, **options)
        totals = response_statistics(policy.lm, prompts, responses, **budget_and_row_options)
        texts = [tokenizer.batch_decode(many, skip_special_tokens=True) for many in responses]
        groups.append(sample_columns(texts, totals))
    # ---- means
    scores = summary(groups, bootstrap=settings.bootstrap, seed=settings.seed)
    for name in ("activations_policy", "activations_reference"):
        if f"{name}_chosen" in table:
            scores[name] = torch.cat([table[f"{name}_chosen"], table[f"{name}_rejected"]]).mean(0).tolist()
    if settings.features_top and policy.saes and policy.reference:
        moved = metrics.moved_features(policy, pairs, settings.features_top, **budget_and_row_options)
        scores["features_moved"] = moved
    return scores


def main(settings: Settings | None = None):
    """Score one model; with --reference against it too."""
    settings = parse_args() if settings is None else settings
    config = settings.config
    device = runtime.start_processes()
    main_rank = runtime.ranks()[0] == 0
    loading.make_toy_world(config)

    # ---- data, SAEs, models: what is small comes first, so that a wrong value is found before the rest
    tokenizer = data.load_tokenizer(config.model)
    pairs = loading.load_data("eval_dataset", config, tokenizer)
    training = loading.load_data("dataset", config, tokenizer) if settings.train_pairs is not None else None
    if settings.samples:
        left = room(loading.load_config(config.model), first_prompts(pairs, settings.prompts))
        if settings.max_new_tokens > left:
            said = f"--max_new_tokens {settings.max_new_tokens}"
            refuse(f"{said}: places that the model has after the longest prompt: {left}")
    reads = config.sae is not None and (settings.reference or settings.features_top)
    saes, sites = loading.load_saes(config, device) if reads else ([], [])
    dtype = loading.torch_dtype(config, device)
    row_options = loading.choose_layout(config, pairs, device)
    policy = fpo.Policy(loading.load_lm(config.model, device, dtype=dtype), saes, sites)
    # What train.py refuses is not scored either.
    audit_and_freeze(policy, pairs, config, row_options, trains=False)
    if settings.reference:
        reference = fpo.Policy(loading.load_lm(settings.reference, device, dtype=dtype), saes, sites)
        audit_and_freeze(reference, pairs, config, row_options, trains=False)
        policy.hold_reference(reference)

    # ---- scores
    row_options |= {"max_tokens": config.micro_batch_tokens, "progress": main_rank}
    scores = evaluate(policy, tokenizer, pairs, settings, samples=settings.samples, **row_options)
    if training is not None:
        scores["train"] = evaluate(policy, tokenizer, training, settings, **row_options)
    for title, part in (("", scores), ("train ", scores.get("train", {}))):
        for name in (name for name, value in part.items() if main_rank and isinstance(value, float)):
            low_high = part.get("intervals", {}).get(name, ())
            print(f"{title + name:<34}{part[name]:>10.4g}  ", *(f"{end:>10.4g}" for end in low_high))
        for f in part.get("features_moved", ()) if main_rank else ():
            on = f"on {f['responses']} responses"
            print(f"{title}feature {f['id']}: {f['before']:.4g} before, {f['after']:.4g} after, {on}")
    if main_rank and settings.json:
        runtime.write_json(settings.json, scores | {"made_by": runtime.made_by()})
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    runtime.run_script(main)
