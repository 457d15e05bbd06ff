"""Exact low precision, and states sharded over the ranks: what lets Gemma-2-9B train on 80 GB cards.

At lr 5e-7 (Table 5) a bf16 weight of 0.02 would have to move by 122 updates at once to reach its next value: rounded
to nearest, about 99 % of updates change nothing. So the float32 master is kept, exactly, as two halves: the bf16
weight that the model computes with, and an int16 `rest`.

Bytes a parameter of N parameters on each of R ranks; activations come on top
    how                           weight  gradient  rest  Adam       RMSprop    in all
    float32, replicated           4       4         -     8          4          16     | 12
    bf16, replicated              2       2         2     8          4          14     | 10
    bf16, `shard=True`            2       2         2/R   8/R        4/R        4+10/R | 4+6/R
    `shard_policy` (FSDP2)        4/R     4/R       -     8/R        4/R        16/R   | 12/R, and a layer in bf16

The order that works with FSDP2: activation checkpointing, Policy with its hooks, `shard_policy`, the optimizer.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

RULES = ("adam", "rmsprop")  # Table 5: Gemma-2-2B, Gemma-2-9B
SLICE = 2**22  # elements worked on at a time: the step's temporaries are some 80 MB, whatever the model


# ---------------------------------------------------------------------------- float32 in two halves
def split(master):
    """A float32 tensor as a bf16 weight and what rounding took from it: nothing is lost.

    The weight is the master rounded to nearest, ties away from zero (ties to even would need a 17th bit in `rest`).
    A master within half a bf16 unit of the largest float32 has an infinite weight; its halves still join exactly.

    Args:
        master: float32, any shape; every bit pattern but NaN's.
    Returns:
        weight, bfloat16, and rest, int16, of the same shape.
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
    """Views of tensors of one size, `SLICE` elements at a time."""
    flat = [_local(tensor).view(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), SLICE):
        yield tuple(tensor[start : start + SLICE] for tensor in flat)


# ---------------------------------------------------------------------------- the optimizer
def adam_(master, g, exp_avg, exp_avg_sq, *, lr, step, betas, eps):
    """Adam, in place, all in float32 and of one shape; `step` counts from 1."""
    beta1, beta2 = betas
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    scale = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    master.addcdiv_(exp_avg, scale, value=-lr / (1 - beta1**step))


def rmsprop_(master, g, square_avg, *, lr, alpha, eps):
    """RMSprop, in place, all in float32 and of one shape."""
    square_avg.mul_(alpha).addcmul_(g, g, value=1 - alpha)
    master.addcdiv_(g, square_avg.sqrt().add_(eps), value=-lr)


class ExactOptimizer(torch.optim.Optimizer):
    """Adam (2B) or RMSprop (9B) of Table 5, whose updates are those of float32 weights, also for bf16 weights.

    For float32 parameters bit-equal to torch.optim.Adam or RMSprop with foreach=False. A bf16 parameter follows, bit
    for bit, the float32 weights that the same gradients would train, as `split` rounds them: no update is lost.
    Takes slices, so it allocates nothing of a model's size; does not wait for the device.

    State of a parameter, in its shape (a DTensor's local shard): exp_avg and exp_avg_sq, or square_avg, float32; rest,
    int16, for bf16; and Adam's step, int64 on the CPU. All of it and the weights make a resume exact. Under
    ZeroRedundancyOptimizer each rank saves its own `optimizer.optim.state_dict()`.

    Args:
        params: parameters or groups, float32 or bfloat16; DTensors too.
        lr: learning rate; `param_groups` may change it between steps.
        rule: "adam" or "rmsprop".
        betas: of Adam; the paper names none, these are the authors' code's.
        alpha: decay of RMSprop's average; torch's default, the paper names none.
        eps: added to the root of the average square.
    Raises: ValueError for another rule or dtype.
    """

    def __init__(self, params, lr, *, rule="adam", betas=(0.9, 0.95), alpha=0.99, eps=1e-8):
        if rule not in RULES:
            raise ValueError(f"optimizer {rule!r}: one of {', '.join(RULES)}")
        super().__init__(params, {"lr": lr, "rule": rule, "betas": betas, "alpha": alpha, "eps": eps})

    def add_param_group(self, param_group):
        """As torch's; refuses dtypes in which updates would round away."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(
                    f"{parameter.dtype} weights: float32 or bfloat16; in another updates would round away"
                )

    def _new_state(self, parameter, rule):
        averages = ("exp_avg", "exp_avg_sq") if rule == "adam" else ("square_avg",)
        state = {name: torch.zeros_like(_local(parameter), dtype=torch.float32) for name in averages}
        if parameter.dtype == torch.bfloat16:
            state["rest"] = torch.zeros_like(_local(parameter), dtype=torch.int16)
        if rule == "adam":
            state["step"] = torch.zeros((), dtype=torch.int64)
        return state

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter] = self.state[parameter] or self._new_state(parameter, group["rule"])
                    self._update(parameter, self.state[parameter], group)

    def _update(self, parameter, state, group):
        options = {"lr": group["lr"], "eps": group["eps"]}
        if group["rule"] == "adam":
            state["step"] += 1
            options |= {"betas": group["betas"], "step": int(state["step"])}
            rule, averages = adam_, (state["exp_avg"], state["exp_avg_sq"])
        else:
            options["alpha"] = group["alpha"]
            rule, averages = rmsprop_, (state["square_avg"],)
        if "rest" not in state:
            for weight, g, *parts in _slices(parameter, parameter.grad, *averages):
                rule(weight, g, *parts, **options)
            return
        for weight, g, rest, *parts in _slices(parameter, parameter.grad, state["rest"], *averages):
            master = join(weight, rest)
            rule(master, g.float(), *parts, **options)
            high, low = split(master)
            weight.copy_(high)
            rest.copy_(low)

    def load_state_dict(self, state_dict):
        """Copy in what `state_dict` gave, bit for bit (torch's own casts every state to the parameter's dtype).

        Raises: ValueError where a parameter's states have another name, shape or dtype than they should.
        """
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, number in zip(group["params"], saved_group["params"], strict=True):
                if (saved := state_dict["state"].get(number)) is None:
                    continue  # never had a gradient
                state = self._new_state(parameter, group["rule"])
                kinds = [{name: (t.shape, t.dtype) for name, t in s.items()} for s in (saved, state)]
                if kinds[0] != kinds[1]:
                    raise ValueError(f"states of parameter {number}: {kinds[0]}; expected {kinds[1]}")
                for name, tensor in state.items():
                    tensor.copy_(saved[name])
                self.state[parameter] = state


def make_optimizer(rule, parameters, lr, *, shard):
    """The optimizer of a run; on several ranks its states are shared out over them if `shard` is set.

    Sharded, a rank updates whole parameters of about its share in number, and sends them to the others: every rank has
    the weights that it would have had without. Parameters of `shard_policy` are sharded already.

    Args:
        rule: "adam" or "rmsprop".
        parameters: float32 or bfloat16, all of one dtype, the same on every rank.
        lr: learning rate.
        shard: whether to shard; nothing to do with one process.
    Returns:
        ExactOptimizer, or ZeroRedundancyOptimizer around one (at `.optim`). Both take `param_groups[i]["lr"]`.
    """
    parameters = list(parameters)
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    if alone or not shard or isinstance(parameters[0], DTensor):
        return ExactOptimizer(parameters, lr, rule=rule)
    return ZeroRedundancyOptimizer(parameters, ExactOptimizer, lr=lr, rule=rule)


@torch.no_grad()
def clip_gradients(parameters, max_norm):
    """Scale the gradients so that their norm is at most `max_norm`; the norm is taken in float32 whatever they are.

    A gradient is rounded once, by the scaling; with a smaller norm none changes. Does not wait for the device.

    Args:
        parameters: those without a gradient are passed by; DTensors (all on one mesh) count with all their shards.
        max_norm: above 0; infinite: the norm alone.
    Returns:
        () float32, the norm before scaling. Not finite: the gradients are then of no use; don't step.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # A sum of squares: pairwise on every device, where the CPU's vector_norm adds up in a row (2e-5 off at 2^22).
    squares = [part.float().square().sum() for g in gradients for (part,) in _slices(g)]
    square = torch.stack(squares).double().sum()
    if isinstance(gradients[0], DTensor):
        dist.all_reduce(square, group=gradients[0].device_mesh.get_group())
    norm = square.sqrt().float()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in gradients:
        for (part,) in _slices(g):
            part.copy_(part.float().mul_(scale))
    return norm


# ---------------------------------------------------------------------------- FSDP2
def shard_layers(lm, *, dtype=torch.bfloat16):
    """Shard each layer of a model over the ranks: it is whole, in `dtype`, only while it computes.

    Args: lm, a Hugging Face causal LM with `lm.model.layers`; dtype, of the computation (gradients are summed in float32).
    """
    mesh = init_device_mesh(lm.device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for (
        layer
    ) in lm.model.layers:  # a reference's layers have no sharded parent, so the default would keep them whole
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    return mesh, precision


def shard_policy(policy, *, dtype=torch.bfloat16):
    """Shard a Policy over the ranks, in place, with FSDP2: each layer, and what is left (embedding, final norm) as root.

    The sharded parameters are the float32 masters. The root is the policy, whose forward uses the head's weight: with
    the body as root the head would part from the embedding in silence. A held reference (TDPO) has its layers sharded,
    its embedding whole; load it in `dtype`. After a forward under no_grad call `policy.reshard()`, or the
    next forward may compute with old weights. All ranks must call forward equally often.

    Args:
        policy: a Policy with float32 weights, after activation checkpointing and before its optimizer.
        dtype: of the computation; gradients are summed in float32.
    Raises: ValueError for weights that are not float32. RuntimeError where head and embedding parted.
    """
    lm = policy.lm
    if odd := {p.dtype for p in lm.parameters()} - {torch.float32}:
        raise ValueError(f"weights of {odd}: the sharded masters must be float32")
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    mesh, precision = shard_layers(lm, dtype=dtype)
    for reference in policy._reference:
        shard_layers(reference, dtype=dtype)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    if tied and lm.get_output_embeddings().weight is not lm.get_input_embeddings().weight:
        raise RuntimeError("sharding untied the head from the embedding")


def full_state_dict(policy):
    """The model's weights on rank 0's CPU, one tensor at a time; {} on the others. Every rank must call it.

    Returns:
        dict as `policy.lm.save_pretrained(folder, state_dict=...)` takes it; tied weights once.
    """
    main = not dist.is_initialized() or dist.get_rank() == 0
    state, seen = {}, set()
    for name, tensor in policy.lm.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if main:
            state[name] = whole.detach().cpu()
    return state
