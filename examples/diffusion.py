# SPDX-License-Identifier: Apache-2.0
"""A network in the shape of Stable Diffusion learns a style: adapters on its UNet and on its text encoder, by four methods.

    pip install diffusers
    python examples/diffusion.py

Both networks are small and made up. What is learnt is to find the noise in a few stripes, which they are told of in words;
measured is the error with noise that was not seen. The LoRA adapters are then exported as diffusers loads them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from graftlet import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from graftlet.serve.export import export

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
UNET = [*ATTENTION, "conv1", "conv2", "conv_out"]
TEXT = ["q_proj", "v_proj"]
METHODS: dict[str, Any] = {
    "LoRA": lambda targets: LoraConfig(r=4, lora_alpha=8, target_modules=targets),
    "LoHa": lambda targets: LoHaConfig(r=4, alpha=8, target_modules=targets),
    "LoKr": lambda targets: LoKrConfig(r=4, alpha=8, target_modules=targets),
    "OFT": lambda targets: OFTConfig(r=0, oft_block_size=4, target_modules=[t for t in targets if t != "conv_out"]),
}
SCHEDULE = DDPMScheduler(num_train_timesteps=100)
WORDS = torch.tensor([[1, 5, 9, 2]])


def networks() -> tuple[Any, Any]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8,
    )  # fmt: skip
    sizes = {
        "vocab_size": 16,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return unet, CLIPTextModel(CLIPTextConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def stripes(count: int, dice: torch.Generator) -> Tensor:
    """Pictures `[count, 4, 8, 8]` in the style to learn."""
    shift = torch.randint(0, 4, (count, 1, 1, 1), generator=dice)
    return torch.where((torch.arange(8) + shift) % 4 < 2, 1.0, -1.0).expand(count, 4, 8, 8)


def error(unet: Any, text: Any, count: int, dice: torch.Generator) -> Tensor:
    """How far off the noise is that the network finds in noisy pictures."""
    pictures, noise = stripes(count, dice), torch.randn(count, 4, 8, 8, generator=dice)
    times = torch.randint(0, 100, (count,), generator=dice)
    noisy = SCHEDULE.add_noise(pictures, noise, times)  # pyright: ignore[reportArgumentType]
    words = text(WORDS.expand(count, -1)).last_hidden_state
    return F.mse_loss(unet(noisy, times, words).sample, noise)


@torch.no_grad()
def measured(unet: Any, text: Any) -> float:
    return float(error(unet.eval(), text.eval(), 64, torch.Generator().manual_seed(1)))


def learnt(method: str, steps: int) -> tuple[float, float, Any, Any]:
    """The error before and after, and the networks with their adapters."""
    unet, text = networks()
    unet, text = get_peft_model(unet, METHODS[method](UNET)), get_peft_model(text, METHODS[method](TEXT))
    before = measured(unet, text)
    learning = [p for m in (unet, text) for p in m.parameters() if p.requires_grad]
    optimizer, dice = torch.optim.AdamW(learning, 1e-2), torch.Generator().manual_seed(2)
    for _ in range(steps):
        error(unet.train(), text.train(), 16, dice).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, measured(unet, text), unet, text


def main(steps: int = 60) -> dict[str, tuple[float, float]]:
    found = {}
    for method in METHODS:
        before, after, unet, text = learnt(method, steps)
        print(
            f"{method:5} {unet.get_nb_trainable_parameters()[0]:>7,} parameters: error {before:.3f} before, {after:.3f} after"
        )
        found[method] = before, after
        if method == "LoRA":
            with tempfile.TemporaryDirectory() as folder:
                export(unet, folder, "diffusers", component="unet")
                told = export(text, folder, "diffusers", component="text_encoder")
                print(f"      {told.files[0].name}, {Path(told.files[0]).stat().st_size / 2**10:.0f} KiB")
    return found


if __name__ == "__main__":
    main()
