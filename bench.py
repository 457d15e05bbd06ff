"""Speed and memory: every method's step, its parts alone, and another trainer's step.

    python bench.py                             CPU: a tiny shape, then one with a wide vocabulary
    python bench.py --shape scaled              CPU: Gemma-2-2B with every width an eighth
    python bench.py --shape gemma-2-2b --compile --checkpointing     CUDA: random weights, no download
    python bench.py --shape gemma-2-9b --rank_of 4 --checkpointing   CUDA: one rank of four on one card
    python bench.py --head_only | --reference_pass | --updates | --peer trl

The step is the real one: `data.collate`, `fpo.Policy`, `fpo.method_loss`, backward, clip, optimizer.
Methods take turns (A B C, A B C, …); a figure is the median over the rounds, a ratio the median of the
rounds' ratios, so that it holds on a busy machine too.

Memory on CUDA: the allocator's peak within a step, all that is resident included. On the CPU: the peak of
the resident set within a step, above what the process held before it made the model (Linux resets the mark
through /proc/self/clear_refs); each method in a process of its own, since malloc's heap keeps what another
one left.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, Gemma2Config

import chunked
import fpo
import offline
import precision
import presets
from data import Pairs, collate
from sae import JumpReLUSAE

# The model: d, FFN, layers, query heads, key heads, head size, vocabulary (the rest: Gemma2Config's
# defaults). Then the SAE's m, pairs of a micro-batch, tokens of a prompt and of each response, and Table
# 5's optimizer.
# scaled: the 2B model with d, FFN, V, m and the widths of queries and keys an eighth, all 26 layers: body,
# head and SAE each take 1/64 of its FLOPs a token. Heads few and wide, since an eager score costs the same
# at any width.
SHAPES = {
    "tiny": ((128, 512, 4, 4, 2, 32, 4096), 512, 8, 256, 64, "adam"),
    "wide": ((128, 512, 4, 4, 2, 32, 32_768), 512, 8, 256, 64, "adam"),
    "scaled": ((288, 1152, 26, 2, 1, 128, 32_000), 2048, 1, 256, 384, "adam"),
    "gemma-2-2b": ((2304, 9216, 26, 8, 4, 256, 256_000), 16384, 8, 256, 384, "adam"),
    "gemma-2-9b": ((3584, 14336, 42, 16, 8, 256, 256_000), 16384, 8, 256, 384, "rmsprop"),
}
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # dense bf16, the maker's figures


# ---------------------------------------------------------------------------- flags
AT_LEAST_1 = ("pairs", "prompt", "response", "layers", "rounds", "rank_of")
LEAST = {**dict.fromkeys(AT_LEAST_1, 1), "vocab": 5, "peak_tflops": 1e-3}  # tokens are from 4 on


def parse_args(argv=None):
    """Flags; a shape fills in what is not given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add, on = parser.add_argument, {"action": "store_true"}
    add("--shape", choices=SHAPES, help="model, SAE, lengths and optimizer (tiny, then wide)")
    for name in ("pairs", "prompt", "response", "vocab", "layers"):
        add(f"--{name}", type=int, help="instead of the shape's")
    add("--methods", nargs="+", choices=fpo.METHODS[1:], default=["simpo", "dpo", "fpo", "tdpo1", "tdpo2"])
    add("--rounds", type=int, default=5, help="steps of each method that count")
    add("--layout", default="auto", choices=("auto", "shared", "separate"), help="the prompt once or twice")
    add("--head", default="chunked", choices=("chunked", "plain"), help="plain: all logits at once")
    add("--compile", **on, help="compile each layer")
    add("--checkpointing", **on, help="activation checkpointing")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (CUDA: bfloat16)")
    add("--rank_of", type=int, default=1, help="one rank of N: its share of the optimizer's states")
    add("--peak_tflops", type=float, help="of the device, for MFU (known: A100, H100, H200)")
    add("--json", help="write all figures to this file")
    add("--draw", nargs=2, metavar=("JSON", "SVG"), help="draw a --json file of one shape beside Fig. 4")
    add("--head_only", **on, help="the head alone, against plain logits")
    add("--reference_pass", **on, help="Phase 1, against a bare forward")
    add("--updates", **on, help="updates that bf16 weights lose at lr 5e-7")
    add("--peer", choices=("trl",), help="DPO here and in TRL's DPOTrainer")
    add("--only", help=argparse.SUPPRESS)  # a child process, that measures one thing's memory
    args = presets.parse_flags(parser, argv, LEAST)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    outputs = {"json": args.json, "draw": args.draw and args.draw[1]}
    for name, path in outputs.items():
        if path:
            presets.check_output(name, path, folder=False)
    return args


def shape_config(name, attention, layers=None, vocab=None):
    """A shape's Gemma2Config, with other layers or vocabulary where given."""
    d, ffn, depth, heads, kv_heads, head_dim, words = SHAPES[name][0]
    return Gemma2Config(
        hidden_size=d, intermediate_size=ffn, num_hidden_layers=layers or depth, head_dim=head_dim,
        num_attention_heads=heads, num_key_value_heads=kv_heads, query_pre_attn_scalar=head_dim,
        vocab_size=vocab or words, attn_implementation=attention,
    )  # fmt: skip


def with_shape(args, name):
    """A copy of the flags, completed by the shape; with its `config`, and `rows` as collate takes it."""
    _, sae_width, *rest = SHAPES[name]
    cuda, args = args.device == "cuda", argparse.Namespace(**vars(args), sae_width=sae_width)
    for flag, value in zip(("pairs", "prompt", "response", "rule"), rest, strict=True):
        setattr(args, flag, getattr(args, flag, None) or value)
    args.shape, args.dtype = name, args.dtype or ("bfloat16" if cuda else "float32")
    args.config = shape_config(name, "flex_attention" if cuda else "eager", args.layers, args.vocab)
    if args.layout == "auto":  # train.py's rule
        args.layout = "shared" if cuda or args.prompt >= args.response else "separate"
    args.rows = {"layout": args.layout, "row_multiple": 128 if cuda else 1}
    return args


# ---------------------------------------------------------------------------- what is measured
def make_lm(args):
    """A model of the shape with random weights, on the device."""
    torch.manual_seed(0)
    kinds = {"dtype": getattr(torch, args.dtype), "attn_implementation": args.config._attn_implementation}
    with torch.device(args.device):
        lm = AutoModelForCausalLM.from_config(args.config, **kinds)
    for layer in lm.model.layers if args.compile else ():
        layer.compile()
    return lm


def make_sae(lm, width):
    """A random SAE for the last layer; about 1 feature in 300 is active, as in Gemma Scope (L0 55)."""
    d, device = lm.config.hidden_size, lm.device
    W_enc, zeros = torch.randn(d, width, device=device) / d**0.5, torch.zeros(width, device=device)
    tokens = torch.randint(4, lm.config.vocab_size, (1, 128), device=device)
    with torch.no_grad():
        h = lm.model(tokens, output_hidden_states=True, use_cache=False).hidden_states[-2]  # near enough
    threshold = torch.quantile((h[0, :32].float() @ W_enc).flatten()[: 2**23], 1 - 1 / 300).clamp(min=0)
    sae = JumpReLUSAE(W_enc, zeros, W_enc.T, zeros.new_zeros(d), threshold.expand(width))
    sae.W_dec = sae.W_dec.new_empty(0)  # training needs no decoder on the device
    return sae


def make_pairs(args, n):
    """`n` pairs of random tokens, all of the lengths asked for."""
    g = torch.Generator().manual_seed(0)
    text = lambda size: torch.randint(4, args.config.vocab_size, (size,), generator=g).tolist()  # noqa: E731
    return Pairs([[text(size) for size in (args.prompt, args.response, args.response)] for _ in range(n)])


def plain_statistics(
    states, weight, targets, *, softcap=None, ref_states=None, ref_weight=None, entropy=False
):
    """`chunked.token_statistics` from all (N, V) logits at once: the same values, for comparison."""

    def log_softmax(h, W):
        z = (h @ W.T).float()
        return (z if softcap is None else softcap * (z / softcap).tanh()).log_softmax(-1)

    log_p, kl, ref_logps, place = log_softmax(states, weight), None, None, targets[:, None]
    if ref_states is not None:
        log_ref = log_softmax(ref_states, ref_weight).detach()
        kl, ref_logps = (log_ref.exp() * (log_ref - log_p)).sum(-1), log_ref.gather(1, place)[:, 0]
    H = -(log_p.exp() * log_p).sum(-1).detach() if entropy else None
    return log_p.gather(1, place)[:, 0], kl, ref_logps, H


def share_of(parameters, ranks):
    """What the fullest of so many ranks holds states of, by ZeroRedundancyOptimizer's greedy split."""
    shares = [[] for _ in range(ranks)]
    size = lambda share: sum(p.numel() for p in share)  # noqa: E731
    for parameter in sorted(parameters, key=torch.Tensor.numel, reverse=True):
        min(shares, key=size).append(parameter)
    return max(shares, key=size)


class Steps:
    """The methods' training steps on one model; what one of them alone needs is on the device in its turn."""

    def __init__(self, args, methods, pairs=None):
        self.args, self.lm, self.pairs = args, make_lm(args), pairs or make_pairs(args, args.pairs)
        self.policy = self.reading = fpo.Policy(self.lm)
        self.sae, self.reference = None, make_lm(args).to("cpu") if set(methods) & set(fpo.NEEDED) else None
        if "fpo" in methods:  # its hook stands before the first compiled forward, and is off in others' turns
            self.sae = make_sae(self.lm, args.sae_width)
            where = ((len(self.lm.model.layers) - 1, "res"),)
            self.reading = fpo.Policy(self.lm, (self.sae,), where, k=50)
        self.parameters = list(self.lm.parameters())
        share = share_of(self.parameters, args.rank_of)
        self.optimizer = precision.make_optimizer(args.rule, share, 5e-7, shard=False)
        batch = collate(self.pairs, range(args.pairs), **args.rows).to(args.device)
        with torch.no_grad():
            self.cached = self.reading(batch)[0]  # what Phase 1 would have stored
        if args.checkpointing:
            self.lm.activation_checkpointing_enable({"use_reentrant": False})
        self.lm.train()

    @contextlib.contextmanager
    def turn(self, method):
        """Gives the method's step, a function without arguments."""
        policy, device = self.reading if method == "fpo" else self.policy, self.args.device
        if self.sae is not None:
            self.sae.to(device if method == "fpo" else "cpu")
        policy.hold_reference(self.reference.to(device) if method in fpo.NEEDED else None)
        settings = {name: value for name, value in presets.TABLE_5[method].items() if value is not None}

        def step():
            batch = collate(self.pairs, range(self.args.pairs), **self.args.rows).to(device)
            statistics, held = policy(batch)
            loss, _ = fpo.method_loss(method, statistics, held or self.cached, **settings)
            loss.mean().backward()
            precision.clip_gradients(self.parameters, 1.0)
            self.optimizer.step()
            self.lm.zero_grad()

        yield step
        policy.hold_reference(None)
        if self.reference is not None:
            self.reference.to("cpu")


# ---------------------------------------------------------------------------- time and memory
def seconds(step, device):
    """Wall time of one call, the device's work included."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def in_turn(turns, rounds, device):
    """Seconds of each step, A B C A B C, `rounds` times after warm-up; a turn opens a context with it."""
    taken = {name: [] for name in turns}
    for count in range(rounds + 1):
        for name, turn in turns.items():
            with turn() as step:
                if count == 0:
                    step()  # compiles, allocates
                taken[name].append(seconds(step, device))
    return {name: times[1:] for name, times in taken.items()}


def median_ratio(above, below):
    """The median of the rounds' ratios."""
    return median(a / b for a, b in zip(above, below, strict=True))


def memory(mark="VmRSS"):
    """Bytes now (CUDA: allocated, CPU: resident), or for VmHWM the most since `reset_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() if mark == "VmRSS" else torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/status").read_text().split(f"{mark}:")[1].split()[0]) * 1024


def reset_peak():
    """Start the peak of `memory("VmHWM")` anew."""
    if torch.cuda.is_available():
        return torch.cuda.reset_peak_memory_stats()
    return Path("/proc/self/clear_refs").write_text("5")


def peak_of(step, base=0):
    """GB at the peak of one call, above `base` bytes."""
    reset_peak()
    step()
    return (memory("VmHWM") - base) / 1e9


def child(only, *flags):
    """This command again in a process of its own, for one thing alone; what it measured."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], *flags, "--only", only]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def describe(args):
    """A table's heading."""
    lengths = f"{args.pairs} × ({args.prompt} + 2 × {args.response}) tokens"
    return f"{args.shape}: {lengths}, vocabulary {args.config.vocab_size}, {args.layout} rows, {args.dtype}"


def print_rows(title, rows):
    """Dicts of equal keys as a table."""
    print(f"\n{title}\n" + "".join(f"{name:>16}" for name in rows[0]))
    for row in rows:
        cells = ("-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
        print("".join(f"{cell:>16}" for cell in cells), flush=True)


# ---------------------------------------------------------------------------- the sections
def methods_table(args):
    """Methods × time, MFU and memory."""
    base = memory()
    if args.only:  # a child process: this method's memory
        with Steps(args, [args.only]).turn(args.only) as step:
            step()
            return peak_of(step, base)
    steps, peaks, rows = Steps(args, args.methods), {}, []
    turns = {method: lambda method=method: steps.turn(method) for method in args.methods}
    times = in_turn(turns, args.rounds, args.device)
    for method in args.methods:
        if args.device == "cpu":
            peaks[method] = child(method, "--shape", args.shape)
            continue
        with steps.turn(method) as step:
            peaks[method] = peak_of(step)
    name = torch.cuda.get_device_name() if args.device == "cuda" else ""
    peak = args.peak_tflops or next((flops for card, flops in PEAK_TFLOPS.items() if card in name), None)
    N = sum(p.numel() for p in steps.parameters)
    real = args.pairs * 2 * (args.prompt + args.response)  # unshared: both rows whole
    computed = collate(steps.pairs, range(args.pairs), **args.rows).tokens.numel()
    for method, taken in times.items():
        s, simpo = median(taken), "simpo" in times
        mfu = [6 * N * tokens / s / (peak * 1e12) if peak else None for tokens in (real, computed)]
        rows.append({
            "method": method, "ms/step": 1e3 * s, "pairs/s": args.pairs / s, "tokens/s": real / s,
            "MFU real": mfu[0], "MFU computed": mfu[1], "peak GB": peaks[method],
            "time/SimPO": median_ratio(taken, times["simpo"]) if simpo else None,
            "memory/SimPO": peaks[method] / peaks["simpo"] if simpo else None,
        })  # fmt: skip
    print_rows(f"{describe(args)}, {args.head} head, {N / 1e6:.1f} M parameters", rows)
    return {"tokens_real": real, "tokens_computed": computed, "methods": rows}


PAPER_FIG_4 = {"tdpo2": 53.5, "tdpo1": 50.1, "dpo": 47.6, "fpo": 45.5, "simpo": 45.1}  # GB, one H100, 2B


def draw_figure(json_file, path):
    """Step time and memory of each method against SimPO's, from a --json file, beside the paper's Fig. 4."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    try:
        run = json.loads(Path(json_file).read_text())
        ((shape, figures),) = run["figures"].items()
        rows = {row["method"]: row for row in figures["methods"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"--draw {json_file}: not what --json writes of one --shape's methods") from None
    names, grey = [name for name in PAPER_FIG_4 if name in rows], "#7f7f7f"
    bars = [
        ("step time / SimPO's", [rows[name]["time/SimPO"] for name in names]),
        ("peak memory / SimPO's", [rows[name]["memory/SimPO"] for name in names]),
        ("memory / SimPO's, paper (2B, H100)", [PAPER_FIG_4[name] / PAPER_FIG_4["simpo"] for name in names]),
    ]
    plt.rcParams.update(dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), grey))
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
    for axis, (label, values) in zip(axes, bars, strict=True):
        axis.barh(names, values, color=["#d6336c" if name == "fpo" else "#8c8c8c" for name in names])
        axis.set_xlabel(label)
        axis.tick_params(colors=grey)
        axis.spines[["top", "right"]].set_visible(False)
        for y, value in enumerate(values):
            axis.text(value, y, f" {value:.2f}", va="center", color=grey)
    figure.suptitle(f"{shape}, {run['hardware']}", color=grey)
    figure.savefig(path, transparent=True)


def head_only(args):
    """The head alone, forward and backward, chunked and plain: time, and peak memory above its inputs."""
    N, d, V = 1024, 2304, args.vocab or 256_000
    if args.only:
        torch.manual_seed(0)
        states = (torch.randn(N, d, device=args.device) / d**0.5).requires_grad_()
        weight = torch.randn(V, d, device=args.device).requires_grad_()
        targets = torch.randint(V, (N,), device=args.device)
        head = plain_statistics if args.only == "plain" else chunked.token_statistics
        step = lambda: head(states, weight, targets, softcap=30.0)[0].sum().backward()  # noqa: E731
        gb, taken = peak_of(step, memory()), []
        for _ in range(args.rounds):
            states.grad = weight.grad = None
            taken.append(seconds(step, args.device))
        return [gb, median(taken)]
    rows, dW = [], 4e-9 * V * d
    measured = {name: child(name) for name in ("chunked", "plain")}
    for name, (gb, s) in measured.items():
        relative = {"peak/dW": gb / dW, "time/plain": s / measured["plain"][1]}
        rows.append({"head": name, "s": s, "peak GB": gb, **relative})
    print_rows(f"head: {N} tokens, d {d}, vocabulary {V}, float32; dW is {dW:.2f} GB", rows)
    return rows


def reference_pass(args):
    """Phase 1 against a bare forward (transformer, all logits of the response states) of the same tokens."""
    steps, n = Steps(args, ["fpo"]), 4 * args.pairs
    pairs, lm, policy = make_pairs(args, n), steps.lm.eval(), steps.reading
    groups = [range(i, i + args.pairs) for i in range(0, n, args.pairs)]
    sizes, lookups = [], []

    @torch.no_grad()
    def bare():
        for group in groups:
            batch = collate(pairs, group, **args.rows).to(args.device)
            mask = fpo.attention_mask(batch, args.config, lm.dtype)
            out = lm.model(batch.tokens, attention_mask=mask, position_ids=batch.positions, use_cache=False)
            states, W = out.last_hidden_state.flatten(0, 1)[batch.state], lm.get_output_embeddings().weight
            plain_statistics(states, W, batch.target, softcap=args.config.final_logit_softcapping)

    def phase_1():
        with tempfile.TemporaryDirectory() as folder:
            identity = offline.reference_identity(policy, pairs, weights="", arithmetic={})
            cache = offline.build_reference(
                policy, pairs, folder, identity, max_pairs=args.pairs, **args.rows
            )
            sizes.append(cache.size() / n)
            for group in groups:
                lookups.append(seconds(lambda group=group: cache.lookup(torch.tensor(group)), "cpu"))

    turns = {"bare": lambda: contextlib.nullcontext(bare), "phase 1": lambda: contextlib.nullcontext(phase_1)}
    times = in_turn(turns, args.rounds, args.device)
    lm.train()
    step = median(in_turn({"fpo": lambda: steps.turn("fpo")}, args.rounds, args.device)["fpo"])
    row = {"pairs": n, "bare pairs/s": n / median(times["bare"]), "kB/pair": sizes[0] / 1e3}
    row |= {
        "speed/bare": median_ratio(times["bare"], times["phase 1"]),
        "lookup/step": median(lookups) / step,
    }
    print_rows(f"{describe(args)}; the reference pass", [row])
    return row


def updates(args):
    """The share of 200 updates at lr 5e-7 that bf16 weights lose: plainly, and with the exact optimizer."""
    rows, lr, size = [], 5e-7, 2**16
    kinds = {"adam": (torch.optim.Adam, {"betas": (0.9, 0.95)}), "rmsprop": (torch.optim.RMSprop, {})}
    for rule, (kind, options) in kinds.items():
        torch.manual_seed(0)
        start, drift = (0.02 * torch.randn(size)).bfloat16(), torch.randn(size)
        master, plain, exact = (w.clone().requires_grad_() for w in (start.float(), start, start))
        optimizers = [kind([w], lr, foreach=False, **options) for w in (master, plain)]
        optimizers.append(precision.ExactOptimizer([exact], lr, rule=rule))
        moved, lost = 0, {"plain": 0, "exact": 0}
        for _ in range(200):
            gradient = (drift + torch.randn(size)).bfloat16()
            before = [w.detach().clone() for w in (master, plain)]
            for weight, optimizer in zip((master, plain, exact), optimizers, strict=True):
                weight.grad = gradient.to(weight.dtype)
                optimizer.step()
            joined = precision.join(exact.detach(), optimizers[2].state[exact]["rest"])
            moves = master != before[0]
            moved += int(moves.sum())
            lost["plain"] += int((moves & (plain == before[1])).sum())
            lost["exact"] += int((moves & (joined != master)).sum())
        equal = {"plain": torch.equal(plain.float(), master), "exact": torch.equal(joined, master)}
        for name in lost:
            rows.append({"rule": rule, "bf16": name, "lost": lost[name] / moved, "bit-equal": equal[name]})
    print_rows(f"updates lost at lr {lr}, 200 steps, against float32 weights", rows)
    return rows


# ---------------------------------------------------------------------------- another trainer
def trl_trainer(args, pairs, folder, callback):
    """TRL's DPOTrainer on the same model and pairs, set to do what our step does and nothing beside it."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    # A token is a word: text goes in, since the trainer tokenises by itself, and the same ids come out.
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(args.config.vocab_size)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    text = lambda ids: "".join(f" w{i}" for i in ids.tolist())  # noqa: E731
    names = ("prompt", "chosen", "rejected")
    rows = [{name: text(ids) for name, ids in zip(names, pairs[i], strict=True)} for i in range(len(pairs))]
    config = DPOConfig(
        output_dir=folder, per_device_train_batch_size=len(pairs), max_steps=args.rounds + 2, max_length=None,
        precompute_ref_log_probs=True, beta=0.1, activation_checkpointing=args.checkpointing, bf16=False,
        learning_rate=5e-7, lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0,
        max_grad_norm=1.0, use_cpu=args.device == "cpu", dataloader_pin_memory=False, logging_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    return DPOTrainer(
        make_lm(args), None, config, None, data, processing_class=tokenizer, callbacks=[callback]
    )


def peer(args):
    """DPO with precomputed reference here and in TRL, a step each in turn; memory each in its own process."""
    from transformers import TrainerCallback

    pairs, times, step, base = make_pairs(args, args.pairs), {"ours": [], "trl": []}, None, memory()
    pairs.tokens[pairs.bounds[:, 2:] - 1] = 1  # EOS: the trainer adds it where a response has none
    with contextlib.ExitStack() as stack:
        if args.only != "trl":
            step = stack.enter_context(Steps(args, ["dpo"], pairs).turn("dpo"))
        if args.only == "ours":
            step()
            return peak_of(step, base)

        class Clock(TrainerCallback):  # the trainer's own step: forward, backward, clip, optimizer
            def on_step_begin(self, *_, **__):
                reset_peak()
                self.start = time.perf_counter()

            def on_step_end(self, *_, **__):
                seconds(lambda: None, args.device)  # wait for the device
                times["trl"].append(time.perf_counter() - self.start)
                if step is not None:
                    times["ours"].append(seconds(step, args.device))

        with tempfile.TemporaryDirectory() as folder:
            trl_trainer(args, pairs, folder, Clock()).train()
    if args.only:
        return (memory("VmHWM") - base) / 1e9
    rows, peaks = [], {name: child(name, "--shape", args.shape) for name in times}
    for name, taken in times.items():
        s = median(taken[2:])  # two steps of warm-up
        rows.append({"trainer": name, "ms/step": 1e3 * s, "pairs/s": args.pairs / s, "peak GB": peaks[name]})
    speed, gb = median_ratio(times["trl"][2:], times["ours"][2:]), peaks["ours"] / peaks["trl"]
    print_rows(f"{describe(args)}; DPO: {speed:.2f} × TRL's pairs/s, {gb:.2f} × its memory", rows)
    return {"rows": rows, "speed_ratio": speed, "memory_ratio": gb}


# ---------------------------------------------------------------------------- main
def main(argv=None):
    """Run what the flags ask for."""
    with presets.one_line_errors():
        args = parse_args(argv)
        if args.draw:
            return draw_figure(*args.draw)
    if args.peer:
        if importlib.util.find_spec("trl") is None:
            raise SystemExit("--peer trl: TRL is not installed: pip install trl==1.16.0")
        # Big tensors stay in malloc's heap: without it page faults decide, and most of them are TRL's.
        heap = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
        if not heap.items() <= os.environ.items():
            os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | heap)
    if args.head == "plain":
        fpo.token_statistics = plain_statistics
    if args.head_only or args.updates:
        figures = (head_only if args.head_only else updates)(args)
    else:
        section = peer if args.peer else reference_pass if args.reference_pass else methods_table
        shapes = [args.shape] if args.shape else ["tiny", "wide"]
        figures = {shape: section(with_shape(args, shape)) for shape in shapes}
    if args.only:
        print("\n" + json.dumps(figures if args.head_only else figures[args.shape]))
    elif args.json:
        run = presets.made_by() | {"torch": torch.__version__, "figures": figures}
        offline.write_json(args.json, run)


if __name__ == "__main__":
    main()
