"""Preference training on SAE features: FPO, and the methods that the paper compares it with.

    torchrun --standalone --nproc_per_node 2 train.py --method fpo --preset toy    a laptop, nothing prepared
    torchrun --nproc_per_node 4 train.py --method sft                              Gemma-2-2B, 4 × H100
    torchrun --nproc_per_node 4 train.py --method fpo

The stages, in order: processes, data, model; Phase 1, the offline reference (Sec. 3); Phase 2, the loop; what
came out. All but Phase 1's cache goes into --out: config.json, metrics.jsonl, scores.json, model/ (a Hugging
Face directory), and the states of --save_every.
"""

import argparse
import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

import fpo
import memory
import offline
import precision
import presets
import report
import resume
from data import collate, epoch_order, load_pairs, micro_batches
from eval_diversity import evaluate

# ---------------------------------------------------------------------------- flags
AT_LEAST_1 = ["batch_size", "epochs", "steps", "k", "max_prompt_length", "max_length", "sample_batch"]
AT_LEAST_1 += ["eval_tokens", "keep", "ranks", "gpu_gb"]
LEAST = dict.fromkeys(AT_LEAST_1, 1)  # of the other numbers 0


def parse_args(argv=None):
    """Flags, over the preset's values, over Table 5's for the method: all of them end up in config.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--method", default="fpo", choices=fpo.METHODS, help="a row of Table 1 (fpo)")
    presets.shared_flags(parser)
    presets.training_flags(parser)
    presets.running_flags(parser)
    args = presets.parse_flags(parser, argv, LEAST)
    preset = dict(presets.PRESETS[args.preset])
    sft_data = {name: preset.pop(f"sft_{name}") for name in ("dataset", "eval_dataset")}
    preset |= sft_data if args.method == "sft" else {}
    for name, papers in presets.TABLE_5[args.method].items():
        if papers is None and getattr(args, name) is not None:
            raise ValueError(f"--{name} {getattr(args, name)}: --method {args.method} has none")
    for name, value in {**preset, **presets.TABLE_5[args.method]}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    start, args.start_note = presets.default_model(args.preset, args.method)
    args.start_note = "" if args.model else args.start_note
    args.model = args.model or start
    args.reference = args.reference or args.model
    args.cache_dir = args.cache_dir or f"runs/{args.preset}/reference"
    args.out = args.out or f"runs/{args.preset}/{args.method}"
    check_args(args)
    return args


def check_args(args):
    """Errors that need no model and no data: each names the value and what is allowed."""
    for name in ("out", "cache_dir"):
        presets.check_output(name, getattr(args, name), folder=True)
    if args.shard == "fsdp" and args.eval_samples:
        raise ValueError(
            f"--eval_samples {args.eval_samples}: must be 0 with --shard fsdp; sample from the saved model"
        )
    if args.shard == "fsdp" and "RANK" not in os.environ and not args.plan:
        raise ValueError("--shard fsdp: start it with torchrun")
    if not 0 <= args.warmup_ratio < 1:
        raise ValueError(f"--warmup_ratio {args.warmup_ratio}: must be from 0 to below 1")
    if args.cache_top and args.cache_top < 4 * args.k:
        raise ValueError(
            f"--cache_top {args.cache_top}: must be 0 or at least 4 k = {4 * args.k}, or D_FPO is far off"
        )
    if not 0 < args.max_prompt_length < args.max_length:
        raise ValueError(
            f"--max_prompt_length {args.max_prompt_length}: must be below --max_length {args.max_length}"
        )


# ---------------------------------------------------------------------------- pieces of the loop
def learning_rate(step: int, steps: int, args) -> float:
    """Linear warm-up, then constant (Table 5) or a cosine to 0 (Table 4). `step` counts from 0."""
    warmup = round(args.warmup_ratio * steps) if args.warmup_ratio else args.warmup_steps
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.schedule == "constant":
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def plan_steps(args, pairs, layout: str, world: int) -> list[list[list[int]]]:
    """For every step its micro-batches, this and the other ranks'; one epoch after another."""
    lengths, per_epoch = pairs.row_lengths(layout), math.ceil(len(pairs) / args.batch_size)
    steps = args.steps if args.steps is not None else args.epochs * per_epoch
    plan = []
    for step in range(steps):
        if step % per_epoch == 0:
            order = epoch_order(len(pairs), step // per_epoch, args.seed)
        start = step % per_epoch * args.batch_size
        plan.append(
            micro_batches(order[start : start + args.batch_size], lengths, world,
                          max_pairs=args.micro_batch_pairs, max_tokens=args.micro_batch_tokens)
        )  # fmt: skip
    return plan


def step_sums(batch, loss, values, statistics) -> dict[str, torch.Tensor]:
    """Sums over a micro-batch's pairs of all that is logged, on the device."""
    chosen, rejected = (statistics.logps / statistics.lengths.clamp(min=1)).chunk(2)
    logged = {"loss": loss, "logps_chosen": chosen, **values}
    if "reward_chosen" in values:
        logged["logps_rejected"], logged["accuracy"] = rejected, (chosen > rejected).float()
        logged["reward_margin"] = values["reward_chosen"] - values["reward_rejected"]
        logged["reward_accuracy"] = (logged["reward_margin"] > 0).float()
    return {name: (value.detach() * batch.weight).sum() for name, value in logged.items()}


def peak_memory_gb(device) -> float:
    """Peak memory of this process in GB: the card's allocations, or the resident set without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def bad_pairs(seen: list) -> list[int]:
    """Pairs of the step, of all ranks, whose loss is not finite; all of them where only a gradient is not."""
    finite = [(index, loss.isfinite()) for index, loss in seen]
    found = [(int(i), not bool(ok)) for index, oks in finite for i, ok in zip(index, oks, strict=True)]
    parts = [found] * fpo.ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, found)
    pairs = [pair for part in parts for pair in part]
    return sorted({i for i, bad in pairs if bad} or {i for i, _ in pairs})


# ---------------------------------------------------------------------------- before the loop
def load_run(args, device, main_rank):
    """Data, then SAEs; the model comes after: a wrong value ends the run before anything large is loaded.

    Returns:
        tokenizer, pairs, held-out pairs, SAEs, their sites, and how rows are laid out.
    """
    size = presets.vocabulary_size(args.model, args.reference)
    tokenizer = presets.load_tokenizer(args.model)
    limits = {"max_length": args.max_length, "max_prompt_length": args.max_prompt_length}
    data = []
    for name, source in (("train", args.dataset), ("held out", args.eval_dataset)):
        data.append(load_pairs(source, tokenizer, sft=args.method == "sft", progress=main_rank, **limits))
        presets.check_tokens(source, data[-1], size)
        if main_rank:
            notes = [f"{n} × {what}" for what, n in data[-1].notes.items() if n]
            print(f"{name}: {len(data[-1])} pairs", *notes, sep="; ")
    needs_sae = args.method == "fpo" or (args.eval_kl and args.method != "sft")
    saes, sites = presets.load_saes(args, device) if needs_sae else ([], [])
    return tokenizer, *data, saes, sites, presets.rows_of(args, tokenizer, data[0], device)


def load_policy(name, args, device, saes, sites):
    """A Policy as training runs it, and the digest of its weights (of the main rank's; they are the same)."""
    fsdp = args.shard == "fsdp"
    dtype = presets.DTYPES["float32" if fsdp else args.dtype]
    lm = presets.load_lm(name, device, dtype=dtype, move=not fsdp)
    digest = offline.digest(lm.state_dict())
    if args.activation_checkpointing:
        lm.activation_checkpointing_enable({"use_reentrant": False})
    policy = fpo.Policy(lm, saes, sites, args.k)
    if args.compile:  # hooks come first; one inside a compiled block (mlp, att) would not fire
        inside = [layer for layer, site in sites if site != "res"]
        for number, layer in enumerate(lm.model.layers):
            if number not in inside:
                layer.compile()
    if fsdp:
        precision.shard_policy(policy, dtype=presets.DTYPES[args.dtype], device=device)
    return policy, digest


def load_reference(args, device, hashed=True):
    """The frozen reference, to be held beside the policy, and the digest of its weights (hashed: else "")."""
    fsdp = args.shard == "fsdp"
    lm = presets.load_lm(args.reference, device, dtype=presets.DTYPES[args.dtype], move=not fsdp)
    digest = offline.digest(lm.state_dict()) if hashed else ""
    if fsdp:
        precision.shard_layers(lm, dtype=presets.DTYPES[args.dtype], device=device)
        lm.to(device)  # what is not in a layer: the embedding, the final norm
    return lm, digest


def offline_reference(args, policy, digest, data, device, saes, sites, rows, budget):
    """Phase 1 over training and held-out pairs; by the policy itself where it starts from the reference.

    Returns: the two caches, and the digest of the reference's weights.
    """
    if args.reference != args.model:
        policy, digest = load_policy(args.reference, args, device, saes, sites)
    arithmetic = {"device": device.type, "compute": args.dtype, "compile": args.compile}
    arithmetic |= {name: rows[name] for name in ("layout", "pack_to")}
    caches = []
    for pairs in data:
        identity = offline.reference_identity(
            policy, pairs, weights=digest, arithmetic=arithmetic, cache_top=args.cache_top
        )
        caches.append(offline.build_reference(policy, pairs, args.cache_dir, identity, **budget, **rows))
    if args.shard == "fsdp":
        policy.reshard()
    return *caches, digest


# ---------------------------------------------------------------------------- main
@presets.one_line_errors(everyone=True, kinds=OSError)  # a full disk, a damaged cache
def main(argv=None):
    """Train: reads from top to bottom. Returns the exit status where it is not 0."""
    # ---- processes, data, model
    with presets.one_line_errors():
        args = parse_args(argv)
        if args.plan:
            return memory.plan_run(args)
    device = presets.start_processes()
    rank, world = fpo.ranks()
    main_rank = rank == 0
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    with presets.one_line_errors():
        report.check(args)
        resumes = args.resume == "always" or (args.resume == "auto" and bool(resume.saved_states(args.out)))
        if resumes:
            resume.read_meta(args.out, args)
    lock = resume.hold(args.out) if main_rank else None  # noqa: F841
    if main_rank and args.start_note:
        print(args.start_note)
    presets.make_toy_world(args)
    with presets.one_line_errors():
        tokenizer, pairs, held_out, saes, sites, rows = load_run(args, device, main_rank)
        feature_weights = presets.load_feature_weights(args.feature_weights, saes)
        policy, digest = load_policy(args.model, args, device, saes, sites)
    budget = {"max_tokens": args.micro_batch_tokens, "max_pairs": args.micro_batch_pairs or 16}

    # ---- Phase 1: the offline reference
    cache = held_out_cache = None
    if args.method in fpo.CACHED:
        with presets.one_line_errors(everyone=True):
            cache, held_out_cache, digest = offline_reference(
                args, policy, digest, (pairs, held_out), device, saes, sites, rows, budget
            )
        if main_rank:
            print(f"reference: {cache.folder}, {cache.size() / len(pairs) / 1e3:.1f} kB a pair")
    elif args.method in fpo.NEEDED:
        reference, digest = load_reference(args, device)
        policy.hold_reference(reference)

    def scores(samples):
        """Held-out scores; where the KL is wanted, the reference is loaded for it alone."""
        lent = args.eval_kl and args.method not in (*fpo.NEEDED, "sft")
        if lent:
            policy.hold_reference(load_reference(args, device, hashed=False)[0])
        result = evaluate(
            policy, tokenizer, held_out, cache=held_out_cache, k=args.k, samples=samples,
            max_new_tokens=args.eval_tokens, batch_size=args.sample_batch, seed=args.seed,
            progress=main_rank, **budget, **rows,
        )  # fmt: skip
        if lent:
            policy.hold_reference(None)
        if args.shard == "fsdp":  # a forward without gradients leaves the root's weights whole
            policy.reshard()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return result

    # ---- Phase 2: the loop, from the start or from where it was left
    plan = plan_steps(args, pairs, rows["layout"], world)
    ddp = dist.is_initialized() and args.shard != "fsdp"
    model = DistributedDataParallel(policy, gradient_as_bucket_view=True) if ddp else policy
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = precision.make_optimizer(args.optimizer, parameters, args.lr, shard=args.shard == "states")
    out, start = Path(args.out), 0
    if resumes:
        with presets.one_line_errors():
            meta = resume.read_meta(out, args, digest)
            resume.load_state(out, policy, optimizer)
        start, before = meta["step"], meta["before"]
    else:
        before = scores(args.eval_samples)
        if main_rank:
            resume.set_aside(out)
    meta = {"settings": vars(args), "reference": digest, "before": before}
    out.mkdir(parents=True, exist_ok=True)
    if main_rank:
        offline.write_json(out / "config.json", vars(args))
        resume.cut_metrics(out / "metrics.jsonl", start)
    policy.train()
    if ddp:
        # DDP orders its buckets after its first backward: a throw-away one, and resumed sums are the same.
        model(collate(pairs, [0], **rows).to(device))[0].logps.sum().backward()
        optimizer.zero_grad()
    mine = [groups[rank::world] for groups in plan[start:]]
    batches = fpo.stream(pairs, [g for groups in mine for g in groups], device=device, cache=cache, **rows)
    bar = tqdm(total=len(plan), initial=start, desc=args.method, unit=" steps", disable=not main_rank)
    metrics_file = open(out / "metrics.jsonl" if main_rank else os.devnull, "a")  # noqa: SIM115
    trackers = report.trackers(args, start) if main_rank else []
    stop, stopping = resume.StopSignal(), 0.0
    started = time.perf_counter()
    for step, groups in enumerate(mine, start):
        lr = learning_rate(step, len(plan), args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        n_pairs = sum(len(g) for g in plan[step])
        sums: dict[str, torch.Tensor] = {}
        seen, tokens = [], torch.zeros((), device=device)
        for micro in range(len(groups)):
            batch, reference = next(batches)
            if ddp:  # read at the forward
                model.require_backward_grad_sync = micro == len(groups) - 1
            statistics, held = model(batch)
            loss, values = fpo.method_loss(
                args.method, statistics, held or reference, beta=args.beta, alpha=args.alpha,
                gamma=args.gamma, k=args.k, stop_gradient=not args.no_stop_gradient,
                feature_weights=feature_weights,
            )  # fmt: skip
            # The mean over the global batch's pairs; ranks are averaged, hence `world`.
            ((loss * batch.weight).sum() * (world / n_pairs)).backward()
            for name, value in step_sums(batch, loss, values, statistics).items():
                sums[name] = sums.get(name, 0.0) + value
            if groups[micro]:  # a padding pair is none of the step's
                seen.append((batch.index, loss.detach()))
            tokens = tokens + (batch.segment >= 0).sum()
        norm = precision.clip_gradients(parameters, args.max_grad_norm or math.inf)

        # ---- the step's only wait for the device: what is logged, and whether it is finite
        logged = torch.stack([*sums.values(), tokens, tokens.new_tensor(float(stop.came))]).double()
        if dist.is_initialized():
            dist.all_reduce(logged)
        *totals, total_tokens, stopping = logged.tolist()
        line = {"step": step + 1, **{name: value / n_pairs for name, value in zip(sums, totals, strict=True)}}
        line["grad_norm"] = norm.item()
        if math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]):
            optimizer.step()
        else:  # every rank sees the same sums, and decides the same
            what = f"step {step + 1}: loss or gradient is not finite; pairs: {bad_pairs(seen)}"
            if args.on_nan == "stop":
                if precision.all_finite(parameters):  # the step is not taken: what is before it is good
                    resume.save_state(out, step, policy, optimizer, meta, keep=args.keep)
                    what += "\n--resume auto --on_nan skip goes on without them"
                raise SystemExit(f"error: {what}")
            line = {"step": step + 1, "skipped": what}
        optimizer.zero_grad()

        # ---- log and evaluate
        seconds = time.perf_counter() - started
        line |= {"lr": lr, "pairs_per_s": n_pairs / seconds, "tokens_per_s": total_tokens / seconds}
        line["peak_memory_gb"] = peak_memory_gb(device)
        ends = stopping or step + 1 == len(plan)
        if args.eval_every and (step + 1) % args.eval_every == 0 and not ends:
            line |= {f"eval_{name}": value for name, value in scores(0).items()}
        with offline.writing(metrics_file.name, keep=True):
            metrics_file.write(json.dumps(line) + "\n")
            metrics_file.flush()
        for log in trackers:
            log(step + 1, line)
        shown = ("loss", "accuracy", "reward_margin", "pairs_per_s")
        bar.set_postfix({name: f"{line[name]:.3f}" for name in shown if name in line})
        bar.update()
        if stopping or (args.save_every and (step + 1) % args.save_every == 0):
            resume.save_state(out, step + 1, policy, optimizer, meta, keep=args.keep)
        if stopping:
            break
        started = time.perf_counter()
    bar.close()
    metrics_file.close()
    stop.restore()
    if stopping and step + 1 < len(plan):
        if main_rank:
            print(f"stopped by a signal after step {step + 1}; go on with --resume auto")
        if dist.is_initialized():
            dist.destroy_process_group()
        return

    # ---- what came out: the model first, so that no evaluation can lose it
    report.save_model(policy, tokenizer, args)
    after = scores(args.eval_samples)
    table = {name: (before[name], after[name]) for name in after}
    if main_rank:
        offline.write_text(out / "model/README.md", report.model_card(args, table))
        offline.write_json(out / "scores.json", {"before": before, "after": after})
        for log in trackers:
            log(len(plan), {f"eval_{name}": value for name, value in after.items()})
        report.print_table(table)
        for name in ("model", "metrics.jsonl", "config.json", "scores.json"):
            print(f"{out / name}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if main_rank and args.push_to_hub:  # after the others have left: an upload outlasts their patience
        return report.push(out / "model", args.push_to_hub)


if __name__ == "__main__":
    sys.exit(main())
