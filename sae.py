"""Sparse autoencoders (SAEs) as their makers publish them; where in a model they read; and their training.

symbol  name here    shape     meaning (Eq. 5 of the paper)
h       h            (..., d)  the model's state at the SAE's site, d wide
W_enc   W_enc        (d, m)    encoder to m features (16k = 2^14)
b       b_enc        (m,)      the encoder's bias
z       z            (..., m)  pre-activations, z = h W_enc + b_enc
θ       threshold    (m,)      JumpReLU's threshold of each feature; θ = 0 gives the ReLU of Eq. 5
        k            int       TopK: at most the k largest z of a state are active; None: as many as exceed θ
c       encode(h)    (..., m)  sparse features, c = z where the feature is active, else 0
W_dec   W_dec        (m, d)    decoder
b_dec   b_dec        (d,)      the decoder's bias; not subtracted from h before the encoder
ĥ       decode(c)    (..., d)  reconstruction, ĥ = c W_dec + b_dec

maker                files of one SAE                   features
Gemma Scope 1 and 2  params.npz, params.safetensors     JumpReLU
Qwen-Scope           layer27.sae.pt                     TopK; k stands in the repo's name, after L0_
SAELens 6            sae_weights.safetensors, cfg.json  ReLU, JumpReLU, or TopK of the ReLU
"""

import json
import math
import pickle
import re
import warnings
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from runtime import UserError, hub_errors

ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")  # Gemma Scope 2 writes them in lower case
FOLDERS = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out"}  # Gemma Scope 2's folder of each site
MODULES = {  # the module of block L whose tensor each site's SAEs read; "" is the block itself
    "res": "",  # its output: the residual stream; after the last block too this is before the final norm
    "mlp": "post_feedforward_layernorm",  # its output: what the MLP adds to the residual stream
    "att": "self_attn.o_proj",  # its input: the outputs of the heads, side by side
}
# Fields of SAELens' cfg.json, with the values that are understood; of a TopK SAE also `rescale…: true`.
UNDERSTOOD = {
    "architecture": ("standard", "jumprelu", "topk"), "apply_b_dec_to_input": (True, False),
    "normalize_activations": ("none",), "reshape_activations": ("none",),
    "rescale_acts_by_decoder_norm": (False,), "hook_head_index": (None,),
}  # fmt: skip
# Fields that don't change what a trained SAE computes: sizes, places, and how it was trained.
NO_MATTER = (
    r"d_in|d_sae|k|dtype|device|metadata|decoder_init_norm|(l1|lp|l0|jumprelu|pre_act_loss|aux_loss)_\w+"
    r"|use_sparse_activations|target_l0"
)


# ---------------------------------------------------------------------------- features and reconstruction
def active_features(z: Tensor, threshold: Tensor, k: int | None = None) -> Tensor:
    """Which features are active at pre-activations z (..., m), in the form that is cheapest to keep.

    Active is what exceeds its threshold (m,), strictly; with `k` only if it is among the k largest z.
    Returns (..., m) bool; with `k` the ids (..., k), int32, where m stands for "none". See `as_mask`.
    """
    if k is None:
        return z > threshold
    values, ids = z.topk(k, sorted=False)  # (..., k) each
    return torch.where(values > threshold[ids], ids, z.shape[-1]).int()


def as_mask(active: Tensor, m: int) -> Tensor:
    """What `active_features` returned as (..., m) bool."""
    if active.dtype == torch.bool:
        return active
    mask = torch.zeros(*active.shape[:-1], m + 1, dtype=torch.bool, device=active.device)
    return mask.scatter_(-1, active.long(), True)[..., :m]  # the last column was that of "none"


class SAE(nn.Module):
    """A frozen sparse autoencoder: Eq. 5 with JumpReLU or TopK for its ReLU, in float32.

    The weights are copied into buffers: gradient flows to `h`, never to them. They stay float32 whatever
    dtype the module or its parent is cast to: rounded to bf16 they would make other features active.

    Args:
        W_enc, b_enc, W_dec, b_dec: of any floating dtype, in the shapes above.
        threshold: (m,), none below 0; -inf: no threshold, so that a negative z can be active too.
        k: how many features can be active at a state; None: any number.
    `layer`, from 0, and `site`: where it reads, as its file says or `load_sae` was told; None: not known.
    Raises: ValueError where a shape does not fit, a value is NaN or inf, a threshold is negative, or k is
    not from 1 to m.
    """

    def __init__(self, W_enc, b_enc, W_dec, b_dec, threshold, k: int | None = None):
        super().__init__()
        self.d, self.m = d, m = b_dec.numel(), b_enc.numel()
        self.k, self.layer, self.site = k, cast(int | None, None), cast(str | None, None)
        arrays, shapes = (W_enc, b_enc, W_dec, b_dec, threshold), ((d, m), (m,), (m, d), (d,), (m,))
        for name, array, shape in zip(ARRAYS, arrays, shapes, strict=True):
            if array.shape != shape:
                raise ValueError(f"{name} is {tuple(array.shape)}, expected {shape}")
            finite = array.isfinite() | (array.isneginf() & (name == "threshold"))
            if not (array.is_floating_point() and finite.all()):
                raise ValueError(f"{name} ({array.dtype}) holds NaN, inf or integers")
        as_rows = {"copy": True, "memory_format": torch.contiguous_format}
        copies = (nn.Buffer(array.detach().to(torch.float32, **as_rows)) for array in arrays)
        self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.threshold = copies
        if (low := self.threshold[self.threshold < 0]).isfinite().any():
            raise ValueError(f"threshold goes down to {low.min():.3g}, expected none below 0")
        if k is not None and not 1 <= k <= m:
            raise ValueError(f"k is {k}, expected 1 to {m}, the number of features")

    def encode(self, h: Tensor) -> Tensor:
        """Features c (..., m), float32, of states `h` (..., d) of any dtype (Eq. 5).

        The gradient of c is that of z on active features, else 0. Raises: ValueError where `h` is not d wide.
        """
        if h.shape[-1] != self.d:
            raise ValueError(f"h is {h.shape[-1]} wide, this SAE reads {self.d}: another model or site?")
        with torch.autocast(h.device.type, enabled=False):  # autocast would multiply in bf16
            z = h.float() @ self.W_enc + self.b_enc  # (..., m)
            return torch.where(as_mask(active_features(z, self.threshold, self.k), self.m), z, 0.0)

    def decode(self, c: Tensor) -> Tensor:
        """Reconstruction ĥ (..., d) = c W_dec + b_dec (Eq. 5), float32, of the features `c` (..., m)."""
        with torch.autocast(c.device.type, enabled=False):
            return c.float() @ self.W_dec + self.b_dec

    def forward(self, h: Tensor) -> Tensor:
        """Reconstruction ĥ (..., d) of states `h` (..., d)."""
        return self.decode(self.encode(h))

    def _apply(self, fn, recurse=True):
        def keep_float32(tensor):
            """Every cast passes through here: devices may change, dtypes may not."""
            moved = fn(tensor)
            return moved if moved.dtype == torch.float32 else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)


# ---------------------------------------------------------------------------- which file
def load_sae(source, *, layer=None, width="16k", site="res", average_l0=None) -> SAE:
    """Load one SAE, checked, frozen, float32, on the CPU. Nothing is ever unpickled but tensors.

    `source`: a hub repo (`google/gemma-scope-2b-pt-res`), a folder in one (`owner/name/folder`), a local copy
    of either, with a folder `res`, `mlp` or `att` for each site or without, or one file. The names of its
    files tell the maker (see above). Where the hub can't be read its local cache is used, with a warning.
    `layer`: from 0. None: the one that the SAE was trained on, where it says so, else the last there is.
    `site`: "res", "mlp" or "att".
    `width`, `average_l0` (the number of active features): as the files' names say them, where they do. None
    takes the narrowest, and the L0 nearest to 100; of Gemma Scope 2's words "medium", else "small".
    Raises: UserError for a site, layer, width or L0 that does not exist (it lists those that do), an SAE of
    another layer or site, a file that holds no SAE or one that is not understood, and a path or repo that
    does not exist, is gated or can't be reached.
    """
    if site not in FOLDERS:
        raise UserError(f"unknown site {site!r}: it is one of {', '.join(FOLDERS)}")
    path = Path(source).expanduser()
    choose = partial(_choose_file, layer=layer, width=width, site=site, average_l0=average_l0)
    if path.is_file():  # one SAE, whatever its name
        _check_site(path.absolute().as_posix(), str(source), site)
        sae = _read_sae(path)
    elif path.is_dir():
        by_site = [name for name in FOLDERS if (path / name).is_dir()]
        if by_site and site not in {"res", *by_site}:  # beside site folders only `res` may lie bare
            raise UserError(f"{source}: no site {site!r}; it has: {', '.join(by_site)}")
        root = path / site if site in by_site else path
        if not by_site:
            _check_site(path.absolute().as_posix(), str(source), site)
        sae = _read_sae(root / choose(str(source), _list_directory(root)))
    else:
        sae = _read_sae(_fetch_from_hub(str(source), choose, site))
    for name, asked in (("layer", layer), ("site", site)):
        says = getattr(sae, name)
        if None not in (says, asked) and says != asked:
            raise UserError(f"{source}: this SAE is of {name} {says}, not {asked}")
        setattr(sae, name, asked if says is None else says)
    return sae


def _choose_file(place: str, files: list[str], *, layer, width, site, average_l0) -> str:
    """The one of `files`, paths inside `place`, that holds the SAE; UserError lists what exists instead."""
    if "sae_weights.safetensors" in files:  # SAELens: a folder is one SAE
        return "sae_weights.safetensors"
    # Gemma Scope (Gemma 2): one site in each repo.
    scope = r"layer_(\d+)/width_(\w+)/average_l0_(\d+)/params\.npz"
    # Gemma Scope 2 (Gemma 3): FOLDER has four layers in many widths, FOLDER_all has every layer.
    scope2 = rf"{FOLDERS[site]}(?:_all)?/layer_(\d+)_width_(\w+)_l0_(small|medium|big)/params\.safetensors"
    found: dict[tuple, str] = {}  # (layer, width, L0), as the names say them -> file
    for file in sorted(files):  # FOLDER before FOLDER_all: an SAE that both name is FOLDER's
        if match := re.fullmatch(scope, file) or re.fullmatch(scope2, file):
            found.setdefault(match.groups(), file)  # the first stays
        elif match := re.fullmatch(r"layer(\d+)\.sae\.pt", file):  # Qwen-Scope: a repo is one width and L0
            found[match[1], *_qwen_scope_name(place)] = file
    if not found:
        name = "/sae_weights.safetensors"
        if others := sorted(file.removesuffix(name) for file in files if file.endswith(name)):
            raise UserError(f"{place}: give the folder of one SAE, as {place}/{', '.join(others):.300}")
        raise UserError(f"{place}: no SAE of site {site!r} in a layout of Gemma Scope, Qwen-Scope or SAELens")

    # Narrow them down to the layer, then to the width, then to the L0.
    for axis, (label, value) in enumerate({"layer": layer, "width": width, "average_l0": average_l0}.items()):
        exist = sorted({key[axis] for key in found}, key=_size)
        if value is None and label == "average_l0":
            named = [name for name in ("medium", "small", "big") if name in exist]  # FOLDER_all has no medium
            value = named[0] if named else min(exist, key=lambda l0: abs(int(l0) - 100))
        elif value is None:
            value = exist[-1 if label == "layer" else 0]
        found = {key: file for key, file in found.items() if key[axis] == str(value)}
        if not found:
            raise UserError(f"{place}: no {label} {value}; it has: {', '.join(exist)}")
    return found.popitem()[1]


def _size(name: str):
    """Sorts names as numbers: 16k is 16,000, 1m is 1,000,000; what is no number comes last."""
    match = re.fullmatch(r"(\d+)([km]?)", name)
    return int(match[1]) * {"": 1, "k": 1000, "m": 10**6}[match[2]] if match else math.inf, name


def _qwen_scope_name(place: str) -> tuple[str, str]:
    """Width and L0, which is k, in the name of a Qwen-Scope repo or of a local copy: ("64k", "50")."""
    named = re.findall(r"-W(\d+[KM])-L0_(\d+)", str(Path(place).absolute()))
    if not named:
        raise UserError(
            f"{place}: k of a Qwen-Scope SAE stands in its folder's name, …-W64K-L0_50: keep that"
        )
    return named[-1][0].lower(), named[-1][1]


def _list_directory(root: Path) -> list[str]:
    """Paths inside `root` of the files that can be an SAE."""
    names = ("params.npz", "params.safetensors", "sae_weights.safetensors")
    files = (path for path in root.rglob("*") if path.name in names or path.name.endswith(".sae.pt"))
    return [path.relative_to(root).as_posix() for path in files if path.is_file()]


def _check_site(name: str, source: str, site: str):
    """UserError where the name of a Gemma Scope repo, or of a folder in a path, says another site."""
    for says in re.findall(r"gemma-scope-[\w.-]+-(res|mlp|att|transcoders)(?=/|$)", name):
        if says != site:
            raise UserError(f"{source} holds site {says!r}, not {site!r}")


def _fetch_from_hub(source: str, choose, site: str) -> Path:
    """Local path of the file that `choose` picks from a hub repo, or from a folder in it."""
    # A hub id is `owner/name`. All else, and what ends like a file, can only be a path.
    named = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)((?:/[\w.-]+)*)", source)
    if named is None or source.startswith("runs/") or source.endswith((".npz", ".safetensors", ".pt")):
        raise UserError(f"{source}: no such file or directory")
    repo, folder = named[1], named[2].removeprefix("/") + "/" * bool(named[2])
    _check_site(repo, source, site)
    cache = None
    with hub_errors("no such folder here, and the hub's repo", repo):
        try:
            files = HfApi().list_repo_files(repo)
        except Exception as error:  # the HTTP library has kinds of its own
            try:  # [] asks for no file: a cache that holds one SAE of many would be refused as incomplete
                cache = Path(snapshot_download(repo, local_files_only=True, allow_patterns=[]))
            except Exception:
                raise error from None
            files = _list_directory(cache)
            warnings.warn(f"{repo}: the hub can't be read; choosing among what {cache} holds", stacklevel=3)
    inside = [file.removeprefix(folder) for file in files if file.startswith(folder)]
    file = PurePosixPath(folder, choose(source, inside))
    if cache is not None:
        return cache / file
    cfg = str(file.with_name("cfg.json"))  # SAELens' file that says what the arrays mean
    with hub_errors("the hub's repo", repo):  # a gated repo lists its files to everyone, and refuses here
        paths = [hf_hub_download(repo, name) for name in (cfg, str(file)) if name in files]
    return Path(paths[-1])


# ---------------------------------------------------------------------------- what is in a file
def _read_sae(path: Path) -> SAE:
    """The SAE in one file, with the layer that its path names; UserError says what is wrong with it."""
    cfg = path.with_name("cfg.json")
    try:
        if path.suffix == ".pt":
            sae = _read_qwen_scope(path)
        elif path.suffix != ".npz" and (cfg.exists() or path.name == "sae_weights.safetensors"):
            return _read_saelens(json.loads(cfg.read_text()), load_file(path))
        else:
            file = np.load(path, allow_pickle=False) if path.suffix == ".npz" else load_file(path)
            arrays = {key.lower(): torch.as_tensor(array) for key, array in file.items()}
            W_enc, b_enc, W_dec, b_dec, threshold = (arrays[name.lower()] for name in ARRAYS)
            sae = SAE(W_enc, b_enc, W_dec, b_dec, threshold)
    except Exception as error:  # zipfile, zlib, numpy and safetensors each have their own
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{path}: no SAE that can be read ({kind}{error})".splitlines()[0]) from None
    named = re.findall(r"(?<![a-z])layer_?(\d+)", "/".join(path.parts[-4:]))
    sae.layer = int(named[-1]) if named else None
    return sae


def _read_qwen_scope(path: Path) -> SAE:
    """A Qwen-Scope SAE: the k largest z, negative ones too; W_enc (m, d) and W_dec (d, m) lie transposed."""
    try:
        arrays = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError("more than tensors is pickled there, or nothing") from None
    W_enc, b_enc, W_dec, b_dec = _take(arrays, ARRAYS[:4])
    threshold = torch.full(b_enc.shape, -torch.inf)
    sae = SAE(W_enc.T, b_enc, W_dec.T, b_dec, threshold, k=int(_qwen_scope_name(str(path))[1]))
    sae.site = "res"
    return sae


def _take(arrays: dict[str, Tensor], names) -> list[Tensor]:
    """The arrays of these names; UserError where there are others, or one is missing."""
    if odd := arrays.keys() ^ set(names):
        raise UserError(f"{', '.join(sorted(odd))}: missing, or not understood")
    return [arrays[name] for name in names]


def _read_saelens(cfg: dict, arrays: dict[str, Tensor]) -> SAE:
    """An SAE as SAELens 6's `save_model` writes it, all that it does to its input folded into the encoder."""
    if "metadata" not in cfg:
        raise UserError("cfg.json is of SAELens before 6: load it there, and save it with SAELens 6")
    topk = cfg["architecture"] == "topk"
    understood = UNDERSTOOD | ({"rescale_acts_by_decoder_norm": (True, False)} if topk else {})
    for field, value in (cfg | {"hook_head_index": cfg["metadata"].get("hook_head_index")}).items():
        allowed = understood.get(field, ())
        if value not in allowed and not re.fullmatch(NO_MATTER, field):
            only = f"; it may be {', '.join(map(str, allowed))}" if allowed else ""
            raise UserError(f"cfg.json: {field} {value!r} is not understood{only}")
    taken = _take(arrays, ARRAYS if cfg["architecture"] == "jumprelu" else ARRAYS[:4])
    W_enc, b_enc, W_dec, b_dec, *rest = (array.float() for array in taken)
    if cfg["apply_b_dec_to_input"]:  # (h - b_dec) W_enc + b_enc = h W_enc + (b_enc - b_dec W_enc)
        b_enc = (b_enc.double() - b_dec.double() @ W_enc.double()).float()
    if cfg.get("rescale_acts_by_decoder_norm"):  # features are z ‖W_dec‖, and decoded by W_dec / ‖W_dec‖
        norm = W_dec.norm(dim=1)  # (m,)
        W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
    # ReLU comes first in SAELens, so a threshold below 0 is none there.
    threshold = rest[0].clamp(min=0) if rest else torch.zeros_like(b_enc)
    sae = SAE(W_enc, b_enc, W_dec, b_dec, threshold, k=cfg["k"] if topk else None)
    if (hook := cfg["metadata"].get("hook_name")) is not None:
        sae.layer, sae.site = _saelens_place(hook)
    return sae


def _saelens_place(hook: str) -> tuple[int, str]:
    """Layer and site of a hook's name, TransformerLens' or that of transformers' own block."""
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|mlp_out)", hook)
    match = match or re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)()", hook)
    # hook_resid_pre is what the block before it left.
    layer = -1 if match is None else int(match[1]) - (match[2] == "resid_pre")
    if match is None or layer < 0:
        names = "blocks.N.hook_resid_post, hook_resid_pre (N > 0) or hook_mlp_out, or model.layers.N"
        raise UserError(f"cfg.json: hook_name {hook!r} is not understood; it may be {names}")
    return layer, "mlp" if match[2] == "mlp_out" else "res"


# ---------------------------------------------------------------------------- where it reads


def decoder_layers(model) -> nn.ModuleList:
    """The blocks of a Hugging Face causal LM (Llama, Qwen, Gemma), or of one with images its text model's."""
    return getattr(model.model, "language_model", model.model).layers


class SiteHook(AbstractContextManager):
    """Captures, at each forward of `model`, what an SAE of `layer` (from 0) and `site` reads (see `MODULES`).

    `model`: a Hugging Face causal LM, its blocks where `decoder_layers` finds them.
    `value`: what the latest forward left, (batch, length, d), with its gradient; None before the first.
    `enabled`: False lets forwards pass by. Activation checkpointing runs a block again during backward, and
    the sites `mlp` and `att` lie inside it: set it False before backward, or `value` may be overwritten.
    `d`: width of what is read, the model's hidden size; for `att` heads × head size.

    A `with` block removes the hook at its end; a deepcopy of the model has its own. Two things fail in
    silence: with reentrant checkpointing what is captured inside a block has no gradient, and in a block that
    was compiled by itself (`layer.compile()`) hooks at `mlp` and `att` do not fire.
    Raises: ValueError for an unknown site and for a model that has no such place.
    """

    def __init__(self, model, layer: int, site: str = "res"):
        if site not in MODULES:
            raise ValueError(f"unknown site {site!r}: it is one of {', '.join(MODULES)}")
        place = f"{layer}.{MODULES[site]}".removesuffix(".")  # as in "25.self_attn.o_proj"
        try:
            module = decoder_layers(model).get_submodule(place)
        except AttributeError:
            what = f"{type(model).__name__} has no model.layers.{place}"
            raise ValueError(f"no site {site!r}: {what}") from None
        self.site, self.enabled = site, True
        self.value: Tensor | None = None
        self.d = module.in_features if site == "att" else model.config.get_text_config().hidden_size
        # A bound method: a deepcopy of the model copies this object with it; a closure would stay shared.
        self._handle = module.register_forward_hook(self._capture)

    def _capture(self, module, args, output):
        if self.enabled:
            state = args[0] if self.site == "att" else output
            self.value = state[0] if isinstance(state, tuple) else state  # some blocks return a tuple

    def __getstate__(self):  # what deepcopy copies: not a tensor inside a graph, which it can't
        return self.__dict__ | {"value": None}

    def remove(self):
        """Take the hook off the model. `value` stays."""
        self._handle.remove()

    def __exit__(self, *exception):
        self.remove()


# ---------------------------------------------------------------------------- training
class JumpReLU(torch.autograd.Function):
    """z (n, m), θ (m,), ε -> c = z where z > θ, else 0 (n, m), and H(z - θ) (n, m), which sums to L0 over m.

    Their jumps have no gradient in θ. Both get the straight-through one of Rajamanoharan et al. (2024), with
    a rectangle of width ε as its kernel: dc/dθ = -θ/ε and dH/dθ = -1/ε where |z - θ| < ε/2, else 0.
    """

    @staticmethod
    def forward(ctx, z, theta, epsilon):
        """c and H, (n, m) each."""
        ctx.save_for_backward(z, theta)
        ctx.epsilon = epsilon
        return torch.where(z > theta, z, 0.0), (z > theta).float()

    @staticmethod
    def backward(ctx, grad_c, grad_active):
        """Gradients of z (n, m) and θ (m,)."""
        z, theta = ctx.saved_tensors
        near = (z - theta).abs() < ctx.epsilon / 2
        grad_theta = torch.where(near, theta * grad_c + grad_active, 0.0).sum(0) / -ctx.epsilon
        return torch.where(z > theta, grad_c, 0.0), grad_theta, None


def train_sae(states, *, width=512, steps=1000, batch=256, lr=1e-2, l0_weight=6e-4, epsilon=0.03, seed=0):
    """A JumpReLU SAE trained like Gemma Scope's on states (n, d) of any model: its five arrays, by name.

    Loss: |h - ĥ|² + l0_weight · L0, of `batch` states a step, scaled to a mean |h|² of 1; thresholds learn by
    straight-through gradients, `epsilon` wide. At the end the scale goes into biases and thresholds: the SAE
    reads states as they are, in any unit. `width` is m, the number of features; rows of W_dec have norm 1. It
    trains on the states' device; the arrays are float32, on the CPU.
    """
    generator, device, states = torch.Generator().manual_seed(seed), states.device, states.float()
    scale = states.square().sum(-1).mean().rsqrt()
    # The encoder starts as the decoder's transpose, the decoder's bias as the mean state.
    W_dec = F.normalize(torch.randn(width, states.shape[1], generator=generator), dim=-1).to(device)
    W_enc, b_enc, b_dec = W_dec.T.clone(), torch.zeros(width, device=device), states.mean(0) * scale
    log_theta = torch.full((width,), math.log(0.05), device=device)
    parameters = [p.requires_grad_() for p in (W_enc, b_enc, W_dec, b_dec, log_theta)]
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.0, 0.999), fused=True)
    for step in (bar := tqdm(range(steps), desc="SAE")):
        # The learning rate rises over 5 %, and falls over the last half; the penalty rises over the first.
        optimizer.param_groups[0]["lr"] = lr * min(1, 20 * (step + 1) / steps, 2 * (1 - step / steps))
        penalty = l0_weight * min(1, 2 * step / steps)
        h = scale * states[torch.randint(len(states), (batch,), generator=generator).to(device)]  # (batch, d)
        c, active = JumpReLU.apply(h @ W_enc + b_enc, log_theta.exp(), epsilon)  # (batch, m) each
        error, l0 = (c @ W_dec + b_dec - h).square().sum(-1).mean(), active.sum(-1).mean()
        (error + penalty * l0).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=-1, keepdim=True)
        if step % 50 == 0:
            bar.set_postfix(L0=f"{l0.item():.0f}", error=f"{error.item():.3f}")
    arrays = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc / scale, "b_dec": b_dec / scale}
    arrays["threshold"] = log_theta.exp() / scale
    return {name: array.detach().cpu() for name, array in arrays.items()}


@torch.no_grad()
def sae_figures(sae, states):
    """How an SAE fits states (n, d) that it was not trained on: a dict of floats.

    l0: mean number of active features. fvu: fraction of variance unexplained, Σ|h - ĥ|² / Σ|h - h̄|².
    dead: share of the features that are active on no state.
    """
    error, active = 0.0, torch.zeros(sae.m, device=states.device)
    for h in states.float().split(1024):
        c = sae.encode(h)  # (1024, m)
        error += (sae.decode(c) - h).double().square().sum().item()
        active += (c != 0).sum(0)  # a TopK SAE's can be negative
    variance = (states.double() - states.double().mean(0)).square().sum().item()
    dead = (active == 0).float().mean().item()
    return {"l0": active.double().sum().item() / len(states), "fvu": error / variance, "dead": dead}


def write_sae(root, arrays, layer, site, l0):
    """Writes an SAE's arrays in Gemma Scope's layout into the folder `root`; returns the file's path.

    layer_L/width_W/average_l0_X/params.npz, below SITE/ unless that is `res`; W is 16k for 16384, or 500.
    """
    m = len(arrays["threshold"])
    width, place = f"{m // 1000}k" if m % 1024 == 0 else m, "" if site == "res" else site
    path = Path(root, place, f"layer_{layer}/width_{width}/average_l0_{round(l0)}/params.npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name("aside.npz")  # a file of the right name is whole
    np.savez(aside, **{name: array.numpy() for name, array in arrays.items()})
    return aside.rename(path)
