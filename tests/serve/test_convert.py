# SPDX-License-Identifier: Apache-2.0
"""Any adapter as LoRA: the same model at full rank, the best of all at a lower one, and the reference's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from graftlet import LoraConfig, PeftModel, get_peft_model
from graftlet.core import svd
from graftlet.core.svd import leading, share
from graftlet.errors import ConfigError, ConversionError, ConversionWarning
from graftlet.serve.convert import convert_to_lora, converted, save_as_lora
from graftlet.testing.benches import BENCHES, layers, near, perturb, seeded
from graftlet.testing.running import adapted, run
from tests.laws.cases import REBASED, Case, cases
from tests.model.models import IDS, llama

pytestmark = [
    pytest.mark.filterwarnings("ignore::graftlet.errors.StartWarning"),
    pytest.mark.filterwarnings("ignore::graftlet.errors.ConversionWarning"),
]


def convertible(case: Case) -> bool:
    return not case.replaces and case.merges and case.key not in REBASED


def rows() -> list[Any]:
    quick = [c for c in cases() if convertible(c) and c.bench.common]
    return [
        pytest.param(c, id=str(c), marks=() if c.first or c.bench.name == "linear" else pytest.mark.slow) for c in quick
    ]


@pytest.mark.parametrize("case", rows())
def test_at_full_rank_it_is_the_same_adapter(case: Case, tmp_path: Path) -> None:
    model = adapted(case)
    y = run(model, case)
    found = layers(model).values()
    if any(h.change("default")[1] is not None for h in found) and not all(biasable(h) for h in found):
        with pytest.raises(ConfigError, match="changes biases"):
            save_as_lora(tmp_path, model, 1.0)
        return
    save_as_lora(tmp_path, model, 1.0)
    again = PeftModel.from_pretrained(case.bench.model(), tmp_path).eval()
    assert str(again.peft_config["default"].peft_type) == "LORA"
    near(run(again, case), y, torch.float32, steps=64)
    if case.bench.name != "grouped":  # rounding leaves something across the groups
        again.merge_adapter()
        near(run(again, case), y, torch.float32, steps=64)


def biasable(layer: Any) -> bool:
    return layer.site.has_bias and not layer.site.opaque


@pytest.mark.parametrize("bench", ["linear", "conv1d", "conv2", "embedding", "experts"])
@pytest.mark.parametrize("rank", [2, 0.7])
def test_at_a_lower_rank_it_is_the_nearest_one(bench: str, rank: float) -> None:
    case = next(c for c in cases() if c.entry.name == "LOHA" and c.bench.name == bench)
    model = adapted(case)
    made = converted(model, rank)
    for path, layer in layers(model).items():
        fit = made.layers[layer.keys["default"]]
        dW = layer.change("default")[0]
        flat = dW if layer.site.stack else dW.flatten(1)[None]
        S = torch.linalg.svdvals(flat.double()).square()
        best = (S[:, fit.rank :].sum() / S.sum()).sqrt()
        assert fit.error == pytest.approx(float(best), abs=1e-4)
        held = S.cumsum(1) / S.sum(1, keepdim=True)
        if isinstance(rank, float):
            assert held[:, fit.rank - 1].min() >= rank
            assert fit.rank == 1 or held[:, fit.rank - 2].min() < rank
        else:
            assert fit.rank == rank
        assert any(key.startswith(f"{path}.lora_") for key in made.tensors)


def test_what_stands_beside_the_layers_comes_along(tmp_path: Path) -> None:
    from graftlet import OFTConfig

    config = OFTConfig(
        oft_block_size=4, target_modules=["q_proj"], modules_to_save=["lm_head"], bias="all", task_type="CAUSAL_LM"
    )
    model = get_peft_model(llama(attention_bias=True), config)
    perturb(model)
    y = model(IDS).logits
    save_as_lora(tmp_path, model, 8)
    again = PeftModel.from_pretrained(llama(attention_bias=True), tmp_path)
    torch.testing.assert_close(again(IDS).logits, y, atol=1e-4, rtol=1e-4)
    assert type(again).__name__ == "PeftModelForCausalLM"


def test_ranks_of_their_own_stand_in_the_patterns(tmp_path: Path) -> None:
    from graftlet import LoKrConfig

    model = get_peft_model(llama(), LoKrConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    perturb(model)
    y = model(IDS).logits
    config, tensors = convert_to_lora(model, 0.9)
    ranks = {
        k.rpartition(".lora_A")[0].removeprefix("base_model.model."): len(t) for k, t in tensors.items() if "_A" in k
    }
    assert len(set(ranks.values())) > 1
    again = get_peft_model(llama(), config)
    assert {h.keys["default"]: h.r["default"] for h in layers(again).values()} == ranks
    assert all(h.scaling["default"] == 1 for h in layers(again).values())
    fits = converted(model, 0.9).layers.values()
    assert all(0 < f.error <= (1 - 0.9) ** 0.5 + 1e-5 for f in fits)
    assert (y - llama()(IDS).logits).abs().max() > 0.01


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, -0.5, True, "4"])
def test_a_rank_that_is_none_is_refused(rank: Any) -> None:
    model = get_peft_model(BENCHES["linear"].model(), LoraConfig(r=2, target_modules=["l"]))
    with pytest.raises(ConfigError, match="allowed: a positive int"):
        convert_to_lora(model, rank)


def test_what_has_no_lora_is_refused() -> None:
    from graftlet import LilyConfig, LNTuningConfig

    model = get_peft_model(BENCHES["linear"].model(), LilyConfig(r=2, target_modules=["l"]))
    with pytest.raises(TypeError, match="depends on the input"):
        convert_to_lora(model, 2)
    model = get_peft_model(BENCHES["linear"].model(), LNTuningConfig(target_modules=["rest"]))
    with pytest.raises(ConversionError, match="replaces"):
        convert_to_lora(model, 2)
    model = get_peft_model(BENCHES["linear"].model(), LoraConfig(r=2, target_modules=["l"], init_lora_weights="pissa"))
    with pytest.raises(ConversionError, match="path_initial_model"):
        convert_to_lora(model, 2)
    model = get_peft_model(BENCHES["linear"].model(), LoraConfig(r=2, target_modules=["l"]))
    with pytest.raises(ConfigError, match="at most 8"):
        convert_to_lora(model, 9)
    with pytest.warns(ConversionWarning, match="already"):
        convert_to_lora(model, 2)


# the decomposition


def decaying(rows: int, columns: int, power: float) -> torch.Tensor:
    with seeded(0):
        U, _ = torch.linalg.qr(torch.randn(rows, 600))
        V, _ = torch.linalg.qr(torch.randn(columns, 600))
    return U * torch.arange(1, 601) ** -power @ V.T


@pytest.mark.parametrize("power", [0.3, 1.0, 3.0])
def test_the_projection_is_as_good_as_the_exact_way(power: float) -> None:
    M = decaying(700, 640, power)
    exact = torch.linalg.svdvals(M)
    for rank in (4, 40):
        U, S, Vh = leading(M, rank)
        assert S.shape == (rank,)
        lost, least = (M - U * S @ Vh).square().sum(), exact[rank:].square().sum()
        assert lost - least <= 4e-6 * exact.square().sum()
    whole = exact.square().sum()
    for energy in (0.5, 0.9):
        U, S, Vh = share(M, energy)
        held = exact.square().cumsum(0) / whole
        assert abs(len(S) - (int((held < energy).sum()) + 1)) <= 1
        assert (M - U * S @ Vh).square().sum() <= (1 - energy + 1e-5) * whole


def test_large_matrices_of_low_rank_are_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "_exact", lambda *_: pytest.fail("went the exact way"))
    with seeded(0):
        M = torch.randn(900, 6) @ torch.randn(6, 800)
    U, S, Vh = leading(M, 6)
    near(U * S @ Vh, M, torch.float32, steps=64)
    assert len(share(M, 0.9999)[1]) == 6


def test_a_flat_spectrum_is_decomposed_exactly() -> None:
    with seeded(0):
        M, _ = torch.linalg.qr(torch.randn(600, 600))
    U, S, Vh = leading(M, 32)
    assert (M - U * S @ Vh).square().sum() == pytest.approx(600 - 32, rel=1e-4)


# the reference


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "MissConfig"])
@pytest.mark.parametrize("rank", [3, 0.8])
def test_numbers_are_the_references(kind: str, rank: float, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import graftlet

    bench = BENCHES["linear"]
    if kind == "MissConfig" and isinstance(rank, int):
        pytest.skip("the reference keeps MiSS's own rank, whatever is asked for")
    theirs = peft.get_peft_model(bench.model(), getattr(peft, kind)(target_modules=["l"], r=4)).eval()
    ours = get_peft_model(bench.model(), getattr(graftlet, kind)(target_modules=["l"], r=4)).eval()
    perturb(ours)
    theirs.load_state_dict(ours.state_dict())
    _, tensors = convert_to_lora(ours, rank)
    _, their_tensors = peft.convert_to_lora(theirs, rank)
    if kind != "MissConfig":
        assert {k: t.shape for k, t in tensors.items()} == {k: t.shape for k, t in their_tensors.items()}
        product, their_product = (
            t["base_model.model.l.lora_B.weight"] @ t["base_model.model.l.lora_A.weight"]
            for t in (tensors, their_tensors)
        )
        torch.testing.assert_close(product, their_product, atol=1e-5, rtol=1e-4)
    save_as_lora(tmp_path, ours, rank)
    read = peft.PeftModel.from_pretrained(bench.model(), str(tmp_path)).eval()
    mine = PeftModel.from_pretrained(bench.model(), tmp_path).eval()
    x = bench.example()
    torch.testing.assert_close(read(*x), mine(*x))
