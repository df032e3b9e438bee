# SPDX-License-Identifier: Apache-2.0
"""Write the golden adapters with the installed reference: `python tests/golden/make.py`. Run once a format version.

Each folder holds what the reference saved and, in `expected.safetensors`, what its model gave for the ids there.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
TASK = {"task_type": "CAUSAL_LM"}
CASES = {
    "lora": peft.LoraConfig(r=2, **TASK),
    "lora-dora": peft.LoraConfig(r=2, use_dora=True, **TASK),
    "lora-patterns": peft.LoraConfig(
        r=2, use_rslora=True, target_modules=["q_proj", "k_proj", "down_proj"], rank_pattern={"k_proj": 3},
        alpha_pattern={"layers.1.*q_proj": 5}, layers_to_transform=[1], **TASK,
    ),
    "lora-pissa": peft.LoraConfig(r=2, init_lora_weights="pissa", **TASK),
    "lora-head": peft.LoraConfig(r=2, modules_to_save=["lm_head"], **TASK),
    "lora-embedding": peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], **TASK),
    "lora-tokens": peft.LoraConfig(r=2, trainable_token_indices=[3, 5], **TASK),
    "shira": peft.ShiraConfig(r=1, random_seed=0, **TASK),
    "oft": peft.OFTConfig(oft_block_size=4, **TASK),
    "oft-exact": peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, block_share=True, **TASK),
    "hra": peft.HRAConfig(r=2, **TASK),
    "hra-gs": peft.HRAConfig(r=2, apply_GS=True, **TASK),
    "ia3": peft.IA3Config(**TASK),
    "road": peft.RoadConfig(group_size=4, **TASK),
    "road-4": peft.RoadConfig(group_size=4, variant="road_4", **TASK),
    "hira": peft.HiraConfig(r=2, **TASK),
    "lily": peft.LilyConfig(r=2, **TASK),
    "ln-tuning": peft.LNTuningConfig(**TASK),
    "trainable-tokens": peft.TrainableTokensConfig(token_indices=[3, 5], target_modules=["embed_tokens"], **TASK),
    "vera": peft.VeraConfig(r=3, **TASK),
    "vera-seeded": peft.VeraConfig(r=3, save_projection=False, **TASK),
    "prompt-tuning": peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "prefix-tuning": peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    "prefix-projection": peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, **TASK),
    "adaption-prompt": peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **TASK),
}  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    base.save_pretrained(HERE / "base")
    ids = torch.randint(0, SIZES["vocab_size"], (2, 6))
    ids[0, :2] = torch.tensor([3, 5])
    for name, config in CASES.items():
        folder = HERE / f"peft-{peft.__version__}" / name
        shutil.rmtree(folder, ignore_errors=True)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        fresh = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        with torch.no_grad():
            save_file({"ids": ids, "logits": fresh(input_ids=ids).logits}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
