# SPDX-License-Identifier: Apache-2.0
"""How LoRA starts: the reference's numbers from the same seed or data, and what was saved as plain LoRA."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import graftlet
import graftlet.tuners.lora as lora
from graftlet.errors import AdapterFileError, ConfigError, ConversionWarning
from graftlet.methods.init.loftq import levels, loftq_init, quantised
from graftlet.testing.benches import BENCHES, perturb, seeded
from graftlet.utils import replace_lora_weights_loftq
from graftlet.weights import storage
from tests.model.models import IDS, llama

from .reference import peft

TARGETS = ["q_proj", "down_proj"]
BATCHES = [{"input_ids": torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(i))} for i in range(6)]
LEARN = [{**b, "labels": b["input_ids"]} for b in BATCHES]


def states(theirs: nn.Module, ours: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    first, second = theirs.state_dict(), ours.state_dict()
    assert first.keys() == second.keys()
    return [(k, first[k], second[k]) for k in first]


def same_product(theirs: nn.Module, ours: nn.Module) -> None:
    """The same base weights and products, whatever the signs of directions."""
    first, second = theirs.state_dict(), ours.state_dict()
    for key in first:
        if ".lora_A." in key:
            other = key.replace(".lora_A.", ".lora_B.")
            torch.testing.assert_close(second[other] @ second[key], first[other] @ first[key], atol=2e-5, rtol=1e-3)
        elif ".lora_B." not in key:
            torch.testing.assert_close(second[key], first[key], atol=2e-5, rtol=1e-3, msg=key)


# from the weight and from the seed


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora", "mica"])
def test_starts_from_the_weight_are_the_references(start: str, rslora: bool) -> None:
    models = []
    for library in (peft, graftlet):
        config = library.LoraConfig(
            r=2, lora_alpha=6, use_rslora=rslora, target_modules=TARGETS, init_lora_weights=start
        )
        models.append(library.get_peft_model(copy.deepcopy(llama()), config))
    same_product(*models)
    torch.testing.assert_close(models[1](IDS).logits, models[0](IDS).logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(models[1](IDS).logits, llama()(IDS).logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("bench", ["linear", "conv1d"])
@pytest.mark.parametrize(("start", "drawn"), [("orthogonal", "orthogonal_init"), ("pissa_niter_4", "pissa_init")])
def test_starts_from_the_same_seed_are_the_references(
    start: str, drawn: str, bench: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (start, bench) == ("orthogonal", "conv1d"):
        pytest.skip("the reference has no features_in there")
    layer = importlib.import_module("peft.tuners.lora.layer").LoraLayer
    real = getattr(layer, drawn)

    def seeded_start(self: Any, *args: Any) -> None:
        torch.manual_seed(5)  # the reference has drawn other numbers before
        real(self, *args)

    monkeypatch.setattr(layer, drawn, seeded_start)
    models = []
    for library in (peft, graftlet):
        config = library.LoraConfig(r=4, lora_alpha=6, target_modules=["l"], init_lora_weights=start)
        with seeded(5):
            models.append(library.get_peft_model(BENCHES[bench].model(), config))
    if start == "orthogonal":
        for key, first, second in states(*models):
            torch.testing.assert_close(second, first, msg=key)
    same_product(*models)


# EVA


@pytest.mark.parametrize("options", [{}, {"rho": 1.0}, {"whiten": True}, {"adjust_scaling_factors": False}])
def test_eva_finds_the_references_directions(options: dict[str, Any]) -> None:
    models = []
    for library, tuner in ((peft, peft), (graftlet, lora)):
        config = library.LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=TARGETS,
            init_lora_weights="eva",
            eva_config=tuner.EvaConfig(**options),
            task_type="CAUSAL_LM",
        )
        model = library.get_peft_model(copy.deepcopy(llama()), config)
        tuner.initialize_lora_eva_weights(model, LEARN[:1] * 6, show_progress_bar=False)
        models.append(model)
    theirs, ours = models
    ranks = [{k: len(t) for k, t in m.state_dict().items() if "lora_A" in k} for m in models]
    assert ranks[0] == ranks[1]
    for key, first, second in states(theirs, ours):
        if "lora_A" in key:
            span, other = (torch.linalg.qr(t.T)[0] for t in (first, second))
            torch.testing.assert_close(other @ other.T, span @ span.T, atol=2e-2, rtol=0, msg=key)
            torch.testing.assert_close(second.norm(dim=1), first.norm(dim=1), atol=1e-2, rtol=5e-2)
    for path in {k.rpartition(".lora_A")[0] for k in ranks[0]}:
        assert ours.get_submodule(path).scaling == pytest.approx(theirs.get_submodule(path).scaling)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def eva_config(**values: Any) -> Any:
    return graftlet.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="eva", **values)


def test_eva_takes_any_data_shows_it_and_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = llama()
    first = lora.get_eva_state_dict(model, LEARN, eva_config())
    assert "layers settled" in capsys.readouterr().err
    again = lora.get_eva_state_dict(model, iter(LEARN * 9), eva_config(), show_progress_bar=False)
    assert capsys.readouterr().err == ""
    assert first.keys() == again.keys()
    by_function = lora.get_eva_state_dict(model, lambda: [model(**b) for b in LEARN], eva_config())
    assert by_function.keys() == first.keys()

    cache = tmp_path / "eva.pt"
    cached = lora.get_eva_state_dict(model, LEARN, eva_config(), cache_file=cache)
    for key, tensor in first.items():
        torch.testing.assert_close(cached[key], tensor)
    unseen = iter([{"no_such_argument": torch.zeros(1)}])
    restored = lora.get_eva_state_dict(model, unseen, eva_config(), cache_file=cache)
    for key, tensor in first.items():
        torch.testing.assert_close(restored[key], tensor)


def test_eva_ends_though_a_direction_turns_for_ever() -> None:
    class Counted(list):
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return super().__iter__()

    data = Counted(LEARN)
    never = eva_config(eva_config=lora.EvaConfig(tau=1.0))
    assert lora.get_eva_state_dict(llama(), data, never, show_progress_bar=False)
    assert data.passes == 4


def test_evas_ranks_come_before_the_patterns_that_were_given() -> None:
    model = graftlet.get_peft_model(llama(), eva_config(rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 5}))
    found = lora.get_eva_state_dict(model, LEARN, show_progress_bar=False)
    lora.initialize_lora_eva_weights(model, eva_state_dict=found)
    again = graftlet.get_peft_model(llama(), copy.deepcopy(model.peft_config["default"]))
    ranks = [{k: len(t) for k, t in m.state_dict().items() if "lora_A" in k} for m in (model, again)]
    assert ranks[0] == ranks[1]
    assert len(set(ranks[0].values())) > 1


# LoRA-GA, CorDA


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_loraga_starts_as_the_reference(direction: str, scale: str) -> None:
    models = []
    for library, tuner in ((peft, peft), (graftlet, lora)):
        base = copy.deepcopy(llama())
        options = tuner.LoraGAConfig(direction=direction, scale=scale)
        config = library.LoraConfig(
            r=2, lora_alpha=3, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=options
        )

        def step(base: Any = base) -> None:
            for batch in LEARN:
                base(**batch).loss.backward()

        with seeded(5):
            tuner.preprocess_loraga(base, config, step)
            models.append(library.get_peft_model(base, config))
    for key, first, second in states(*models):
        if ".lora_A." in key or ".lora_B." in key:  # directions have no sign
            torch.testing.assert_close(second.abs(), first.abs(), atol=2e-4, rtol=1e-2, msg=key)
    torch.testing.assert_close(models[1](IDS).logits, llama()(IDS).logits, atol=1e-4, rtol=1e-3)
    assert not any(p.grad is not None for p in models[1].parameters())


def test_loraga_keeps_its_gradients(tmp_path: Path) -> None:
    config = graftlet.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="lora_ga")
    made = []
    for step in (lambda base: [base(**b).loss.backward() for b in LEARN], lambda base: pytest.fail("ran again")):
        base = llama()
        with seeded(1):
            lora.preprocess_loraga(base, config, lambda base=base, step=step: step(base), str(tmp_path / "g.pt"))
            made.append(graftlet.get_peft_model(base, copy.deepcopy(config)))
    for key, first, second in states(*made):
        torch.testing.assert_close(second, first, msg=key)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_starts_as_the_reference(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("attr")
    corda = importlib.import_module("peft.tuners.lora.corda")
    configs = importlib.import_module("peft.tuners.lora.config")
    models = []
    for library, tool, kind in ((peft, corda, configs), (graftlet, lora, lora)):
        base = copy.deepcopy(llama())
        options = kind.CordaConfig(corda_method=mode, cache_file=str(tmp_path / f"{library.__name__}.pt"))
        config = library.LoraConfig(
            r=2, lora_alpha=3, target_modules=TARGETS, init_lora_weights="corda", corda_config=options
        )

        def run(base: Any = base) -> None:
            with torch.no_grad():
                for batch in BATCHES:
                    base(batch["input_ids"][:1])  # the reference takes one row at a time

        tool.preprocess_corda(base, config, run)
        models.append(library.get_peft_model(base, config))
    same_product(*models)
    torch.testing.assert_close(models[1](IDS).logits, llama()(IDS).logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_a_start_from_data_without_data_is_refused(start: str) -> None:
    with pytest.raises(ConfigError, match="starts from data"):
        graftlet.get_peft_model(llama(), graftlet.LoraConfig(target_modules=TARGETS, init_lora_weights=start, r=2))


# LoftQ

BNB_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""The published table of NF4 (QLoRA, appendix E)."""


def test_normal_floats_are_the_published_ones() -> None:
    torch.testing.assert_close(levels(4), torch.tensor(BNB_NF4, dtype=torch.float64), atol=1e-6, rtol=0)
    assert levels(2).tolist() == pytest.approx([-1.0, 0.0, float(levels(2)[2]), 1.0])
    assert len(levels(2)) == 4


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_quantised_weight_has_few_values_and_is_near(bits: int) -> None:
    with seeded(0):
        W = torch.randn(24, 50)
    Q = quantised(W, bits)
    rows = torch.nn.functional.pad(Q.flatten(), (0, 16)).view(-1, 64) if bits < 8 else Q
    assert max(len(row.unique()) for row in rows) <= 2**bits
    torch.testing.assert_close(quantised(Q, bits), Q, atol=1e-5, rtol=1e-5)
    assert (W - Q).norm() / W.norm() < {2: 0.6, 4: 0.12, 8: 0.01}[bits]
    assert quantised(torch.zeros(3, 70), bits).eq(0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_loftq_comes_nearer_round_by_round(bits: int) -> None:
    with seeded(0):
        W = torch.randn(64, 48) @ torch.randn(48, 48)
    errors = []
    for rounds in (1, 2, 5):
        Q, A, B = loftq_init(W, bits, 8, rounds)
        assert A.shape == (8, 48)
        assert B.shape == (64, 8)
        errors.append(float((W - Q - B @ A).norm()))
    plain = float((W - quantised(W, bits)).norm())
    assert errors[0] < plain
    assert errors[2] <= errors[0] * 1.001


@pytest.mark.parametrize("alpha", [2, 8])
def test_a_model_starts_and_loads_with_loftq(alpha: int, tmp_path: Path) -> None:
    options = lora.LoftQConfig(loftq_bits=2, loftq_iter=3)
    config = graftlet.LoraConfig(
        r=2, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights="loftq", loftq_config=options
    )
    model = graftlet.get_peft_model(llama(), config)
    layer, whole = model.base_model.model.model.layers[0].self_attn.q_proj, llama().model.layers[0].self_attn.q_proj
    Q, A, B = loftq_init(whole.weight, 2, 2, 3)
    torch.testing.assert_close(layer.base_layer.weight, Q)
    torch.testing.assert_close(layer.change("default")[0], B @ A, atol=1e-5, rtol=1e-4)
    perturb(model)
    model.save_pretrained(tmp_path)
    again = graftlet.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


class Coarse(nn.Linear):
    """A layer kept in four bits."""


class CoarseStorage(storage.Storage):
    can_write = exact = False

    def read(self, module: nn.Module, name: str) -> Tensor:
        return quantised(getattr(module, name), 2)


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(storage.BACKENDS, f"{Coarse.__module__}.{Coarse.__qualname__}", f"{__name__}:COARSE")
    model = llama()
    for block in model.model.layers:
        old = block.self_attn.q_proj
        block.self_attn.q_proj = Coarse(old.in_features, old.out_features, bias=False)
        block.self_attn.q_proj.load_state_dict({"weight": quantised(old.weight.detach(), 2)})
    config = graftlet.LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM")
    return graftlet.get_peft_model(model, config)


COARSE = CoarseStorage()


@pytest.mark.parametrize("kind", ["file", "folder", "sharded", "without prefix"])
def test_a_quantised_model_gets_back_what_it_lost(coarse: Any, kind: str, tmp_path: Path) -> None:
    whole = llama()
    if kind == "without prefix":
        save_file({k.removeprefix("model."): t for k, t in whole.state_dict().items()}, tmp_path / "model.safetensors")
    else:
        whole.save_pretrained(tmp_path, max_shard_size="2KB" if kind == "sharded" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (kind == "sharded")
    replace_lora_weights_loftq(coarse, tmp_path / "model.safetensors" if kind == "file" else tmp_path)
    for block, theirs in zip(coarse.base_model.model.model.layers, whole.model.layers, strict=True):
        layer = block.self_attn.q_proj
        lost = theirs.self_attn.q_proj.weight - layer.site.read()[0]
        rest = torch.linalg.svdvals(lost)[2:].square().sum().sqrt()
        torch.testing.assert_close((lost - layer.change("default")[0]).norm(), rest, atol=1e-5, rtol=1e-3)
        assert not block.mlp.down_proj.lora_B["default"].weight.any()


def test_layers_can_be_kept_out_of_loftq(coarse: Any, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    asked: list[str] = []
    replace_lora_weights_loftq(coarse, tmp_path, callback=lambda model, name: bool(asked.append(name)))
    assert asked == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert not any(p.any() for n, p in coarse.named_parameters() if "lora_B" in n)
    with pytest.raises(AdapterFileError):
        replace_lora_weights_loftq(coarse, tmp_path / "none")
    plain = graftlet.get_peft_model(llama(), graftlet.LoraConfig(target_modules=TARGETS))
    with pytest.raises(ConfigError, match="init_lora_weights='loftq'"):
        replace_lora_weights_loftq(plain, tmp_path)


# saved as plain LoRA


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora", "lora_ga"])
def test_it_is_saved_as_plain_lora(start: str, rslora: bool, tmp_path: Path) -> None:
    config = graftlet.LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=rslora,
        target_modules=[*TARGETS, "embed_tokens"] if start == "pissa" else TARGETS,
        rank_pattern={"down_proj": 4} if start != "pissa" else {},
        alpha_pattern={"q_proj": 5},
        init_lora_weights=start,
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    base = llama(tie_word_embeddings=False)
    if start == "lora_ga":
        lora.preprocess_loraga(base, config, lambda: [base(**b).loss.backward() for b in LEARN])
    model = graftlet.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "initial")
    perturb(model, by=0.05)
    y = model(IDS).logits
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    for library in (graftlet, peft):
        again = library.PeftModel.from_pretrained(llama(tie_word_embeddings=False), str(tmp_path / "plain")).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, y, atol=1e-4, rtol=1e-3)
        assert again.peft_config["default"].init_lora_weights is True
        assert again.peft_config["default"].r == 4
    assert model.peft_config["default"].r == 2


def test_it_is_the_references_conversion(tmp_path: Path) -> None:
    models = []
    for library in (peft, graftlet):
        config = library.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="pissa", task_type="CAUSAL_LM")
        model = library.get_peft_model(copy.deepcopy(llama()), config)
        folder = tmp_path / library.__name__
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(str(folder / "initial"))
        model.peft_config["default"].init_lora_weights = "pissa"
        models.append((model, folder))
    (theirs, there), (ours, here) = models
    perturb(ours, by=0.05)
    theirs.load_state_dict(ours.state_dict())
    for model, folder in models:
        model.save_pretrained(str(folder / "plain"), path_initial_model_for_weight_conversion=str(folder / "initial"))
    first, second = (graftlet.load_peft_weights(f / "plain") for f in (there, here))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, atol=1e-5, rtol=1e-4)


def test_an_initial_adapter_that_is_none_is_refused(tmp_path: Path) -> None:
    made = {}
    for name, targets in (("a", ["q_proj"]), ("b", ["v_proj"])):
        config = graftlet.LoraConfig(r=2, target_modules=targets, init_lora_weights="pissa")
        made[name] = graftlet.get_peft_model(llama(), config)
        made[name].save_pretrained(tmp_path / name)
    with pytest.raises(AdapterFileError, match="before its training"):
        made["a"].save_pretrained(tmp_path / "c", path_initial_model_for_weight_conversion=str(tmp_path / "b"))
    with pytest.raises(AdapterFileError):
        made["a"].save_pretrained(tmp_path / "c", path_initial_model_for_weight_conversion=str(tmp_path / "none"))
    other = graftlet.get_peft_model(BENCHES["linear"].model(), graftlet.HRAConfig(r=2, target_modules=["l"]))
    with pytest.raises(ConfigError, match="LoRA's own starts"):
        other.save_pretrained(tmp_path / "c", path_initial_model_for_weight_conversion=str(tmp_path / "a"))
    gauss = graftlet.get_peft_model(
        llama(), graftlet.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian")
    )
    with pytest.warns(ConversionWarning):
        gauss.save_pretrained(tmp_path / "c", path_initial_model_for_weight_conversion=str(tmp_path / "a"))
