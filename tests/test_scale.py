"""scale.py: slices against plain formulas, updates against torch's own in float32, two ranks against one."""

import math
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from conftest import M, V, make_lm, make_lm_with_images, make_pairs, make_sae
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import fpo
import scale
from batches import collate
from sae import decoder_layers
from scale import ExactOptimizer, gradient_norm, join, make_optimizer, scale_gradients_, split

LR = 5e-7  # Table 5
FLOAT32, BF16 = torch.float32, torch.bfloat16
# What inductor makes for the plainest processors fails by torch 2.13's own fault.
compiles = shutil.which(os.environ.get("CXX", "g++")) and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
needs_compiler = pytest.mark.skipif(not compiles, reason="no C++ compiler, or the plainest processor")
KINDS = [False, pytest.param(True, marks=[needs_compiler, pytest.mark.slow], id="fused")]


@pytest.fixture(autouse=True, params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def fresh(request):
    """Every test on the CPU, and on a card where there is one; two ranks are the CPU's."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # what one test compiled counts for no other
    counters.clear()
    torch.set_default_device("cpu" if "two_ranks" in request.fixturenames else request.param)
    yield
    torch.set_default_device(None)


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def same(a, b):
    """Whether two tensors have the same bits (so -0 is not 0, and NaN is itself)."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


# ---------------------------------------------------------------------------- the head
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("chunk", [7, 97, 1000])
def test_head_against_plain_logits(softcap, chunk):
    """Values and gradients of log-probability, KL and entropy, float64, against plain log_softmax."""
    h, W = torch.randn(11, 6, dtype=torch.float64), torch.randn(V, 6, dtype=torch.float64)
    h_ref, W_ref = h + 0.1 * torch.randn_like(h), W + 0.1 * torch.randn_like(W)
    target = torch.randint(0, V, (11,))

    def log_softmax(states, weight):
        z = states @ weight.T
        return (z if softcap is None else softcap * (z / softcap).tanh()).log_softmax(-1)

    results = []
    for plainly in (True, False):
        a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
        if plainly:
            log_p, log_r = log_softmax(a, b), log_softmax(h_ref, W_ref)
            logp, ref = log_p[range(11), target], log_r[range(11), target]
            kl, H = (log_r.exp() * (log_r - log_p)).sum(-1), -(log_p.exp() * log_p).sum(-1)
        else:
            logp, kl, ref, H = scale._TokenStatistics.apply(
                a, b, target, softcap, h_ref, W_ref, chunk, True, False
            )
        (logp * torch.linspace(-1, 2, 11) + kl * torch.linspace(0.5, 1, 11)).sum().backward()
        results.append([logp, kl, ref, H, a.grad, b.grad])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-9)


@pytest.mark.slow
@needs_compiler
def test_compiled_head_gives_the_same(monkeypatch):
    """Values and gradients with a held reference and without one; other lengths compile nothing anew."""
    monkeypatch.setitem(scale.VOCABULARY_SLICE, "cpu", 40)  # slices of 40, 40 and 17
    compilations = []
    for N in (11, 30, 7, 64):
        h, W = torch.randn(N, 6), torch.randn(V, 6)
        for ref in ({"ref_states": h + 0.1, "ref_weight": 1.1 * W}, {}):
            results = []
            for fused in (False, True):
                a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
                options = {"softcap": 4.0, "entropy": bool(ref), "fused": fused, **ref}
                logp, kl, *rest = scale.token_statistics(a, b, torch.arange(N), **options)
                (logp * torch.linspace(-1, 2, N) + (kl if ref else 0.0)).sum().backward()
                results.append([x for x in (logp, kl, *rest, a.grad, b.grad) if x is not None])
            for eager, compiled in zip(*results, strict=True):
                torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)
        compilations.append(counters["stats"]["unique_graphs"])
    assert len(set(compilations)) == 1 and 4 <= compilations[0] <= 6


def test_head_stays_finite_far_out():
    """A logit 200 above the rest in float32: log-probability -200, KL finite."""
    h, W = torch.tensor([[1.0]]), torch.tensor([[200.0], [0.0], [0.0]])
    options = {"ref_states": h, "ref_weight": W.flip(0), "entropy": True}
    logp, kl, _, H = scale.token_statistics(h, W, torch.tensor([1]), **options)
    assert logp.item() == -200 and kl.item() == 200 and H.item() == 0


# ---------------------------------------------------------------------------- pooled features
@pytest.mark.parametrize("features", [M, 3])  # that get a gradient, of each response: all columns, or a few
@pytest.mark.parametrize("dtype", [FLOAT32, BF16])
@pytest.mark.parametrize(
    "kind", [{}, {"k": 10}, {"k": 120}, {"k": 120, "low": -math.inf}]
)  # half are positive
def test_pooled_features_against_the_kept_ones(kind, features, dtype, monkeypatch):
    """Value and gradient against encode, then a mean; slices end within a response; one response is empty."""
    monkeypatch.setattr(scale, "TOKEN_SLICE", 4)
    sae, lengths = make_sae(**kind), torch.tensor([5, 0, 7, 1])
    owner = torch.arange(4).repeat_interleave(lengths)
    h = torch.randn(13, sae.d).to(dtype).requires_grad_()
    g = torch.zeros(4, M)
    for row in g:
        row[torch.randperm(M)[:features]] = torch.randn(features)
    pooled = scale.pooled_features(h, sae, owner, lengths)
    pooled.backward(g)
    grad, h.grad = h.grad, None
    parts = sae.encode(h.float()).split(lengths.tolist())
    expected = torch.stack([part.mean(0) if len(part) else torch.zeros(M) for part in parts])
    expected.backward(g)
    torch.testing.assert_close(pooled, expected, atol=1e-6, rtol=1e-5)
    assert grad.dtype == dtype and grad.abs().max() > 0.01
    torch.testing.assert_close(grad, h.grad, atol=1e-6, rtol=1e-5 if dtype == FLOAT32 else 2**-7)


@pytest.mark.parametrize(("k", "kept"), [(None, 20 * M), (7, 20 * 7 * 4)])  # a byte a feature, 4 bytes an id
def test_a_topk_sae_keeps_ids_for_its_backward(k, kept):
    """Of 20 tokens, beside the encoder and the matrix of the means."""
    saved, known = [], (FLOAT32,)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        h = torch.randn(20, 32, requires_grad=True)
        scale.pooled_features(h, make_sae(k=k), torch.zeros(20).long(), torch.tensor([20]))
    assert sum(x.nbytes for x in saved if x.dtype not in known) == kept


class Rounding(TorchDispatchMode):
    """Of each product, whether a card would round its factors to TF32."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.seen.append(torch.backends.cuda.matmul.allow_tf32)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rounded", [False, True])
def test_tf32_is_for_the_saes_two_large_products(rounded):
    sae, h = make_sae(), torch.randn(6, 32, requires_grad=True)
    with Rounding() as mode:
        scale.pooled_features(h, sae, torch.zeros(6).long(), torch.tensor([6]), rounded).sum().backward()
    # Encoded, pooled; the pooling's gradient, the encoder's.
    assert mode.seen == [rounded, False, False, rounded]
    assert not torch.backends.cuda.matmul.allow_tf32


# ---------------------------------------------------------------------------- float32 in two halves
def test_split_by_hand():
    # bf16 keeps 8 bits of the significand: above 1 its values are 2^-7 apart; 1 + 2^-8 is halfway.
    step = 2.0**-7
    x = torch.tensor([1.0, 1 + step / 2, -1 - step / 2, 1 + step / 2 - 2**-23, -0.0, 2.0**-149, -(2.0**-126)])
    weight, rest = split(x)
    assert weight.tolist() == [1.0, 1 + step, -1 - step, 1.0, 0.0, 0.0, -(2.0**-126)]
    assert math.copysign(1, weight[4].item()) == -1
    # in units of 2^-23: half a step is 2^15 of them.
    assert rest.tolist() == [0, -(2**15), -(2**15), 2**15 - 1, 0, 1, 0]
    assert same(join(weight, rest), x)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40))
@example([0, -(2**31), 0x7F7FFFFF, 0x7F800000, -0x800001, -0x800000, 1, 0x7FFFFF])  # zeros, ends, infinities
def test_split_loses_nothing(patterns):
    x = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    x = x[~x.isnan()]
    weight, rest = split(x)
    assert same(join(weight, rest), x)
    # The nearest bf16 value, except that a tie may go the other way.
    tie = (bits(x) & 0xFFFF) == 0x8000
    assert same(weight[~tie], x.bfloat16()[~tie])
    assert ((weight.float()[tie] - x[tie]).abs() >= (x.bfloat16().float()[tie] - x[tie]).abs()).all()
    assert (weight.float()[tie].abs() > x[tie].abs()).all()


# ---------------------------------------------------------------------------- updates
def torchs(rule, parameter):
    """torch's own optimizer with its own defaults, its plainest implementation."""
    kind = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[rule]
    return kind([parameter], lr=LR, foreach=False)


def gradients(n, steps=200):
    """bf16 gradients with a lasting direction, noise and some zeros, of sizes from 1e-12 to 1."""
    g = torch.Generator(torch.get_default_device()).manual_seed(0)
    size = 10 ** (-12 * torch.rand(n, generator=g))
    lasting = torch.randn(n, generator=g)
    for _ in range(steps):
        now = size * (lasting + torch.randn(n, generator=g))
        yield torch.where(torch.rand(n, generator=g) < 0.05, 0.0, now).bfloat16()


@pytest.mark.parametrize("fused", KINDS)
@pytest.mark.parametrize("rule", scale.RULES)
def test_bf16_weights_lose_no_update(rule, fused, monkeypatch):
    """Their masters are the float32 weights of the same updates; unfused, torch trains these the same way."""
    monkeypatch.setattr(scale, "SLICE", 1024)  # four slices and a short one
    n = 4512
    start = (0.02 * torch.randn(n)).bfloat16()
    ours, master, theirs = (torch.nn.Parameter(x) for x in (start.clone(), start.float(), start.float()))
    a, b = (ExactOptimizer([p], LR, rule=rule, fused=fused) for p in (ours, master))
    c, asked, lost = torchs(rule, theirs), 0, 0
    for g in gradients(n):
        before = start.float() if not a.state else join(ours.data, a.state[ours]["rest"])
        before_master = master.detach().clone()
        ours.grad, master.grad, theirs.grad = g, g.float(), g.float()
        a.step(), b.step(), c.step()
        now = join(ours.data, a.state[ours]["rest"])
        assert same(now, master.data) and same(ours.data, split(master.data)[0])
        moved = master != before_master  # what float32 holds to be an update
        asked += moved.sum()
        lost += (moved & (now == before)).sum()
    assert asked > 150 * n and lost == 0
    if not fused and not ours.is_cuda:  # torch's kernels there round otherwise
        assert same(master, theirs)
        for name, value in b.state[master].items():
            assert torch.equal(value.float(), c.state[theirs][name])


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("rule", scale.RULES)
def test_fused_updates_compile_in_the_first_step_alone(rule):
    """Many sizes, gradients that are views of a bucket, a warm-up; and how far from the unfused update."""
    sizes, compilations = (4500, 1, 2, 37, 113, 1000, 64, 65, 4096, 7, 300, 15), []
    start = [(0.02 * torch.randn(n)).bfloat16() for n in sizes]
    ours, twins = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    a, b = (ExactOptimizer(ps, 0.0, rule=rule, fused=fused) for ps, fused in ((ours, True), (twins, False)))
    for step, bucket in enumerate(gradients(sum(sizes), steps=20)):
        a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = LR * (step + 1) / 20
        for p, q, g in zip(ours, twins, bucket.split(sizes), strict=True):
            p.grad = q.grad = g
        a.step(), b.step()
        compilations.append(counters["stats"]["unique_graphs"])
    # One for all, one for a weight alone, perhaps one for the bucket's first gradient.
    assert len(set(compilations)) == 1 and 1 <= compilations[0] <= 3
    x, y = (torch.cat([join(p.data, o.state[p]["rest"]) for p in ps]) for ps, o in ((ours, a), (twins, b)))
    assert ((x - y).abs() <= 0.01 * LR).all() and (x != y).float().mean() < 0.01
    assert all(same(p, q) for p, q in zip(ours, twins, strict=True))


@pytest.mark.slow
@needs_compiler
def test_fused_updates_keep_to_their_own_numbers():
    """torch 2.13, left to itself, goes on with the betas that it compiled first."""
    for options in ({"betas": (0.9, 0.95)}, {"betas": (0.8, 0.99)}, {"rule": "rmsprop", "alpha": 0.9}):
        ours, twin = (torch.nn.Parameter(torch.ones(50)) for _ in range(2))
        a, b = (ExactOptimizer([p], LR, fused=p is ours, **options) for p in (ours, twin))
        ours.grad = twin.grad = torch.randn(50)
        for _ in range(3):
            a.step(), b.step()
        for name, value in b.state[twin].items():
            torch.testing.assert_close(a.state[ours][name], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fused", KINDS)
@pytest.mark.parametrize("dtype", [FLOAT32, BF16])
@pytest.mark.parametrize("rule", scale.RULES)
def test_a_resume_goes_on_bit_for_bit(rule, dtype, fused):
    start = (0.02 * torch.randn(5, 60)).to(dtype)
    two = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(start[0].clone())]
    one = ExactOptimizer(two, LR, rule=rule, fused=fused)
    for i, g in enumerate(gradients(300, steps=20)):
        if i == 10:
            again = [torch.nn.Parameter(p.detach().clone()) for p in two]
            other = ExactOptimizer(again, LR, rule=rule, fused=fused)
            copy_states(two, one, again, other)
        for (big, small), optimizer in [(two, one)] if i < 10 else [(two, one), (again, other)]:
            big.grad, small.grad = g.to(dtype).view(5, 60), g[:60].to(dtype)
            optimizer.step()
    for p, q in zip(two, again, strict=True):
        assert same(p, q) and all(torch.equal(one.state[p][k], v) for k, v in other.state[q].items())


def copy_states(parameters, optimizer, again, other):
    """One optimizer's states into another's, as checkpoint.py does."""
    for p, q in zip(parameters, again, strict=True):
        for name, tensor in other.state_of(q).items():
            tensor.copy_(optimizer.state[p][name])


def test_what_would_lose_updates_is_refused():
    weight = torch.nn.Parameter(torch.ones(2).bfloat16())
    with pytest.raises(TypeError, match="state_of"):  # torch's own would cast float32 states to bf16
        ExactOptimizer([weight], LR).load_state_dict(ExactOptimizer([weight], LR).state_dict())
    with pytest.raises(ValueError, match=r"float16.*float32 or bfloat16"):
        ExactOptimizer([torch.nn.Parameter(torch.ones(2).half())], LR)
    with pytest.raises(ValueError, match=r"sgd.*adam, rmsprop"):
        ExactOptimizer([torch.nn.Parameter(torch.ones(2))], LR, rule="sgd")


class Largest(TorchDispatchMode):
    """The largest storage that any operation makes, beside those known."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.bytes = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [FLOAT32, BF16])
@pytest.mark.parametrize("rule", scale.RULES)
def test_no_temporary_beyond_a_slice(rule, dtype, monkeypatch):
    monkeypatch.setattr(scale, "SLICE", 1000)
    weight = torch.nn.Parameter(torch.randn(10_500).to(dtype))
    weight.grad = torch.randn_like(weight)
    optimizer = ExactOptimizer([weight], LR, rule=rule, fused=False)
    optimizer.step()  # makes the states
    states = [s for s in optimizer.state[weight].values() if s.ndim]
    with Largest(weight.data, weight.grad, *states) as largest:
        gradient_norm([weight])
        scale_gradients_([weight], 0.5)
        optimizer.step()
    assert 1000 <= largest.bytes <= 4 * 1000


# ---------------------------------------------------------------------------- the gradients' norm
def test_norm_and_scale_by_hand():
    a, b, idle = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 1, 1))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([-4.0])
    assert gradient_norm([a, b, idle]).item() == 5.0
    scale_gradients_([a, b, idle], 0.5)
    assert a.grad.tolist() == [1.5, 0.0] and b.grad.tolist() == [-2.0] and idle.grad is None
    for bad in (math.inf, math.nan):
        a.grad[1] = bad
        assert not gradient_norm([a, b]).isfinite()


def test_norm_of_bf16_gradients_is_taken_in_float32():
    parameters = [torch.nn.Parameter(torch.zeros(n).bfloat16()) for n in (70_001, 300)]
    for p in parameters:
        p.grad = torch.randn(p.shape).bfloat16()
    exact = [p.grad.double() for p in parameters]
    norm = math.sqrt(sum(g.square().sum().item() for g in exact))
    assert gradient_norm(parameters).item() == pytest.approx(norm, rel=1e-6)  # bf16: 2e-3 off
    scale_gradients_(parameters, 1 / norm)
    for p, g in zip(parameters, exact, strict=True):  # one rounding: the nearest bf16 value
        assert p.grad.dtype == BF16
        assert ((p.grad.double() - g / norm).abs() <= 2**-8 * 1.0001 * (g / norm).abs()).all()


# ---------------------------------------------------------------------------- two ranks
def sharded_optimizer(rule, dtype, shard):
    """Weights and this rank's states after some steps under a changing learning rate; a resume in between."""
    torch.manual_seed(0)
    sizes = ((60, 7), (100,), (9,), (33, 3))
    parameters = [torch.nn.Parameter((0.02 * torch.randn(s)).to(dtype)) for s in sizes]
    optimizer = make_optimizer(rule, parameters, 0.0, shard=shard)
    for step in range(6):
        if step == 3:
            before = getattr(optimizer, "optim", optimizer)
            optimizer = make_optimizer(rule, parameters, 0.0, shard=shard)
            after = getattr(optimizer, "optim", optimizer)
            mine = [p for group in after.param_groups for p in group["params"]]
            copy_states(mine, before, mine, after)
        optimizer.param_groups[0]["lr"] = LR * (step + 1)
        for p in parameters:
            p.grad = torch.randn(p.shape).to(dtype)
        optimizer.step()
    held = sum(len(state) > 0 for state in getattr(optimizer, "optim", optimizer).state.values())
    return [p.detach() for p in parameters], held


def work(rank, folder):
    """What each of two processes does; what it saw goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    seen = {}
    for rule in scale.RULES:
        for dtype in (FLOAT32, BF16):
            seen[rule, str(dtype)] = sharded_optimizer(rule, dtype, shard=True)
    policy = fpo.Policy(make_lm())
    scale.shard_policy(policy, decoder_layers(policy.lm), dtype=FLOAT32)
    seen["weights"] = scale.full_state_dict(policy)
    local = sum(p.to_local().numel() for p in policy.parameters())
    seen["share"] = local / sum(p.numel() for p in policy.parameters())
    images = fpo.Policy(make_lm_with_images())
    scale.shard_policy(images, decoder_layers(images.lm), dtype=FLOAT32)
    seen["images"] = images(collate(make_pairs(4), range(4)))[0].logps.detach()
    torch.save(seen, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(work, (str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("dtype", [FLOAT32, BF16])
@pytest.mark.parametrize("rule", scale.RULES)
def test_sharded_states_train_the_same_weights(rule, dtype, two_ranks):
    alone, held = sharded_optimizer(rule, dtype, shard=False)
    shares = []
    for seen in two_ranks:
        weights, share = seen[rule, str(dtype)]
        shares.append(share)
        assert all(same(a, b) for a, b in zip(alone, weights, strict=True))
    assert held == 4 and sum(shares) == 4 and max(shares) < 4  # each parameter's states on one rank only


def test_fsdp_shares_the_weights_out(two_ranks):
    """Half of them lie on each rank; they are gathered on rank 0 alone, the tied head once."""
    expected, weights = dict(make_lm().named_parameters()), two_ranks[0]["weights"]
    assert list(weights) == list(expected) and two_ranks[1]["weights"] == {}
    assert all(same(weights[name], expected[name]) for name in expected)
    assert all(seen["share"] == pytest.approx(0.5, abs=0.01) for seen in two_ranks)


def test_fsdp_of_a_model_with_images(two_ranks):
    """Its layers are not where a plain decoder's are; sharded, it says what it said."""
    whole = fpo.Policy(make_lm_with_images())(collate(make_pairs(4), range(4)))[0].logps
    for seen in two_ranks:
        torch.testing.assert_close(seen["images"], whole.detach())
