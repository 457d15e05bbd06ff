"""The real scripts on the toy world: settings, ranks, every method, errors, and what is left at the end."""

import functools
import gc
import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    greedy,
    lines_of,
    make_lm,
    make_sae,
    plain,
    save_toy,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2ForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP

import fpo
import loading
import losses
import metrics
import offline
import runtime
import scale
import settings
import train
from data import load_pairs, load_tokenizer
from runtime import UserError
from sae import SAE, write_sae

SHORT = ["--preset", "toy", "--steps", "3", "--warmup_steps", "2", "--eval_every", "0", "--no_eval_kl"]


TRAIN = "runs/toy/train.jsonl"
NAMES = ["loss", "grad_norm", "reward_margin", "accuracy", "constraint", "mse_chosen", "mse_rejected", "lr"]


def run(*flags):
    train.main(settings.parse_args(list(map(str, flags))))


def test_two_ranks_do_what_one_does(folder, fork):
    """Two processes, small micro-batches, blocks made again, rows of the other layout: what one process does.

    Of 33 pairs: in the second of three steps there is one, and a rank has none.
    """
    flags = ["--method", "fpo", *SHORT[:-1], "--eval_every", "2", "--dataset", f"{TRAIN}:train[:33]"]
    other = ["--micro_batch_tokens", "400", "--activation_checkpointing", "--layout", "shared"]
    two = fork(folder, ROOT / "train.py", *flags, *other, "--out", "two", ranks=2)
    run(*flags, "--layout", "separate", "--out", "one")
    out = two.finish()
    two, one = lines_of("two"), lines_of("one")
    assert [line["step"] for line in two] == [1, 2, 3] and "eval_accuracy" in two[1]
    for a, b in zip(two, one, strict=True):
        for name in NAMES:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), name
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    a, b = (load_file(folder / run / "model/model.safetensors") for run in ("two", "one"))
    lr = two[-1]["lr"]
    assert max((a[name] - b[name]).abs().max() for name in a) < lr, "3 steps move a weight by up to 3 lr"
    # What is left: scores, the next command, the settings.
    assert "kl_rejected" in out and "eval_diversity.py --model two/model" in out and "audit passed" in out
    assert out.count("audit passed") == 1 and "Traceback" not in out
    config = json.loads((folder / "two/config.json").read_text())
    assert config["alpha"] == 0.5 and config["audit"]["difference"] < 1e-4
    scores = json.loads((folder / "two/scores.json").read_text())
    assert scores["before"]["reward_accuracy"] == 0.5 and scores["after"]["kl_rejected"] > 0


LEAVES = """
import gc
import torch
import scale
import train

real = torch.distributed.destroy_process_group

def destroy():
    wrappers = [x for x in gc.get_objects() if type(x).__name__ == "DistributedDataParallel"]
    print(f"{len(wrappers)} wrappers are left")
    real()

torch.distributed.destroy_process_group = destroy
train.main()
"""


def test_nothing_holds_the_ranks_group_when_it_ends(folder, fork):
    """DDP's wrapper, if it goes last, can hang: it waits, with Python's lock, for a thread that wants it."""
    out = fork(folder, "-c", LEAVES, "--method", "dpo", *SHORT, ranks=2).finish()
    assert out.count("0 wrappers are left") == 2


@pytest.mark.parametrize("method", ["fpo", pytest.param("tdpo2", marks=pytest.mark.slow)])
def test_fsdp_trains_what_one_process_trains(folder, fork, method):
    """Weights, or weights and the held reference, shared out over two ranks: the same losses, gradients."""
    flags = ["--preset", "toy", "--method", method, "--steps", "3", "--eval_every", "0", "--no_eval_kl"]
    shared = ["--shard", "fsdp", "--activation_checkpointing", "--out", "shared"]
    fork(folder, ROOT / "train.py", *flags, *shared, ranks=2).finish()
    run(*flags, "--out", "alone")
    for a, b in zip(lines_of("shared"), lines_of("alone"), strict=True):
        for name in ("loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)
    a, b = (load_file(folder / run / "model/model.safetensors") for run in ("shared", "alone"))
    assert a.keys() == b.keys() and max((a[name] - b[name]).abs().max() for name in a) < 3e-4


def test_flops_of_a_step_by_hand(monkeypatch):
    """6 a weight of the layers and token, 6 a weight of the head and target; embeddings are looked up."""
    tied, untied = (make_lm(tie_word_embeddings=tie) for tie in (True, False))
    # Of 4 layers: q, o 32 × 32, k, v 32 × 16, three 32 × 48, four norms; and the last norm.
    body = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 4 * 32) + 32
    for lm in (tied, untied):
        assert metrics.step_flops(lm, 100, 10) == 6 * (body * 100 + 97 * 32 * 10)
    assert metrics.peak_flops(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert metrics.peak_flops(torch.device("cuda")) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    assert metrics.peak_flops(torch.device("cuda")) is None


def test_advice_by_hand():
    """The α at which the constraint equals the margin; or the rounding that outweighs it; or nothing."""
    config = settings.parse_args(["--alpha", "0.5", "--beta", "0.1"])
    for constraint, margin, floor, says in (
        (0.08, 0.02, 1e-6, "4 × the reward margin: --alpha 0.1 "), (0.001, 0.01, 0.4, "a constraint of 0.02"),
    ):  # fmt: skip
        line = {"constraint_size": constraint, "margin_size": margin}
        assert says in train.advice(line, config, floor)
    assert train.advice({"constraint_size": 0.01, "margin_size": 0.02}, config, 1e-6) is None
    config.alpha = 0.0  # no constraint, so nothing to advise
    assert train.advice({"constraint_size": 0.0, "margin_size": 1e-9}, config, 1e-2) is None


def test_methods_share_a_cache(folder):
    """FPO's own lr, α and k change nothing in DPO's: no shard is written again. Both start at ln 2."""

    def shards():
        found = (folder / "runs/toy/reference").rglob("shard_*")
        return {path: path.stat().st_mtime_ns for path in found}

    same = [*SHORT, "--dataset", f"{TRAIN}:train[:32]"]
    run("--method", "dpo", *same)
    made = shards()
    run("--method", "fpo", *same, "--lr", "2e-3", "--alpha", "1", "--k", "20")
    assert shards() == made and len(made) == 4  # with notes, of training and held-out pairs
    for method in ("dpo", "fpo"):
        assert lines_of(f"runs/toy/{method}")[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)


def test_several_layers_of_saes(folder):
    """--sae_layer 1 3: D_FPO is the mean of both, each by its own SAE, of the final model (Table 7)."""
    saes = [make_sae(seed, d=64, m=96) for seed in (1, 3)]
    for layer, sae in zip((1, 3), saes, strict=True):
        write_sae(folder / "saes", dict(sae.named_buffers()), layer, "res", 20)
    layers = ["--sae", "saes", "--sae_width", "96", "--sae_layer", "1", "3", "--out", "both", "--lr", "1e-3"]
    run("--method", "fpo", *FEW, *layers)
    load = functools.partial(Gemma2ForCausalLM.from_pretrained, attn_implementation="eager")
    pairs = load_pairs("runs/toy/test.jsonl:train[:12]", load_tokenizer("runs/toy/model"))
    with torch.no_grad():
        x = plain(load("both/model"), load("runs/toy/model"), saes, (1, 3), pairs)
    D = [losses.feature_mse(x[f"features{s}"], x[f"ref_features{s}"], k=50).chunk(2) for s in (0, 1)]
    after = json.loads((folder / "both/scores.json").read_text())["after"]
    for i, side in enumerate(("chosen", "rejected")):
        one, other = (d[i].mean().item() for d in D)
        assert one > 0 and abs(one - other) > 0.1 * one, "the mean of both is neither"
        assert after[f"mse_{side}"] == pytest.approx((one + other) / 2, rel=1e-3)


def test_trackers_get_the_numbers_of_metrics_jsonl(folder, monkeypatch):
    """Each line's, and the last scores; a resumed run goes on in the same place, after its state's step."""
    writers, runs = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            writers.append(self)
            self.folder, self.purge_step, self.drawn = folder, purge_step, []

        def add_scalar(self, name, value, step):
            self.drawn.append((step, name, value))

    def start(*flags):
        with monkeypatch.context() as patch:  # both are said to be installed
            patch.setattr(settings.importlib.util, "find_spec", lambda name: name)
            config = settings.parse_args(["--report_to", "wandb", *FEW, "--save_every", "2", *flags])
        train.main(config)
        return writers[-1]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: runs.append(options)))
    for flags, steps in (([], [1, 2, 3]), (["--resume"], [3])):
        writer, lines = start(*flags), lines_of("runs/toy/fpo")
        after = json.loads((folder / "runs/toy/fpo/scores.json").read_text())["after"]
        expected = [
            (line["step"], name, x) for line in lines if line["step"] in steps for name, x in line.items()
        ]
        assert writer.drawn == expected + [(3, f"eval_{name}", x) for name, x in after.items()]
        assert writer.purge_step == steps[0] and str(writer.folder) == "runs/toy/fpo/tensorboard"
    assert runs[0] == runs[1] | {"config": runs[0]["config"]} and runs[0]["name"] == "runs/toy/fpo"
    start()
    assert runs[2] == runs[0] | {"id": runs[2]["id"]} and runs[2]["id"] != runs[0]["id"], "its own curve"


def test_saving_cannot_fail_at_the_end(folder, capsys):
    """A base model's generation config is invalid and lacks the turn's end: it is written anew."""
    subprocess.run(["cp", "-rL", folder / "runs/toy/model", folder / "base"], check=True)
    path = folder / "base/generation_config.json"
    broken = json.loads(path.read_text()) | {"eos_token_id": [1, 5], "temperature": 0.6, "do_sample": False}
    path.write_text(json.dumps(broken))
    run("--method", "sft", *SHORT, "--steps", "1", "--model", "./base", "--out", "sft")
    saved = json.loads((folder / "sft/model/generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 5, 107] and "temperature" not in saved
    assert "pairs; chat template: Gemma's turns, an answer ends with <end_of_turn>" in capsys.readouterr().out


def test_a_loss_and_an_encoder_of_ones_own(folder):
    """An experiment's loss function and encoder: D is the mean squared change of the pooled states."""
    seen = []

    one, zero = torch.eye(64), torch.zeros(64)  # without a threshold its features are the states themselves
    identity = SAE(one, zero, one, zero, zero - torch.inf)

    def loss_function(method, policy, reference, *, beta, alpha, **options):
        D = (policy.features[0] - reference.features[0]).square().mean(-1)
        seen.append((policy.features[0].min().item(), D.max().item()))
        return fpo.method_loss("dpo", policy, reference, beta=beta)[0] + D.chunk(2)[0], {}

    config = settings.parse_args(["--method", "fpo", *SHORT])
    train.main(config, loss_function=loss_function, encoders=[identity])
    assert seen[0][0] < 0 and seen[0][1] < 1e-8 < seen[-1][1]


# ---- what weights and losses can't show: see test_minimal.py for those
FEW = [*SHORT, "--dataset", f"{TRAIN}:train[:8]", "--eval_dataset", "runs/toy/test.jsonl:train[:12]"]


def test_blocks_are_made_again_in_the_backward(folder, monkeypatch):
    """With --activation_checkpointing each of 4 blocks runs once more in every backward, and only there."""
    ran = []
    forward = Gemma2MLP.forward
    monkeypatch.setattr(Gemma2MLP, "forward", lambda self, x: ran.append(self.training) or forward(self, x))
    counts = {}
    for flag in ("--no_activation_checkpointing", "--activation_checkpointing"):
        run("--method", "simpo", *FEW, flag, "--out", flag[2:])
        counts[flag] = len(ran)
        ran.clear()
    without, with_it = counts.values()
    # 4 blocks; a backward to see what has a gradient, one thrown away, 3 steps
    assert with_it - without == 4 * (1 + 1 + 3)
    a, b = (lines_of(flag[2:]) for flag in counts)
    assert [line["grad_norm"] for line in a] == pytest.approx([line["grad_norm"] for line in b], rel=1e-5)


def test_memory_is_tried_before_the_first_step(folder, monkeypatch):
    """By the largest micro-batch of the run, beside the optimizer's states: a full card is told at once."""
    made, taken = [], []  # the optimizer; of each stream its groups, and whether there were states by then
    make, stream = scale.make_optimizer, train.stream
    monkeypatch.setattr(scale, "make_optimizer", lambda *a, **kw: made.append(make(*a, **kw)) or made[0])

    def noted(pairs, groups, **options):
        """train.py's stream; scores have their own."""
        taken.append(([int(pairs.sizes[group].sum()) for group in groups], len(made[0].state)))
        return stream(pairs, groups, **options)

    monkeypatch.setattr(train, "stream", noted)
    run("--method", "fpo", *FEW, "--micro_batch_tokens", "400")
    (trial, states), (steps, _) = taken
    assert trial == [max(steps)] and min(steps) < max(steps)
    assert states == len(made[0].param_groups[0]["params"])


def test_scores_on_the_way_are_those_of_the_model_then(folder):
    """`eval_*` of step 2 is what a run of 2 steps ends with, column by column; other lines have none."""
    every = [*FEW[:-4], "--eval_every", "2", *FEW[-4:], "--lr", "1e-3"]
    run("--method", "fpo", *every, "--eval_kl", "--out", "three")
    run("--method", "fpo", *every, "--eval_kl", "--steps", "2", "--out", "two")
    ended = json.loads((folder / "two/scores.json").read_text())["after"]
    first, second, third = lines_of("three")
    assert second == second | {f"eval_{name}": pytest.approx(x, rel=1e-6) for name, x in ended.items()}
    assert {"accuracy", "kl_rejected", "mse_chosen", "nll_chosen"} < ended.keys()
    assert all(ended[name] > 0 for name in ("kl_rejected", "mse_chosen", "nll_chosen"))
    assert not any(name.startswith("eval_") for line in (first, third) for name in line)


def test_advice_is_printed_at_step_10(folder, capsys):
    """Once, with the numbers of that step, where α is far too large."""
    run("--method", "fpo", *FEW, "--steps", "11", "--alpha", "1e5", "--lr", "1e-3", "--out", "far")
    line = lines_of("far")[9]
    times = line["constraint_size"] / line["margin_size"]
    assert times > 1 and line["constraint_share"] == pytest.approx(times / (1 + times))
    says = f"the constraint is {times:.2g} × the reward margin: --alpha {1e5 / times:.1g} would"
    printed = capsys.readouterr().out
    assert f"step 10: {says}" in printed and printed.count("would balance them") == 1


def answer_of(name, prompt):
    """What a model answers to a user, greedily, up to 48 tokens."""
    tokenizer, lm = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return tokenizer.decode(greedy(lm, ids, 48, stops=(1, 107)), skip_special_tokens=True)


def test_what_it_answers_before_and_after(folder, capsys):
    """Two held-out prompts, answered by the model that training starts from and by the one it leaves."""
    run("--method", "dpo", *SHORT, "--lr", "5e-3", "--out", "run")
    samples, printed = json.loads((folder / "run/samples.json").read_text()), capsys.readouterr().out
    lines = (folder / "runs/toy/test.jsonl").read_text().splitlines()
    prompts = list(dict.fromkeys(json.loads(line)["prompt"] for line in lines))[:2]
    for prompt, sample in zip(prompts, samples, strict=True):
        assert prompt in sample["prompt"] and sample["before"] != sample["after"]
        assert sample["before"] == answer_of("runs/toy/model", prompt)
        assert sample["after"] == answer_of("run/model", prompt)
        assert all(f"{name + ':':<8}{text!r}" in printed for name, text in sample.items())
    run("--method", "dpo", *SHORT, "--steps", "1", "--show", "0", "--out", "none")
    assert json.loads((folder / "none/samples.json").read_text()) == []


def test_learning_rate():
    """By hand: linear over 4 steps, then constant; or a cosine over the remaining 6 to 0."""
    config = settings.parse_args(["--lr", "1", "--warmup_steps", "4"])
    assert [train.learning_rate(s, 10, config) for s in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    own = ["--model", "m", "--sae", "s", "--dataset", "a", "--eval_dataset", "b", "--lr", "1"]  # ratio 0.1
    rates = [train.learning_rate(step, 100, settings.parse_args(own)) for step in (0, 8, 9)]
    assert rates == pytest.approx([0.1, 0.9, 1])
    assert train.learning_rate(0, 100, settings.parse_args([*own, "--warmup_steps", "4"])) == 0.25
    with pytest.raises(UserError, match="--warmup_steps 4: or --warmup_ratio, not both"):
        settings.parse_args([*own, "--warmup_steps", "4", "--warmup_ratio", "0.2"])
    config = settings.parse_args(["--lr", "1", "--warmup_ratio", "0.4", "--schedule", "cosine"])
    assert train.learning_rate(0, 10, config) == 0.25
    assert train.learning_rate(4, 10, config) == 1.0
    assert train.learning_rate(7, 10, config) == pytest.approx(0.5)


def test_a_warm_up_longer_than_the_run_is_told(folder, capsys):
    """150 steps of it in a run of 3: at the last 3/150 of the rate; 3 are enough, and nothing is said."""
    run("--method", "dpo", *FEW, "--lr", "1e-4", "--warmup_steps", "150")
    said = "the warm-up is longer than the 3 steps: the learning rate reaches only 2e-06"
    assert said in capsys.readouterr().out and lines_of("runs/toy/dpo")[-1]["lr"] == pytest.approx(2e-6)
    run("--method", "dpo", *FEW, "--warmup_steps", "3")
    assert "warm-up" not in capsys.readouterr().out


def test_wandb_without_a_key_is_told_before_any_work(folder, monkeypatch):
    """Phase 1 has not begun; the run that was in the folder is still there."""

    def init(**about):
        raise RuntimeError("api_key not configured\n(no-tty)")

    run("--method", "dpo", *FEW)
    before = sorted(path.name for path in Path("runs/toy/dpo").iterdir())
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=SimpleNamespace()))
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(offline, "build_reference", None)
    with pytest.raises(UserError, match=r"--report_to wandb: api_key not configured \(no-tty\)$"):
        run("--method", "dpo", *FEW, "--report_to", "wandb")
    assert sorted({path.name for path in Path("runs/toy/dpo").iterdir()} - {"model.tmp"}) == before


def test_a_processor_s_files_stay_with_the_model(folder):
    """Those that a model with images has, and no other."""
    save_toy(folder, "sees")
    (folder / "sees/preprocessor_config.json").write_text('{"image_processor_type": "X"}')
    (folder / "sees/processor_config.json").write_text('{"processor_class": "Y"}')
    run("--method", "dpo", *FEW, "--model", "./sees", "--out", "a")
    there = [name for name in train.PROCESSOR_FILES if Path("a/model", name).exists()]
    assert there == ["processor_config.json", "preprocessor_config.json"]
    assert all(Path("a/model", name).read_text() == Path("sees", name).read_text() for name in there)


# ---- models that are not understood, or that change


def test_too_little_memory_in_the_loop_is_told(folder, monkeypatch, capsys):
    """Wherever it is met: in one line that says what takes less, with status 2."""

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.91 GiB.")

    monkeypatch.setattr(train, "step_sums", full)
    with pytest.raises(SystemExit) as ended:
        runtime.run_script(lambda: run("--method", "dpo", *SHORT))
    (said,) = re.findall(r"error: (.*)", capsys.readouterr().err)
    assert ended.value.code == 2 and "Tried to allocate 3.91 GiB" in said and "--micro_batch_tokens" in said


@pytest.mark.parametrize("compiles", [True, False])
def test_a_reference_leaves_no_weights_and_is_compiled_once(folder, monkeypatch, compiles):
    """After Phase 1 and each evaluation none of it is left, though Python's collector sleeps: with compiled
    layers, which are cycles, and are a card's alone, and without. No evaluation after the first compiles or
    hashes anything.
    """
    compiled, models, alive, hashed, at = [], [], [], [], []

    def watch(module, name, note):
        """After each call of a function: note what it gave, was called with, and how much it compiled."""
        real = getattr(module, name)

        def watched(*args, **options):
            already = len(compiled)
            given = real(*args, **options)
            note(given, args, len(compiled) - already)
            return given

        monkeypatch.setattr(module, name, watched)

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def compile_layers(lm, *args):
        for layer in lm.model.layers:
            layer.compile(backend=backend, dynamic=True)

    def note_alive(*_):
        alive.append([any(module() is not None for module in modules) for modules in models])

    if compiles:
        monkeypatch.setattr(loading, "compile_layers", compile_layers)
        monkeypatch.setattr(train, "release", lambda _: loading.release(torch.device("cuda")))
    else:
        monkeypatch.setattr(gc, "collect", lambda: pytest.fail("a second of each toy run"))
    watch(train, "load_policy", lambda made, *_: models.append([weakref.ref(m) for m in made[0].modules()]))
    watch(offline, "digest", lambda _, args, __: hashed.append(len(args[0])))
    watch(metrics, "score_pairs", lambda _, args, made: at.append((made, len(args[0].reference))))
    watch(train, "step_sums", note_alive)
    shutil.copytree(folder / "runs/toy/model", folder / "ref")
    gc.disable()
    try:
        run("--method", "fpo", *SHORT[:-3], "--eval_every", "1", "--reference", "./ref")
    finally:
        gc.enable()
    assert len(at) == 4 and (at[0][0] > 0) == compiles
    assert at[1:] == [(0, 1)] * 3  # compiled, references held
    # The policy lives; the reference of Phase 1 and those of the evaluations do not.
    assert alive[0] == [True, False, False] and alive[-1] == [True, False, False, False, False]
    assert len([n for n in hashed if n > 10]) == 2  # of the model and of the reference, once each


def test_a_pad_token_beyond_the_vocabulary(folder):
    """`[PAD]` added to the tokenizer alone: rows, and what is sampled, are padded by a token that exists."""
    save_toy(folder, "padded")
    tokenizer = AutoTokenizer.from_pretrained(folder / "padded")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder / "padded")
    run(*SHORT, "--method", "sft", "--steps", "1", "--model", "./padded", "--out", "sft")
    lm = Gemma2ForCausalLM.from_pretrained(folder / "sft/model")
    assert tokenizer.pad_token_id == lm.config.vocab_size
    follows = lm(torch.tensor([[2, token] for token in range(5, 60)])).logits[:, -1].argmax(-1).tolist()
    stop, other = follows[0], next(i for i, token in enumerate(follows) if token != follows[0])
    # The first row ends at once, and is padded while the second goes on.
    lm.generation_config.eos_token_id = stop
    made = lm.generate(torch.tensor([[2, 5], [2, 5 + other]]), max_new_tokens=4, do_sample=False)
    assert made.shape[1] > 3 and made[0, 2] == stop and made[0, -1] < lm.config.vocab_size


def test_a_model_saved_in_another_dtype(folder):
    """bf16 weights train in float32 as the same numbers in a float32 file do; float32 ones train in bf16."""
    save_toy(folder, "bf16", torch.bfloat16)
    Gemma2ForCausalLM.from_pretrained(folder / "bf16", dtype=torch.float32).save_pretrained(folder / "wide")
    AutoTokenizer.from_pretrained(folder / "bf16").save_pretrained(folder / "wide")
    for name in ("bf16", "wide"):
        run(*SHORT, "--steps", "2", "--model", f"./{name}", "--out", f"{name}_run")
    assert [a["loss"] for a in lines_of("bf16_run")] == [a["loss"] for a in lines_of("wide_run")]
    run(*SHORT, "--steps", "2", "--dtype", "bfloat16", "--out", "narrow")
    assert {t.dtype for t in load_file("narrow/model/model.safetensors").values()} == {torch.bfloat16}
    assert lines_of("narrow")[0]["loss"] == pytest.approx(0.6931472, abs=1e-3)
