"""precision.py: float32 in two halves, updates against torch's own in float32, and two ranks against one."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from conftest import make_lm, make_pairs, make_sae, nudge
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2ForCausalLM

import fpo
import precision
from data import collate
from precision import ExactOptimizer, clip_gradients, join, make_optimizer, split

LR = 5e-7  # Table 5
BETAS = (0.9, 0.95)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def same(a, b):
    """Whether two tensors have the same bits (so -0 is not 0, and NaN is itself)."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


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
def test_split_loses_nothing(patterns):
    x = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    x = x[~x.isnan()]  # infinities stay
    weight, rest = split(x)
    assert same(join(weight, rest), x)
    # The nearest bf16 value, except that a tie may go the other way.
    tie = (bits(x) & 0xFFFF) == 0x8000
    assert same(weight[~tie], x.bfloat16()[~tie])
    assert ((weight.float()[tie] - x[tie]).abs() >= (x.bfloat16().float()[tie] - x[tie]).abs()).all()
    assert (weight.float()[tie].abs() > x[tie].abs()).all()


def test_split_of_the_special_values():
    top = torch.finfo(torch.float32).max
    x = torch.tensor([0.0, -0.0, top, -top, math.inf, -math.inf, 2.0**-149, -(2.0**-149), 2.0**-126 * 0.999])
    assert same(join(*split(x)), x)


# ---------------------------------------------------------------------------- updates
def torchs(rule, parameter):
    """torch's own optimizer with the same settings, its plainest implementation."""
    if rule == "adam":
        return torch.optim.Adam([parameter], lr=LR, betas=BETAS, eps=1e-8, foreach=False)
    return torch.optim.RMSprop([parameter], lr=LR, alpha=0.99, eps=1e-8, foreach=False)


def gradients(n, steps=200, seed=0):
    """bf16 gradients with a lasting direction, noise and some zeros, of sizes from 1e-12 to 1."""
    g = torch.Generator().manual_seed(seed)
    size = 10 ** (-12 * torch.rand(n, generator=g))
    lasting = torch.randn(n, generator=g)
    for _ in range(steps):
        now = size * (lasting + torch.randn(n, generator=g))
        yield torch.where(torch.rand(n, generator=g) < 0.05, 0.0, now).bfloat16()


@pytest.mark.parametrize("rule", precision.RULES)
def test_float32_weights_are_trained_as_torch_trains_them(rule):
    start = 0.02 * torch.randn(37, 113)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a, b = ExactOptimizer([ours], LR, rule=rule), torchs(rule, theirs)
    for g in gradients(start.numel(), steps=50):
        ours.grad = theirs.grad = g.float().view_as(start)
        a.step(), b.step()
    assert same(ours, theirs)
    for name, value in a.state[ours].items():
        assert torch.equal(value.float(), b.state[theirs][name])


@pytest.mark.parametrize("rule", precision.RULES)
def test_bf16_weights_lose_no_update(rule, monkeypatch):
    monkeypatch.setattr(precision, "SLICE", 1024)  # four slices and a short one
    n = 4500
    start = (0.02 * torch.randn(n)).bfloat16()
    ours, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    master = torch.nn.Parameter(start.float())
    a, b, c = ExactOptimizer([ours], LR, rule=rule), torchs(rule, master), torchs(rule, plain)
    asked = lost = lost_plain = 0
    for g in gradients(n):
        before = start.float() if not a.state else join(ours.data, a.state[ours]["rest"])
        before_plain, before_master = plain.detach().clone(), master.detach().clone()
        ours.grad, plain.grad, master.grad = g, g.clone(), g.float()
        a.step(), b.step(), c.step()
        now = join(ours.data, a.state[ours]["rest"])
        assert same(now, master.data) and same(ours.data, split(master.data)[0])
        moved = master != before_master  # what float32 holds to be an update
        asked += moved.sum()
        lost += (moved & (now == before)).sum()
        lost_plain += (moved & (plain == before_plain)).sum()
    assert asked > 150 * n and lost == 0
    assert lost_plain / asked > 0.97
    print(
        f"{rule}: {asked} updates; lost by bf16 weights {lost_plain / asked:.2%}, by ours {lost / asked:.2%}"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", precision.RULES)
def test_a_resume_goes_on_bit_for_bit(rule, dtype, tmp_path):
    start = (0.02 * torch.randn(5, 60)).to(dtype)
    two = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(start[0].clone())]
    one = ExactOptimizer(two, LR, rule=rule)
    steps = [g.to(dtype) for g in gradients(300, steps=20)]
    for i, g in enumerate(steps):
        if i == 10:  # torch's loading would cast here
            torch.save({"weights": two, "states": one.state_dict()}, tmp_path / "half")
            half = torch.load(tmp_path / "half", weights_only=True)
            again = [torch.nn.Parameter(p.detach()) for p in half["weights"]]
            other = ExactOptimizer(again, LR, rule=rule)
            other.load_state_dict(half["states"])
            saved = half["states"]["state"][0]
            assert all(same(saved[k], v) for k, v in other.state[again[0]].items() if k != "step")
            half["states"]["state"][0][
                "exp_avg" if rule == "adam" else "square_avg"
            ].zero_()  # a copy was taken
        pairs = [(two, one)] if i < 10 else [(two, one), (again, other)]
        for (big, small), optimizer in pairs:
            big.grad, small.grad = g.view(5, 60), g[:60].clone()
            optimizer.step()
    assert same(two[0], again[0]) and same(two[1], again[1])
    for p, q in zip(two, again, strict=True):
        assert all(torch.equal(one.state[p][k], v) for k, v in other.state[q].items())


def test_states_without_the_rest_are_refused():
    weight = torch.nn.Parameter(torch.ones(3).bfloat16())
    optimizer = ExactOptimizer([weight], LR)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    states = copy.deepcopy(optimizer.state_dict())
    del states["state"][0]["rest"]
    with pytest.raises(ValueError, match="rest"):
        optimizer.load_state_dict(states)


def test_what_would_lose_updates_is_refused():
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", precision.RULES)
def test_no_temporary_beyond_a_slice(rule, dtype, monkeypatch):
    monkeypatch.setattr(precision, "SLICE", 1000)
    weight = torch.nn.Parameter(torch.randn(10_500).to(dtype))
    weight.grad = torch.randn_like(weight)
    optimizer = ExactOptimizer([weight], LR, rule=rule)
    optimizer.step()  # makes the states
    states = [s for s in optimizer.state[weight].values() if s.ndim]
    with Largest(weight.data, weight.grad, *states) as largest:
        clip_gradients([weight], 0.5)
        optimizer.step()
    assert 1000 <= largest.bytes <= 4 * 1000


# ---------------------------------------------------------------------------- the clip
def test_clip_by_hand():
    a, b, idle = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 1, 1))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([-4.0])
    assert clip_gradients([a, b, idle], 5.5).item() == 5.0
    assert a.grad.tolist() == [3.0, 0.0] and b.grad.tolist() == [-4.0]
    assert clip_gradients([a, b], math.inf).item() == 5.0
    assert clip_gradients([a, b], 2.5).item() == 5.0
    assert a.grad[0].item() == pytest.approx(1.5, rel=1e-6) and b.grad.item() == pytest.approx(-2.0, rel=1e-6)


def test_clip_of_bf16_gradients_is_taken_in_float32():
    parameters = [torch.nn.Parameter(torch.zeros(n).bfloat16()) for n in (70_001, 300)]
    for p in parameters:
        p.grad = torch.randn(p.shape).bfloat16()
    exact = [p.grad.double() for p in parameters]
    norm = math.sqrt(sum(g.square().sum().item() for g in exact))
    assert clip_gradients(parameters, 1.0).item() == pytest.approx(norm, rel=1e-6)  # bf16: 2e-3 off
    for p, g in zip(parameters, exact, strict=True):  # one rounding: the nearest bf16 value
        assert p.grad.dtype == torch.bfloat16
        assert ((p.grad.double() - g / norm).abs() <= 2**-8 * 1.0001 * (g / norm).abs()).all()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_clip_shows_what_is_not_finite(bad):
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([1.0, bad, 2.0])
    assert not clip_gradients([weight], 1.0).isfinite()


# ---------------------------------------------------------------------------- two ranks
STEPS = 3


def sharded_optimizer(rank, rule, dtype, shard):
    """Weights and this rank's states after some steps under a changing learning rate; a resume in between."""
    torch.manual_seed(0)
    sizes = ((60, 7), (100,), (9,), (33, 3))
    parameters = [torch.nn.Parameter((0.02 * torch.randn(s)).to(dtype)) for s in sizes]
    optimizer = make_optimizer(rule, parameters, 0.0, shard=shard)
    for step in range(6):
        if step == 3:
            mine = copy.deepcopy(getattr(optimizer, "optim", optimizer).state_dict())
            optimizer = make_optimizer(rule, parameters, 0.0, shard=shard)
            getattr(optimizer, "optim", optimizer).load_state_dict(mine)
        optimizer.param_groups[0]["lr"] = LR * (step + 1)
        for p in parameters:
            p.grad = torch.randn(p.shape).to(dtype)
        optimizer.step()
    held = sum(len(state) > 0 for state in getattr(optimizer, "optim", optimizer).state.values())
    return [p.detach() for p in parameters], held


def make_policy(held):
    policy = fpo.Policy(nudge(make_lm()), [make_sae()], [(2, "res")])
    policy.lm.activation_checkpointing_enable({"use_reentrant": False})
    if held:
        policy.hold_reference(make_lm())
    return policy.train()


def train(policy, rank, world, after_forward=lambda: None):
    """Per step: log-probabilities, gradient norm, clipped gradients; of FPO, or TDPO-2 with a reference."""
    pairs, mine = make_pairs(8), list(range(rank, 8, world))
    optimizer = ExactOptimizer(policy.parameters(), 1e-2, rule="rmsprop", eps=1.0)  # smooth in the gradient
    records = []
    for _ in range(STEPS):
        with torch.no_grad():
            seen = policy(collate(pairs, mine))[0].logps
        after_forward()
        optimizer.zero_grad()
        for micro in (mine[:1], mine[1:]):
            batch = collate(pairs, micro)
            statistics, reference = policy(batch)
            fixed = fpo.Statistics(
                statistics.logps.detach() - 1, features=(0.1 + statistics.features[0].detach(),)
            )
            method = "fpo" if reference is None else "tdpo2"
            loss, _ = fpo.method_loss(method, statistics, reference or fixed, beta=0.1, k=10)
            (loss.sum() * world / 8).backward()
        norm = clip_gradients(policy.parameters(), 0.05)
        gradients = [getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for p in policy.parameters()]
        records.append((seen, norm, gradients))
        optimizer.step()
    return records


def work(rank, folder):
    """What each of two processes does; what it saw goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    seen = {}
    for rule in precision.RULES:
        for dtype in (torch.float32, torch.bfloat16):
            seen[rule, str(dtype)] = sharded_optimizer(rank, rule, dtype, shard=True)
    for held in (False, True):
        policy = make_policy(held)
        precision.shard_policy(policy, dtype=torch.float32)
        seen["records", held] = train(policy, rank, 2, after_forward=policy.reshard)
        policy.reshard()
        seen["weights", held] = precision.full_state_dict(policy)
    local = sum(p.to_local().numel() for p in policy.parameters())
    seen["share"] = local / sum(p.numel() for p in policy.parameters())
    torch.save(seen, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", precision.RULES)
def test_sharded_states_train_the_same_weights(rule, dtype, two_ranks):
    alone, held = sharded_optimizer(0, rule, dtype, shard=False)
    shares = []
    for seen in two_ranks:
        weights, share = seen[rule, str(dtype)]
        shares.append(share)
        assert all(same(a, b) for a, b in zip(alone, weights, strict=True))
    assert held == 4 and sum(shares) == 4 and max(shares) < 4  # each parameter's states on one rank only


@pytest.mark.parametrize("held", [False, True], ids=["fpo", "tdpo2"])
def test_fsdp_gives_the_gradients_of_one_process(held, two_ranks, tmp_path):
    policy = make_policy(held)
    expected = train(policy, 0, 1)
    for rank, seen in enumerate(two_ranks):
        for (logps, norm, gradients), (a, n, theirs) in zip(expected, seen["records", held], strict=True):
            assert torch.allclose(a, logps.view(2, 8)[:, rank::2].flatten(), rtol=1e-5, atol=1e-5)
            assert n.item() == pytest.approx(norm.item(), rel=1e-5) and norm > 0.05
            flat, ours = (torch.cat([g.flatten() for g in gs]) for gs in (gradients, theirs))
            assert (flat - ours).norm() <= 2e-6 * flat.norm()
        assert seen["share"] == pytest.approx(0.5, abs=0.01)
    weights = two_ranks[0]["weights", held]
    assert two_ranks[1]["weights", held] == {}
    assert list(weights) == [name for name, _ in policy.lm.named_parameters()]  # the tied head once
    policy.lm.save_pretrained(tmp_path / "model", state_dict=weights)
    again = Gemma2ForCausalLM.from_pretrained(tmp_path / "model")
    for p, q in zip(policy.lm.parameters(), again.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6)
    assert again.lm_head.weight is again.model.embed_tokens.weight
