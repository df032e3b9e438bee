# SPDX-License-Identifier: Apache-2.0
"""diffusers: LoRA on a pipeline shaped like Stable Diffusion's, UNet and text encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import learning, shake, tensors


def _unet(seed: int = 0):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def _pipeline():
    """UNet, autoencoder, text encoder, tokeniser of letters, scheduler."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    made = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=_tokenizer(),
        unet=_unet().eval(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {word: i for i, word in enumerate(["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"])}
    held = Tokenizer(models.WordLevel(letters, unk_token="a"))
    held.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=held, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=16
    )


def _image(pipeline, **settings) -> torch.Tensor:
    """One picture, the same noise each time."""
    draw = torch.Generator().manual_seed(7)
    return torch.tensor(
        pipeline(
            "a cat", num_inference_steps=2, generator=draw, output_type="np", height=16, width=16, **settings
        ).images
    )


def _saved(folder: Path, seed: int, rank: int = 4, **settings) -> Path:
    """A pipeline's LoRA on disk, as a training script of diffusers writes it."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    made = _pipeline()
    made.unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_in"], **settings)
    )
    made.text_encoder.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"], **settings))
    shake(made.unet, seed)
    shake(made.text_encoder, seed)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(made.unet)),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(made.text_encoder)),
    )
    return folder


def load_set_scale(folder: Path) -> dict:
    """load_lora_weights, set_adapters with weights, get_active_adapters, disable_lora, delete_adapters."""
    first, second = _saved(folder / "1", 1), _saved(folder / "2", 2, rank=2)
    made = _pipeline()
    seen = {"tensors": tensors(first / "pytorch_lora_weights.safetensors"), "base": _image(made)}
    made.load_lora_weights(first, adapter_name="first")
    seen["first"] = _image(made)
    seen["first, half"] = _image(made, cross_attention_kwargs={"scale": 0.5})
    made.load_lora_weights(second, adapter_name="second")
    seen["active after the second"] = made.get_active_adapters()
    seen["second"] = _image(made)
    made.set_adapters(["first", "second"], adapter_weights=[0.7, 0.4])
    seen |= {"both": _image(made), "active": made.get_active_adapters(), "list": made.get_list_adapters()}
    made.set_adapters("first", adapter_weights={"unet": {"down": 0.3, "up": 0.8}, "text_encoder": 0.5})
    seen["block by block"] = _image(made)
    made.disable_lora()
    seen["disabled"] = _image(made)
    made.enable_lora()
    seen["enabled"] = _image(made)
    made.delete_adapters("first")
    made.set_adapters("second")
    seen |= {"left": made.get_list_adapters(), "output of what is left": _image(made)}
    made.unload_lora_weights()
    seen["unloaded"] = _image(made)
    seen["modules left"] = sorted({type(m).__module__.split(".")[0] for m in made.unet.modules()})
    return seen


def fuse(folder: Path) -> dict:
    """fuse_lora, unfuse_lora, with one adapter and with two, safely and not."""
    first, second = _saved(folder / "1", 1), _saved(folder / "2", 2)
    made = _pipeline()
    made.load_lora_weights(first, adapter_name="first")
    made.load_lora_weights(second, adapter_name="second")
    made.set_adapters(["first", "second"], [0.6, 0.3])
    seen = {"before": _image(made)}
    made.fuse_lora(adapter_names=["first", "second"], lora_scale=0.9)
    seen |= {"fused": _image(made), "number fused": made.num_fused_loras}
    made.unfuse_lora()
    seen["unfused"] = _image(made)
    made.set_adapters("first")
    made.fuse_lora(safe_fusing=True)
    seen["first, fused"] = _image(made)
    made.unload_lora_weights()
    seen["first, fused and unloaded"] = _image(made)
    return seen


def hotswap(folder: Path) -> dict:
    """load_lora_weights(hotswap=True), of another rank and scale."""
    from peft import LoraConfig

    for number, rank in enumerate((4, 2)):
        made = _pipeline()
        made.unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=8 + number, target_modules=["to_q", "to_k", "to_v", "proj_in"])
        )
        shake(made.unet, number)
        made.unet.save_lora_adapter(folder / str(number))
    made = _pipeline()
    made.unet.enable_lora_hotswap(target_rank=8)
    seen = {"base": _image(made)}
    for number in (0, 1, 0):
        given = {"weight_name": "pytorch_lora_weights.safetensors", "prefix": None, "adapter_name": "one"}
        made.unet.load_lora_adapter(folder / str(number), hotswap=len(seen) > 1, **given)
        seen[f"{len(seen)}: the adapter {number}"] = _image(made)
    return seen


def errors(folder: Path) -> dict:
    """A file that does not fit, a name that is taken: the pipeline is as it was."""
    first = _saved(folder / "1", 1)
    made = _pipeline()
    made.load_lora_weights(first, adapter_name="one")
    seen = {}
    for name, act in {
        "name taken": lambda: made.load_lora_weights(first, adapter_name="one"),
        "unknown": lambda: made.set_adapters("two"),
        "not there to swap": lambda: made.load_lora_weights(first, adapter_name="two", hotswap=True),
    }.items():
        try:
            act()
            seen[name] = "nothing"
        except Exception as error:
            seen[name] = next(k.__name__ for k in type(error).__mro__ if k.__module__ == "builtins")
    seen |= {"list": made.get_list_adapters(), "image": _image(made)}
    return seen


def training(folder: Path) -> dict:
    """A training script: add_adapter on the UNet, steps, saved by save_lora_adapter, loaded by load_lora_adapter."""
    from peft import LoraConfig

    unet = _unet()
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "conv1"], init_lora_weights="gaussian")
    )
    shake(unet)
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=0.1)
    draw = torch.Generator().manual_seed(0)
    seen = {"learns": learning(unet), "losses": []}
    for _ in range(10):
        noisy, noise = torch.randn(2, 2, 4, 8, 8, generator=draw)
        states = torch.randn(2, 5, 16, generator=draw)
        loss = (unet(noisy, torch.tensor([10, 500]), states).sample - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen["losses"].append(loss.item())
    unet.save_lora_adapter(folder, adapter_name="default")
    seen["tensors"] = tensors(folder / "pytorch_lora_weights.safetensors")
    other = _unet()
    other.load_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name="other", prefix=None)
    given = torch.randn(1, 4, 8, 8, generator=draw), torch.tensor([3]), torch.randn(1, 5, 16, generator=draw)
    with torch.no_grad():
        seen["output"], seen["loaded"] = unet(*given).sample, other(*given).sample
    return seen


JOBS = [load_set_scale, fuse, hotswap, errors, training]
