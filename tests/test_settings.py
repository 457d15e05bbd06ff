"""settings.py: Table 5, presets, where training starts, and what is refused before a model is loaded."""

import pytest

import loading
import settings
import train
from runtime import UserError


def test_presets_are_table_5():
    """The paper's values, as printed there; and where it is silent those of the experiments' code."""
    for preset, optimizer, layer, l0 in (("gemma-2-2b", "adam", 25, 55), ("gemma-2-9b", "rmsprop", 41, 52)):
        for method, alpha, beta, gamma in (
            ("dpo", None, 0.1, None), ("tdpo1", None, 0.1, None), ("tdpo2", 0.5, 0.1, None),
            ("simpo", None, 2.0, 0.5), ("fpo", 0.5, 0.1, None),
        ):  # fmt: skip
            c = settings.parse_args(["--preset", preset, "--method", method])
            assert (c.alpha, c.beta, c.gamma) == (alpha, beta, gamma), method
            found = (c.lr, c.warmup_steps, c.schedule, c.batch_size, c.epochs, c.optimizer)
            assert found == (5e-7, 150, "constant", 32, 1, optimizer)
            assert (c.sae_width, c.k, c.sae_layer, c.sae_l0) == ("16k", 50, [layer], [l0])
            assert (c.max_length, c.max_prompt_length, c.max_grad_norm) == (2048, 1024, 10.0)
            assert c.adam_beta2 == 0.999 and c.activation_checkpointing and c.feature_scale == "none"
    assert "gemma-scope-9b-pt-res" in c.sae


@pytest.mark.parametrize(
    ("size", "layers", "width", "rule"), [("1.7B", 28, "W32K", "adam"), ("8B", 36, "W64K", "rmsprop")]
)
def test_presets_of_qwen(size, layers, width, rule):
    """Base models, the paper's data, Qwen's own SAE of 50 features at the last layer, D without unit."""
    for method, data in (("sft", "ultrachat_200k:train_sft"), ("fpo", "ultrafeedback_binarized:train_prefs")):
        c = settings.parse_args(["--preset", f"qwen3-{size.lower()}", "--method", method])
        assert (c.model, c.dataset) == (f"Qwen/Qwen3-{size}-Base", f"HuggingFaceH4/{data}")
        assert (c.optimizer, c.eval_kl) == (rule, rule == "adam")
    assert (c.sae, c.sae_layer) == (f"Qwen/SAE-Res-Qwen3-{size}-Base-{width}-L0_50", [layers - 1])
    assert (c.sae_width, c.sae_l0, c.feature_scale, c.alpha, c.beta) == ("auto", ["auto"], "rms", 1e4, 0.1)


def test_help_shows_the_real_defaults(capsys):
    """Of the preset and the method, each flag with its source."""
    with pytest.raises(SystemExit):
        settings.parse_args(["--preset", "gemma-2-9b", "--method", "simpo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    clip = "gradient clip (experiments); 0: none (default: 10.0)"
    assert all(part in text for part in (clip, "β (default: 2.0)", "[41]", "rmsprop"))


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    for tracker, packages in (("tensorboard", "tensorboard"), ("wandb", "wandb tensorboard")):
        with pytest.raises(UserError, match=f"--report_to {tracker}: pip install {packages}$"):
            settings.parse_args(["--report_to", tracker])


def test_where_training_starts(tmp_path, monkeypatch):
    """The SFT model where there is one, else the base model; another model's outputs carry its name."""
    monkeypatch.chdir(tmp_path)
    config = settings.parse_args(["--method", "fpo"])
    assert config.model == config.reference == "google/gemma-2-2b"
    (tmp_path / "runs/gemma-2-2b/sft/model").mkdir(parents=True)
    config = settings.parse_args(["--method", "fpo"])
    assert config.model == config.reference == "runs/gemma-2-2b/sft/model"
    assert settings.parse_args(["--method", "sft"]).model == "google/gemma-2-2b"
    assert "ultrachat" in settings.parse_args(["--method", "sft"]).dataset
    flags = "--model a/mine --sae s --dataset a.jsonl --eval_dataset b.jsonl"
    own = settings.parse_args(flags.split())
    assert (own.preset, own.out, own.cache_dir) == ("own", "runs/mine/fpo", "runs/mine/reference")
    with pytest.raises(UserError, match="--dataset: --preset own needs one"):
        settings.parse_args(["--model", "a/mine"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--lr", "nan"], "--lr nan: must be at least 0"),
        (["--lr", "-1"], "--lr -1.0"),
        (["--seed", str(2**70)], "below 2\\^32"),
        (["--steps", "1.5"], "--steps"),
        (["--method", "ppo"], "invalid choice: 'ppo' .*fpo"),
        (["--preset", "llama"], "--preset llama: one of gemma-2-2b"),
        (["--method", "dpo", "--alpha", "1"], "--alpha 1.0: --method dpo has none"),
        (["--no_such", "1"], "--no_such 1: no such flag"),
        (["--warmup_ratio", "1"], "--warmup_ratio 1.0: must be from 0 to below 1"),
        (["--max_prompt_length", "4096"], "--max_prompt_length 4096: must be below --max_length 1024"),
        (["--dtype", "float16"], "invalid choice: 'float16' .*bfloat16"),
        (["--shard", "fsdp"], "torchrun"),
        (["--out", "/proc/x"], "/proc"),
        (["--model", ""], "--model ''"),
        (["--out", "runs/toy"], "--out runs/toy: it holds --model, which the run would write over"),
        (["--reference", "./a/model", "--out", "a"], "it holds --reference"),
        (["--out", "runs/toy/model"], "--out runs/toy/model: it holds --model"),
        (["--model", "./missing"], "missing"),
        (["--dataset", "missing.jsonl"], "missing.jsonl"),
        (["--sae", "/missing"], "--sae /missing: no such file or directory"),
        (["--sae_layer", "3", "--sae_l0", "40", "50"], "--sae_l0 .*one value is needed"),
        (["--sae_l0", "77"], "no average_l0 77; it has"),
    ],
)
def test_wrong_values_end_before_a_model_is_loaded(folder, monkeypatch, flags, says):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", loaded)
    with pytest.raises(UserError, match=says) as error:
        train.main(settings.parse_args(["--preset", "toy", *flags]))
    assert "\n" not in str(error.value)
