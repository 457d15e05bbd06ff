"""Small things that the tests share: a random Gemma-2, an SAE, pairs of random tokens, and the toy world."""

import os
import tempfile

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # of the tests and their scripts

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from data import Pairs
from sae import JumpReLUSAE

V, D, M = 97, 32, 160


def make_lm(seed=0, **changes):
    """A random Gemma-2 whose sliding window (9) is shorter than most rows."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=V, hidden_size=D, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=9,
        attn_implementation="eager", **changes,
    )  # fmt: skip
    lm = Gemma2ForCausalLM(config)
    with torch.no_grad():  # wider than the default: softcaps bite, distributions differ
        for parameter in lm.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.25)
    return lm.eval()


def nudge(lm, scale=0.02, seed=1):
    """A copy that has moved: a policy after some training."""
    torch.manual_seed(seed)
    twin = Gemma2ForCausalLM(lm.config)
    twin.load_state_dict(lm.state_dict())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return twin.eval()


def make_sae(seed=0, d=D, m=M):
    """A random SAE with about a tenth of its features active on the tiny model's states."""
    g = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(d, m, generator=g) / d**0.5
    threshold = 0.5 + torch.rand(m, generator=g)
    b_enc = 0.1 * torch.randn(m, generator=g)
    return JumpReLUSAE(W_enc, b_enc, W_enc.T.clone(), torch.zeros(d), threshold)


def make_pairs(n=8, seed=0, longest=14):
    """Pairs of random tokens and random lengths."""
    g = torch.Generator().manual_seed(seed)

    def text(shortest):
        size = int(torch.randint(shortest, longest, (1,), generator=g))
        return torch.randint(4, V, (size,), generator=g).tolist()

    return Pairs([([2, *text(3)], text(1), text(1)) for _ in range(n)])


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The toy world, made once for all tests."""
    import toy

    out = tmp_path_factory.mktemp("toy") / "world"
    toy.make_world(out)
    return out


@pytest.fixture
def folder(world, tmp_path, monkeypatch):
    """A working directory with the toy world in runs/toy, and a part of its pairs."""
    (tmp_path / "runs/toy").mkdir(parents=True)
    for entry in world.iterdir():
        (tmp_path / "runs/toy" / entry.name).symlink_to(entry)
    for name, pairs in (("train", 160), ("test", 40)):
        lines = (world / f"{name}.jsonl").read_text().splitlines()[:pairs]
        (tmp_path / f"runs/toy/{name}.jsonl").unlink()
        (tmp_path / f"runs/toy/{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path
