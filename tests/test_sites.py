"""sae.SiteHook: what it captures at each site, against the blocks' own parts."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sae import SiteHook

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY = SIZES | {"vocab_size": 40, "num_key_value_heads": 2, "pad_token_id": 0}
GEMMA = {"head_dim": 6, "sliding_window": 4}  # 4 heads × 6 = 24, not 16
INPUT_IDS = torch.arange(14).reshape(2, 7) * 5 % 37 + 3


def tiny(kind):
    """A random model in float32, its norms' weights too, with attention written out."""
    torch.manual_seed(0)
    sizes = TINY | GEMMA if "gemma" in kind else TINY
    if kind == "gemma3":  # with images
        vision = SIZES | {"image_size": 8, "patch_size": 4}
        sizes = {"text_config": sizes, "vision_config": vision, "mm_tokens_per_image": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gemma3_text", "gemma3"])
def test_res_is_the_stream_as_the_block_leaves_it(kind):
    model = tiny(kind)
    hooks = [SiteHook(model, layer) for layer in range(3)]
    states = model(INPUT_IDS, output_hidden_states=True).hidden_states
    for layer in (0, 1):  # hidden_states[0] are the embeddings
        assert torch.equal(hooks[layer].value, states[layer + 1])
    # transformers norms the last one
    assert torch.equal(getattr(model.model, "language_model", model.model).norm(hooks[2].value), states[-1])
    assert [hook.d for hook in hooks] == [16, 16, 16]


@pytest.mark.parametrize(("kind", "layer"), [("gemma2", 0), ("gemma2", 2), ("gemma3_text", 1)])
def test_mlp_and_att_from_the_blocks_input(kind, layer):
    model = tiny(kind)
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


@pytest.mark.parametrize("site", ["res", "att"])
def test_deepcopy_and_removal(site):
    model = tiny("gemma2")
    with SiteHook(model, 1, site) as hook:
        model(INPUT_IDS)
        captured = hook.value
        twin, reference = copy.deepcopy((hook, model))
        assert twin.value is None
        reference(INPUT_IDS.flip(0))
        torch.testing.assert_close(twin.value, captured.flip(0))
    model(INPUT_IDS)
    reference(INPUT_IDS)
    # The end of the `with` block has removed the original's hook alone.
    assert hook.value is captured and torch.equal(twin.value, captured)
    captured.sum().backward()  # its graph is the original's, whole
    assert model.model.embed_tokens.weight.grad.abs().max() > 0
    assert reference.model.embed_tokens.weight.grad is None
    hook._capture(None, (captured.clone(),), (captured.clone(), "cache"))  # some blocks return a tuple
    assert torch.equal(hook.value, captured)


def test_hook_errors():
    for kind, layer, site, error in (
        ("gemma2", 1, "resid", "unknown site 'resid': it is one of res, mlp, att"),
        ("gemma2", 3, "res", "no site 'res': Gemma2ForCausalLM has no model.layers.3"),
        ("gemma2", -1, "res", "no site 'res': Gemma2ForCausalLM has no model.layers.-1"),
        ("llama", 1, "mlp", "no site 'mlp': .* has no model.layers.1.post_feedforward_layernorm"),
        ("gpt2", 0, "res", "no site 'res': GPT2LMHeadModel has no model.layers.0"),
    ):
        with pytest.raises(ValueError, match=f"^{error}$"):
            SiteHook(tiny(kind), layer, site)
