# SPDX-License-Identifier: Apache-2.0
"""`optimize_model` on a CPU: families of models compute as before, with fewer passes, and are as they were once restored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from graftlet import LoraConfig, get_peft_model, optimised, optimize_model, restore_model
from graftlet.core.kernel import rehearsal

SIZES: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
ALL = {"heads": 1, "rotations": 2, "gated products": 2, "norms": 5}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "Llama": ({"attention_bias": True, "tie_word_embeddings": True}, ALL),
    "Mistral": ({"sliding_window": 5}, ALL),
    "Qwen2": ({}, ALL),
    "Qwen3": ({"head_dim": 8}, {**ALL, "norms": 9}),
    "Gemma": ({"head_dim": 8}, ALL),
    "Gemma2": ({"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 5}, {**ALL, "norms": 9}),
    "Phi3": ({"original_max_position_embeddings": 64}, {k: v for k, v in ALL.items() if k != "gated products"}),
    "Phi": ({"partial_rotary_factor": 0.5}, {"heads": 1, "rotations": 2}),
}
"""Of each family: settings, and what is fused of two layers. Phi has layer norms and no gate, Phi3 gate and up in one."""

IDS = torch.randint(1, 90, (3, 11), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(11) < 4, -100)


def model(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family][0])
    base = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    for name, parameter in base.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1, 0.1)
    made = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", **options))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return made.train()


def step(made: Any, **call: Any) -> dict[str, Tensor]:
    """A step's loss and gradients."""
    made.zero_grad()
    loss = made(**{"input_ids": IDS, "labels": LABELS, **call}).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}}


def near(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert (found[name] - tensor).norm() <= bound * tensor.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_as_before_and_is_restored_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    made = model(family, dtype)
    wanted, logits = step(made), made.eval()(IDS).logits
    assert optimize_model(made.train()) is made
    assert (told := optimised(made)) is not None
    assert told.replaced == FAMILIES[family][1]
    assert not told.left
    bound = 2e-5 if dtype == torch.float32 else 6e-2
    near(step(made), wanted, bound)
    near({"logits": made.eval()(IDS).logits}, {"logits": logits}, bound)
    assert restore_model(made.train()) is made
    assert optimised(made) is None
    assert not any("forward" in module.__dict__ for module in made.get_base_model().modules())
    again = step(made)
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())


def checkpointed(made: Any) -> None:
    made.enable_input_require_grads()
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


CASES: dict[str, tuple[dict[str, Any], Callable[[Any], None]]] = {
    "checkpointing": ({}, checkpointed),
    "dora": ({"use_dora": True}, lambda made: None),
    "learning norms": ({"modules_to_save": ["norm"]}, lambda made: None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_with_what_stands_around_it(family: str, case: str) -> None:
    options, prepare = CASES[case]
    made = model(family, **options)
    prepare(made)
    wanted = step(made)
    near(step(optimize_model(made)), wanted, 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast(family: str) -> None:
    made = model(family)
    exact = step(made)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = step(made)
        found = step(optimize_model(made))
    far = {n: ((wanted[n] - t).norm() / t.norm()).item() for n, t in exact.items()}
    for name, tensor in exact.items():
        assert found[name].dtype == wanted[name].dtype, name
        assert (found[name] - tensor).norm() / tensor.norm() <= 2 * far[name] + 1e-2, name


def test_padding_shifted_labels_and_counted_items() -> None:
    made = model("Llama")
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0
    calls: list[dict[str, Any]] = [
        {"attention_mask": mask},
        {"num_items_in_batch": 7},
        {"shift_labels": LABELS.roll(-2, 1)},
        {"labels": torch.full_like(IDS, -100).index_fill(1, torch.tensor([3]), 7)},
    ]
    wanted = [step(made, **call) for call in calls]
    optimize_model(made)
    for call, one in zip(calls, wanted, strict=True):
        near(step(made, **call), one, 2e-5)
    assert made(input_ids=IDS, labels=LABELS).logits is None
    assert made(input_ids=IDS).logits is not None


def test_a_graph_may_be_gone_through_twice() -> None:
    made = optimize_model(model("Llama"))
    loss = made(input_ids=IDS, labels=LABELS).loss
    learning = [p for p in made.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, learning, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, learning)))


def test_many_adapters_merging_and_generation_go_on() -> None:
    made = model("Qwen2")
    made.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    made.eval()
    rows = ["default", "other", "__base__"]
    wanted = made(IDS, adapter_names=rows).logits
    tokens = made.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    optimize_model(made)
    torch.testing.assert_close(made(IDS, adapter_names=rows).logits, wanted)
    assert torch.equal(made.generate(input_ids=IDS, max_new_tokens=4, do_sample=False), tokens)
    before = made(IDS).logits
    made.merge_adapter()
    torch.testing.assert_close(made(IDS).logits, before, atol=1e-5, rtol=1e-4)
    made.unmerge_adapter()
    assert torch.equal(made(IDS).logits, before)


def test_one_object_is_changed_and_no_class() -> None:
    made, other = model("Llama"), model("Llama")
    wanted = step(other)
    kinds = {type(module): type(module).forward for module in made.modules()}
    optimize_model(optimize_model(made))
    assert all(kind.forward is forward for kind, forward in kinds.items())
    assert optimised(other) is None
    assert all(torch.equal(t, wanted[n]) for n, t in step(other).items())


def test_a_copy_of_a_restored_model_is_whole() -> None:
    made = model("Llama")
    wanted = step(made)
    copied = copy.deepcopy(restore_model(optimize_model(made)))
    assert all(torch.equal(t, wanted[n]) for n, t in step(copied).items())


def test_what_is_not_built_so_stays() -> None:
    config = transformers.GPT2Config(vocab_size=90, n_embd=32, n_layer=1, n_head=2)
    base = transformers.GPT2LMHeadModel(config)
    assert str(optimised(optimize_model(base))) == "fused: 4 dropouts"


def test_dropout_is_another_draw_of_the_same_kind() -> None:
    made = optimize_model(model("Llama", lora_dropout=0.4))
    assert (told := optimised(made)) is not None
    assert told.replaced == {**ALL, "dropouts": 14}
    dropping = made.get_base_model().model.layers[0].self_attn.q_proj.lora_dropout["default"]
    x = torch.ones(50, 40)
    assert dropping(x).unique().tolist() == pytest.approx([0, 1 / 0.6])
    first, second = step(made), step(made)
    assert first["loss"] != second["loss"]
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made.enable_input_require_grads()
    torch.manual_seed(1)
    first = step(made)
    made.gradient_checkpointing_disable()
    torch.manual_seed(1)
    near(step(made), first, 1e-6)
    assert torch.equal(dropping.eval()(x), x)
    restore_model(made)
    assert "forward" not in dropping.__dict__


def test_a_rotation_of_part_of_a_head_is_the_models_own() -> None:
    """Phi3 may turn the first entries of each head alone, with the function that turns all."""
    sizes = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    torch.manual_seed(0)
    base = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes))
    made: Any = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train()
    _, cos = base.model.rotary_emb(torch.zeros(1, 2, 32), torch.arange(2)[None])
    assert cos.shape[-1] == 4
    wanted = step(made)
    near(step(optimize_model(made)), wanted, 2e-5)


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_on_another_device_a_model_stays_as_it_is_and_says_why(kind: str) -> None:
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with rehearsal(kind):
        told = optimised(optimize_model(base))
    assert told is not None
    assert not told.replaced
    assert f"on {kind}" in str(told)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_without_data_it_is_fused_as_where_it_would_run(kind: str) -> None:
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).train().requires_grad_(False)
        base.model.norm.requires_grad_()
    with rehearsal(kind):
        told = optimised(optimize_model(base))
        assert told is not None
        assert told.replaced == ALL
        ids = IDS.to("meta")
        base(input_ids=ids, labels=ids).loss.backward()
    assert base.model.norm.weight.grad is not None
