"""losses.py against hand computations and loops over Python floats."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import losses

# ---- Table 1, by hand ----

# Two pairs: the constraint is positive in the first and negative in the second.
PAIRS = {
    "policy_chosen_logps": [-12.0, -30.0],
    "policy_rejected_logps": [-20.0, -24.0],
    "reference_chosen_logps": [-14.0, -27.0],
    "reference_rejected_logps": [-19.0, -24.0],
    "chosen_lengths": [4, 10],
    "rejected_lengths": [8, 6],
    "chosen_kl": [2.0, 3.0],
    "rejected_kl": [4.0, 1.0],
    "chosen_mse": [6.0, 10.0],
    "rejected_mse": [8.0, 2.0],
}
CONSTANTS = ("reference_chosen_logps", "reference_rejected_logps", "chosen_lengths", "rejected_lengths")

# method, keywords | for both pairs: -log σ(u) = ln(1 + e^-u) | u | du/d(each argument that is not constant)
# fmt: off
HAND = [
    # (-1.2 + 2.0) - (-1.4 + 1.9);  (-3.0 + 2.4) - (-2.7 + 2.4)
    ("dpo", {}, (0.5543552444685271, 0.8543552444685272), (0.3, -0.3),
     [(0.1, 0.1), (-0.1, -0.1)]),
    # five times as much
    ("dpo", {"beta": 0.5}, (0.2014132779827524, 1.7014132779827524), (1.5, -1.5),
     [(0.5, 0.5), (-0.5, -0.5)]),
    # (-24/4 + 40/8) - 0.5;  (-60/10 + 48/6) - 0.5;  slopes 2/|y|
    ("simpo", {}, (1.7014132779827524, 0.2014132779827524), (-1.5, 1.5),
     [(2 / 4, 2 / 10), (-2 / 8, -2 / 6)]),
    # -12/4 + 20/8;  -30/10 + 24/6
    ("simpo", {"beta": 1.0, "gamma": 0.0}, (0.9740769841801067, 0.31326168751822286), (-0.5, 1.0),
     [(1 / 4, 1 / 10), (-1 / 8, -1 / 6)]),
    # DPO's 0.3 - 0.1 (4 - 2);  -0.3 - 0.1 (1 - 3)
    ("tdpo1", {}, (0.6443966600735709, 0.744396660073571), (0.1, -0.1),
     [(0.1, 0.1), (-0.1, -0.1), (0.1, 0.1), (-0.1, -0.1)]),
    # 0.6 - 0.2 (4 - 2);  -0.6 - 0.2 (1 - 3)
    ("tdpo1", {"beta": 0.2}, (0.5981388693815918, 0.7981388693815918), (0.2, -0.2),
     [(0.2, 0.2), (-0.2, -0.2), (0.2, 0.2), (-0.2, -0.2)]),
    # DPO's 0.3 - 0.5 (0.4 - 0.2);  -0.3 - 0.5 (0.1 - 0.3);  nothing through the chosen KL
    ("tdpo2", {}, (0.5981388693815918, 0.7981388693815918), (0.2, -0.2),
     [(0.1, 0.1), (-0.1, -0.1), (0.0, 0.0), (-0.05, -0.05)]),
    # 0.6 - 2 (0.8 - 0.4);  -0.6 - 2 (0.2 - 0.6)
    ("tdpo2", {"beta": 0.2, "alpha": 2.0}, (0.7981388693815918, 0.5981388693815918), (-0.2, 0.2),
     [(0.2, 0.2), (-0.2, -0.2), (0.0, 0.0), (-0.4, -0.4)]),
    # (-1.2/4 + 2.0/8) - (-1.4/4 + 1.9/8) - 0.5 (0.8 - 0.6) = -0.05 + 0.1125 - 0.1
    # (-3.0/10 + 2.4/6) - (-2.7/10 + 2.4/6) - 0.5 (0.2 - 1.0) = 0.1 - 0.13 + 0.4
    ("fpo", {}, (0.7120729515112282, 0.525162949730635), (-0.0375, 0.37),
     [(0.1 / 4, 0.1 / 10), (-0.1 / 8, -0.1 / 6), (0.0, 0.0), (-0.05, -0.05)]),
    # the same value, and now a slope through the chosen MSE
    ("fpo", {"stop_gradient": False}, (0.7120729515112282, 0.525162949730635), (-0.0375, 0.37),
     [(0.1 / 4, 0.1 / 10), (-0.1 / 8, -0.1 / 6), (0.05, 0.05), (-0.05, -0.05)]),
    # 10 (-0.05 + 0.1125) - (8 - 6);  10 (0.1 - 0.13) - (2 - 10)
    ("fpo", {"beta": 1.0, "alpha": 1.0}, (1.600412651601648, 0.0004527246875986174), (-1.375, 7.7),
     [(1 / 4, 1 / 10), (-1 / 8, -1 / 6), (0.0, 0.0), (-1.0, -1.0)]),
    # SimPO's -1.5 - 0.5 (8 - 4);  1.5 - 0.5 (2 - 6)
    ("simpo_kl", {}, (3.5297504182726205, 0.029750418272620566), (-3.5, 3.5),
     [(2 / 4, 2 / 10), (-2 / 8, -2 / 6), (0.0, 0.0), (-1.0, -1.0)]),
    # -0.5 - 2 (4 - 2);  1 - 2 (1 - 3)
    ("simpo_kl", {"beta": 1.0, "gamma": 0.0, "alpha": 2.0},
     (4.511047744848594, 0.006715348489117967), (-4.5, 5.0),
     [(1 / 4, 1 / 10), (-1 / 8, -1 / 6), (0.0, 0.0), (-2.0, -2.0)]),
]
# fmt: on


def arguments(function, dtype=torch.float64):
    """The tensors of PAIRS that a preference loss takes, in its order, by name."""
    names = [name for name in inspect.signature(function).parameters if name in PAIRS]
    return {n: torch.tensor(PAIRS[n], dtype=torch.int64 if "lengths" in n else dtype) for n in names}


@pytest.mark.parametrize(("method", "keywords", "expected", "u", "slopes"), HAND)
def test_preference_losses_by_hand(method, keywords, expected, u, slopes):
    function = getattr(losses, f"{method}_loss")
    inputs = arguments(function)
    trained = [x.requires_grad_() for name, x in inputs.items() if name not in CONSTANTS]
    loss = function(*inputs.values(), **keywords)
    assert loss.dtype == torch.float64
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)

    gradients = torch.autograd.grad(loss.sum(), trained, allow_unused=True, materialize_grads=True)
    assert len(gradients) == len(slopes)
    for gradient, slope in zip(gradients, slopes, strict=True):
        # dL/du = -σ(-u)
        by_hand = [-s / (1 + math.exp(v)) for s, v in zip(slope, u, strict=True)]
        assert gradient.tolist() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("method", ["dpo", "simpo", "tdpo1", "tdpo2", "fpo", "simpo_kl"])
def test_preference_losses_stay_finite_and_float32(method):
    function = getattr(losses, f"{method}_loss")
    inputs = arguments(function, torch.float32)
    inputs["policy_chosen_logps"] = torch.tensor([-1e6, 1e6]).requires_grad_()
    loss = function(*inputs.values())
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss[0].item() > 1e4 and loss[1].item() == 0  # -log σ(u) → -u and 0
    assert inputs["policy_chosen_logps"].grad.isfinite().all()


def test_sft_loss_by_hand():
    logps = torch.tensor([-6.0, -1.0, 0.0, -2.0], dtype=torch.float64, requires_grad=True)
    loss = losses.sft_loss(logps, torch.tensor([4, 3, 0, 1]))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([1.5, 1 / 3, 0.0, 2.0], rel=1e-15)
    assert logps.grad.tolist() == pytest.approx([-0.25, -1 / 3, -1.0, -1.0], rel=1e-15)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("method", ["simpo", "simpo_kl", "fpo"])
def test_responses_of_one_token_and_of_none(method, side):
    """One token is divided by 1, as two tokens of twice its log-probabilities are by 2; none is as one."""
    function = getattr(losses, f"{method}_loss")
    none, one, two = (arguments(function) for _ in range(3))
    for inputs, length in ((none, 0), (one, 1), (two, 2)):
        inputs[f"{side}_lengths"][0] = length
    for name in two:
        two[name][0] *= 2 if name.endswith(f"{side}_logps") else 1
    assert torch.equal(function(*none.values()), function(*one.values()))
    torch.testing.assert_close(function(*one.values()), function(*two.values()), rtol=1e-14, atol=0)


# ---- sequence_logps, sequential_kl ----


def sequences(b=3, t=7, v=5, seed=0):
    """Two sets of logits, and labels with responses of different lengths and places."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = 3 * torch.randn(2, b, t, v, generator=generator, dtype=torch.float64)
    labels = torch.randint(v, (b, t), generator=generator)
    for row in range(b):
        labels[row, : row + 1] = -100  # prompt
        labels[row, t - row :] = -100  # padding
    return policy, reference, labels


def test_sequence_logps_by_hand():
    """Of a response of two tokens, and of one without tokens: 0, and nothing flows back."""
    # Logs of odds: positions 0 to 2 predict with (1/4, 3/4), (1/2, 1/2), (1/5, 4/5).
    odds = torch.tensor([[1.0, 3.0], [2.0, 2.0], [1.0, 4.0], [1.0, 9.0]], dtype=torch.float64)
    logits = odds.log().repeat(2, 1, 1).requires_grad_()
    # Label 0 has no prediction, label 1 is off the response: ln 1/2 + ln 4/5.
    logps, lengths = losses.sequence_logps(logits, torch.tensor([[1, -100, 0, 1], [1, -100, -100, -100]]))
    logps.sum().backward()
    assert logps.tolist() == pytest.approx([-0.916290731874155, 0.0], rel=1e-14)
    assert lengths.tolist() == [2, 0]
    # onehot - π
    by_hand = [[0.0, 0.0], [0.5, -0.5], [-0.2, 0.2], [0.0, 0.0]]
    torch.testing.assert_close(logits.grad[0], torch.tensor(by_hand, dtype=torch.float64), rtol=0, atol=1e-15)
    assert not logits.grad[1].any()


def test_sequential_kl_by_hand():
    """Of two positions, and of none; nothing flows into the reference."""
    odds = torch.tensor([[1.0, 3.0], [2.0, 2.0], [1.0, 7.0]], dtype=torch.float64)
    policy = odds.log().repeat(2, 1, 1).requires_grad_()
    reference = torch.tensor([[2.0, 2.0], [1.0, 4.0], [1.0, 1.0]], dtype=torch.float64).log()
    reference = reference.repeat(2, 1, 1).requires_grad_()
    kl = losses.sequential_kl(policy, reference, torch.tensor([[-100, 0, 1], [0, -100, -100]]))
    kl.sum().backward()
    # π_θ = (1/4, 3/4), π_ref = (1/2, 1/2): ½ ln 2 + ½ ln 2/3 = 0.14384; the reverse KL 0.13081.
    # π_θ = (1/2, 1/2), π_ref = (1/5, 4/5): 0.2 ln 0.4 + 0.8 ln 1.6 = 0.19274; the reverse KL 0.22314.
    assert kl.tolist() == pytest.approx([0.14384103622589045 + 0.19274475702175753, 0.0], rel=1e-14)
    # π_θ - π_ref
    by_hand = [[-0.25, 0.25], [0.3, -0.3], [0.0, 0.0]]
    torch.testing.assert_close(policy.grad[0], torch.tensor(by_hand, dtype=torch.float64), rtol=0, atol=1e-15)
    assert not policy.grad[1].any() and reference.grad is None


@pytest.mark.parametrize(("peak", "expected"), [("policy", 132.2347210), ("reference", 1.0986123)])
def test_sequential_kl_is_finite_200_logits_apart(peak, expected):
    # One side peaked by 200, the other uniform over three: ⅔ 200 - ln 3;  ln 3.
    peaked, flat = torch.tensor([[[200.0, 0.0, 0.0]] * 2]), torch.zeros(1, 2, 3)
    policy, reference = (peaked, flat) if peak == "policy" else (flat, peaked)
    policy = policy.clone().requires_grad_()
    kl = losses.sequential_kl(policy, reference, torch.tensor([[-100, 0]]))
    kl.sum().backward()
    assert policy.dtype == kl.dtype == torch.float32
    assert kl.item() == pytest.approx(expected, rel=1e-6)
    assert policy.grad.isfinite().all()


def test_masked_vocabulary_adds_nothing():
    policy, reference, labels = sequences(v=4)
    hole = torch.full((3, 7, 1), -math.inf, dtype=torch.float64)
    masked = torch.cat((policy, hole), -1).requires_grad_()
    expected = losses.sequential_kl(policy, reference, labels)
    kl = losses.sequential_kl(masked, torch.cat((reference, hole), -1), labels)
    logps, _ = losses.sequence_logps(masked, labels)
    (kl + logps).sum().backward()
    assert kl.tolist() == pytest.approx(expected.tolist(), rel=1e-13)
    assert logps.tolist() == pytest.approx(losses.sequence_logps(policy, labels)[0].tolist(), rel=1e-13)
    assert masked.grad.isfinite().all()


# ---- padding, precision ----


@pytest.mark.parametrize("garbage", [1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("pads", [(3, 0), (0, 3)], ids=["left", "right"])
def test_padding_does_not_matter(pads, garbage):
    """Neither to values nor to gradients: nothing, not even NaN, flows into the padding."""

    def pad(x, value=0):
        return F.pad(x, (0, 0, *pads) if x.ndim == 3 else pads, value=value)

    policy, reference, labels = sequences()
    narrow = policy, reference, policy.relu(), labels
    wide = *(pad(x, garbage) for x in narrow[:3]), pad(labels, -100)
    results = []
    for policy, reference, features, labels in (narrow, wide):
        policy, features = policy.clone().requires_grad_(), features.clone().requires_grad_()
        logps, lengths = losses.sequence_logps(policy, labels)
        kl = losses.sequential_kl(policy, reference, labels)
        pooled = losses.pool_features(features, labels != -100)
        (logps.sum() + kl.sum() + (pooled**2).sum()).backward()
        results.append([logps, lengths, kl, pooled, policy.grad, features.grad])
    (*values, policy_grad, features_grad), (*wide_values, wide_policy_grad, wide_features_grad) = results
    for value, wide_value in zip(values, wide_values, strict=True):
        torch.testing.assert_close(wide_value, value, rtol=1e-13, atol=0)
    torch.testing.assert_close(wide_policy_grad, pad(policy_grad), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(wide_features_grad, pad(features_grad), rtol=1e-12, atol=0)


def test_low_precision_is_computed_in_float32():
    policy, reference, labels = sequences(v=300)
    policy, reference = policy.bfloat16(), reference.bfloat16()
    mask = labels != -100
    for low, full in (
        (losses.sequence_logps(policy, labels)[0], losses.sequence_logps(policy.double(), labels)[0]),
        (
            losses.sequential_kl(policy, reference, labels),
            losses.sequential_kl(policy.double(), reference.double(), labels),
        ),
        (losses.pool_features(policy, mask), losses.pool_features(policy.double(), mask)),
    ):
        assert low.dtype == torch.float32 and full.dtype == torch.float64
        torch.testing.assert_close(low.double(), full, rtol=1e-5, atol=1e-6)


# ---- pool_features, feature_mse ----


def test_pool_features_by_hand():
    features = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [50.0, 50.0]], [[7.0, 7.0]] * 3], dtype=torch.float64)
    features.requires_grad_()
    pooled = losses.pool_features(features, torch.tensor([[1, 1, 0], [0, 0, 0]]))
    pooled.sum().backward()
    assert pooled.tolist() == [[2.0, 2.0], [0.0, 0.0]]
    assert features.grad.tolist() == [[[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]], [[0.0, 0.0]] * 3]


# policy, reference, keywords | D_FPO, its gradient
# fmt: off
MSE = {
    # I = {0} ∪ {1}: (25 + 16) / 1, although feature 2 differs most: the divisor is k = 1, not |I| = 2
    "union larger than k": ([6, 0, 5, 0], [1, 4, 0, 0], {"k": 1}, 41.0, [10.0, -8.0, 0.0, 0.0]),
    # top 2: {2, 0} and {0, 1}: (1 + 4 + 9) / 2
    "overlapping union": ([3, 0, 4, 1], [2, 2, 1, 0], {"k": 2}, 7.0, [1.0, -2.0, 3.0, 0.0]),
    # one non-zero each, k = 3: (4 + 1) / 3
    "fewer non-zeros than k": ([2, 0, 0, 0], [0, 1, 0, 0], {"k": 3}, 5 / 3, [4 / 3, -2 / 3, 0.0, 0.0]),
    # the policy's top 2 is empty, whichever zeros a sort puts first: (16 + 9) / 2
    "zeros are never chosen": ([0, 0, 0, 0], [4, 3, 2, 1], {"k": 2}, 12.5, [-4.0, -3.0, 0.0, 0.0]),
    "zeros are never chosen, reversed": ([0, 0, 0, 0], [1, 2, 3, 4], {"k": 2}, 12.5, [0.0, 0.0, -3.0, -4.0]),
    # equal non-zeros: exactly k of the three are taken: 2 · 9 / 2
    "ties": ([3, 3, 3], [0, 0, 0], {"k": 2}, 9.0, None),
    # as many as there are, still divided by k: (4 + 9) / 2 and (4 + 9) / 50
    "k = m": ([2, 0], [0, 3], {"k": 2}, 6.5, [2.0, -3.0]),
    "k > m, the default 50": ([2, 0], [0, 3], {}, 13 / 50, [4 / 50, -6 / 50]),
}
# fmt: on


@pytest.mark.parametrize("case", MSE)
def test_feature_mse_by_hand(case):
    policy, reference, keywords, expected, gradient = MSE[case]
    rows = [policy, reference], [reference, policy]  # the second row: as far apart the other way round
    policy, reference = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in rows)
    mse = losses.feature_mse(policy, reference, **keywords)
    mse.sum().backward()
    assert mse.dtype == torch.float64
    assert mse.tolist() == pytest.approx([expected] * 2, rel=1e-15)
    assert reference.grad is None
    if gradient is not None:
        assert policy.grad.tolist()[0] == pytest.approx(gradient, rel=1e-15)


# ---- every function ----


def example(name):
    """Small float64 inputs of a function of losses.py, and its keywords."""
    policy, reference, labels = sequences(b=2, t=4)
    function = getattr(losses, name)
    if name == "sequence_logps":
        return (policy, labels), {}
    if name == "sequential_kl":
        return (policy, reference, labels), {}
    if name == "pool_features":
        return (policy.relu(), labels != -100), {}
    if name == "feature_mse":
        return (policy[0].abs(), reference[0].abs()), {"k": 2}
    if name == "sft_loss":
        return (torch.tensor([-3.0, -4.0], dtype=torch.float64), torch.tensor([2, 5])), {}
    return tuple(arguments(function).values()), {}


def outputs(function, inputs, keywords):
    result = function(*inputs, **keywords)
    return result if isinstance(result, tuple) else (result,)


FUNCTIONS = [name for name, _ in inspect.getmembers(losses, inspect.isfunction)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_source_alone_works(name):
    """Copied out into a module that knows only torch and F, a function gives the same values.

    It leaves its arguments alone.
    """
    module = {"torch": torch, "F": F}
    exec(inspect.getsource(getattr(losses, name)), module)
    inputs, keywords = example(name)
    copies = [x.clone() for x in inputs]
    expected = outputs(getattr(losses, name), inputs, keywords)
    assert any(x.abs().sum() > 0 for x in expected)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))
    for got, wanted in zip(outputs(module[name], inputs, keywords), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_synchronisation(name):
    """Tensors on the meta device hold no values: .item(), a branch on one, or a boolean index raises."""
    inputs, keywords = example(name)
    inputs = [x.to("meta").requires_grad_(x.is_floating_point()) for x in inputs]
    first, *_ = outputs(getattr(losses, name), inputs, keywords)
    first.sum().backward()
    assert first.device.type == "meta"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: losses.sequence_logps(x(2, 3, 4), x(2, 4)), r"\(2, 3, 4\), \(2, 4\)"),
        (lambda x: losses.sequence_logps(x(3, 4), x(3, 4)), r"\(3, 4\), \(3, 4\)"),
        (lambda x: losses.sequential_kl(x(2, 3, 4), x(2, 3, 5), x(2, 3)), r"\(2, 3, 4\), \(2, 3, 5\)"),
        (lambda x: losses.sequential_kl(x(2, 3, 4), x(2, 3, 4), x(1, 3)), r"\(2, 3, 4\), \(1, 3\)"),
        (lambda x: losses.sequential_kl(x(2, 3), x(2, 3), x(2, 3)), r"\(2, 3\), \(2, 3\)"),
        (lambda x: losses.pool_features(x(2, 3, 4), x(2, 4)), r"\(2, 3, 4\), \(2, 4\)"),
        (lambda x: losses.pool_features(x(2, 3), x(2, 3)), r"\(2, 3\), \(2, 3\)"),
        (lambda x: losses.feature_mse(x(2, 4), x(1, 4)), r"\(2, 4\), \(1, 4\)"),
        (lambda x: losses.feature_mse(x(4), x(4)), r"\(4,\), \(4,\)"),
        (lambda x: losses.feature_mse(x(2, 4), x(2, 4), k=0), "k >= 1, got 0"),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros)
