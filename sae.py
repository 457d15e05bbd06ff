"""Sparse autoencoders straight from Gemma Scope, and the hook that reads the tensor they were trained on.

| symbol | name here   | shape    | meaning, and place in the paper                                    |
|--------|-------------|----------|--------------------------------------------------------------------|
| h      | `h`         | (..., d) | Eq. 5: the model's state at the SAE's site, d wide                 |
| W_enc  | `W_enc`     | (d, m)   | Eq. 5: encoder to m features (16k = 2^14)                          |
| b      | `b_enc`     | (m,)     | Eq. 5: the encoder's bias                                          |
| z      | `z`         | (..., m) | pre-activations, z = h W_enc + b_enc                               |
| θ      | `threshold` | (m,)     | JumpReLU's threshold, one a feature; θ = 0 gives Eq. 5's ReLU      |
| c      | `c`         | (..., m) | Eq. 5: sparse features, c = z where z > θ, else 0                  |
| W_dec  | `W_dec`     | (m, d)   | Eq. 5: decoder                                                     |
| b_dec  | `b_dec`     | (d,)     | the decoder's bias; not subtracted from h before the encoder       |
| ĥ      | `forward`   | (..., d) | Eq. 5: reconstruction, ĥ = c W_dec + b_dec                         |

Gemma Scope's files hold these five arrays in float32; layers count from 0. Gemma Scope (Gemma 2): a repo per
site, `layer_L/width_W/average_l0_X/params.npz`. Gemma Scope 2 (Gemma 3): a folder per site, keys in lower
case, `FOLDER/layer_L_width_W_l0_X/params.safetensors`, X small, medium or big; `FOLDER_all` has every layer,
`FOLDER` a few of them in more widths.

| site  | FOLDER       | the tensor it reads, in layer L of a Hugging Face model                           |
|-------|--------------|-----------------------------------------------------------------------------------|
| `res` | `resid_post` | output of `layers[L]`; on the last layer too: *before* the final norm             |
| `mlp` | `mlp_out`    | output of `layers[L].post_feedforward_layernorm`: what the MLP adds to the stream |
| `att` | `attn_out`   | input of `layers[L].self_attn.o_proj`: the heads' outputs, side by side           |
"""

import copy
import re
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn

ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
FOLDERS = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out"}  # Gemma Scope 2's, by site
# What to hook inside a block; "" is the block itself.
MODULES = {"res": "", "mlp": "post_feedforward_layernorm", "att": "self_attn.o_proj"}


class JumpReLUSAE(nn.Module):
    """A frozen JumpReLU sparse autoencoder: Eq. 5 with Gemma Scope's activation.

    The weights are buffers, copied: gradient flows to `h`, never to them. They stay float32 whatever dtype
    the module or its parent is cast to: rounded to bf16 they would make other features active.

    Args: floating tensors `W_enc` (d, m), `b_enc` (m,), `W_dec` (m, d), `b_dec` (d,), `threshold` (m,).
    Raises: ValueError where a shape does not fit, a value is NaN or inf, or a threshold is negative.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor

    def __init__(self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, threshold: Tensor):
        super().__init__()
        if W_enc.ndim != 2:
            raise ValueError(f"W_enc is {tuple(W_enc.shape)}, expected two axes (d, m)")
        self.d, self.m = d, m = W_enc.shape
        shapes = ((d, m), (m,), (m, d), (d,), (m,))
        for name, array, shape in zip(ARRAYS, (W_enc, b_enc, W_dec, b_dec, threshold), shapes, strict=True):
            if array.shape != shape:
                raise ValueError(f"{name} is {tuple(array.shape)}, expected {shape} as W_enc is {(d, m)}")
            if not array.is_floating_point():
                raise ValueError(f"{name} holds {array.dtype}, expected floating point")
            array = array.detach().to(torch.float32, copy=True)
            if not array.isfinite().all():
                raise ValueError(f"{name} holds NaN or inf")
            self.register_buffer(name, array)
        if (self.threshold < 0).any():
            raise ValueError(f"threshold goes down to {self.threshold.min():.3g}, expected none below 0")

    def encode(self, h: Tensor) -> Tensor:
        """Features c (..., m), float32: z where z > θ, else 0, with z = h W_enc + b_enc (Eq. 5, JumpReLU).

        `h` (..., d), any dtype. c's gradient is z's on active features and 0 on the others.
        Raises: ValueError where `h` is not d wide.
        """
        if h.shape[-1] != self.d:
            raise ValueError(f"h is {h.shape[-1]} wide, this SAE reads {self.d}: another model or site?")
        with torch.autocast(h.device.type, enabled=False):  # it would multiply in bf16
            z = h.float() @ self.W_enc + self.b_enc  # (..., m)
            return torch.where(z > self.threshold, z, 0.0)

    def decode(self, c: Tensor) -> Tensor:
        """Reconstruction ĥ (..., d) = c W_dec + b_dec (Eq. 5), float32, of the features `c` (..., m)."""
        with torch.autocast(c.device.type, enabled=False):
            return c.float() @ self.W_dec + self.b_dec

    def forward(self, h: Tensor) -> Tensor:
        """Reconstruction ĥ (..., d), float32, of the state `h` (..., d) (Eq. 5)."""
        return self.decode(self.encode(h))

    def _apply(self, fn, recurse=True):
        # The one gate of .to(), .half(), .cuda(): it lets devices through, not dtypes.
        def keep_float32(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == torch.float32 else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)


def load_sae(source, *, layer, width="16k", site="res", average_l0=None, revision=None) -> JumpReLUSAE:
    """Load one of Gemma Scope's SAEs, checked, frozen, float32, on the CPU.

    `source`: a hub repo id (`google/gemma-scope-2b-pt-res`), a local directory with such a repo's layout (or
    one such layout per site: `source/res`, `source/mlp`, `source/att`), or one .npz or .safetensors file,
    where the other arguments choose nothing.
    `layer`: from 0. `width`: as the folders say it. `site`: "res", "mlp" or "att". `revision`: the repo's.
    `average_l0`: the mean number of active features that the folder names; None takes the nearest to 100 (on
    a tie the smaller). For Gemma Scope 2 "small", "medium" or "big"; None takes "medium".

    Where the hub can't be read, what its local cache holds of the repo is used, with a warning.
    Raises: ValueError for a site, layer, width or L0 that does not exist (those that do are listed) and for
    a file that holds no SAE; OSError for a path or repo that does not exist, is gated or can't be reached.
    """
    if site not in FOLDERS:
        raise ValueError(f"unknown site {site!r}: it is one of {', '.join(FOLDERS)}")

    choose = partial(_choose_file, source, layer=layer, width=width, site=site, average_l0=average_l0)
    path = Path(source).expanduser()
    if path.is_dir():
        by_site = [name for name in FOLDERS if (path / name).is_dir()]
        if by_site and site not in {"res", *by_site}:  # beside site folders only `res` may lie bare
            raise ValueError(f"{source}: no site {site!r}; it has: {', '.join(by_site)}")
        root = path / site if site in by_site else path
        path = root / choose(_list_directory(root))
    elif not path.is_file():
        # A hub id is `owner/name`. All else, and what ends like a file, can only be a path.
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)) or path.suffix in (".npz", ".safetensors"):
            raise FileNotFoundError(f"{source}: no such file or directory")
        named = re.search(r"-(res|mlp|att|transcoders)$", str(source))  # Gemma Scope: one site a repo
        if named and named[1] != site:
            raise ValueError(f"{source} holds site {named[1]!r}, not {site!r}")
        path = _fetch_from_hub(str(source), choose, revision)
    return _read_sae(path)


def _choose_file(source, files, *, layer, width, site, average_l0) -> str:
    """The one of `files`, paths inside `source`, that holds the SAE; ValueError lists what exists instead."""
    scope = r"layer_(\d+)/width_(\w+)/average_l0_(\d+)/params\.npz"
    scope2 = rf"{FOLDERS[site]}(?:_all)?/layer_(\d+)_width_(\w+)_l0_(small|medium|big)/params\.safetensors"
    found: dict[tuple, str] = {}  # (layer, width, L0) -> file
    for file in sorted(files):
        if match := re.fullmatch(scope, file) or re.fullmatch(scope2, file):
            found.setdefault((int(match[1]), match[2], match[3]), file)  # FOLDER sorts before FOLDER_all
    if not found:
        layouts = f"layer_L/width_W/average_l0_X/params.npz or {FOLDERS[site]}/layer_L_width_W_l0_X/..."
        raise ValueError(f"{source}: no SAE of site {site!r}; looked for {layouts}")
    wanted = {"layer": layer, "width": width, "average_l0": None if average_l0 is None else str(average_l0)}
    for axis, (label, value) in enumerate(wanted.items()):
        exist = sorted({key[axis] for key in found}, key=lambda v: (len(str(v)), str(v)))  # 9 before 16
        if value is None:
            numbers = [x for x in exist if x.isdigit()]
            value = min(numbers, key=lambda x: abs(int(x) - 100)) if numbers else "medium"
        if value not in exist:
            raise ValueError(f"{source}: no {label} {value!r}; it has: {', '.join(map(str, exist))}")
        found = {key: file for key, file in found.items() if key[axis] == value}
    return found.popitem()[1]


def _list_directory(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in root.rglob("params.*") if path.is_file()]


def _fetch_from_hub(repo: str, choose, revision) -> Path:
    """Local path of the file that `choose` picks from the repo's list; OSError of one line if none."""
    try:
        files = HfApi().list_repo_files(repo, revision=revision)
    except Exception as error:  # the HTTP library has kinds of its own
        try:
            root = snapshot_download(repo, revision=revision, local_files_only=True)
        except Exception as miss:  # a partial snapshot is refused, but named; one SAE of many is usual
            root = getattr(miss, "snapshot_path", "")
        files = _list_directory(Path(root)) if root else []
        if not files:
            raise _hub_error(repo, revision, error) from None
        warnings.warn(f"{repo}: the hub can't be read; choosing among what {root} holds", stacklevel=3)
        return Path(root, choose(files))
    file = choose(files)
    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except Exception as error:  # a gated repo lists its files to everyone, and refuses here
        raise _hub_error(repo, revision, error) from None


def _hub_error(repo: str, revision, error: Exception) -> OSError:
    """One line that says what to do about a failed call to the hub."""
    if isinstance(error, GatedRepoError):  # before its parent, RepositoryNotFoundError
        advice = f"gated: accept its licence at https://huggingface.co/{repo}, then `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        advice = f"the hub's repo has no revision {revision!r}"
    elif isinstance(error, RepositoryNotFoundError):
        advice = "no local path and no hub repo you may read: check the name; if private, `hf auth login`"
    else:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        advice = f"no local path, and the hub can't be read ({reason}): check the network or give a copy"
    return OSError(f"{repo}: {advice}")


def _read_sae(path: Path) -> JumpReLUSAE:
    """The SAE in one .npz or .safetensors file, nothing unpickled; ValueError names file and fault."""
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path}: an SAE is read from .npz or .safetensors alone")
    names = {name.lower(): name for name in ARRAYS}
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: torch.from_numpy(file[key]) for key in file.files if key.lower() in names}
        else:
            arrays = load_file(path)
    except Exception as error:  # zipfile, zlib, numpy and safetensors each have their own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: truncated, pickled, or no {path.suffix} file ({reason})") from None
    arrays = {names[key.lower()]: array for key, array in arrays.items() if key.lower() in names}
    if missing := [name for name in ARRAYS if name not in arrays]:
        raise ValueError(f"{path}: no {', '.join(missing)}; an SAE's arrays are {', '.join(ARRAYS)}")
    try:
        return JumpReLUSAE(**arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class SiteHook:
    """Captures, at each forward of `model`, the tensor that an SAE of `layer` and `site` reads.

    `value`: what the latest forward left, (batch, length, d), with its gradient; None before the first.
    `enabled`: False lets forwards pass by. Activation checkpointing runs a block again during backward, and
    the sites `mlp` and `att` lie inside it: set it False before backward, or `value` may be overwritten.
    `d`: width of what is read, the model's hidden size; for `att` heads × head size.

    Sites: "res", the output of `layers[layer]`; "mlp", of its `post_feedforward_layernorm`; "att", the input
    of its `self_attn.o_proj`. A `with` block removes the hook at its end. A deepcopy of the model has its
    own. Two things fail in silence. Reentrant checkpointing (`use_reentrant=True`): what is captured inside a
    block has no gradient. `layer.compile()`: hooks inside a compiled block do not fire; hook first, and leave
    the blocks hooked at `mlp` or `att` uncompiled.

    Args: a Hugging Face causal LM with `model.model.layers` (Llama, Qwen, Gemma) or
    `model.model.language_model.layers` (Gemma 3 with images); `layer` from 0.
    Raises: ValueError for an unknown site, a layer out of range, or a model that has no such place.
    """

    def __init__(self, model, layer: int, site: str = "res"):
        if site not in MODULES:
            raise ValueError(f"unknown site {site!r}: it is one of {', '.join(MODULES)}")
        kind, body = type(model).__name__, getattr(model, "model", None)
        layers = getattr(getattr(body, "language_model", body), "layers", None)
        if layers is None:
            raise ValueError(f"{kind} has no model.model.layers: where its SAEs would read is not known")
        if layer not in range(len(layers)):
            raise ValueError(f"no layer {layer!r}: {kind} has 0..{len(layers) - 1}")
        try:
            module = layers[layer].get_submodule(MODULES[site])
        except AttributeError:
            raise ValueError(f"no site {site!r}: {kind} has no layers[{layer}].{MODULES[site]}") from None

        self.value: Tensor | None = None
        self.enabled = True
        self.d = module.in_features if site == "att" else model.config.get_text_config().hidden_size
        if site == "att":
            self._handle = module.register_forward_pre_hook(self._capture_input)
        else:
            self._handle = module.register_forward_hook(self._capture_output)

    # Bound methods: deepcopy of a model copies their object with it, where a closure would stay shared.
    def _capture_input(self, module, args):
        if self.enabled:
            self.value = args[0]

    def _capture_output(self, module, args, output):
        if self.enabled:  # some versions and models return a tuple that begins with the state
            self.value = output[0] if isinstance(output, tuple) else output

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, value=None)  # a tensor inside a graph can't be copied
        twin._handle = copy.deepcopy(self._handle, memo)  # of the copied module
        return twin

    def remove(self):
        """Take the hook off the model. `value` stays."""
        self._handle.remove()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.remove()
