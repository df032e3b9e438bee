# SPDX-License-Identifier: Apache-2.0
"""The laws hold a method of one's own to account: a sound one passes, and each kind of mistake breaks its law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from graftlet import registry
from graftlet.config import PeftConfig, Targets
from graftlet.core.method import OutputMap, Spec, View, Weights
from graftlet.core.prompt import ROWS
from graftlet.errors import ConfigError, MergeError, UnknownMethodError
from graftlet.methods.prompts.prompt_tuning import PromptEmbedding, PromptTuningConfig
from graftlet.methods.shadow import Shadow
from graftlet.testing import BENCHES, Case, check_method, laws
from graftlet.weights.site import Conv, Embedding, Linear, Site


@dataclass(kw_only=True)
class GainConfig(Targets, PeftConfig):
    start: float = 0.0


class Gain(OutputMap):
    """W' = diag(1 + g) W."""

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return {"gain_g": Spec((site.features_out,))}

    def init(self, p: View) -> None:
        p.gain_g.fill_(p.start)

    def map(self, p: View, y: Tensor) -> Tensor:
        return y + y * p.gain_g


class Late(Gain):
    """Its merged form is not what its forward does."""

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        W, b = super().transform(p, W, b)
        return W * 1.01, b


class Idle(Gain):
    """One tensor learns nothing."""

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return {**super().params(site, p), "gain_idle": Spec((2,))}

    def init(self, p: View) -> None:
        super().init(p)
        p.gain_idle.zero_()


class Forgetful(Gain):
    """What it learns stands in no file."""

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return {"gain_g": Spec((site.features_out,), saved=False)}


class Summed(Gain):
    """It acts as a chain, and says it is a sum."""

    law = "sum"


class Selfish(Gain):
    """Rows of a batch see each other."""

    def map(self, p: View, y: Tensor) -> Tensor:
        return y + y.mean(0, keepdim=True) * p.gain_g


class Shy(Gain):
    """It says that it has no merged form, and merges."""

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        raise MergeError("no")


class Breaking(Gain):
    """It cannot be compiled as a whole."""

    def map(self, p: View, y: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().map(p, y)


@dataclass(kw_only=True)
class GrowingConfig(GainConfig):
    """Read from its file, it is another."""

    def check(self) -> None:
        self.start += 1


@pytest.fixture
def register(monkeypatch) -> Callable[..., Any]:
    """Registers a method for the time of a test."""
    monkeypatch.setattr(registry, "_table", dict((list(registry.entries()), registry._table)[1]))

    def register(cls: type, config: type = GainConfig, sites: tuple[type, ...] = (Linear,)) -> registry.Entry:
        registry.method("gain", config, sites=sites)(cls)
        return registry.lookup("gain")

    return register


def test_a_sound_method_keeps_every_law(register) -> None:
    register(Gain, sites=(Linear, Conv, Embedding))
    counts = check_method(Gain, sites=[Linear, Embedding])
    assert counts.pop("what_has_no_merged_form_says_so") == 0
    assert counts.pop("it_compiles_for_training") == counts.pop("it_compiles_without_a_graph_break") == 1
    assert set(counts.values()) == {sum(b.kind in (Linear, Embedding) for b in BENCHES.values())}


def test_all_that_is_broken_is_named_at_once(register) -> None:
    register(Late)
    with pytest.raises(AssertionError) as found:
        check_method(Late, [{}, {"start": 1.0}])
    said = str(found.value)
    assert "GAIN breaks laws on " in said
    assert "forward_is_the_operation_with_the_transformed_weight, linear with {}:" in said
    assert "merged_equals_forward_and_unmerging_restores_the_bits, no-bias with {'start': 1.0}:" in said
    assert "a_new_adapter_changes_nothing, linear with {'start': 1.0}:" in said
    assert "expected: the merged model's output is the unmerged one's." in said
    assert "its_config_survives_json" not in said


@pytest.mark.parametrize(
    ("cls", "law", "said"),
    [
        (Late, laws.forward_is_the_operation_with_the_transformed_weight, "forward(x) is op(x, transform(W))"),
        (Late, laws.merging_for_good_leaves_a_bare_model, "unloaded model's output"),
        (Idle, laws.only_declared_tensors_get_gradients, "a gradient for base_model.model.l.gain_idle.default"),
        (Forgetful, laws.its_tensors_move_to_another_model, "tensors to save"),
        (Summed, laws.two_active_adapters_follow_the_declared_law, "by the law 'sum'"),
        (Selfish, laws.a_mixed_batch_gives_each_row_its_adapter, "as if its adapter were alone"),
        (Gain, laws.what_has_no_merged_form_says_so, "merging is refused, by a MergeError"),
    ],
)
def test_a_mistake_breaks_its_law(register, cls, law, said) -> None:
    case = Case(register(cls), "0", BENCHES["linear"])
    with pytest.raises(AssertionError) as found:
        law(case)
    assert said in str(found.value)


def test_a_start_that_is_not_neutral_breaks_a_law(register) -> None:
    entry = register(Gain)
    laws.a_new_adapter_changes_nothing(Case(entry, "0", BENCHES["linear"]))
    with pytest.raises(AssertionError, match="a new adapter changes nothing"):
        laws.a_new_adapter_changes_nothing(Case(entry, "0", BENCHES["linear"], {"start": 0.5}))


def test_a_config_that_changes_on_its_way_breaks_a_law(register) -> None:
    case = Case(register(Gain, GrowingConfig), "0", BENCHES["linear"])
    with pytest.raises(AssertionError, match="the config's own values from its file"):
        laws.its_config_survives_json(case)


def test_an_error_in_the_method_is_a_broken_law(register) -> None:
    register(Shy)
    with pytest.raises(AssertionError, match="MergeError: no"):
        check_method(Shy)


def test_what_cannot_be_compiled_breaks_a_law(register) -> None:
    with pytest.raises(Exception, match="graph_break"):
        laws.it_compiles_without_a_graph_break(Case(register(Breaking), "0", BENCHES["linear"]))


def test_what_cannot_be_checked_is_refused(register) -> None:
    with pytest.raises(UnknownMethodError, match="Gain is not registered; put @method"):
        check_method(Gain)
    register(Gain)
    with pytest.raises(ConfigError, match="sites has Conv, but GAIN can be checked on: Linear"):
        check_method(Gain, sites=[Conv])
    register(Gain, sites=())
    with pytest.raises(ConfigError, match="registered for no kind of layer"):
        check_method(Gain)
    with pytest.raises(ConfigError, match="sites has Linear"):
        check_method(PromptEmbedding, sites=[Linear])


# methods beside the layers, and on blocks


@dataclass(kw_only=True)
class OwnPromptConfig(PromptTuningConfig):
    pass


class Fading(PromptEmbedding):
    """A prompt whose file has something else than it acts by."""

    def saved(self) -> dict[str, Tensor]:
        return {ROWS: self.rows() * 0.9}


class Greedy(PromptEmbedding):
    """A prompt that sees the other rows of a batch."""

    def prompt(self, batch: int, given: Any) -> Tensor:
        return self.rows().expand(batch, -1, -1) * batch


class Fixed(PromptEmbedding):
    """A prompt that leaves a tensor untaught."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.idle = torch.nn.Parameter(torch.zeros(2))


def test_a_prompt_method_gets_its_laws_by_registering() -> None:
    counts = check_method(PromptEmbedding)
    assert counts["saved_and_loaded_it_is_equal"] == counts["a_mixed_batch_gives_each_row_its_adapter"] == 1
    assert counts["forward_is_the_operation_with_the_transformed_weight"] == 0
    assert counts["a_new_adapter_changes_nothing"] == 0


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        (Fading, "saved_and_loaded_it_is_equal"),
        (Greedy, "a_mixed_batch_gives_each_row_its_adapter"),
        (Fixed, "only_declared_tensors_get_gradients"),
    ],
)
def test_a_prompt_that_breaks_a_law_is_told(kind: type, law: str, register: Any) -> None:
    register(kind, config=OwnPromptConfig)
    with pytest.raises(AssertionError, match=law):
        check_method(kind)


def test_a_method_on_blocks_gets_its_laws_by_registering() -> None:
    counts = check_method(Shadow, {"r": 3}, idle=["layers.2.shadow_update"])
    assert counts["disabled_equals_the_base"] == counts["made_on_meta_it_has_no_memory_until_loaded"] == 1
    with pytest.raises(AssertionError, match="only_declared_tensors_get_gradients"):
        check_method(Shadow, {"r": 3})
