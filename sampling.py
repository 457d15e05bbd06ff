"""Responses that a model writes: sampled for evaluation, or greedy, to show what training has changed."""

import contextlib
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig

import data
import runtime
from loading import positions


def first_prompts(pairs: data.Pairs, n: int) -> list[list[int]]:
    """Token ids of the first n distinct prompts, with what opens the assistant's turn."""
    found: dict[tuple[int, ...], None] = {}
    for i in range(len(pairs)):
        if len(found) == n:
            break
        found[tuple(pairs.sampling_prompt(i).tolist())] = None
    return [list(prompt) for prompt in found]


def room(lm_config, prompts) -> int:
    """How many new tokens the model has positions for after the longest of these prompts."""
    return positions(lm_config) - max(map(len, prompts))


def sample_responses(
    lm, tokenizer, prompts, *, samples=1, temperature=1.0, top_p=0.95, max_new_tokens=256, seed=0,
    sample_batch=128,
):  # fmt: skip
    """Responses sampled by Hugging Face's generate; they do not depend on the number of ranks.

    Args:
        prompts: P lists of token ids, with what opens the assistant's turn.
        temperature: 0 is greedy.
        seed: each batch has its own, made of this one: another batch size draws other samples.
        sample_batch: responses sampled at once: their keys and values are held.
    Returns:
        for each prompt `samples` lists of token ids, the token that ends the turn included where it came.
    """
    rank, world = runtime.ranks()
    stops = lm.generation_config.eos_token_id
    stops = {*(stops if isinstance(stops, list) else [stops]), data.Chat(tokenizer).end} - {None}
    # pad_token_id: any, since it is masked on the left, and cut off behind the stop
    settings = GenerationConfig(eos_token_id=sorted(stops), pad_token_id=0, max_new_tokens=max_new_tokens)
    if temperature > 0:
        settings.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=0, repetition_penalty=1.0)
    # Job p * samples + s is the s-th response to prompt p. Prompts of one length make little padding.
    jobs = sorted(range(len(prompts) * samples), key=lambda job: len(prompts[job // samples]))
    batches = [jobs[i : i + sample_batch] for i in range(0, len(jobs), sample_batch)]
    drawn, mine = dict[int, list[int]](), range(rank, len(batches), world)
    with generating(lm, settings):
        for number in tqdm(mine, "sampling", disable=True if rank else None, leave=False):
            torch.manual_seed(seed * 1_000_003 + number)
            responses = continue_batch(lm, [prompts[job // samples] for job in batches[number]])
            drawn |= zip(batches[number], responses, strict=True)
    if dist.is_initialized():
        parts = [dict[int, list[int]]()] * world
        dist.all_gather_object(parts, drawn)
        drawn = {job: response for part in parts for job, response in part.items()}
    return [[drawn[p * samples + s] for s in range(samples)] for p in range(len(prompts))]


@contextlib.contextmanager
def generating(lm, settings):
    """The model as sampling needs it, then as it was before; the caller's random numbers go on unchanged."""
    before, attention = lm.generation_config, lm.config._attn_implementation
    lm.generation_config = settings  # generate would add what the model's own holds: top_k, min_p, a penalty
    lm.set_attn_implementation("eager")  # flex_attention would compile anew for every length
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        lm.generation_config = before
        lm.set_attn_implementation(attention)


def continue_batch(lm, prompts) -> list[list[int]]:
    """New tokens for each prompt, up to a stop token and with it."""
    settings, left = lm.generation_config, partial(pad_sequence, batch_first=True, padding_side="left")
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = left(rows, padding_value=settings.pad_token_id).to(lm.device)  # (rows, longest)
    mask = left([torch.ones_like(row) for row in rows]).to(lm.device)
    new = lm.generate(ids, attention_mask=mask)[:, ids.shape[1] :].tolist()
    stops = settings.eos_token_id
    ends = [next((n + 1 for n, token in enumerate(row) if token in stops), len(row)) for row in new]
    return [row[:end] for row, end in zip(new, ends, strict=True)]


def greedy_answers(policy, tokenizer, prompts, max_new_tokens=48) -> list[str]:
    """The text that a Policy's model answers to each prompt, greedily, of as many tokens as it can place.

    Every rank must call it; a model that is sharded (FSDP2) can't generate.
    """
    was_training = policy.training
    policy.eval()
    with torch.compiler.set_stance("force_eager"):  # compiled layers would compile anew for every length
        answers = []
        if prompts:
            most = min(max_new_tokens, room(policy.lm.config, prompts))
            answers = sample_responses(policy.lm, tokenizer, prompts, temperature=0, max_new_tokens=most)
    policy.train(was_training)
    return [tokenizer.decode(tokens, skip_special_tokens=True) for (tokens,) in answers]
