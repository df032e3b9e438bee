# SPDX-License-Identifier: Apache-2.0
"""Environments: what a kind of work needs of a machine, told as data and checked by `graftlet doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from . import features as f
from .features import Feature
from .page import Page


@dataclass(frozen=True, kw_only=True)
class Environment(Page):
    """python: its versions. device, driver: what there must be. install: the one command. features: what it serves.
    alternatives: one of them is enough."""

    kind = "environment"
    python: str = "3.10 or later"
    device: str
    driver: str
    install: str
    features: tuple[Feature, ...]
    alternatives: bool = False

    def sections(self) -> dict[str, str]:
        rows = ["| feature | packages | for |", "|---|---|---|"]
        for feature in self.features:
            packages = ", ".join(f"`{p.package}{p.versions}`" for p in feature.packages) or "-"
            uses = ", ".join(f"`{use.partition(':')[2]}`" for use in feature.uses)
            rows.append(f"| {feature.title} | {packages} | {uses} |")
        notes = [f"*{feature.title}.* {feature.note}" for feature in self.features if feature.note]
        return {
            "Needs": f"Python {self.python}. Device: {self.device}. Driver: {self.driver}.",
            "Install": f"```sh\n{self.install}\n```",
            "Features": "\n".join(rows) + "".join(f"\n\n{note}" for note in notes),
            "Check": f"```sh\ngraftlet doctor --feature {self.name}\n```\n\n{_checked(self)}",
        }


def _checked(environment: Environment) -> str:
    steps = ["the versions of the packages", "each package imported, as half an installation shows only then"]
    told = {f.check.__doc__ for f in environment.features if f.check is not None and f.check.__doc__}
    return "Looked at: " + "; ".join([*steps, *sorted(t.strip().rstrip(".") for t in told)]) + "."


def _evidence(*groups: tuple[Feature, ...]) -> tuple[str, ...]:
    """What of Graftlet's own needs these features."""
    found = [use for group in groups for feature in group for use in feature.uses if use.startswith("graftlet.")]
    return tuple(dict.fromkeys(found))


_CPU = (f.ADAPTERS, f.MODELS, f.RECIPE, f.GGUF, f.ADAMSS, f.STEP, f.PASSES, f.HALF)
_CUDA = (f.CUDA, f.MODELS, f.RECIPE, f.STEP, f.DROPOUT, f.HALVES, f.FUSED)
_SEVERAL = (f.FSDP, f.DEEPSPEED)
_SERVING = (f.SERVING, f.MODELS, f.STEP)

PAGES = (
    Environment(
        name="cpu",
        title="CPU",
        text="Everything runs on a CPU: training, saving, merging, serving. It is where the tests run. The quick way of LoRA "
        "is on here too, and `optimize_model` needs no other package here.",
        device="any CPU; bfloat16 is quick only with instructions for it",
        driver="none",
        install='pip install "graftlet[train]" --extra-index-url https://download.pytorch.org/whl/cpu',
        features=_CPU,
        links=("fine-tune", "bfloat16-on-cpu", "kernels-off"),
        evidence=_evidence(_CPU),
    ),
    Environment(
        name="cuda-training",
        title="CUDA training",
        text="One NVIDIA device. Loading a base, the training loop, and all that is done with adapters.",
        device="one NVIDIA GPU, compute capability 7.0 or later; 8.0 for bfloat16 at full speed",
        driver="one for the CUDA version that torch was built with: 525 or later for CUDA 12, 580 or later for CUDA 13",
        install='pip install "graftlet[train]" triton liger-kernel',
        features=_CUDA,
        links=("fine-tune", "gradient-checkpointing", "fused-operations", "kernels-off"),
        evidence=_evidence(_CUDA),
    ),
    Environment(
        name="quantised-training",
        title="Quantised training",
        text="A base in few bits, and an adapter on it. One back end is enough. None is imported before a layer of its kind is "
        "met, so that one that is missing or half installed breaks nothing else.",
        device="bitsandbytes, torchao, quanto, HQQ and compressed-tensors also run on a CPU; the others want an NVIDIA GPU",
        driver="as for CUDA training",
        install='pip install "graftlet[train,quantised]"',
        features=f.QUANTISATION,
        alternatives=True,
        links=("qlora", "cuda-training", "merge-into-quantised", "clone-of-quantised-output"),
        evidence=_evidence(f.QUANTISATION),
    ),
    Environment(
        name="several-devices",
        title="Several devices",
        text="A model that one device cannot hold, or a batch spread over several. The frozen base is sharded; "
        "an adapter is small "
        "enough to be on each.",
        device="two or more NVIDIA GPUs of one kind",
        driver="as for CUDA training, and NCCL, which comes with torch",
        install='pip install "graftlet[train]" deepspeed',
        features=_SEVERAL,
        alternatives=True,
        links=("cuda-training", "fine-tune"),
        evidence=_evidence(_SEVERAL),
    ),
    Environment(
        name="serving",
        title="Serving",
        text="One base and many adapters: switched, mixed in a batch, swapped in place, merged, or written as LoRA for another "
        "engine. transformers is needed for models loaded by name.",
        device="any; an NVIDIA GPU for large models",
        driver="none, or as for CUDA training",
        install='pip install "graftlet[train]"',
        features=_SERVING,
        links=("serve", "merge", "hotswap", "adapter-names-a-batch", "merged-to-serve", "hotswap-before-compile"),
        evidence=_evidence(_SERVING),
    ),
)


def features_of(name: str) -> list[Feature]:
    """The features that a name stands for: a feature's own, an environment's, or a public name that needs them."""
    everything = [feature for environment in PAGES for feature in environment.features]
    unique = list({feature.name: feature for feature in everything}.values())
    if found := [feature for feature in unique if feature.name == name]:
        return found
    if found := [feature for environment in PAGES if environment.name == name for feature in environment.features]:
        return found
    return [feature for feature in unique if any(_named(use, name) for use in feature.uses)]


def names() -> list[str]:
    """All that `features_of` knows."""
    found = [environment.name for environment in PAGES]
    for environment in PAGES:
        for feature in environment.features:
            found += [feature.name, *(use.partition(":")[2].rpartition(".")[2] for use in feature.uses)]
    return sorted(set(found))


def _named(use: str, name: str) -> bool:
    path = use.partition(":")[2]
    return name in (path, path.rpartition(".")[2])
