"""sae.py: JumpReLU and TopK by hand, the files of three makers, and the hub."""

import json
import re
import shutil
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import Evil
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from torch import nn

import sae as sae_module
from runtime import UserError
from sae import SAE, active_features, as_mask, load_sae


def random_arrays(d=4, m=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d), "b_dec": (d,)}
    arrays = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**arrays, "threshold": torch.rand(m, generator=generator)}


def test_values_and_gradient_by_hand():
    sae = SAE(  # d = 2, m = 3, every number exact in binary
        W_enc=torch.tensor([[1.0, 0.0, -1.0], [0.5, 1.0, 2.0]]),
        b_enc=torch.tensor([0.25, -0.5, 0.0]),
        W_dec=torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]]),
        b_dec=torch.tensor([0.5, -0.5]),
        threshold=torch.tensor([1.0, 0.5, 0.0]),
    )
    # h = (2, 1): z = (2 + .5 + .25, 1 - .5, -2 + 2) = (2.75, .5, 0); .5 and 0 stand at their thresholds: off.
    # h = (0, 2): z = (1 + .25, 2 - .5, 4) = (1.25, 1.5, 4): all on; c W_dec = (1.25 - 4, 3 + 4).
    # h = (-1, -1): z = (-1.25, -1.5, -1): all off, and the reconstruction is b_dec.
    h = torch.tensor([[[2.0, 1.0], [0.0, 2.0], [-1.0, -1.0]]], requires_grad=True)
    c = sae.encode(h)
    assert c.tolist() == [[[2.75, 0.0, 0.0], [1.25, 1.5, 4.0], [0.0, 0.0, 0.0]]]
    assert sae.decode(c).tolist() == [[[2.75 + 0.5, -0.5], [-2.75 + 0.5, 7.0 - 0.5], [0.5, -0.5]]]
    assert torch.equal(sae(h), sae.decode(c))
    # Of active features alone: 3 × column 0 of W_enc; 3, 5 and 7 × its columns; nothing.
    (c * torch.tensor([3.0, 5.0, 7.0])).sum().backward()
    assert h.grad.tolist() == [[[3.0, 1.5], [3.0 - 7.0, 1.5 + 5.0 + 14.0], [0.0, 0.0]]]
    with pytest.raises(ValueError, match="h is 3 wide, this SAE reads 2"):
        sae.encode(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("low", "features"),  # of z = (2, -3, 1, -1) and (-4, -2, 0, -5), the two largest
    [
        (0.0, [[2.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]),  # ReLU: 0 itself is not active
        (-torch.inf, [[2.0, 0.0, 1.0, 0.0], [0.0, -2.0, 0.0, 0.0]]),  # as they are, the negative one too
    ],
)
def test_topk_by_hand(low, features):
    one, zero = torch.eye(4), torch.zeros(4)
    sae = SAE(one, zero, one, zero, zero + low, k=2)
    z = torch.tensor([[2.0, -3.0, 1.0, -1.0], [-4.0, -2.0, 0.0, -5.0]], requires_grad=True)
    assert sae.encode(z).tolist() == features
    active = active_features(z, sae.threshold, 2)
    assert active.shape == (2, 2) and active.dtype == torch.int32  # ids, of which 4 is "none"
    expected = [{0, 2}, {4} if low == 0 else {1, 2}]
    assert [set(row) for row in active.tolist()] == expected
    sae.encode(z).sum().backward()
    assert torch.equal(z.grad, as_mask(active, 4).float())
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k is {k}, expected 1 to 4"):
            SAE(one, zero, one, zero, zero, k=k)


def test_frozen_in_float32():
    given = {name: array.requires_grad_() for name, array in random_arrays().items()}
    sae = SAE(**given | {"b_dec": given["b_dec"].double()})
    sae.decode(sae.encode(torch.ones(4, requires_grad=True))).sum().backward()
    assert all(array.grad is None for array in [*given.values(), *sae.buffers()]) and not [*sae.parameters()]
    given["W_enc"].data.zero_()  # the weights are copies: the originals may change
    for cast in (lambda: sae.to(torch.bfloat16), sae.half, sae.double, nn.ModuleList([sae]).bfloat16):
        cast()
        assert all(torch.equal(getattr(sae, name), array) for name, array in random_arrays().items())
    assert sae.to("meta").W_enc.is_meta  # while devices do change


def test_float32_arithmetic_for_half_precision_under_autocast():
    """Of half-precision states and features the values, not the arithmetic, are rounded."""
    arrays, generator = random_arrays(64, 256), torch.Generator().manual_seed(1)
    sae, exact = SAE(**arrays), {name: array.double() for name, array in arrays.items()}
    for dtype in (torch.bfloat16, torch.float16):
        h, c = (torch.randn(32, n, generator=generator).to(dtype) for n in (64, 256))
        with torch.autocast("cpu", torch.bfloat16):
            features, reconstruction = sae.encode(h), sae.decode(c)
        z = h.double() @ exact["W_enc"] + exact["b_enc"]
        assert features.dtype == reconstruction.dtype == torch.float32
        # bf16 products would be wrong by 1e-2 and more
        assert (features - z * (z > exact["threshold"])).abs().max() < 1e-4
        assert (reconstruction - (c.double() @ exact["W_dec"] + exact["b_dec"])).abs().max() < 1e-3


# --------------------------------------------------------------------------------- files, folders and the hub

REPO = "google/gemma-scope-2b-pt-res"


def write(path, **changed):
    """Write an SAE of its own as Gemma Scope does: .npz, or .safetensors with keys in lower case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = random_arrays(seed=zlib.crc32(str(path).encode())) | changed
    arrays = {name: array for name, array in arrays.items() if array is not None}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name.lower(): array for name, array in arrays.items()}, path)
    return path


def assert_loaded(sae, path):
    assert torch.equal(sae.W_enc, load_sae(path).W_enc)


def scope(layer, width, l0):
    return f"layer_{layer}/width_{width}/average_l0_{l0}/params.npz"


@pytest.fixture
def repo(tmp_path):
    """A local directory with the hub's layout: the L0's of Gemma Scope's 2B residual SAEs, and a few more."""
    files = [scope(25, "16k", x) for x in (16, 28, 55, 116, 285)] + [scope(7, "16k", x) for x in (90, 110, 9)]
    for file in [*files, scope(25, "65k", 93), scope(10, "16k", 77)]:
        write(tmp_path / "repo" / file)
    return tmp_path / "repo"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"layer": 25}, scope(25, "16k", 116)),  # 116 is nearer to 100 than 55
        ({"layer": 25, "average_l0": 55}, scope(25, "16k", 55)),
        ({"layer": 25, "width": "65k"}, scope(25, "65k", 93)),
        ({"layer": 25, "width": None}, scope(25, "16k", 116)),  # the narrowest
        ({"layer": 7}, scope(7, "16k", 90)),  # 90 and 110 are as near: the smaller
        ({"layer": 10, "site": "mlp"}, scope(10, "16k", 77)),  # a repo holds one site, and does not say which
        ({"layer": 26}, "no layer 26; it has: 7, 10, 25"),
        ({"layer": 25, "width": "1m"}, "no width 1m; it has: 16k, 65k"),
        ({"layer": 25, "average_l0": 100}, "no average_l0 100; it has: 16, 28, 55, 116, 285"),
        ({"layer": 25, "site": "mid"}, "unknown site 'mid': it is one of res, mlp, att"),
    ],
)
def test_chooses_a_file_or_lists_what_exists(repo, wanted, expected):
    if expected.endswith(".npz"):
        assert_loaded(load_sae(repo, **wanted), repo / expected)
    else:
        with pytest.raises(UserError, match=re.escape(expected) + "$"):
            load_sae(str(repo), **wanted)


def test_widths_are_numbers_and_without_a_layer_it_is_the_last(tmp_path):
    """A million features are more than 16 thousand, layer 9 stands before layer 12."""
    layers, widths = (0, 9, 12), ("1m", "16k", "262k", "512")
    files = {(n, w): write(tmp_path / scope(n, w, 100)) for n in layers for w in widths}
    for width in widths:
        assert_loaded(load_sae(tmp_path, width=width), files[12, width])
    sae = load_sae(tmp_path, width=None)
    assert_loaded(sae, files[12, "512"])
    assert (sae.layer, sae.site) == (12, "res")
    shutil.rmtree(tmp_path / "layer_12/width_512")
    assert_loaded(load_sae(tmp_path, layer=12, width=None), files[12, "16k"])
    with pytest.raises(UserError, match=r"no width 1k; it has: 16k, 262k, 1m$"):
        load_sae(tmp_path, layer=12, width="1k")


LAYER_7 = [scope(7, "16k", 9), "resid_post/layer_7_width_16k_l0_big/params.safetensors"]


@pytest.mark.parametrize("name", LAYER_7)
def test_a_file_knows_its_layer_by_its_path(tmp_path, name):
    path = write(tmp_path / "layer_3" / "the/files/of/others" / name)  # what lies far above says nothing
    assert load_sae(path).layer == load_sae(path, layer=7).layer == 7
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: this SAE is of layer 7, not 8$"):
        load_sae(path, layer=8)
    bare = write(tmp_path / "layer_3/the/files/of/player_5/params.safetensors")
    assert load_sae(bare).layer is None and load_sae(bare, layer=8).layer == 8


def test_directory_with_a_layout_per_site(tmp_path):
    res, mlp = (write(tmp_path / folder / scope(0, "256", 30)) for folder in ("", "mlp"))
    assert_loaded(load_sae(tmp_path, layer=0, width="256"), res)
    assert_loaded(load_sae(tmp_path, layer=0, width="256", site="mlp"), mlp)
    with pytest.raises(UserError, match="no site 'att'; it has: mlp"):
        load_sae(tmp_path, layer=0, width="256", site="att")


@pytest.mark.parametrize(("site", "folder"), [("res", "resid_post"), ("mlp", "mlp_out"), ("att", "attn_out")])
def test_gemma_scope_2(tmp_path, site, folder):
    def file(folder, layer, l0):
        return write(tmp_path / folder / f"layer_{layer}_width_16k_l0_{l0}" / "params.safetensors")

    # As google/gemma-scope-2-270m-pt has them: FOLDER_all has every layer, small and big; FOLDER has a few.
    big, medium, *_ = [file(folder, 12, l0) for l0 in ("big", "medium", "small", "medium_seed_1")]
    *_, small_11 = [file(f"{folder}_all", x, l0) for x in (12, 11) for l0 in ("big", "small")]
    assert_loaded(load_sae(tmp_path, layer=12, site=site), medium)
    assert_loaded(load_sae(tmp_path, layer=12, average_l0="big", site=site), big)
    assert_loaded(load_sae(tmp_path, layer=11, site=site), small_11)
    with pytest.raises(UserError, match=f"no SAE of site '{site}'"):
        load_sae(tmp_path / folder, layer=12, site=site)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("W_enc", torch.zeros(6, 4), r"W_enc is \(6, 4\), expected \(4, 6\)"),
        ("threshold", torch.tensor(0.5), r"threshold is \(\), expected \(6,\)"),
        ("b_dec", torch.full((4,), torch.nan), r"b_dec \(torch.float32\) holds NaN"),
        ("b_enc", torch.zeros(6, dtype=torch.int32), r"b_enc \(torch.int32\) holds NaN, inf or integers"),
        ("threshold", torch.full((6,), -0.5), r"threshold goes down to -0.5"),
        ("b_dec", None, "KeyError: 'b_dec'"),
    ],
)
def test_faulty_arrays_name_the_file(tmp_path, suffix, name, value, error):
    path = write(tmp_path / f"params{suffix}", **{name: value})
    with pytest.raises(ValueError, match=rf"params{suffix}: .*{error}"):
        load_sae(path, layer=0)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_one_file_whole_and_truncated(tmp_path, suffix):
    path = write(tmp_path / f"any{suffix}", **random_arrays())
    sae, whole = load_sae(path, layer=3, width="no matter"), path.read_bytes()
    assert all(torch.equal(getattr(sae, name), array) for name, array in random_arrays().items())
    for kept in (0, 4, len(whole) // 2, len(whole) - 8):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=rf"any{suffix}: no SAE that can be read") as caught:
            load_sae(path, layer=0)
        assert "\n" not in str(caught.value)


def test_a_pickle_is_never_run(tmp_path):
    victim = tmp_path / "victim"
    pickled = np.array([Evil(victim), None])
    np.savez(tmp_path / "params.npz", **random_arrays() | {"threshold": pickled})
    pickled.dump(tmp_path / "bare.npz")  # a pickle under another name
    qwen = tmp_path / "SAE-W1K-L0_4"
    qwen.mkdir()
    torch.save({name: Evil(victim) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}, qwen / "layer0.sae.pt")
    for name in ("params.npz", "bare.npz", "SAE-W1K-L0_4/layer0.sae.pt"):
        with pytest.raises(UserError, match=f"{name}: no SAE that can be read") as caught:
            load_sae(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not victim.exists()
    np.load(tmp_path / "params.npz", allow_pickle=True)["threshold"]  # it would have run
    assert victim.exists()


# ---------------------------------------------------------------------------------- Qwen-Scope and SAELens

QWEN, SAELENS = "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_3", Path(__file__).parent / "saelens"


@pytest.fixture
def qwen(tmp_path):
    """A local copy of a Qwen-Scope repo: layers 0, 9 and 10, W_enc (m, d) and W_dec (d, m), three active."""
    folder = tmp_path / QWEN
    folder.mkdir(parents=True)
    for layer in (0, 9, 10):
        arrays = random_arrays(seed=layer)
        arrays = {name: arrays[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        arrays |= {name: arrays[name].T.contiguous().bfloat16() for name in ("W_enc", "W_dec")}
        torch.save(arrays, folder / f"layer{layer}.sae.pt")
    return folder


def test_qwen_scope_is_its_published_formula(qwen):
    """pre = h W_encᵀ + b_enc; the three largest stay as they are; ĥ = c W_decᵀ + b_dec."""
    h = torch.randn(50, 4, generator=torch.Generator().manual_seed(3))
    for layer, sae in ((10, load_sae(qwen, width=None)), (9, load_sae(qwen / "layer9.sae.pt"))):
        arrays = torch.load(qwen / f"layer{layer}.sae.pt", weights_only=True)
        pre = h @ arrays["W_enc"].float().T + arrays["b_enc"]
        values, ids = pre.topk(3, dim=-1)
        c = torch.zeros_like(pre).scatter_(-1, ids, values)
        assert (c < 0).any()  # some states have fewer than three that are positive
        torch.testing.assert_close(sae.encode(h), c)
        torch.testing.assert_close(sae(h), c @ arrays["W_dec"].float().T + arrays["b_dec"])
        assert (sae.k, sae.layer, sae.site, sae.m) == (3, layer, "res", 6)


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"layer": 8}, "no layer 8; it has: 0, 9, 10"),
        ({"layer": 9, "width": "16k"}, "no width 16k; it has: 64k"),
        ({"width": "64k", "average_l0": 50}, "no average_l0 50; it has: 3"),
        ({"width": None, "site": "mlp"}, "this SAE is of site res, not mlp"),
    ],
)
def test_what_a_qwen_scope_repo_does_not_have(qwen, wanted, error):
    with pytest.raises(UserError, match=f"{error}$"):
        load_sae(qwen, **wanted)


def test_qwen_scope_files_that_are_not_understood(qwen):
    with pytest.raises(UserError, match=r"layer9.sae.pt: this SAE is of layer 9, not 10"):
        load_sae(qwen / "layer9.sae.pt", layer=10)
    arrays = torch.load(qwen / "layer0.sae.pt", weights_only=True)
    torch.save(arrays | {"threshold": torch.zeros(6)}, qwen / "layer0.sae.pt")
    with pytest.raises(UserError, match=r"layer0.sae.pt: no SAE .*threshold: missing, or not understood"):
        load_sae(qwen / "layer0.sae.pt")
    (qwen / "layer10.sae.pt").write_bytes((qwen / "layer10.sae.pt").read_bytes()[:300])
    with pytest.raises(UserError, match=r"layer10.sae.pt: no SAE that can be read"):
        load_sae(qwen, width=None)
    other = qwen.rename(qwen.parent / "saes")  # k is lost
    for source in (other, other / "layer9.sae.pt"):
        with pytest.raises(UserError, match="k of a Qwen-Scope SAE stands in its folder's name"):
            load_sae(source, width=None)


@pytest.mark.parametrize("name", sorted(path.name for path in SAELENS.iterdir()))
def test_saelens_computes_the_same(name):
    """Features, which of them are active, and reconstructions, as SAELens 6.54 recorded them."""
    expected = load_file(SAELENS / name / "expected.safetensors")
    c = (sae := load_sae(SAELENS / name)).encode(expected["states"])
    assert torch.equal(c != 0, expected["features"] != 0) and (c != 0).any()
    torch.testing.assert_close(c, expected["features"], atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(sae(expected["states"]), expected["reconstruction"], atol=3e-5, rtol=1e-5)
    assert (sae.layer, sae.site, sae.k) == (7, "res", 4 if "topk" in name else None)
    assert "few" not in name or ((c != 0).sum(-1) < 4).any()  # k is above the number that are positive


def change(folder, **fields):
    """Fields of a SAELens folder's cfg.json changed; None takes one out. `hook_name` is one of metadata."""
    cfg = json.loads((folder / "cfg.json").read_text())
    for field, value in fields.items():
        place = cfg["metadata"] if field.startswith("hook") else cfg
        place |= {field: value} if value is not None else {}
        if value is None:
            del place[field]
    (folder / "cfg.json").write_text(json.dumps(cfg))


@pytest.fixture
def saelens(tmp_path):
    return Path(shutil.copytree(SAELENS / "jumprelu", tmp_path / "mine"))


NOT_UNDERSTOOD = [  # of cfg.json, field and value
    ("architecture", "gated"),
    ("architecture", "jumprelu_transcoder"),
    ("normalize_activations", "layer_norm"),
    ("normalize_activations", "expected_average_only_in"),
    ("reshape_activations", "hook_z"),
    ("rescale_acts_by_decoder_norm", True),
    ("n_sources", 3),
    ("hook_head_index", 2),
    ("hook_name", "blocks.0.hook_resid_pre"),
    ("hook_name", "blocks.4.attn.hook_z"),
]


@pytest.mark.parametrize(("field", "value"), NOT_UNDERSTOOD)
def test_what_saelens_says_and_is_not_understood(saelens, field, value):
    change(saelens, **{field: value})
    with pytest.raises(UserError, match=re.escape(f"{field} {value!r} is not understood")) as caught:
        load_sae(saelens)
    assert str(caught.value).startswith(str(saelens)) and "\n" not in str(caught.value)
    assert field != "architecture" or "it may be standard, jumprelu, topk" in str(caught.value)


@pytest.mark.parametrize("field, error", [("apply_b_dec_to_input", "KeyError"), ("metadata", "before 6")])
def test_what_saelens_must_say(saelens, field, error):
    change(saelens, **{field: None})
    with pytest.raises(UserError, match=error):
        load_sae(saelens)


@pytest.mark.parametrize(
    ("hook", "layer", "site"),
    [
        ("blocks.12.hook_resid_post", 12, "res"),
        ("blocks.12.hook_resid_pre", 11, "res"),
        ("blocks.12.hook_mlp_out", 12, "mlp"),
        ("model.layers.12", 12, "res"),
        ("model.language_model.layers.3", 3, "res"),
    ],
)
def test_where_saelens_says_an_sae_reads(saelens, hook, layer, site):
    change(saelens, hook_name=hook)
    for given in ({}, {"layer": layer}):
        sae = load_sae(saelens, site=site, **given)
        assert (sae.layer, sae.site) == (layer, site)
    with pytest.raises(UserError, match=f"this SAE is of layer {layer}, not {layer + 1}"):
        load_sae(saelens, site=site, layer=layer + 1)
    with pytest.raises(UserError, match=f"this SAE is of site {site}, not att"):
        load_sae(saelens, site="att")


def test_saelens_files_that_are_not_whole(saelens):
    change(saelens, k=3)  # which is of a TopK SAE alone
    assert load_sae(saelens).k is None
    arrays = load_file(saelens / "sae_weights.safetensors")
    more, less = arrays | {"W_skip": torch.zeros(5, 5)}, dict(arrays)
    del less["threshold"]
    for name, changed in (("W_skip", more), ("threshold", less)):
        save_file(changed, saelens / "sae_weights.safetensors")
        with pytest.raises(UserError, match=f"{name}: missing, or not understood"):
            load_sae(saelens)
    (saelens / "cfg.json").unlink()  # without it the arrays could mean anything
    with pytest.raises(UserError, match=r"sae_weights.safetensors: no SAE that can be read .*cfg.json"):
        load_sae(saelens)
    with pytest.raises(UserError, match=r"give the folder of one SAE, as .*/jumprelu, jumprelu_b_dec, sta"):
        load_sae(SAELENS)


# ------------------------------------------------------------------------------------------------- the hub
@pytest.fixture
def hub(repo, monkeypatch):
    """A hub that holds `repo`, with `list` and `download`."""
    hub = Mock()
    hub.list.return_value = ["README.md", *(x.relative_to(repo).as_posix() for x in repo.rglob("*.npz"))]
    hub.download.side_effect = lambda name, file: str(repo / file)
    monkeypatch.setattr(sae_module, "HfApi", lambda: Mock(list_repo_files=hub.list))
    monkeypatch.setattr(sae_module, "hf_hub_download", hub.download)
    return hub


def test_hub_downloads_the_chosen_file_alone(hub, repo):
    assert_loaded(load_sae(REPO, layer=25), repo / scope(25, "16k", 116))
    hub.list.assert_called_once_with(REPO)
    hub.download.assert_called_once_with(REPO, scope(25, "16k", 116))


def test_a_folder_in_a_repo(hub, repo, qwen):
    """SAELens' folders lie in one; what explains the arrays comes with them."""
    for name in ("topk", "standard"):
        shutil.copytree(SAELENS / name, repo / "all" / name)
    hub.list.return_value = [x.relative_to(repo).as_posix() for x in repo.rglob("*.*") if x.is_file()]
    assert load_sae("owner/saes/all/topk").k == 4
    wanted = [f"all/topk/{file}" for file in ("cfg.json", "sae_weights.safetensors")]
    assert [call.args for call in hub.download.call_args_list] == [("owner/saes", file) for file in wanted]
    with pytest.raises(UserError, match="give the folder of one SAE, as owner/saes/all/standard, topk"):
        load_sae("owner/saes/all")
    with pytest.raises(UserError, match="owner/saes/al: no SAE"):  # no folder's name, but its beginning
        load_sae("owner/saes/al")
    hub.list.return_value, hub.download.side_effect = ["layer9.sae.pt"], lambda name, file: str(qwen / file)
    sae = load_sae(QWEN, layer=9, width="64k")
    assert (sae.layer, sae.k) == (9, 3)


@pytest.mark.parametrize("step", ["list", "download"])
@pytest.mark.parametrize("kind", [errors.GatedRepoError, errors.RepositoryNotFoundError, ConnectionError])
def test_hub_errors_are_one_line_of_the_librarys_advice(hub, step, kind):
    options = {} if kind is ConnectionError else {"response": Mock(headers={})}
    getattr(hub, step).side_effect = kind("You must have access to it\nand be logged in", **options)
    error = f"the hub's repo '{REPO}' can't be loaded: You must have access to it and be logged in"
    with pytest.raises(UserError, match=re.escape(error)) as caught:
        load_sae(REPO, layer=25)
    assert "\n" not in str(caught.value)


def test_without_the_hub_its_cache_is_used(hub, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    names = scope(25, "16k", 55), scope(25, "16k", 16), scope(7, "16k", 9)
    near, far, other = (write(cache / name) for name in names)

    def snapshot_download(repo, *, local_files_only, allow_patterns=None):
        """The hub's library gives no whole snapshot of a repo that is there in part, as is usual."""
        if not (repo == REPO and local_files_only and allow_patterns == []):
            raise errors.LocalEntryNotFoundError("not whole")
        return str(cache)

    monkeypatch.setattr(sae_module, "snapshot_download", snapshot_download)
    hub.list.side_effect = ConnectionError("Name or service not known")
    with pytest.warns(UserWarning, match="the hub can't be read; choosing among"):
        assert_loaded(load_sae(REPO, layer=25), near)  # not 116, which the hub alone has
        assert_loaded(load_sae(REPO, layer=25, average_l0=16), far)
        assert_loaded(load_sae(REPO, layer=7), other)
        with pytest.raises(ValueError, match=r"no average_l0 116; it has: 16, 55$"):
            load_sae(REPO, layer=25, average_l0=116)
    with pytest.raises(UserError, match="'google/gemma-scope-9b-pt-res' can't be loaded: Name or service"):
        load_sae("google/gemma-scope-9b-pt-res", layer=25)  # not what is cached


NO_REPOS = ["./x", "../x/y", "/no/such", "~/no_such", "sae", "runs/toy/sae", "a/b.npz", "a/b/layer1.sae.pt"]


def test_what_the_hub_is_not_asked_for(hub, tmp_path):
    for source in NO_REPOS:
        with pytest.raises(UserError, match=f"^{re.escape(source)}: no such file or directory"):
            load_sae(source, layer=0)
    local = tmp_path / "gemma-scope-2b-pt-att/snapshots/0"  # as in the hub's cache, or a copy
    local.mkdir(parents=True)
    (local / "x.npz").write_bytes(b"")
    for there in (local, local / "x.npz"):
        with pytest.raises(UserError, match="holds site 'att', not 'res'"):
            load_sae(there)
    with pytest.raises(UserError, match="google/gemma-scope-2b-pt-mlp holds site 'mlp', not 'res'"):
        load_sae("google/gemma-scope-2b-pt-mlp", layer=25)
    hub.list.assert_not_called()
