"""What the review asked of FPO: training without one of its parts, and what training does to SAE and tokens.

    python -m experiments.ablations no_length_norm --preset toy --out OUT     sums of log π, as in DPO
    python -m experiments.ablations no_sae --preset toy --alpha 0.2 --out OUT     D of the states themselves
    python -m experiments.ablations measure --preset toy --model OUT/model --json FILE

All other flags are train.py's. The held-out `mse_*` that a run of no_sae prints is Eq. 10 on the states; the
tables take eval_diversity.py's, of the SAE's features.
"""

import argparse
from types import SimpleNamespace

import torch

import data
import fpo
import losses
import train
from sae import SiteHook
from scale import pooled_features
from toy import sae_figures

PAIRS, PAIRS_AT_ONCE = 500, 8  # held-out pairs that are measured; their logits are made whole, (R, L, V)


# ---------------------------------------------------------------------------- losses
def loss_without_length_norm(method, policy, reference, **settings):
    """FPO with log π(y|x) in place of log π(y|x) / |y|; takes and returns what fpo.method_loss does."""
    policy = policy._replace(lengths=torch.ones_like(policy.lengths))
    return fpo.method_loss(method, policy, reference, **settings)


def loss_of_states(method, policy, reference, *, beta, alpha, gamma, k, stop_gradient, units=()):
    """FPO (Eq. 11) with D = mean over d of (h̄_θ − h̄_ref)², h̄ the SAE's input averaged over a response.

    There is no top k: a state has no zeros, and its entries have signs. Statistics.features holds h̄ (2B, d),
    which `state_encoder` leaves there. Takes and returns what fpo.method_loss does.
    """
    D = (policy.features[0] - reference.features[0].detach()).square().mean(-1)  # (2B,)
    D = D / units[0] if units else D
    parts = (policy.logps, reference.logps, policy.lengths, D)
    (w, l), (ref_w, ref_l), (n_w, n_l), (D_w, D_l) = (part.chunk(2) for part in parts)
    options = {"beta": beta, "alpha": alpha, "stop_gradient": stop_gradient}
    loss = losses.fpo_loss(w, l, ref_w, ref_l, n_w, n_l, D_w, D_l, **options)
    reward_w, reward_l = fpo.rewards("fpo", policy, reference, beta=beta).chunk(2)
    values = {"mse_chosen": D_w, "mse_rejected": D_l, "constraint": alpha * beta * (D_l - D_w)}
    return loss, values | {"reward_chosen": reward_w, "reward_rejected": reward_l}


def state_encoder(config):
    """An encoder that gives the state itself: identity, no bias, and a threshold that everything exceeds."""
    device, d = data.start_processes(), train.load_config(config.model).get_text_config().hidden_size
    b_enc, threshold = torch.zeros(d, device=device), torch.full((d,), -torch.inf, device=device)
    return SimpleNamespace(d=d, m=d, W_enc=torch.eye(d, device=device), b_enc=b_enc, threshold=threshold)


# ---------------------------------------------------------------------------- a trained model
def read(lm, batch, layer: int):
    """log π of each response token (N,), nats, and the layer's states (N, d) where they are predicted."""
    mask = fpo.attention_mask(batch, lm.config.get_text_config(), lm.dtype)
    rows = {"input_ids": batch.tokens, "position_ids": batch.positions, "attention_mask": mask}
    with SiteHook(lm, layer) as hook:
        logits = lm(**rows, use_cache=False).logits.flatten(0, 1)[batch.state]  # (N, V)
    logps = logits.float().log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
    return logps, hook.value.flatten(0, 1)[batch.state]


def read_spliced(lm, batch, layer: int, sae):
    """`read` with the SAE's reconstruction in place of the layer's output, but for BOS: no SAE knows it."""

    def replace(module, args, output):
        h, *rest = output if isinstance(output, tuple) else (output,)  # h (R, L, d)
        rebuilt = sae.decode(sae.encode(h)).to(h.dtype)
        rebuilt = torch.where((batch.positions == 0)[..., None], h, rebuilt)
        return (rebuilt, *rest) if isinstance(output, tuple) else rebuilt

    layers = getattr(lm.model, "language_model", lm.model).layers
    with layers[layer].register_forward_hook(replace):
        return read(lm, batch, layer)


@torch.no_grad()
def measure(config) -> dict:
    """What training did to the SAE's fit, to single tokens and to features, on the first held-out pairs.

    Args:
        config: train.Config; its model is the trained one.
    Returns:
        over the chosen responses' tokens l0 and fvu (toy.sae_figures), cross_entropy and
        cross_entropy_spliced (nats a token, without and with the reconstruction in the states' place);
        chosen_largest, …: ends of log π_θ − log π_ref of a token, nats; feature_change: (m,) mean
        |c̄_θ − c̄_ref| over all responses.
    """
    device = data.start_processes()
    (sae, *_), ((layer, site), *_) = train.load_saes(config, device)
    if site != "res":
        raise data.UserError(f"--sae_site {site}: the reconstruction is spliced in at `res` alone")
    sae.to(device)  # the decoder too
    tokenizer = data.load_tokenizer(config.model)
    pairs = train.load_data("eval_dataset", config, tokenizer)
    rows = train.rows_of(config, tokenizer, pairs, device)
    names, dtype = (config.model, config.reference), train.torch_dtype(config, device)
    lm, ref_lm = (train.load_lm(name, device, dtype=dtype).eval() for name in names)

    columns: dict[str, list[torch.Tensor]] = {}
    for start in range(0, min(PAIRS, len(pairs)), PAIRS_AT_ONCE):
        batch = data.collate(pairs, range(start, min(start + PAIRS_AT_ONCE, len(pairs))), **rows).to(device)
        (logps, h), (ref_logps, ref_h) = read(lm, batch, layer), read(ref_lm, batch, layer)
        spliced, _ = read_spliced(lm, batch, layer, sae)
        chosen = batch.owner < len(batch.lengths) // 2  # (N,): the batch's first half of responses
        pooled, ref_pooled = (pooled_features(s, sae, batch.owner, batch.lengths) for s in (h, ref_h))
        here = {"cross_entropy": -logps[chosen], "cross_entropy_spliced": -spliced[chosen]}
        here |= {"chosen": (logps - ref_logps)[chosen], "rejected": (logps - ref_logps)[~chosen]}
        here |= {"states": h[chosen], "change": (pooled - ref_pooled).abs()}  # (n, d), (2B, m)
        for name, values in here.items():
            columns.setdefault(name, []).append(values)
    whole = {name: torch.cat(values) for name, values in columns.items()}
    found = sae_figures(sae, whole["states"])
    found |= {name: whole[name].mean().item() for name in ("cross_entropy", "cross_entropy_spliced")}
    for side in ("chosen", "rejected"):
        found |= {f"{side}_largest": whole[side].max().item(), f"{side}_smallest": whole[side].min().item()}
    return found | {"feature_change": whole["change"].mean(0).tolist()}


def main(argv=None):
    """Train a variant, or measure a model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("task", choices=("no_length_norm", "no_sae", "measure"))
    parser.add_argument("--json", help="measure: file to write")
    args, flags = parser.parse_known_args(argv)
    config = train.parse_args(flags)
    if args.task == "no_length_norm":
        train.main(config, loss_function=loss_without_length_norm)
    elif args.task == "no_sae":
        train.main(config, loss_function=loss_of_states, encoders=[state_encoder(config)])
    else:
        found = measure(config)
        print({name: value for name, value in found.items() if name != "feature_change"})
        if args.json:
            data.write_json(args.json, found)


if __name__ == "__main__":
    data.run_script(main)
