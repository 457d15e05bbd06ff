"""READ LAST: the same numbers, made so that they fit a card's memory and keep it busy.

The head and the SAE's features work in slices: neither (N, V) logits nor (N, m) features exist at once.
Training bf16 weights loses no update. At lr 5e-7 (Table 5) a weight of 0.02 reaches its next bf16 value only
if 122 updates are added at once; rounded to nearest, 99 % of updates change nothing. So the float32 master is
kept in two halves: the bf16 weight that the model computes with, and an int16 `rest`.

Bytes per parameter on each of R ranks, activations not counted; FSDP2 also holds a layer or two in flight

    how                          weight  gradient  rest  Adam | RMSprop   in all
    float32, every rank all      4       4               8    | 4         16     | 12
    bf16, every rank all         2       2         2     8    | 4         14     | 10
    bf16, `shard=True`           2       2         2/R   8/R  | 4/R       4+10/R | 4+6/R
    FSDP2, `shard_policy`        4/R     4/R             8/R  | 4/R       16/R   | 12/R

Bytes read and written per bf16 parameter and step, counted by hand, operation by operation

    device   gradient_norm   scale_gradients_, above the maximum   Adam | RMSprop
    CPU      18              4                                     170  | 150, in slices
    CUDA     2               4                                     26   | 18, in one kernel
"""

import contextlib
import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from sae import active_features, as_mask

# Columns of logits at once. By the device alone: the same states give the same bits in both phases.
VOCABULARY_SLICE = {"cuda": 8192, "cpu": 1024}
TOKEN_SLICE = 1024  # tokens whose features are made at once
SLICE = 2**22  # weights updated at once on the CPU: temporaries stay below 100 MB, whatever the model
RULES = ("adam", "rmsprop")  # Table 5: Gemma-2-2B, Gemma-2-9B


@functools.cache
def compiled(function):
    """A function of tensors of any shape as few kernels: each value is read and written once."""
    # fullgraph: beyond torch's limit of compilations it raises, where else it would run eager in silence.
    fused = torch.compile(function, dynamic=True, fullgraph=True)
    # Floats are compiled in: left to be dynamic, torch 2.13 computes with those of an earlier call
    # (github.com/pytorch/pytorch/issues/194976). What changes from step to step comes as () tensors.
    return torch._dynamo.config.patch(specialize_float=True)(fused)


@contextlib.contextmanager
def tf32(allowed):
    """Whether a card rounds the factors of float32 products to ten bits, as long as this lasts."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# ---------------------------------------------------------------------------- the head
def _product(a, b):
    """a @ b, summed and returned in float32 (float64 where given)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(torch.float32, a.dtype)  # exact for a product of bf16 values
    return a.to(wide) @ b.to(wide)


def _fold(sums, z, x, local):
    """Fold a slice of logits z (N, c) into the running maximum, Σ exp(z - max), Σ exp(z - max)·x and the
    target's logit, each (N,). x: (N, c) or None; local: (N,), the target's column, in the slice or not."""
    top, mass, inner, chosen = sums
    higher = torch.maximum(top, z.amax(1))
    scale, e = (top - higher).exp(), (z - higher[:, None]).exp()
    inner = inner * scale + ((e * x).sum(1) if x is not None else 0.0)
    at = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    chosen = torch.where((local >= 0) & (local < z.shape[1]), at, chosen)
    return higher, mass * scale + e.sum(1), inner, chosen


def read_slice(z, z_ref, local, sums, ref_sums, softcap, entropy):
    """`_fold` of a slice's products z after the softcap, and of the reference's z_ref, if there is one."""
    capped = [x if x is None or softcap is None else (x / softcap).tanh_().mul_(softcap) for x in (z, z_ref)]
    z, z_ref = capped
    if z_ref is not None:  # KL(ref ‖ policy) needs the mean of z_ref - z under the reference
        ref_sums = _fold(ref_sums, z_ref, z_ref - z, local)
    return _fold(sums, z, z if entropy else None, local), ref_sums


def _softmax(z, softcap, logsumexp):
    """(N, c) probabilities of a slice's products z, and d logits / dz (None: 1)."""
    if softcap is None:
        return (z - logsumexp[:, None]).exp_(), None
    t = (z / softcap).tanh_()
    p = torch.add(-logsumexp[:, None], t, alpha=softcap).exp_()
    return p, t.square_().neg_().add_(1)  # d softcap·tanh(z / softcap) / dz = 1 - tanh²


def gradient_slice(z, z_ref, local, logsumexp, ref_logsumexp, g_logp, g_kl, softcap, dtype):
    """d loss / dz (N, c) of a slice's products z, from those of log π(token) and of the KL, each (N,)."""
    here, place = (local >= 0) & (local < z.shape[1]), local.clamp(0, z.shape[1] - 1)[:, None]
    p_ref = None if z_ref is None else _softmax(z_ref, softcap, ref_logsumexp)[0]
    del z_ref  # a block of memory less, where this is not one kernel
    p, slope = _softmax(z, softcap, logsumexp)
    del z
    if p_ref is None:  # d log p(y) / d logits = 1[y] - p
        g = p.mul_(-g_logp[:, None])
    else:  # d KL(ref ‖ p) / d logits = p - p_ref
        g = p.mul_((g_kl - g_logp)[:, None]).sub_(p_ref.mul_(g_kl[:, None]))
    g.scatter_add_(1, place, torch.where(here, g_logp, 0.0)[:, None])
    return (g if slope is None else g.mul_(slope)).to(dtype)


class _TokenStatistics(torch.autograd.Function):
    """`token_statistics` over slices of the vocabulary, made again in the backward, where each slice of the
    weight's gradient is written once. Beyond the gradients, memory is a few (N, slice) blocks."""

    @staticmethod
    def forward(ctx, states, weight, targets, softcap, ref_states, ref_weight, chunk, entropy, fused):
        """(N,) log π(token), KL, log π_ref(token), entropy: running sums over slices of `chunk` logits."""
        wide = torch.promote_types(torch.float32, states.dtype)
        zero = torch.zeros(len(states), dtype=wide, device=states.device)  # (N,)
        sums, ref_sums = ((zero - torch.inf, zero + 0, zero + 0, zero + 0) for _ in range(2))  # see `_fold`
        fold = compiled(read_slice) if fused else read_slice
        for v in range(0, len(weight), chunk):
            sums, ref_sums = fold(  # of products (N, chunk), which no other name keeps
                _product(states, weight[v : v + chunk].T),
                None if ref_states is None else _product(ref_states, ref_weight[v : v + chunk].T),
                targets - v, sums, ref_sums, softcap, entropy,
            )  # fmt: skip
        (top, mass, inner, chosen), (ref_top, ref_mass, ref_inner, ref_chosen) = sums, ref_sums
        logsumexp = top + mass.log()  # (N,), all that the backward needs to know of the softmax
        ref_logsumexp = ref_top + ref_mass.log()
        ctx.save_for_backward(states, weight, targets, ref_states, ref_weight, logsumexp, ref_logsumexp)
        ctx.softcap, ctx.chunk, ctx.fused = softcap, chunk, fused
        kl = ref_logps = H = None
        if ref_states is not None:
            kl, ref_logps = ref_inner / ref_mass - ref_logsumexp + logsumexp, ref_chosen - ref_logsumexp
            ctx.mark_non_differentiable(ref_logps)
        if entropy:
            H = logsumexp - inner / mass  # -Σ p log p, with log p = z - logsumexp
            ctx.mark_non_differentiable(H)
        return chosen - logsumexp, kl, ref_logps, H

    @staticmethod
    def backward(ctx, g_logp, g_kl, *_):
        """Gradients of states (N, d) and weight (V, d), from those of log π(token) and KL, (N,) each."""
        states, weight, targets, ref_states, ref_weight, logsumexp, ref_logsumexp = ctx.saved_tensors
        d_states = torch.zeros_like(states, dtype=logsumexp.dtype)  # a sum over all slices: float32
        d_weight = torch.empty_like(weight)
        gradient = compiled(gradient_slice) if ctx.fused else gradient_slice
        for v in range(0, len(weight), ctx.chunk):
            W = weight[v : v + ctx.chunk]
            g = gradient(  # d loss / d (states @ W.T), (N, chunk)
                _product(states, W.T),
                None if ref_states is None else _product(ref_states, ref_weight[v : v + ctx.chunk].T),
                targets - v, logsumexp, ref_logsumexp, g_logp, g_kl, ctx.softcap, states.dtype,
            )  # fmt: skip
            if g.dtype == d_states.dtype:  # in place, where nothing needs a wider sum
                d_states.addmm_(g, W)
                torch.mm(g.T, states, out=d_weight[v : v + ctx.chunk])
            else:
                d_states += _product(g, W)
                d_weight[v : v + ctx.chunk] = _product(g.T, states)
        return d_states.to(states.dtype), d_weight, *(None,) * 7


def token_statistics(
    states, weight, targets, *, softcap=None, ref_states=None, ref_weight=None, entropy=False, fused=None
):
    """Log-probabilities of N tokens, and the KL and entropy of their distributions, without (N, V) logits.

    Args:
        states: (N, d), the transformer's last hidden states that predict the tokens.
        weight: (V, d), the output embedding; states and weight get gradients.
        targets: (N,) token ids, no -100 among them.
        softcap: logits are softcap·tanh(logits / softcap); None: as they are.
        ref_states, ref_weight: (N, d), (V, d) of the reference, for the KL of TDPO (Eq. 3).
        entropy: also the entropy of each distribution, without gradient.
        fused: compile what is done to a slice of logits into one kernel; None: on CUDA.
    Returns: log π(token), KL(ref ‖ policy), log π_ref(token) and entropy, nats, each (N,) float32 or None.
    """
    fused = states.is_cuda if fused is None else fused
    options = VOCABULARY_SLICE["cuda" if states.is_cuda else "cpu"], entropy, fused
    return _TokenStatistics.apply(states, weight, targets, softcap, ref_states, ref_weight, *options)


# ---------------------------------------------------------------------------- the SAE's features
def owner_matrix(owner, responses, dtype):
    """(responses, N): 1 where token n is one of a response's, by owner (N,). Its product with x (N, …) sums
    over each response, in the same order every time; `index_add_`, atomic on CUDA, does not."""
    return (owner == torch.arange(responses, device=owner.device)[:, None]).to(dtype)


class _PooledFeatures(torch.autograd.Function):
    """`pooled_features` over slices of tokens. Kept for the backward is which features are active."""

    @staticmethod
    def forward(ctx, states, W_enc, b_enc, threshold, k, mean, chunk, rounded):
        """(responses, m), features averaged by the weights `mean` (responses, N)."""
        kept, m = [], W_enc.shape[1]
        pooled = torch.zeros(len(mean), m, dtype=W_enc.dtype, device=states.device)
        for i in range(0, len(states), chunk):
            with tf32(rounded):
                z = torch.addmm(b_enc, states[i : i + chunk].to(W_enc.dtype), W_enc)  # (chunk, m)
            active = active_features(z, threshold, k)
            # (responses, m), of features c (chunk, m) as in SAE.encode, which no name keeps
            pooled.addmm_(mean[:, i : i + chunk], torch.where(as_mask(active, m), z, 0.0))
            if ctx.needs_input_grad[0]:
                kept.append(active)
        ctx.save_for_backward(W_enc, mean, *kept)
        ctx.dtype, ctx.chunk, ctx.rounded = states.dtype, chunk, rounded
        return pooled

    @staticmethod
    def backward(ctx, g):
        """The gradient of states (N, d), from that of the averages (responses, m)."""
        W_enc, mean, *kept = ctx.saved_tensors
        columns, m = slice(None), g.shape[1]  # all of them
        if not g.is_cuda:  # where counting waits for nothing
            # D_FPO sends gradients to at most 2 k features of a response, so most columns may be left out.
            some = g.any(0).nonzero().flatten()
            columns = some if 2 * len(some) < m else columns
        g, W_enc = g[:, columns], W_enc[:, columns]
        d_states = torch.empty(mean.shape[1], len(W_enc), dtype=ctx.dtype, device=g.device)
        for i, active in zip(range(0, len(d_states), ctx.chunk), kept, strict=True):
            d_c = mean[:, i : i + ctx.chunk].T @ g  # (chunk, columns)
            with tf32(ctx.rounded):
                here = as_mask(active, m)[:, columns]
                d_states[i : i + ctx.chunk] = torch.where(here, d_c, 0.0) @ W_enc.T
        return d_states, *(None,) * 7


def pooled_features(states, sae, owner, lengths, rounded=False):
    """c̄: the SAE's features averaged over each response's positions (Eq. 5, Eq. 10).

    Args:
        states: (N, d), what the SAE reads at the N positions; gradient goes to them alone.
        sae: an SAE, m features; or another object with its `W_enc`, `b_enc`, `threshold` and `k`.
        owner, lengths: (N,), the response of each position; (responses,), positions of each, perhaps 0.
        rounded: on a card, multiply by W_enc in TF32. For states of bf16 products, whose own rounding is
            coarser: in float32 these two products take 6 % of a step of Gemma-2-2B on an H100.
    Returns: (responses, m) float32.
    """
    mean = owner_matrix(owner, len(lengths), sae.W_enc.dtype) / lengths.clamp(min=1)[:, None]
    options = sae.threshold, sae.k, mean, TOKEN_SLICE, rounded
    return _PooledFeatures.apply(states, sae.W_enc, sae.b_enc, *options)


# ---------------------------------------------------------------------------- float32 in two halves
def split(master):
    """A float32 master, any but NaN, as a bfloat16 weight and an int16 rest of its shape: nothing is lost.

    The weight is the master rounded to nearest, ties away from zero: ties to even would need a 17th bit.
    Masters that round above bf16's largest have an infinite weight; the halves still join exactly.
    """
    bits = master.view(torch.int32)  # sign and magnitude: adding to the bits adds to the magnitude
    high = (bits + 0x8000) >> 16  # half a unit of bf16 added, then cut off: rounded to nearest
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(weight, rest):
    """The float32 master that `split` gave weight, bfloat16, and rest, int16, for: bit for bit."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + rest).view(torch.float32)


def local(tensor):
    """What this rank holds of a tensor: its shard of a DTensor, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------------------- the optimizer
def adam_(master, g, exp_avg, exp_avg_sq, *, step_size, root, betas, eps):
    """Step t of Adam, in place, float32. step_size lr / (1 - β1^t), root √(1 - β2^t): float or () tensor."""
    beta1, beta2 = betas
    exp_avg.lerp_(g, 1 - beta1)  # m = β1 m + (1 - β1) g
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)  # v = β2 v + (1 - β2) g²
    master.addcdiv_(exp_avg * -step_size, exp_avg_sq.sqrt().div_(root).add_(eps))


def rmsprop_(master, g, square_avg, *, step_size, alpha, eps):
    """A step of RMSprop, in place, float32. step_size, lr: float or () tensor."""
    square_avg.mul_(alpha).addcmul_(g, g, value=1 - alpha)  # v = α v + (1 - α) g²
    master.addcdiv_(g * -step_size, square_avg.sqrt().add_(eps))


def update_(rule, weight, g, rest=None, **averages_and_numbers):
    """A step of `rule`, in place, on a float32 weight, or on the master of a bf16 weight and its rest."""
    master = weight if rest is None else join(weight, rest)
    rule(master, g.float(), **averages_and_numbers)
    if rest is not None:
        for half, new in zip((weight, rest), split(master), strict=True):
            half.copy_(new)


class ExactOptimizer(torch.optim.Optimizer):
    """Adam (2B) or RMSprop (9B), Table 5, with the updates of float32 weights for bf16 weights too.

    On the CPU float32 weights are bit-equal to those of torch.optim.Adam or RMSprop, foreach=False. bf16
    weights are, bit for bit, `split` of the float32 weights that the same gradients would train: no update is
    lost that float32 keeps. A step allocates nothing of a model's size and does not wait for the device.

    Fused, a product and a sum are rounded once: after 200 steps at lr 5e-7 up to 0.9 % of the masters differ
    from the unfused ones, by at most 0.015 lr. bf16 weights are still `split` of fused float32 ones (on an
    H100 all of a million; of 4,500, RMSprop's were not, by a last bit), and no update is lost.

    State of a parameter, in its shape (a DTensor's: the local shard): exp_avg and exp_avg_sq, or square_avg,
    float32; for bf16 rest, int16; for Adam step, int64 on the CPU. With the weights they make a resume exact.

    Args:
        params, lr, eps: as torch.optim's; float32 or bfloat16; `param_groups` may change lr between steps.
        rule: "adam" or "rmsprop".
        betas, alpha: of Adam and of RMSprop. The paper names none; its experiments ran with torch's defaults.
        fused: compile the update into one kernel; None: on CUDA.
    Raises: ValueError for another rule, or a dtype in which updates would round away.
    """

    def __init__(self, params, lr, *, rule="adam", betas=(0.9, 0.999), alpha=0.99, eps=1e-8, fused=None):
        super().__init__(params, {"lr": lr, "rule": rule, "betas": betas, "alpha": alpha, "eps": eps})
        self.fused = fused
        if rule not in RULES:
            raise ValueError(f"optimizer {rule!r}: one of {', '.join(RULES)}")
        if odd := {p.dtype for g in self.param_groups for p in g["params"]} - {torch.float32, torch.bfloat16}:
            raise ValueError(f"{odd} weights: float32 or bfloat16; in others updates would round away")

    def state_of(self, parameter):
        """A parameter's state; zeros, before its first step."""
        if state := self.state[parameter]:
            return state
        weight, adam = local(parameter), self.defaults["rule"] == "adam"
        for name in ("exp_avg", "exp_avg_sq") if adam else ("square_avg",):
            state[name] = torch.zeros_like(weight, dtype=torch.float32)
        if weight.dtype == torch.bfloat16:
            state["rest"] = torch.zeros_like(weight, dtype=torch.int16)
        if adam:
            state["step"] = torch.zeros((), dtype=torch.int64)
        return state

    @torch.no_grad()
    def step(self):  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self.state_of(parameter), group)

    def _update(self, parameter, state, group):
        rule: Callable
        if group["rule"] == "adam":
            state["step"] += 1
            t, (beta1, beta2) = int(state["step"]), group["betas"]
            changing = {"step_size": group["lr"] / (1 - beta1**t), "root": (1 - beta2**t) ** 0.5}
            rule, fixed = adam_, {"betas": group["betas"], "eps": group["eps"]}
        else:
            changing = {"step_size": group["lr"]}
            rule, fixed = rmsprop_, {"alpha": group["alpha"], "eps": group["eps"]}
        tensors = {"weight": parameter, "g": parameter.grad} | state
        flat = {name: local(x).detach().view(-1) for name, x in tensors.items() if name != "step"}
        if self.fused or (self.fused is None and parameter.is_cuda):  # filled there: a copy would wait
            changing = {name: torch.full((), x, device=parameter.device) for name, x in changing.items()}
            return compiled(update_)(rule, **flat, **changing, **fixed)
        for i in range(0, flat["g"].numel(), SLICE):
            update_(rule, **{name: x[i : i + SLICE] for name, x in flat.items()}, **changing, **fixed)

    def load_state_dict(self, state_dict):
        """Refused: torch's own would cast states to the weights' dtype. Copy them into `state_of` instead."""
        raise TypeError("ExactOptimizer: copy saved states into those that state_of(parameter) gives")


def make_optimizer(rule, parameters, lr, *, shard, betas=(0.9, 0.999), fused=None):
    """A run's ExactOptimizer, or a ZeroRedundancyOptimizer with one as `.optim`; `param_groups` set lr.

    With `shard` and several ranks, each has the states of its share of the parameters, updates it and sends
    it to the others: the same bits as without. Parameters of `shard_policy` are sharded already. All are of
    one dtype, with the same values on every rank; the other arguments are ExactOptimizer's.
    """
    parameters, options = list(parameters), {"lr": lr, "rule": rule, "betas": betas, "fused": fused}
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    if alone or not shard or isinstance(parameters[0], DTensor):
        return ExactOptimizer(parameters, **options)
    return ZeroRedundancyOptimizer(parameters, ExactOptimizer, **options)  # updates, then broadcasts


# ---------------------------------------------------------------------------- gradients
@torch.no_grad()
def gradient_norm(parameters):
    """() float32, the norm of all gradients together, over all shards (DTensors: on one mesh). Does not wait
    for the device. Where it is not finite, the gradients are void: don't step."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients[0].is_cuda:  # few kernels, one pass, without a copy in float32
        norms = torch._foreach_norm([local(g) for g in gradients], dtype=torch.float32)
        squares = [torch.stack(norms).double().square().sum()]
    else:  # sums are pairwise here; vector_norm adds in a row on the CPU (8e-5 off at 2^22 elements)
        squares = [part.float().square().sum() for g in gradients for part in local(g).view(-1).split(SLICE)]
    total = torch.stack(squares).double().sum()  # hundreds of parts: nothing is lost by adding them
    if isinstance(gradients[0], DTensor):
        dist.all_reduce(total, group=gradients[0].device_mesh.get_group())  # the other ranks' shards
    return total.sqrt().float()


@torch.no_grad()
def scale_gradients_(parameters, factor: float):
    """Multiply every gradient by `factor`, in place; each value is rounded once. To clip, call it with
    max_norm / (norm + 1e-6), and only where `gradient_norm` gave more than max_norm."""
    for parameter in parameters:
        if parameter.grad is not None:
            local(parameter.grad).mul_(factor)


# ---------------------------------------------------------------------------- FSDP2
def shard_layers(layers, *, dtype=torch.bfloat16, device="cpu"):
    """Shard each of a model's layers over the ranks; a layer is whole, in `dtype`, only while it computes.

    From the CPU they go to `device` one by one. Of a held reference (TDPO) that is all: load it in `dtype`,
    and move the rest, its embedding, yourself. Returns the root's `fully_shard` options.
    """
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for layer in layers:  # a layer without a root over it would stay whole after its forward
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    return {"mesh": mesh, "mp_policy": precision}


def shard_policy(policy, layers, *, dtype=torch.bfloat16, device="cpu"):
    """Shard a Policy over the ranks in place, FSDP2: each layer, then what is left (the embedding) as root.

    The order: activation checkpointing, Policy with its hooks, this, the optimizer. The shards are the
    float32 masters; `dtype` is the computation's. The root is the policy, since its forward uses the head's
    weight: with the body as root the head would part from the embedding in silence. After a forward under
    no_grad call `policy.reshard()`. Every rank must call forward equally often. ValueError for other weights
    than float32.
    """
    if odd := {p.dtype for p in policy.parameters()} - {torch.float32}:
        raise ValueError(f"{odd} weights: the shards are the masters, so they must be float32")
    options = shard_layers(layers, dtype=dtype, device=device)
    fully_shard(policy, **options)
    policy.dtype = dtype


def full_state_dict(policy):
    """The model's weights on rank 0's CPU, gathered one by one, tied ones once: `save_pretrained` takes them
    as state_dict. {} on other ranks; every rank must call it."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    state, seen = dict[str, torch.Tensor](), set()
    for name, tensor in policy.lm.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # tied weights are one tensor under two names
            seen.add(id(tensor))
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # every rank sends
            state |= {name: whole.detach().cpu()} if main else {}
    return state
