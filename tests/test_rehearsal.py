"""The README's Gemma commands, and those for Qwen3, word for word, where the hub's names are local copies.

transformers, datasets and our SAE loader take a local folder OWNER/NAME for the hub's repo of that name. So
the commands run as a user types them, on a Gemma-2 of as many layers but 16 wide, Gemma Scope's layout with
16,384 features, and conversations and pairs in the hub's parquet files, columns and splits.
"""

import json
import math
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, lines_of
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import toy
from sae import SiteHook

SECTION = (ROOT / "README.md").read_text().split("### Gemma-2 on 4 × H100")[1].split("\n###")[0]
COMMANDS = [
    line.split(" #")[0].strip() for line in re.search(r"```bash\n(.*?)```", SECTION, re.S)[1].splitlines()
]
LAYERS, L0 = {"gemma-2-2b": 26, "gemma-2-9b": 42}, {"gemma-2-2b": 55, "gemma-2-9b": 52}
WIDTH, FEATURES = 16, 16384
WORDS = ["sea", "hill", "wren", "oak", "stone", "river", "cloud", "bread", "lamp", "song", "door", "glass"]


# ---------------------------------------------------------------------------- the hub's folders
def text(rng, words=None):
    """Words, few of them as a rule and many of them now and then (a Pareto tail), if not so many."""
    return " ".join(rng.choices(WORDS, k=words or min(60, int(3 * rng.paretovariate(1.1)))))


def talk(rng, turns, words=None):
    """A conversation of so many messages, user and assistant in turn; the last of `words` words."""
    roles = ("user", "assistant")
    said = [text(rng, words if i == turns - 1 else None) for i in range(turns)]
    return [{"content": content, "role": roles[i % 2]} for i, content in enumerate(said)]


def conversation(rng, words=None):
    """A record of UltraChat-200k."""
    messages = talk(rng, 2 * rng.randint(1, 2), words)
    return {
        "prompt": messages[0]["content"],
        "prompt_id": f"{rng.getrandbits(256):064x}",
        "messages": messages,
    }


def preference(rng, words=None):
    """A record of UltraFeedback, binarised: the prompt stands in both answers' messages too."""
    chosen = talk(rng, 2, words)
    rejected = [chosen[0], {"content": text(rng) + " no", "role": "assistant"}]
    record = {"prompt": chosen[0]["content"], "prompt_id": f"{rng.getrandbits(256):064x}"}
    record |= {"chosen": chosen, "rejected": rejected, "messages": chosen}
    return record | {"score_chosen": 8.5, "score_rejected": rng.choice([1.0, 7.0])}


def write_data(folder, make, splits, longest):
    """A data set of the hub: data/SPLIT-00000-of-00001-….parquet, and which they are in README's yaml."""
    (folder / "data").mkdir(parents=True)
    yaml = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split, n in splits.items():
        rng = random.Random(f"{folder.name} {split}")
        records = [make(rng) for _ in range(n)]
        if split.startswith("train") and longest:
            records[n // 2] = make(rng, longest)
        name = f"{split}-00000-of-00001-{rng.getrandbits(64):016x}.parquet"
        pq.write_table(pa.Table.from_pylist(records), folder / "data" / name)
        yaml += [f"  - split: {split}", f"    path: data/{split}-*"]
    (folder / "README.md").write_text("\n".join([*yaml, "---", "# A data set", ""]))


def write_model(folder, layers):
    """A base model as Google publishes it: shards, a tokenizer without chat template, float32."""
    torch.manual_seed(0)
    tokenizer = toy.make_tokenizer([" ".join([*WORDS, *(f" {word}" for word in WORDS)]), " no"])
    tokenizer.chat_template = None
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
        initializer_range=0.1, cache_implementation="hybrid",
    )  # fmt: skip
    lm = Gemma2ForCausalLM(config)
    lm.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    return lm, tokenizer


@torch.no_grad()
def write_saes(folder, lm, tokenizer, l0):
    """Gemma Scope's repo: the SAE of the last layer with this L0, and others, which must not be read."""
    last, g = lm.config.num_hidden_layers - 1, torch.Generator().manual_seed(0)
    W_enc = torch.randn(WIDTH, FEATURES, generator=g)
    with SiteHook(lm, last) as hook:
        lm(**tokenizer(text(random.Random(0), 100), return_tensors="pt"))
    z = hook.value[0, 1:] @ W_enc  # (tokens, m): a threshold that so many of a token's features pass
    threshold = z.flatten().topk(l0 * len(z)).values[-1].clamp(min=0)
    arrays = {"W_enc": W_enc, "b_enc": torch.zeros(FEATURES), "W_dec": W_enc.T / WIDTH}
    arrays |= {"b_dec": torch.zeros(WIDTH), "threshold": threshold.expand(FEATURES)}
    chosen = folder / f"layer_{last}/width_16k/average_l0_{l0}"
    chosen.mkdir(parents=True)
    np.savez(chosen / "params.npz", **{name: array.numpy() for name, array in arrays.items()})
    for other in (f"layer_{last}/width_16k/average_l0_100", f"layer_{last}/width_65k/average_l0_{l0}",
                  f"layer_{last - 1}/width_16k/average_l0_{l0}"):  # fmt: skip
        (folder / other).mkdir(parents=True)
        (folder / other / "params.npz").write_bytes(b"another SAE")


def make_hub(folder, preset, longest=None):
    """Everything that the commands of a preset read, and the scripts that they name, in `folder`.

    longest: words of one answer among the training data's; none: all are short.
    """
    # Two steps of 32; in the second there are fewer.
    chats, pairs = {"train_sft": 40, "test_sft": 12}, {"train_prefs": 40, "test_prefs": 12}
    write_data(folder / "HuggingFaceH4/ultrachat_200k", conversation, chats, longest)
    write_data(folder / "HuggingFaceH4/ultrafeedback_binarized", preference, pairs, longest)
    lm, tokenizer = write_model(folder / "google" / preset, LAYERS[preset])
    scope = preset.replace("gemma-2-", "gemma-scope-") + "-pt-res"
    write_saes(folder / "google" / scope, lm, tokenizer, L0[preset])
    for script in ROOT.glob("*.py"):
        (folder / script.name).symlink_to(script)


# ---------------------------------------------------------------------------- the commands
def begin(command, folder):
    """A command in a shell, as typed; PET_MASTER_PORT is torchrun's --master-port, one for each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        shlex.split(command), cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PATH": path, "PET_MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def end(process, status=0):
    """What it has written, once it ends with this status."""
    out, _ = process.communicate(timeout=600)
    assert process.returncode == status, out[-5000:]
    return out


def begin_readme(method, preset, folder, ranks, more=""):
    """The README's command for a method and a preset; with another number of ranks where asked."""
    named = f"--method {method}" + ("" if preset == "gemma-2-2b" else f" --preset {preset}")
    (command,) = [command for command in COMMANDS if command.endswith(f" train.py {named}")]
    assert "--nproc_per_node 4 " in command
    return begin(command.replace("--nproc_per_node 4 ", f"--nproc_per_node {ranks} ") + more, folder)


def readme(*args):
    """What a README's command has written when it has ended well."""
    return end(begin_readme(*args))


def nll_by_hand(folder, preset):
    """What SFT starts from: of each held-out conversation -log π of its answers a token, in plain form."""
    lm = AutoModelForCausalLM.from_pretrained(folder / "google" / preset, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder / "google" / preset)
    (path,) = (folder / "HuggingFaceH4/ultrachat_200k/data").glob("test_sft-*")
    means = []
    for record in pq.read_table(path).to_pylist():
        ids, learnt = [2], [False]
        for message in record["messages"]:
            name = {"user": "user", "assistant": "model"}[message["role"]]
            said = f"{message['content']}<end_of_turn>"
            for part, is_answer in (
                (f"<start_of_turn>{name}\n", False),
                (said, name == "model"),
                ("\n", False),
            ):
                new = tokenizer(part, add_special_tokens=False).input_ids
                ids, learnt = ids + new, learnt + [is_answer] * len(new)
        with torch.no_grad():
            log_pi = lm(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        log_pi = log_pi.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        means.append(-log_pi[torch.tensor(learnt[1:])].mean())
    return torch.stack(means).mean().item()


def moved_norms(folder):
    """Largest value among a model's norm weights, which are 0 in the base model."""
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    return max(w.abs().max().item() for file in files for name, w in file.items() if "norm" in name)


@pytest.mark.parametrize(
    "preset, ranks, longest",
    [
        ("gemma-2-2b", 2, None),
        pytest.param("gemma-2-2b", 4, 2500, marks=pytest.mark.slow),
        pytest.param("gemma-2-9b", 2, None, marks=pytest.mark.slow),
        pytest.param("gemma-2-9b", 4, None, marks=pytest.mark.slow),
    ],
)
def test_sft_fpo_and_scores(tmp_path, preset, ranks, longest):
    """SFT from the base model, FPO from what SFT left, and the command that FPO prints at its end."""
    make_hub(tmp_path, preset, longest)
    # ---- SFT, on every answer of the conversations
    said = readme("sft", preset, tmp_path, ranks)
    assert f"starting from google/{preset}" in said and "audit passed" in said and "Warning" not in said
    assert ("1 × response cut" in said) == bool(longest)
    run = tmp_path / f"runs/{preset}/sft"
    before = json.loads((run / "scores.json").read_text())["before"]
    assert before["nll_chosen"] == pytest.approx(nll_by_hand(tmp_path, preset), rel=1e-5)
    assert [line["step"] for line in lines_of(run)] == [1, 2]
    # At the start of its warm-up Adam moves a weight by at most lr a step, RMSprop first by 10 lr.
    lr = 5e-7 / 150
    moved = moved_norms(run / "model")
    assert 2.5 * lr < moved < 3.5 * lr if preset == "gemma-2-2b" else moved > 9 * lr

    # ---- FPO
    said = readme("fpo", preset, tmp_path, ranks)
    assert f"starting from runs/{preset}/sft/model" in said and "audit passed" in said
    run = tmp_path / f"runs/{preset}/fpo"
    first, last = lines_of(run)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["lr"] == pytest.approx(lr) and last["lr"] == pytest.approx(2 * lr)
    assert abs(first["mse_rejected"]) < 1e-9 and first["grad_norm"] > 0
    scores = json.loads((run / "scores.json").read_text())
    distances = [scores["before"][name] for name in scores["before"] if name.startswith(("kl_", "mse_"))]
    assert max(map(abs, distances)) < 1e-5 and scores["before"]["reward_accuracy"] == 0.5
    assert ("kl_rejected" in scores["after"]) == (preset == "gemma-2-2b")
    assert moved_norms(run / "model") > 0
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "sea"}], tokenize=False) == (
        "<bos><start_of_turn>user\nsea<end_of_turn>\n"
    )
    lm = AutoModelForCausalLM.from_pretrained(run / "model")
    assert lm.config.num_hidden_layers == LAYERS[preset]
    assert lm.generation_config.eos_token_id == [1, 107]

    # ---- scores
    (command,) = re.findall(r"^python eval_diversity\.py .*$", said, re.M)
    end(begin(f"{command} --samples 2 --prompts 3 --max_new_tokens 8 --json scores.json", tmp_path))
    found = json.loads((tmp_path / "scores.json").read_text())
    for name, value in scores["after"].items():
        if not name.startswith("reward_accuracy"):  # two steps of warm-up leave rewards as small as rounding
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert 0 < found["entropy"] < math.log(tokenizer.vocab_size)


@pytest.mark.slow
def test_signal_and_resume(tmp_path):
    """SIGTERM to torchrun, as a scheduler sends it: a state is left, from which --resume ends the run."""
    make_hub(tmp_path, "gemma-2-2b")
    process = begin_readme("fpo", "gemma-2-2b", tmp_path, 2, " --epochs 20")
    run = tmp_path / "runs/gemma-2-2b/fpo"
    while not lines_of(run):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "go on with --resume" in process.communicate(timeout=60)[0]
    done = len(lines_of(run))
    assert done < 40 and (run / f"state/step_{done:08d}/state.json").exists()
    readme("fpo", "gemma-2-2b", tmp_path, 2, " --epochs 20 --resume")
    assert [line["step"] for line in lines_of(run)] == [*range(1, 41)]


# ---------------------------------------------------------------------------- Qwen3, with Qwen's own SAEs
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_qwen_hub(folder, size, layers, features):
    """What the commands of a Qwen3 preset read: the data, the base model, the SAE of its last layer."""
    for name, make, splits in (
        ("ultrachat_200k", conversation, ("train_sft", "test_sft")),
        ("ultrafeedback_binarized", preference, ("train_prefs", "test_prefs")),
    ):
        write_data(folder / "HuggingFaceH4" / name, make, dict(zip(splits, (40, 12), strict=True)), None)
    tokenizer = toy.make_tokenizer([" ".join([*WORDS, *(f" {word}" for word in WORDS)]), " no"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.1,
        tie_word_embeddings=size == "1.7B",
    )  # fmt: skip
    for part in (Qwen3ForCausalLM(config), tokenizer):
        part.save_pretrained(folder / f"Qwen/Qwen3-{size}-Base")
    # Qwen-Scope's files: no layer but the last may be read.
    saes = folder / f"Qwen/SAE-Res-Qwen3-{size}-Base-W{features // 1024}K-L0_50"
    saes.mkdir(parents=True)
    W_enc = torch.randn(features, WIDTH)
    arrays = {"W_enc": W_enc, "b_enc": torch.zeros(features), "b_dec": torch.zeros(WIDTH)}
    torch.save(arrays | {"W_dec": W_enc.T / WIDTH}, saes / f"layer{layers - 1}.sae.pt")
    for layer in range(layers - 1):
        (saes / f"layer{layer}.sae.pt").write_bytes(b"another SAE")
    for script in ROOT.glob("*.py"):
        (folder / script.name).symlink_to(script)


@pytest.mark.slow
@pytest.mark.parametrize("size, layers, features", [("1.7B", 28, 32768), ("8B", 36, 65536)])
def test_qwen3(tmp_path, size, layers, features):
    """SFT from the base model, FPO from what it left, with the 50 largest features of the last layer."""
    make_qwen_hub(tmp_path, size, layers, features)
    preset = f"qwen3-{size.lower()}"
    page = (ROOT / "docs/saes.md").read_text()
    commands = [line.split(" #")[0].strip() for line in re.findall(rf"^.*--preset {preset}\b.*$", page, re.M)]
    sft, fpo = (command.replace("--nproc_per_node 4 ", "--nproc_per_node 2 ") for command in commands)
    said = end(begin(sft, tmp_path))
    assert f"starting from Qwen/Qwen3-{size}-Base" in said and "audit passed" in said
    said = end(begin(fpo, tmp_path))
    assert f"SAE: layer {layers - 1}, res, {features} features" in said and "audit passed" in said
    run = tmp_path / f"runs/{preset}/fpo"
    assert json.loads((run / "config.json").read_text())["sae_layer"] == [layers - 1]
    first, last = lines_of(run)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(first["mse_rejected"]) < 1e-7
    assert last["grad_norm"] > 0 and last["lr"] == pytest.approx(5e-7)  # a tenth of two steps is no warm-up
    scores = json.loads((run / "scores.json").read_text())
    assert ("kl_rejected" in scores["after"]) == (size == "1.7B") and scores["after"]["mse_rejected"] >= 0
    assert AutoModelForCausalLM.from_pretrained(run / "model").config.num_hidden_layers == layers
    (command,) = re.findall(r"^python eval_diversity\.py .*$", said, re.M)
    end(begin(f"{command} --samples 2 --prompts 3 --max_new_tokens 8 --json scores.json", tmp_path))
    found = json.loads((tmp_path / "scores.json").read_text())
    for name, value in scores["after"].items():
        if not name.startswith("reward_accuracy"):
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
