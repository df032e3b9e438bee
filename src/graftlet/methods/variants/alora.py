# SPDX-License-Identifier: Apache-2.0
"""aLoRA: LoRA that is invoked by the text (arXiv 2504.12397).   y_t += s B A x_t  for t >= the last invocation in the row

The tokens before the invocation are the base's own, and so are their keys and values: a cache that the base filled can be
gone on with. A row without the invocation is the base's as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...config import PeftConfig, TaskType
from ...core.context import current, reaches
from ...core.method import Routed, Stage, View
from ...weights.site import Linear
from . import Wrapper, variant


@variant("alora_invocation_tokens")
class ALoRA(Wrapper, Routed):
    """A call may say itself where it begins: `alora_offsets`, for each row a number of tokens from its end, or None."""

    sites = (Linear,)
    carries = ("alora_offsets",)
    unmergeable = "it acts on the tokens from its invocation on, and leaves the others to the base"

    @classmethod
    def checks(cls, config: Any) -> None:
        tokens: list[int] = config.alora_invocation_tokens
        config.require(
            len(tokens) > 0 and min(tokens) >= 0, f"{cls.field}={tokens}; ids of tokens, at least one, needed."
        )
        config.require(
            config.task_type != TaskType.SEQ_2_SEQ_LM,
            f"{cls.field} cannot go with task_type='SEQ_2_SEQ_LM': the decoder has no invocation of its own.",
        )
        config.require(
            not config.target_parameters, f"{cls.field} cannot go with target_parameters: no token is seen there."
        )

    def reach(self, config: PeftConfig, ids: Tensor | None, given: Mapping[str, Tensor]) -> Tensor | None:
        """From the first token of the last invocation to the row's end."""
        if "alora_offsets" in given:
            return given["alora_offsets"]
        if ids is None:
            return None
        wanted = torch.tensor(config.alora_invocation_tokens, device=ids.device)  # type: ignore[attr-defined]
        places = ids.shape[1] - len(wanted) + 1
        if places < 1:
            return ids.new_zeros(len(ids))
        hits = (ids.unfold(1, len(wanted), 1) == wanted).all(-1)
        left = torch.arange(ids.shape[1], ids.shape[1] - places, -1, device=ids.device)
        return torch.where(hits, left, ids.shape[1] + 1).amin(1) % (ids.shape[1] + 1)

    def update(self, p: View, x: Tensor) -> Tensor:
        return self.inner.update(p, self.inner.drop(p, x))

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        y, call = before(x), current()
        acts = None if call is None else call.tokens(reaches(p.adapter), x.shape[:-1])
        if acts is None:
            return y  # nothing is known of the call's tokens
        return y + self.update(p, p.cast(x)).masked_fill(~acts.to(x.device)[..., None], 0)
