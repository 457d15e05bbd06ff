"""Sparse autoencoders (SAEs) as Gemma Scope publishes them, and the hook that reads their input from a model.

symbol  name here    shape     meaning (Eq. 5 of the paper)
h       h            (..., d)  the model's state at the SAE's site, d wide
W_enc   W_enc        (d, m)    encoder to m features (16k = 2^14)
b       b_enc        (m,)      the encoder's bias
z       z            (..., m)  pre-activations, z = h W_enc + b_enc
θ       threshold    (m,)      JumpReLU's threshold of each feature; θ = 0 gives the ReLU of Eq. 5
c       encode(h)    (..., m)  sparse features, c = z where z > θ, else 0
W_dec   W_dec        (m, d)    decoder
b_dec   b_dec        (d,)      the decoder's bias; not subtracted from h before the encoder
ĥ       decode(c)    (..., d)  reconstruction, ĥ = c W_dec + b_dec
"""

import math
import re
import warnings
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")  # Gemma Scope 2 writes them in lower case
FOLDERS = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out"}  # Gemma Scope 2's folder of each site
MODULES = {  # the module of block L whose tensor each site's SAEs read; "" is the block itself
    "res": "",  # its output: the residual stream; after the last block too this is before the final norm
    "mlp": "post_feedforward_layernorm",  # its output: what the MLP adds to the residual stream
    "att": "self_attn.o_proj",  # its input: the outputs of the heads, side by side
}


class JumpReLUSAE(nn.Module):
    """A frozen JumpReLU sparse autoencoder: Eq. 5 with Gemma Scope's activation, in float32.

    The weights are copied into buffers: gradient flows to `h`, never to them. They stay float32 whatever
    dtype the module or its parent is cast to: rounded to bf16 they would make other features active.
    Raises: ValueError where a shape does not fit, a value is NaN or inf, or a threshold is negative.
    """

    def __init__(self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, threshold: Tensor):
        super().__init__()
        self.d, self.m = d, m = b_dec.numel(), b_enc.numel()
        arrays, shapes = (W_enc, b_enc, W_dec, b_dec, threshold), ((d, m), (m,), (m, d), (d,), (m,))
        for name, array, shape in zip(ARRAYS, arrays, shapes, strict=True):
            if array.shape != shape:
                raise ValueError(f"{name} is {tuple(array.shape)}, expected {shape}")
            if not (array.is_floating_point() and array.isfinite().all()):
                raise ValueError(f"{name} ({array.dtype}) holds NaN, inf or integers")
        copies = (nn.Buffer(array.detach().to(torch.float32, copy=True)) for array in arrays)
        self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.threshold = copies
        if (self.threshold < 0).any():
            raise ValueError(f"threshold goes down to {self.threshold.min():.3g}, expected none below 0")

    def encode(self, h: Tensor) -> Tensor:
        """Features c (..., m), float32, of states `h` (..., d) of any dtype (Eq. 5, with JumpReLU for ReLU).

        The gradient of c is that of z on active features, else 0. Raises: ValueError where `h` is not d wide.
        """
        if h.shape[-1] != self.d:
            raise ValueError(f"h is {h.shape[-1]} wide, this SAE reads {self.d}: another model or site?")
        with torch.autocast(h.device.type, enabled=False):  # autocast would multiply in bf16
            z = h.float() @ self.W_enc + self.b_enc  # (..., m)
            return torch.where(z > self.threshold, z, 0.0)  # strictly above the threshold

    def decode(self, c: Tensor) -> Tensor:
        """Reconstruction ĥ (..., d) = c W_dec + b_dec (Eq. 5), float32, of the features `c` (..., m)."""
        with torch.autocast(c.device.type, enabled=False):
            return c.float() @ self.W_dec + self.b_dec

    def _apply(self, fn, recurse=True):
        def keep_float32(tensor):
            """Every cast passes through here: devices may change, dtypes may not."""
            moved = fn(tensor)
            return moved if moved.dtype == torch.float32 else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)


def load_sae(source, *, layer, width="16k", site="res", average_l0=None, revision=None) -> JumpReLUSAE:
    """Load one of Gemma Scope's SAEs, checked, frozen, float32, on the CPU. Nothing is ever unpickled.

    `source`: a hub repo (`google/gemma-scope-2b-pt-res`; where the hub can't be read its local cache is used,
    with a warning), a local directory laid out like one, or with one such layout per site in `res`, `mlp` and
    `att`, or one .npz or .safetensors file, for which the other arguments don't matter.
    `layer`: from 0. `site`: "res", "mlp" or "att". `revision`: the repo's.
    `width`, `average_l0` (the number of active features): as the folders say them. None takes the narrowest,
    and the L0 nearest to 100; for Gemma Scope 2, which says small, medium or big, "medium", else "small".
    Raises: ValueError for a site, layer, width or L0 that does not exist (it lists those that do) and for a
    file that holds no SAE; OSError for a path or repo that does not exist, is gated or can't be reached.
    """
    if site not in FOLDERS:
        raise ValueError(f"unknown site {site!r}: it is one of {', '.join(FOLDERS)}")
    path, repo = Path(source).expanduser(), str(source)
    if path.is_file():  # one SAE, whatever its name
        return _read_sae(path)
    choose = partial(_choose_file, source, layer=layer, width=width, site=site, average_l0=average_l0)
    if path.is_dir():
        by_site = [name for name in FOLDERS if (path / name).is_dir()]
        if by_site and site not in {"res", *by_site}:  # beside site folders only `res` may lie bare
            raise ValueError(f"{source}: no site {site!r}; it has: {', '.join(by_site)}")
        root = path / site if site in by_site else path
        return _read_sae(root / choose(_list_directory(root)))
    # A hub id is `owner/name`. All else, and what ends like a file, can only be a path.
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo) or path.suffix in (".npz", ".safetensors"):
        raise FileNotFoundError(f"{source}: no such file or directory")
    if (named := re.search(r"-(res|mlp|att|transcoders)$", repo)) and named[1] != site:  # one site a repo
        raise ValueError(f"{source} holds site {named[1]!r}, not {site!r}")
    return _read_sae(_fetch_from_hub(repo, choose, revision))


def _choose_file(source, files, *, layer, width, site, average_l0) -> str:
    """The one of `files`, paths inside `source`, that holds the SAE; ValueError lists what exists instead."""
    # Gemma Scope (Gemma 2): one site in each repo.
    scope = r"layer_(\d+)/width_(\w+)/average_l0_(\d+)/params\.npz"
    # Gemma Scope 2 (Gemma 3): FOLDER has four layers in many widths, FOLDER_all has every layer.
    scope2 = rf"{FOLDERS[site]}(?:_all)?/layer_(\d+)_width_(\w+)_l0_(small|medium|big)/params\.safetensors"
    found: dict[tuple, str] = {}  # (layer, width, L0), as the folders say them -> file
    for file in sorted(files):  # FOLDER before FOLDER_all: an SAE that both name is FOLDER's
        if match := re.fullmatch(scope, file) or re.fullmatch(scope2, file):
            found.setdefault(match.groups(), file)  # the first stays
    if not found:
        raise ValueError(f"{source}: no SAE of site {site!r} in the layout of Gemma Scope or Gemma Scope 2")
    # Narrow them down to the layer, then to the width, then to the L0.
    for axis, (label, value) in enumerate({"layer": layer, "width": width, "average_l0": average_l0}.items()):
        exist = sorted({key[axis] for key in found}, key=lambda name: (len(name), name))  # 9 before 16
        if value is None and (label == "width" or not exist[0].isdigit()):  # FOLDER_all has no medium
            value = "medium" if "medium" in exist else "small" if "small" in exist else exist[0]
        elif value is None:
            value = min(exist, key=lambda l0: abs(int(l0) - 100))
        found = {key: file for key, file in found.items() if key[axis] == str(value)}
        if not found:
            raise ValueError(f"{source}: no {label} {value}; it has: {', '.join(exist)}")
    return found.popitem()[1]


def _list_directory(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in root.rglob("params.*") if path.is_file()]


def _fetch_from_hub(repo: str, choose, revision) -> Path:
    """Local path of the file that `choose` picks from the repo's list; OSError of one line if none."""
    try:
        files = HfApi().list_repo_files(repo, revision=revision)
    except Exception as error:  # the HTTP library has kinds of its own
        try:  # [] asks for no file: a cache that holds one SAE of many would be refused as incomplete
            root = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
        except Exception:
            raise _hub_error(repo, revision, error) from None
        warnings.warn(f"{repo}: the hub can't be read; choosing among what {root} holds", stacklevel=3)
        return root / choose(_list_directory(root))
    file = choose(files)
    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except Exception as error:  # a gated repo lists its files to everyone, and refuses here
        raise _hub_error(repo, revision, error) from None


def _hub_error(repo: str, revision, error: Exception) -> OSError:
    """One line that says what to do about a failed call to the hub."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    advice = f"no local path, and the hub can't be read ({reason}): check the network or give a copy"
    if isinstance(error, GatedRepoError):  # asked first: it is a kind of RepositoryNotFoundError
        advice = f"gated: accept its licence at https://huggingface.co/{repo}, then `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        advice = f"the hub's repo has no revision {revision!r}"
    elif isinstance(error, RepositoryNotFoundError):
        advice = "no local path and no hub repo you may read: check the name; if private, `hf auth login`"
    return OSError(f"{repo}: {advice}")


def _read_sae(path: Path) -> JumpReLUSAE:
    """The SAE in one .npz or .safetensors file; ValueError names the file and what is wrong with it."""
    try:
        file = np.load(path, allow_pickle=False) if path.suffix == ".npz" else load_file(path)
        arrays = {key.lower(): torch.as_tensor(array) for key, array in file.items()}
        return JumpReLUSAE(*(arrays[name.lower()] for name in ARRAYS))
    except Exception as error:  # zipfile, zlib, numpy and safetensors each have their own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: no whole SAE in .npz or .safetensors ({reason})") from None


class SiteHook(AbstractContextManager):
    """Captures, at each forward of `model`, what an SAE of `layer` (from 0) and `site` reads (see `MODULES`).

    `model`: a Hugging Face causal LM with its blocks in `model.model.layers` (Llama, Qwen, Gemma) or in
    `model.model.language_model.layers` (Gemma 3 with images).
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
        place = f"layers.{layer}.{MODULES[site]}".removesuffix(".")  # as in "layers.25.self_attn.o_proj"
        try:
            module = getattr(model.model, "language_model", model.model).get_submodule(place)
        except AttributeError:
            raise ValueError(f"no site {site!r}: {type(model).__name__} has no model.{place}") from None
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
        # The learning rate falls over the last half; the penalty comes in over the first.
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
        active += (c > 0).sum(0)
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
