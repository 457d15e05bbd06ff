"""Preference training on SAE features: FPO, and the methods that the paper compares it with.

    torchrun --standalone --nproc_per_node 2 train.py --method fpo --preset toy    a laptop, nothing prepared
    torchrun --nproc_per_node 4 train.py --method sft                              Gemma-2-2B, 4 × H100
    torchrun --nproc_per_node 4 train.py --method fpo

The stages, in order: settings, processes, data, model; the audit; Phase 1, the offline reference (Sec. 3);
Phase 2, the loop; what came out. All but Phase 1's cache goes into --out: config.json, metrics.jsonl,
scores.json, model/ (a Hugging Face directory), and the states of --save_every.
"""

import hashlib
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, HfArgumentParser

import data
import fpo
import offline
import scale
from data import UserError
from sae import load_sae


# ---------------------------------------------------------------------------- settings
def flag(default, text):
    """A field of Config with its --help text; what is paper's, experiments' or ours stands in the text."""
    make = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**make, metadata={"help": text})


@dataclass
class Config:
    """Every setting of a run. Defaults are the paper's for FPO on Gemma-2-2B (Table 5); where the paper is
    silent, those of the authors' code when the experiments ran ("experiments"). A preset and the method's
    row of Table 5 replace some, the command line any.
    """

    # what runs, on what
    method: Literal[fpo.METHODS] = flag("fpo", "a row of Table 1 or 6")  # type: ignore[valid-type]
    preset: str | None = flag(None, "fills in what is not given; gemma-2-2b, or own with --model alone")
    model: str = flag(None, "where training starts: a Hugging Face directory or hub name")
    reference: str = flag(None, "the frozen π_ref; by default where training starts")
    dataset: str = flag(None, "pairs: a JSONL, parquet or arrow file, or hub NAME:SPLIT")
    eval_dataset: str = flag(None, "held-out pairs, in the same forms")
    chat_format: Literal["auto", "halos"] = flag("auto", "of tokenizers without template; halos: Sec. 4's")
    cache_dir: str = flag(None, "Phase 1's reference; by default runs/PRESET/reference")
    out: str = flag(None, "folder of this run; by default runs/PRESET/METHOD")
    # the sparse autoencoder
    sae: str | None = flag("google/gemma-scope-2b-pt-res", "Gemma Scope's repo or layout, or one file")
    sae_layer: list[int] = flag([25], "from 0; the last is best (Table 3); several: mean D_FPO (Table 7)")
    sae_width: str = flag("16k", "number of features (Table 5: 16k); auto: the narrowest there is")
    sae_site: Literal["res", "mlp", "att"] = flag("res", "residual stream, MLP (Table 3) or attention")
    sae_l0: list[str] = flag(["55"], "average L0, for all layers or each (experiments); auto: nearest to 100")
    k: int = flag(50, "k of Eq. 10 (experiments)")
    feature_scale: Literal["none", "rms"] = flag("none", "rms: D_FPO / mean ‖h‖², without unit (ours)")
    # the loss: Table 5, by method
    beta: float | None = flag(0.1, "β")
    alpha: float | None = flag(0.5, "α of δ_TDPO2 and δ_FPO")
    gamma: float | None = flag(None, "γ of SimPO")
    stop_gradient: bool = flag(True, "hold δ_FPO's chosen term constant (Table 3)")
    # optimisation
    optimizer: Literal["adam", "rmsprop"] = flag("adam", "Adam for 2B, RMSprop for 9B (Table 5)")
    lr: float = flag(5e-7, "learning rate (Table 5)")
    adam_beta2: float = flag(0.999, "Adam's β2; β1 is 0.9 (experiments)")
    schedule: Literal["constant", "cosine"] = flag("constant", "after warm-up (Table 5; Table 4: cosine)")
    warmup_steps: int = flag(150, "linear (Table 5)")
    warmup_ratio: float = flag(0.0, "warm-up as a share of all steps, instead (Table 4: 0.1)")
    max_grad_norm: float = flag(10.0, "gradient clip (experiments); 0: none")
    batch_size: int = flag(32, "pairs a step, over all ranks (Table 5)")
    epochs: int = flag(1, "passes over the data (Table 5)")
    steps: int | None = flag(None, "end after so many steps, whatever --epochs")
    seed: int = flag(0, "of the data's order")
    max_length: int = flag(2048, "tokens of prompt and response (experiments)")
    max_prompt_length: int = flag(1024, "tokens of the prompt where both are too long (experiments)")
    # memory and speed
    micro_batch_tokens: int = flag(8192, "most tokens of a forward, padding counted; 0: no limit")
    dtype: Literal["auto", "float32", "bfloat16", "tf32"] = flag("auto", "CPU: float32, CUDA: bfloat16")
    layout: Literal["auto", "shared", "separate"] = flag("auto", "the prompt once a pair (shared) or twice")
    activation_checkpointing: bool = flag(True, "compute activations again in the backward (Table 5)")
    compile: bool = flag(True, "torch.compile each layer; without effect on the CPU")
    shard: Literal["none", "states", "fsdp"] = flag("states", "what ranks share: optimizer states, or all")
    # evaluation, interruptions, trackers
    eval_every: int = flag(200, "steps between scores of held-out pairs; 0: at the ends alone")
    eval_kl: bool = flag(True, "load the reference to score the KL, for methods that do without it")
    save_every: int = flag(0, "steps between states to resume from; 0: on a signal alone")
    resume: bool = flag(False, "continue from --out's state where there is one, else start")
    report_to: Literal["none", "tensorboard", "wandb"] = flag("none", "tracker of metrics.jsonl's numbers")


# Table 5 by method; None: the method has no such term. SimPO+KL is Table 6's, whose values are not given.
TABLE_5: dict[str, dict] = {
    "sft": {"beta": None, "alpha": None, "gamma": None},
    "dpo": {"beta": 0.1, "alpha": None, "gamma": None},
    "tdpo1": {"beta": 0.1, "alpha": None, "gamma": None},
    "tdpo2": {"beta": 0.1, "alpha": 0.5, "gamma": None},
    "simpo": {"beta": 2.0, "alpha": None, "gamma": 0.5},
    "simpo_kl": {"beta": 2.0, "alpha": 0.5, "gamma": 0.5},
    "fpo": {"beta": 0.1, "alpha": 0.5, "gamma": None},
}
ULTRAFEEDBACK, ULTRACHAT = "HuggingFaceH4/ultrafeedback_binarized", "HuggingFaceH4/ultrachat_200k"
PAPER_DATA: dict[str, dict] = {
    "sft": {"dataset": f"{ULTRACHAT}:train_sft", "eval_dataset": f"{ULTRACHAT}:test_sft[:2000]"},
    "others": {"dataset": f"{ULTRAFEEDBACK}:train_prefs", "eval_dataset": f"{ULTRAFEEDBACK}:test_prefs"},
}
# What differs from Config's defaults; `base` is the model that SFT starts from.
PRESETS: dict[str, dict] = {
    "gemma-2-2b": {"base": "google/gemma-2-2b"},
    "gemma-2-9b": {
        "base": "google/gemma-2-9b",
        "sae": "google/gemma-scope-9b-pt-res",
        "sae_layer": [41],  # the paper names none; the experiments' code loads 41, L0 52
        "sae_l0": ["52"],
        "optimizer": "rmsprop",
        "eval_kl": False,  # another 18.5 GB at each evaluation
    },
    "toy": {  # a world of 0.2 M parameters: its own data, SAE, learning rate, clip, betas and lengths
        "base": "runs/toy/base",
        "sae": "runs/toy/sae",
        "sae_layer": [3],
        "sae_width": "512",
        "sae_l0": ["auto"],
        "dataset": "runs/toy/train.jsonl",
        "eval_dataset": "runs/toy/test.jsonl",
        "lr": 3e-4,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "warmup_steps": 10,
        "steps": 100,
        "max_length": 1024,
        "max_prompt_length": 512,
        "activation_checkpointing": False,
        "eval_every": 50,
    },
}
# For models that the paper does not try: D_FPO without unit, and the α of a sweep (docs/results.md).
UNITLESS = {"feature_scale": "rms", "alpha": 1e4, "sae_l0": ["auto"], "warmup_steps": 0, "warmup_ratio": 0.1}
PRESETS["gemma-3-270m"] = {"base": "google/gemma-3-270m", "sae": "google/gemma-scope-2-270m-pt", **UNITLESS}
PRESETS["gemma-3-270m"]["sae_layer"] = [17]
PRESETS["gemma-3-1b"] = {"base": "google/gemma-3-1b-pt", "sae": "google/gemma-scope-2-1b-pt", **UNITLESS}
# Any other model: its data and its SAE must be given; the SAE is read at the last layer.
PRESETS["own"] = {"sae": None, "sae_layer": [], "sae_width": "auto", **UNITLESS}
# Settings that a resumed run may change: they do not change what is learned.
FREE = {"resume", "save_every", "out", "cache_dir", "eval_every", "eval_kl", "report_to"}
AT_LEAST_1 = {"batch_size", "epochs", "steps", "k", "max_length", "max_prompt_length"}  # others at least 0


def parse_args(argv=None) -> Config:
    """The command line over Table 5's row for the method, over the preset, over Config's defaults.

    Raises: UserError: a flag or value that is not allowed, in one line that names those that are.
    """
    about = {"description": __doc__.split("\n\n")[0], "allow_abbrev": False, "add_help": False}
    parser = HfArgumentParser(Config, **about)  # type: ignore[arg-type]
    parser.error = refuse  # type: ignore[method-assign]  # argparse's own prints a page
    first, _ = parser.parse_known_args(argv)
    preset = first.preset or ("own" if first.model else "gemma-2-2b")
    if preset not in PRESETS:
        refuse(f"--preset {preset}: one of {', '.join(PRESETS)}")
    paper = PAPER_DATA["sft" if first.method == "sft" else "others"] if preset.startswith("gemma") else {}
    left_out = {"base"} if first.method == "fpo" else {"base", "alpha"}  # a preset's α is FPO's
    values = {name: value for name, value in PRESETS[preset].items() if name not in left_out}
    parser.set_defaults(**{"preset": preset, **paper, **TABLE_5[first.method], **values})
    parser.add_argument("-h", "--help", action="help", help="show this and end")  # now with those defaults
    config, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        refuse(f"{' '.join(unknown)}: no such flag; --help lists them all")
    fill_in(config)
    check(config)
    return config


def refuse(message):
    """Raise UserError."""
    raise UserError(message)


def fill_in(config):
    """What follows from other settings: where training starts, the reference, folders, L0s as numbers."""
    name = config.preset
    if config.model is None:  # the SFT model of the preset where there is one, else its base
        if name == "own":
            refuse("--preset own: --model is needed")
        tuned = "runs/toy/model" if name == "toy" else f"runs/{name}/sft/model"
        start_tuned = config.method != "sft" and (name == "toy" or Path(tuned).is_dir())
        config.model = tuned if start_tuned else PRESETS[name]["base"]
    if name == "own":  # outputs are named after the model
        name = next((p for p in reversed(Path(config.model).parts) if p not in ("model", "sft")), "own")
    config.reference = config.reference or config.model
    config.cache_dir = config.cache_dir or f"runs/{name}/reference"
    config.out = config.out or f"runs/{name}/{config.method}"
    config.sae_l0 = [int(l0) if str(l0).isdigit() else l0 for l0 in config.sae_l0]


def check(config):
    """Errors that need no model and no data: each names the value and what is allowed."""
    for name, value in asdict(config).items():
        for v in value if isinstance(value, list) else [value]:
            low = 1 if name in AT_LEAST_1 else 0
            if v == "":
                refuse(f"--{name} '': must not be empty")
            if isinstance(v, (int, float)) and not low <= v < 2**32:
                refuse(f"--{name} {v}: must be at least {low}, and below 2^32")
    for name, papers in TABLE_5[config.method].items():
        if (papers is None) != (getattr(config, name) is None):
            has = "has none" if papers is None else "needs one"
            refuse(f"--{name} {getattr(config, name)}: --method {config.method} {has}")
    for name in ("warmup_ratio", "adam_beta2"):
        if not getattr(config, name) < 1:
            refuse(f"--{name} {getattr(config, name)}: must be from 0 to below 1")
    most = config.max_length
    if config.max_prompt_length >= most:
        refuse(f"--max_prompt_length {config.max_prompt_length}: must be below --max_length {most}")
    for name in ("dataset", "eval_dataset"):
        if getattr(config, name) is None:
            refuse(f"--{name}: --preset {config.preset} needs one: a JSONL file or a hub data set")
    if config.method == "fpo" and config.sae is None:
        refuse("--sae: FPO needs one; `python -m experiments.train_sae` makes one for any model")
    if config.shard == "fsdp" and "RANK" not in os.environ:
        refuse("--shard fsdp: start it with torchrun")
    if config.dtype == "tf32" and not torch.cuda.is_available():
        refuse("--dtype tf32: needs CUDA; here it is one of auto, float32, bfloat16")
    for name in ("out", "cache_dir"):
        data.check_output(name, getattr(config, name), folder=True)
    needed = {"tensorboard": ["tensorboard"], "wandb": ["wandb", "tensorboard"]}.get(config.report_to, [])
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        refuse(f"--report_to {config.report_to}: pip install {' '.join(missing)}")


# ---------------------------------------------------------------------------- loading
def torch_dtype(config, device) -> torch.dtype:
    """The dtype of weights. auto: float32 on the CPU, bfloat16 on CUDA. tf32: float32, products rounded."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = config.dtype == "tf32"
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def load_config(name: str):
    """A model's config, all dropout off. UserError for an adapter, quantised weights, or no model at all."""
    if (Path(name) / "adapter_config.json").exists() and not (Path(name) / "config.json").exists():
        refuse(f"model {name!r}: this is an adapter; merge it into its model first")
    with data.hub_errors("model", name):
        config = AutoConfig.from_pretrained(name)
    if getattr(config, "quantization_config", None):
        refuse(f"model {name!r}: its weights are quantised; training needs float32 or bfloat16 weights")
    text = config.get_text_config()
    for key, value in vars(text).items():  # reference and policy must see the same network at every step
        if ("dropout" in key or "jitter" in key) and isinstance(value, float):
            setattr(text, key, 0.0)
    return config


def load_lm(name: str, device, *, dtype=torch.float32, move=True):
    """A causal LM from a Hugging Face directory or hub repo. Attention: eager on the CPU, flex on CUDA.

    move: put it on the device; FSDP2 takes it from the CPU instead, layer by layer.
    """
    # Never sdpa: it drops Gemma-2's softcap (huggingface/transformers#32865).
    attention = "flex_attention" if torch.device(device).type == "cuda" else "eager"
    options = {"config": load_config(name), "dtype": dtype, "attn_implementation": attention}
    with data.hub_errors("model", name):
        lm = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **options)
    return lm.to(device) if move else lm


def load_saes(config, device):
    """One SAE for each of --sae_layer, its encoder on the device, and where each reads: [(layer, site)].

    Raises: UserError for anything that `sae.load_sae` refuses.
    """
    layers = config.sae_layer or [load_config(config.model).get_text_config().num_hidden_layers - 1]
    l0s = config.sae_l0 * len(layers) if len(config.sae_l0) == 1 else config.sae_l0
    if len(l0s) != len(layers):
        refuse(f"--sae_l0 {l0s}: one value is needed, or one for each of --sae_layer {layers}")
    width = None if config.sae_width == "auto" else config.sae_width
    saes, options = [], {"width": width, "site": config.sae_site}
    for layer, l0 in zip(layers, l0s, strict=True):
        try:
            sae = load_sae(config.sae, layer=layer, average_l0=None if l0 == "auto" else l0, **options)
        except (ValueError, OSError) as error:
            raise UserError(f"--sae {error}") from error
        for name in ("W_enc", "b_enc", "threshold"):  # training never decodes
            setattr(sae, name, getattr(sae, name).to(device))
        saes.append(sae)
    return saes, [(layer, config.sae_site) for layer in layers]


def load_data(flag_name, config, tokenizer):
    """The pairs of --dataset or --eval_dataset, with what was left out or cut printed."""
    size, other = (load_config(n).get_text_config().vocab_size for n in (config.model, config.reference))
    if size != other:
        refuse(f"--reference {config.reference}: a vocabulary of {other}, the model's has {size}")
    source = getattr(config, flag_name)
    pairs = data.load_pairs(
        source, tokenizer, max_length=config.max_length, max_prompt_length=config.max_prompt_length,
        sft=config.method == "sft", chat_format=config.chat_format,
    )  # fmt: skip
    if (most := pairs.largest_token()) >= size:
        refuse(f"{source}: token id {most} of a vocabulary of {size}: the tokenizer is another model's")
    if data.ranks()[0] == 0:
        notes = [f"{n} × {what}" for what, n in pairs.notes.items()]
        print(f"{flag_name}: {len(pairs)} pairs", *notes, sep="; ")
    return pairs


def rows_of(config, tokenizer, pairs, device) -> dict:
    """How rows are laid out, as data.collate takes it.

    auto: on CUDA (flex_attention) the prompt is always shared; eager attention costs the square of a row, so
    there it pays only where the prompt is at least as long as a response.
    """
    prompt, chosen, rejected = pairs.sizes.double().mean(0).tolist()
    pays = device.type == "cuda" or (prompt >= max(chosen, rejected) and rejected > 0)
    layout = config.layout if config.layout != "auto" else "shared" if pays else "separate"
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return {"layout": layout, "row_multiple": 128 if device.type == "cuda" else 1, "pad_id": pad}


def load_policy(name, config, device, saes, sites, frozen=False):
    """A Policy as training runs it, or the `frozen` reference beside it, and the digest of its weights."""
    fsdp, dtype = config.shard == "fsdp", torch_dtype(config, device)
    lm = load_lm(name, device, dtype=torch.float32 if fsdp and not frozen else dtype, move=not fsdp)
    digest = offline.digest(lm.state_dict())
    if config.activation_checkpointing and not frozen:
        lm.activation_checkpointing_enable({"use_reentrant": False})
    policy = fpo.Policy(lm, saes, sites, fused=None if config.compile else False)
    compile_layers(lm, config, device, sites)  # after the hooks
    if fsdp and frozen:
        scale.shard_layers(lm, dtype=dtype, device=device)
        lm.to(device)  # what is not in a layer: the embedding, the final norm
    elif fsdp:
        scale.shard_policy(policy, dtype=dtype, device=device)
    return policy, digest


def compile_layers(lm, config, device, sites):
    """torch.compile each layer, on CUDA. A hook at `mlp` or `att` would not fire inside a compiled block."""
    if config.compile and device.type == "cuda":
        torch._dynamo.config.optimize_ddp = False  # it would split layers without checkpointing
        hooked_inside = [layer for layer, site in sites if site != "res"]
        for number, layer in enumerate(lm.model.layers):
            if number not in hooked_inside:
                layer.compile()


def make_toy_world(config):
    """Make the toy preset's files where they are missing: rank 0 does, the others wait."""
    if config.preset == "toy":
        if data.ranks()[0] == 0 and not Path("runs/toy/toy.json").exists():
            import toy

            toy.make_world(Path("runs/toy"))
        data.barrier()


def prove(policy, pairs, config, rows) -> dict:
    """`fpo.audit`, printed; then freeze parameters that get no gradient (a vision tower), as DDP needs."""
    try:
        found = fpo.audit(policy, pairs, k=config.k, **rows)
    except torch._dynamo.exc.TorchDynamoException as error:
        refuse(f"torch.compile fails ({str(error).splitlines()[0]}); --no_compile trains without it")
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        refuse(f"{type(policy.lm).__name__}: our forward does not fit this architecture: {error!r:.200}")
    if config.shard != "fsdp":
        policy(data.collate(pairs, [0], **rows).to(policy.lm.device))[0].logps.sum().backward()
        for parameter in policy.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
    if data.ranks()[0] == 0:
        says = [f"audit passed: {found['difference']:.1g} nats a token from the model's own forward"]
        says += [
            f"sliding window of {found['window']} tested" if found["window"] else "no sliding window tested"
        ]
        says += [f"rounding alone makes D_FPO {found['floor']:.1g}"] if policy.saes else []
        print("; ".join(says))
    return found


# ---------------------------------------------------------------------------- pieces of the loop
def learning_rate(step: int, steps: int, config) -> float:
    """Linear warm-up, then constant (Table 5) or a cosine to 0 (Table 4). `step` counts from 0."""
    warmup = round(config.warmup_ratio * steps) if config.warmup_ratio else config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def plan_steps(config, pairs, rows, world: int) -> list[list[list[int]]]:
    """For every step its micro-batches, this and the other ranks'; one epoch after another."""
    lengths = pairs.row_lengths(rows["layout"], rows["row_multiple"])
    per_epoch = math.ceil(len(pairs) / config.batch_size)
    steps = config.steps if config.steps is not None else config.epochs * per_epoch
    plan = []
    for step in range(steps):
        if step % per_epoch == 0:
            order = data.epoch_order(len(pairs), step // per_epoch, config.seed)
        start = step % per_epoch * config.batch_size
        batch = order[start : start + config.batch_size]
        plan.append(data.micro_batches(batch, lengths, world, max_tokens=config.micro_batch_tokens))
    return plan


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
    margin, noise = line["margin_size"], (config.alpha or 1) * config.beta * floor
    times = line["constraint_size"] / max(margin, 1e-30)
    if config.method == "fpo" and noise > margin:
        return f"rounding alone makes a constraint of {noise:.1g}, above the margin: try --dtype float32"
    better = f"--alpha {config.alpha / times:.1g}" if config.alpha and times > 1 else None
    return better and f"the constraint is {times:.2g} × the reward margin: {better} would balance them"


def peak_memory_gb(device) -> float:
    """Peak memory of this process in GB: the card's allocations, or the resident set without one."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else resident) / 1e9


# ---------------------------------------------------------------------------- a run's state, and its model
def held(policy, optimizer) -> dict[str, torch.Tensor]:
    """This rank's weights and optimizer states by parameter name; of what is sharded its shards."""
    inner, tensors = getattr(optimizer, "optim", optimizer), dict[str, torch.Tensor]()
    updated = {id(p) for group in inner.param_groups for p in group["params"]}  # by this rank
    for name, parameter in policy.named_parameters():
        tensors[f"weight/{name}"] = scale.local(parameter).detach()
        if id(parameter) in updated:
            tensors |= {f"{key}/{name}": tensor for key, tensor in inner.state_of(parameter).items()}
    return tensors


def save_state(out, step: int, policy, optimizer, meta: dict):
    """Write OUT/state/step_N: state.json and a file a rank; aside, then renamed; then the older one goes."""
    rank, world = data.ranks()
    aside, final = out / f"state/step_{step:08d}.tmp", out / f"state/step_{step:08d}"
    if final.exists():
        return
    data.barrier()  # every rank has looked
    if rank == 0:
        for left in (out / "state").glob("step_*.tmp"):  # of a run that died while it wrote
            shutil.rmtree(left)
        aside.mkdir(parents=True)
    data.barrier()
    # Whole weights are the same on every rank: rank 0 writes them.
    writes = rank == 0 or isinstance(next(policy.parameters()), DTensor)
    mine = {n: t.contiguous() for n, t in held(policy, optimizer).items() if writes or n[:7] != "weight/"}
    with data.writing(aside):
        # safetensors cannot reopen a file that has neither tensors nor metadata, so always write metadata.
        save_file(mine, aside / f"rank_{rank}.safetensors", metadata={"rank": str(rank)})
    data.barrier()
    if rank == 0:
        data.write_json(aside / "state.json", {"step": step, "ranks": world, **meta})
        os.sync()  # the disk has all of it before it gets its name
        aside.rename(final)
        for old in saved_states(out)[:-1]:
            shutil.rmtree(old)
    data.barrier()


def saved_states(out) -> list[Path]:
    """Whole states of a run, oldest first; what was being written when a run died is not among them."""
    return sorted(path for path in Path(out, "state").glob("step_*") if path.suffix != ".tmp")


def read_meta(config, stands_on=None) -> dict:
    """state.json of the last state. UserError where this run does not continue it: each difference is named.

    stands_on: digests of the tokens, SAEs, template and weights, by the flag that names them.
    """
    path = saved_states(config.out)[-1] / "state.json"
    try:
        meta = json.loads(path.read_text())
        settings, before, ranks = meta["settings"], meta["stands_on"], meta["ranks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume: {path} is not what a run writes: {error!r}") from None
    now = json.loads(json.dumps(asdict(config))).items()
    odd = [f"--{n} was {settings.get(n)}, is {v}" for n, v in now if n not in FREE and settings.get(n) != v]
    odd += [f"--{n}: other content than before" for n, v in (stands_on or {}).items() if before.get(n) != v]
    odd += [f"written by {ranks} ranks, here are {data.ranks()[1]}"] if ranks != data.ranks()[1] else []
    if odd:
        refuse(f"--resume {path.parent}: {'; '.join(odd)}; a run goes on only as it began")
    return meta


def load_state(out, policy, optimizer):
    """Put the last state's weights and optimizer states in, bit for bit. UserError for a damaged state."""
    folder, rank = saved_states(out)[-1], data.ranks()[0]
    try:
        files = [safe_open(folder / f"rank_{r}.safetensors", "pt") for r in sorted({0, rank}, reverse=True)]
        with torch.no_grad():
            for name, tensor in held(policy, optimizer).items():
                file = next(file for file in files if name in file.keys())  # noqa: SIM118
                tensor.copy_(file.get_tensor(name))
    except (OSError, SafetensorError, StopIteration, RuntimeError) as error:
        text = f"--resume {folder}: not a whole state of this model: {error}"
        raise UserError(text, everywhere=False) from None


def cut_metrics(path, step: int):
    """Keep metrics.jsonl's lines up to `step`: none lost, none doubled. A kill may have cut the last one."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = (line for line in lines if line.endswith("\n"))
    data.write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= step))


class StopSignal:
    """Notes SIGTERM and SIGINT, for the loop to save and leave at the step's end. A second one kills."""

    def __init__(self):
        self.came = False
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number, frame):
        """A handler: the loop reads `came`."""
        self.came = True
        self.restore()

    def restore(self):
        """Put the former handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def start_tracker(config, start: int):
    """Rank 0's TensorBoard writer, which wandb copies if asked for; None without --report_to.

    start: steps done before; TensorBoard drops the points that an interrupted run wrote after it.
    """
    if config.report_to == "none" or data.ranks()[0]:
        return None
    if config.report_to == "wandb":
        import wandb

        settings = {name: value for name, value in asdict(config).items() if name not in FREE}
        key = hashlib.sha256(f"{Path(config.out).absolute()} {settings}".encode()).hexdigest()[:16]
        wandb.init(name=config.out, id=key, resume="allow", config=asdict(config), sync_tensorboard=True)
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
    if data.ranks()[0]:
        return
    lm, aside, final = policy.lm, Path(config.out) / "model.tmp", Path(config.out) / "model"
    dtype = lm.config.dtype = torch_dtype(config, lm.device)
    # Written anew: a base model's may be invalid, or not know the token that ends a turn.
    known = [lm.config.get_text_config().eos_token_id, tokenizer.eos_token_id, data.Chat(tokenizer).end]
    ends = {end for some in known for end in (some if isinstance(some, list) else [some])} - {None}
    lm.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id
    )
    with data.writing(aside):
        if not weights:
            lm.config.save_pretrained(aside)
            lm.generation_config.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            return
        lm.save_pretrained(aside, state_dict={name: tensor.to(dtype) for name, tensor in state.items()})
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)


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
    device = data.start_processes()
    rank, world = data.ranks()
    out, say = Path(config.out), print if rank == 0 else str  # `say` prints on rank 0 alone
    resumes = config.resume and bool(saved_states(out))
    if resumes:
        read_meta(config)
    lock = data.hold(out) if rank == 0 else None  # noqa: F841  (held until the process ends)
    make_toy_world(config)

    # ---- SAEs, data, model: what is small comes first, so that a wrong value is found before the rest
    say(f"starting from {config.model}")
    needs_saes = config.sae is not None and config.method != "sft"
    saes, sites = load_saes(config, device) if needs_saes else ([], [])
    load_config(config.model)  # where no model is, nothing else is asked
    tokenizer = data.load_tokenizer(config.model)
    pairs, held_out = (load_data(name, config, tokenizer) for name in ("dataset", "eval_dataset"))
    rows = rows_of(config, tokenizer, pairs, device)  # how a batch is laid out
    budget = {"max_tokens": config.micro_batch_tokens, **rows}
    loading = config, device, encoders or saes, sites
    policy, digest = load_policy(config.model, *loading)
    save_model(policy, tokenizer, config, weights=False)  # what the end will write is tried now
    found = prove(policy, pairs, config, rows)  # the audit: this forward against the model's own

    # ---- Phase 1: the offline reference (Sec. 3), by the policy itself where it starts from the reference
    cache = held_out_cache = None
    units: tuple[float, ...] = ()
    if config.method in fpo.CACHED or (saes and config.feature_scale == "rms"):
        reference = policy
        if config.reference != config.model:
            reference, digest = load_policy(config.reference, *loading)
        compiled = config.compile and device.type == "cuda"
        arithmetic = {"device": device.type, "compute": str(torch_dtype(config, device)), "compile": compiled}
        arithmetic |= {"tf32": config.dtype == "tf32", "layout": rows["layout"]}
        caches = []
        for part in (pairs, held_out):
            identity = offline.reference_identity(reference, part, weights=digest, arithmetic=arithmetic)
            caches.append(offline.build_reference(reference, part, config.cache_dir, identity, **budget))
        cache, held_out_cache = caches
        del reference
        say(f"reference: {cache.folder}, {cache.size() / len(pairs) / 1e3:.1f} kB a pair")
        if config.feature_scale == "rms":
            units = cache.units(pairs.sizes[:, 1:])
    if config.method in fpo.NEEDED:
        reference, digest = load_policy(config.reference, *loading, frozen=True)
        policy.hold_reference(reference)
    if config.shard == "fsdp":  # a forward without gradients leaves the root's weights whole
        policy.reshard()

    def scores():
        """Held-out scores; where the KL is wanted, the reference is loaded for it alone."""
        lent = config.eval_kl and config.method not in (*fpo.NEEDED, "sft")
        if lent:
            policy.hold_reference(load_policy(config.reference, *loading, frozen=True)[0])
        lookup = held_out_cache and held_out_cache.lookup
        options = {"lookup": lookup, "k": config.k, "units": units, "progress": rank == 0}
        table = fpo.score_pairs(policy, held_out, **options, **budget)
        if lent:
            policy.hold_reference(None)
        if config.shard == "fsdp":
            policy.reshard()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        columns = fpo.pair_columns(table, method=config.method).items()
        return {name: (above.sum() / below.sum()).item() for name, (above, below) in columns}

    # ---- Phase 2: the loop, from the start or from where it was left
    plan = plan_steps(config, pairs, rows, world)
    ddp = dist.is_initialized() and config.shard != "fsdp"
    model = DistributedDataParallel(policy, gradient_as_bucket_view=True) if ddp else policy
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = scale.make_optimizer(
        config.optimizer, parameters, config.lr, shard=config.shard == "states",
        betas=(0.9, config.adam_beta2), fused=None if config.compile else False,
    )  # fmt: skip
    # What the run stands on, by the flag that names it: a resumed run must stand on the same.
    stands_on = {"dataset": pairs.digest(), "eval_dataset": held_out.digest(), "reference": digest}
    stands_on["model"] = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
    stands_on["sae"] = [offline.digest(dict(sae.named_buffers())) for sae in saes]
    start = 0
    if resumes:
        meta = read_meta(config, stands_on)
        load_state(out, policy, optimizer)
        start, before = meta["step"], meta["before"]
    else:
        before = scores()
        if rank == 0 and (out / "state").exists():  # an earlier run's: its later states would pass for ours
            shutil.rmtree(out / "state.old", ignore_errors=True)
            (out / "state").rename(out / "state.old")
    meta = {"settings": asdict(config), "stands_on": stands_on, "before": before}
    if rank == 0:
        data.write_json(out / "config.json", asdict(config) | {"units": units, "audit": found})
        cut_metrics(out / "metrics.jsonl", start)
    policy.train()
    if ddp:
        # DDP orders its buckets at its second forward. One throw-away forward and backward at every start
        # makes the order, and so the sums, of a resumed run those of an uninterrupted one.
        model(data.collate(pairs, [0], **rows).to(device))[0].logps.sum().backward()
        optimizer.zero_grad()
    mine = [groups[rank::world] for groups in plan[start:]]  # per step this rank's micro-batches
    lookup = cache and cache.lookup
    batches = data.stream(pairs, [g for groups in mine for g in groups], device=device, lookup=lookup, **rows)
    settings = {name: getattr(config, name) for name in ("beta", "alpha", "gamma", "k", "stop_gradient")}
    bar = tqdm(total=len(plan), initial=start, desc=config.method, unit=" steps", disable=rank > 0)
    metrics_file = open(out / "metrics.jsonl" if rank == 0 else os.devnull, "a")  # noqa: SIM115
    writer, stop, stopping = start_tracker(config, start), StopSignal(), 0.0
    started = time.perf_counter()
    for step, groups in enumerate(mine, start):
        # ---- learning rate
        lr = learning_rate(step, len(plan), config)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # ---- micro-steps: gradients of the mean loss over the pairs of the global batch
        n_pairs = sum(len(g) for g in plan[step])
        sums: dict[str, torch.Tensor] = {}
        tokens = torch.zeros((), device=device)
        for micro in range(len(groups)):
            batch, reference = next(batches)
            if ddp:  # gradients are exchanged once a step; DDP reads this at the forward
                model.require_backward_grad_sync = micro == len(groups) - 1
            statistics, held_reference = model(batch)
            loss, values = loss_function(
                config.method, statistics, held_reference or reference, units=units, **settings
            )  # (B,)
            # Ranks are averaged by DDP, hence `world`; a padding pair has weight 0.
            ((loss * batch.weight).sum() * (world / n_pairs)).backward()
            for name, value in step_sums(batch, loss, values, statistics).items():
                sums[name] = sums.get(name, 0.0) + value
            tokens = tokens + (batch.segment >= 0).sum()
        norm = scale.gradient_norm(parameters)

        # ---- the step's only wait for the device: what is logged, and whether it is finite
        signalled = torch.full((), float(stop.came), device=device)
        logged = torch.stack([*sums.values(), tokens, signalled]).double()
        if dist.is_initialized():
            dist.all_reduce(logged)
        *totals, total_tokens, stopping = logged.tolist()
        line = {"step": step + 1, **{name: value / n_pairs for name, value in zip(sums, totals, strict=True)}}
        line |= {"grad_norm": norm.item(), "lr": lr}

        # ---- clip and update; every rank sees the same sums, and decides the same
        if not (math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])):
            among = sorted(i for group in plan[step] for i in group)
            raise UserError(f"step {step + 1}: loss or gradient is not finite; it is among pairs {among}")
        if 0 < config.max_grad_norm < line["grad_norm"]:
            scale.scale_gradients_(parameters, config.max_grad_norm / (line["grad_norm"] + 1e-6))
        optimizer.step()
        optimizer.zero_grad()

        # ---- log and evaluate
        seconds = time.perf_counter() - started
        line |= {"pairs_per_s": n_pairs / seconds, "tokens_per_s": total_tokens / seconds}
        line |= {"peak_memory_gb": peak_memory_gb(device)}
        if "constraint_size" in line:  # what the constraint weighs in u beside the reward margin
            sizes = line["constraint_size"], line["margin_size"]
            line["constraint_share"] = sizes[0] / max(sum(sizes), 1e-8)  # both are 0 at step 1
            floor = (found["floor"] or 0.0) / (sum(units) / len(units) if units else 1)
            if step == 9 and rank == 0 and (text := advice(line, config, floor)):
                tqdm.write(f"step 10: {text}")
        ends = stopping or step + 1 == len(plan)
        if config.eval_every and (step + 1) % config.eval_every == 0 and not ends:
            line |= {f"eval_{name}": value for name, value in scores().items()}
        with data.writing(metrics_file.name, keep=True):
            metrics_file.write(json.dumps(line) + "\n")
            metrics_file.flush()
        draw(writer, step + 1, line)
        shown = ("loss", "accuracy", "reward_margin", "constraint", "pairs_per_s")
        bar.set_postfix({name: f"{line[name]:.3f}" for name in shown if name in line})
        bar.update()

        # ---- save
        if stopping or (config.save_every and (step + 1) % config.save_every == 0):
            save_state(out, step + 1, policy, optimizer, meta)
        if stopping:
            break
        started = time.perf_counter()
    bar.close()
    metrics_file.close()
    stop.restore()
    if stopping and step + 1 < len(plan):
        say(f"stopped by a signal after step {step + 1}; go on with --resume")
    else:
        # ---- what came out: the model first, so that no evaluation can lose it
        save_model(policy, tokenizer, config)
        after = scores()
        draw(writer, len(plan), {f"eval_{name}": value for name, value in after.items()})
        if rank == 0:
            data.write_json(out / "scores.json", {"before": before, "after": after})
            print(f"\n{'held-out':<30}{'before':>10}{'after':>10}")
            for name, value in after.items():
                print(f"{name:<30}{before[name]:>10.4g}{value:>10.4g}")
            print(f"{out}: model, metrics.jsonl, config.json, scores.json\nwhat its samples tell:")
            print(f"python eval_diversity.py --model {out / 'model'} --reference {config.reference}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run_script(main)
