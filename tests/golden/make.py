# SPDX-License-Identifier: Apache-2.0
"""Write the golden adapters with the installed reference. Run once a format version.

`python tests/golden/make.py` writes all of them, on a new base; `python tests/golden/make.py lora ia3` the named ones, on
the base that is there. Each folder holds what the reference saved and, in `expected.safetensors`, what its model gave for
the ids there.
"""

from __future__ import annotations

import copy
import shutil
import sys
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
    "lora-kasa": peft.LoraConfig(r=2, kasa_config=peft.KasaConfig(), **TASK),
    "lora-velora": peft.LoraConfig(r=2, velora_config=peft.VeloraConfig(num_groups=4), **TASK),
    "lora-monteclora": peft.LoraConfig(r=2, monteclora_config=peft.MontecloraConfig(num_samples=3), **TASK),
    "lora-bdlora": peft.LoraConfig(
        r=2, use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2), **TASK
    ),
    "lora-mica": peft.LoraConfig(r=2, init_lora_weights="mica", **TASK),
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
    "loha": peft.LoHaConfig(r=2, **TASK),
    "lokr": peft.LoKrConfig(r=1, rank_pattern={"k_proj": 9}, target_modules=["q_proj", "k_proj", "down_proj"], **TASK),
    "lokr-both": peft.LoKrConfig(r=1, decompose_both=True, decompose_factor=2, **TASK),
    "delora": peft.DeloraConfig(r=2, lambda_pattern={"v_proj": 3}, **TASK),
    "gralora": peft.GraloraConfig(r=4, alpha=4, **TASK),
    "gralora-hybrid": peft.GraloraConfig(r=4, hybrid_r=2, alpha=4, **TASK),
    "miss": peft.MissConfig(r=3, **TASK),
    "miss-mini": peft.MissConfig(r=4, mini_r=2, init_weights="mini", **TASK),
    "miss-bat": peft.MissConfig(r=4, init_weights="bat", **TASK),
    "c3a": peft.C3AConfig(block_size=4, block_size_pattern={"v_proj": 8}, **TASK),
    "fourierft": peft.FourierFTConfig(n_frequency=9, n_frequency_pattern={"v_proj": 5}, scaling=9.0, **TASK),
    "waveft": peft.WaveFTConfig(n_frequency=9, wavelet_family="db2", scaling=9.0, **TASK),
    "waveft-shares": peft.WaveFTConfig(n_frequency=9, proportional_parameters=True, scaling=9.0, **TASK),
    "waveft-places": peft.WaveFTConfig(n_frequency=9, use_idwt=False, scaling=9.0, random_loc_seed=3, **TASK),
    "psoft": peft.PsoftConfig(r=4, **TASK),
    "psoft-series": peft.PsoftConfig(r=4, use_cayley_neumann=True, ab_svd_init="pissa_init", **TASK),
    "tinylora": peft.TinyLoraConfig(u=3, weight_tying=0.5, **TASK),
    "tinylora-seeded": peft.TinyLoraConfig(u=3, save_projection=False, **TASK),
    "randlora": peft.RandLoraConfig(r=3, randlora_alpha=2, **TASK),
    "randlora-seeded": peft.RandLoraConfig(r=3, randlora_alpha=2, save_projection=False, **TASK),
    "randlora-sparse": peft.RandLoraConfig(r=3, randlora_alpha=2, save_projection=False, very_sparse=True, **TASK),
    "pvera": peft.PveraConfig(r=3, **TASK),
    "pvera-seeded": peft.PveraConfig(r=3, save_projection=False, **TASK),
    "vblora": peft.VBLoRAConfig(r=2, num_vectors=5, vector_length=4, **TASK),
    "vblora-topk": peft.VBLoRAConfig(r=2, num_vectors=5, vector_length=4, topk=3, save_only_topk_weights=True, **TASK),
    "unilora": peft.UniLoraConfig(r=2, theta_d_length=10, **TASK),
    "unilora-saved": peft.UniLoraConfig(r=2, theta_d_length=10, save_indices=True, **TASK),
    "boft": peft.BOFTConfig(**TASK),
    "boft-blocks": peft.BOFTConfig(boft_block_num=2, boft_block_size=0, **TASK),
    "beft": peft.BeftConfig(**TASK),
    "glora": peft.GloraConfig(r=2, **TASK),
    "glora-vector": peft.GloraConfig(r=2, config_A_B="vector", config_C="none", config_D_E="none", **TASK),
    "deft": peft.DeftConfig(r=2, alpha=3, **TASK),
    "deft-qr": peft.DeftConfig(r=2, decomposition_method="qr", para=True, **TASK),
    "peanut": peft.PeanutConfig(r=2, **TASK),
    "peanut-deep": peft.PeanutConfig(r=2, depth=2, act_fn="gelu", scaling=0.5, **TASK),
    "osf": peft.OSFConfig(**TASK),
    "osf-patterns": peft.OSFConfig(effective_rank=5, rank_pattern={"k_proj": 0.25}, **TASK),
    "frod": peft.FrodConfig(sparse_rate=0.05, progressbar=False, **TASK),
    "frod-seeded": peft.FrodConfig(sparse_rate=0.05, save_projection=False, progressbar=False, **TASK),
    "adamss": peft.AdamssConfig(r=6, num_subspaces=3, subspace_rank=2, **TASK),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, **TASK),
    "adalora-trimmed": peft.AdaLoraConfig(
        init_r=3, target_r=1, total_step=10, target_modules=["layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"],
        rank_pattern={
            "model.layers.0.self_attn.q_proj.lora_E": [True, False, True],
            "model.layers.1.self_attn.v_proj.lora_E": [False, True, False],
        }, **TASK,
    ),
    "poly": peft.PolyConfig(r=2, n_tasks=3, n_splits=2, **TASK),
    "supertuning": peft.SupertuningConfig(sparsity=0.9, **TASK),
    "supertuning-supra": peft.SupertuningConfig(sparsity=0.9, r=2, save_precomputed_indices=False, **TASK),
    "prompt-tuning": peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "prefix-tuning": peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    "prefix-projection": peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, **TASK),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, **TASK),
    "p-tuning-lstm": peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=5, **TASK
    ),
    "multitask-prompt": peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=3, num_ranks=2, **TASK),
    "cpt": peft.CPTConfig(
        cpt_token_ids=[4, 8, 15, 16, 23], cpt_tokens_type_mask=[0, 1, 2, 3, 4], opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.5, **TASK,
    ),
    "cartridge": peft.CartridgeConfig(num_virtual_tokens=3, **TASK),
    "shadow": peft.ShadowConfig(r=2, **TASK),
    "shadow-narrow": peft.ShadowConfig(r=2, shadow_hidden_size=8, update_hidden_size=3, **TASK),
    "adaption-prompt": peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **TASK),
}  # fmt: skip
CALLS = {name: {"task_ids": torch.tensor([2, 0])} for name in ("poly", "multitask-prompt")}
"""What a call needs beside the ids."""


def main(names: list[str]) -> None:
    torch.manual_seed(0)
    if names:
        base = LlamaForCausalLM.from_pretrained(HERE / "base").eval()
    else:
        base = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
        base.save_pretrained(HERE / "base")
    ids = torch.randint(0, SIZES["vocab_size"], (2, 6))
    ids[0, :2] = torch.tensor([3, 5])
    for name in names or CASES:
        folder = HERE / f"peft-{peft.__version__}" / name
        shutil.rmtree(folder, ignore_errors=True)
        model = peft.get_peft_model(copy.deepcopy(base), CASES[name])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        fresh = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        with torch.no_grad():
            call = CALLS.get(name, {})
            logits = fresh(input_ids=ids, **call).logits
            save_file({"ids": ids, "logits": logits, **call}, folder / "expected.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
