# SPDX-License-Identifier: Apache-2.0
"""A model's own head, what it is given of a call's states and labels, and the loss of a classifier's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.prompt import IGNORED
from ...core.target import HEADS


def head_name(model: nn.Module) -> str | None:
    """The path of a model's head: of the classifier, or of the output embedding; None where it has neither."""
    if (name := next((n for n in HEADS[::-1] if n in model._modules), None)) is not None:
        return name
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    return next((n for n, m in model.named_modules() if m is head), None)


def last(states: Tensor, mask: Tensor | None) -> Tensor:
    """The state of each row's last token that is no padding, `[rows, width]`."""
    if mask is None:
        return states[:, -1]
    places = torch.arange(mask.shape[1], device=mask.device)
    return states[torch.arange(len(states), device=states.device), (mask.ne(0) * places).argmax(-1).to(states.device)]


def kept(states: Tensor, logits_to_keep: Tensor | int = 0) -> Tensor:
    """Those of the states `[rows, tokens, width]` whose logits a call asks for: the last so many, all for 0, or by index."""
    if isinstance(logits_to_keep, int):
        return states[:, -logits_to_keep:] if logits_to_keep else states
    return states[:, logits_to_keep]


def targets(labels: Tensor, shift_labels: Tensor | None = None) -> Tensor:
    """The token that comes after each one, flat: by labels for the tokens themselves, or as given."""
    return (F.pad(labels, (0, 1), value=IGNORED)[..., 1:] if shift_labels is None else shift_labels).flatten()


def classified(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of a regression, of one class a row, or of several, by the labels' shape and kind."""
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).flatten())
    if not labels.is_floating_point():
        return F.cross_entropy(logits, labels.flatten())
    return F.binary_cross_entropy_with_logits(logits, labels)
