"""audit.py: a forward that is wrong, or not the same twice, is refused before anything is trained."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_lm, make_pairs, make_sae, nudge
from test_fpo import LAYOUTS, policy_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import audit
import eval_diversity
import fpo
import settings
import train
from batches import collate
from data import Pairs
from runtime import UserError


@pytest.fixture(scope="module")
def lm():
    return nudge(make_lm())


@pytest.fixture(scope="module")
def saes():
    return make_sae(0), make_sae(1, k=20)  # JumpReLU, TopK


def test_audit_measures_the_difference(lm, saes):
    """Our forward and transformers' own agree to rounding, in both layouts; the window of 9 is tested."""
    for rows in LAYOUTS:
        found = audit.audit(policy_of(lm, saes), make_pairs(6), k=4, **rows)
        assert found["difference"] < 1e-5 and found["floor"] < 1e-9 and found["window"] == 9


def test_audit_of_conversations(lm):
    """SFT rows with a user's turn between two answers: both forwards sum the answers' tokens alone."""
    first, second, said = [5, 6, 7], [8, 9], [20, 21, 22, 23]
    talk = ([2, 11, 12], first + said + second, [], [1] * 3 + [0] * 4 + [1] * 2)
    found = audit.audit(fpo.Policy(lm), Pairs([talk, ([2, 4], [5, 6], [])]), layout="shared")
    assert found["difference"] < 1e-5
    batch = collate(Pairs([talk]), [0], layout="separate")
    log_pi = lm(torch.tensor([talk[0] + talk[1]])).logits[0].log_softmax(-1)
    # The token at place i is predicted at place i - 1; answers stand at places 3 to 5, and 10 and 11.
    by_hand = sum(log_pi[i - 1, token] for i, token in zip((3, 4, 5, 10, 11), first + second, strict=True))
    torch.testing.assert_close(fpo.Policy(lm).plain_logps(batch), by_hand[None])


@pytest.mark.parametrize("fault", ["softcap", "window", "dropout", "multiplier"])
def test_audit_refuses(lm, saes, fault, monkeypatch):
    """What our forward gets wrong is named with its size; dropout shows as two runs that differ."""
    policy, says = policy_of(lm, saes), "differs from the model's own forward by"
    statistics, masks = fpo.token_statistics, fpo.attention_mask
    if fault == "softcap":  # our softcap is read from the config, the model's own from its module
        monkeypatch.setattr(fpo, "token_statistics", lambda *x, **y: statistics(*x, **{**y, "softcap": None}))
    elif fault == "window":

        def same(*args):
            return dict.fromkeys(masks(*args), masks(*args)["full_attention"])

        monkeypatch.setattr(fpo, "attention_mask", same)
    elif fault == "dropout":
        says = "two runs of one batch differ"
        norm = policy.lm.model.norm
        norm.register_forward_hook(lambda m, a, out: F.dropout(out, 0.1, training=m.training))
    else:  # a head that scales its input, as some families do
        policy.lm.lm_head.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
    with pytest.raises(UserError, match=says):
        audit.audit(policy, make_pairs(6), layout="shared")


def test_what_training_refuses_is_not_scored_either(folder):
    """A scale of the logits that our forward knows nothing of: the model's own forward has it."""
    tokenizer = AutoTokenizer.from_pretrained("runs/toy/model")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model("cohere", vocab_size=len(tokenizer), logit_scale=0.25, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "scaled")
    tokenizer.save_pretrained(folder / "scaled")
    with pytest.raises(UserError, match="differs from the model's own forward"):
        words = ["--preset", "toy", "--method", "dpo", "--steps", "3", "--model", "./scaled"]
        train.main(settings.parse_args(words))
    for models in (["./scaled", "runs/toy/model"], ["runs/toy/model", "./scaled"]):
        flags = ["--preset", "toy", "--samples", "0", "--model", models[0], "--reference", models[1]]
        with pytest.raises(UserError, match="differs from the model's own forward"):
            eval_diversity.main(eval_diversity.parse_args(flags))


def test_parameters_without_a_gradient_are_frozen():
    """A vision tower that no text reaches: DDP would wait for its gradient. The rest stays trainable."""
    policy = fpo.Policy(make_lm())
    policy.lm.model.vision = torch.nn.Linear(2, 2)
    audit.audit_and_freeze(
        policy, make_pairs(4), settings.parse_args(["--preset", "toy"]), {"layout": "shared"}
    )
    frozen = {name for name, p in policy.named_parameters() if not p.requires_grad}
    assert frozen == {"lm.model.vision.weight", "lm.model.vision.bias"}
    assert all(p.grad is None for p in policy.parameters())


def test_what_has_a_gradient_is_found_as_training_runs():
    """On the shortest pair, not the first; in train mode, where checkpointing makes each block again."""
    seen, policy, pairs = [], fpo.Policy(make_lm()), make_pairs(6, seed=1)
    policy.lm.activation_checkpointing_enable({"use_reentrant": False})
    block = policy.lm.model.layers[0].mlp
    block.register_forward_pre_hook(
        lambda module, args: seen.append((torch.is_grad_enabled(), args[0].shape))
    )
    audit.audit_and_freeze(policy, pairs, settings.parse_args(["--preset", "toy"]), {"layout": "shared"})
    with_gradient = [shape for gradient, shape in seen if gradient]
    assert with_gradient == [(1, min(pairs.sizes.sum(1)), 32)] * 2 and pairs.shortest > 0


def test_too_little_memory_is_told(monkeypatch):
    """Not as a model that is not understood: with the settings that take less, but for those in use."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.91 GiB.")

    monkeypatch.setattr(audit, "audit", full)
    config = settings.parse_args(["--preset", "toy"])
    pairs = make_pairs(4)
    says = rf"longest pair, {max(pairs.sizes.sum(1))} tokens, do not fit \(CUDA out of memory. Tried .*GiB"
    with pytest.raises(UserError, match=says + r".*--activation_checkpointing, --shard fsdp .*--max_length"):
        audit.audit_and_freeze(fpo.Policy(make_lm()), pairs, config, {"layout": "shared"})
    config.activation_checkpointing, config.shard = True, "fsdp"
    with pytest.raises(UserError, match=r"less is needed by --max_length below 1024$"):
        audit.audit_and_freeze(fpo.Policy(make_lm()), pairs, config, {"layout": "shared"})
