"""Speed and memory: every method's step, its parts alone, another trainer's step, and what a card allows.

    python -m experiments.bench                   CPU: a tiny shape, then one with a wide vocabulary
    python -m experiments.bench --shape scaled    CPU: Gemma-2-2B with every width an eighth
    python -m experiments.bench --shape gemma-2-9b --rank_of 4 --checkpointing --compile    CUDA: a rank of 4
    python -m experiments.bench --shape gemma-2-9b --rank_of 4 --checkpointing --count      no card needed
    python -m experiments.bench --head_only | --reference_pass | --updates | --peer trl | --draw JSON SVG

The step is the real one, with random weights: `data.collate`, `fpo.Policy`, `fpo.method_loss`, backward,
clip, update. Steps take turns (A B C, A B C, …): a figure is the median over the rounds, a ratio the median
of the rounds' ratios, so that it holds on a busy machine too.

Memory: on CUDA the allocator's peak within a step; on the CPU the resident set's, above what the process held
before it made the model. Each step has a process of its own, since an allocator keeps what another one left.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, Gemma2Config

import data
import fpo
import offline
import scale
from experiments import count
from experiments.plan import GEMMA_2
from sae import JumpReLUSAE
from train import TABLE_5, refuse

CUDA = torch.cuda.is_available()
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
PAPER_FIG_4 = {"tdpo2": 53.5, "tdpo1": 50.1, "dpo": 47.6, "fpo": 45.5, "simpo": 45.1}  # GB, one H100, 2B


# ---------------------------------------------------------------------------- flags
def parse_args(argv=None):
    """Flags; a shape fills in what is not given. UserError for a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = refuse
    add, on = parser.add_argument, {"action": "store_true"}
    add("--shape", choices=SHAPES, help="model, SAE, lengths and optimizer (tiny, then wide)")
    for name in ("pairs", "prompt", "response", "vocab_size", "layers"):
        add(f"--{name}", type=int, help="instead of the shape's")
    add("--methods", nargs="+", choices=fpo.METHODS[1:], default=["simpo", "dpo", "fpo", "tdpo1", "tdpo2"])
    add("--rounds", type=int, default=5, help="of all steps in turn (5)")
    add("--compile", **on, help="compile each layer")
    add("--checkpointing", **on, help="activation checkpointing")
    add("--rank_of", type=int, default=1, help="one rank of N: its share of the optimizer's states (1)")
    add("--json", help="write all figures to this file")
    add("--draw", nargs=2, metavar=("JSON", "SVG"), help="draw a --json file of one shape beside Fig. 4")
    add("--count", **on, help="FLOPs and bytes of a step, and the time that a card's limits allow")
    add("--head_only", **on, help="the head alone, against plain logits")
    add("--reference_pass", **on, help="Phase 1, against a bare forward")
    add("--updates", **on, help="updates that bf16 weights lose at lr 5e-7")
    add("--peer", choices=("trl",), help="DPO here and in TRL's DPOTrainer")
    add("--only", help=argparse.SUPPRESS)  # in a process of its own: one step, for its memory
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) is int and value < 1:
            refuse(f"--{name} {value}: must be at least 1")
    args.argv = sys.argv[1:] if argv is None else argv
    if args.json:
        data.check_output("json", args.json, folder=False)
    return args


def with_shape(args, name):
    """A copy of the flags, completed by the shape; with its `config`, and `rows` as data.collate takes it."""
    changes, sae_width, lengths, rule = SHAPES[name]
    args = argparse.Namespace(**vars(args) | {"shape": name, "sae_width": sae_width, "rule": rule})
    for flag, value in zip(("pairs", "prompt", "response"), lengths, strict=True):
        setattr(args, flag, getattr(args, flag) or value)
    given = {"vocab_size": args.vocab_size, "num_hidden_layers": args.layers}
    changes, flex = changes | {key: value for key, value in given.items() if value}, CUDA or args.count
    args.config = Gemma2Config(**changes, attn_implementation="flex_attention" if flex else "eager")
    layout = "shared" if flex or args.prompt >= args.response else "separate"  # train.py's rule
    args.rows = {"layout": layout, "row_multiple": 128 if flex else 1}
    args.title = f"{name}: {args.pairs} × ({args.prompt} + 2 × {args.response}) tokens, {layout} rows"
    return args


# ---------------------------------------------------------------------------- what is measured
def make_lm(args):
    """A model of the shape with random weights, on the device; bf16 on CUDA."""
    torch.manual_seed(0)
    options = {"attn_implementation": args.config._attn_implementation}
    options["dtype"] = torch.bfloat16 if CUDA else torch.float32
    with torch.device("cuda" if CUDA else "cpu"):
        return AutoModelForCausalLM.from_config(args.config, **options)


def make_pairs(args, n):
    """`n` pairs of random tokens, all of the lengths asked for."""
    sizes, generator = (args.prompt, args.response, args.response), torch.Generator().manual_seed(0)
    tokens = torch.randint(4, args.config.vocab_size, (n, sum(sizes)), generator=generator)
    return data.Pairs([[part.tolist() for part in row.split(sizes)] for row in tokens])


def plain_logps(states, weight, targets, softcap):
    """log π(token) of `scale.token_statistics` from all (N, V) logits at once, for comparison."""
    z = softcap * ((states @ weight.T).float() / softcap).tanh()
    return z.log_softmax(-1).gather(1, targets[:, None])[:, 0]


class Steps:
    """The training steps of some methods on one model."""

    def __init__(self, args, methods):
        self.lm, self.pairs, self.rows = make_lm(args), make_pairs(args, args.pairs), args.rows
        self.policies, layers = dict.fromkeys(methods, fpo.Policy(self.lm)), list(self.lm.model.layers)
        if "fpo" in methods:
            self.policies["fpo"] = self.with_sae(args)
        if held := [method for method in methods if method in fpo.NEEDED]:
            self.policies |= dict.fromkeys(held, fpo.Policy(self.lm))
            self.policies[held[0]].hold_reference(make_lm(args))
            layers += self.policies[held[0]].reference[0].model.layers
        for layer in layers if args.compile else ():  # after the hooks
            layer.compile()
        self.parameters = list(self.lm.parameters())
        sizes = torch.tensor([p.numel() for p in self.parameters])
        share = int((sizes.cumsum(0) < sizes.sum() / args.rank_of).sum()) + 1  # of which one rank has states
        self.optimizer = scale.make_optimizer(args.rule, self.parameters[:share], 5e-7, shard=False)
        with torch.no_grad():  # what Phase 1 would have stored
            self.cached = {method: policy(self.batch())[0] for method, policy in self.policies.items()}
        if args.checkpointing:
            self.lm.activation_checkpointing_enable({"use_reentrant": False})
        self.lm.train()

    def with_sae(self, args):
        """A Policy with a random SAE at the last layer; 1 feature in 300 is active, as in Gemma Scope."""
        d, m, device = self.lm.config.hidden_size, args.sae_width, self.lm.device
        W_enc, zeros = torch.randn(d, m, device=device) / d**0.5, torch.zeros(m, device=device)
        sae = JumpReLUSAE(W_enc, zeros, W_enc.T, zeros.new_zeros(d), zeros)
        sae.W_dec = sae.W_dec.new_empty(0)  # training never decodes
        policy = fpo.Policy(self.lm, [sae], [(self.lm.config.num_hidden_layers - 1, "res")])
        with torch.no_grad():
            z = policy.read_sites(self.batch())[0][:32].float() @ W_enc
        sae.threshold.fill_(z.quantile(1 - 1 / 300).clamp(min=0))
        return policy

    def batch(self):
        """All pairs as one micro-batch."""
        return data.collate(self.pairs, range(len(self.pairs)), **self.rows).to(self.lm.device)

    def step(self, method):
        """What train.py does in a step: a micro-batch, backward, clip at 1, update."""
        statistics, held = self.policies[method](self.batch())
        settings = {name: value for name, value in TABLE_5[method].items() if value is not None}
        loss, _ = fpo.method_loss(method, statistics, held or self.cached[method], **settings)
        loss.mean().backward()
        if (norm := scale.gradient_norm(self.parameters).item()) > 1:
            scale.scale_gradients_(self.parameters, 1 / (norm + 1e-6))
        self.optimizer.step()
        self.lm.zero_grad()


# ---------------------------------------------------------------------------- time and memory
def seconds(step):
    """Wall time of one call, the device's work included."""
    wait = torch.cuda.synchronize if CUDA else int
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def in_turn(steps, rounds):
    """Seconds of each step, A B C A B C, `rounds` times after a warm-up, which compiles and allocates."""
    taken = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            taken[name].append(seconds(step))
    return {name: times[1:] for name, times in taken.items()}


def median_ratio(above, below):
    """The median of the rounds' ratios."""
    return median(a / b for a, b in zip(above, below, strict=True))


def resident(mark="VmRSS"):
    """GB of this process now (CUDA: allocated), or for VmHWM the most since the mark was set back."""
    if CUDA:
        return (torch.cuda.max_memory_allocated() if mark == "VmHWM" else torch.cuda.memory_allocated()) / 1e9
    return int(Path("/proc/self/status").read_text().split(f"{mark}:")[1].split()[0]) * 1024 / 1e9


def peak_of(make, name):
    """GB at the peak of one step, above what the process held before it was made."""
    before, step = resident(), make([name])[name]
    step()  # the first one makes the optimizer's states
    torch.cuda.reset_peak_memory_stats() if CUDA else Path("/proc/self/clear_refs").write_text("5")
    step()
    return resident("VmHWM") - before


def compare(args, make, names, **others):
    """Time and memory of some steps, beside those of the first.

    make: a function of names that gives {name: step without arguments}; others: steps to be timed with them.
    For each one's memory this command runs again in a process of its own, where --only names it.
    Returns: [{"name", "ms", "peak GB", "time/FIRST", "memory/FIRST"}], and {name: seconds of each round}.
    """
    if args.only:
        print(f"\n{peak_of(make, args.only)}")
        sys.exit()
    peaks, shape = {}, ["--shape", args.shape] if args.shape else []
    for name in names:
        command = [sys.executable, "-m", "experiments.bench", *args.argv, *shape, "--only", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[1])
        peaks[name] = float(done.stdout.split()[-1])
    times, first, rows = in_turn(make(names) | others, args.rounds), names[0], []
    for name in names:
        rows.append({"name": name, "ms": 1e3 * median(times[name]), "peak GB": peaks[name]})
        rows[-1][f"time/{first}"] = median_ratio(times[name], times[first])
        rows[-1][f"memory/{first}"] = peaks[name] / peaks[first]
    return rows, times


def print_rows(title, rows):
    """Dicts of equal keys as a table."""
    print(f"\n{title}\n" + "".join(f"{name:>16}" for name in rows[0]))
    for row in rows:
        cells = (f"{value:.4g}" if isinstance(value, float) else value for value in row.values())
        print("".join(f"{cell:>16}" for cell in cells), flush=True)


# ---------------------------------------------------------------------------- the sections
def methods_table(args):
    """Each method's step: time, memory, FLOP/s and MFU, beside the first one's.

    `MFU`: 6 · parameters · tokens computed / seconds, of the card's peak, elsewhere of this machine's own
    matrix product in the same rounds. `of product`: FLOP/s of all the step's products, of that product's.
    """
    size, made = 8192 if CUDA else 2048, []
    square = torch.randn(size, size, device="cuda", dtype=torch.bfloat16) if CUDA else torch.randn(size, size)

    def make(names):
        made.append(Steps(args, names))
        return {name: partial(made[0].step, name) for name in names}

    rows, times = compare(args, make, args.methods, product=partial(torch.mm, square, square))
    product, parameters = times["product"], sum(p.numel() for p in made[0].parameters)
    cards = [name for name in count.CARDS if CUDA and name in torch.cuda.get_device_name()]
    peak = count.CARDS[cards[0]]["bfloat16"] if cards else 2 * size**3 / median(product)
    for row in rows:
        with count.flop_counter() as flops:
            made[0].step(row["name"])
        s, done = row["ms"] / 1e3, flops.get_total_flops()
        row |= {"pairs/s": args.pairs / s, "MFU": 6 * parameters * made[0].batch().tokens.numel() / s / peak}
        row |= {"GFLOP/s": done / s / 1e9}
        row["of product"] = done / (2 * size**3) * median_ratio(product, times[row["name"]])
    print_rows(f"{args.title}, {parameters / 1e6:.1f} M parameters", rows)
    return rows


def count_table(args):
    """FLOPs and bytes of each method's step by part; its least time and highest MFU on each card."""
    batch, found = data.collate(make_pairs(args, args.pairs), range(args.pairs), **args.rows), {}
    for method in args.methods:
        found[method] = tables = count.tables(args, batch, method)
        for name, rows in tables.items():
            print_rows(f"{args.title}, one rank of {args.rank_of}; {method}, {name}", rows)
    return found


def draw_figure(json_file, path):
    """Time and memory of each method beside SimPO's, from a --json file of one shape; the paper's Fig. 4."""
    from matplotlib.figure import Figure

    run, grey = json.loads(Path(json_file).read_text()), "#7f7f7f"
    ((shape, rows),) = run["figures"].items()
    rows = {row["name"]: row for row in rows}
    names = [name for name in PAPER_FIG_4 if name in rows]
    bars = {
        f"{what} / SimPO's": [rows[name][f"{what}/simpo"] for name in names] for what in ("time", "memory")
    }
    bars["memory / SimPO's, paper (2B, H100)"] = [PAPER_FIG_4[name] / PAPER_FIG_4["simpo"] for name in names]
    figure = Figure(figsize=(9.4, 3), layout="constrained")
    for axis, (label, values) in zip(figure.subplots(1, 3, sharey=True), bars.items(), strict=True):
        drawn = axis.barh(names, values, color=["#d6336c" if name == "fpo" else "#8c8c8c" for name in names])
        axis.bar_label(drawn, fmt=" %.2f", color=grey)
        axis.set_xlabel(label, color=grey)
        axis.tick_params(colors=grey)
        axis.patch.set_alpha(0)
        axis.spines[:].set_color(grey)
    figure.suptitle(f"{shape}, {run['hardware']}", color=grey)
    figure.savefig(path, transparent=True)


def head_only(args):
    """The head alone, forward and backward, chunked and plain. The weight alone takes dW's bytes too."""
    N, d, V, device = 1024, 2304, args.vocab_size or 256_000, "cuda" if CUDA else "cpu"

    def make(names):
        states = (torch.randn(N, d, device=device) / d**0.5).requires_grad_()
        weight, targets = (
            torch.randn(V, d, device=device, requires_grad=True),
            torch.arange(N, device=device) % V,
        )

        def step(name):
            states.grad = weight.grad = None
            head = plain_logps if name == "plain" else scale.token_statistics
            logps = head(states, weight, targets, softcap=30.0)
            (logps if name == "plain" else logps[0]).sum().backward()

        return {name: partial(step, name) for name in names}

    rows, _ = compare(args, make, ["plain", "chunked"])
    print_rows(f"head: {N} tokens, d {d}, vocabulary {V}, float32; dW is {4e-9 * V * d:.2f} GB", rows)
    return rows


def reference_pass(args):
    """Phase 1 against a bare forward (transformer, all logits of the response states) of the same batches."""
    steps, n, lookups = Steps(args, ["fpo"]), 4 * args.pairs, []
    pairs, lm, policy = make_pairs(args, n), steps.lm, steps.policies["fpo"]
    groups = data.micro_batches(range(n), pairs.row_lengths(args.rows["layout"]), 1, max_pairs=16)

    @torch.no_grad()
    def bare():
        for group in groups:
            batch = data.collate(pairs, group, **args.rows).to(lm.device)
            mask = fpo.attention_mask(batch, args.config, lm.dtype)
            out = lm.model(batch.tokens, attention_mask=mask, position_ids=batch.positions, use_cache=False)
            states, W = out.last_hidden_state.flatten(0, 1)[batch.state], lm.get_output_embeddings().weight
            plain_logps(states, W, batch.target, softcap=args.config.final_logit_softcapping)

    def phase_1():
        with tempfile.TemporaryDirectory() as folder:
            identity = offline.reference_identity(policy, pairs, weights="", arithmetic={})
            cache = offline.build_reference(policy, pairs, folder, identity, **args.rows)
            lookups.append(seconds(partial(cache.lookup, torch.arange(args.pairs))))

    times = in_turn({"bare": bare, "phase 1": phase_1, "step": partial(steps.step, "fpo")}, args.rounds)
    row = {"pairs": n, "bare pairs/s": n / median(times["bare"])}
    row |= {"speed/bare": median_ratio(times["bare"], times["phase 1"])}
    row["lookup/step"] = median(lookups) / median(times["step"])
    print_rows(f"{args.title}; the reference pass", [row])
    return row


def updates():
    """The share of 200 updates at lr 5e-7 that bf16 weights lose: plainly, and with the exact optimizer."""
    rows, lr, size = [], 5e-7, 2**16
    for rule, kind in (("adam", torch.optim.Adam), ("rmsprop", torch.optim.RMSprop)):
        torch.manual_seed(0)
        start, drift = (0.02 * torch.randn(size)).bfloat16(), torch.randn(size)
        weights = master, plain, exact = [w.clone().requires_grad_() for w in (start.float(), start, start)]
        optimizers = [kind([w], lr, foreach=False) for w in (master, plain)]
        optimizers.append(scale.make_optimizer(rule, [exact], lr, shard=False))
        moved, lost = 0, {"plain": 0, "exact": 0}
        for _ in range(200):
            gradient, before = (drift + torch.randn(size)).bfloat16(), [w.detach().clone() for w in weights]
            for weight, optimizer in zip(weights, optimizers, strict=True):
                weight.grad = gradient.to(weight.dtype)
                optimizer.step()
            joined = scale.join(exact.detach(), optimizers[2].state[exact]["rest"])
            moves = master != before[0]
            moved += int(moves.sum())
            lost["plain"] += int((moves & (plain == before[1])).sum())
            lost["exact"] += int((moves & (joined != master)).sum())
        rows += [{"rule": rule, "bf16": name, "lost": n / moved} for name, n in lost.items()]
    print_rows(f"updates lost at lr {lr}, 200 steps, against float32 weights", rows)
    return rows


def trl_step(args, folder):
    """A DPO step of TRL's trainer on the same model and tokens, set to do what our step does."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    class OfTokens(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # tokens as ours: made from text they could be others

    names, pairs = ("prompt_ids", "chosen_ids", "rejected_ids"), make_pairs(args, args.pairs)
    rows = [dict(zip(names, (x.tolist() for x in pairs[i]), strict=True)) for i in range(len(pairs))]
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(args.config.vocab_size)}, "w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    config = DPOConfig(
        output_dir=folder, per_device_train_batch_size=len(pairs), max_length=None, max_grad_norm=1.0,
        precompute_ref_log_probs=True, beta=0.1, activation_checkpointing=args.checkpointing, bf16=False,
        learning_rate=5e-7, lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0,
        use_cpu=not CUDA, dataloader_pin_memory=False, report_to="none", disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = OfTokens(make_lm(args), None, config, None, Dataset.from_list(rows), processing_class=tokenizer)
    loader, optimizer = trainer.get_train_dataloader(), trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # train() would set it

    def step():
        trainer.training_step(trainer.model, next(iter(loader)))  # forward and backward
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        trainer.model.zero_grad()

    return step


def peer(args):
    """DPO with a precomputed reference, here and in TRL."""
    with tempfile.TemporaryDirectory() as folder:

        def make(names):
            steps = {"ours": partial(Steps(args, ["dpo"]).step, "dpo")} if "ours" in names else {}
            return steps | ({"trl": trl_step(args, folder)} if "trl" in names else {})

        rows, _ = compare(args, make, ["ours", "trl"])
    speed, gb = rows[1]["time/ours"], 1 / rows[1]["memory/ours"]
    print_rows(f"{args.title}; DPO: {speed:.2f} × TRL's pairs/s, {gb:.2f} × its memory", rows)
    return {"rows": rows, "speed_ratio": speed, "memory_ratio": gb}


# ---------------------------------------------------------------------------- main
def main(argv=None):
    """Run what the flags ask for."""
    args = parse_args(argv)
    if args.draw:
        return draw_figure(*args.draw)
    if args.peer:
        if importlib.util.find_spec("trl") is None:
            refuse("--peer trl: TRL is not installed: pip install trl==1.16.0")
        # Big tensors stay in malloc's heap: without it page faults decide, and most of them are TRL's.
        heap = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
        if not heap.items() <= os.environ.items():
            command = [sys.executable, "-m", "experiments.bench", *args.argv]
            os.execve(sys.executable, command, os.environ | heap)
    section = peer if args.peer else reference_pass if args.reference_pass else methods_table
    if args.head_only or args.updates:
        figures = head_only(args) if args.head_only else updates()
    else:
        section = count_table if args.count else section
        figures = {shape: section(with_shape(args, shape)) for shape in [args.shape] if args.shape}
        figures = figures or {shape: section(with_shape(args, shape)) for shape in ("tiny", "wide")}
    if args.json:
        data.write_json(args.json, data.made_by() | {"torch": torch.__version__, "figures": figures})


if __name__ == "__main__":
    data.run_script(main)
