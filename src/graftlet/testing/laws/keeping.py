# SPDX-License-Identifier: Apache-2.0
"""How an adapter is kept: in files, in copies, without memory until it is loaded, and compiled."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import torch

from ...config import PeftConfig
from ...errors import ConfigError
from ...model.peft_model import PeftModel
from ...model.save import get_peft_model_state_dict, set_peft_model_state_dict
from ..benches import learning, near, perturb, prompt_of
from ..case import Case
from ..running import SINGLE, adapted, expect, fresh, gradients, refuses, run, same, scratch


def saved_and_loaded_it_is_equal(case: Case) -> None:
    model = adapted(case)
    y = run(model, case)
    with scratch() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(case.bench.model(), folder, config=case.config()).eval()
    same(run(again, case), y, "saved and loaded, an adapter acts the same")
    odd = [n for n, p in again.named_parameters() if p.is_meta or p.requires_grad]
    expect(not odd, f"a loaded adapter that is whole and frozen, not {odd}")
    again.train()
    if case.merges:
        again.eval().merge_adapter()
        near(run(again, case), y, SINGLE, what="loaded and merged, an adapter acts the same")


def its_tensors_move_to_another_model(case: Case) -> None:
    model = adapted(case)
    tensors = get_peft_model_state_dict(model)
    expect(tensors, "tensors to save")
    other = fresh(case)
    perturb(other, seed=9)
    prompt = prompt_of(other)
    if prompt is not None and len(prompt.saved()) < len(learning(other, "default")):
        refuses(
            ConfigError, lambda: set_peft_model_state_dict(other, tensors), "rows for a prompt that a network makes"
        )
        return
    result = set_peft_model_state_dict(other, tensors)
    expect(not result.missing_keys, f"no missing keys, not {result.missing_keys}")
    expect(not result.unexpected_keys, f"no unexpected keys, not {result.unexpected_keys}")
    same(run(other, case), run(model, case), "a model with another's tensors acts the same")


def the_same_seed_gives_the_same_bytes(case: Case) -> None:
    files = []
    for _ in range(2):
        with scratch() as folder:
            fresh(case).save_pretrained(folder)
            files.append({p.name: p.read_bytes() for p in Path(folder).rglob("adapter_*") if p.is_file()})
    expect(files[0].keys() == files[1].keys() and len(files[0]) > 1, f"a config and weights, not {sorted(files[0])}")
    for name, text in files[0].items():
        expect(text == files[1][name], f"the same bytes in {name} from the same seed")


def its_config_survives_json(case: Case) -> None:
    config = case.config()
    with scratch() as folder:
        config.save_pretrained(folder)
        again = PeftConfig.from_pretrained(folder)
    expect(type(again) is type(config), f"a {type(config).__name__} from its file, not a {type(again).__name__}")
    first, then = ({k: v for k, v in c.to_dict().items() if k != "peft_version"} for c in (config, again))
    expect(first == then, f"the config's own values from its file: {first}, not {then}")


def copied_and_pickled_it_is_equal(case: Case) -> None:
    model = adapted(case)
    y = run(model, case)
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    buffer.seek(0)
    for how, again in (("copy", copied), ("pickle", pickle.load(buffer))):
        same(run(again, case), y, f"a {how} acts the same")
        perturb(again, seed=11)
        expect(not torch.allclose(run(again, case), y), f"a {how} whose own tensors act")
    same(run(model, case), y, "a copy that shares nothing with the model")


def made_on_meta_it_has_no_memory_until_loaded(case: Case) -> None:
    y, tensors = run(adapted(case), case), get_peft_model_state_dict(adapted(case))
    model = PeftModel(case.bench.model(), case.config(), low_cpu_mem_usage=True, _init=False).eval()
    set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    model._loaded(["default"], model.peft_config["default"])
    left = [n for n, t in model.state_dict().items() if t.is_meta]
    expect(not left, f"every tensor loaded, not {left} on meta")
    same(run(model, case), y, "an adapter made on meta and loaded acts the same")


# compilation


def it_compiles_without_a_graph_break(case: Case) -> None:
    torch._dynamo.reset()
    model = adapted(case)
    compiled: Callable = torch.compile(model, fullgraph=True, backend="eager")
    near(run(compiled, case), run(model, case), SINGLE, what="compiled, it acts the same")


def it_compiles_for_training(case: Case) -> None:
    torch._dynamo.reset()
    model = adapted(case)
    expected = gradients(model, model, case)
    compiled: Callable = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name, grad in gradients(compiled, model, case).items():
        near(grad, expected[name], SINGLE, steps=32, what=f"compiled, the same gradient for {name}")
