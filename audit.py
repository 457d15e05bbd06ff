"""Before training the forward is compared with the model's own, and with itself; its rounding is measured.

What our masks, row layouts, slices or softcap get wrong shows here, so no list of supported architectures is
needed: a model that is not understood is refused.
"""

import warnings

import torch
import torch.nn.functional as F

import runtime
from batches import collate
from fpo import Policy, feature_distance
from runtime import UserError, refuse

# Nats a token by which our forward may differ from the model's own: rounding stays ten times below this.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@torch.no_grad()
def audit(policy: Policy, pairs, *, k=50, **row_options) -> dict:
    """Compare this forward, as training runs it, with the model's own; every rank must call it.

    It takes the longest pair alone, and four others together, from the shortest on.

    Args:
        row_options: layout and padding, as `collate` takes them.
    Returns:
        difference: Σ |log π(y|x) − that of lm(input_ids).logits| / max(8, Σ |y|), nats, the largest.
        floor: D_FPO that rounding makes (`noise_floor`), below which D says nothing.
        window: the sliding window if a pair is longer than it, else None.
    Raises:
        UserError: the difference is above TOLERANCE, or a second run gives other values (dropout, jitter).
    """
    # ---- which pairs: the longest, and of those ordered by length the first, and one of each quarter
    sizes = torch.tensor([max(lengths) for lengths in pairs.documents("separate")])  # (n,) with one response
    by_length = sizes.argsort(stable=True)
    quarters = by_length[torch.linspace(0, len(pairs) - 1, 5).long()].tolist()
    several = list(dict.fromkeys(quarters[:-1]))  # in one row, or in rows that they share
    # ---- against itself, then against the model's own forward
    found = [differences(policy, pairs, group, row_options) for group in (quarters[-1:], several)]
    repeat, difference = torch.stack(found).amax(0).tolist()
    kind, limit = type(policy.lm).__name__, TOLERANCE[policy.dtype]
    if not repeat <= limit / 10:  # NaN is refused too
        raise UserError(f"{kind}: two runs of one batch differ by {repeat:.2g} nats a token (dropout?)")
    if not difference <= limit:
        what = f"log π differs from the model's own forward by {difference:.2g} nats a token"
        raise UserError(f"{kind}: {what} (allowed: {limit:g}): a part of this model is not understood")
    # ---- what of a sliding window was seen by it
    window = getattr(policy.lm.config.get_text_config(), "sliding_window", None)
    tested = window if window is not None and int(sizes.max()) > window else None
    floor = noise_floor(policy, pairs, k=k, **row_options)
    return {"difference": difference, "floor": floor, "window": tested}


def differences(policy: Policy, pairs, indices, row_options) -> torch.Tensor:
    """(2,) the most nats a token by which log π of these pairs differs: run again, and by the model's own."""
    batch = collate(pairs, indices, **row_options).to(policy.lm.device)
    policy.train()  # as training runs it: with checkpointing, and dropout where a model still has some
    ours, again = policy(batch)[0], policy(batch)[0]
    policy.eval()
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of flex_attention: not compiled, on purpose
        alone = [collate(pairs, [i], layout="separate").to(policy.lm.device) for i in indices]
        # Of FSDP2's shards the root's are whole since `ours`, the layers gather theirs.
        theirs = torch.stack([policy.plain_logps(one) for one in alone], 1).flatten()
    theirs = F.pad(theirs, (0, len(ours.logps) - len(theirs)))  # (2·B,): SFT has no rejected ones
    # Of a pair, as 8 tokens at least: in bf16 the rounding of a single logit is up to 0.1.
    tokens = ours.lengths.view(2, -1).sum(0).clamp(min=8)
    far = [((ours.logps - x).abs().view(2, -1).sum(0) / tokens).max() for x in (again.logps, theirs)]
    return torch.stack(far)


@torch.no_grad()
def noise_floor(policy: Policy, pairs, *, k=50, n=8, **row_options) -> float | None:
    """D_FPO between two forwards of `n` pairs that differ in rounding alone: what is there before learning.

    The embeddings move by about their last bit, up or down at random, so that all later roundings fall anew,
    as they do when weights move. In float32 about 1e-10. In bf16 it can be a sizeable part of training's
    D; longer responses have less.
    """
    if not policy.saes:
        return None

    def nudge(module, args, embedded):
        """By half of what products are rounded by, at least by float32's last bit."""
        step, generator = max(torch.finfo(policy.dtype).eps / 2, 2**-23), torch.Generator().manual_seed(0)
        up = torch.rand(embedded.shape, generator=generator) < 0.5
        return embedded.float() * torch.where(up, 1 + step, 1 - step).to(embedded.device)

    indices = torch.linspace(0, len(pairs) - 1, min(n, len(pairs))).long().tolist()
    batch = collate(pairs, indices, **row_options).to(policy.lm.device)
    features = policy(batch)[0].features  # per SAE (2·n, m)
    with policy.lm.get_input_embeddings().register_forward_hook(nudge):
        again = policy(batch)[0].features
    return feature_distance(again, features, k=k).mean().item()


def freeze(policy, pairs, row_options):
    """Freeze what gets no gradient. Activations are as in training: made again, where checkpointing is on."""
    policy.train()
    policy(collate(pairs, [pairs.shortest], **row_options).to(policy.lm.device))[0].logps.sum().backward()
    policy.eval()
    for parameter in policy.parameters():  # DDP expects a gradient of each that wants one
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def out_of_memory(error, pairs, config) -> str:
    """What does not fit, and which settings take less memory."""
    # What is in use already is not advised.
    less = [] if config.activation_checkpointing else ["--activation_checkpointing"]
    less += [] if config.shard == "fsdp" else ["--shard fsdp with several cards"]
    longest = int(pairs.sizes.sum(1).max())
    less += [f"--max_length below {config.max_length}"]
    what = f"the model and its longest pair, {longest} tokens, do not fit ({error!s:.150})"
    return f"{what}; less is needed by {', '.join(less)}"


def audit_and_freeze(policy, pairs, config, row_options, *, trains=True) -> dict:
    """`audit`, printed; then freeze parameters that get no gradient (a vision tower), as DDP needs.

    trains: False for an evaluation, which needs no gradients.
    """
    try:
        found = audit(policy, pairs, k=config.k, **row_options)
        if trains and config.shard != "fsdp":
            freeze(policy, pairs, row_options)
    except torch.OutOfMemoryError as error:
        refuse(out_of_memory(error, pairs, config))
    except torch._dynamo.exc.TorchDynamoException as error:
        refuse(f"torch.compile fails ({str(error).splitlines()[0]}); --no_compile trains without it")
    except (UserError, torch.distributed.DistBackendError):
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        refuse(f"{type(policy.lm).__name__}: our forward does not fit this architecture: {error!r:.200}")
    if runtime.ranks()[0] == 0:
        says = [f"audit passed: {found['difference']:.1g} nats a token from the model's own forward"]
        says += [
            f"sliding window of {found['window']} tested" if found["window"] else "no sliding window tested"
        ]
        says += [f"rounding alone makes D_FPO {found['floor']:.1g}"] if policy.saes else []
        print("; ".join(says))
    return found
