"""Speed and memory: every method's step, its parts alone, another trainer's step, and what a card allows.

    python -m experiments.bench [--peer trl | --reference_pass | --updates]    CPU: a tiny shape
    python -m experiments.bench --shape scaled       CPU: Gemma-2-2B with every width an eighth
    python -m experiments.bench --shape gemma-2-9b --rank_of 4 --checkpointing    CUDA: a rank of 4
    python -m experiments.bench --shape gemma-2-9b --rank_of 4 --checkpointing --count    no card needed
    python -m experiments.bench --dataset FILE --model MODEL [--peer trl]    real lengths, that config

The step is the real one, with random weights: collate, forward, loss, backward, clip, update; on CUDA its
layers are compiled. Steps take turns (A B C, A B C, …): a figure is the median over the rounds, a ratio the
median of the rounds' ratios, so that it holds on a busy machine too.

Memory: the peak within a step, of the allocator on CUDA, else of the resident set, above what the process
held before it made the model. On the CPU each step has its own process: an allocator keeps what another left.
"""

import argparse
import contextlib
import gc
import importlib.util
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

import data
import fpo
import loading
import losses
import offline
import runtime
import scale
from batches import collate, epoch_order, plan, plan_for_one, work_of
from experiments.plan import CARDS, GEMMA_2, Counter, parameters_of, tables
from loading import load_config
from runtime import refuse
from settings import TABLE_5, Config

CUDA = torch.cuda.is_available()
PRODUCT = 2048  # rows and columns of the matrix product that a step's FLOP/s are held against
TINY = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32, "vocab_size": 4096}
# The 2B model with d, FFN, V, m and the widths of queries and keys an eighth: body, head and SAE each take
# 1/64 of its FLOPs a token. Heads few and wide, since an eager score costs the same at any width.
SCALED = {"hidden_size": 288, "intermediate_size": 1152, "num_attention_heads": 2, "num_key_value_heads": 1}
SCALED |= {"head_dim": 128, "query_pre_attn_scalar": 128, "vocab_size": 32_000}
# Changes of Gemma2Config; the SAE's m; pairs, tokens of a prompt and of each response; Table 5's optimizer.
SHAPES = {
    "tiny": (TINY, 512, (8, 256, 64), "adam"),
    "wide": (TINY | {"vocab_size": 32_768}, 512, (8, 256, 64), "adam"),
    "scaled": (SCALED, 2048, (1, 256, 384), "adam"),
    "gemma-2-2b": (GEMMA_2["gemma-2-2b"], 16384, (8, 256, 384), "adam"),
    "gemma-2-9b": (GEMMA_2["gemma-2-9b"], 16384, (8, 256, 384), "rmsprop"),
}


# What each mode takes beside --json; "steps" is the one without a flag of its own.
OF_A_STEP = {"shape", "prompt", "response", "dataset", "model", "pairs", "unpacked", "checkpointing"}
TAKES = {
    "steps": OF_A_STEP | {"rounds", "rank_of", "methods"},
    "peer": OF_A_STEP | {"rounds"},
    "count": OF_A_STEP | {"rank_of", "methods"},
    "reference_pass": OF_A_STEP | {"rounds", "rank_of"},
    "fill": {"dataset", "model", "ranks"},
    "updates": set[str](),
}
DEFAULTS = {"methods": ["simpo", "dpo", "fpo", "tdpo1", "tdpo2"], "rounds": 5, "rank_of": 1, "ranks": 4}


def parse_args(argv=None):
    """Flags, completed by `complete`; UserError for those that the mode has no use for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = refuse
    add, on = parser.add_argument, {"action": "store_true"}
    add("--shape", choices=SHAPES, help="model, SAE, lengths and optimizer (tiny)")
    add("--prompt", type=int, help="tokens of a prompt, instead of the shape's")
    add("--response", type=int, help="tokens of a response, instead of the shape's")
    add("--methods", nargs="+", choices=losses.METHODS[1:], help="(simpo dpo fpo tdpo1 tdpo2)")
    add("--rounds", type=int, help="of all steps in turn (5)")
    add("--checkpointing", **on, help="activation checkpointing")
    add("--rank_of", type=int, help="one rank of N: its share of the optimizer's states (1)")
    add("--json", help="write all figures to this file")
    add("--dataset", help="the first pairs of these, as train.py takes them, in place of the shape's lengths")
    add("--model", help="of --dataset: whose tokenizer, and without --shape whose config")
    add("--pairs", type=int, help="a step, instead of the shape's")
    add("--unpacked", **on, help="of --dataset: a pair to a row, padded to the longest")
    add("--ranks", type=int, help="of --fill: the most ranks (4)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--count", **on, help="FLOPs and bytes of a step, and the time that a card's limits allow")
    add("--reference_pass", **on, help="Phase 1, against a bare forward")
    add("--fill", **on, help="the share of a step that is tokens, from a data set's lengths: no model runs")
    add("--updates", **on, help="updates that bf16 weights lose at lr 5e-7")
    add("--peer", choices=("trl",), help="DPO here and in TRL's DPOTrainer (pip install trl==1.16.0)")
    args = parser.parse_args(argv)
    given = {name: v for name, v in vars(args).items() if v is not None and v is not False}
    for name, value in given.items():
        if type(value) is int and value < 1:
            refuse(f"--{name} {value}: must be at least 1")
    mode = next((name for name in TAKES if name in given), "steps")
    if odd := given.keys() - TAKES[mode] - {mode, "json"}:
        takes = ", ".join(f"--{name}" for name in sorted(TAKES[mode] | {"json"}))
        what = "steps take" if mode == "steps" else f"--{mode} takes"
        refuse(f"--{min(odd)}: {what} only {takes}")
    return complete(args)


def complete(args):
    """What follows from the flags: a shape's numbers, its `config`, and `row_options` as collate takes it."""
    if bool(args.dataset) != bool(args.model) or (args.fill and not args.dataset):
        refuse("--dataset, --model: both are needed, by --fill too")
    if args.dataset and (args.prompt or args.response):
        refuse("--prompt, --response: the pairs of --dataset have lengths of their own")
    if args.unpacked and not args.dataset:
        refuse("--unpacked: of the pairs of --dataset")
    if args.json:
        runtime.check_output("json", args.json, folder=False)
    for name, value in DEFAULTS.items():
        setattr(args, name, getattr(args, name) or value)
    own = args.dataset and not args.shape and not args.fill
    args.shape = args.shape or "tiny"
    changes, args.sae_width, (pairs, prompt, response), args.rule = SHAPES[args.shape]
    args.pairs = args.pairs or pairs
    args.prompt, args.response = args.prompt or prompt, args.response or response
    flex = CUDA or args.count
    args.config = load_config(args.model) if own else Gemma2Config(**changes)
    args.attention = "flex_attention" if flex else None  # None: transformers' own choice, as in train.py
    args.config._attn_implementation = args.attention  # plan.py asks for the mask of it
    layout = "shared" if flex or args.prompt >= args.response else "separate"  # train.py's rule
    args.row_options = {"layout": layout, **loading.ROWS["cuda" if flex else "cpu"]}
    args.title = f"{args.shape}: {args.pairs} × ({args.prompt} + 2 × {args.response}) tokens, {layout} rows"
    if args.dataset:
        args.row_options |= {"row_tokens": None} if args.unpacked else {}
        args.title = f"{args.model if own else args.shape}: {args.pairs} pairs of {args.dataset}"
    return args


# ---------------------------------------------------------------------------- what is measured
def make_lm(args):
    """A model of the shape with random weights, on the device; bf16 on CUDA."""
    torch.manual_seed(0)
    device = runtime.start_processes()  # on CUDA also the compiler's limits, as train.py has them
    with device:
        return AutoModelForCausalLM.from_config(
            args.config, dtype=torch.bfloat16 if CUDA else torch.float32, attn_implementation=args.attention
        )


def make_pairs(args, n):
    """`n` pairs: random tokens, all of the lengths asked for; or the data set's first."""
    if args.dataset:
        found, V = load_dataset(args), args.config.get_text_config().vocab_size
        if len(found) < n:
            refuse(f"--pairs {n}: {args.dataset} has {len(found)}")
        return data.Pairs([[(part % V).tolist() for part in found[i]] for i in range(n)])
    sizes, generator = (args.prompt, args.response, args.response), torch.Generator().manual_seed(0)
    tokens = torch.randint(4, args.config.vocab_size, (n, sum(sizes)), generator=generator)
    return data.Pairs([[part.tolist() for part in row.split(sizes)] for row in tokens])


def load_dataset(args):
    """The pairs of --dataset, by --model's tokenizer, cut as train.py cuts them."""
    tokenizer, lengths = data.load_tokenizer(args.model), ("max_length", "max_prompt_length")
    return data.load_pairs(args.dataset, tokenizer, **{name: getattr(Config, name) for name in lengths})


def micro_batches(args, pairs):
    """The micro-batches that train.py would make of the step's pairs."""
    documents, limit = pairs.documents(args.row_options["layout"]), Config.micro_batch_tokens
    groups = plan(range(len(pairs)), documents, 1, max_tokens=limit, **args.row_options)
    return [collate(pairs, group, **args.row_options) for group in groups]


def all_pairs(args):
    """The shape's pairs as one micro-batch."""
    return collate(make_pairs(args, args.pairs), range(args.pairs), **args.row_options)


def make_policies(args, methods):
    """{method: its Policy}, on one model; FPO's has an SAE, the first that needs it holds a reference."""
    lm = make_lm(args)
    # One Policy for all; below FPO gets one that reads an SAE, methods with a KL one that holds a reference.
    policies, layers = dict.fromkeys(methods, fpo.Policy(lm)), [*lm.model.layers]
    if "fpo" in methods:  # a random SAE at the last layer; 1 feature in 300 is active, as in Gemma Scope
        d, m = lm.config.hidden_size, args.sae_width
        W_enc, zeros = torch.randn(d, m, device=lm.device) / d**0.5, torch.zeros(m, device=lm.device)
        sae = SimpleNamespace(d=d, m=m, k=None, W_enc=W_enc, b_enc=zeros, threshold=zeros.clone())
        policies["fpo"] = fpo.Policy(lm, [sae], [(lm.config.num_hidden_layers - 1, "res")])
        with torch.no_grad():
            z = policies["fpo"].read_sites(all_pairs(args).to(lm.device))[0][:32].float() @ W_enc
        sae.threshold.fill_(z.quantile(1 - 1 / 300).clamp(min=0))
    if held := [method for method in methods if method in losses.NEEDED]:
        policies |= dict.fromkeys(held, fpo.Policy(lm))
        policies[held[0]].hold_reference(fpo.Policy(make_lm(args)))
        layers += policies[held[0]].reference[0].lm.model.layers
    for layer in layers if CUDA else ():  # after the hooks
        layer.compile()
    return policies


def make_steps(args, policies):
    """{method: what train.py does in a step: micro-batches of all pairs, backward, clip at 1, update}."""
    lm, pairs = next(iter(policies.values())).lm, make_pairs(args, args.pairs)
    parameters = list(lm.parameters())
    sizes = torch.tensor([p.numel() for p in parameters])
    # The first parameters that make up 1 / rank_of of all numbers stand for a rank's share.
    share = int((sizes.cumsum(0) < sizes.sum() / args.rank_of).sum()) + 1  # of which one rank has states
    optimizer = scale.make_optimizer(args.rule, parameters[:share], 5e-7, shard=False)
    with torch.no_grad():  # what Phase 1 would have stored
        made = [batch.to(lm.device) for batch in micro_batches(args, pairs)]
        cached = {method: [policy(batch)[0] for batch in made] for method, policy in policies.items()}
    if args.checkpointing:
        lm.activation_checkpointing_enable({"use_reentrant": False})
    lm.train()

    def take_step(method):
        """One step of a method, on the shared model and optimizer."""
        settings = {name: value for name, value in TABLE_5[method].items() if value is not None}
        for batch, reference in zip(micro_batches(args, pairs), cached[method], strict=True):
            statistics, held = policies[method](batch.to(lm.device))
            loss, _ = fpo.method_loss(method, statistics, held or reference, **settings)
            (loss.sum() / len(pairs)).backward()
        # At 1, not Table 5's 10: with random weights every step is then clipped, the dearer case.
        if (norm := scale.gradient_norm(parameters).item()) > 1:
            scale.scale_gradients_(parameters, 1 / (norm + 1e-6))
        optimizer.step()
        lm.zero_grad(set_to_none=not CUDA)  # DDP's buckets keep a card's memory for them

    return {method: partial(take_step, method) for method in policies}


def trl_step(args):
    """A DPO step of TRL's trainer on the same model and tokens, set to do what our step does."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    class OfTokens(DPOTrainer):
        """Takes tokens as ours: made from text they could be others."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    names, pairs = ("prompt_ids", "chosen_ids", "rejected_ids"), make_pairs(args, args.pairs)
    rows = [dict(zip(names, (x.tolist() for x in pairs[i]), strict=True)) for i in range(len(pairs))]
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(args.config.vocab_size)}, "w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    config = DPOConfig(
        output_dir=tempfile.gettempdir(), per_device_train_batch_size=len(pairs), max_length=None, seed=0,
        precompute_ref_log_probs=True, beta=0.1, activation_checkpointing=args.checkpointing, bf16=False,
        learning_rate=5e-7, optim="adamw_torch", use_cpu=not CUDA, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = OfTokens(make_lm(args), None, config, None, Dataset.from_list(rows), processing_class=tokenizer)
    loader, optimizer = trainer.get_train_dataloader(), trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # train() would set it

    def take_step():
        """Forward, backward, clip, update."""
        trainer.training_step(trainer.model, next(iter(loader)))
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        trainer.model.zero_grad()

    return take_step


# ---------------------------------------------------------------------------- time and memory
def seconds(step):
    """Wall time of one call, the device's work included."""
    start = time.perf_counter()
    step()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident(mark="VmRSS"):
    """GB of this process now (CUDA: allocated), or for VmHWM the most since the mark was set back."""
    if CUDA:
        return (torch.cuda.max_memory_allocated() if mark == "VmHWM" else torch.cuda.memory_allocated()) / 1e9
    return int(Path("/proc/self/status").read_text().split(f"{mark}:")[1].split()[0]) * 1024 / 1e9


def in_turn(steps, rounds):
    """{name: (rounds,) seconds} of steps, A B C A B C; GB at the peak. After a warm-up, which allocates."""
    for step in steps.values():
        step()
    torch.cuda.reset_peak_memory_stats() if CUDA else Path("/proc/self/clear_refs").write_text("5")
    table = [[seconds(step) for step in steps.values()] for _ in range(rounds)]
    return dict(zip(steps, np.array(table).T, strict=True)), resident("VmHWM")


def measure(args, names, rounds):
    """`in_turn` of methods, "trl", and "product"; FLOPs of the first (CPU).

    GB are those above what this process held before it made them.
    """
    before, ours = resident(), [name for name in names if name in losses.METHODS]
    steps = make_steps(args, make_policies(args, ours)) if ours else {}
    steps |= {"trl": trl_step(args)} if "trl" in names else {}
    steps |= {"product": partial(torch.mm, *torch.randn(2, PRODUCT, PRODUCT))} if "product" in names else {}
    times, peak = in_turn(steps, rounds)
    with contextlib.nullcontext() if CUDA else Counter() as counter:
        steps[names[0]]()
    return times, peak - before, counter and counter.flops


def measure_alone(args, names, rounds):
    """`measure` in a process of its own; on CUDA in this one, where the allocator counts exactly."""
    if CUDA:
        gc.collect()
        return measure(args, names, rounds)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as new_process:
        return new_process.submit(measure, args, names, rounds).result()


def print_rows(title, rows):
    """Dicts of equal keys as a table."""
    print(f"\n{title}\n" + "".join(f"{name:>16}" for name in rows[0]))
    for row in rows:
        cells = (f"{value:.4g}" if isinstance(value, float) else value for value in row.values())
        print("".join(f"{cell:>16}" for cell in cells), flush=True)


# ---------------------------------------------------------------------------- the sections
def methods_table(args):
    """Each method's step, or DPO's and TRL's: time and memory, beside the first one's.

    On the CPU also FLOP/s, of all products in the step, and their share of a large product's in the same
    rounds; on a card of plan.py the MFU: 6 · parameters · tokens without padding / seconds, of its peak.
    """
    names, rows = ["dpo", args.peer] if args.peer else args.methods, []
    if args.peer and importlib.util.find_spec(args.peer) is None:
        refuse("--peer trl: pip install trl==1.16.0")
    if args.peer:  # big tensors stay in malloc's heap: else page faults decide, and most of them are TRL's
        os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    # Memory and FLOPs: each method alone, one round. Time: all in turn, in one process.
    alone = {name: measure_alone(args, [name], 1)[1:] for name in names}
    times = measure_alone(args, names + ["product"] * (not CUDA), args.rounds)[0]
    first, pairs = names[0], make_pairs(args, args.pairs)
    made = micro_batches(args, pairs)
    tokens, computed = sum(int((b.doc >= 0).sum()) for b in made), sum(b.doc.numel() for b in made)
    work = 6 * parameters_of(args.config)[0] * tokens
    for name in names:
        s, (peak, flops) = np.median(times[name]), alone[name]
        row = {"name": name, "ms": 1e3 * s, "pairs/s": args.pairs / s, "peak GB": peak}
        row["fill"] = tokens / computed if name in losses.METHODS else "unknown"
        row[f"time/{first}"] = np.median(times[name] / times[first])
        row[f"memory/{first}"] = peak / alone[first][0]
        if not CUDA:
            # (flops / s) / (2 n³ / s of the product), of the same rounds
            share = flops / (2 * PRODUCT**3) * np.median(times["product"] / times[name])
            row |= {"GFLOP/s": flops / s / 1e9, "of product": share}
        for card, limits in CARDS.items():
            if CUDA and card.split()[0] in torch.cuda.get_device_name():
                row["MFU"] = work / s / limits["bfloat16"]
        rows.append(row)
    print_rows(args.title, rows)
    return rows


def count_table(args):
    """FLOPs and bytes of each method's step by part; its least time and highest MFU on each card."""
    batch, found = all_pairs(args), {}
    for method in args.methods:
        found[method] = tables(args, batch, method)
        for name, rows in found[method].items():
            print_rows(f"{args.title}, one rank of {args.rank_of}; {method}, {name}", rows)
    return found


def reference_pass(args):
    """Phase 1 against a bare forward (log π alone, without the SAE) of the same batches."""
    policies, lookups = make_policies(args, ["simpo", "fpo"]), []
    n = args.pairs * (32 if CUDA else 4)
    steps, pairs = make_steps(args, policies), make_pairs(args, n)
    identity = offline.reference_identity(policies["fpo"], pairs, weights="", arithmetic={})
    groups = plan_for_one(pairs, range(n), policies["fpo"].lm.device, **args.row_options)

    @torch.no_grad()
    def bare_forward():
        """Log-probabilities of all pairs."""
        for group in groups:
            batch = collate(pairs, group, **args.row_options)
            policies["simpo"](batch.to(policies["simpo"].lm.device))

    def build_and_read():
        """Phase 1 of all pairs; how long the cache then takes for a step's goes into `lookups`."""
        with tempfile.TemporaryDirectory() as folder:
            cache = offline.build_reference(policies["fpo"], pairs, folder, identity, **args.row_options)
            lookups.append(seconds(partial(cache.lookup, torch.arange(args.pairs))))

    parts = {"step": steps["fpo"], "bare": bare_forward, "phase 1": build_and_read}
    times, _ = in_turn(parts, args.rounds)
    row = {"pairs": n, "bare pairs/s": n / np.median(times["bare"])}
    row["speed/bare"] = np.median(times["bare"] / times["phase 1"])
    row["lookup/step"] = np.median(lookups) / np.median(times["step"])
    print_rows(f"{args.title}; the reference pass", [row])
    return row


def fill_table(args):
    """The fill of an epoch's steps (batches.work_of): in a card's rows, and with each pair in its own row."""
    pairs = load_dataset(args)
    documents, table = pairs.documents("shared"), []
    order, n = epoch_order(len(pairs), 0, 0).tolist(), Config.batch_size
    for name, change in (("a pair to a row", {"row_tokens": None}), ("packed", {})):
        row_options, found = loading.ROWS["cuda"] | change, {"rows": name}
        for ranks in sorted({1, min(2, args.ranks), args.ranks}, reverse=True):
            works = []
            for batch in (order[start : start + n] for start in range(0, len(order), n)):
                groups = plan(batch, documents, ranks, max_tokens=Config.micro_batch_tokens, **row_options)
                works.append(work_of(groups, documents, ranks, **row_options))
            found[f"ranks: {ranks}"] = sum(w[0] for w in works) / sum(w[1] for w in works)
        table.append(found)
    sizes = torch.tensor([sum(lengths) for lengths in documents])
    title = f"{len(pairs)} pairs, median {sizes.median()} tokens, most {sizes.max()}"
    print_rows(f"fill of {args.dataset}: {title}; {n} pairs a step", table)
    return table


def updates():
    """The share of 200 updates at lr 5e-7 that bf16 weights lose: plainly, and with the exact optimizer."""
    rows, lr, size = [], 5e-7, 2**16
    for rule, kind in (("adam", torch.optim.Adam), ("rmsprop", torch.optim.RMSprop)):
        torch.manual_seed(0)
        # A gradient is a drift and noise of the same size, so that moves add up.
        start, drift = (0.02 * torch.randn(size)).bfloat16(), torch.randn(size)
        weights = master, plain, exact = [w.clone().requires_grad_() for w in (start.float(), start, start)]
        optimizers = [kind([master], lr, foreach=False), kind([plain], lr, foreach=False)]
        optimizers.append(scale.make_optimizer(rule, [exact], lr, shard=False))
        moved = lost = exact_lost = 0
        for _ in range(200):
            gradient, before = (drift + torch.randn(size)).bfloat16(), [w.detach().clone() for w in weights]
            for weight, optimizer in zip(weights, optimizers, strict=True):
                weight.grad = gradient.to(weight.dtype)
                optimizer.step()
            moves = master != before[0]
            # counted where the float32 master moved
            moved += int(moves.sum())
            lost += int((moves & (plain == before[1])).sum())
            joined = scale.join(exact.detach(), optimizers[2].state[exact]["rest"])
            exact_lost += int((moves & (joined != master)).sum())
        rows.append({"rule": rule, "plain bf16": lost / moved, "exact": exact_lost / moved})
    print_rows(f"share of updates lost at lr {lr}, 200 steps, against float32 weights", rows)
    return rows


def main(argv=None):
    """Run what the flags ask for."""
    args = parse_args(argv)
    if args.dataset and not args.fill:  # whose lengths decide how train.py would lay them out
        device = torch.device("cuda" if CUDA or args.count else "cpu")
        layout = loading.choose_layout(Config, make_pairs(args, args.pairs), device)["layout"]
        args.row_options["layout"], args.title = layout, f"{args.title}, {layout} rows"
    section = reference_pass if args.reference_pass else count_table if args.count else methods_table
    figures = updates() if args.updates else fill_table(args) if args.fill else {args.shape: section(args)}
    if args.json:
        runtime.write_json(args.json, runtime.made_by() | {"torch": torch.__version__, "figures": figures})


if __name__ == "__main__":
    runtime.run_script(main)
