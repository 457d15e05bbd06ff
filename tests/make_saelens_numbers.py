"""Makes tests/saelens: SAEs as SAELens saves them, and what SAELens computes with each.

    pip install sae-lens==6.54.0 && python tests/make_saelens_numbers.py

The tests read what it wrote, so SAELens itself is no requirement.
"""

from pathlib import Path

import torch
from sae_lens import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "saelens"
D_IN, D_SAE = 5, 12
TOPK = {"k": 4, "rescale_acts_by_decoder_norm": False}
KINDS = {  # each is made with and without `apply_b_dec_to_input`
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, TOPK),
    "topk_rescaled": (TopKSAE, TopKSAEConfig, TOPK | {"rescale_acts_by_decoder_norm": True}),
    "topk_few_positive": (TopKSAE, TopKSAEConfig, TOPK),  # fewer than k of the pre-activations are
    "topk_training": (TopKTrainingSAE, TopKTrainingSAEConfig, TOPK | {"rescale_acts_by_decoder_norm": True}),
}


def fill(sae, kind):
    """Random weights: directions of several lengths, a bias that matters, some thresholds below 0."""
    generator = torch.Generator().manual_seed(len(kind))
    with torch.no_grad():
        for parameter in (parameter for _, parameter in sorted(sae.named_parameters())):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.W_dec *= 0.3 + 3 * torch.rand(D_SAE, 1, generator=generator)
        if kind == "topk_few_positive":
            sae.b_enc -= 3.0
    return generator


def main():
    """Writes a folder for each SAE, with its states, features and reconstructions in expected.safetensors."""
    for kind, (make, config, options) in KINDS.items():
        for subtracts in (False, True):
            folder = FOLDER / (f"{kind}_b_dec" if subtracts else kind)
            metadata = SAEMetadata(hook_name="blocks.7.hook_resid_post", model_name="tiny")
            options = options | {"apply_b_dec_to_input": subtracts, "metadata": metadata}
            sae = make(config(d_in=D_IN, d_sae=D_SAE, **options))
            states = 2 * torch.randn(9, D_IN, generator=fill(sae, kind))
            sae.save_model(folder)
            with torch.no_grad():
                found = {"states": states, "features": sae.encode(states), "reconstruction": sae(states)}
            save_file(found, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
