# SPDX-License-Identifier: Apache-2.0
"""Intruder dimensions, found and turned down (arXiv 2410.21228).   W + dW = U S V^T:  u_i is one where max_j |u_i . u0_j| < eps

u0 are the base weight's own left singular vectors. A full fine-tuning leaves the large directions near these; LoRA puts
new ones among them, and forgets by it. A share lambda of each is left: dW' = dW - (1 - lambda) s_i u_i v_i^T, at the old rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.host import hosts
from ..core.layer import AdaptedLayer, widened
from ..core.svd import leading
from ..errors import ConfigError
from ..methods.lora import LoraConfig
from .convert import matrices, named


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Make a second adapter without the first one's intruder dimensions, and activate it: less forgetting.

    Args:
        peft_model: a model with a LoRA adapter. old_adapter_name, new_adapter_name: the adapter, and the one to make.
        top_k: how many of the adapted weight's largest directions are looked at.
        threshold_epsilon: a direction is an intruder where its cosine with every one of the base's is below this.
        mitigation_lambda: the share of an intruder that is left; the smaller, the less is forgotten.
        logging_sink: is told what was found in each layer.

    Raises:
        ConfigError: the adapter is no plain LoRA.
    """
    config = peft_model.peft_config.get(old_adapter_name)
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"adapter {old_adapter_name!r} is {getattr(config, 'peft_type', 'not there')}; LoRA is needed."
        )
    say = logging_sink or (lambda _: None)
    plain = copy.deepcopy(config)
    plain.init_lora_weights = True  # its tensors are filled below; the base stays as it is
    peft_model.add_adapter(new_adapter_name, plain)
    for path, layer in hosts(peft_model):
        if isinstance(layer, AdaptedLayer) and old_adapter_name in layer.methods:
            count = _reduced(layer, old_adapter_name, new_adapter_name, top_k, threshold_epsilon, 1 - mitigation_lambda)
            say(f"{path}: {f'{count} intruders' if count else 'no intruders'}")
    say(f"active: {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


def _reduced(layer: AdaptedLayer, old: str, new: str, top_k: int, epsilon: float, share: float) -> int:
    """Fill the new adapter on a layer; how many intruders the old one has there."""
    W = widened(*layer.original())[0]
    dW = layer.change(old)[0]
    base, change = matrices(layer.site, W), matrices(layer.site, dW)
    cuts = [_intrusion(w, d, top_k, epsilon) for w, d in zip(base, change, strict=True)]
    count = sum(n for n, _ in cuts)
    if not count:
        for key, tensor in layer.state(old).items():
            layer.assign(new, key, tensor)
        return 0
    left = [(d - share * cut) / layer.scaling[old] for d, (_, cut) in zip(change, cuts, strict=True)]
    rank = layer.r[old] // layer.site.groups
    pairs = [_halves(M, rank) for M in left]
    tensors = named(layer.site, torch.stack([b for b, _ in pairs]), torch.stack([a for _, a in pairs]))
    for key, tensor in {**layer.state(old), **tensors}.items():
        layer.assign(new, key, tensor)
    return count


def _intrusion(W: Tensor, dW: Tensor, top_k: int, epsilon: float) -> tuple[int, Tensor]:
    """How many intruders there are among the first directions of W + dW, and what they make up of it."""
    own, _, _ = torch.linalg.svd(W, full_matrices=False)
    U, S, Vh = leading(W + dW, min(top_k, *W.shape))
    found = (U.T @ own).abs().amax(1) < epsilon
    return int(found.sum()), (U[:, found] * S[found]) @ Vh[found]


def _halves(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B `[out, r]` and A `[r, in]`, of the same strength."""
    U, S, Vh = leading(M, rank)
    root = S.sqrt()
    return U * root, root[:, None] * Vh
