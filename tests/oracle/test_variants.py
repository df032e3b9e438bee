# SPDX-License-Identifier: Apache-2.0
"""LoRA's variants in training, against the reference: gradients, what they add to the loss, how they start."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftlet
from graftlet.errors import ConfigError
from graftlet.methods.variants import monteclora
from graftlet.methods.variants.monteclora import dirichlet_divergence, gaussian_divergence
from graftlet.testing.benches import BENCHES, layers, perturb, seeded
from tests.model.models import IDS, llama

from .reference import peft

BENCH = BENCHES["linear"]
X = BENCH.example()


def pair(name: str, **values: Any) -> tuple[Any, Any]:
    """The layer with a variant of LoRA by the reference and by Graftlet, with the same tensors, in training."""
    models = []
    for library in (peft, graftlet):
        tuner = importable(library)
        options = {k: getattr(tuner, name)(**v) if isinstance(v, dict) else v for k, v in values.items()}
        config = library.LoraConfig(r=4, lora_alpha=6, target_modules=["l"], **options)
        models.append(library.get_peft_model(BENCH.model(), config))
    theirs, ours = models
    perturb(ours)
    theirs.load_state_dict(ours.state_dict())
    return theirs.train(), ours.train()


def importable(library: Any) -> Any:
    if library is peft:
        return peft
    import graftlet.tuners.lora

    return graftlet.tuners.lora


def grads(model: nn.Module, x: Tensor, times: int = 1) -> dict[str, Tensor]:
    model.zero_grad()
    torch.stack([model(x * (i + 1)).square().sum() for i in range(times)]).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# VeLoRA


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kind", ["batch_average", "batch_average_once", "random"])
@pytest.mark.parametrize("groups", [1, 2, 3, 8, 64])
def test_veloras_gradients_are_the_references(groups: int, kind: str, times: int) -> None:
    theirs, ours = pair("VeloraConfig", velora_config={"num_groups": groups, "init_type": kind, "scale": 1.3})
    first, second = grads(theirs, *X, times), grads(ours, *X, times)
    assert first.keys() == second.keys()
    for name, grad in first.items():
        torch.testing.assert_close(second[name], grad, atol=1e-4, rtol=1e-4)
    key = "base_model.model.l.lora_velora_embed.default"
    torch.testing.assert_close(ours.state_dict()[key], theirs.state_dict()[key])
    plain = graftlet.get_peft_model(BENCH.model(), graftlet.LoraConfig(r=4, lora_alpha=6, target_modules=["l"]))
    plain.load_state_dict(ours.state_dict(), strict=False)
    exact = grads(plain, *X, times)
    name = "base_model.model.l.lora_B.default.weight"
    torch.testing.assert_close(second[name], exact[name])
    torch.testing.assert_close(ours(*X), plain(*X))


def test_velora_keeps_one_number_a_group() -> None:
    _, ours = pair("VeloraConfig", velora_config={"num_groups": 2})
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        ours(*X)
    rows = X[0].flatten(0, 1).shape[0]
    assert (rows, 2) in kept
    assert not [s for s in kept if s[-1] == X[0].shape[-1] and len(s) > 1 and s[0] != 12 and s[0] != 4]


def test_velora_is_exact_with_a_feature_a_group() -> None:
    """A group of one feature holds it whole: v is 1 or -1."""
    _, ours = pair("VeloraConfig", velora_config={"num_groups": 8})
    plain = graftlet.get_peft_model(BENCH.model(), graftlet.LoraConfig(r=4, lora_alpha=6, target_modules=["l"])).train()
    plain.load_state_dict(ours.state_dict(), strict=False)
    exact = grads(plain, *X)
    for name, grad in grads(ours, *X).items():
        torch.testing.assert_close(grad, exact[name], atol=1e-5, rtol=1e-4)


# KaSA


def test_kasas_penalty_and_gradients_are_the_references() -> None:
    theirs, ours = pair("KasaConfig", kasa_config={"beta": 0.3, "gamma": 0.7})
    (penalty,) = ours.base_model.penalties()
    expected = theirs.base_model._get_kasa_loss()
    torch.testing.assert_close(penalty, expected)
    penalty.backward()
    expected.backward()
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad)
    first, second = grads(theirs, *X), grads(ours, *X)
    for name, grad in first.items():
        torch.testing.assert_close(second[name], grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["kasa", "monteclora"])
def test_a_penalty_is_in_the_models_own_loss_in_training_alone(variant: str) -> None:
    import graftlet.tuners.lora as lora

    options = {
        "kasa": {"kasa_config": lora.KasaConfig(beta=0.5, gamma=0.5)},
        "monteclora": {"monteclora_config": lora.MontecloraConfig(kl_loss_weight=0.1, use_entropy=True)},
    }[variant]
    config = graftlet.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    config.trainable_token_indices = [1, 2]
    model = graftlet.get_peft_model(llama(), config).train()
    with seeded(1):
        loss = model(IDS, labels=IDS).loss
    with seeded(1):
        model.base_model.penalised = []
        bare = model(IDS, labels=IDS).loss
        model.base_model.penalised = ["default"]
        (penalty,) = model.base_model.penalties()
    assert penalty > 0.01
    torch.testing.assert_close(loss, bare + penalty)
    plain = nn.functional.cross_entropy(model.eval()(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(model(IDS, labels=IDS).loss, plain)


def test_kasa_stands_with_kasa_alone() -> None:
    import graftlet.tuners.lora as lora

    kasa = graftlet.LoraConfig(r=2, target_modules=["l"], kasa_config=lora.KasaConfig())
    others = [graftlet.LoraConfig(r=2, target_modules=["l"]), graftlet.HRAConfig(r=2, target_modules=["l"])]
    for other in others:
        for first, second in ((kasa, other), (other, kasa)):
            model = graftlet.get_peft_model(BENCH.model(), copy.deepcopy(first))
            with pytest.raises(ConfigError, match="cannot stand on one model"):
                model.add_adapter("second", copy.deepcopy(second))
            assert list(model.peft_config) == ["default"]
    model = graftlet.get_peft_model(BENCH.model(), copy.deepcopy(kasa))
    before = model.base_model.model.l.base_layer.weight.clone()
    model.add_adapter("second", copy.deepcopy(kasa))
    torch.testing.assert_close(model.base_model.model.l.base_layer.weight, before, atol=1e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match="r < 8"):
        graftlet.get_peft_model(
            BENCH.model(), graftlet.LoraConfig(r=8, target_modules=["l"], kasa_config=lora.KasaConfig())
        )


# MonteCLoRA


def test_monteclora_samples_as_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "num_samples": 5,
        "sample_scaler": 0.3,
        "use_entropy": True,
        "kl_loss_weight": 0.2,
        "dirichlet_prior": 0.4,
    }
    theirs, ours = pair("MontecloraConfig", monteclora_config=values)
    sampler = theirs.base_model.model.l.lora_monteclora_sampler["default"]
    drawn = sampler.sampler.buffer[0]
    chi = drawn["z_wishart"].diag()
    real = monteclora.variances, monteclora.weights
    monkeypatch.setattr(monteclora, "variances", lambda p: real[0](p, chi))
    monkeypatch.setattr(monteclora, "weights", lambda p: real[1](p, drawn["z_dirichlet"]))
    normal = drawn["z_mvn"].transpose(1, 2)
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: normal.reshape(shape))
    first, second = grads(theirs, *X), grads(ours, *X)
    assert first.keys() == second.keys()
    for name, grad in first.items():
        torch.testing.assert_close(second[name], grad, atol=1e-3, rtol=1e-3)
    (layer,) = layers(ours).values()
    p = layer.view("default")
    torch.testing.assert_close(monteclora.variances(p), sampler.gaussian_var_prior.diag())
    torch.testing.assert_close(monteclora.weights(p), sampler.expert_weights)
    kl, entropy = sampler.get_variational_loss()
    u = sampler.expert_weights_prior.exp()
    wrong = 0.2 * 2 * (u.lgamma() - torch.tensor(0.4).lgamma()).sum()  # the reference adds what has to be subtracted
    (penalty,) = ours.base_model.penalties()
    torch.testing.assert_close(penalty, kl + entropy - wrong, atol=1e-4, rtol=1e-4)


def test_monteclora_is_lora_in_evaluation_and_noisy_in_training() -> None:
    theirs, ours = pair("MontecloraConfig", monteclora_config={"sample_scaler": 0.5})
    torch.testing.assert_close(ours.eval()(*X), theirs.eval()(*X))
    y = ours(*X)
    ours.train()
    with seeded(3):
        many = torch.stack([ours(*X) for _ in range(400)])
    assert not torch.equal(many[0], many[1])
    torch.testing.assert_close(many.mean(0), y, atol=0.6, rtol=0.05)
    ours.merge_adapter()
    torch.testing.assert_close(ours(*X), y, atol=1e-4, rtol=1e-4)


def test_divergences_are_torchs() -> None:
    from torch.distributions import Dirichlet, MultivariateNormal, kl_divergence

    with seeded(0):
        a, b, v = torch.rand(5) + 0.2, torch.rand(5) + 0.2, torch.rand(4) + 0.2
    torch.testing.assert_close(dirichlet_divergence(a, b), kl_divergence(Dirichlet(a), Dirichlet(b)))
    normal = MultivariateNormal(torch.zeros(4), torch.diag(v))
    torch.testing.assert_close(
        gaussian_divergence(v), kl_divergence(normal, MultivariateNormal(torch.zeros(4), torch.eye(4)))
    )


def test_variances_are_the_diagonal_of_a_wishart_matrix() -> None:
    from torch.distributions import Wishart

    _, ours = pair("MontecloraConfig", monteclora_config={})
    (layer,) = layers(ours).values()
    p = layer.view("default")
    with seeded(0), torch.no_grad():
        drawn = torch.stack([monteclora.variances(p) for _ in range(3000)])
    theirs = Wishart(df=4, covariance_matrix=torch.diag((2 * monteclora.held(p, "std_prior")).exp().detach()))
    torch.testing.assert_close(drawn.mean(0), theirs.mean.diag(), rtol=0.1, atol=0)
    torch.testing.assert_close(drawn.var(0), theirs.variance.diag(), rtol=0.25, atol=0)


# MiCA, BD-LoRA


def test_mica_starts_as_the_reference() -> None:
    for bench in ("linear", "conv1d", "embedding"):
        made = BENCHES[bench]
        config = {"r": 4, "target_modules": ["l"], "init_lora_weights": "mica"}
        theirs = peft.get_peft_model(made.model(), peft.LoraConfig(**config))
        ours = graftlet.get_peft_model(made.model(), graftlet.LoraConfig(**config))
        for key, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], tensor, msg=key)
        learn = {n for n, q in ours.named_parameters() if q.requires_grad}
        assert learn == {n for n, q in theirs.named_parameters() if q.requires_grad}


@pytest.mark.parametrize("side", ["a", "b"])
def test_bdloras_gradients_and_start_are_the_references(side: str) -> None:
    theirs, ours = pair("BdLoraConfig", use_bdlora={f"target_modules_bd_{side}": ["l"], "nblocks": 2})
    first, second = grads(theirs, *X), grads(ours, *X)
    assert first.keys() == second.keys()
    for name, grad in first.items():
        torch.testing.assert_close(second[name], grad, atol=1e-4, rtol=1e-4)
    if side == "a":
        wide = nn.Sequential()
        wide.add_module("l", nn.Linear(512, 8))
        spreads = []
        for library in (peft, graftlet):
            bd = importable(library).BdLoraConfig(target_modules_bd_a=["l"], nblocks=2)
            made = library.get_peft_model(
                copy.deepcopy(wide), library.LoraConfig(r=16, target_modules=["l"], use_bdlora=bd)
            )
            spreads.append(float(made.base_model.model.l.lora_A["default"].weight.detach().abs().max()))
        assert spreads[0] == pytest.approx(spreads[1], rel=0.05)


# files


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("VeloraConfig", {"velora_config": {"num_groups": 2}}),
        ("KasaConfig", {"kasa_config": {}}),
        ("MontecloraConfig", {"monteclora_config": {"num_samples": 3}}),
        ("BdLoraConfig", {"use_bdlora": {"target_modules_bd_a": ["l"], "nblocks": 2}}),
    ],
)
def test_files_go_both_ways(name: str, values: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = pair(name, **values)
    for model, folder in ((theirs, "theirs"), (ours, "ours")):
        model.train()(*X)
        model.eval().save_pretrained(str(tmp_path / folder))
        y = model(*X)
        for library in (peft, graftlet):
            again = library.PeftModel.from_pretrained(BENCH.model(), str(tmp_path / folder)).eval()
            torch.testing.assert_close(again(*X), y, atol=1e-5, rtol=1e-4)
    keys = [set(graftlet.load_peft_weights(tmp_path / folder)) for folder in ("theirs", "ours")]
    assert keys[0] == keys[1]
