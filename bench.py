"""Speed and memory: every method's step, its parts by themselves, another trainer, and what a rank will need.

    python bench.py                             CPU: a tiny shape, then one with a wide vocabulary
    python bench.py --shape scaled              CPU: Gemma-2-2B with every width an eighth
    python bench.py --shape gemma-2-2b --compile --checkpointing     CUDA: random weights, no download
    python bench.py --shape gemma-2-9b --rank_of 4 --checkpointing   CUDA: one rank of four, on one card
    python bench.py --head_only | --reference_pass | --updates | --peer trl

The step is the real one: `data.collate`, `fpo.Policy`, `fpo.method_loss`, backward, clip, optimizer. Methods
take turns (A B C, A B C, …); a figure is the median over the rounds, a ratio the median of the rounds' ratios,
so that it holds on a busy machine too.

Memory on CUDA: the allocator's peak within a step, all that is resident included. On the CPU: the peak of the
resident set within a step, above what the process held before it made the model (Linux resets the mark through
/proc/self/clear_refs); each method in a process of its own, as malloc's heap keeps what another one left.
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

import fpo
import precision
import presets
from data import Pairs, collate
from sae import JumpReLUSAE

# Sizes: d, FFN, layers, query heads, key heads, head size, vocabulary; the rest are Gemma2Config's defaults. Then
# the SAE's m, pairs of a micro-batch, tokens of a prompt and of each response, and Table 5's optimizer.
# scaled: the 2B model with d, FFN, V, m and the widths of queries and keys an eighth, all 26 layers: body, head
# and SAE each take 1/64 of its FLOPs a token. Its heads are wide and few: an eager score's cost is not its width's.
SHAPES = {
    "tiny": ((128, 512, 4, 4, 2, 32, 4096), 512, 8, 256, 64, "adam"),
    "wide": ((128, 512, 4, 4, 2, 32, 32_768), 512, 8, 256, 64, "adam"),
    "scaled": ((288, 1152, 26, 2, 1, 128, 32_000), 2048, 1, 256, 384, "adam"),
    "gemma-2-2b": ((2304, 9216, 26, 8, 4, 256, 256_000), 16384, 8, 256, 384, "adam"),
    "gemma-2-9b": ((3584, 14336, 42, 16, 8, 256, 256_000), 16384, 8, 256, 384, "rmsprop"),
}
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # dense bf16, the makers' figures


# ---------------------------------------------------------------------------- flags
def parse_args(argv=None):
    """Flags; a shape fills in what is not given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    what = parser.add_argument_group("what to run (none of the four: the table of methods)")
    what.add_argument("--head_only", action="store_true", help="the head alone, against plain logits")
    what.add_argument("--reference_pass", action="store_true", help="Phase 1 against a bare forward")
    what.add_argument("--updates", action="store_true", help="updates lost in bf16 at lr 5e-7")
    what.add_argument("--peer", choices=("trl",), help="DPO here and in TRL's DPOTrainer")
    what.add_argument("--only", help=argparse.SUPPRESS)  # a child process: measure the memory of this one
    size = parser.add_argument_group("sizes")
    size.add_argument(
        "--shape", choices=SHAPES, help="model, SAE and lengths (tiny and wide, one after the other)"
    )
    size.add_argument("--pairs", type=int, help="pairs of a micro-batch")
    size.add_argument("--prompt", type=int, help="tokens of a prompt")
    size.add_argument("--response", type=int, help="tokens of each response")
    size.add_argument("--vocab", type=int, help="vocabulary, instead of the shape's")
    size.add_argument("--layers", type=int, help="layers, instead of the shape's")
    how = parser.add_argument_group("how")
    how.add_argument("--methods", nargs="+", choices=fpo.METHODS[1:],
                     default=["simpo", "dpo", "fpo", "tdpo1", "tdpo2"], help="methods, in turn")  # fmt: skip
    how.add_argument("--rounds", type=int, default=5, help="steps of each that are counted")
    how.add_argument(
        "--layout", default="auto", choices=("auto", "shared", "separate"), help="rows of a pair"
    )
    how.add_argument(
        "--head", default="chunked", choices=("chunked", "plain"), help="plain: all logits at once"
    )
    how.add_argument("--compile", action="store_true", help="compile each layer")
    how.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    how.add_argument("--dtype", choices=("float32", "bfloat16"), help="weights (CUDA: bfloat16)")
    how.add_argument(
        "--rank_of", type=int, default=1, help="a rank of N: its share of the optimizer's states"
    )
    how.add_argument(
        "--peak_tflops", type=float, help="the device's peak, for MFU (known for A100, H100, H200)"
    )
    how.add_argument("--json", help="write all figures to this file")
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("pairs", "prompt", "response", "vocab", "layers", "rounds", "rank_of"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    return args


def gemma_2(sizes, attention):
    """A Gemma2Config from a row of SHAPES."""
    d, ffn, layers, heads, kv_heads, head_dim, vocab = sizes
    return Gemma2Config(
        hidden_size=d, intermediate_size=ffn, num_hidden_layers=layers, vocab_size=vocab, head_dim=head_dim,
        num_attention_heads=heads, num_key_value_heads=kv_heads, query_pre_attn_scalar=head_dim,
        attn_implementation=attention,
    )  # fmt: skip


def with_shape(args, name):
    """A copy of the flags with the shape's values for what is not given, `config` and `rows` (see collate)."""
    sizes, sae_width, *rest = SHAPES[name]
    cuda = args.device == "cuda"
    args = argparse.Namespace(**vars(args) | {"shape": name, "sae_width": sae_width})
    for flag, value in zip(("pairs", "prompt", "response", "rule"), rest, strict=True):
        setattr(args, flag, getattr(args, flag, None) or value)
    sizes = (*sizes[:2], args.layers or sizes[2], *sizes[3:6], args.vocab or sizes[6])
    args.config = gemma_2(sizes, "flex_attention" if cuda else "eager")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    if args.layout == "auto":  # train.py's rule
        args.layout = "shared" if cuda or args.prompt >= args.response else "separate"
    args.rows = {"layout": args.layout, "row_multiple": 128 if cuda else 1}
    return args


# ---------------------------------------------------------------------------- what is measured
def make_lm(args, seed=0):
    """A model of the shape with random weights, on the device."""
    torch.manual_seed(seed)
    with torch.device(args.device):
        lm = AutoModelForCausalLM.from_config(
            args.config,
            dtype=getattr(torch, args.dtype),
            attn_implementation=args.config._attn_implementation,
        )
    for layer in lm.model.layers if args.compile else ():
        layer.compile()
    return lm


def make_sae(lm, width, layer):
    """A random SAE for a layer's output: by a trial on random tokens, about 1 feature in 300 is active (Gemma Scope's L0)."""
    d, device = lm.config.hidden_size, lm.device
    W_enc = torch.randn(d, width, device=device) / d**0.5
    tokens = torch.randint(4, lm.config.vocab_size, (1, 128), device=device)
    with torch.no_grad():
        h = lm.model(tokens, output_hidden_states=True, use_cache=False).hidden_states[
            layer
        ]  # what enters it
    threshold = (h[0].float() @ W_enc).quantile(1 - 1 / 300).expand(width).clamp(min=0)
    zeros = torch.zeros(width, device=device)
    sae = JumpReLUSAE(W_enc, zeros, W_enc.T, torch.zeros(d, device=device), threshold)
    sae.W_dec = sae.W_dec.new_empty(0)  # the decoder is not needed on the device
    return sae


def make_pairs(args, n=None):
    """`n` pairs of random tokens, all of the lengths asked for."""
    g = torch.Generator().manual_seed(0)
    text = lambda size: torch.randint(4, args.config.vocab_size, (size,), generator=g).tolist()  # noqa: E731
    lengths = (args.prompt, args.response, args.response)
    return Pairs([[text(size) for size in lengths] for _ in range(n or args.pairs)])


def plain_statistics(
    states, weight, targets, *, softcap=None, ref_states=None, ref_weight=None, entropy=False
):
    """`fpo.token_statistics` from all logits at once, (N, V): the same values, for comparison."""

    def log_softmax(h, W):
        z = (h @ W.T).float()
        return (z if softcap is None else softcap * (z / softcap).tanh()).log_softmax(-1)

    log_p, kl, ref_logps = log_softmax(states, weight), None, None
    if ref_states is not None:
        log_ref = log_softmax(ref_states, ref_weight)
        kl = (log_ref.exp() * (log_ref - log_p)).sum(-1)
        ref_logps = log_ref.gather(1, targets[:, None])[:, 0]
    H = -(log_p.exp() * log_p).sum(-1).detach() if entropy else None
    return log_p.gather(1, targets[:, None])[:, 0], kl, ref_logps, H


def share_of(parameters, ranks):
    """The parameters whose states one of so many ranks holds, split as ZeroRedundancyOptimizer does: the fullest rank's."""
    shares = [[] for _ in range(ranks)]
    for parameter in sorted(parameters, key=torch.Tensor.numel, reverse=True):
        min(shares, key=lambda share: sum(p.numel() for p in share)).append(parameter)
    return max(shares, key=lambda share: sum(p.numel() for p in share))


class Steps:
    """The methods' training steps on one model; what a method alone needs is on the device in its turn only."""

    def __init__(self, args, methods):
        self.args, self.lm = args, make_lm(args)
        last = len(self.lm.model.layers) - 1
        # The hook comes before the first compiled forward; while another method runs it is switched off.
        self.sae = make_sae(self.lm, args.sae_width, last) if "fpo" in methods else None
        self.reading = fpo.Policy(self.lm, (self.sae,), ((last, "res"),)) if self.sae else None
        self.policy = fpo.Policy(self.lm)
        self.reference = make_lm(args).to("cpu") if set(methods) & set(fpo.NEEDED) else None
        self.parameters = list(self.lm.parameters())
        share = share_of(self.parameters, args.rank_of)
        self.optimizer = precision.make_optimizer(args.rule, share, 5e-7, shard=False)
        self.pairs = make_pairs(args)
        with torch.no_grad():  # what a cache would give
            batch = collate(self.pairs, range(args.pairs), **args.rows).to(args.device)
            self.cached = (self.reading or self.policy)(batch)[0]
        if args.checkpointing:
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})
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
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident(mark="VmRSS"):
    """Bytes of this process in memory now, or (VmHWM) at most since the mark was reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{mark}:")[1].split()[0]) * 1024


def peak_of(step, base):
    """GB that one call takes at its peak, above `base` bytes (CUDA: all that is allocated)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        seconds(step, "cuda")
        return torch.cuda.max_memory_allocated() / 1e9
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return (resident("VmHWM") - base) / 1e9


def child(only, **environment):
    """This command again in a process of its own, for one thing alone; what it measured."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--only", only]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(steps, rounds, device):
    """Seconds of each step, `rounds` of each, A B C A B C; `steps` are context managers that give the step."""
    taken = {name: [] for name in steps}
    for count in range(rounds + 1):
        for name, turn in steps.items():
            with turn() as step:
                if count == 0:  # warm up
                    step()
                taken[name].append(seconds(step, device))
    return {name: times[1:] for name, times in taken.items()}


def print_rows(title, rows):
    """A table of dicts: the first key's column is text."""
    print(f"\n{title}\n" + "".join(f"{name:>16}" for name in rows[0]))
    for row in rows:
        cells = ("-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
        print("".join(f"{cell:>16}" for cell in cells), flush=True)


# ---------------------------------------------------------------------------- the sections
def methods_table(args):
    """Methods × time, memory, MFU, for one shape."""
    if args.only:  # a child process: this method's memory
        base = resident()
        with Steps(args, [args.only]).turn(args.only) as step:
            step()
            print(json.dumps(peak_of(step, base)))
        return None
    steps = Steps(args, args.methods)
    turns = {method: lambda method=method: steps.turn(method) for method in args.methods}
    times = in_turn(turns, args.rounds, args.device)
    if args.device == "cuda":
        peaks = {}
        for method in args.methods:
            with steps.turn(method) as step:
                peaks[method] = peak_of(step, 0)
    else:
        sys.argv[1:] += ["--shape", args.shape]
        peaks = {method: child(method) for method in args.methods}
    name = torch.cuda.get_device_name() if args.device == "cuda" else ""
    peak = args.peak_tflops or next((flops for card, flops in PEAK_TFLOPS.items() if card in name), None)
    N = sum(p.numel() for p in steps.parameters)
    real = args.pairs * 2 * (args.prompt + args.response)  # both rows whole: the prompt counts twice
    computed = collate(steps.pairs, range(args.pairs), **args.rows).tokens.numel()
    rows = []
    for method, taken in times.items():
        s = median(taken)
        mfu = lambda tokens, s=s: 6 * N * tokens / s / (peak * 1e12) if peak else None  # noqa: E731
        ratio = [a / b for a, b in zip(taken, times["simpo"], strict=True)] if "simpo" in times else None
        rows.append({
            "method": method, "ms/step": 1e3 * s, "pairs/s": args.pairs / s, "tokens/s": real / s,
            "MFU real": mfu(real), "MFU computed": mfu(computed), "peak GB": peaks[method],
            "time/SimPO": median(ratio) if ratio else None,
            "memory/SimPO": peaks[method] / peaks["simpo"] if "simpo" in peaks else None,
        })  # fmt: skip
    print_rows(f"{args.shape}: {N / 1e6:.1f} M parameters, {args.pairs} × ({args.prompt} + 2 × {args.response}) tokens, "
               f"{args.layout} rows, {args.head} head, {args.dtype}", rows)  # fmt: skip
    return {"tokens_real": real, "tokens_computed": computed, "methods": rows}


def head_only(args):
    """The head by itself, forward and backward: time, and peak memory above its inputs, chunked and plain."""
    N, d, V = 1024, 2304, args.vocab or 256_000
    if args.only:
        torch.manual_seed(0)
        states = (torch.randn(N, d, device=args.device) / d**0.5).requires_grad_()
        weight = torch.randn(V, d, device=args.device).requires_grad_()
        targets = torch.randint(V, (N,), device=args.device)
        head = plain_statistics if args.only == "plain" else fpo.token_statistics
        base = torch.cuda.memory_allocated() if args.device == "cuda" else resident()
        step = lambda: head(states, weight, targets, softcap=30.0)[0].sum().backward()  # noqa: E731
        gb, taken = peak_of(step, 0 if args.device == "cuda" else base), []
        for _ in range(args.rounds):
            states.grad = weight.grad = None
            taken.append(seconds(step, args.device))
        print(json.dumps([gb - (base / 1e9 if args.device == "cuda" else 0), median(taken)]))
        return None
    chunked, plain = child("chunked"), child("plain")
    rows = [{"head": name, "s": s, "peak GB": gb, "peak/dW": gb / (4e-9 * V * d), "time/plain": s / plain[1]}
            for name, (gb, s) in (("chunked", chunked), ("plain", plain))]  # fmt: skip
    print_rows(f"head: {N} tokens, d {d}, vocabulary {V}, float32; dW is {4e-9 * V * d:.2f} GB", rows)
    return rows


def reference_pass(args):
    """Phase 1 against a bare forward (transformer, all logits of the response states) of the same tokens."""
    steps, n = Steps(args, ["fpo"]), 4 * args.pairs
    pairs, policy = make_pairs(args, n), steps.reading
    groups = [range(i, i + args.pairs) for i in range(0, n, args.pairs)]
    options = {"softcap": args.config.final_logit_softcapping}

    def bare():
        with torch.no_grad():
            for group in groups:
                batch = collate(pairs, group, **args.rows).to(args.device)
                mask = fpo.attention_mask(batch, args.config, steps.lm.dtype)
                out = steps.lm.model(
                    batch.tokens, position_ids=batch.positions, attention_mask=mask, use_cache=False
                )
                states = out.last_hidden_state.flatten(0, 1)[batch.state]
                plain_statistics(states, steps.lm.get_output_embeddings().weight, batch.target, **options)

    def phase_1():
        with tempfile.TemporaryDirectory() as folder:
            identity = fpo.reference_identity(policy, pairs, weights="", arithmetic={})
            cache = fpo.build_reference(policy, pairs, folder, identity, max_pairs=args.pairs, **args.rows)
            sizes.append(cache.size() / n)
            lookups.extend(
                seconds(lambda group=group: cache.lookup(torch.tensor(group)), "cpu") for group in groups
            )

    sizes, lookups = [], []
    turn = contextlib.nullcontext
    times = in_turn({"bare": lambda: turn(bare), "phase 1": lambda: turn(phase_1)}, args.rounds, args.device)
    with steps.turn("fpo") as step:
        step()
        lookup = median(lookups) / median(seconds(step, args.device) for _ in range(args.rounds))
    speed = median(a / b for a, b in zip(times["bare"], times["phase 1"], strict=True))
    row = {
        "pairs": n,
        "bare pairs/s": n / median(times["bare"]),
        "speed/bare": speed,
        "kB/pair": sizes[0] / 1e3,
    }
    row |= {"lookup/step": lookup}
    print_rows(f"{args.shape}: the reference pass", [row])
    return row


def updates(args):
    """Of 200 updates at lr 5e-7 of bf16 weights, how many are lost: in plain bf16, and with the exact optimizer."""
    rows, lr = [], 5e-7
    for rule in precision.RULES:
        torch.manual_seed(0)
        master = (0.02 * torch.randn(2**16)).requires_grad_()  # trained in float32: what the others should do
        plain, exact = master.detach().bfloat16().requires_grad_(), None
        exact = precision.split(master.detach())[0].clone().requires_grad_()
        with torch.no_grad():
            master.copy_(exact)
        kinds = {"adam": (torch.optim.Adam, {"betas": (0.9, 0.95)}), "rmsprop": (torch.optim.RMSprop, {})}
        kind, options = kinds[rule]
        optimizers = [kind([master], lr, foreach=False, **options), kind([plain], lr, **options)]
        optimizers.append(precision.ExactOptimizer([exact], lr, rule=rule))
        drift, moved, lost = torch.randn(2**16), 0, {"plain": 0, "exact": 0}
        for _ in range(200):
            gradient = (drift + torch.randn(2**16)).bfloat16()
            before = [master.detach().clone(), plain.detach().clone()]
            for weight, optimizer in zip((master, plain, exact), optimizers, strict=True):
                weight.grad = gradient.to(weight.dtype)
                optimizer.step()
            joined = precision.join(exact.detach(), optimizers[2].state[exact]["rest"])
            moves = master != before[0]
            moved += int(moves.sum())
            lost["plain"] += int((moves & (plain == before[1])).sum())
            lost["exact"] += int((moves & (joined != master)).sum())
        for name in lost:
            equal = bool((joined == master).all()) if name == "exact" else None
            rows.append(
                {"optimizer": f"{rule}, {name}", "share lost": lost[name] / moved, "bit-equal": equal}
            )
    print_rows(f"updates lost at lr {lr}, bf16 weights, 200 steps", rows)
    return rows


# ---------------------------------------------------------------------------- another trainer
def trl_trainer(args, pairs, folder, steps, callback):
    """TRL's DPOTrainer on the same model and pairs, set to do what our step does and nothing beside it."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    # A token is a word: text goes in, since the trainer tokenises by itself, and the same ids come out.
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(args.config.vocab_size)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1", bos_token="w2"
    )
    text = lambda ids: "".join(f" w{i}" for i in ids.tolist())  # noqa: E731
    names = ("prompt", "chosen", "rejected")
    rows = [{name: text(ids) for name, ids in zip(names, pairs[i], strict=True)} for i in range(len(pairs))]
    config = DPOConfig(
        output_dir=folder, per_device_train_batch_size=len(pairs), max_steps=steps, max_length=None, beta=0.1,
        precompute_ref_log_probs=True, gradient_checkpointing=args.checkpointing, bf16=False, learning_rate=5e-7,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch", seed=0,
        use_cpu=args.device == "cpu", dataloader_pin_memory=False, logging_strategy="no", save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    return DPOTrainer(make_lm(args), args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                      callbacks=[callback])  # fmt: skip


def peer(args):
    """DPO with precomputed reference, here and in TRL, step by step in turn; the memory of each in its own process."""
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("--peer trl: TRL is not installed: pip install trl==1.16.0")
    from transformers import TrainerCallback

    base, pairs = resident(), make_pairs(args)
    pairs.tokens[pairs.bounds[:, 2:] - 1] = 1  # EOS: the trainer adds it where a response has none
    ours = contextlib.ExitStack()
    step = None
    if args.only != "trl":
        own = Steps(args, ["dpo"])
        own.pairs = pairs
        step = ours.enter_context(own.turn("dpo"))
    if args.only == "ours":
        step()
        print(json.dumps(peak_of(step, base)))
        return None
    times = {"ours": [], "trl": []}

    class Clock(TrainerCallback):  # the trainer's whole step; its data loading lies outside
        def on_step_begin(self, *_, **__):
            Path("/proc/self/clear_refs").write_text("5")
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            times["trl"].append(time.perf_counter() - self.start)
            if step is not None:
                times["ours"].append(seconds(step, args.device))

    with tempfile.TemporaryDirectory() as folder:
        trl_trainer(args, pairs, folder, args.rounds + 2, Clock()).train()
    if args.only:
        print("\n" + json.dumps((resident("VmHWM") - base) / 1e9))
        return None
    sys.argv[1:] += ["--shape", args.shape]
    peaks = {name: child(name) for name in times}
    ratio = median(b / a for a, b in zip(times["ours"][2:], times["trl"][2:], strict=True))
    rows = [{"trainer": name, "ms/step": 1e3 * median(t[2:]), "pairs/s": args.pairs / median(t[2:]), "peak GB": peaks[name]}
            for name, t in times.items()]  # fmt: skip
    title = f"{args.shape}: DPO, {args.pairs} × ({args.prompt} + 2 × {args.response}) tokens, vocabulary {args.config.vocab_size}"
    print_rows(f"{title}: pairs/s {ratio:.2f} × TRL's, memory {peaks['ours'] / peaks['trl']:.2f} ×", rows)
    return {"rows": rows, "speed_ratio": ratio, "memory_ratio": peaks["ours"] / peaks["trl"]}


# ---------------------------------------------------------------------------- what a rank will need
def plan(
    config, *, method, dtype, rule, ranks, shard, micro_batch_tokens, response_share, checkpointing,
    sae_shape=None, layout="shared", row_tokens=1024,
):  # fmt: skip
    """GB that a rank will need at its peak, item by item, from the config alone; no weight is made.

    Args:
        config: a Gemma-2 config. Eager attention keeps its scores, flex_attention none.
        method: one of fpo.METHODS: TDPO and SimPO+KL hold the reference too, FPO the SAE's encoder.
        dtype: "float32" or "bfloat16", of weights and gradients. rule: "adam" or "rmsprop".
        ranks, shard: processes; "none", "states" (the optimizer's) or "fsdp" (all; float32 masters, bf16 compute).
        micro_batch_tokens: tokens of a forward, padding counted, as `layout` lays them out.
        response_share: share of them that the head and the SAE see.
        checkpointing: only each layer's input is kept.
        sae_shape: (d, m), or None. row_tokens: length of a row, for eager's scores.
    Returns:
        dict of GB by item, "total" among them: what the allocator peaks at, without the CUDA context (about 0.5 GB).
    """
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    P, T, N = sum(p.numel() for p in lm.parameters()), micro_batch_tokens, micro_batch_tokens * response_share
    layer = sum(p.numel() for p in lm.model.layers[0].parameters())
    d, V, fsdp = config.hidden_size, config.vocab_size, shard == "fsdp"
    master = 4 if dtype == "float32" or fsdp else 2  # bytes a weight; the bf16 weight's other half is a state
    b = 2 if fsdp else master
    states = {"adam": 8, "rmsprop": 4}[rule] + (2 if master == 2 else 0)
    kept, working = layer_bytes(config, b, row_tokens)
    depth = config.num_hidden_layers
    chunk = 8192 if config._attn_implementation == "flex_attention" else 1024
    # Float32 blocks of the head's backward: logits, their slope, the gradient; TDPO has the reference's too.
    blocks = 5 if method in fpo.NEEDED else 4
    held = method in fpo.NEEDED
    items = {
        "weights": P * master / (ranks if fsdp else 1),
        "gradients": P * master / (ranks if fsdp else 1),
        "optimizer": P * states / (1 if shard == "none" else ranks),
        "layers in flight": 3 * layer * b + 2 * V * d * b if fsdp else 0,
        "activations": T * (depth * d * b + kept + working)
        if checkpointing
        else T * (depth * kept + working),
        "head": N * chunk * 4 * blocks + 3 * N * d * 4 + V * d * b,  # its dW waits for the embedding's
        "embedding gradient": V * d * b,
        "SAE": 0.0,
        "reference": P * b / (ranks if fsdp else 1) + T * working if held else 0.0,
    }
    if method == "fpo" and sae_shape:
        items["SAE"] = 4 * sae_shape[0] * sae_shape[1] + 4 * 4 * min(N, 1024) * sae_shape[1] + N * d * b
    items["total"] = sum(items.values())
    return {name: size / 1e9 for name, size in items.items()}


def layer_bytes(config, b, row_tokens):
    """Bytes a token that a Gemma-2 layer keeps for its backward, and that its widest moment takes on top.

    Four RMSNorms keep their input and output in float32; the MLP four tensors of its width; attention queries, keys,
    values, what comes out, and on eager a tanh and a softmax of every score.
    """
    d, f = config.hidden_size, config.intermediate_size
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    scores = config.num_attention_heads * row_tokens if config._attn_implementation != "flex_attention" else 0
    softmax = 4 + (b if b != 4 else 0)
    kept = 32 * d + b * (2 * d + 4 * f + 2 * q + 2 * kv) + scores * (b + softmax)
    return kept, 3 * b * f + 2 * scores * 4


def print_plan(items, gpu_gb=80.0):
    """The plan as a table, and whether it fits a card of `gpu_gb`."""
    for name, gb in items.items():
        print(f"{name:<20}{gb:>10.2f} GB")
    print(f"{'fits' if items['total'] <= gpu_gb else 'does not fit'} {gpu_gb:g} GB a rank")


# ---------------------------------------------------------------------------- main
def main(argv=None):
    """Run what the flags ask for."""
    args = parse_args(argv)
    if (
        args.peer and os.environ.get("MALLOC_MMAP_MAX_") != "0"
    ):  # or page faults in big tensors decide, mostly TRL's
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_MAX_": "0"})
    if args.head == "plain":
        fpo.token_statistics = plain_statistics
    if args.head_only or args.updates:
        figures = {"head" if args.head_only else "updates": (head_only if args.head_only else updates)(args)}
    else:
        section = peer if args.peer else reference_pass if args.reference_pass else methods_table
        shapes = [args.shape] if args.shape else ["tiny", "wide"]
        figures = {shape: section(with_shape(args, shape)) for shape in shapes}
    if args.json and not args.only:
        card = (
            torch.cuda.get_device_name()
            if args.device == "cuda"
            else f"CPU, {torch.get_num_threads()} threads"
        )
        fpo.write_json(
            args.json, {"device": card, "torch": torch.__version__, "flags": vars(args), "figures": figures}
        )


if __name__ == "__main__":
    main()
