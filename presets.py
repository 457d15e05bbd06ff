"""What the scripts share before their work begins: the paper's settings (Table 5), flags, processes, models.

A preset fills in every flag; a flag given on the command line overrides it.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from sae import load_sae

ULTRAFEEDBACK, ULTRACHAT = "HuggingFaceH4/ultrafeedback_binarized", "HuggingFaceH4/ultrachat_200k"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Table 5, by method. The paper names no k: 50 is the authors' code's.
TABLE_5 = {
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
    "sae_l0": 55,  # the authors' code's
    "dataset": f"{ULTRAFEEDBACK}:train_prefs",
    "eval_dataset": f"{ULTRAFEEDBACK}:test_prefs",
    "sft_dataset": f"{ULTRACHAT}:train_sft",
    "sft_eval_dataset": f"{ULTRACHAT}:test_sft",
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
    "max_prompt_length": 512,
    "max_grad_norm": 1.0,  # the authors' code's
    "micro_batch_tokens": 8192,
    "activation_checkpointing": True,
    "eval_every": 200,
    "eval_kl": False,
    "eval_samples": 0,
    "eval_tokens": 256,
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
        "lr": 5e-4,
        "warmup_steps": 10,
        "steps": 100,
        "micro_batch_tokens": 0,
        "activation_checkpointing": False,
        "eval_every": 50,
        "eval_kl": True,
        "eval_samples": 4,
        "eval_tokens": 48,
    },
}


def start_processes(device: str | None = None) -> torch.device:
    """Join torchrun's other processes (gloo on CPU, nccl on CUDA); alone without torchrun. Returns this
    rank's device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers_logging.disable_progress_bar()  # bars of half a second, one a rank
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)


@contextlib.contextmanager
def one_line_errors(everyone: bool = False):
    """A wrong value ends the program with one line and status 2, not a traceback.

    Args:
        everyone: every rank says its own error (a disk's, say), not rank 0 alone what all of them found.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        yield
    except (ValueError, OSError) as error:
        if everyone or rank == 0:
            print(
                f"error: {error}" if not rank else f"error (rank {rank}): {error}",
                file=sys.stderr,
                flush=True,
            )
        raise SystemExit(2) from None


@contextlib.contextmanager
def hub_errors(what: str, name: str):
    """Turn the hub's many errors about one artefact into a ValueError of one line that says what to do."""
    try:
        yield
    except (OSError, HfHubHTTPError) as error:
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


def load_tokenizer(name: str, revision=None):
    """The tokenizer of a Hugging Face directory or repo."""
    with hub_errors("tokenizer of", name):
        return AutoTokenizer.from_pretrained(name, revision=revision)


def load_lm(name: str, device, *, dtype=torch.float32, revision=None):
    """A causal LM on the device; attention eager on CPU, flex_attention on CUDA (sdpa has no softcap)."""
    if not os.path.isdir(name) and (name.startswith((".", "/", "runs/")) or name.count("/") != 1):
        raise ValueError(f"model {name!r}: no such directory (and a hub name is OWNER/NAME)")
    attention = "flex_attention" if torch.device(device).type == "cuda" else "eager"
    with hub_errors("model", name):
        lm = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=attention, revision=revision, use_safetensors=True
        )
    return lm.to(device)


def load_saes(args, device):
    """The SAEs of `--sae_layer …`, on the device, and where each reads: (layer, site)."""
    options = {"width": args.sae_width, "site": args.sae_site, "average_l0": args.sae_l0}
    saes = [load_sae(args.sae, layer=layer, **options).to(device) for layer in args.sae_layer]
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
    if args.preset == "toy" and not Path("runs/toy/toy.json").exists():
        if int(os.environ.get("RANK", 0)) == 0:
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


def shared_flags(parser: argparse.ArgumentParser):
    """The flags that training and evaluation have in common."""
    what = parser.add_argument_group("what to run on (None: the preset's)")
    what.add_argument(
        "--preset", default="gemma-2-2b", choices=PRESETS, help="fills in all that is not given"
    )
    what.add_argument("--model", help="Hugging Face directory or repo to start from")
    what.add_argument("--reference", help="the frozen reference π_ref")
    what.add_argument("--dataset", help="JSONL file, or hub data set as NAME:SPLIT")
    what.add_argument("--max_length", type=int, help="tokens of prompt and response (authors' code: 1024)")
    what.add_argument(
        "--max_prompt_length", type=int, help="tokens of the prompt; its beginning is cut (512)"
    )
    layouts = ("auto", "shared", "separate")
    what.add_argument(
        "--layout", default="auto", choices=layouts, help="the prompt computed once or twice a pair"
    )
    what.add_argument(
        "--pack_to", type=int, default=0, help="fill rows with further pairs to so many tokens (CUDA)"
    )
    sae = parser.add_argument_group("sparse autoencoder")
    sae.add_argument("--sae", help="Gemma Scope repo, directory of its layout, or file")
    sae.add_argument(
        "--sae_layer", type=int, nargs="+", help="0-based; several: their D_FPO is averaged (Table 7)"
    )
    sae.add_argument("--sae_width", help="16k in Table 5")
    sae.add_argument(
        "--sae_site", choices=("res", "mlp", "att"), help="residual, as in Table 5, or MLP (Table 3)"
    )
    sae.add_argument(
        "--sae_l0", type=float, help="average L0; none: the nearest to 100 (2b: 55, the authors')"
    )
    sae.add_argument("--k", type=int, default=50, help="of Eq. 10 (authors' code: 50)")
