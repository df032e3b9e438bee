# SPDX-License-Identifier: Apache-2.0
"""Settings small enough for tiny layers, by method. A method without an entry is tested with its default config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from graftlet.core.method import Method
from graftlet.methods.variants.bdlora import BdLoraConfig
from graftlet.methods.variants.kasa import KasaConfig
from graftlet.methods.variants.monteclora import MontecloraConfig
from graftlet.methods.variants.velora import VeloraConfig
from graftlet.registry import Entry, entries
from graftlet.testing.benches import Bench
from graftlet.testing.case import Case
from graftlet.testing.check import benches

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "LORA": {
        "plain": {"r": 4, "lora_alpha": 6},
        "dora": {"r": 4, "use_dora": True},
        "rslora": {"r": 4, "use_rslora": True},
        "lora_bias": {"r": 4, "lora_bias": True},
        "gaussian": {"r": 4, "init_lora_weights": "gaussian"},
        "pissa": {"r": 4, "init_lora_weights": "pissa"},
        "alora": {"r": 4, "alora_invocation_tokens": [1]},
        "olora": {"r": 4, "init_lora_weights": "olora"},
        "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
        "mica": {"r": 4, "init_lora_weights": "mica"},
        "kasa": {"r": 4, "kasa_config": KasaConfig(beta=0.1, gamma=0.2)},
        "bdlora-a": {"r": 4, "use_bdlora": BdLoraConfig(target_modules_bd_a=["l"], nblocks=2)},
        "bdlora-b": {"r": 4, "use_bdlora": BdLoraConfig(target_modules_bd_b=["l"], nblocks=2)},
        "qalora": {"r": 4, "use_qalora": True, "qalora_group_size": 4},
        "velora": {"r": 4, "velora_config": VeloraConfig(num_groups=3)},
        "velora-random": {"r": 4, "lora_bias": True, "velora_config": VeloraConfig(num_groups=4, init_type="random")},
        "monteclora": {"r": 4, "monteclora_config": MontecloraConfig(num_samples=3, use_entropy=True)},
    },
    "HRA": {"plain": {"r": 4}, "gram-schmidt": {"r": 3, "apply_GS": True}, "odd": {"r": 3}},
    "OFT": {
        "plain": {"oft_block_size": 4},
        "blocks": {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False},
        "coft": {"oft_block_size": 4, "coft": True, "eps": 0.2},
        "shared": {"oft_block_size": 4, "block_share": True},
    },
    "IA3": {"plain": {"feedforward_modules": []}, "feedforward": {"feedforward_modules": ".*"}},
    "ROAD": {
        "plain": {"group_size": 4},
        "road_2": {"group_size": 2, "variant": "road_2"},
        "road_4": {"group_size": 4, "variant": "road_4"},
    },
    "SHIRA": {"plain": {"r": 2, "random_seed": 5}},
    "HIRA": {"plain": {"r": 4}, "gaussian": {"r": 4, "init_weights": "gaussian"}},
    "LILY": {"plain": {"r": 4}},
    "TRAINABLE_TOKENS": {"plain": {"token_indices": [7, 1, 3]}},
    "VERA": {"plain": {"r": 4}},
    "ADAMSS": {
        "plain": {"r": 4, "num_subspaces": 3, "subspace_rank": 2},
        "dynamic": {"r": 4, "num_subspaces": 2, "subspace_rank": 4, "use_dynamic_rank": True, "svd_threshold": 0.3},
    },
    "FROD": {"plain": {"sparse_rate": 0.1}, "seeded": {"sparse_rate": 0.1, "save_projection": False}},
    "ADALORA": {"plain": {"init_r": 4, "target_r": 2, "total_step": 10}},
    "BOFT": {
        "plain": {"boft_block_size": 4},
        "blocks": {"boft_block_num": 4, "boft_block_size": 0},
        "butterfly": {"boft_block_size": 2, "boft_n_butterfly_factor": 3},
    },
    "DEFT": {
        "plain": {"r": 3, "alpha": 5},
        "qr": {"r": 3, "decomposition_method": "qr"},
        "para": {"r": 3, "para": True},
    },
    "GLORA": {
        "plain": {"r": 3},
        "vector": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        "constant": {"config_A_B": "constant", "config_C": "none"},
    },
    "OSF": {"plain": {"effective_rank": 3}, "half": {}},
    "PEANUT": {"plain": {"r": 4}, "deep": {"r": 4, "depth": 2, "act_fn": "gelu"}},
    "LOHA": {"plain": {"r": 2}, "dense": {"r": 4}, "core": {"r": 2, "use_effective_conv2d": True}},
    "LOKR": {
        "plain": {"r": 1},
        "whole": {"r": 4},
        "both": {"r": 1, "decompose_both": True, "use_effective_conv2d": True},
        "factor": {"r": 1, "decompose_factor": 2, "init_weights": "lycoris"},
    },
    "DELORA": {"plain": {"r": 3, "delora_lambda": 4}},
    "GRALORA": {"plain": {"r": 4, "alpha": 6}, "hybrid": {"r": 4, "hybrid_r": 2, "alpha": 6}},
    "MISS": {
        "plain": {"r": 4},
        "uneven": {"r": 3},
        "mini": {"r": 4, "mini_r": 2, "init_weights": "mini"},
        "bat": {"r": 2, "init_weights": "bat"},
    },
    "C3A": {"plain": {"block_size": 2}, "zeros": {"block_size": 2, "init_weights": True}},
    "FOURIERFT": {
        "plain": {"n_frequency": 12, "scaling": 5.0},
        "many": {"n_frequency": 60, "scaling": 5.0, "init_weights": True},
    },
    "WAVEFT": {
        "plain": {"n_frequency": 12, "scaling": 3.0},
        "longer": {"n_frequency": 60, "scaling": 3.0, "wavelet_family": "db3"},
        "places": {"n_frequency": 12, "scaling": 3.0, "use_idwt": False},
        "shares": {"n_frequency": 10, "scaling": 3.0, "proportional_parameters": True, "wavelet_family": "sym2"},
    },
    "PSOFT": {
        "plain": {"r": 4},
        "series": {"r": 4, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5, "ab_svd_init": "pissa_init"},
        "free": {"r": 4, "psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False},
        "lowrank": {"r": 4, "psoft_svd": "lowrank", "psoft_mag_a": False},
    },
    "TINYLORA": {"plain": {"u": 4}, "seeded": {"u": 4, "save_projection": False, "weight_tying": 0.5}},
    "RANDLORA": {
        "plain": {"r": 3, "randlora_alpha": 2},
        "seeded": {"r": 3, "randlora_alpha": 2, "save_projection": False},
        "sparse": {"r": 3, "randlora_alpha": 2, "sparse": True},
        "very sparse": {"r": 3, "randlora_alpha": 2, "very_sparse": True},
    },
    "PVERA": {"plain": {"r": 4}, "seeded": {"r": 4, "save_projection": False}},
    "VBLORA": {
        "plain": {"r": 2, "num_vectors": 6, "vector_length": 2, "init_vector_bank_bound": 1.0},
        "topk": {"r": 2, "num_vectors": 6, "vector_length": 2, "topk": 3, "save_only_topk_weights": True},
    },
    "UNILORA": {
        "plain": {"r": 2, "theta_d_length": 12},
        "saved": {"r": 2, "theta_d_length": 300, "save_indices": True},
    },
    "POLY": {"plain": {"r": 2}, "split": {"r": 2, "n_splits": 2}},
    "XLORA": {},  # works with other adapters, on whole models
    "PROMPT_TUNING": {"plain": {}},
    "P_TUNING": {
        "plain": {"encoder_hidden_size": 5},
        "lstm": {"encoder_hidden_size": 5, "encoder_reparameterization_type": "LSTM"},
    },
    "PREFIX_TUNING": {"plain": {}, "projection": {"prefix_projection": True, "encoder_hidden_size": 5}},
    "MULTITASK_PROMPT_TUNING": {"plain": {"num_tasks": 3, "num_ranks": 2}},
    "CPT": {"plain": {"cpt_token_ids": [1, 2, 3, 4, 5], "cpt_tokens_type_mask": [1, 2, 2, 3, 4], "num_virtual_tokens": 5}},
    "CARTRIDGE": {"plain": {"num_frozen_tokens": 1}, "free": {"num_frozen_tokens": 0}},
    "ADAPTION_PROMPT": {"plain": {"adapter_len": 3, "adapter_layers": 2}},
    "SHADOW": {"plain": {"r": 3}, "narrow": {"r": 3, "shadow_hidden_size": 4}},
    "SUPERTUNING": {"plain": {"sparsity": 0.5}, "supra": {"sparsity": 0.6, "r": 2, "select_top": False}},
}  # fmt: skip

CALLS: dict[tuple[str, str], dict[str, Any]] = {
    ("LORA", "alora"): {"alora_offsets": [2, 3, 1, 2]},
    ("MULTITASK_PROMPT_TUNING", "plain"): {"task_ids": torch.tensor([2, 0, 1, 2])},
}
"""What a call needs beside its inputs."""

OTHER: dict[str, dict[str, Any]] = {"TRAINABLE_TOKENS": {"token_indices": [0, 2]}}
"""What a second adapter must have otherwise to stand beside the first."""

UNMERGED = {("LORA", "alora")}
"""Settings without a merged form although the method has one."""

UNNEUTRAL = {("LORA", "kasa"), ("HRA", "gram-schmidt"), ("HRA", "odd"), ("DEFT", "para")}
"""Settings that change the model from the start although the method's default does not."""

CROSSING = {("LORA", "grouped"), ("BEFT", "no-bias")}
"""Adapters that the layer cannot hold: a mix of channels across a convolution's groups, a bias where there is none."""

REBASED = {("LORA", "pissa"), ("LORA", "olora"), ("LORA", "kasa")}
"""Settings that start by moving a part of the base weight into the adapter."""

IDLE = {"SHADOW": ("layers.2.shadow_update",)}
"""Tensors that the format has and nothing teaches: the last block's next state, which no block takes."""

_CONVOLUTIONS = {"conv1", "conv2", "conv3", "grouped", "pointwise", "dilated"}
_EMBEDDINGS = {"embedding", "scaled-embedding", "padded-embedding"}
_OPAQUE = {"attention", "attention-time-first", "matrix", "experts", "experts-transposed"}

_NOT_LINEAR = _CONVOLUTIONS | _EMBEDDINGS | _OPAQUE
"""What is refused by variants of LoRA that are made for linear layers."""

REFUSED = {
    ("LORA", "alora"): _CONVOLUTIONS | _EMBEDDINGS | _OPAQUE,
    **{("LORA", name): _NOT_LINEAR for name in ("kasa", "bdlora-a", "bdlora-b", "velora", "monteclora", "qalora")},
    ("LORA", "velora-random"): _NOT_LINEAR | {"no-bias"},
    ("LORA", "mica"): _CONVOLUTIONS | _OPAQUE,
    ("LORA", "olora"): _CONVOLUTIONS | _OPAQUE,
    ("LORA", "orthogonal"): _CONVOLUTIONS | _OPAQUE,
    ("LORA", "pissa"): _CONVOLUTIONS | _OPAQUE,
    ("LORA", "lora_bias"): _EMBEDDINGS | _OPAQUE | {"no-bias"},
    ("ROAD", "plain"): {"grouped"},
    ("ROAD", "road_4"): {"grouped"},
    ("IA3", "feedforward"): _EMBEDDINGS,
    ("PVERA", "plain"): {"grouped"},
    ("PVERA", "seeded"): {"grouped"},
    **{
        (name, s): {"experts", "experts-transposed"}
        for name in ("ADAMSS", "FROD")
        for s in ("plain", "dynamic", "seeded")
    },
    ("BOFT", "butterfly"): _EMBEDDINGS | {"grouped", "experts", "experts-transposed"},
}
"""Settings that a layer rightly refuses: they mean nothing there, or their values do not fit its shape."""


def settings_of(entry: Entry) -> dict[str, dict[str, Any]]:
    return SETTINGS.get(entry.name, {"default": {}})


def cases() -> Iterator[Case]:
    """Every method, with all its settings, on every kind of layer that it says it works on, or on a whole model."""
    for entry in entries():
        for setting in settings_of(entry):
            for bench in benches(entry):
                fits = not issubclass(entry.method, Method) or bench.kind in entry.sites
                if fits and bench.name not in REFUSED.get((entry.name, setting), ()):
                    yield case(entry, setting, bench)


def case(entry: Entry, setting: str, bench: Bench) -> Case:
    """A case with what the tables say of it."""
    key, known = (entry.name, setting), settings_of(entry)
    return Case(
        entry,
        setting,
        bench,
        values=known[setting],
        other=OTHER.get(entry.name, {}),
        call=CALLS.get(key, {}),
        first=setting == next(iter(known)),
        neutral=key not in UNNEUTRAL,
        mergeable=key not in UNMERGED and (entry.name, bench.name) not in CROSSING,
        rebased=key in REBASED,
        idle=IDLE.get(entry.name, ()),
    )
