"""What the tests share: random models, SAEs, pairs; their maths in plain form; scripts; the toy world."""

import contextlib
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

# Two processes share out the tests (pyproject.toml): one thread each is fastest.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma2ForCausalLM

import losses
import offline
from data import Pairs
from sae import SAE

ROOT = Path(__file__).parent.parent
V, D, M = 97, 32, 160


def make_lm(seed=0, kind=Gemma2ForCausalLM, **changes):
    """A random model; a Gemma-2's sliding window (9) is shorter than most rows."""
    torch.manual_seed(seed)
    gemma = {"query_pre_attn_scalar": 8, "sliding_window": 9} if kind is Gemma2ForCausalLM else {}
    changes = {"attn_implementation": "eager"} | gemma | changes
    config = kind.config_class(
        vocab_size=V, hidden_size=D, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, **changes,
    )  # fmt: skip
    lm = kind(config)
    with torch.no_grad():  # wider than the default: softcaps bite, distributions differ
        for parameter in lm.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.25)
    return lm.eval()


def make_lm_with_images(seed=0):
    """A random Gemma-3 that sees images: its text model is a part of it, `model.language_model`."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = sizes | {"vocab_size": V, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 9}
    vision = sizes | {"image_size": 8, "patch_size": 4}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=1)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def nudge(lm, scale=0.02, seed=1):
    """A copy that has moved: a policy after some training."""
    torch.manual_seed(seed)
    twin = type(lm)(lm.config)
    twin.load_state_dict(lm.state_dict())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return twin.eval()


def make_sae(seed=0, d=D, m=M, k=None, low=0.0):
    """A random SAE with about a tenth of its features active on the tiny model's states.

    k: a TopK one, of which only what exceeds `low` is active: 0 is a ReLU's, -inf none at all.
    """
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    W_enc = torch.randn(d, m, generator=g) / d**0.5
    threshold = 0.5 + torch.rand(m, generator=g)
    b_enc = 0.1 * torch.randn(m, generator=g)
    threshold = threshold if k is None else torch.full((m,), low)
    return SAE(W_enc, b_enc, W_enc.T.clone(), torch.zeros(d), threshold, k)


def exact_sae(d=D):
    """An SAE without error: c = (ReLU(h), ReLU(-h)), ĥ = h; d features active at each state."""
    one, zero = torch.eye(d), torch.zeros(2 * d)
    return SAE(torch.cat([one, -one], 1), zero, torch.cat([one, -one]), torch.zeros(d), zero)


def make_pairs(n=8, seed=0, longest=14):
    """Pairs of random tokens and random lengths."""
    g = torch.Generator().manual_seed(seed)

    def text(shortest):
        size = int(torch.randint(shortest, longest, (1,), generator=g))
        return torch.randint(4, V, (size,), generator=g).tolist()

    return Pairs([([2, *text(3)], text(1), text(1)) for _ in range(n)])


# ---------------------------------------------------------------------------- the maths in plain form
def run_plainly(model, ids, layers):
    """transformers' own logits, and what each of these layers' blocks leaves (d-wide, before any norm)."""
    kept = []
    blocks = [model.model.layers[layer] for layer in layers]
    handles = [block.register_forward_hook(lambda module, args, out: kept.append(out)) for block in blocks]
    logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return logits, kept


def predicting(model, prompt, response, layers=()):
    """Of one unpadded response (n,): logits (n, V), and states (n, d) of these layers, that predict it."""
    logits, states = run_plainly(model, torch.cat([prompt, response])[None].long(), layers)
    return logits[0, len(prompt) - 1 : -1], [h[0, len(prompt) - 1 : -1] for h in states]


def greedy(lm, ids, n, stops=(1, 7)):
    """What follows some token ids, one argmax at a time: n tokens, or up to a stop token, with it."""
    said = []
    while len(said) < n and not (said and said[-1] in stops):
        with torch.no_grad():
            said.append(lm(torch.tensor([[*ids, *said]])).logits[0, -1].argmax().item())
    return said


def plain(lm, reference, saes, layers, pairs):
    """{name: (2B, …)}, chosen responses first: one unpadded response at a time, with losses.py on logits.

    `entropy` is of the positions that predict the response, `entropy_all` of all but the last.
    """
    rows = []
    for side, i in itertools.product((1, 2), range(len(pairs))):
        prompt, response = pairs[i][0].long(), pairs[i][side].long()
        ids, n = torch.cat([prompt, response])[None], len(response)
        labels = torch.cat([torch.full_like(prompt, -100), response])[None]
        (logits, states), (ref_logits, ref_states) = (run_plainly(m, ids, layers) for m in (lm, reference))
        log_p = logits[0, :-1].log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        row = {
            "logps": losses.sequence_logps(logits, labels)[0],
            "ref_logps": losses.sequence_logps(ref_logits, labels)[0],
            "kl": losses.sequential_kl(logits, ref_logits, labels),
            "lengths": torch.tensor([n]),
            "entropy": entropy[-n:].sum()[None],
            "entropy_all": entropy.sum()[None],
            "lengths_all": torch.tensor([len(entropy)]),
        }
        where = (labels != -100).roll(-1, 1)  # the positions before
        for s, sae in enumerate(saes):
            row[f"features{s}"] = losses.pool_features(sae.encode(states[s]), where)
            row[f"ref_features{s}"] = losses.pool_features(sae.encode(ref_states[s]), where)
        rows.append(row)
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture
def one_thread():
    """Sums depend on the number of threads: where bits are compared, both sides have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------- caches, scripts, the toy world
def identity_of(policy, pairs, layout="separate"):
    weights = offline.digest(policy.lm.state_dict())
    return offline.reference_identity(policy, pairs, weights=weights, arithmetic={"layout": layout})


def build(policy, pairs, folder):
    """The reference cache of a policy, as Phase 1 makes or finds it."""
    return offline.build_reference(policy, pairs, folder, identity_of(policy, pairs), layout="separate")


class Evil:
    """Unpickling it leaves a folder behind."""

    def __init__(self, path="unpickled"):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def start(folder, *words, ranks=1, options=()):
    """A process of python, as a user starts it; by torchrun where there are several ranks, or its options."""
    torchrun = ["-m", "torch.distributed.run", *(options or ["--standalone"]), "--nproc_per_node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *(torchrun if ranks > 1 or options else []), *map(str, words)], cwd=folder,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process, status=0):
    """What a process that was started writes until it ends with this status."""
    out, _ = process.communicate(timeout=240)
    assert process.returncode == status, out[-5000:]
    return out


# Loading torch, transformers and datasets is most of what a short script costs. A server loads them once, and
# processes forked from it run a script at once. Never fork pytest itself: it has threads of OpenMP, without
# which a child may hang.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["conftest", "train", "eval_diversity"])
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))  # of the server and all scripts


class Forked:
    """Processes that run one script, a rank each, as `python WORDS` or torchrun would start them.

    The ranks meet at a store that this process has, so no port can be taken. Their output goes into one file.
    """

    def __init__(self, folder, *words, ranks=1):
        self.log, self.processes = Path(folder, f"output_{time.monotonic_ns()}"), []
        self.log.touch()
        environment = dict(os.environ)
        if ranks > 1:
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
            environment |= {"WORLD_SIZE": str(ranks), "GROUP_WORLD_SIZE": "1"}
        for rank in map(str, range(ranks)):
            own = environment | ({"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {})
            # No daemon: a DataLoader starts a process of its own.
            self.processes.append(SERVER.Process(target=run, args=(folder, self.log, own, *map(str, words))))
            self.processes[-1].start()

    def running(self) -> bool:
        """Whether the processes still run. Where one failed none does: the others would wait for it."""
        codes = {process.exitcode for process in self.processes}
        if codes - {None, 0}:
            self.kill()
        return None in {process.exitcode for process in self.processes}

    def kill(self):
        """kill -9 of each process, and of those that it started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):  # it has no group yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()

    def finish(self, status=0) -> str:
        """What the processes write until the first that fails, or all, end with this status."""
        until = time.monotonic() + 240
        while self.running():
            time.sleep(0.005)
            assert time.monotonic() < until, self.log.read_text()[-5000:]
        out = self.log.read_text()
        assert self.processes[0].exitcode == status, out[-5000:]
        return out


def run(folder, log, environment, first, *rest):
    """What a forked process does: it becomes `python FIRST REST`, with one thread, in a group of its own."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    os.chdir(folder)
    os.environ.clear(), os.environ.update(environment)
    torch.set_num_threads(1)  # OMP_NUM_THREADS would come too late
    sys.argv = [first, *(rest[1:] if first in ("-c", "-m") else rest)]
    if first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        exec(rest[0], {"__name__": "__main__"})
    else:
        runpy.run_path(first, run_name="__main__")


@pytest.fixture
def fork():
    """Start Forked processes, which end with the test at the latest."""
    started = []

    def start_one(*args, **options):
        started.append(Forked(*args, **options))
        return started[-1]

    yield start_one
    for processes in started:
        processes.kill()


def lines_of(run):
    """The whole lines of a run's metrics so far."""
    path = Path(run, "metrics.jsonl")
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.fixture(scope="session", autouse=True)
def world_in_the_making(request, tmp_path_factory):
    """Starts the process that makes the toy world, if a test needs it, while the first tests run; the folder.

    Of pytest's processes one starts it, for all of them.
    """
    cache = str(tmp_path_factory.mktemp("datasets"))  # of tests and scripts: never the user's own
    os.environ["HF_DATASETS_CACHE"] = datasets.config.HF_DATASETS_CACHE = cache
    base = tmp_path_factory.getbasetemp()
    folder, process = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "world", None
    if any("world" in item.fixturenames for item in request.session.items):
        forkserver.ensure_running()  # and loads what it preloads meanwhile
        with contextlib.suppress(FileExistsError):
            folder.with_name("world_begun").mkdir()
            process = start(base, ROOT / "toy.py", "--out", folder)
    yield folder
    if process:
        finish(process)


@pytest.fixture(scope="session")
def world(world_in_the_making):
    """The toy world's folder, once all is in it: toy.json comes last."""
    until = time.monotonic() + 240
    while not (world_in_the_making / "toy.json").exists():
        time.sleep(0.05)
        assert time.monotonic() < until, "no toy world was made"
    return world_in_the_making


def make_folder(world, path):
    """A folder with the toy world in runs/toy, and a part of its pairs."""
    (path / "runs/toy").mkdir(parents=True)
    for entry in world.iterdir():
        (path / "runs/toy" / entry.name).symlink_to(entry)
    for name, pairs in (("train", 160), ("test", 40)):
        lines = (world / f"{name}.jsonl").read_text().splitlines()[:pairs]
        (path / f"runs/toy/{name}.jsonl").unlink()
        (path / f"runs/toy/{name}.jsonl").write_text("\n".join(lines))
    return path


def save_toy(folder, name, dtype=torch.float32, **change):
    """The toy model again at `name`: in another dtype, or with its config changed and random weights."""
    lm = Gemma2ForCausalLM.from_pretrained(folder / "runs/toy/model", dtype=dtype)
    if change:
        lm = Gemma2ForCausalLM(type(lm.config)(**{**lm.config.to_dict(), **change}))
    lm.save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(folder / "runs/toy/model").save_pretrained(folder / name)


@pytest.fixture
def folder(world, tmp_path, monkeypatch):
    """A working directory with the toy world in runs/toy, and a part of its pairs."""
    monkeypatch.chdir(make_folder(world, tmp_path))
    return tmp_path
