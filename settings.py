"""Every setting of a run: defaults, Table 5, presets, the command line, what is refused before any work."""

import importlib.util
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser

from losses import METHODS
from runtime import refuse


def flag(default, text):
    """A field of Config with its --help text; the text says what is the paper's, experiments' or ours."""
    make = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**make, metadata={"help": text})


@dataclass
class Config:
    """Every setting of a run. Defaults are the paper's for FPO on Gemma-2-2B (Table 5); where the paper is
    silent, those of the authors' code when the experiments ran ("experiments"). A preset and the method's
    row of Table 5 replace some, the command line any.
    """

    # what runs, on what
    method: Literal[METHODS] = flag("fpo", "a row of Table 1 or 6")  # type: ignore[valid-type]
    preset: str | None = flag(None, "sets what is not given; gemma-2-2b, or own where only --model is")
    model: str = flag(None, "where training starts: a Hugging Face directory or hub name")
    reference: str = flag(None, "the frozen π_ref; by default where training starts")
    dataset: str = flag(None, "pairs: a JSONL, parquet or arrow file, or hub NAME:SPLIT")
    eval_dataset: str = flag(None, "held-out pairs, in the same forms")
    chat_format: Literal["auto", "halos"] = flag("auto", "of tokenizers without template; halos: Sec. 4's")
    cache_dir: str = flag(None, "Phase 1's reference; by default runs/PRESET/reference")
    out: str = flag(None, "folder of this run; by default runs/PRESET/METHOD")
    # the sparse autoencoder
    sae: str | None = flag(
        "google/gemma-scope-2b-pt-res", "Gemma Scope, Qwen-Scope, SAELens: repo, folder or file"
    )
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
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "CPU: float32, CUDA: bfloat16")
    layout: Literal["auto", "shared", "separate"] = flag("auto", "the prompt once a pair (shared) or twice")
    activation_checkpointing: bool = flag(True, "compute activations again in the backward (Table 5)")
    compile: bool = flag(True, "torch.compile each layer; without effect on the CPU")
    shard: Literal["none", "states", "fsdp"] = flag("states", "split over ranks: optimizer states, or all")
    # evaluation, interruptions, trackers
    eval_every: int = flag(200, "steps between scores of held-out pairs; 0: at the ends alone")
    eval_kl: bool = flag(True, "load the reference to score the KL, for methods that do without it")
    show: int = flag(2, "held-out prompts whose answers are shown before and after; 0: none, as with fsdp")
    save_every: int = flag(1000, "steps between states to resume from; 0: on a signal alone")
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
# For models that the paper does not try: D_FPO without unit, and the α of a sweep (docs/results.md). Not run.
UNITLESS = {"feature_scale": "rms", "alpha": 1e4, "sae_l0": ["auto"], "warmup_steps": 0, "warmup_ratio": 0.1}
PRESETS["gemma-3-270m"] = {"base": "google/gemma-3-270m", "sae": "google/gemma-scope-2-270m-pt", **UNITLESS}
PRESETS["gemma-3-270m"]["sae_layer"] = [17]
PRESETS["gemma-3-1b"] = {"base": "google/gemma-3-1b-pt", "sae": "google/gemma-scope-2-1b-pt", **UNITLESS}
PRESETS["qwen3-1.7b"] = {"base": "Qwen/Qwen3-1.7B-Base", "sae_layer": [27], "sae_width": "auto", **UNITLESS}
PRESETS["qwen3-1.7b"]["sae"] = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
PRESETS["qwen3-8b"] = {"base": "Qwen/Qwen3-8B-Base", "sae_layer": [35], "sae_width": "auto", **UNITLESS}
PRESETS["qwen3-8b"] |= {
    "sae": "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50",
    "optimizer": "rmsprop",
    "eval_kl": False,
}
# Any other model: its data and its SAE must be given; the SAE is read where it says, or at the last layer.
PRESETS["own"] = {"sae": None, "sae_layer": [], "sae_width": "auto", **UNITLESS}
AT_LEAST_1 = {"batch_size", "epochs", "steps", "k", "max_length", "max_prompt_length"}  # others at least 0


def parse_args(argv=None, defaults=()) -> Config:
    """The command line over `defaults`, over the preset, over Table 5's row for the method, over Config's.

    defaults: {flag: value} of another run, say, whose settings hold where the command line is silent.
    Raises: UserError: a flag or value that is not allowed, in one line that names those that are.
    """
    about = {"description": "FPO, and the preference methods that the paper compares it with."}
    parser = HfArgumentParser(Config, **about, allow_abbrev=False, add_help=False)  # type: ignore[arg-type]
    parser.error = refuse  # type: ignore[method-assign]  # argparse's own prints a page
    parser.set_defaults(**dict(defaults))
    # Read twice: method and preset choose the defaults of the second reading.
    first, _ = parser.parse_known_args(argv)
    preset = first.preset or ("own" if first.model else "gemma-2-2b")
    if preset not in PRESETS:
        refuse(f"--preset {preset}: one of {', '.join(PRESETS)}")
    paper = (
        PAPER_DATA["sft" if first.method == "sft" else "others"]
        if preset.startswith(("gemma", "qwen"))
        else {}
    )
    left_out = {"base"} if first.method == "fpo" else {"base", "alpha"}  # a preset's α is FPO's
    values = {name: value for name, value in PRESETS[preset].items() if name not in left_out}
    parser.set_defaults(**{"preset": preset, **paper, **TABLE_5[first.method], **values, **dict(defaults)})
    parser.add_argument("-h", "--help", action="help", help="show this and end")  # now with those defaults
    config, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        refuse(f"{' '.join(unknown)}: no such flag; --help lists them all")
    if config.warmup_steps and values.get("warmup_steps") == 0:  # given, in place of the preset's share
        if first.warmup_ratio:
            refuse(f"--warmup_steps {config.warmup_steps}: or --warmup_ratio, not both")
        config.warmup_ratio = 0.0
    fill_in(config)
    check(config)
    return config


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
    needed = {"tensorboard": ["tensorboard"], "wandb": ["wandb", "tensorboard"]}.get(config.report_to, [])
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        refuse(f"--report_to {config.report_to}: pip install {' '.join(missing)}")
