# SPDX-License-Identifier: Apache-2.0
"""What is foretold of a step beside the step: parameters of every method, memory on the CPU, recorded figures of a GPU."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig

import graftlet
from graftlet.errors import ConfigError, NoMatchingPeftModuleError, StartWarning, UnsupportedLayerError
from graftlet.knowledge.cost.devices import Device, find_device, table
from graftlet.knowledge.cost.estimating import PARTS, Estimate
from graftlet.registry import Entry, entries, lookup
from tests.laws.cases import settings_of

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
TINY: Any = LlamaConfig(**SIZES)

NEEDED: dict[str, dict[str, Any]] = {
    "IA3": {"feedforward_modules": ["down_proj"]},
    "ADAPTION_PROMPT": {"target_modules": None, "adapter_len": 4, "adapter_layers": 2},
    "SHADOW": {"target_modules": None},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"]},
    **{n: {"num_virtual_tokens": 5} for n in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CARTRIDGE")},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 5, "num_tasks": 2},
}
"""What a method's config needs on this model beside its settings."""
ELSEWHERE = {("LORA", "lora_bias"), ("LORA", "velora-random")}
"""Settings for layers that have a bias, which this model's have not."""
BY_WEIGHTS = {"ADAMSS"}
"""Methods whose sizes depend on the numbers of the base's weights."""
COMPANIONS = {"XLORA"}
"""Methods that work with adapters that are saved somewhere."""

CASES = [
    (entry, setting)
    for entry in entries()
    for setting in settings_of(entry)
    if (entry.name, setting) not in ELSEWHERE and entry.name not in BY_WEIGHTS | COMPANIONS
]


def config_of(entry: Entry, setting: str) -> Any:
    values = dict(settings_of(entry)[setting])
    if "target_modules" in entry.config.__dataclass_fields__:
        values.setdefault("target_modules", list(TARGETS))
    return entry.config(**{"task_type": "CAUSAL_LM", **values, **NEEDED.get(entry.name, {})})


@pytest.mark.parametrize(("entry", "setting"), CASES, ids=[f"{e.name}-{s}" for e, s in CASES])
def test_as_many_numbers_learn_as_in_the_real_model(entry: Entry, setting: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StartWarning)
        real: Any = graftlet.get_peft_model(AutoModelForCausalLM.from_config(TINY), config_of(entry, setting))
    found = graftlet.estimate(TINY, config_of(entry, setting), batch=2, sequence=16, dtype="float32", device="H100")
    assert found.trainable == real.get_nb_trainable_parameters()[0]
    assert found.parameters == sum(p.numel() for p in real.parameters())
    assert found.memory.adapters >= sum(p.numel() * p.element_size() for p in real.parameters() if p.requires_grad)


def test_methods_are_left_out_for_a_reason() -> None:
    for name in BY_WEIGHTS:
        with pytest.raises(ConfigError, match="depends on the numbers of its weight"):
            graftlet.estimate(TINY, config_of(lookup(name), next(iter(settings_of(lookup(name))))), device="H100")
    assert {e.name for e, _ in CASES} == {e.name for e in entries()} - BY_WEIGHTS - COMPANIONS


# memory


def allocated(run: Callable[[], Any]) -> int:
    """The most that torch held at once on the CPU while something ran."""
    gc.collect()  # what is freed while it runs would count against it
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    profiler: Any = found.profiler
    held = most = 0
    for event in sorted(profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def step_of(config: Any, checkpointing: bool, model_config: Any = TINY, optimised: bool = False) -> Callable[[], None]:
    def run() -> None:
        model: Any = AutoModelForCausalLM.from_config(model_config)
        model.config.use_cache = False
        if config is not None:
            model = graftlet.get_peft_model(model, config)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        if optimised:
            graftlet.optimize_model(model)
        model.train()
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):
            ids = torch.randint(1, 256, (3, 48))
            model(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    return run


MEMORY = {
    "lora": (lambda: graftlet.LoraConfig(r=8, target_modules="all-linear"), False),
    "checkpointing": (lambda: graftlet.LoraConfig(r=8, target_modules="all-linear"), True),
    "dora": (lambda: graftlet.LoraConfig(r=8, target_modules="all-linear", use_dora=True), False),
    "dropout": (lambda: graftlet.LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.1), False),
    "hra": (lambda: graftlet.HRAConfig(r=4, target_modules=TARGETS), False),
    "whole": (lambda: None, False),
}


@pytest.mark.parametrize("name", MEMORY)
def test_the_peak_on_the_cpu_is_as_measured(name: str) -> None:
    make, checkpointing = MEMORY[name]
    found = graftlet.estimate(
        TINY, make(), batch=3, sequence=48, checkpointing=checkpointing, dtype="float32", device=small("cpu")
    )
    measured = allocated(step_of(make(), checkpointing))
    assert found.peak == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("name", ["lora", "checkpointing", "dropout"])
def test_the_peak_with_fewer_passes_is_as_measured(name: str) -> None:
    make, checkpointing = MEMORY[name]
    size: dict[str, Any] = {"batch": 3, "sequence": 48, "dtype": "float32", "device": small("cpu")}
    found = graftlet.estimate(TINY, make(), checkpointing=checkpointing, optimised=True, **size)
    assert found.peak == pytest.approx(allocated(step_of(make(), checkpointing, optimised=True)), rel=0.03)


@pytest.mark.slow
def test_every_recorded_peak_is_foretold_within_a_tenth() -> None:
    """The figures of `benchmarks/results` are measured; what is foretold of them is worked out anew here."""
    results = json.loads((ROOT / "benchmarks/results/plan.json").read_text())
    script = __import__("runpy").run_path(str(ROOT / "benchmarks/plan.py"))
    rows = [*script["recorded"](), *script["stacked"]()]
    rows += [{**row, **script["foretold"](row["case"], "cpu")} for row in results["cpu"]]
    assert len(rows) > 45
    off = [(row["case"], row["predicted"] / row["measured"] - 1) for row in rows]
    assert all(abs(by) < 0.1 for _, by in off), off


def small(kind: str, memory: int = 10**12) -> Device:
    """A device whose rates need not be measured."""
    return Device("small", kind, 1e12, 1e11, 1e11, memory, "made up", here=True)


def test_parts_add_up_and_are_what_they_say() -> None:
    config = graftlet.LoraConfig(r=8, target_modules="all-linear")
    found = graftlet.estimate(TINY, config, batch=2, sequence=64, device="H100", dtype="bfloat16")
    model = AutoModelForCausalLM.from_config(TINY)
    assert found.peak == sum(getattr(found.memory, part) for part in PARTS)
    weights = sum(p.numel() * 2 for p in model.parameters())
    assert weights <= found.memory.weights <= weights * 1.1
    assert found.memory.adapters >= 4 * found.trainable
    assert found.memory.optimiser >= 8 * found.trainable
    assert found.memory.activations > 0
    assert found.memory.logits > 0


def test_memory_grows_with_what_it_grows_with() -> None:
    def peak(**how: Any) -> int:
        config = graftlet.LoraConfig(r=how.pop("r", 8), target_modules="all-linear")
        return graftlet.estimate(TINY, config, **{"batch": 2, "sequence": 64, "device": "H100", **how}).peak

    plain = peak()
    assert peak(batch=4) > plain
    assert peak(sequence=128) > plain
    assert peak(r=32) > plain
    assert peak(checkpointing=True) < plain
    assert peak(optimised=True) < plain
    assert peak(adapter_dtype="bfloat16") < plain
    assert peak(optimiser="sgd") < plain
    assert peak(quantisation="nf4", prepared=False) < peak(quantisation="int8", prepared=False) < plain * 1.2
    assert peak(accumulation=4) >= plain


def test_levers_say_what_the_step_then_takes() -> None:
    config = graftlet.LoraConfig(r=8, target_modules="all-linear")
    found = graftlet.estimate(TINY, config, batch=4, sequence=256, device="H100")
    levers = {lever.name: lever for lever in found.levers}
    assert set(levers) == {"optimised", "checkpointing", "4 bits", "batch", "sequence", "rank"}
    again = graftlet.estimate(TINY, config, batch=4, sequence=256, device="H100", checkpointing=True)
    assert levers["checkpointing"].peak == again.peak
    assert levers["checkpointing"].saved == found.peak - again.peak
    assert config.r == 8
    shorter = graftlet.estimate(TINY, config, batch=4, sequence=128, device="H100")
    assert levers["sequence"].peak == shorter.peak


def test_a_head_that_learns_is_left_whole_in_few_bits() -> None:
    config = graftlet.LoraConfig(r=8, target_modules=["q_proj", "query"], task_type="SEQ_CLS")
    found = graftlet.estimate(TINY, config, batch=4, sequence=64, device="H100")
    assert "4 bits" in {lever.name for lever in found.levers}
    bias = BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"})  # which transformers quantises
    found = graftlet.estimate(bias, config, batch=4, sequence=64, device="H100")
    assert "4 bits" not in {lever.name for lever in found.levers}
    with pytest.raises(UnsupportedLayerError, match="llm_int8_skip_modules"):
        graftlet.estimate(bias, config, batch=4, sequence=64, device="H100", quantisation="nf4")


def test_what_does_not_fit_is_made_to_fit() -> None:
    config = graftlet.LoraConfig(r=8, target_modules="all-linear")
    whole: Estimate = graftlet.estimate(TINY, config, batch=8, sequence=128, device=small("cpu"))
    tight = graftlet.estimate(TINY, config, batch=8, sequence=128, device=small("cpu", int(whole.peak * 0.4)))
    assert whole.fits
    assert whole.fitting() == ()
    assert not tight.fits
    taken = tight.fitting()
    assert taken[-1].fits
    assert not any(lever.fits for lever in taken[:-1])
    assert [lever.name for lever in taken[:2]] == ["optimised", "checkpointing"]
    hopeless = graftlet.estimate(TINY, config, batch=1, sequence=64, device=small("cpu", 1000))
    assert hopeless.fitting() == ()


def test_traffic_is_the_adapters_gradients_alone() -> None:
    config = graftlet.LoraConfig(r=8, target_modules="all-linear")
    found = graftlet.estimate(TINY, config, sequence=16, device="H100")
    two, eight = found.traffic(2), found.traffic(8)
    assert two.adapter == 4 * found.trainable
    assert two.full == 2 * found.parameters
    assert eight.adapter == pytest.approx(2 * 7 / 8 * 4 * found.trainable)
    assert two.less > 1


# time


def test_products_are_counted_as_arithmetic_has_it() -> None:
    """Of a frozen weight a product forward and one backward, two operations each; the adapter's three times two thin ones."""
    config = graftlet.LoraConfig(r=8, target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="layers")
    found = graftlet.estimate(TINY, config, batch=1, sequence=128, device=small("cuda"))
    model = AutoModelForCausalLM.from_config(TINY)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    dense = 4 * 128 * linear
    assert dense * 0.85 < found.time.flops < dense * 1.35  # the first layers need no gradient; attention comes on top
    assert found.time.least <= found.time.likely


def test_a_faster_device_is_faster() -> None:
    config = graftlet.LoraConfig(target_modules="all-linear")
    seconds = [graftlet.estimate(TINY, config, batch=8, device=d).time.least for d in ("H100 HBM3", "Tesla T4")]
    assert seconds[0] < seconds[1]


def test_devices_are_found_by_a_part_of_their_names() -> None:
    assert find_device("h100 pcie").name == "NVIDIA H100 PCIe"
    assert all(d.source and d.half > d.single > 1e12 and d.memory > 1e10 for d in table().values())
    with pytest.raises(ConfigError, match="Known: cpu, cuda"):
        find_device("abacus")


# what cannot be


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"batch": 0}, "batch=0"),
        ({"sequence": True}, "sequence=True"),
        ({"optimiser": "adam"}, "did you mean 'adamw'"),
        ({"quantisation": "gptq"}, "nf4, fp4, int8"),
        ({"dtype": "int8"}, "floating-point"),
        ({"dtype": "b16"}, "no dtype of torch"),
    ],
)
def test_what_cannot_be_estimated_is_said(how: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        graftlet.estimate(TINY, graftlet.LoraConfig(target_modules=TARGETS), device="H100", **how)


def test_no_model_no_estimate(tmp_path: Path) -> None:
    config = graftlet.LoraConfig(target_modules=TARGETS)
    for given, said in (
        (tmp_path / "none", "no config of a model"),
        ({"model_type": "nothing"}, "none that transformers knows"),
        (3, "a int; a config"),
    ):
        with pytest.raises(ConfigError, match=said):
            graftlet.estimate(given, config, device="H100")
    with pytest.raises(NoMatchingPeftModuleError):
        graftlet.estimate(TINY, graftlet.LoraConfig(target_modules=["nothing"]), device="H100")
    learnt = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=64)
    with pytest.raises(ConfigError, match="places for 64 tokens"):
        graftlet.estimate(learnt, None, sequence=128, device="H100")


def test_no_number_of_the_model_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that no machine could hold is estimated: nothing of its size is ever allocated."""
    huge = LlamaConfig(**{**SIZES, "hidden_size": 65536, "intermediate_size": 262144, "vocab_size": 500_000})
    config = graftlet.LoraConfig(target_modules="all-linear", use_dora=True, lora_dropout=0.1)
    peak = allocated(lambda: graftlet.estimate(huge, config, batch=64, sequence=4096, device="H100"))
    assert peak < 50 * 2**20
