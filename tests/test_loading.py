"""loading.py: models and references that do not fit, files that are damaged, dropout, positions."""

import json

import pytest
import torch
from conftest import make_lm_with_images, save_toy
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

import loading
import settings
import train
from runtime import UserError


def start(*flags):
    """A run that is refused before its first step."""
    train.main(settings.parse_args(["--preset", "toy", "--steps", "3", "--no_eval_kl", *flags]))


def test_models_that_do_not_fit(folder):
    for flag, name, change, says in (
        ("--model", "narrow", {"hidden_size": 32}, "reads width 64, the model has 32"),
        ("--model", "few", {"vocab_size": 100}, "token id .* of a vocabulary of 100"),
        ("--reference", "wide", {"vocab_size": 5000}, "vocabulary"),
    ):
        save_toy(folder, name, **change)
        with pytest.raises(UserError, match=says):
            start(flag, f"./{name}")
    config = json.loads((folder / "runs/toy/model/config.json").read_text())
    config |= {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    for name, file, content, says in (
        ("adapter", "adapter_config", {}, "this is an adapter"),
        ("small", "config", config, "its weights are quantised"),
    ):
        (folder / name).mkdir()
        (folder / f"{name}/{file}.json").write_text(json.dumps(content))
        for flag in ("--model", "--reference"):
            with pytest.raises(UserError, match=says):
                start(flag, f"./{name}")


def damage(tensors, name, value):
    """The same tensors, but for one number."""
    tensor = tensors[name].clone()
    tensor.view(-1)[-1] = value
    return tensors | {name: tensor}


def renamed(tensors, prefix):
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


DAMAGE = [  # what becomes of a file's tensors, what is said
    (lambda t: renamed(t, "_orig_mod"), r"lack \d+ .*they hold _orig_mod\.lm_head"),
    (lambda t: renamed(t, "base_model.model"), "lack .*they hold base_model"),
    (lambda t: without(t, "layers.2.mlp.up"), r"lack 1 of .*layers\.2\.mlp\.up"),
    (lambda t: without(t, "lm_head.weight"), r"lack 1 of its weights, first lm_head\.weight"),
    (lambda t: t | {"model.norm.weight": t["model.norm.weight"][:9]}, "can't be loaded"),
    (lambda t: damage(t, "model.norm.weight", float("nan")), r"model\.norm\.weight holds NaN or infinity"),
    (lambda t: damage(t, "lm_head.weight", float("-inf")), r"lm_head\.weight holds NaN or infinity"),
]


def test_weights_are_those_of_the_file(folder):
    """Names that don't fit would leave random weights, which the audit, a model against itself, can't see."""
    save_toy(folder, "odd", tie_word_embeddings=False)
    whole = load_file("odd/model.safetensors")
    for change, says in DAMAGE:
        save_file(change(whole), "odd/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=says) as error:
            loading.load_lm("./odd", "cpu")
        assert "\n" not in str(error.value)
    save_file(whole, "odd/model.safetensors", metadata={"format": "pt"})
    loaded = loading.load_lm("./odd", "cpu").state_dict()
    assert loaded.keys() == whole.keys() and all(torch.equal(loaded[name], whole[name]) for name in whole)


def test_dropout_is_off(folder):
    """By any of its names, and in the model that is loaded: a reference can't be random."""
    dropout = {"attention_dropout": 0.1, "resid_pdrop": 0.2, "embd_pdrop": 0.3}
    AutoConfig.for_model("phi", **dropout).save_pretrained(folder / "phi")
    found = loading.load_config("./phi")
    assert {name: getattr(found, name) for name in dropout} == dict.fromkeys(dropout, 0.0)
    AutoConfig.for_model("opt", layerdrop=0.1, dropout=0.1).save_pretrained(folder / "opt")
    found = loading.load_config("./opt")
    assert found.layerdrop == found.dropout == 0.0
    save_toy(folder, "leaky", attention_dropout=0.5)
    block = loading.load_lm("./leaky", "cpu").model.layers[0].self_attn
    assert block.attention_dropout == block.config.attention_dropout == 0.0


def test_positions_that_a_model_has_not(folder):
    """Longer pairs are refused, those that fill the last position are not."""
    tokenizer = AutoTokenizer.from_pretrained("runs/toy/model")
    config = settings.parse_args(["--preset", "toy"])
    sizes = loading.load_data("dataset", config, tokenizer).sizes
    longest = int((sizes[:, 0] + torch.maximum(sizes[:, 1], sizes[:, 2])).max())
    for places, fits in ((longest, True), (longest - 1, False)):
        save_toy(folder, f"of_{places}", max_position_embeddings=places)
        for flag in ("model", "reference"):
            flags = ["--preset", "toy", f"--{flag}", f"./of_{places}"]
            config = settings.parse_args(flags)
            if fits:
                assert len(loading.load_data("dataset", config, tokenizer)) == len(sizes)
            else:
                with pytest.raises(UserError, match=f"a pair of {longest} tokens, the model has {places} "):
                    loading.load_data("dataset", config, tokenizer)


def test_layers_of_a_model_with_images_are_compiled(monkeypatch):
    """They are not where a plain decoder's are. (On CUDA alone, and at their first forward.)"""
    lm, compiled = make_lm_with_images(), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: compiled.append(layer))
    loading.compile_layers(lm, settings.parse_args(["--preset", "toy"]), torch.device("cuda"), [])
    assert len(compiled) == 3 and compiled == list(lm.model.language_model.layers)
