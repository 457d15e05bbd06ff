"""What a run stands on, from names: models, SAEs, pairs, and the Policy as training runs it."""

import gc
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import data
import fpo
import offline
import runtime
import scale
from runtime import UserError, refuse
from sae import decoder_layers, load_sae


def torch_dtype(config, device) -> torch.dtype:
    """The dtype of weights. auto: float32 on the CPU, bfloat16 on CUDA."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def load_config(name: str):
    """A model's config, all dropout off. UserError for an adapter, quantised weights, or no model at all."""
    if (Path(name) / "adapter_config.json").exists() and not (Path(name) / "config.json").exists():
        refuse(f"model {name!r}: this is an adapter; merge it into its model first")
    with runtime.hub_errors("model", name):
        config = AutoConfig.from_pretrained(name)
    if getattr(config, "quantization_config", None):
        refuse(f"model {name!r}: its weights are quantised; training needs float32 or bfloat16 weights")
    text = config.get_text_config()
    for key, value in vars(text).items():  # reference and policy must see the same network at every step
        if ("drop" in key or "jitter" in key) and isinstance(value, float):  # resid_pdrop, layerdrop too
            setattr(text, key, 0.0)
    return config


def positions(config) -> int:
    """How many tokens a model can place (max_position_embeddings), or more than there will ever be."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31


def load_lm(name: str, device, *, dtype=torch.float32, move=True):
    """A causal LM from a Hugging Face directory or hub repo.

    Attention: flex_attention on CUDA. On the CPU transformers' own choice: sdpa, or eager where a model says
    that it can't have sdpa, which knows no softcap of the scores (Gemma-2).

    move: put it on the device; FSDP2 takes it from the CPU instead, layer by layer.
    """
    attention = "flex_attention" if torch.device(device).type == "cuda" else None
    options = {"config": load_config(name), "dtype": dtype, "attn_implementation": attention}
    options |= {"use_safetensors": True, "output_loading_info": True}
    with runtime.hub_errors("model", name):
        lm, found = cast(tuple[Any, dict], AutoModelForCausalLM.from_pretrained(name, **options))
    # A weight that no file holds would be random; the audit compares the model with itself, and can't tell.
    if missing := sorted(found["missing_keys"]):
        others = sorted(found["unexpected_keys"])[:1]
        holds = f"; they hold {others[0]}, which it does not know" if others else ""
        refuse(f"model {name!r}: its files lack {len(missing)} of its weights, first {missing[0]}{holds}")
    for key, tensor in lm.state_dict().items():
        if not tensor.isfinite().all():
            refuse(f"model {name!r}: its weight {key} holds NaN or infinity")
    return lm.to(device) if move else lm


def load_saes(config, device):
    """One SAE for each of --sae_layer, its encoder on the device, and where each reads: [(layer, site)].

    Without --sae_layer it is the layer that the SAE says it is of, else the last one of the SAE's repo or of
    the model. Raises: UserError for anything that `sae.load_sae` refuses.
    """
    # ---- one layer, width and L0 for each SAE
    last = load_config(config.model).get_text_config().num_hidden_layers - 1
    layers = config.sae_layer or [None]
    l0s = config.sae_l0 * len(layers) if len(config.sae_l0) == 1 else config.sae_l0
    if len(l0s) != len(layers):
        refuse(f"--sae_l0 {l0s}: one value is needed, or one for each of --sae_layer {layers}")
    width = None if config.sae_width == "auto" else config.sae_width
    # ---- read, and where each reads
    saes, sites = [], []
    for layer, l0 in zip(layers, l0s, strict=True):
        options = {"layer": layer, "width": width, "average_l0": None if l0 == "auto" else l0}
        try:
            sae = load_sae(config.sae, site=config.sae_site, **options)
        except UserError as error:
            raise UserError(f"--sae {error}") from error
        sites.append((last if sae.layer is None else sae.layer, config.sae_site))
        for name in ("W_enc", "b_enc", "threshold"):  # training never decodes
            setattr(sae, name, getattr(sae, name).to(device))
        saes.append(sae)
    return saes, sites


def load_data(flag_name, config, tokenizer):
    """The pairs of --dataset or --eval_dataset, with what was left out or cut printed."""
    # ---- one vocabulary, or their log π are of other things
    size, other = (load_config(n).get_text_config().vocab_size for n in (config.model, config.reference))
    if size != other:
        refuse(f"--reference {config.reference}: a vocabulary of {other}, the model's has {size}")
    source = getattr(config, flag_name)
    pairs = data.load_pairs(
        source, tokenizer, max_length=config.max_length, max_prompt_length=config.max_prompt_length,
        sft=config.method == "sft", chat_format=config.chat_format,
    )  # fmt: skip
    # ---- ids and positions that the model does not have
    if (most := pairs.largest_token()) >= size:
        refuse(f"{source}: token id {most} of a vocabulary of {size}: the tokenizer is another model's")
    longest = int((pairs.sizes[:, 0] + pairs.sizes[:, 1:].amax(1)).max())
    places = min(positions(load_config(n)) for n in (config.model, config.reference))
    if longest > places:
        refuse(f"{source}: a pair of {longest} tokens, the model has {places} positions: lower --max_length")
    if runtime.ranks()[0] == 0:
        chat = data.Chat(tokenizer, config.chat_format)
        template = f"chat template: {chat.name}, an answer ends with {tokenizer.decode(chat.end)}"
        notes = [f"{n} × {what}" for what, n in pairs.notes.items()]
        print(f"{flag_name}: {len(pairs)} pairs", template, *notes, sep="; ")
    return pairs


# How long rows are, as collate takes it. On CUDA a forward is one row, since attention skips what no query
# sees; on the CPU attention costs the square of a row, and rows are as short as the longest pair.
ROWS = {"cuda": {"row_tokens": 16384, "row_multiple": 128}, "cpu": {"row_tokens": 0, "row_multiple": 1}}


def choose_layout(config, pairs, device) -> dict:
    """How rows are laid out, as collate takes it.

    auto: on CUDA (flex_attention) the prompt is always shared; the CPU's attention costs the square of a row,
    so there it pays only where the prompt is at least as long as a response.
    """
    prompt, chosen, rejected = pairs.sizes.double().mean(0).tolist()
    pays = device.type == "cuda" or (prompt >= max(chosen, rejected) and rejected > 0)
    layout = config.layout if config.layout != "auto" else "shared" if pays else "separate"
    return {"layout": layout, **ROWS[device.type]}


def load_policy(name, config, device, saes, sites, *, frozen=False, hashed=True):
    """A Policy as training runs it, or the `frozen` reference beside it; if `hashed`, its weights' digest."""
    fsdp, dtype = config.shard == "fsdp", torch_dtype(config, device)
    # FSDP2 keeps float32 weights and casts them as it gathers them; a frozen model needs none.
    lm = load_lm(name, device, dtype=torch.float32 if fsdp and not frozen else dtype, move=not fsdp)
    digest = offline.digest(lm.state_dict()) if hashed else None
    if config.activation_checkpointing and not frozen:
        lm.activation_checkpointing_enable({"use_reentrant": False})
    policy = fpo.Policy(lm, saes, sites, fused=None if config.compile else False)
    compile_layers(lm, config, device, sites)  # after the hooks
    if fsdp and frozen:
        scale.shard_layers(decoder_layers(lm), dtype=dtype, device=device)
        lm.to(device)  # what is not in a layer: the embedding, the final norm
    elif fsdp:
        scale.shard_policy(policy, decoder_layers(lm), dtype=dtype, device=device)
    return policy, digest


def compile_layers(lm, config, device, sites):
    """torch.compile each layer, on CUDA. A hook at `mlp` or `att` would not fire inside a compiled block."""
    if config.compile and device.type == "cuda":
        torch._dynamo.config.optimize_ddp = False  # it would split layers without checkpointing
        hooked_inside = [layer for layer, site in sites if site != "res"]
        for number, layer in enumerate(decoder_layers(lm)):
            if number not in hooked_inside:
                layer.compile()


def release(device):
    """Give back a card's memory of models that no name holds any more, now and not at some later time.

    A layer that was compiled by itself holds what it was compiled to, and that holds the layer: such a cycle
    lies on the card until Python's collector comes by, 5 GB for each evaluation of Gemma-2-2B. Elsewhere
    nothing is compiled, and a model goes with its last name.
    """
    if device.type == "cuda":
        gc.collect()


def make_toy_world(config):
    """Make the toy preset's files where they are missing: rank 0 does, the others wait."""
    if config.preset == "toy":
        if runtime.ranks()[0] == 0 and not Path("runs/toy/toy.json").exists():
            import toy

            toy.make_world(Path("runs/toy"))
        runtime.barrier()
