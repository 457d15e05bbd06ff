"""What the scripts share before their work begins: the paper's settings (Table 5), flags, processes, models.

A preset fills in the flags that have no default of their own; the command line overrides it.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from data import split_revision
from sae import load_sae

ULTRAFEEDBACK, ULTRACHAT = "HuggingFaceH4/ultrafeedback_binarized", "HuggingFaceH4/ultrachat_200k"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Table 5, by method.
TABLE_5: dict[str, dict[str, float | None]] = {
    "sft": {"beta": None, "alpha": None, "gamma": None},
    "dpo": {"beta": 0.1, "alpha": None, "gamma": None},
    "tdpo1": {"beta": 0.1, "alpha": None, "gamma": None},
    "tdpo2": {"beta": 0.1, "alpha": 0.5, "gamma": None},
    "simpo": {"beta": 2.0, "alpha": None, "gamma": 0.5},
    "simpo_kl": {"beta": 2.0, "alpha": 0.5, "gamma": 0.5},  # Table 6; its values are not given
    "fpo": {"beta": 0.1, "alpha": 0.5, "gamma": None},
}
GEMMA_2 = {
    "base": "google/gemma-2-2b",
    "sae": "google/gemma-scope-2b-pt-res",
    "sae_layer": [25],  # the last, best in Table 3
    "sae_l0": [55],  # the authors' code's
    "dataset": f"{ULTRAFEEDBACK}:train_prefs",
    "eval_dataset": f"{ULTRAFEEDBACK}:test_prefs",
    "sft_dataset": f"{ULTRACHAT}:train_sft",
    "sft_eval_dataset": f"{ULTRACHAT}:test_sft[:2000]",
    "sae_width": "16k",
    "sae_site": "res",
    "optimizer": "adam",
    "lr": 5e-7,
    "schedule": "constant",
    "warmup_steps": 150,
    "warmup_ratio": 0.0,
    "batch_size": 32,
    "epochs": 1,
    "steps": None,
    "max_length": 1024,  # the authors' code's
    "max_prompt_length": 512,  # ours
    "max_grad_norm": 1.0,  # the authors' code's
    "micro_batch_tokens": 8192,
    "activation_checkpointing": True,
    "eval_every": 200,
    "eval_kl": False,
    "eval_samples": 0,
    "eval_tokens": 256,
    "sample_batch": 128,  # of 1,500 tokens: 20 GB of keys and values
}
PRESETS = {
    "gemma-2-2b": GEMMA_2,
    "gemma-2-9b": {
        **GEMMA_2,
        "base": "google/gemma-2-9b",
        "sae": "google/gemma-scope-9b-pt-res",
        "sae_layer": [41],  # the paper names none: the last, by Sec. 5.2
        "sae_l0": None,  # the nearest to 100
        "optimizer": "rmsprop",
        "sample_batch": 32,
    },
    "toy": {  # its own lr, warm-up and steps: a world of 200 k parameters
        **GEMMA_2,
        "base": "runs/toy/base",
        "sae": "runs/toy/sae",
        "sae_layer": [3],
        "sae_width": "512",
        "sae_l0": None,
        "dataset": "runs/toy/train.jsonl",
        "eval_dataset": "runs/toy/test.jsonl",
        "sft_dataset": "runs/toy/train.jsonl",
        "sft_eval_dataset": "runs/toy/test.jsonl",
        "lr": 3e-4,
        "warmup_steps": 10,
        "steps": 100,
        "activation_checkpointing": False,
        "eval_every": 50,
        "eval_kl": True,
        "eval_samples": 4,
        "eval_tokens": 48,
        "sample_batch": 1024,
    },
}


def start_processes(device: str | None = None) -> torch.device:
    """Join torchrun's other processes, by gloo, on CUDA nccl; alone without it. Returns the rank's device."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers_logging.disable_progress_bar()  # bars of half a second, one a rank; but see load_lm
    if "RANK" in os.environ and not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # one torchrun, which may start its ranks again:
            # they would find the dead ones' addresses in the store that it keeps (pytorch/pytorch#135712)
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend = "nccl" if device == "cuda" else "gloo"
        patience = timedelta(hours=2)  # a rank may wait for a download, a slow disk, another run's cache
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch._dynamo.config.recompile_limit = 64  # flex_attention: past it shapes run unfused, in silence
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)


@contextlib.contextmanager
def one_line_errors(everyone: bool = False, kinds=(ValueError, OSError)):
    """A wrong value ends the program with one line and status 2, not a traceback.

    Args:
        everyone: every rank says its own error (a disk's, say), not rank 0 alone what all of them found.
        kinds: of the errors that are taken so.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        yield
    except kinds as error:
        if everyone or rank == 0:
            whose = f"error (rank {rank})" if rank else "error"
            bar = "\n" * everyone  # a progress bar may stand on the line
            print(f"{bar}{whose}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


@contextlib.contextmanager
def hub_errors(what: str, name: str):
    """Turn the hub's many errors about one artefact into a ValueError of one line that says what to do."""
    try:
        yield
    except (OSError, ValueError, HfHubHTTPError) as error:
        chain = [error]
        while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(before)
        if any(isinstance(e, GatedRepoError) for e in chain) or "gated repo" in str(error):
            todo = f"accept its licence at huggingface.co/{name}, then run `hf auth login`"
        elif any(isinstance(e, RepositoryNotFoundError) for e in chain):
            todo = "no such repository: check the name, or run `hf auth login` if it is private"
        else:
            todo = str(error).strip().splitlines()[0]
        raise ValueError(f"{what} {name!r} can't be loaded: {todo}") from None


def model_place(name: str) -> tuple[str, str | None]:
    """(NAME, REVISION) of a model's directory or hub repo. ValueError where it can be neither."""
    name, revision = split_revision(name)
    if not os.path.isdir(name) and (name.startswith((".", "/", "runs/")) or name.count("/") != 1):
        raise ValueError(f"model {name!r}: no such directory (and a hub name is OWNER/NAME)")
    return name, revision


def load_tokenizer(name: str):
    """The tokenizer of a Hugging Face directory or repo, NAME or NAME@REVISION."""
    name, revision = model_place(name)
    with hub_errors("tokenizer of", name):
        return AutoTokenizer.from_pretrained(name, revision=revision)


def load_config(name: str):
    """A model's config, NAME or NAME@REVISION, with flex_attention."""
    name, revision = model_place(name)
    with hub_errors("model", name):
        return AutoConfig.from_pretrained(name, revision=revision, attn_implementation="flex_attention")


def vocabulary_size(*names: str) -> int:
    """The vocabulary size that models share, from their configs alone. ValueError where they differ."""
    sizes = {name: load_config(name).get_text_config().vocab_size for name in names}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"model and reference need one vocabulary; tokens of each: {sizes}")
    return sizes[names[0]]


def check_tokens(source: str, pairs, size: int):
    """ValueError where a data set has tokens that a model of `size` tokens has not."""
    if (most := int(pairs.tokens.max())) >= size:
        raise ValueError(f"{source}: token id {most} of a vocabulary of {size}: another model's tokenizer")


def load_lm(name: str, device, *, dtype=torch.float32, move=True):
    """A causal LM, NAME or NAME@REVISION. Attention: eager on CPU, flex on CUDA."""
    name, revision = model_place(name)
    # sdpa would drop Gemma-2's softcap (huggingface/transformers#32865).
    attention = "flex_attention" if torch.device(device).type == "cuda" else "eager"
    if not os.path.isdir(name) and os.environ.get("RANK", "0") == "0":  # a download may take long
        transformers_logging.enable_progress_bar()
    with hub_errors("model", name):
        for index in Path(name).glob("*.index.json"):  # it may name files outside its folder
            for file in json.loads(index.read_text())["weight_map"].values():
                if Path(file).name != file:
                    raise ValueError(f"{index.name} names {file!r}, no file of that folder")
        lm = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=attention, revision=revision, use_safetensors=True
        )
    return lm.to(device) if move else lm  # FSDP2 takes it from the CPU, layer by layer


def load_saes(args, device):
    """The SAEs of `--sae_layer …`, and where each reads: (layer, site). Only encoders go to the device."""
    source, revision = split_revision(args.sae)
    options = {"width": args.sae_width, "site": args.sae_site, "revision": revision}
    l0s = args.sae_l0 or [None]
    if len(l0s) not in (1, len(args.sae_layer)):
        raise ValueError(f"--sae_l0 {l0s}: one value, or one for each of --sae_layer {args.sae_layer}")
    wanted = zip(args.sae_layer, l0s if len(l0s) > 1 else l0s * len(args.sae_layer), strict=True)
    saes = [load_sae(source, layer=layer, average_l0=l0, **options) for layer, l0 in wanted]
    for sae in saes:
        for name in ("W_enc", "b_enc", "threshold"):
            setattr(sae, name, getattr(sae, name).to(device))
    return saes, [(layer, args.sae_site) for layer in args.sae_layer]


def load_feature_weights(path, saes):
    """Weights of the squared differences in D_FPO (the control experiment, Table 4), or None without a file.

    The file: {"default": w, "features": {"17": w, …}}, one weight for each SAE feature, at least 0.

    Returns:
        per SAE (m,) float32, on its device.
    """
    if path is None:
        return None
    try:
        with open(path) as file:
            table = json.load(file)
        default, features = float(table["default"]), {int(i): float(w) for i, w in table["features"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f'{path}: {{"default": number, "features": {{"index": number}}}} is needed: {error}'
        ) from None
    if len(saes) != 1:
        raise ValueError(f"{path}: weights are those of one SAE's features, here are {len(saes)} SAEs")
    m = saes[0].m
    for i, w in [(0, default), *features.items()]:
        if not (0 <= i < m and math.isfinite(w) and w >= 0):
            raise ValueError(f"{path}: feature {i}, weight {w}: features are 0..{m - 1}, weights at least 0")
    weights = torch.full((m,), default)
    weights[list(features)] = torch.tensor(list(features.values()))
    return (weights.to(saes[0].threshold.device),)


def default_model(preset: str, method: str) -> tuple[str, str]:
    """Where training starts if no --model is given, and a line that says why."""
    base = PRESETS[preset]["base"]
    if method == "sft":
        return base, f"SFT starts from {base}"
    tuned = "runs/toy/model" if preset == "toy" else f"runs/{preset}/sft/model"
    if Path(tuned).is_dir() or preset == "toy":
        return tuned, f"starting from {tuned}, the SFT model"
    return base, (
        f"starting from {base}: there is no {tuned}; the paper tunes it first: "
        f"torchrun --nproc_per_node 4 train.py --method sft --preset {preset}"
    )


def make_toy_world(args):
    """Make the toy preset's files where they are missing: rank 0 does, the others wait."""
    if args.preset == "toy":
        if int(os.environ.get("RANK", 0)) == 0 and not Path("runs/toy/toy.json").exists():
            import toy

            toy.make_world(Path("runs/toy"))
        if dist.is_initialized():
            dist.barrier()


def rows_of(args, tokenizer, pairs, device) -> dict:
    """How rows are laid out, as data.collate takes it.

    auto: on CUDA (flex_attention) the prompt is always shared; eager attention costs the square of a row, so
    there it pays only where the prompt is at least as long as a response.
    """
    layout = args.layout
    if layout == "auto":
        prompt, chosen, rejected = pairs.bounds.diff(dim=1).double().mean(0).tolist()
        pays = rejected > 0 and prompt >= max(chosen, rejected)
        layout = "shared" if device.type == "cuda" or pays else "separate"
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    multiple = 128 if device.type == "cuda" else 1
    return {"layout": layout, "pack_to": args.pack_to, "row_multiple": multiple, "pad_id": pad}


def shown(words: list[str]) -> str:
    """A command as a user types it."""
    return shlex.join(["python", *words[1:]])


def hardware() -> str:
    """What this ran on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores"


def git_commit() -> str:
    """The commit, with a + where files differ from it; "unknown" outside a repository."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude", "*"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def made_by() -> dict:
    """What a file of results says of its making: command, commit, hardware."""
    return {"command": shown(["", *sys.argv]), "commit": git_commit(), "hardware": hardware()}


def parse_flags(parser: argparse.ArgumentParser, argv=None, least=()) -> argparse.Namespace:
    """The flags given, each checked by itself; a flag that is not given stays None, or at its default.

    Args:
        least: the least value of each number, where it is not 0.
    Raises:
        ValueError: what argparse refuses, in its words; an empty text; a number that is too small, not finite
            or (a slip, and too large for a seed) 2^32 or more.
    """

    def error(message):  # argparse's own prints its usage: a page
        raise ValueError(message)

    parser.error = error
    args, least = parser.parse_args(argv), dict(least)
    for name, given in vars(args).items():
        for value in given if isinstance(given, list) else [given]:
            if value == "":
                raise ValueError(f"--{name} '': must not be empty")
            low = least.get(name, 0)
            if isinstance(value, (int, float)) and not low <= value < 2**32:
                raise ValueError(f"--{name} {value}: must be at least {low}, and below 2^32")
    return args


def check_output(flag: str, path, *, folder: bool):
    """ValueError where nothing can be written at `path`: before the work, not after it."""
    place = Path(path).absolute()
    there = next(p for p in (place, *place.parents) if p.exists())
    if there == place and there.is_dir() and not folder:
        raise ValueError(f"--{flag} {path}: it is a folder; a file is needed")
    there = there if folder or there != place else there.parent
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"--{flag} {path}: {there} is no folder that can be written")


def shared_flags(parser: argparse.ArgumentParser):
    """Flags that training and evaluation have in common. A hub name may pin a revision: NAME@REVISION."""
    layouts = ("auto", "shared", "separate")
    add = parser.add_argument_group("what to run on (default: the preset's)").add_argument
    add("--preset", default="gemma-2-2b", choices=PRESETS, help="fills in all that is not given")
    add("--model", help="Hugging Face directory or repo: where training starts, or what is scored")
    add("--reference", help="the frozen π_ref (training: its start; evaluation: none, no KL)")
    add("--dataset", help="JSONL, parquet or arrow file, or hub data set as NAME:SPLIT")
    add("--max_length", type=int, help="tokens of prompt and response (authors' code: 1024)")
    add("--max_prompt_length", type=int, help="tokens of the prompt; its beginning is cut (512)")
    add("--layout", default="auto", choices=layouts, help="shared: the prompt once a pair; separate: twice")
    add("--pack_to", type=int, default=0, help="fill rows with further pairs to so many tokens (CUDA)")
    add("--dtype", choices=DTYPES, help="of the computation (CPU float32, CUDA bfloat16)")
    add(
        "--sample_batch",
        type=int,
        help="responses sampled at once, keys and values held (2B 128, 9B 32)",
    )
    add = parser.add_argument_group("sparse autoencoder").add_argument
    add("--sae", help="Gemma Scope repo, directory of its layout, or file")
    add("--sae_layer", type=int, nargs="+", help="0-based; of several D_FPO is averaged (Table 7)")
    add("--sae_width", help="16k in Table 5")
    add("--sae_site", choices=("res", "mlp", "att"), help="residual (Table 5), MLP (Table 3) or attention")
    add(
        "--sae_l0",
        type=int,
        nargs="+",
        help="average L0, for all layers or for each (2B 55; else nearest to 100)",
    )
    add("--k", type=int, default=50, help="of Eq. 10 (authors' code: 50)")


def training_flags(parser: argparse.ArgumentParser):
    """Flags of files, the loss and the optimisation."""
    add = parser.add_argument_group("data and files").add_argument
    add("--eval_dataset", help="held-out pairs")
    add("--cache_dir", help="Phase 1's reference (runs/PRESET/reference)")
    add("--cache_top", type=int, default=0, help="features kept of a response, at least 4 k; 0: all, exact")
    add("--out", help="folder of this run (runs/PRESET/METHOD)")
    add = parser.add_argument_group("loss (Table 5, by method)").add_argument
    add("--beta", type=float, help="β (0.1; SimPO 2)")
    add("--alpha", type=float, help="α of δ_TDPO2 and δ_FPO (0.5)")
    add("--gamma", type=float, help="γ of SimPO (0.5)")
    add("--no_stop_gradient", action="store_true", help="let δ_FPO's chosen term learn (Table 3)")
    add("--feature_weights", help="JSON of weights in D_FPO (eval_diversity.py --find_features makes one)")
    add = parser.add_argument_group("optimisation (Table 5)").add_argument
    add("--optimizer", choices=("adam", "rmsprop"), help="2B: adam, 9B: rmsprop")
    add("--lr", type=float, help="learning rate (5e-7; toy: its own)")
    add("--schedule", choices=("constant", "cosine"), help="after warm-up (constant; Table 4: cosine)")
    add("--warmup_steps", type=int, help="linear (150; toy: its own)")
    add("--warmup_ratio", type=float, help="warm-up as a share of all steps, instead (Table 4: 0.1)")
    add("--max_grad_norm", type=float, help="gradient clip (authors' code: 1.0); 0: none")
    add("--batch_size", type=int, help="pairs to a step, over all ranks (32)")
    add("--epochs", type=int, help="passes over the data (1)")
    add("--steps", type=int, help="end after so many steps, whatever --epochs")
    add("--seed", type=int, default=0, help="of the data's order and of sampling")


def running_flags(parser: argparse.ArgumentParser):
    """Flags of memory and speed, evaluation, interruptions, trackers and the hub."""
    yes_no = {"action": argparse.BooleanOptionalAction, "default": None}
    add = parser.add_argument_group("memory and speed").add_argument
    add(
        "--micro_batch_pairs",
        type=int,
        default=0,
        help="most pairs of a forward; 0: no limit, but 16 in Phase 1 and evaluation",
    )
    add(
        "--micro_batch_tokens", type=int, help="most tokens of a forward, padding counted (8192); 0: no limit"
    )
    add("--activation_checkpointing", **yes_no, help="Table 5: on (toy: off)")
    shards = ("none", "states", "fsdp")
    add("--shard", default="states", choices=shards, help="what ranks share out: optimizer states, or all")
    add("--compile", action="store_true", help="torch.compile each layer")
    add("--plan", action="store_true", help="train nothing: print the memory that a rank will need")
    add("--gpu_gb", type=float, default=80.0, help="the card's memory, for --plan (80)")
    add("--ranks", type=int, default=4, help="ranks, for --plan (4)")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_every", type=int, help="steps between looks at held-out pairs (200); 0: at the ends")
    add("--eval_kl", **yes_no, help="load the reference for the KL (toy: on)")
    add("--eval_samples", type=int, help="responses a prompt for the entropy, at the ends (0; toy 4)")
    add("--eval_tokens", type=int, help="longest sampled response (256 tokens; toy 48)")
    add = parser.add_argument_group("interruptions").add_argument
    add("--save_every", type=int, default=0, help="steps between resume states; 0: on a signal alone")
    choices = ("always", "auto")
    add("--resume", nargs="?", const="always", choices=choices, help="from --out's last state; auto: if any")
    add("--keep", type=int, default=1, help="resume states to keep (1)")
    add("--force", action="store_true", help="resume with other settings than before")
    add("--on_nan", default="stop", choices=("stop", "skip"), help="a loss that is not finite: stop, or skip")
    add = parser.add_argument_group("trackers, and the hub").add_argument
    add("--wandb", metavar="PROJECT", help="Weights & Biases: metrics.jsonl's numbers (pip install wandb)")
    add("--tensorboard", action="store_true", help="the same in --out/tensorboard (pip install tensorboard)")
    add("--push_to_hub", metavar="REPO", help="the saved model goes there; a new repository is private")
