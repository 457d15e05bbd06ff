"""Preference training on SAE features: FPO, and the methods that the paper compares it with.

    torchrun --standalone --nproc_per_node 2 train.py --method fpo --preset toy      a laptop, nothing prepared
    torchrun --nproc_per_node 4 train.py --method sft                                4 × H100, Gemma-2-2B
    torchrun --nproc_per_node 4 train.py --method fpo

The stages, in order: processes and data; the model; Phase 1, the offline reference (Sec. 3); the loop, Phase 2;
what came out. Everything is written into --out: config.json, metrics.jsonl, model/ (a Hugging Face directory).
"""

import argparse
import json
import math
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

import fpo
import presets
from data import epoch_order, load_pairs, micro_batches
from eval_diversity import evaluate


# ---------------------------------------------------------------------------- flags
def parse_args(argv=None):
    """Flags over the preset's values over nothing: every value ends up in config.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    presets.shared_flags(parser)
    parser.add_argument("--method", default="fpo", choices=fpo.METHODS, help="a row of Table 1 (fpo)")
    what = parser.add_argument_group("data and files")
    what.add_argument("--eval_dataset", help="held-out pairs")
    what.add_argument("--cache_dir", help="Phase 1's reference (runs/PRESET/reference)")
    what.add_argument(
        "--cache_top", type=int, default=0, help="keep N features a response, at least 4 k; 0: all (exact)"
    )
    what.add_argument("--out", help="folder of this run (runs/PRESET/METHOD)")
    loss = parser.add_argument_group("loss (Table 5 by method)")
    loss.add_argument("--beta", type=float, help="β (0.1; SimPO 2)")
    loss.add_argument("--alpha", type=float, help="α of δ_TDPO2 and δ_FPO (0.5)")
    loss.add_argument("--gamma", type=float, help="γ of SimPO (0.5)")
    loss.add_argument(
        "--no_stop_gradient", action="store_true", help="let δ_FPO's chosen term learn (Table 3)"
    )
    optim = parser.add_argument_group("optimisation (Table 5)")
    optim.add_argument("--optimizer", choices=("adam", "rmsprop"), help="2B: adam, 9B: rmsprop")
    optim.add_argument("--lr", type=float, help="learning rate (5e-7; toy 5e-4)")
    optim.add_argument(
        "--schedule", choices=("constant", "cosine"), help="after warm-up (constant; Table 4: cosine)"
    )
    optim.add_argument("--warmup_steps", type=int, help="linear (150; toy 10)")
    optim.add_argument(
        "--warmup_ratio", type=float, help="warm-up as a share of all steps, instead (Table 4: 0.1)"
    )
    optim.add_argument("--max_grad_norm", type=float, help="gradient clip (authors' code: 1.0); 0: none")
    optim.add_argument("--batch_size", type=int, help="pairs to a step, over all ranks (32)")
    optim.add_argument("--epochs", type=int, help="passes over the data (1)")
    optim.add_argument("--steps", type=int, help="stop after so many steps, whatever --epochs")
    optim.add_argument("--seed", type=int, default=0, help="of the order of the data and of sampling")
    fast = parser.add_argument_group("memory and speed")
    fast.add_argument("--micro_batch_pairs", type=int, default=0, help="most pairs of a forward; 0: no limit")
    fast.add_argument(
        "--micro_batch_tokens", type=int, help="most tokens of a forward, padding counted; 0: no limit"
    )
    fast.add_argument(
        "--layout",
        default="auto",
        choices=("auto", "shared", "separate"),
        help="prompt computed once or twice",
    )
    fast.add_argument(
        "--activation_checkpointing", action=argparse.BooleanOptionalAction, default=None, help="Table 5: on"
    )
    watch = parser.add_argument_group("evaluation")
    watch.add_argument(
        "--eval_every", type=int, help="held-out pairs every so many steps; 0: at the ends alone"
    )
    watch.add_argument(
        "--eval_kl", action=argparse.BooleanOptionalAction, default=None, help="load the reference for KL"
    )
    watch.add_argument(
        "--eval_samples", type=int, help="responses a prompt for the entropy, before and after; 0: none"
    )
    watch.add_argument("--eval_tokens", type=int, help="longest sampled response")
    args = parser.parse_args(argv)

    preset = presets.PRESETS[args.preset]
    for name, value in {**preset, **presets.TABLE_5[args.method]}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.method == "sft":  # another data set, and no SAE to read
        asked = parser.parse_args(argv)
        args.dataset, args.eval_dataset = (
            asked.dataset or preset["sft_dataset"],
            asked.eval_dataset or preset["sft_eval_dataset"],
        )
    args.start_note = "" if args.model else presets.default_model(args.preset, args.method)[1]
    args.model = args.model or presets.default_model(args.preset, args.method)[0]
    args.reference = args.reference or args.model
    args.cache_dir = args.cache_dir or f"runs/{args.preset}/reference"
    args.out = args.out or f"runs/{args.preset}/{args.method}"
    check_args(args)
    return args


def check_args(args):
    """Errors that need no file: each names the value and what is allowed."""
    least = {
        "lr": 0,
        "beta": 0,
        "batch_size": 1,
        "epochs": 1,
        "k": 1,
        "max_length": 2,
        "max_prompt_length": 1,
    }
    least |= {"warmup_steps": 0, "micro_batch_pairs": 0, "micro_batch_tokens": 0, "eval_every": 0, "alpha": 0}
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= low):
            raise ValueError(f"--{name} {value}: must be at least {low}")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps}: must be at least 1")
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


def make_optimizer(args, parameters):
    """Adam (2B) or RMSprop (9B), Table 5. Adam's betas are the authors' code's; the paper names none."""
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=args.lr, betas=(0.9, 0.95), eps=1e-8)
    return torch.optim.RMSprop(parameters, lr=args.lr)


def plan_steps(args, pairs, layout: str, world: int) -> list[list[list[int]]]:
    """For every step its micro-batches, this and the other ranks'; epochs follow on each other."""
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


def stop_on_bad_loss(step: int, seen: list):
    """End the run where the loss is not finite: nothing of this step reaches the weights or a file."""
    bad = [int(i) for index, loss in seen for i, bad in zip(index, ~loss.isfinite(), strict=True) if bad]
    raise FloatingPointError(
        f"step {step}: loss or gradient is not finite; pairs of this rank with such a loss: {bad}"
    )


# ---------------------------------------------------------------------------- what comes out
def save_model(lm, tokenizer, args, scores: dict):
    """A Hugging Face directory with a model card, written aside and renamed."""
    out, aside = Path(args.out) / "model", Path(args.out) / "model.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    lm.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    rows = "\n".join(f"| {name} | {before:.4g} | {after:.4g} |" for name, (before, after) in scores.items())
    settings = "\n".join(f"- {name}: {value}" for name, value in sorted(vars(args).items()))
    front = f"---\nlibrary_name: transformers\nbase_model: {args.model}\ndatasets: [{args.dataset.split(':')[0]}]\n"
    front += f"tags: [{args.method}, preference-optimization]\n---\n"
    (aside / "README.md").write_text(
        f"{front}\n# {args.model}, trained with {args.method.upper()}\n\n"
        f"Method: {args.method} (arXiv 2411.07618). Data: {args.dataset}.\n\n"
        f"| held-out {args.eval_dataset} | before | after |\n|---|---|---|\n{rows}\n\nSettings:\n\n{settings}\n"
    )
    old = out.with_name("model.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    aside.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def print_table(before: dict, after: dict) -> dict:
    """The run in a few lines: held-out scores before and after."""
    both = {name: (before.get(name, 0.0), value) for name, value in after.items()}
    print(f"\n{'held-out':<22}{'before':>10}{'after':>10}")
    for name, (a, b) in both.items():
        print(f"{name:<22}{a:>10.4f}{b:>10.4f}")
    return both


# ---------------------------------------------------------------------------- main
def main(argv=None):
    """Train. Reads from top to bottom."""
    # ---- processes and flags
    rank, world = 0, 1
    with presets.one_line_errors(0):
        args = parse_args(argv)
    device = presets.start_processes()
    rank, world = fpo.ranks()
    main_rank = rank == 0
    presets.make_toy_world(args)

    # ---- data: tokens of both sets, before any model is loaded
    with presets.one_line_errors(rank):
        tokenizer = presets.load_tokenizer(args.model)
        options = {
            "max_length": args.max_length,
            "max_prompt_length": args.max_prompt_length,
            "sft": args.method == "sft",
        }
        pairs = load_pairs(args.dataset, tokenizer, progress=main_rank, **options)
        held_out = load_pairs(args.eval_dataset, tokenizer, progress=main_rank, **options)
        needs_sae = args.method == "fpo" or (args.eval_kl and args.method != "sft")
        saes, sites = presets.load_saes(args, device) if needs_sae else ([], [])
        layout = ("shared" if device.type == "cuda" else "separate") if args.layout == "auto" else args.layout
        rows = presets.rows_of(args, tokenizer, layout)
        budget = {"max_tokens": args.micro_batch_tokens, "max_pairs": args.micro_batch_pairs or 16}

        # ---- the model
        policy = fpo.Policy(presets.load_lm(args.model, device), saes, sites)
    if main_rank:
        print(args.start_note)
        for name, data in (("train", pairs), ("held out", held_out)):
            print(
                f"{name}: {len(data)} pairs", *(f"; {reason}: {n}" for reason, n in data.notes.items() if n)
            )

    # ---- Phase 1: the offline reference
    cache = held_out_cache = None
    if args.method in fpo.CACHED:
        same = args.reference == args.model
        frozen = policy if same else fpo.Policy(presets.load_lm(args.reference, device), saes, sites)
        weights = fpo.weights_digest(frozen.lm)
        arithmetic = {"layout": layout, "device": device.type}
        caches = []
        for data in (pairs, held_out):
            identity = fpo.reference_identity(
                frozen, data, weights=weights, arithmetic=arithmetic, cache_top=args.cache_top
            )
            caches.append(fpo.build_reference(frozen, data, args.cache_dir, identity, **budget, **rows))
        cache, held_out_cache = caches
        if main_rank:
            print(f"reference: {cache.folder}, {cache.size() / len(pairs) / 1e3:.1f} kB a pair")
        del frozen
    elif args.method in fpo.NEEDED:
        policy.hold_reference(presets.load_lm(args.reference, device))

    def scores(samples):
        """Held-out scores; for the KL the reference is loaded here alone."""
        lent = args.eval_kl and args.method not in (*fpo.NEEDED, "sft")
        if lent:
            policy.hold_reference(presets.load_lm(args.reference, device))
        result = evaluate(
            policy, tokenizer, held_out, cache=held_out_cache, k=args.k, samples=samples,
            max_new_tokens=args.eval_tokens, seed=args.seed, progress=main_rank, **budget, **rows,
        )  # fmt: skip
        if lent:
            policy.hold_reference(None)
        return result

    # ---- the loop, Phase 2
    plan = plan_steps(args, pairs, layout, world)
    if args.activation_checkpointing:
        policy.lm.activation_checkpointing_enable({"use_reentrant": False})
    before = scores(args.eval_samples)
    policy.train()
    model = DistributedDataParallel(policy, gradient_as_bucket_view=True) if dist.is_initialized() else policy
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = make_optimizer(args, parameters)
    out = Path(args.out)
    if main_rank:
        out.mkdir(parents=True, exist_ok=True)
        fpo.write_json(out / "config.json", vars(args))
        metrics_file = open(out / "metrics.jsonl", "w")  # noqa: SIM115
    mine = [groups[rank::world] for groups in plan]
    batches = fpo.stream(pairs, [g for groups in mine for g in groups], device=device, cache=cache, **rows)
    bar = tqdm(total=len(plan), desc=args.method, unit=" steps", disable=not main_rank)
    started = time.perf_counter()
    for step, groups in enumerate(mine):
        lr = learning_rate(step, len(plan), args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        n_pairs = sum(len(g) for g in plan[step])
        sums, seen, tokens = {}, [], torch.zeros((), device=device)
        for micro in range(len(groups)):
            batch, reference = next(batches)
            if world > 1:  # DDP reads this at its forward
                model.require_backward_grad_sync = micro == len(groups) - 1
            statistics, held = model(batch)
            loss, values = fpo.method_loss(
                args.method, statistics, held or reference, beta=args.beta, alpha=args.alpha, gamma=args.gamma,
                k=args.k, stop_gradient=not args.no_stop_gradient,
            )  # fmt: skip
            # The mean over the global batch's pairs; DDP averages over ranks, hence `world`.
            ((loss * batch.weight).sum() * (world / n_pairs)).backward()
            for name, value in step_sums(batch, loss, values, statistics).items():
                sums[name] = sums.get(name, 0.0) + value
            seen.append((batch.index, loss.detach()))
            tokens = tokens + (batch.segment >= 0).sum()
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)

        # ---- the step's only wait for the device: what is logged, and whether it is finite
        logged = torch.stack([*sums.values(), tokens]).double()
        if dist.is_initialized():
            dist.all_reduce(logged)
        *logged, total_tokens = logged.tolist()
        line = {"step": step + 1, **{name: value / n_pairs for name, value in zip(sums, logged, strict=True)}}
        line["grad_norm"] = norm.item()
        if not (math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])):
            stop_on_bad_loss(step + 1, seen)
        optimizer.step()
        optimizer.zero_grad()

        # ---- log and evaluate
        now = time.perf_counter()
        line |= {
            "lr": lr,
            "pairs_per_s": n_pairs / (now - started),
            "tokens_per_s": total_tokens / (now - started),
        }
        line["peak_memory_gb"] = peak_memory_gb(device)
        if args.eval_every and (step + 1) % args.eval_every == 0 and step + 1 < len(plan):
            line |= {f"eval_{name}": value for name, value in scores(0).items()}
        if main_rank:
            metrics_file.write(json.dumps(line) + "\n")
            metrics_file.flush()
            shown = {name: line[name] for name in ("loss", "accuracy", "reward_margin") if name in line}
            bar.set_postfix(
                {name: f"{value:.3f}" for name, value in shown.items()}
                | {"pairs/s": f"{line['pairs_per_s']:.1f}"}
            )
            bar.update()
        started = time.perf_counter()
    bar.close()

    # ---- what came out
    after = scores(args.eval_samples)
    if main_rank:
        metrics_file.close()
        table = print_table(before, after)
        save_model(policy.lm, tokenizer, args, table)
        fpo.write_json(out / "scores.json", {"before": before, "after": after})
        print(f"\nmodel    {out / 'model'}\nmetrics  {out / 'metrics.jsonl'}\nconfig   {out / 'config.json'}")
        print(f"scores   {out / 'scores.json'}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
