# SPDX-License-Identifier: Apache-2.0
"""ShadowPEFT: a second state through whole blocks."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, LlamaConfig, LlamaForSequenceClassification

import graftlet
from graftlet.errors import (
    AdapterFileError,
    CallError,
    ConfigError,
    MergeError,
    UnsupportedLayerError,
    UnsupportedOptionError,
)
from tests.model.models import (
    IDS,
    SIZES,
    adapted,
    facts,
    gpt2,
    learning,
    llama,
    load,
    logits,
    lora,
    move,
    same,
    save,
    silent,
)
from tests.model.models import t5 as encoder_decoder

TASK = {"task_type": "CAUSAL_LM"}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {}, "narrow": {"shadow_hidden_size": 4}, "own embeddings": {"share_embeddings": False},
    "deep": {"shadow_num_hidden_layers": 2, "shadow_intermediate_size": 6, "update_hidden_size": 5},
    "some blocks": {"target_modules": ["layers.1", "layers.2"]}, "regex": {"target_modules": r".*\.[01]"},
    "random": {"init_weights": False}, "no dropout": {"shadow_dropout": 0.0}, "heads": {"shadow_num_attention_heads": 1},
}  # fmt: skip


def config(lib: Any = graftlet, **values: Any) -> Any:
    return lib.ShadowConfig(**{"r": 3, "shadow_alpha": 0.8, **TASK, **values})


def made(base: nn.Module | None = None, moved: float = 0.3, **values: Any) -> Any:
    model = adapted(llama() if base is None else base, config(**values))
    move(model, moved)
    return model


def both(base: nn.Module, moved: float = 0.3, **values: Any) -> tuple[Any, Any]:
    """The reference's model and ours, with the same tensors."""
    peft = pytest.importorskip("peft")
    mine = made(copy.deepcopy(base), moved, **values)
    theirs = adapted(base, config(peft, **values), peft)
    theirs.load_state_dict(mine.state_dict())
    return theirs, mine


def greedy(model: Any, **values: Any) -> list[list[int]]:
    with torch.no_grad(), silent():
        given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **values}
        return model.generate(input_ids=IDS, **given).tolist()


def classifier(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 1, "num_labels": 3, **changes}
    return LlamaForSequenceClassification(LlamaConfig(**sizes)).eval()


@pytest.mark.parametrize("values", SETTINGS.values(), ids=SETTINGS)
def test_gives_what_the_reference_gives_and_files_go_both_ways(values: dict[str, Any], tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    theirs, mine = both(llama(), **values)
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert learning(mine) == learning(theirs)
    expected = logits(theirs)
    torch.testing.assert_close(logits(mine), expected)
    assert not torch.allclose(expected, logits(llama()), atol=1e-3)
    save(mine, tmp_path / "mine")
    save(theirs, tmp_path / "theirs")
    for lib, place in ((peft, "mine"), (graftlet, "theirs"), (graftlet, "mine")):
        torch.testing.assert_close(logits(load(llama(), tmp_path / place, lib)), expected)


def test_gpt2_gives_what_the_reference_gives() -> None:
    theirs, mine = both(gpt2())
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    torch.testing.assert_close(logits(mine), logits(theirs))
    assert greedy(mine) == greedy(theirs, use_cache=False)


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("values", [{}, {"shadow_hidden_size": 4}], ids=["plain", "narrow"])
def test_learns_as_the_reference_does(values: dict[str, Any], weight: float) -> None:
    theirs, mine = both(llama(), auxiliary_loss_weight=weight, shadow_dropout=0.0, **values)
    labels = IDS.clone()
    labels[0, :2] = -100
    losses, gradients = [], []
    for model in (theirs, mine):
        outputs = model.train()(input_ids=IDS, labels=labels)
        outputs.loss.backward()
        losses.append((outputs.loss.detach(), outputs.shadow_loss))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("keep", [3, torch.tensor([2, 3, 4])], ids=["last", "by index"])
def test_its_own_loss_is_of_the_logits_that_are_asked_for(keep: Any) -> None:
    model, labels = made(shadow_dropout=0.0), IDS.clone()
    labels[:, :3] = -100  # so the first logit kept is of the first token that counts
    whole = model(input_ids=IDS, labels=labels).shadow_loss
    part = model(input_ids=IDS, labels=labels[:, 2:], logits_to_keep=keep).shadow_loss
    torch.testing.assert_close(part, whole)
    given = model(input_ids=IDS, labels=labels, num_items_in_batch=8).shadow_loss
    torch.testing.assert_close(given, whole * (labels[:, 1:] != -100).sum() / 8)


def test_dropout_is_drawn_as_in_the_reference() -> None:
    theirs, mine = both(llama(), shadow_dropout=0.5)
    found = []
    for model in (theirs, mine):
        torch.manual_seed(5)
        found.append(model.train()(input_ids=IDS).logits)
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("labels", [torch.tensor([2, 0]), torch.rand(2, 3)], ids=["one class", "several"])
def test_classifies_as_the_reference_does(labels: Tensor, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    theirs, mine = both(classifier(), task_type="SEQ_CLS", shadow_dropout=0.0)
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    inputs = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), "labels": labels}
    expected, found = (m.train()(**inputs) for m in (theirs, mine))
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.shadow_loss, expected.shadow_loss)
    save(mine.eval(), tmp_path)
    for lib in (peft, graftlet):
        torch.testing.assert_close(logits(load(classifier(), tmp_path, lib)), logits(mine))


def test_the_decoders_own_loss_is_for_training_alone() -> None:
    model = made(auxiliary_loss_weight=0.5)
    without = made(auxiliary_loss_weight=0.0)
    assert torch.equal(model(input_ids=IDS, labels=IDS).loss, without(input_ids=IDS, labels=IDS).loss)


@pytest.mark.parametrize("values", [{}, {"shadow_hidden_size": 4}, {"share_embeddings": False}], ids=str)
def test_generation_is_the_references_with_a_cache_and_without(values: dict[str, Any]) -> None:
    theirs, mine = both(llama(), moved=1.0, **values)
    expected = greedy(theirs, use_cache=False)  # with one it loses the second cache where that is called `cache`
    assert greedy(mine) == expected == greedy(mine, use_cache=False)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert greedy(mine, **beams) == greedy(mine, use_cache=False, **beams)


@torch.no_grad()
def test_steps_with_a_cache_are_one_call() -> None:
    model, mask = made(moved=1.0), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    whole = logits(model, input_ids=IDS, attention_mask=mask)
    first = model(input_ids=IDS[:, :3], attention_mask=mask[:, :3], use_cache=True)
    cache = copy.deepcopy(first.past_key_values)
    for held in (first.past_key_values, cache):
        again = model(input_ids=IDS[:, 3:], attention_mask=mask, past_key_values=held)
        torch.testing.assert_close(again.logits, whole[:, 3:])
    assert isinstance(cache, DynamicCache)
    cache.crop(-2)
    again = model(input_ids=IDS[:, 3:], attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(again.logits, whole[:, 3:])


def test_a_cache_without_the_second_decoders_part_is_refused() -> None:
    model = made()
    with model.disable_adapter():
        cache = model(input_ids=IDS[:, :3], use_cache=True).past_key_values
    with pytest.raises(CallError, match="comes from calls without adapter 'default'"):
        model(input_ids=IDS[:, 3:], past_key_values=cache)


def test_embeddings_do_as_ids() -> None:
    model = made()
    embeds = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(logits(model, inputs_embeds=embeds), logits(model))


@pytest.mark.parametrize("base", [llama, gpt2], ids=["llama", "gpt2"])
def test_starts_as_the_base_and_is_it_when_disabled(base: Any) -> None:
    expected = logits(base())
    assert torch.equal(logits(adapted(base(), config())), expected)
    model = made(base(), moved=1.0)
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = made(shadow_dropout=0.3).train()
        if checkpointing:
            with silent():
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
                model.prepare_model_for_gradient_checkpointing(model)
        torch.manual_seed(2)
        with silent():
            model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_only_the_active_adapter_learns_and_acts(tmp_path: Any) -> None:
    model = made()
    first = logits(model)
    model.add_adapter("other", config(r=2, shadow_hidden_size=4))
    torch.testing.assert_close(logits(model), first)
    assert all(".default." in name for name in learning(model))
    model.set_adapter("other")
    assert learning(model)
    assert all(".other." in name for name in learning(model))
    move(model, 0.5)
    other = logits(model)
    assert not torch.allclose(other, first)
    save(model, tmp_path)
    again = load(llama(), tmp_path / "other", adapter_name="mine")
    torch.testing.assert_close(logits(again), other)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), first)
    with pytest.raises(ConfigError, match="one adapter at a time"):
        model.base_model.set_adapter(["default", "other"])
    model.delete_adapter("default")
    torch.testing.assert_close(logits(model), other)
    assert not any(".default." in name for name in model.state_dict())


@pytest.mark.parametrize("values", [{}, {"shadow_hidden_size": 4}], ids=["plain", "narrow"])
def test_the_small_decoder_works_alone(values: dict[str, Any]) -> None:
    theirs, mine = both(llama(), moved=1.0, **values)
    keys = set(mine.state_dict())
    expected, alone = theirs.unload_shadow().eval(), mine.unload_shadow()
    torch.testing.assert_close(logits(alone), logits(expected))
    assert greedy(alone) == greedy(expected)
    assert set(mine.state_dict()) == keys
    apart = mine.unload_shadow(copy=True)
    move(mine, 1.0)
    torch.testing.assert_close(logits(apart), logits(expected))
    assert not torch.allclose(logits(mine.unload_shadow()), logits(apart))


def test_the_small_decoder_is_saved_as_any_model(tmp_path: Any) -> None:
    alone = made(moved=1.0).unload_shadow(copy=True)
    save(alone, tmp_path)
    torch.testing.assert_close(logits(type(alone).from_pretrained(tmp_path)), logits(alone))


def test_the_small_classifier_works_alone() -> None:
    theirs, mine = both(classifier(), task_type="SEQ_CLS", moved=0.5)
    torch.testing.assert_close(logits(mine.unload_shadow()), logits(theirs.unload_shadow().eval()))


def test_half_precision_is_kept_as_the_reference_keeps_it() -> None:
    theirs, mine = both(llama().bfloat16())
    kinds = [{n: p.dtype for n, p in m.named_parameters()} for m in (theirs, mine)]
    assert kinds[0] == kinds[1]
    torch.testing.assert_close(logits(mine), logits(theirs))


def test_what_cannot_be_done_is_said() -> None:
    model = made()
    with pytest.raises(MergeError, match="second state"):
        model.merge_adapter()
    with pytest.raises(CallError, match="cannot be mixed"):
        model(input_ids=IDS, adapter_names=["default", "__base__"])
    with pytest.raises(CallError, match="call the PeftModel"):
        model.get_base_model()(input_ids=IDS)
    with pytest.raises(ConfigError, match="use get_peft_model"):
        graftlet.inject_adapter_in_model(config(), llama())


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"r": 0}, ConfigError, "r=0"),
        ({"shadow_dropout": 1.5}, ConfigError, "shadow_dropout"),
        ({"auxiliary_loss_weight": -1.0}, ConfigError, "auxiliary_loss_weight"),
        ({"shadow_model": "x", "shadow_hidden_size": 4}, ConfigError, "shadow_hidden_size"),
        ({"target_modules": ".*", "layers_to_transform": 1}, ConfigError, "layers_to_transform"),
    ],
)
def test_configs_that_cannot_be_are_refused(values: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        config(**values)


class Diffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("base", "values", "kind"),
    [
        (encoder_decoder, {}, UnsupportedOptionError),
        (Diffusion, {"target_modules": ["0"]}, UnsupportedOptionError),
        (llama, {"target_modules": ["q_proj"]}, UnsupportedLayerError),
    ],
    ids=["encoder-decoder", "diffusion", "no block"],
)
def test_models_that_cannot_be_adapted_are_left_as_they_are(base: Any, values: dict[str, Any], kind: Any) -> None:
    model = base()
    before = facts(model)
    with pytest.raises(kind):
        graftlet.get_peft_model(model, config(**values))
    assert same(before, model)


def test_blocks_need_not_follow_each_other() -> None:
    apart, alone = made(target_modules=["layers.0", "layers.2"]), made(target_modules=["layers.0"])
    assert not torch.allclose(logits(apart), logits(alone), atol=1e-3)
    assert greedy(apart) == greedy(apart, use_cache=False)


def test_adapters_inside_the_blocks_have_the_keys_they_have_alone(tmp_path: Any) -> None:
    model = made(modules_to_save=["mlp.up_proj"])
    model.add_adapter("inside", lora())
    expected = logits(model)
    model.set_adapter("inside")
    move(model, 0.5)
    inside = logits(model)
    save(model, tmp_path)
    torch.testing.assert_close(logits(load(llama(), tmp_path / "inside")), inside)
    torch.testing.assert_close(logits(load(llama(), tmp_path)), expected)


def test_two_classifiers_have_heads_of_their_own() -> None:
    model = made(classifier(), task_type="SEQ_CLS")
    model.add_adapter("other", config(task_type="SEQ_CLS"))
    labels = torch.tensor([2, 0])
    losses = []
    for name in ("default", "other"):
        model.set_adapter(name)
        losses.append(model(input_ids=IDS, labels=labels).shadow_loss)
        assert f"base_model.shadow_head.{name}.weight" in learning(model)
    assert not torch.equal(*losses)


def test_a_file_that_does_not_fit_is_refused(tmp_path: Any) -> None:
    save(made(), tmp_path)
    base = llama(hidden_size=16)
    before = facts(base)
    with pytest.raises(AdapterFileError, match="another shape"):
        graftlet.PeftModel.from_pretrained(base, tmp_path)
    assert same(before, base)


# a decoder that was trained elsewhere


def projected(place: Any, width: int) -> None:
    """A checkpoint of a small decoder and of its states' projection."""
    from safetensors.torch import save_file

    inner = LlamaConfig(
        **{**SIZES, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_key_value_heads": 1}
    )
    torch.manual_seed(3)
    held = {f"shadow_model.{n}": t.contiguous() for n, t in AutoModel.from_config(inner).state_dict().items()}
    save_file(held | {"shadow_hidden_projection.weight": torch.randn(width, 4)}, place / "model.safetensors")
    settings = {"model_type": "causal_lm_with_hidden_projection", "shadow_model_config": inner.to_dict()}
    (place / "config.json").write_text(json.dumps(settings))


def trained(kind: str, place: Any) -> str:
    """A checkpoint of a kind, and where it is."""
    place.mkdir()
    if kind == "projected":
        projected(place, SIZES["hidden_size"])
    else:
        torch.manual_seed(3)
        save({"same": llama, "narrow": lambda: llama(hidden_size=4, head_dim=2), "gpt2": gpt2}[kind](), place)
    return str(place)


KINDS = ["same", "narrow", "gpt2", "projected"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_decoder_gives_what_it_gives_in_the_reference(kind: str, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    source = trained(kind, tmp_path / "small")
    theirs, mine = (adapted(llama(), config(lib, shadow_model=source), lib) for lib in (peft, graftlet))
    for name, tensor in mine.state_dict().items():
        if "shadow_backbone" in name or (kind == "projected" and "shadow_projection" in name):
            torch.testing.assert_close(theirs.state_dict()[name], tensor, msg=name)
    assert learning(mine) == learning(theirs)
    move(mine, 0.3)
    theirs.load_state_dict(mine.state_dict())
    torch.testing.assert_close(logits(mine), logits(theirs))
    save(mine, tmp_path / "mine")
    save(theirs, tmp_path / "theirs")
    for lib, place in ((peft, "mine"), (graftlet, "theirs"), (graftlet, "mine")):
        torch.testing.assert_close(logits(load(llama(), tmp_path / place, lib)), logits(mine))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_decoder_learns_but_for_its_embeddings_and_works_alone(kind: str, tmp_path: Any) -> None:
    theirs, mine = both(llama(), moved=1.0, shadow_model=trained(kind, tmp_path / "small"))
    table = next(
        n for n in mine.state_dict() if "shadow_backbone" in n and n.endswith(("embed_tokens.weight", "wte.weight"))
    )
    assert table not in learning(mine)
    assert greedy(mine) == greedy(theirs, use_cache=False) == greedy(mine, use_cache=False)
    expected, alone = theirs.unload_shadow().eval(), mine.unload_shadow()
    torch.testing.assert_close(logits(alone), logits(expected))
    assert greedy(alone) == greedy(expected)
    mine.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in mine.named_parameters() if "shadow_backbone" in n and n in learning(mine))


def test_a_trained_decoder_of_another_family_classifies_alone(tmp_path: Any) -> None:
    source = trained("gpt2", tmp_path / "small")
    theirs, mine = both(classifier(), task_type="SEQ_CLS", moved=0.5, shadow_model=source)
    torch.testing.assert_close(logits(mine.unload_shadow()), logits(theirs.unload_shadow().eval()))


@pytest.mark.parametrize("kind", KINDS)
def test_loading_reads_a_trained_decoders_config_alone(kind: str, tmp_path: Any) -> None:
    small = tmp_path / "small"
    model = made(shadow_model=trained(kind, small))
    save(model, tmp_path / "adapter")
    (small / "model.safetensors").unlink()
    torch.testing.assert_close(logits(load(llama(), tmp_path / "adapter")), logits(model))
    (small / "config.json").unlink()
    base = llama()
    before = facts(base)
    with pytest.raises(ConfigError, match="gives no decoder"):
        graftlet.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert same(before, base)


def test_a_trained_decoder_that_does_not_fit_is_refused(tmp_path: Any) -> None:
    projected(tmp_path, 2 * SIZES["hidden_size"])
    base = llama()
    before = facts(base)
    for source, message in ((tmp_path, "shadow_hidden_projection"), (tmp_path / "none", "no such folder")):
        with pytest.raises(ConfigError, match=message):
            graftlet.get_peft_model(base, config(shadow_model=str(source)))
    assert same(before, base)


@pytest.mark.parametrize("sizes", [{"shadow_hidden_size": 10**6}, {"shadow_num_hidden_layers": 10**9}], ids=str)
def test_a_file_that_asks_for_a_huge_decoder_is_refused_before_it_is_made(sizes: dict[str, int], tmp_path: Any) -> None:
    save(made(), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **sizes}))
    base = llama()
    before = facts(base)
    with silent(), pytest.raises(ConfigError, match="limits"):
        graftlet.PeftModel.from_pretrained(base, tmp_path)
    assert same(before, base)
