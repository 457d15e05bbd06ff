"""sae.py: the JumpReLU by hand, files in Gemma Scope's two layouts, and what the hook captures."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    IncompleteSnapshotError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

import sae as sae_module
from sae import JumpReLUSAE, SiteHook, load_sae


def random_arrays(d=4, m=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d), "b_dec": (d,)}
    arrays = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**arrays, "threshold": torch.rand(m, generator=generator)}


# ------------------------------------------------------------------------------------------ JumpReLU, by hand


def hand_sae():
    """d = 2, m = 3, every number exact in binary."""
    return JumpReLUSAE(
        W_enc=torch.tensor([[1.0, 0.0, -1.0], [0.5, 1.0, 2.0]]),
        b_enc=torch.tensor([0.25, -0.5, 0.0]),
        W_dec=torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]]),
        b_dec=torch.tensor([0.5, -0.5]),
        threshold=torch.tensor([1.0, 0.5, 0.0]),
    )


def test_values_by_hand():
    # h = (2, 1): z = (2 + .5 + .25, 1 - .5, -2 + 2) = (2.75, .5, 0); .5 and 0 stand at their thresholds: off.
    # h = (0, 2): z = (1 + .25, 2 - .5, 4) = (1.25, 1.5, 4): all on; c W_dec = (1.25 - 4, 3 + 4).
    # h = (-1, -1): z = (-1.25, -1.5, -1): all off, and the reconstruction is b_dec.
    sae = hand_sae()
    h = torch.tensor([[[2.0, 1.0], [0.0, 2.0], [-1.0, -1.0]]])
    assert sae.encode(h).tolist() == [[[2.75, 0.0, 0.0], [1.25, 1.5, 4.0], [0.0, 0.0, 0.0]]]
    expected = [[[2.75 + 0.5, -0.5], [-2.75 + 0.5, 7.0 - 0.5], [0.5, -0.5]]]
    assert sae(h).tolist() == expected
    assert sae.decode(sae.encode(h)).tolist() == expected
    assert (sae.d, sae.m) == (2, 3)


def test_strictly_above_the_threshold():
    threshold = torch.tensor(0.7)  # not exact in binary: the float32 itself is the bound
    above, below = (torch.nextafter(threshold, torch.tensor(x)) for x in (1.0, 0.0))
    one, zero = torch.ones(1), torch.zeros(1)
    sae = JumpReLUSAE(one[None], zero, one[None], zero, threshold[None])
    h = torch.stack([below, threshold, above])[:, None]
    assert sae.encode(h).flatten().tolist() == [0.0, 0.0, above.item()]


def test_gradient_is_that_of_the_active_features():
    sae = hand_sae()
    h = torch.tensor([2.0, 1.0], requires_grad=True)  # feature 0 alone is on
    (sae.encode(h) * torch.tensor([3.0, 5.0, 7.0])).sum().backward()
    assert h.grad.tolist() == [3.0 * 1.0, 3.0 * 0.5]  # 3 × column 0 of W_enc


def test_frozen():
    arrays = {name: array.requires_grad_() for name, array in random_arrays().items()}
    sae = JumpReLUSAE(**arrays)
    sae(torch.ones(4, requires_grad=True)).sum().backward()
    assert not list(sae.parameters()) and not any(buffer.requires_grad for buffer in sae.buffers())
    assert all(array.grad is None for array in arrays.values())
    before = sae.W_enc.clone()
    arrays["W_enc"].data.zero_()  # the weights are copies: what happens to the originals is nothing to it
    assert torch.equal(sae.W_enc, before)


@pytest.mark.parametrize("cast", ["to", "half", "double", "parent"])
def test_weights_stay_float32(cast):
    sae = JumpReLUSAE(**(arrays := random_arrays(8, 64)))
    if cast == "to":
        sae.to(torch.bfloat16)
    elif cast == "parent":
        nn.ModuleList([sae]).bfloat16()
    else:
        getattr(sae, cast)()
    assert all(torch.equal(getattr(sae, name), array) for name, array in arrays.items())
    assert sae.to("meta").W_enc.is_meta  # while devices do change


def test_float32_arithmetic_for_bf16_states_and_under_autocast():
    arrays = random_arrays(64, 256)
    sae = JumpReLUSAE(**arrays)
    h = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = {name: array.double() for name, array in arrays.items()}
    z = h.double() @ exact["W_enc"] + exact["b_enc"]
    expected = z * (z > exact["threshold"])
    expected_h = expected @ exact["W_dec"] + exact["b_dec"]
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            c, reconstruction = sae.encode(h), sae(h)
        # bf16 products would be wrong by 1e-2 and more
        assert c.dtype == torch.float32 and (c - expected).abs().max() < 1e-4
        assert reconstruction.dtype == torch.float32 and (reconstruction - expected_h).abs().max() < 1e-3


def test_width_of_the_states_is_checked():
    with pytest.raises(ValueError, match="h is 3 wide, this SAE reads 4"):
        JumpReLUSAE(**random_arrays(d=4)).encode(torch.zeros(2, 3))


# ------------------------------------------------------------------------------------------ files and folders

FAULTS = {  # fault -> (what it does to good arrays, what the error says of it)
    "transposed": (lambda a: {**a, "W_enc": a["W_enc"].T}, r"b_enc is \(6,\), expected \(4,\)"),
    "decoder": (lambda a: {**a, "W_dec": a["W_dec"].T}, r"W_dec is \(4, 6\), expected \(6, 4\)"),
    "scalar": (lambda a: {**a, "threshold": torch.tensor(0.5)}, r"threshold is \(\), expected \(6,\)"),
    "flat": (lambda a: {**a, "W_enc": a["W_enc"].flatten()}, r"W_enc is \(24,\), expected two axes"),
    "nan": (lambda a: {**a, "b_dec": a["b_dec"] * float("nan")}, "b_dec holds NaN or inf"),
    "inf": (lambda a: {**a, "W_enc": a["W_enc"] / 0}, "W_enc holds NaN or inf"),
    "int": (lambda a: {**a, "b_enc": a["b_enc"].int()}, "b_enc holds torch.int32"),
    "negative": (lambda a: {**a, "threshold": a["threshold"] - 2}, "threshold goes down to -"),
    "missing": (
        lambda a: {k: v for k, v in a.items() if k not in ("b_dec", "threshold")},
        "no b_dec, threshold",
    ),
}


def write(path: Path, arrays, lower=False):
    """Write an SAE as Gemma Scope does: .npz, or .safetensors with keys in lower case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **{name: array.numpy() for name, array in arrays.items()})
    else:
        save_file({name.lower(): array.contiguous() for name, array in arrays.items()}, path)
    return path


def write_marked(root: Path, name: str):
    """An SAE whose b_dec says which file it came from."""
    arrays = random_arrays()
    arrays["b_dec"][:] = mark(name)
    write(root / name, arrays)


def mark(name: str) -> float:
    return float(sum(i * ord(letter) for i, letter in enumerate(name, 1)) % 10007)


def assert_loaded(sae, name: str):
    assert set(sae.b_dec.tolist()) == {mark(name)}


def scope(layer, width, l0):
    return f"layer_{layer}/width_{width}/average_l0_{l0}/params.npz"


def scope2(folder, layer, width, l0):
    return f"{folder}/layer_{layer}_width_{width}_l0_{l0}/params.safetensors"


@pytest.fixture
def repo(tmp_path):
    """A local directory with the hub's layout: the L0's of Gemma Scope's 2B residual SAEs, and a few more."""
    files = [scope(25, "16k", x) for x in (16, 28, 55, 116, 285)] + [scope(7, "16k", x) for x in (90, 110, 9)]
    files += [scope(25, "65k", 93), scope(10, "16k", 77)]
    for name in files:
        write_marked(tmp_path / "repo", name)
    (tmp_path / "repo" / "embedding").mkdir()
    return tmp_path / "repo"


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_one_file_holds_its_arrays(tmp_path, suffix):
    arrays = random_arrays(d=4, m=6)
    sae = load_sae(write(tmp_path / f"any{suffix}", arrays), layer=3, width="no matter")
    assert all(torch.equal(getattr(sae, name), array) for name, array in arrays.items())
    assert all(buffer.dtype == torch.float32 for buffer in sae.buffers())


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"layer": 25}, scope(25, "16k", 116)),  # 116 is nearer to 100 than 55
        ({"layer": 25, "average_l0": 55}, scope(25, "16k", 55)),
        ({"layer": 25, "average_l0": "285"}, scope(25, "16k", 285)),
        ({"layer": 25, "width": "65k"}, scope(25, "65k", 93)),
        ({"layer": 7}, scope(7, "16k", 90)),  # 90 and 110 are as near: the smaller
        ({"layer": 10, "site": "mlp"}, scope(10, "16k", 77)),  # a repo holds one site, and does not say which
    ],
)
def test_chooses_from_the_hub_layout(repo, wanted, expected):
    assert_loaded(load_sae(repo, **wanted), expected)


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"layer": 26}, "no layer 26; it has: 7, 10, 25"),
        ({"layer": 25, "width": "1m"}, "no width '1m'; it has: 16k, 65k"),
        ({"layer": 25, "average_l0": 100}, "no average_l0 '100'; it has: 16, 28, 55, 116, 285"),
        ({"layer": 25, "width": "65k", "average_l0": 116}, "no average_l0 '116'; it has: 93"),
        ({"layer": 25, "site": "mid"}, "unknown site 'mid': it is one of res, mlp, att"),
    ],
)
def test_errors_list_what_exists(repo, wanted, error):
    with pytest.raises(ValueError, match=re.escape(error) + "$"):
        load_sae(str(repo), **wanted)


def test_directory_with_a_layout_per_site(tmp_path):
    for site in ("res", "mlp"):
        write_marked(tmp_path, f"{site}/{scope(0, '256', 30)}")
        assert_loaded(load_sae(tmp_path, layer=0, width="256", site=site), f"{site}/{scope(0, '256', 30)}")
    with pytest.raises(ValueError, match="no site 'att'; it has: res, mlp"):
        load_sae(tmp_path, layer=0, width="256", site="att")


def test_directory_with_nothing_to_load(tmp_path):
    (tmp_path / "layer_0").mkdir()
    with pytest.raises(ValueError, match=r"no SAE of site 'att'; looked for layer_L.*attn_out/layer_L"):
        load_sae(tmp_path, layer=0, site="att")


def test_gemma_scope_2(tmp_path):
    for l0 in ("small", "medium", "big"):
        write_marked(tmp_path, scope2("resid_post", 12, "16k", l0))
    write_marked(tmp_path, scope2("resid_post_all", 12, "16k", "small"))
    for folder in ("resid_post_all", "mlp_out", "attn_out"):
        write_marked(tmp_path, scope2(folder, 3, "16k", "big"))

    def load(**wanted):
        return load_sae(tmp_path, **wanted)

    assert_loaded(load(layer=12), scope2("resid_post", 12, "16k", "medium"))
    assert_loaded(load(layer=12, average_l0="small"), scope2("resid_post", 12, "16k", "small"))
    assert_loaded(load(layer=3, average_l0="big"), scope2("resid_post_all", 3, "16k", "big"))
    assert_loaded(load(layer=3, average_l0="big", site="mlp"), scope2("mlp_out", 3, "16k", "big"))
    assert_loaded(load(layer=3, average_l0="big", site="att"), scope2("attn_out", 3, "16k", "big"))
    with pytest.raises(ValueError, match="no average_l0 'medium'; it has: big"):
        load(layer=3)
    with pytest.raises(ValueError, match="no layer 4; it has: 3, 12"):
        load(layer=4)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_arrays_name_the_file(tmp_path, fault, suffix):
    spoil, error = FAULTS[fault]
    path = write(tmp_path / f"params{suffix}", spoil(random_arrays(d=4, m=6)))
    with pytest.raises(ValueError, match=rf"params{suffix}: .*{error}"):
        load_sae(path, layer=0)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_truncated_file(tmp_path, suffix):
    whole = write(tmp_path / f"whole{suffix}", random_arrays(d=64, m=64)).read_bytes()
    for kept in (0, 4, len(whole) // 2, len(whole) - 8):
        (path := tmp_path / f"part{suffix}").write_bytes(whole[:kept])
        with pytest.raises(
            ValueError, match=rf"part{suffix}: truncated, pickled, or no {suffix} file"
        ) as caught:
            load_sae(path, layer=0)
        assert "\n" not in str(caught.value) and caught.value.__suppress_context__


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_never_run(tmp_path):
    victim, arrays = tmp_path / "victim", {name: array.numpy() for name, array in random_arrays().items()}
    arrays["threshold"] = np.array([Touch(victim)], dtype=object)
    np.savez(tmp_path / "params.npz", **arrays)
    np.array([Touch(victim)], dtype=object).dump(tmp_path / "bare.npz")  # a pickle under another name
    torch.save(Touch(victim), tmp_path / "params.pt")
    for name in ("params.npz", "bare.npz", "params.pt"):
        with pytest.raises(ValueError, match=rf"{name}: .*(pickled|\.npz or \.safetensors alone)"):
            load_sae(tmp_path / name, layer=0)
    assert not victim.exists()
    np.load(tmp_path / "params.npz", allow_pickle=True)["threshold"]  # it would have run
    assert victim.exists()


# ---------------------------------------------------------------------------------------------------- the hub

REPO = "google/gemma-scope-2b-pt-res"


@pytest.fixture
def hub(repo, monkeypatch):
    """A hub that holds `repo`; what is asked of it is kept in `calls`, and `fail` makes it raise."""
    fake = SimpleNamespace(calls=[], fail={})

    def list_repo_files(self, repo_id, *, revision=None):
        fake.calls.append((repo_id, revision))
        if "list" in fake.fail:
            raise fake.fail["list"]
        return [*(p.relative_to(repo).as_posix() for p in repo.rglob("*.npz")), "README.md"]

    def download(repo_id, filename, *, revision=None):
        fake.calls.append((repo_id, filename, revision))
        if "download" in fake.fail:
            raise fake.fail["download"]
        return str(repo / filename)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(sae_module, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(repo.parent / "cache"))
    return fake


def hub_error(kind):
    return kind.__new__(kind, "401 Client Error.\nsecond line")  # __init__ wants an HTTP response


def test_hub_downloads_the_chosen_file_alone(hub):
    assert_loaded(load_sae(REPO, layer=25, revision="v1"), scope(25, "16k", 116))
    assert hub.calls == [(REPO, "v1"), (REPO, scope(25, "16k", 116), "v1")]
    with pytest.raises(ValueError, match="no layer 3; it has: 7, 10, 25"):
        load_sae(REPO, layer=3)


@pytest.mark.parametrize("name", ["google/gemma-scope-2b-pt-mlp", "google/gemma-scope-2b-pt-transcoders"])
def test_hub_repo_of_another_site(hub, name):
    with pytest.raises(ValueError, match=f"{name} holds site '{name.rsplit('-')[-1]}', not 'res'"):
        load_sae(name, layer=25)
    assert not hub.calls


@pytest.mark.parametrize("step", ["list", "download"])
@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            hub_error(GatedRepoError),
            f"accept its licence at https://huggingface.co/{REPO}, then `hf auth login`",
        ),
        (hub_error(RepositoryNotFoundError), "check the name"),
        (hub_error(RevisionNotFoundError), "no revision 'v1'"),
        (ConnectionError("No such host\nsecond line"), "check the network"),
    ],
    ids=["gated", "missing", "revision", "offline"],
)
def test_hub_errors_are_one_line_of_advice(hub, step, error, advice):
    hub.fail[step] = error
    with pytest.raises(OSError, match=re.escape(advice)) as caught:
        load_sae(REPO, layer=25, revision="v1")
    assert str(caught.value).startswith(REPO) and "\n" not in str(caught.value)
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None


def test_without_the_hub_its_cache_is_used(hub, repo):
    commit = "0123456789" * 4
    root = repo.parent / "cache" / f"models--{REPO.replace('/', '--')}"
    write_marked(root / "snapshots" / commit, scope(25, "16k", 55))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    hub.fail["list"] = ConnectionError("Name or service not known")
    with pytest.warns(UserWarning, match="the hub can't be read; choosing among"):
        assert_loaded(load_sae(REPO, layer=25), scope(25, "16k", 55))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no average_l0 '116'; it has: 55"):
        load_sae(REPO, layer=25, average_l0=116)
    with pytest.raises(OSError, match="check the network"):
        load_sae(REPO, layer=25, revision="v1")  # not what is cached


def test_a_cache_known_to_be_partial_is_used(hub, repo, monkeypatch):
    def snapshot_download(repo_id, *, revision, local_files_only):
        raise IncompleteSnapshotError("109 file(s) are missing", snapshot_path=str(repo))

    monkeypatch.setattr(sae_module, "snapshot_download", snapshot_download)
    hub.fail["list"] = ConnectionError("Name or service not known")
    with pytest.warns(UserWarning, match="the hub can't be read"):
        assert_loaded(load_sae(REPO, layer=10), scope(10, "16k", 77))


@pytest.mark.parametrize("source", ["./x", "../x/y", "/no/such", "~/no_such", "sae", "a/b/c", "a/b.npz"])
def test_a_missing_path_is_no_hub_lookup(hub, source):
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(source)}: no such file or directory"):
        load_sae(source, layer=0)
    assert not hub.calls


# --------------------------------------------------------------------------------------------------- the hook

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
GEMMA = dict(**TINY, num_key_value_heads=2, head_dim=6, sliding_window=4)  # 4 heads × 6 = 24, not 16
CONFIGS = {
    "llama": lambda: LlamaConfig(**TINY, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**TINY, num_key_value_heads=2),
    "gemma": lambda: GemmaConfig(**TINY, num_key_value_heads=2, head_dim=6),
    "gemma2": lambda: Gemma2Config(**GEMMA),
    "gemma3": lambda: Gemma3TextConfig(**GEMMA),
    "gpt2": lambda: GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2),
}
INPUT_IDS = torch.arange(14).reshape(2, 7) * 5 % 37 + 3


def tiny(name):
    """A random model in float32, its norms' weights too, with attention written out."""
    torch.manual_seed(0)
    if name == "gemma3-images":
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        vision = SiglipVisionConfig(**sizes, image_size=8, patch_size=4)
        config = Gemma3Config(text_config=CONFIGS["gemma3"](), vision_config=vision, mm_tokens_per_image=1)
        model = Gemma3ForConditionalGeneration(config)
    else:
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "gemma2", "gemma3", "gemma3-images"])
def test_res_is_the_stream_as_the_block_leaves_it(name):
    model = tiny(name)
    hooks = [SiteHook(model, layer) for layer in range(3)]
    states = model(INPUT_IDS, output_hidden_states=True).hidden_states
    for layer in (0, 1):  # hidden_states[0] are the embeddings
        assert torch.equal(hooks[layer].value, states[layer + 1])
    # transformers norms the last one
    assert (hooks[2].value - states[-1]).abs().max() > 0.1
    body = getattr(model.model, "language_model", model.model)
    assert torch.equal(body.norm(hooks[2].value), states[-1])
    assert [hook.d for hook in hooks] == [16, 16, 16]


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
@pytest.mark.parametrize("layer", [0, 2])
def test_mlp_and_att_from_the_blocks_input(name, layer):
    model = tiny(name)
    block = model.model.layers[layer]
    res, mlp, att = (SiteHook(model, layer, site) for site in ("res", "mlp", "att"))
    with torch.no_grad():
        out = model(INPUT_IDS, output_hidden_states=True, output_attentions=True)
        x = out.hidden_states[layer]
        # att: each head's weighted mean of the values, side by side; two heads share a value
        v = block.self_attn.v_proj(block.input_layernorm(x)).view(2, 7, 2, 6).transpose(1, 2)
        heads = out.attentions[layer] @ v.repeat_interleave(2, dim=1)  # (2, 4, 7, 6)
        heads = heads.transpose(1, 2).reshape(2, 7, 24)
        torch.testing.assert_close(att.value, heads, atol=1e-5, rtol=1e-5)
        # mlp: what the block adds to the stream after the attention
        middle = x + block.post_attention_layernorm(block.self_attn.o_proj(heads))
        added = block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(middle)))
        torch.testing.assert_close(mlp.value, added, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(res.value, middle + mlp.value, atol=1e-5, rtol=1e-5)
    assert (res.d, mlp.d, att.d) == (16, 16, 24)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma"])
def test_att_on_models_without_post_norms(name):
    model = tiny(name)
    attention = model.model.layers[1].self_attn
    outputs = []
    attention.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    hook = SiteHook(model, 1, "att")
    model(INPUT_IDS)
    assert torch.equal(attention.o_proj(hook.value), outputs[0])
    assert hook.d == hook.value.shape[-1]


@pytest.mark.parametrize("site", ["res", "mlp", "att"])
def test_under_activation_checkpointing(site):
    grads = []
    for checkpointed in (False, True):
        model = tiny("gemma2").train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        hook = SiteHook(model, 1, site)
        logits = model(INPUT_IDS, use_cache=False).logits
        captured, content = hook.value, hook.value.detach().clone()
        hook.enabled = False
        (captured.square().sum() + logits.square().sum()).backward()  # through the site, and past it
        assert hook.value is captured and torch.equal(captured, content)
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
    assert grads[0]["model.layers.0.mlp.up_proj.weight"].abs().max() > 0


def test_the_recompute_overwrites_an_enabled_hook_inside_a_block():
    # Why `enabled` is there. (At `mlp` the recompute ends early: nothing after it is saved for backward.)
    model = tiny("gemma2").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    hook = SiteHook(model, 1, "att")
    logits = model(INPUT_IDS, use_cache=False).logits
    captured = hook.value
    (captured.square().sum() + logits.square().sum()).backward()
    assert hook.value is not captured


def test_disabled_and_removed():
    model = tiny("llama")
    with SiteHook(model, 1) as hook:
        model(INPUT_IDS)
        first = hook.value
        hook.enabled = False
        model(INPUT_IDS)
        assert hook.value is first
        hook.enabled = True
        model(INPUT_IDS)
        second = hook.value
        assert second is not first
    model(INPUT_IDS)
    assert hook.value is second
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("site", ["res", "att"])
def test_deepcopy_of_a_hooked_model_shares_nothing(site):
    model = tiny("gemma2")
    hook = SiteHook(model, 1, site)
    model(INPUT_IDS)
    captured = hook.value
    reference = copy.deepcopy(model)
    reference(INPUT_IDS.flip(0))
    assert hook.value is captured
    captured.sum().backward()  # its graph is the original's, whole
    assert model.model.embed_tokens.weight.grad.abs().max() > 0
    assert reference.model.embed_tokens.weight.grad is None


@pytest.mark.parametrize("hook_first", [False, True])
def test_deepcopy_of_model_and_hook_together(hook_first):
    model = tiny("gemma2")
    hook = SiteHook(model, 1, "mlp")
    model(INPUT_IDS)
    captured = hook.value
    twin, reference = copy.deepcopy((hook, model)) if hook_first else copy.deepcopy((model, hook))[::-1]
    assert twin.value is None
    reference(INPUT_IDS.flip(0))
    torch.testing.assert_close(twin.value, captured.flip(0))
    assert hook.value is captured
    twin.remove()  # from the copy alone
    twin.value = None
    reference(INPUT_IDS)
    model(INPUT_IDS)
    assert twin.value is None and hook.value is not captured


def test_a_block_that_returns_a_tuple():
    class Block(nn.Module):
        def forward(self, x):
            return x + 1, "cache"

    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([Block()])
    model.config = LlamaConfig(**TINY)
    hook = SiteHook(model, 0)
    model.model.layers[0](torch.zeros(1, 2, 16))
    assert torch.equal(hook.value, torch.ones(1, 2, 16))


@pytest.mark.parametrize(
    ("name", "layer", "site", "error"),
    [
        ("gemma2", 1, "resid", "unknown site 'resid': it is one of res, mlp, att"),
        ("gemma2", 3, "res", r"no layer 3: Gemma2ForCausalLM has 0\.\.2"),
        ("gemma2", -1, "res", r"no layer -1: Gemma2ForCausalLM has 0\.\.2"),
        ("llama", 1, "mlp", r"no site 'mlp': LlamaForCausalLM has no layers\[1\].post_feedforward_layernorm"),
        ("gpt2", 0, "res", "GPT2LMHeadModel has no model.model.layers"),
    ],
)
def test_hook_errors(name, layer, site, error):
    model = tiny(name)
    with pytest.raises(ValueError, match=error):
        SiteHook(model, layer, site)
    assert not any(module._forward_hooks for module in model.modules())
