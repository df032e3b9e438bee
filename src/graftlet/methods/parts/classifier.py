# SPDX-License-Identifier: Apache-2.0
"""A classifier that all layers share: from a model's hidden states to the shares of experts (arXiv 2402.07148)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...core.method import Spec, View
from ...weights.site import Site

CLASSIFIER = "internal_xlora_classifier"


class Classified:
    """A method's tensors for it, held once for all layers, and what it gives."""

    def commons(self, config: Any, sites: Mapping[str, Site]) -> dict[str, Spec]:
        outputs = len(config.brings) * (len(sites) if config.layerwise_scalings else 1)
        widths = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1), outputs]
        specs: dict[str, Spec] = {}
        for place, inner, outer in zip(places(config), widths, widths[1:], strict=False):
            specs[f"{CLASSIFIER}.layers.{place}.weight"] = Spec((outer, inner))
            specs[f"{CLASSIFIER}.layers.{place}.bias"] = Spec((outer,))
        return specs

    def init_commons(self, config: Any, tensors: Mapping[str, Tensor]) -> None:
        """As new linear layers start."""
        for name, tensor in tensors.items():
            bound = tensors[f"{name.rpartition('.')[0]}.weight"].shape[1] ** -0.5
            tensor.uniform_(-bound, bound)

    def classify(self, p: View, hidden: Tensor) -> Tensor:
        """The experts' shares, `[rows, tokens, layers, experts]`."""
        held, (*inner, last) = p.internal_xlora_classifier, places(p.config)
        hidden = hidden.to(held[f"layers.{last}.weight"].dtype)
        for place in inner:
            hidden = F.linear(hidden, held[f"layers.{place}.weight"], held[f"layers.{place}.bias"])
            hidden = F.dropout(hidden.relu(), p.xlora_dropout_p, p.training)
        scores = F.linear(hidden, held[f"layers.{last}.weight"], held[f"layers.{last}.bias"])
        experts = len(p.config.brings)
        scores = scores.unflatten(-1, (-1, experts)).expand(*scores.shape[:-1], p.layers, experts)
        return (scores / p.softmax_temperature).softmax(-1) if p.enable_softmax else scores


def places(config: Any) -> list[int]:
    """Where the classifier's linear layers stand among activations and dropouts."""
    step = 3 if config.xlora_dropout_p > 0 else 2
    return [step * i for i in range(config.xlora_depth)]
