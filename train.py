"""Preference training on SAE features: FPO, and the methods that the paper compares it with.

    torchrun --standalone --nproc_per_node 2 train.py --method fpo --preset toy    a laptop, nothing prepared
    torchrun --nproc_per_node 4 train.py --method sft                              Gemma-2-2B, 4 × H100
    torchrun --nproc_per_node 4 train.py --method fpo

The stages, in order: settings, processes, data, model; the audit; Phase 1, the offline reference (Sec. 3);
Phase 2, the loop; what came out. All but Phase 1's cache goes into --out: config.json, metrics.jsonl,
scores.json, samples.json, model/ (a Hugging Face directory), and the states of --save_every.
A run that begins anew first moves what an earlier one left there to --out/earlier_N, all of it.
"""

import hashlib
import json
import math
import os
import resource
import secrets
import shlex
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import cached_file

import data
import fpo
import losses
import metrics
import offline
import runtime
import scale
from audit import audit_and_freeze
from batches import epoch_order, plan, stream, work_of
from checkpoint import (
    StopSignal,
    check_disk,
    cut_metrics,
    load_state,
    read_meta,
    save_state,
    saved_states,
    set_aside,
    state_tensors,
)
from loading import (
    choose_layout,
    load_config,
    load_data,
    load_policy,
    load_saes,
    make_toy_world,
    release,
    torch_dtype,
)
from runtime import UserError
from sampling import first_prompts, greedy_answers
from settings import Config, parse_args

# What a model with images has beside its tokenizer; its chat template is the tokenizer's by now.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


# ---------------------------------------------------------------------------- pieces of the loop
def check_folders(config):
    """UserError where the run can't write, or would write over the model that it starts from."""
    for name in ("out", "cache_dir"):
        runtime.check_output(name, getattr(config, name), folder=True)
    for name in ("model", "reference"):
        for written in (Path(config.out, "model"), Path(config.out)):
            if written.resolve() == Path(getattr(config, name)).resolve():
                raise UserError(f"--out {config.out}: it holds --{name}, which the run would write over")


def learning_rate(step: int, steps: int, config) -> float:
    """Linear warm-up, then constant (Table 5) or a cosine to 0 (Table 4). `step` counts from 0."""
    warmup = round(config.warmup_ratio * steps) if config.warmup_ratio else config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def plan_steps(config, pairs, documents, row_options, world: int) -> list[list[list[int]]]:
    """For every step its micro-batches, this and the other ranks'; one epoch after another."""
    per_epoch = math.ceil(len(pairs) / config.batch_size)
    steps = config.steps if config.steps is not None else config.epochs * per_epoch
    planned = []
    for step in range(steps):
        if step % per_epoch == 0:
            order = epoch_order(len(pairs), step // per_epoch, config.seed)
        start = step % per_epoch * config.batch_size
        batch = order[start : start + config.batch_size]
        planned.append(plan(batch, documents, world, max_tokens=config.micro_batch_tokens, **row_options))
    return planned


def step_sums(batch, loss, values, statistics) -> dict[str, torch.Tensor]:
    """Sums over a micro-batch's pairs of all that is logged, on the device."""
    chosen, rejected = (statistics.logps / statistics.lengths.clamp(min=1)).chunk(2)
    logged = {"loss": loss, "logps_chosen": chosen, **values}
    if "reward_chosen" in values:
        logged["logps_rejected"], logged["accuracy"] = rejected, (chosen > rejected).float()
        logged["reward_margin"] = values["reward_chosen"] - values["reward_rejected"]
        logged["reward_accuracy"] = (logged["reward_margin"] > 0).float()
    if "constraint" in values:  # what it weighs in u = LPD - margin - constraint
        logged["constraint_size"] = values["constraint"].abs()
        logged["margin_size"] = logged["reward_margin"].abs()
    return {name: (value.detach() * batch.weight).sum() for name, value in logged.items()}


def advice(line, config, floor) -> str | None:
    """One sentence if the constraint, or rounding alone, outweighs the reward margin in u (Eq. 8); else None.

    line: a step's metrics; floor: D_FPO that rounding makes, in the units of the run.
    """
    margin, times = line["margin_size"], line["constraint_size"] / max(line["margin_size"], 1e-30)
    if config.method == "fpo" and (noise := config.alpha * config.beta * floor) > margin:
        return f"rounding alone makes a constraint of {noise:.1g}, above the margin: try --dtype float32"
    better = f"--alpha {config.alpha / times:.1g}" if config.alpha and times > 1 else None
    return better and f"the constraint is {times:.2g} × the reward margin: {better} would balance them"


def peak_memory_gb(device) -> float:
    """Peak memory of this process in GB: the card's allocations, or the resident set without one."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else resident) / 1e9


# ---------------------------------------------------------------------------- trackers, and the run's model
def start_wandb(config, resumes: bool) -> str | None:
    """Log in to wandb where it is asked for, before any work. UserError where that fails: no key, no network.

    What is drawn into TensorBoard's files reaches wandb. Returns the run's id, for config.json: a resumed run
    goes on in the same curves, a new one in the same folder has its own.
    """
    if config.report_to != "wandb":
        return None
    import wandb

    path = Path(config.out, "config.json")
    left = json.loads(path.read_text()) if resumes and path.exists() else {}
    key = left.get("wandb_id") or secrets.token_hex(8)
    about = {"name": config.out, "id": key, "resume": "allow", "config": asdict(config)}
    try:
        wandb.init(**about, sync_tensorboard=True)
    except Exception as error:  # wandb's own kinds: no key, a wrong one, no network
        told = " ".join(str(error).split())
        raise UserError(f"--report_to wandb: {told:.300}") from error
    return key


def start_tracker(config, start: int):
    """Rank 0's TensorBoard writer, which wandb copies if asked for; None without --report_to.

    start: steps done before; TensorBoard drops the points that an interrupted run wrote after it.
    """
    if config.report_to == "none" or runtime.ranks()[0]:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(Path(config.out, "tensorboard"), purge_step=start + 1)


def draw(writer, step, values):
    """Numbers in the tracker, if there is one."""
    for name, value in values.items() if writer else ():
        writer.add_scalar(name, value, step)


def save_model(policy, tokenizer, config, *, weights=True):
    """OUT/model, a Hugging Face directory, written aside and renamed. Every rank must call it, twice.

    First with weights=False: what can fail for other reasons than a full disk is written before the training.
    """
    state = scale.full_state_dict(policy) if weights else {}
    if runtime.ranks()[0]:
        return
    lm, aside, final = policy.lm, Path(config.out) / "model.tmp", Path(config.out) / "model"
    dtype = lm.config.dtype = torch_dtype(config, lm.device)
    # Written anew: a base model's may be invalid, or not know the token that ends a turn.
    known = [lm.config.get_text_config().eos_token_id, lm.generation_config.eos_token_id]
    known += [tokenizer.eos_token_id, data.Chat(tokenizer).end]
    ends = {end for some in known for end in (some if isinstance(some, list) else [some])} - {None}
    pad = tokenizer.pad_token_id  # an added one may be beyond the vocabulary, and break what samples with it
    pad = pad if pad is None or pad < lm.config.get_text_config().vocab_size else min(ends)
    lm.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(ends), pad_token_id=pad
    )
    with runtime.writing(aside):
        if not weights:
            lm.config.save_pretrained(aside)
            lm.generation_config.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            for name in PROCESSOR_FILES:
                path = cached_file(config.model, name, _raise_exceptions_for_missing_entries=False)
                if path is not None:
                    shutil.copy(path, aside)
            return
        lm.save_pretrained(aside, state_dict={name: tensor.to(dtype) for name, tensor in state.items()})
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)


def write_scores(out, before: dict, after: dict, samples: list[dict], reference: str):
    """scores.json and samples.json, also on the terminal, and the command that tells more of the model."""
    runtime.write_json(out / "scores.json", {"before": before, "after": after})
    runtime.write_json(out / "samples.json", samples)
    print(f"\n{'held-out':<30}{'before':>10}{'after':>10}")
    for name, value in after.items():  # a resumed run may score what it did not at its start
        print(f"{name:<30}{before.get(name, math.nan):>10.4g}{value:>10.4g}")
    for sample in samples:
        print("", *(f"{name + ':':<8}{text!r}" for name, text in sample.items()), sep="\n")
    print(f"\n{out}: model, metrics.jsonl, config.json, scores.json, samples.json")
    print("what its samples tell:")
    models = ["--model", str(out / "model"), "--reference", reference]
    print(shlex.join(["python", "eval_diversity.py", *models]))


# ---------------------------------------------------------------------------- main
def main(config: Config | None = None, *, loss_function=fpo.method_loss, encoders=None):
    """Train: reads from top to bottom.

    Args:
        config: what parse_args gives; None: the command line's.
        loss_function: in place of fpo.method_loss, with its arguments and results (for experiments).
        encoders: in place of --sae's, one for each of --sae_layer (for experiments).
    """
    # ---- processes and folders
    config = parse_args() if config is None else config
    check_folders(config)
    device = runtime.start_processes()
    rank, world = runtime.ranks()
    if config.shard == "fsdp" and not dist.is_initialized():
        raise UserError("--shard fsdp: start it with torchrun")
    out, say = Path(config.out), print if rank == 0 else str  # `say` prints on rank 0 alone
    resumes = config.resume and bool(saved_states(out))
    if resumes:  # with other settings than before it ends here
        read_meta(config)
    lock = runtime.lock_folder(out) if rank == 0 else None  # noqa: F841  (held until the process ends)
    make_toy_world(config)

    # ---- SAEs, data, model: what is small comes first, so that a wrong value is found before the rest
    say(f"starting from {config.model}")
    needs_saes = config.sae is not None and config.method != "sft"
    saes, sites = load_saes(config, device) if needs_saes else ([], [])
    for sae, (layer, site) in zip(saes, sites, strict=True):
        say(f"SAE: layer {layer}, {site}, {sae.m} features")
    load_config(config.model)  # no model there: said before its tokenizer is missed
    tokenizer = data.load_tokenizer(config.model)
    pairs, held_out = (load_data(name, config, tokenizer) for name in ("dataset", "eval_dataset"))
    row_options = choose_layout(config, pairs, device)  # how a batch is laid out
    budget = {"max_tokens": config.micro_batch_tokens, **row_options}
    loading = config, device, encoders or saes, sites
    # π_θ; and the digest of the weights that it starts with, which are often π_ref's.
    policy, digest = load_policy(config.model, *loading)
    # Phase 1 stores at most 8 bytes for each feature of both responses, of every SAE.
    has_cache = config.method in losses.CACHED or (saes and config.feature_scale == "rms")
    widths = sum(sae.m for sae in saes) if has_cache and not resumes else 0
    stored = 16 * (len(pairs) + len(held_out)) * widths
    check_disk(config, policy, stored)
    save_model(policy, tokenizer, config, weights=False)  # what the end will write is tried now
    found = audit_and_freeze(policy, pairs, config, row_options)  # our forward against the model's own
    documents = pairs.documents(row_options["layout"])  # of each pair, their lengths
    steps = plan_steps(config, pairs, documents, row_options, world)  # which pairs go where, to the last step
    reached = max(learning_rate(step, len(steps), config) for step in range(len(steps)))
    if reached < 0.999 * config.lr:
        say(
            f"the warm-up is longer than the {len(steps)} steps: the learning rate reaches only {reached:.3g}"
        )
    runtime.barrier()  # every rank has looked into the folder
    wandb_id = start_wandb(config, resumes) if rank == 0 else None
    if rank == 0 and not resumes:
        set_aside(out)

    # ---- Phase 1: the offline reference (Sec. 3), by the policy itself where it starts from the reference
    cache = held_out_cache = None
    units: tuple[float, ...] = ()
    if has_cache:
        reference = policy
        if config.reference != config.model:  # gone again once it has said what is stored
            reference, digest = load_policy(config.reference, *loading)
        # Stored values are used only where they would be rounded much alike.
        compiled = config.compile and device.type == "cuda"
        arithmetic = {"device": device.type, "compute": str(torch_dtype(config, device)), "compile": compiled}
        arithmetic |= {"layout": row_options["layout"]}
        caches = []
        for part in (pairs, held_out):
            identity = offline.reference_identity(reference, part, weights=digest, arithmetic=arithmetic)
            caches.append(offline.build_reference(reference, part, config.cache_dir, identity, **budget))
        cache, held_out_cache = caches
        del reference  # from here on π_ref is not in memory
        release(device)
        say(f"reference: {cache.folder}, {cache.size() / len(pairs) / 1e3:.1f} kB a pair")
        if config.feature_scale == "rms":
            units = cache.units(pairs.sizes[:, 1:])  # s² of each SAE, by which D_FPO is divided
    if config.method in losses.NEEDED:  # TDPO's KL needs whole distributions: π_ref stays, frozen
        other = config.reference != config.model  # else its weights are hashed already
        reference, its_digest = load_policy(config.reference, *loading, frozen=True, hashed=other)
        digest = its_digest or digest
        policy.hold_reference(reference)
    if config.shard == "fsdp":  # a forward without gradients leaves the root's weights whole
        policy.reshard()

    def scores():
        """Held-out scores; where the KL is wanted, the reference is loaded for it alone."""
        lent = config.eval_kl and config.method not in (*losses.NEEDED, "sft")
        if lent:
            policy.hold_reference(load_policy(config.reference, *loading, frozen=True, hashed=False)[0])
        lookup = held_out_cache and held_out_cache.lookup
        options = {"lookup": lookup, "k": config.k, "units": units, "progress": rank == 0}
        table = metrics.score_pairs(policy, held_out, **options, **budget)
        if lent:
            policy.hold_reference(None)
            release(device)
        if config.shard == "fsdp":
            policy.reshard()
        if device.type == "cuda":  # the peak that is logged is that of training
            torch.cuda.reset_peak_memory_stats()
        columns = metrics.pair_columns(table, method=config.method).items()
        return {name: (above.sum() / below.sum()).item() for name, (above, below) in columns}

    # ---- Phase 2: the loop, from the start or from where it was left
    peak = metrics.peak_flops(device)
    ddp = dist.is_initialized() and config.shard != "fsdp"
    model = DistributedDataParallel(policy, gradient_as_bucket_view=True) if ddp else policy
    parameters = [p for p in policy.parameters() if p.requires_grad]  # all, but a vision tower's
    optimizer = scale.make_optimizer(
        config.optimizer, parameters, config.lr, shard=config.shard == "states",
        betas=(0.9, config.adam_beta2), fused=None if config.compile else False,
    )  # fmt: skip
    # What the run stands on, by the flag that names it: a resumed run must stand on the same.
    input_digests = {"dataset": pairs.digest(), "eval_dataset": held_out.digest(), "reference": digest}
    input_digests["model"] = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
    input_digests["sae"] = [offline.sae_identity(*pair) for pair in zip(policy.saes, sites, strict=True)]
    start = 0
    if resumes:
        meta = read_meta(config, input_digests)  # refused on other tokens, weights, SAE or template
        load_state(out, policy, optimizer)
        start, before, answers = meta["step"], meta["before"], meta["answers"]
    else:
        # What it answers now is shown at the end; of a sharded model not, which can't generate.
        prompts = first_prompts(held_out, config.show if config.shard != "fsdp" else 0)
        answers = greedy_answers(policy, tokenizer, prompts)
        before = scores()
    meta = {"settings": asdict(config), "input_digests": input_digests, "before": before, "answers": answers}
    if rank == 0:
        known = {"sae_layer": [layer for layer, _ in sites], "units": units, "audit": found}
        known |= {"wandb_id": wandb_id} if wandb_id else {}
        runtime.write_json(out / "config.json", asdict(config) | known)
        cut_metrics(out / "metrics.jsonl", start)
    policy.train()  # which turns checkpointing on; dropout is 0 in any case
    lookup = cache and cache.lookup
    settings = {name: getattr(config, name) for name in ("beta", "alpha", "gamma", "k", "stop_gradient")}
    # One throw-away micro-step at every start, of the largest micro-batch, beside the optimizer's states:
    # where memory is too small, the run ends here. And DDP orders its buckets at its second forward: so the
    # order, and with it the sums, of a resumed run are those of an uninterrupted one.
    state_tensors(policy, optimizer)  # which makes them
    largest = max((group for step in steps for group in step), key=lambda group: pairs.sizes[group].sum())
    batch, reference = next(stream(pairs, [largest], device=device, lookup=lookup, **row_options))
    statistics, held_reference = model(batch)
    loss, _ = loss_function(config.method, statistics, held_reference or reference, units=units, **settings)
    loss.sum().backward()
    optimizer.zero_grad()
    del batch, reference, statistics, held_reference, loss
    mine = [groups[rank::world] for groups in steps[start:]]  # per step this rank's micro-batches
    # Batches are made ahead of their work, each with what Phase 1 stored of its pairs.
    flat = [group for groups in mine for group in groups]
    batches = stream(pairs, flat, device=device, lookup=lookup, **row_options)
    bar = tqdm(total=len(steps), initial=start, desc=config.method, unit=" steps", disable=rank > 0)
    metrics_file = open(out / "metrics.jsonl" if rank == 0 else os.devnull, "a")  # noqa: SIM115
    writer, stop, stopping = start_tracker(config, start), StopSignal(), 0.0
    started = time.perf_counter()
    for step, groups in enumerate(mine, start):
        # ---- learning rate
        lr = learning_rate(step, len(steps), config)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # ---- micro-steps: gradients of the mean loss over the pairs of the global batch
        n_pairs = sum(len(g) for g in steps[step])  # of all ranks; fewer than batch_size at an epoch's end
        sums: dict[str, torch.Tensor] = {}
        for micro in range(len(groups)):
            batch, reference = next(batches)  # tokens; π_ref's statistics from the cache, or None
            if ddp:  # gradients are exchanged once a step; DDP reads this at the forward
                model.require_backward_grad_sync = micro == len(groups) - 1
            statistics, held_reference = model(batch)  # log π, c̄, perhaps KL; π_ref's, if it is in memory
            loss, values = loss_function(
                config.method, statistics, held_reference or reference, units=units, **settings
            )  # (B,)
            # DDP and FSDP2 average over the ranks, hence `world`; a padding pair has weight 0.
            ((loss * batch.weight).sum() * (world / n_pairs)).backward()
            for name, value in step_sums(batch, loss, values, statistics).items():
                sums[name] = sums.get(name, 0.0) + value
        norm = scale.gradient_norm(parameters)  # () before clipping, of all ranks' gradients

        # ---- the step's only wait for the device: what is logged, and whether it is finite
        # One rank's signal stops all: it travels with the sums.
        signalled = torch.full((), float(stop.came > 0), device=device)
        logged = torch.stack([*sums.values(), signalled]).double()
        if dist.is_initialized():
            dist.all_reduce(logged)
        *totals, stopping = logged.tolist()  # sums over the global batch, the same on every rank
        line = {"step": step + 1, **{name: value / n_pairs for name, value in zip(sums, totals, strict=True)}}
        line |= {"grad_norm": norm.item(), "lr": lr}

        # ---- clip and update; every rank sees the same sums, and decides the same
        if not (math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])):
            among = sorted(i for group in steps[step] for i in group)
            if step > start:  # the weights are still those of the last good step
                save_state(out, step, policy, optimizer, meta)
            raise UserError(f"step {step + 1}: loss or gradient is not finite; it is among pairs {among}")
        if 0 < config.max_grad_norm < line["grad_norm"]:
            scale.scale_gradients_(parameters, config.max_grad_norm / (line["grad_norm"] + 1e-6))
        optimizer.step()  # with float32's updates, in bf16 too: scale.ExactOptimizer
        optimizer.zero_grad()

        # ---- log and evaluate
        seconds = time.perf_counter() - started
        waits = {"waits_each": config.shard == "fsdp"}
        tokens, computed = work_of(steps[step], documents, world, **waits, **row_options)
        line |= {"pairs_per_s": n_pairs / seconds, "tokens_per_s": tokens / seconds}
        line["fill"] = tokens / computed  # 1: no padding, and no rank waits for another
        if peak:  # the share of the cards' speed in bf16 that went into real tokens
            targets = sum(int(pairs.sizes[i, 1:].sum()) for group in steps[step] for i in group)
            line["mfu"] = metrics.step_flops(policy.lm, tokens, targets) / seconds / (world * peak)
        line |= {"peak_memory_gb": peak_memory_gb(device)}
        if "constraint_size" in line:  # what the constraint weighs in u beside the reward margin
            sizes = line["constraint_size"], line["margin_size"]
            line["constraint_share"] = sizes[0] / max(sum(sizes), 1e-8)  # both are 0 at step 1
            # The audit's floor is in D's own unit: it is divided as D is.
            floor = (found["floor"] or 0.0) / (sum(units) / len(units) if units else 1)
            if step == 9 and rank == 0 and (text := advice(line, config, floor)):
                tqdm.write(f"step 10: {text}")
        ends = stopping or step + 1 == len(steps)  # then the scores come after the loop
        if config.eval_every and (step + 1) % config.eval_every == 0 and not ends:
            line |= {f"eval_{name}": value for name, value in scores().items()}
        with runtime.writing(metrics_file.name, keep=True):  # a full disk is told in one line
            metrics_file.write(json.dumps(line) + "\n")
            metrics_file.flush()
        draw(writer, step + 1, line)
        shown = ("loss", "accuracy", "reward_margin", "constraint", "pairs_per_s", "fill", "mfu")
        bar.set_postfix({name: f"{line[name]:.3f}" for name in shown if name in line})
        bar.update()

        # ---- save: what a kill loses is at most --save_every steps
        if stopping or (config.save_every and (step + 1) % config.save_every == 0):
            save_state(out, step + 1, policy, optimizer, meta)
        if stopping:
            break
        started = time.perf_counter()  # scores and saving don't count
    bar.close()
    metrics_file.close()
    if stopping and step + 1 < len(steps):
        stop.restore()
        say(f"stopped by a signal after step {step + 1}; go on with --resume")
    else:
        # ---- what came out: the model first, so that no evaluation can lose it
        save_model(policy, tokenizer, config)
        stop.restore()
        after, prompts = scores(), first_prompts(held_out, len(answers))
        texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
        columns = zip(texts, answers, greedy_answers(policy, tokenizer, prompts), strict=True)
        samples = [dict(zip(("prompt", "before", "after"), row, strict=True)) for row in columns]
        draw(writer, len(steps), {f"eval_{name}": value for name, value in after.items()})
        if rank == 0:
            write_scores(out, before, after, samples, config.reference)
    if dist.is_initialized():
        dist.barrier()
        # DDP's part in C++ must not be the last that holds gloo's group: it would end gloo's threads while it
        # keeps Python's lock, which one of them may be waiting for, and the rank would hang here for ever.
        del model
        dist.destroy_process_group()


if __name__ == "__main__":
    runtime.run_script(main)
