# SPDX-License-Identifier: Apache-2.0
"""What Graftlet can do, feature by feature: what each needs, and whether that is here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..core.kernel import SWITCH
from ..requirements import REQUIREMENTS, Requirement

State = Literal["works", "absent", "broken"]
"""absent: something optional is not here. broken: what is here is of another version, or cannot be imported."""
Check = Callable[[], "tuple[str, str] | None"]
"""Why a feature does not work here, and the command that mends it; None where it does."""


@dataclass(frozen=True)
class Feature:
    """name: what `graftlet doctor --feature` takes. packages: what it needs beside the core. modules: what must import.
    uses: the public names that need it, `module:name`. check: what else there must be. note: what to know even so.
    optional: its environment serves without it.
    """

    name: str
    title: str
    packages: tuple[Requirement, ...] = ()
    modules: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    check: Check | None = None
    command: str = ""
    note: str = ""
    optional: bool = False

    @property
    def install(self) -> str:
        """What installs all its packages."""
        return self.command or (f"pip install {' '.join(_quoted(p) for p in self.packages)}" if self.packages else "")


@dataclass(frozen=True)
class Finding:
    """Whether a feature works here; if not, why, and the command that mends it."""

    feature: Feature
    state: State
    why: str = ""
    command: str = ""

    @property
    def works(self) -> bool:
        """Whether it does."""
        return self.state == "works"


def examine(feature: Feature) -> Finding:
    """Look whether a feature works: its packages' versions, that they import, and its own check."""
    for package in feature.packages:
        if package.found is None:
            return Finding(feature, "absent", f"{package.package} is not installed", feature.install)
        if not package.met:
            why = f"{package.package} {package.found} is installed, {package.versions} is needed"
            return Finding(feature, "broken", why, feature.install)
    for module in feature.modules:
        if (why := unimportable(module)) is not None:
            return Finding(feature, "broken", why, feature.install)
    if feature.check is not None and (trouble := feature.check()) is not None:
        return Finding(feature, "absent", *trouble)
    return Finding(feature, "works", versions(feature))


def versions(feature: Feature) -> str:
    """The versions found of a feature's packages."""
    return ", ".join(f"{p.package} {p.found}" for p in feature.packages)


@functools.cache
def unimportable(module: str) -> str | None:
    """Why a module cannot be imported; None where it can. Half an installation shows only as it is."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a package does as it is imported
        return f"{module} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None


def _quoted(package: Requirement) -> str:
    return f'"{package.package}{package.versions}"'


# what this machine has


def python() -> tuple[str, str] | None:
    """Python 3.10 or later."""
    old = sys.version_info < (3, 10)
    return (f"this is Python {platform.python_version()}; 3.10 is needed", "") if old else None


def cuda() -> tuple[str, str] | None:
    """A CUDA device that torch can use."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        command = "pip install torch --index-url https://download.pytorch.org/whl/cu128"
        return f"torch {torch.__version__} was built without CUDA", command
    why = f"torch {torch.__version__} finds no device, or a driver too old for CUDA {torch.version.cuda}"
    return why, "nvidia-smi"


def several() -> tuple[str, str] | None:
    """Two CUDA devices, and torch's ways to work on both."""
    import torch

    if (trouble := cuda()) is not None:
        return trouble
    if not torch.distributed.is_available():
        return f"torch {torch.__version__} was built without torch.distributed", ""
    count = torch.cuda.device_count()
    return None if count > 1 else (f"there is {count} CUDA device", "")


def switched_off() -> tuple[str, str] | None:
    """Kernels not turned off by the environment."""
    return (f"{SWITCH}=0 is set", f"unset {SWITCH}") if os.environ.get(SWITCH, "1") == "0" else None


def triton() -> tuple[str, str] | None:
    """CUDA with Triton, and kernels on."""
    if (trouble := switched_off() or cuda()) is not None:
        return trouble
    return None if importlib.util.find_spec("triton") else ("triton is not installed", "pip install triton")


def liger() -> tuple[str, str] | None:
    """CUDA with Triton and liger-kernel."""
    if (trouble := triton()) is not None:
        return trouble
    there = importlib.util.find_spec("liger_kernel")
    return None if there else ("liger-kernel is not installed", "pip install liger-kernel")


def half_on_cpu() -> tuple[str, str] | None:
    """Instructions of the CPU for bfloat16: without, products in it are slower than in float32."""
    import torch

    from ..train.base import computes_in_bfloat16

    if computes_in_bfloat16(torch.device("cpu")):
        return None
    return "this CPU has no bfloat16 instructions; products in it work, and are slower than in float32", ""


# packages


def needs(package: str, versions: str, feature: str = "") -> Requirement:
    """A requirement that no file in `weights/` is for."""
    return Requirement(feature or package, package, versions)


TORCH = (needs("torch", ">=2.6"), needs("safetensors", ">=0.4.3"), needs("huggingface_hub", ">=0.25"))
TRANSFORMERS = (needs("transformers", ">=4.56,<6"),)
TRAINING = (*TRANSFORMERS, needs("accelerate", ">=1.0"), needs("datasets", ">=3.0"))
RECIPES = (
    *TRAINING,
    needs("typer", ">=0.12"),
    needs("rich", ">=13"),
    needs("pydantic", ">=2.7"),
    needs("matplotlib", ">=3.8"),
    needs("psutil", ">=5.9"),
)

MODEL = "graftlet.model.peft_model:PeftModel"
MANY = "graftlet.model.many"
QUANTISED = (
    "graftlet.model.prepare:prepare_model_for_kbit_training",
    "graftlet.model.loftq:replace_lora_weights_loftq",
)


def _backend(name: str, title: str, modules: tuple[str, ...], *uses: str, note: str = "") -> Feature:
    """A back end that `requirements.py` knows."""
    return Feature(name, title, (REQUIREMENTS[name],), modules, (*QUANTISED, *uses), note=note)


ADAPTERS = Feature(
    "adapters",
    "Adapters on any module",
    TORCH,
    ("torch",),
    (
        "graftlet.model.mapping:get_peft_model",
        "graftlet.methods.lora_config:LoraConfig",
        f"{MODEL}.save_pretrained",
        f"{MODEL}.from_pretrained",
        f"{MODEL}.load_adapter",
        f"{MODEL}.set_adapter",
        f"{MODEL}.delete_adapter",
        f"{MANY}:ManyAdapters.merge_and_unload",
        f"{MANY}:ManyAdapters.add_weighted_adapter",
    ),
    python,
    'pip install "graftlet"',
)
MODELS = Feature(
    "models",
    "Adapters on transformers models, loaded by name",
    TRANSFORMERS,
    ("transformers",),
    ("graftlet.model.auto:AutoPeftModel", "transformers:AutoModelForCausalLM"),
    command='pip install "graftlet[train]"',
)
RECIPE = Feature(
    "recipes",
    "`graftlet train` and the training loop",
    RECIPES,
    ("transformers", "accelerate"),
    ("graftlet.train.run:train", "graftlet.train.recipe:load_recipe", "transformers:Trainer"),
    command='pip install "graftlet[train]"',
)
GGUF = Feature(
    "gguf",
    "Bases from GGUF files",
    (*TRANSFORMERS, needs("gguf", ">=0.10")),
    ("gguf",),
    ("graftlet.train.sources:convert_gguf",),
    command='pip install "graftlet[train]"',
    optional=True,
)
ADAMSS = Feature(
    "adamss",
    "AdaMSS, which clusters rows",
    (needs("scikit-learn", ">=1.3"),),
    ("sklearn",),
    ("graftlet.methods.adamss:AdamssConfig",),
    command='pip install "graftlet[adamss]"',
    optional=True,
)
STEP = Feature(
    "one-step-product",
    "LoRA's product with the frozen one, in one step of autograd",
    uses=("graftlet.kernels.lowrank:forward",),
    check=switched_off,
    note="Runs on linear layers, plain or of 4 bits. Declines, and leaves it to the plain way: under `torch.compile`, autocast "
    "(but for 4 bits) and transforms of functions; on layers with hooks or a bias or weight that learns.",
)
PASSES = Feature(
    "operations-cpu",
    "Norms, rotations, gates, dropout and head in fewer passes (`optimize_model`)",
    uses=("graftlet.model.optimised:optimize_model", "graftlet.kernels.head_loss_blocks:loss_and_gradient"),
    optional=True,
    note="Each operation is tried beside the model's own, and replaced where both agree; "
    "`graftlet.optimised(model)` says what was. Dropout draws other entries from the same seed.",
)
HALF = Feature(
    "bfloat16-cpu",
    "bfloat16 on this CPU at full speed",
    uses=("graftlet.train.base:pick_dtype",),
    check=half_on_cpu,
    optional=True,
)
CUDA = Feature(
    "cuda",
    "Training on an NVIDIA device",
    TORCH,
    ("torch",),
    check=cuda,
    uses=ADAPTERS.uses,
)
DROPOUT = Feature(
    "dropout-bits",
    "Dropout kept as a bit an entry",
    uses=("graftlet.kernels.lowrank:dropping",),
    check=triton,
    optional=True,
    note="Declines in float32, for inputs that are not contiguous, and for widths that are no multiple of a word.",
)
HALVES = Feature(
    "half-precision-products",
    "Products of float32 adapters in the base's half precision",
    uses=("graftlet.kernels.half:forward", "graftlet.kernels.half:product", "graftlet.kernels.half:mapped"),
    check=lambda: switched_off() or cuda(),
    optional=True,
    note="Declines for inputs in float32, under autocast and for transforms of functions.",
)
FUSED = Feature(
    "fused-operations",
    "Fused norms, rotations, gates and head (`optimize_model`)",
    uses=("graftlet.model.optimised:optimize_model", "graftlet.kernels.head_loss:HeadLoss"),
    check=liger,
    optional=True,
    note="Each operation is tried beside the model's own, and replaced where both agree; "
    "`graftlet.optimised(model)` says what was.",
)
FSDP = Feature(
    "fsdp2",
    "A model spread over devices by FSDP2",
    (*TORCH, needs("accelerate", ">=1.0")),
    ("torch.distributed.fsdp",),
    ("torch.distributed.fsdp:fully_shard", "graftlet.integrations.sharding:shard"),
    several,
)
DEEPSPEED = Feature(
    "deepspeed",
    "A model spread over devices by DeepSpeed ZeRO",
    (needs("deepspeed", ">=0.15"), needs("accelerate", ">=1.0")),
    ("deepspeed",),
    ("accelerate:DeepSpeedPlugin",),
    several,
)
SERVING = Feature(
    "serving",
    "Many adapters over one base",
    TORCH,
    ("torch",),
    (
        "graftlet.serve.cache:AdapterCache",
        "graftlet.serve.cache:AdapterPool",
        "graftlet.core.context:using",
        "graftlet.serve.hotswap:hotswap_adapter",
        "graftlet.serve.hotswap:prepare_model_for_compiled_hotswap",
        "graftlet.serve.convert:save_as_lora",
    ),
    command='pip install "graftlet"',
)
QUANTISATION = (
    _backend(
        "bnb",
        "bitsandbytes: NF4, FP4, 8 bit",
        ("bitsandbytes",),
        "transformers:BitsAndBytesConfig",
        "graftlet.weights.bnb:FourBit",
    ),
    _backend("torchao", "torchao: int8, int4, float8, NVFP4", ("torchao",), "transformers:TorchAoConfig"),
    _backend("quanto", "optimum-quanto: int8, int4, int2, float8", ("optimum.quanto",), "transformers:QuantoConfig"),
    _backend("hqq", "HQQ: 8 to 1 bits", ("hqq",), "transformers:HqqConfig"),
    _backend("aqlm", "AQLM", ("aqlm",), "transformers:AqlmConfig"),
    _backend("compressed", "compressed-tensors", ("compressed_tensors",), "transformers:CompressedTensorsConfig"),
    Feature(
        "gptq",
        "GPTQ by gptqmodel",
        (needs("gptqmodel", ">=2.0.0"), needs("optimum", ">=1.24.0")),
        ("gptqmodel",),
        ("transformers:GPTQConfig", "graftlet.weights.gptq:GPTQ"),
    ),
    Feature(
        "auto-gptq",
        "GPTQ by auto-gptq",
        (needs("auto-gptq", ">=0.5.0"),),
        ("auto_gptq",),
        ("transformers:GPTQConfig", "graftlet.weights.gptq:GPTQ"),
    ),
    Feature(
        "awq",
        "AWQ by autoawq",
        (needs("autoawq", ">=0.2"),),
        ("awq",),
        ("transformers:AwqConfig", "graftlet.weights.awq:AWQ"),
        command="pip install --no-deps autoawq zstandard",
    ),
    Feature(
        "eetq",
        "EETQ, whose kernels transformers loads",
        (*TRANSFORMERS, needs("kernels", ">=0.4")),
        ("kernels",),
        ("transformers:EetqConfig", "graftlet.weights.eetq:EETQ"),
        cuda,
    ),
)
