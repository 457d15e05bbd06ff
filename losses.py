"""Every loss of Table 1 as a pure function, each with its terms.

Of *Direct Preference Optimization Using Sparse Feature-Level Constraints* (arXiv 2411.07618), numbered as v4.
Every preference method is  L = -E log σ(u),  u = LPD - margin - constraint  (Eq. 8, Table 1):

    method    function        lpd         margin           constraint
    DPO       dpo_loss        sums        γ_ref            0
    SimPO     simpo_loss      per token   γ, a constant    0
    TDPO-1    tdpo1_loss      sums        γ_ref            δ_TDPO1, of KLs
    TDPO-2    tdpo2_loss      sums        γ_ref            δ_TDPO2, of KLs
    FPO       fpo_loss        per token   γ_ref-LN         δ_FPO, of feature MSEs
    SFT       sft_loss        mean negative log-likelihood: not of Eq. 8's form
    SimPO+KL  simpo_kl_loss   per token   γ, a constant    δ_TDPO2  (Table 6; undefined there, our reading)

    symbol           name here                              shape    where
    log π_θ(y|x)     policy_{chosen,rejected}_logps         (B,)     Table 1; from sequence_logps, a sum
    log π_ref(y|x)   reference_{chosen,rejected}_logps      (B,)     Eqs. 7, 9; from sequence_logps
    |y_w|, |y_l|     {chosen,rejected}_lengths              (B,)     Table 1; from sequence_logps, tokens
    D_TDPO(x, y)     {chosen,rejected}_kl                   (B,)     Eqs. 3, 4; from sequential_kl
    c̄_θ, c̄_ref       policy_features, reference_features    (B, m)   Eq. 10; from pool_features
    D_FPO(x, y)      {chosen,rejected}_mse                  (B,)     Eq. 10; from feature_mse
    sg               detach                                 -        Eqs. 4, 11
    α, β, γ          alpha, beta, gamma                     -        Table 5
    k                k                                      -        Eq. 10; its value is the authors' code's

B pairs (or responses), T positions, V vocabulary, m SAE width; w chosen, l rejected. Logs are natural.
Results are per pair: the caller takes the mean E. Each function can be copied alone, with these two imports.
"""

import torch
import torch.nn.functional as F

# The methods by the names that the command line gives them.
METHODS = ("sft", "dpo", "simpo", "simpo_kl", "tdpo1", "tdpo2", "fpo")
CACHED = ("dpo", "fpo")  # the reference is read from Phase 1's cache
NEEDED = ("tdpo1", "tdpo2", "simpo_kl")  # the reference stays in memory: a KL needs whole distributions
PER_TOKEN = ("simpo", "simpo_kl", "fpo")  # the reward is divided by |y|

# ---- what the losses are made of: logits or features of each response in ----


def sequence_logps(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log π(y|x) of Table 1, summed over the response's tokens, and |y|.

    logits (B, T, V); labels (B, T) int64, Hugging Face's convention: unshifted, -100 off the response.
    Position t predicts label t + 1, so the first label never counts.
    Returns logps (B,), nats, float32 or wider; lengths (B,) int64. A response without tokens gives 0 and 0.
    Logits off the response don't matter, even NaN. Raises ValueError for other shapes.
    """
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        shapes = [tuple(x.shape) for x in (logits, labels)]
        raise ValueError(f"need logits (B, T, V) and labels (B, T), got {shapes}")
    logits, labels = logits[:, :-1], labels[:, 1:]
    mask = labels != -100  # (B, T-1)
    # Masked here and in the sum: a NaN let into log_softmax would come back in its gradient (0 * NaN).
    logits = torch.where(mask[..., None], logits, 0.0)
    log_pi = F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    log_pi = log_pi.gather(-1, torch.where(mask, labels, 0)[..., None]).squeeze(-1)  # (B, T-1)
    return torch.where(mask, log_pi, 0.0).sum(-1), mask.sum(-1)


def sequential_kl(
    policy_logits: torch.Tensor, reference_logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """D_TDPO = Σ_t KL(π_ref(·|x, y_<t) ‖ π_θ(·|x, y_<t)) over the response's positions (Eqs. 3, 4).

    policy_logits, reference_logits (B, T, V); labels (B, T), Hugging Face's convention: unshifted, -100 off
    the response. Position t predicts label t + 1. No gradient reaches the reference.
    Returns (B,), nats, float32 or wider. Logits off the response don't matter, even NaN; a vocabulary entry
    that is -inf in the reference adds 0. Raises ValueError for other shapes.
    """
    shapes = [tuple(x.shape) for x in (policy_logits, reference_logits, labels)]
    if len(shapes[0]) != 3 or shapes[1] != shapes[0] or shapes[2] != shapes[0][:2]:
        raise ValueError(f"need policy and reference logits (B, T, V) and labels (B, T), got {shapes}")
    mask = (labels[:, 1:] != -100)[..., None]  # (B, T-1, 1)
    # Off the response both distributions become uniform: no KL, no gradient.
    policy = torch.where(mask, policy_logits[:, :-1], 0.0)
    reference = torch.where(mask, reference_logits[:, :-1].detach(), 0.0)
    log_pi = F.log_softmax(policy, -1, dtype=torch.promote_types(policy.dtype, torch.float32))
    log_ref = F.log_softmax(reference, -1, dtype=torch.promote_types(reference.dtype, torch.float32))
    log_ratio = (log_ref - log_pi).masked_fill(log_ref.isneginf(), 0.0)  # 0 log 0 = 0
    return (log_ref.exp() * log_ratio).sum((1, 2))


def pool_features(features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """c̄: the sparse activations averaged over the response's positions, never over padding (Eq. 10).

    features (B, T, m), of the SAE; mask (B, T), non-zero at the states that predict the response's tokens.
    Returns (B, m), float32 or wider, zeros where the mask is empty. Features off the mask don't matter, even
    NaN. Raises ValueError for other shapes.
    """
    if features.ndim != 3 or features.shape[:2] != mask.shape:
        shapes = [tuple(x.shape) for x in (features, mask)]
        raise ValueError(f"need features (B, T, m) and mask (B, T), got {shapes}")
    mask = mask != 0
    kept = torch.where(mask[..., None], features, 0.0)  # (B, T, m)
    total = kept.sum(1, dtype=torch.promote_types(features.dtype, torch.float32))
    return total / mask.sum(1).clamp(min=1)[:, None]


def feature_mse(
    policy_features: torch.Tensor, reference_features: torch.Tensor, *, k: int = 50
) -> torch.Tensor:
    """D_FPO = (1/k) Σ_{i∈I_k} (c̄_θ,i − c̄_ref,i)², I_k = topk(c̄_θ) ∪ topk(c̄_ref) (Eq. 10).

    policy_features, reference_features (B, m), pooled over a response. A feature that is not above 0 in a
    vector is never in its top k: so zeros can't tie, and a negative one (of a TopK SAE without ReLU) counts
    only where it is in the other's. The divisor is k, not |I_k|; k at or above the number that are positive
    takes those. k = 50 is the authors' code's: the paper states none.
    Returns (B,). No gradient reaches the reference, nor the choice of I_k. Raises ValueError for k < 1 and
    for other shapes.
    """
    policy, reference = policy_features, reference_features.detach()
    if k < 1:
        raise ValueError(f"need k >= 1, got {k}")
    if policy.ndim != 2 or reference.shape != policy.shape:
        shapes = [tuple(x.shape) for x in (policy, reference)]
        raise ValueError(f"need policy and reference features (B, m), got {shapes}")
    both = torch.stack((policy.detach(), reference))  # (2, B, m)
    top = both.topk(min(k, both.shape[-1]), dim=-1)
    in_top = torch.zeros_like(both, dtype=torch.bool).scatter(-1, top.indices, top.values > 0)
    I_k = in_top.any(0)  # the union, (B, m)
    return torch.where(I_k, (policy - reference) ** 2, 0.0).sum(-1) / k


# ---- the losses: (B,) in, (B,) out, element by element ----


def sft_loss(logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """SFT: mean negative log-likelihood of the response's tokens.

    logps (B,), log π_θ(y|x) summed over the response's tokens; lengths (B,), their number (0 counts as 1, so
    that a response without tokens costs 0). Returns (B,), nats per token.
    """
    return -logps / lengths.clamp(min=1)


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    """DPO (Table 1), with γ_ref of Eq. 7.

    All inputs (B,): log π_θ(y|x) and log π_ref(y|x), each summed over the response's tokens.
    Returns (B,), the loss of each pair. β = 0.1 is Table 5's.
    """
    lpd = beta * policy_chosen_logps - beta * policy_rejected_logps
    margin = beta * reference_chosen_logps - beta * reference_rejected_logps  # γ_ref
    constraint = 0.0
    return -F.logsigmoid(lpd - margin - constraint)


def simpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
) -> torch.Tensor:
    """SimPO (Table 1). No reference.

    All inputs (B,): log π_θ(y|x) summed over the response's tokens; their number (0 counts as 1).
    Returns (B,), the loss of each pair. β = 2 and γ = 0.5 are Table 5's; γ is not multiplied by β.
    """
    len_w, len_l = chosen_lengths.clamp(min=1), rejected_lengths.clamp(min=1)  # |y_w|, |y_l|
    lpd = beta * policy_chosen_logps / len_w - beta * policy_rejected_logps / len_l
    margin = gamma
    constraint = 0.0
    return -F.logsigmoid(lpd - margin - constraint)


def tdpo1_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    chosen_kl: torch.Tensor,
    rejected_kl: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    """TDPO-1 (Table 1), with δ_TDPO1 of Eq. 3.

    All inputs (B,): log π_θ(y|x) and log π_ref(y|x), each summed over the response's tokens; sequential
    KL(π_ref ‖ π_θ) of each response, nats. Returns (B,), the loss of each pair. β = 0.1 is Table 5's.
    """
    lpd = beta * policy_chosen_logps - beta * policy_rejected_logps
    margin = beta * reference_chosen_logps - beta * reference_rejected_logps  # γ_ref
    constraint = beta * (rejected_kl - chosen_kl)  # δ_TDPO1
    return -F.logsigmoid(lpd - margin - constraint)


def tdpo2_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    chosen_kl: torch.Tensor,
    rejected_kl: torch.Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
) -> torch.Tensor:
    """TDPO-2 (Table 1), with δ_TDPO2 of Eq. 4.

    All inputs (B,): log π_θ(y|x) and log π_ref(y|x), each summed over the response's tokens; sequential
    KL(π_ref ‖ π_θ) of each response, nats. Returns (B,), the loss of each pair. No gradient reaches
    chosen_kl. β = 0.1 and α = 0.5 are Table 5's.
    """
    lpd = beta * policy_chosen_logps - beta * policy_rejected_logps
    margin = beta * reference_chosen_logps - beta * reference_rejected_logps  # γ_ref
    constraint = alpha * (beta * rejected_kl - (beta * chosen_kl).detach())  # δ_TDPO2; sg(.)
    return -F.logsigmoid(lpd - margin - constraint)


def fpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    chosen_mse: torch.Tensor,
    rejected_mse: torch.Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    stop_gradient: bool = True,
) -> torch.Tensor:
    """FPO (Table 1, Eq. 11), with γ_ref-LN of Eq. 9 and δ_FPO = α (β D_FPO(y_l) − sg(β D_FPO(y_w))).

    All inputs (B,): log π_θ(y|x) and log π_ref(y|x), each summed over the response's tokens; their number
    (0 counts as 1); D_FPO of each response (Eq. 10). Returns (B,), the loss of each pair.
    β = 0.1 and α = 0.5 are Table 5's. stop_gradient=False drops sg (Table 3): chosen_mse gets a gradient.
    """
    len_w, len_l = chosen_lengths.clamp(min=1), rejected_lengths.clamp(min=1)  # |y_w|, |y_l|
    lpd = beta * policy_chosen_logps / len_w - beta * policy_rejected_logps / len_l
    margin = beta * reference_chosen_logps / len_w - beta * reference_rejected_logps / len_l  # γ_ref-LN
    chosen_mse = chosen_mse.detach() if stop_gradient else chosen_mse  # sg(.)
    constraint = alpha * (beta * rejected_mse - beta * chosen_mse)  # δ_FPO
    return -F.logsigmoid(lpd - margin - constraint)


def simpo_kl_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    chosen_kl: torch.Tensor,
    rejected_kl: torch.Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    alpha: float = 0.5,
) -> torch.Tensor:
    """SimPO + KL (Table 6), undefined in the paper; our reading: SimPO's LPD and γ with δ_TDPO2 of Eq. 4.

    All inputs (B,): log π_θ(y|x) summed over the response's tokens; their number (0 counts as 1); sequential
    KL(π_ref ‖ π_θ) of each response, nats. Returns (B,), the loss of each pair. No gradient reaches
    chosen_kl. β = 2 and γ = 0.5 are SimPO's, α = 0.5 is TDPO-2's (Table 5).
    """
    len_w, len_l = chosen_lengths.clamp(min=1), rejected_lengths.clamp(min=1)  # |y_w|, |y_l|
    lpd = beta * policy_chosen_logps / len_w - beta * policy_rejected_logps / len_l
    margin = gamma
    constraint = alpha * (beta * rejected_kl - (beta * chosen_kl).detach())  # δ_TDPO2; sg(.)
    return -F.logsigmoid(lpd - margin - constraint)
