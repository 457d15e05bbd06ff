"""On a card: flex_attention, compiled layers, one wait a step, the script. Skipped without one."""

import copy
import math

import pytest
import torch
from conftest import ROOT, finish, lines_of, make_pairs, make_sae, nudge, start
from transformers import Gemma2Config, Gemma2ForCausalLM

import fpo
import loading
import offline
import scale
from batches import collate
from experiments.bench import TINY
from runtime import start_processes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
ROWS = {"layout": "shared", **loading.ROWS["cuda"]}


def make_policy(lm, device, reference=None, dtype=torch.float32):
    """A Policy with an SAE and perhaps a held reference: eager on the CPU, as train.py has it on a card."""
    lm = copy.deepcopy(lm).to(device, dtype)
    lm.set_attn_implementation("flex_attention" if device == "cuda" else "eager")
    lm.activation_checkpointing_enable({"use_reentrant": False})
    sae = make_sae(d=lm.config.hidden_size)
    for name in ("W_enc", "b_enc", "threshold"):
        setattr(sae, name, getattr(sae, name).to(device))
    policy = fpo.Policy(lm, [sae], [(3, "res")])
    if reference is not None:
        policy.hold_reference(make_policy(reference, device, dtype=dtype))
    for layer in lm.model.layers if device == "cuda" else ():
        layer.compile()
    return policy.train()


@pytest.fixture(scope="module")
def models():
    """A policy's model and its reference's; rows of 256 are longer than the sliding window."""
    start_processes()  # the compiler's limits, as train.py sets them
    torch.manual_seed(0)
    reference = Gemma2ForCausalLM(Gemma2Config(**TINY, sliding_window=64))
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.1)
    return nudge(reference, scale=0.01), reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["fpo", "tdpo2"])
def test_what_the_cpu_computes(method, dtype, models):
    """Statistics, losses and gradients of rows of several lengths, against eager float32 on the CPU."""
    held, near = method == "tdpo2", 1e-3 if dtype == torch.float32 else 0.1
    policies = [make_policy(models[0], "cpu", models[1] if held else None)]
    policies += [make_policy(models[0], "cuda", models[1] if held else None, dtype)]
    for seed in range(3):
        pairs, results = make_pairs(6, seed, longest=60 + 60 * seed), []
        for policy in policies:
            batch = collate(pairs, range(6), **ROWS).to(policy.lm.device)
            statistics, reference = policy(batch)
            if reference is None:
                moved = [0.9 * c.detach() for c in statistics.features]
                reference = fpo.Statistics(statistics.logps.detach() - 1, features=tuple(moved))
            loss, _ = fpo.method_loss(method, statistics, reference, beta=0.1)
            policy.zero_grad()
            loss.mean().backward()
            gradients = torch.cat([p.grad.float().cpu().flatten() for p in policy.parameters()])
            per_token = statistics.logps / statistics.lengths
            results.append([per_token, *statistics.features, loss, gradients])
        for cpu, card in zip(*results, strict=True):
            card = card.detach().cpu()
            assert (card - cpu).norm() < near * cpu.norm(), (card - cpu).norm() / cpu.norm()


def test_a_step_waits_nowhere(models):
    """From the batch to the gradient's norm, and the update: torch raises where the host would wait."""
    policy = make_policy(models[0], "cuda", models[1], torch.bfloat16)
    optimizer = scale.make_optimizer("adam", policy.parameters(), 5e-7, shard=False)
    batch = collate(make_pairs(6, longest=60), range(6), **ROWS).to("cuda")
    for mode in ("default", "default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss, _ = fpo.method_loss("fpo", *policy(batch), beta=0.1)
            (loss * batch.weight).sum().backward()
            scale.gradient_norm(list(policy.parameters()))
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cache_is_the_forward(models, tmp_path):
    """What Phase 1 copies while the card computes is what the forward gives in another batch."""
    policy, pairs = make_policy(models[1], "cuda", dtype=torch.bfloat16).eval(), make_pairs(40, longest=60)
    identity = offline.reference_identity(policy, pairs, weights="", arithmetic={})
    cache = offline.build_reference(policy, pairs, tmp_path, identity, **ROWS)
    with torch.no_grad():
        says = policy(collate(pairs, range(32, 40), **ROWS).to("cuda"))[0]
    found = cache.lookup(torch.arange(32, 40))
    torch.testing.assert_close(found.logps, says.logps.cpu(), atol=0.05, rtol=1e-3)
    torch.testing.assert_close(found.features[0], says.features[0].cpu(), atol=0.05, rtol=1e-2)


RUNS = {"fpo": [], "tdpo2": ["--method", "tdpo2"], "fsdp": ["--shard", "fsdp"]}
RUNS["no_compile"] = ["--no_compile"]


@pytest.mark.parametrize("run", RUNS)
def test_script(folder, run):
    """The audit passes, the first loss is ln 2 within rounding, and it falls."""
    words = [ROOT / "train.py", "--preset", "toy", "--steps", "12", "--out", run, *RUNS[run]]
    said = finish(start(folder, *words, options=["--standalone"] if run == "fsdp" else []))
    assert "audit passed" in said
    lines = lines_of(folder / run)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=2e-3)
    assert lines[-1]["loss"] < lines[0]["loss"]
