"""Exact low precision, and states sharded over the ranks: what lets Gemma-2-9B train on 80 GB cards.

At lr 5e-7 (Table 5) a bf16 weight of 0.02 reaches its next value only if 122 updates are added at once:
rounded to nearest, 99 % of updates change nothing. So the float32 master is kept, exactly, as two halves: the
bf16 weight that the model computes with, and an int16 `rest`.

Bytes a parameter on each of R ranks, activations not counted; FSDP2 also holds a layer or two in flight

    how                          weight  gradient  rest  Adam | RMSprop   in all
    float32, every rank all      4       4               8    | 4         16     | 12
    bf16, every rank all         2       2         2     8    | 4         14     | 10
    bf16, `shard=True`           2       2         2/R   8/R  | 4/R       4+10/R | 4+6/R
    FSDP2, `shard_policy`        4/R     4/R             8/R  | 4/R       16/R   | 12/R

The order for FSDP2: activation checkpointing, Policy with its hooks, `shard_policy`, then the optimizer.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

RULES = ("adam", "rmsprop")  # Table 5: Gemma-2-2B, Gemma-2-9B
SLICE = 2**22  # elements worked on at a time: temporaries stay below 100 MB, whatever the model


# ---------------------------------------------------------------------------- float32 in two halves
def split(master):
    """A float32 tensor as a bf16 weight and what rounding took from it: nothing is lost.

    The weight is the master rounded to nearest, ties away from zero: ties to even would need a 17th bit.
    Masters that round above bf16's largest have an infinite weight; the halves still join exactly.

    Args:
        master: float32, any shape; any bits but a NaN's.
    Returns:
        weight, bfloat16, and rest, int16, both of master's shape.
    """
    bits = master.view(torch.int32)  # sign and magnitude: adding to the bits adds to the magnitude
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(weight, rest):
    """The float32 master of `split`, bit for bit. Args: weight bfloat16, rest int16, of one shape."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + rest).view(torch.float32)


def _local(tensor):
    """What this rank holds of a tensor: its shard of a DTensor, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _slices(*tensors):
    """Tuples of views of tensors of one size, `SLICE` elements at a time."""
    flat = [_local(tensor).view(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), SLICE):
        yield tuple(tensor[start : start + SLICE] for tensor in flat)


# ---------------------------------------------------------------------------- the optimizer
def adam_(master, g, exp_avg, exp_avg_sq, *, lr, step, betas, eps):
    """Adam, in place; tensors float32, of one shape; `step` counts from 1."""
    beta1, beta2 = betas
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    scale = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    master.addcdiv_(exp_avg, scale, value=-lr / (1 - beta1**step))


def rmsprop_(master, g, square_avg, *, lr, alpha, eps):
    """RMSprop, in place; tensors float32, of one shape."""
    square_avg.mul_(alpha).addcmul_(g, g, value=1 - alpha)
    master.addcdiv_(g, square_avg.sqrt().add_(eps), value=-lr)


class ExactOptimizer(torch.optim.Optimizer):
    """Adam (2B) or RMSprop (9B), Table 5, with the updates of float32 weights for bf16 weights too.

    float32 weights are bit-equal to those of torch.optim.Adam or RMSprop, foreach=False. bf16 weights are,
    bit for bit, `split` of the float32 weights that the same gradients would train: no update is lost that
    float32 keeps. A step allocates nothing of a model's size and does not wait for the device.

    State of a parameter, in its shape (a DTensor's: the local shard): exp_avg and exp_avg_sq, or square_avg,
    float32; for bf16 rest, int16; for Adam step, int64 on the CPU. With the weights they make a resume exact.
    Under ZeroRedundancyOptimizer each rank has its own: `optimizer.optim.state_dict()`.

    Args:
        params: parameters or groups of them, float32 or bfloat16.
        lr: learning rate; `param_groups` may change it between steps.
        rule: "adam" or "rmsprop".
        betas: of Adam, the authors' code's; the paper names none.
        alpha: decay of RMSprop's average, torch's default; the paper names none.
        eps: added to the root of the average square.
    Raises: ValueError for another rule or dtype.
    """

    def __init__(self, params, lr, *, rule="adam", betas=(0.9, 0.95), alpha=0.99, eps=1e-8):
        if rule not in RULES:
            raise ValueError(f"optimizer {rule!r}: one of {', '.join(RULES)}")
        super().__init__(params, {"lr": lr, "rule": rule, "betas": betas, "alpha": alpha, "eps": eps})

    def add_param_group(self, param_group):
        """As torch's; ValueError for a dtype in which updates would round away."""
        super().add_param_group(param_group)
        if odd := {p.dtype for p in self.param_groups[-1]["params"]} - {torch.float32, torch.bfloat16}:
            raise ValueError(f"{odd} weights: float32 or bfloat16; in others updates would round away")

    def new_state(self, parameter, rule):
        """The state that a parameter starts with, in its shape (a DTensor's local shard)."""
        weight, averages = _local(parameter), ("exp_avg", "exp_avg_sq") if rule == "adam" else ("square_avg",)
        state = {name: torch.zeros_like(weight, dtype=torch.float32) for name in averages}
        if weight.dtype == torch.bfloat16:
            state["rest"] = torch.zeros_like(weight, dtype=torch.int16)
        return state | ({"step": torch.zeros((), dtype=torch.int64)} if rule == "adam" else {})

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter] = self.state[parameter] or self.new_state(parameter, group["rule"])
                    self._update(parameter, self.state[parameter], group)

    def _update(self, parameter, state, group):
        options = {"lr": group["lr"], "eps": group["eps"]}
        if group["rule"] == "adam":
            state["step"] += 1
            options |= {"betas": group["betas"], "step": int(state["step"])}
            rule, averages = adam_, (state["exp_avg"], state["exp_avg_sq"])
        else:
            options |= {"alpha": group["alpha"]}
            rule, averages = rmsprop_, (state["square_avg"],)
        if "rest" not in state:  # float32: the weight is its own master
            for weight, g, *parts in _slices(parameter, parameter.grad, *averages):
                rule(weight, g, *parts, **options)
            return
        for weight, rest, g, *parts in _slices(parameter, state["rest"], parameter.grad, *averages):
            master = join(weight, rest)
            rule(master, g.float(), *parts, **options)
            for half, new in zip((weight, rest), split(master), strict=True):
                half.copy_(new)

    def load_state_dict(self, state_dict):
        """Copy states in, bit for bit (torch's own would cast each to its parameter's dtype).

        Raises: ValueError where the states of a parameter differ in name, shape or dtype from what it needs.
        """
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, number in zip(group["params"], saved_group["params"], strict=True):
                if (saved := state_dict["state"].get(number)) is None:
                    continue  # it never had a gradient
                state = self.new_state(parameter, group["rule"])
                found, needed = ({k: (*t.shape, t.dtype) for k, t in s.items()} for s in (saved, state))
                if found != needed:
                    raise ValueError(f"states of parameter {number}: {found}; needed: {needed}")
                self.state[parameter] = {name: tensor.copy_(saved[name]) for name, tensor in state.items()}


def make_optimizer(rule, parameters, lr, *, shard):
    """A run's optimizer. With `shard` and several ranks, each has the states of its share of the parameters.

    A rank updates its share and sends it to the others: the same bits as without sharding. Parameters of
    `shard_policy` are sharded already: `shard` adds nothing.

    Args:
        rule: "adam" or "rmsprop".
        parameters: all float32 or all bfloat16, with the same values on every rank.
        lr: learning rate.
        shard: share the states out over the ranks.
    Returns:
        ExactOptimizer, or a ZeroRedundancyOptimizer with one as `.optim`; `param_groups` sets lr on both.
    """
    parameters = list(parameters)
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    if alone or not shard or isinstance(parameters[0], DTensor):
        return ExactOptimizer(parameters, lr, rule=rule)
    return ZeroRedundancyOptimizer(parameters, ExactOptimizer, lr=lr, rule=rule)


@torch.no_grad()
def clip_gradients(parameters, max_norm):
    """Scale gradients, in place, to a norm of at most `max_norm`; the norm is float32 for bf16 gradients too.

    Below `max_norm` none changes; above, each is rounded once. Does not wait for the device.

    Args:
        parameters: DTensors, all on one mesh, or tensors; those without a gradient are passed over.
        max_norm: above 0; math.inf scales nothing.
    Returns:
        () float32, the norm before scaling, over all shards. Not finite: the gradients are void, don't step.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Sums are pairwise on every device; vector_norm adds in a row on the CPU (8e-5 off at 2^22 elements).
    squares = [part.float().square().sum() for g in gradients for (part,) in _slices(g)]
    total = torch.stack(squares).double().sum()
    if isinstance(gradients[0], DTensor):
        dist.all_reduce(total, group=gradients[0].device_mesh.get_group())
    norm = total.sqrt().float()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in gradients:
        for (part,) in _slices(g):
            part.copy_(part.float().mul_(scale))
    return norm


def all_finite(parameters) -> bool:
    """Whether every weight of every rank is finite; the same answer on all."""
    finite = torch.stack([_local(p.detach()).isfinite().all() for p in parameters]).all().float()
    if dist.is_initialized():
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)


# ---------------------------------------------------------------------------- FSDP2
def shard_layers(lm, *, dtype=torch.bfloat16, device=None):
    """Shard each of `lm.model.layers` over the ranks; a layer is whole, in `dtype`, only while it computes.

    The model may lie on the CPU: its layers go to `device` (none: the model's) one by one, each as a shard.

    Returns: the options of `fully_shard`, for the root. Gradients are summed over the ranks in float32.
    """
    mesh = init_device_mesh(torch.device(device or lm.device).type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in lm.model.layers:  # a layer without a root over it would stay whole after its forward
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    return {"mesh": mesh, "mp_policy": precision}


def shard_policy(policy, *, dtype=torch.bfloat16, device=None):
    """Shard a Policy over the ranks in place, FSDP2: each layer, then what is left (the embedding) as root.

    The shards are the float32 masters. The root is the policy, since its forward uses the head's weight: with
    the body as root the head would part from the embedding in silence. Of a held reference (TDPO) the layers
    are sharded and the embedding stays whole: load it in `dtype`. After a forward under no_grad call
    `policy.reshard()`. Every rank must call forward equally often.

    Args:
        policy: a Policy with float32 weights.
        dtype: of the computation.
        device: where to train; none: where the model is.
    Raises: ValueError for weights that are not float32. RuntimeError if head and embedding parted.
    """
    lm = policy.lm
    if odd := {p.dtype for p in lm.parameters()} - {torch.float32}:
        raise ValueError(f"{odd} weights: the shards are the masters, so they must be float32")
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    tied = head.weight is embedding.weight
    options = shard_layers(lm, dtype=dtype, device=device)
    for reference in policy.reference:
        shard_layers(reference, dtype=dtype, device=device)
    fully_shard(policy, **options)
    if tied != (head.weight is embedding.weight):
        raise RuntimeError("sharding untied the head from the embedding")


def full_state_dict(policy):
    """The model's weights on rank 0's CPU, gathered one by one; {} elsewhere. Every rank must call it.

    Returns: dict for `policy.lm.save_pretrained(folder, state_dict=…)`, tied weights once.
    """
    main = not dist.is_initialized() or dist.get_rank() == 0
    named = policy.lm.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(named.items())}
    state = {}
    for name, tensor in named.items():
        if first[id(tensor)] == name:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            state |= {name: whole.detach().cpu()} if main else {}
    return state
