# SPDX-License-Identifier: Apache-2.0
"""Where there is no `q_proj`: LoRA on all experts of a mixture, and on the state space model of Mamba.

    python examples/beyond_attention.py

Each base is small, and has learnt to count up by one. Its adapter teaches it to count by three. Measured are the numbers that
come next, in rows that were not seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM

from graftlet import LoraConfig, get_peft_model

NUMBERS, LENGTH = 24, 12


def mixture() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return MixtralForCausalLM(MixtralConfig(vocab_size=NUMBERS, num_key_value_heads=2, num_local_experts=4, **sizes))


def mamba() -> Any:
    sizes = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 1, "time_step_rank": 4}
    return MambaForCausalLM(MambaConfig(vocab_size=NUMBERS, **sizes))


BASES: dict[str, tuple[Any, LoraConfig]] = {
    # the experts of a layer are one stacked parameter: each of them gets factors of its own
    "mixture of experts": (
        mixture,
        LoraConfig(
            r=4, lora_alpha=8, target_parameters=["experts.gate_up_proj", "experts.down_proj"], target_modules=[]
        ),
    ),
    "Mamba": (mamba, LoraConfig(r=8, lora_alpha=16, target_modules=["in_proj", "x_proj", "out_proj"])),
}


def rows(step: int, count: int, dice: torch.Generator) -> Tensor:
    """Rows of numbers that count by `step`, and begin anew after the last."""
    return (torch.randint(0, NUMBERS, (count, 1), generator=dice) + step * torch.arange(LENGTH)) % NUMBERS


def fit(model: Any, step: int, rate: float, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    dice = torch.Generator().manual_seed(step)
    for _ in range(steps):
        ids = rows(step, 16, dice)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def right(model: Any, step: int) -> float:
    ids = rows(step, 64, torch.Generator().manual_seed(99))
    told = model.eval()(input_ids=ids).logits[:, 1:-1].argmax(-1)
    return float((told == ids[:, 2:]).float().mean())


def main(steps: int = 120) -> dict[str, tuple[float, float]]:
    found = {}
    for name, (make, config) in BASES.items():
        torch.manual_seed(0)
        base = make()
        fit(base, 1, 1e-2, steps)
        before = right(base, 3)
        model = get_peft_model(base, config)
        fit(model, 3, 2e-2, steps)
        found[name] = before, right(model, 3)
        count = model.get_nb_trainable_parameters()[0]
        print(f"{name}: {count:,} parameters, {before:.1%} right before, {found[name][1]:.1%} after")
    return found


if __name__ == "__main__":
    main()
