# SPDX-License-Identifier: Apache-2.0
"""How a weight is kept: plain here; one small file a quantised back end, found by the type's name.

`BACKENDS` names the classes of modules, or of weight tensors, that each back end answers for. So nothing is imported to
find out that a layer is not one of its own, and a back end that is half installed breaks nobody who does not use it.
A back end's file may import it at its top: it is loaded once a layer of its kind is met.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import DependencyError
from ..requirements import REQUIREMENTS
from .whole import in_parts, in_use, own_part, put, put_part, shape_of, whole_of

WIDE = 2
"""Bytes that a number has at least in a dtype that anything is computed in."""


class Storage:
    """Plain tensors, and what every back end answers.

    `module` is a layer and `name` what its weight is called, "weight" on all layers of back ends. A back end overrides
    what differs: `tensor` where the packed weight has another name; `shape` and `dtype` where they are not the packed
    tensor's; `read`, and `pack` or `write`; `save`, `restore` and `recall` where the bits are more than one tensor.

    backend: what it is called in tables and messages; "" for plain tensors.
    """

    backend: ClassVar[str] = ""
    exact: ClassVar[bool] = True
    """What is written is kept to the bit, in the weight's dtype."""

    # what is there

    def tensor(self, module: nn.Module, name: str) -> Tensor:
        """The tensor as kept, which may be packed: it tells the device, and which layers share it."""
        return getattr(module, name)

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        """The weight's shape in the layer's own layout: `[out, in]` for a linear layer, however it is packed."""
        return shape_of(self.tensor(module, name))

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        """What the layer computes in, and what `read` gives: single precision where numbers of one byte are kept."""
        kept = self.tensor(module, name).dtype
        return kept if kept.is_floating_point and kept.itemsize >= WIDE else torch.float32

    # what can be done

    def unusable(self, module: nn.Module) -> str | None:
        """Why no adapter can stand on this module, as the end of a sentence; None where one can."""
        return None

    def unreadable(self, module: nn.Module, name: str) -> str | None:
        """Why the weight cannot be read, as the end of a sentence; None where it can."""
        return None

    def unwritable(self, module: nn.Module, name: str) -> str | None:
        """Why another weight cannot be kept, as the end of a sentence; None where it can."""
        return self.unreadable(module, name)

    def computes_in(self, module: nn.Module, name: str) -> torch.dtype | None:
        """In what dtype calling a linear layer is a product with what is read, its output brought back to the input's.

        None where a call is something else, or that is not known.
        """
        return None

    def can_read(self, module: nn.Module, name: str = "weight") -> bool:
        return self.unreadable(module, name) is None

    def can_write(self, module: nn.Module, name: str = "weight") -> bool:
        return self.unwritable(module, name) is None

    # the weight

    def read(self, module: nn.Module, name: str) -> Tensor:
        """The weight as an ordinary floating-point tensor, `shape` and `dtype` as above. It may share what is kept."""
        return in_use(getattr(module, name))

    def beside(self, module: nn.Module, name: str, tensor: Tensor) -> Tensor:
        """Another tensor of the module, its bias, as it can be read and written."""
        return tensor

    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Keep `value` in place of the weight, rounded to the kept precision, on the kept device."""
        put(getattr(module, name), value)

    def allowed(self, module: nn.Module, name: str, meant: Tensor) -> Tensor:
        """How far off each element of what is read may be after `meant` was written; it broadcasts to the weight."""
        return meant.abs() * torch.finfo(self.dtype(module, name)).eps

    # its bits

    def save(self, module: nn.Module, name: str) -> Any:
        """All that `restore` needs to bring back the very bits, sharing nothing with what is kept."""
        value = getattr(module, name, None)
        return None if value is None else own_part(value)

    def restore(self, module: nn.Module, name: str, saved: Any) -> None:
        """Bring back what `save` saw, on the device that the layer is on now."""
        if saved is not None:
            put_part(getattr(module, name), saved)

    def recall(self, module: nn.Module, name: str, saved: Any) -> Tensor:
        """What `read` would have given when `saved` was made, without changing anything."""
        return whole_of(getattr(module, name), saved)


class Packed(Storage):
    """The base of quantised back ends. A subclass gives `backend`, `shape`, `dtype`, `read`, `write`, `save`, `restore`.

    `allowed` follows from how it rounds (see `rounded`). Reading what was saved is restoring it for a moment, unless the
    subclass knows better.
    """

    exact = False

    def unwritable(self, module: nn.Module, name: str) -> str | None:
        if in_parts(self.tensor(module, name)):
            return "its packed numbers are in parts, one a process; load the adapter into a base that is whole, and merge there"
        return super().unwritable(module, name)

    def read(self, module: nn.Module, name: str) -> Tensor:
        raise NotImplementedError

    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        raise NotImplementedError

    def allowed(self, module: nn.Module, name: str, meant: Tensor) -> Tensor:
        return rounded(meant, 1 / 3)  # as coarse as two bits are

    def save(self, module: nn.Module, name: str) -> Any:
        raise NotImplementedError

    def restore(self, module: nn.Module, name: str, saved: Any) -> None:
        raise NotImplementedError

    def recall(self, module: nn.Module, name: str, saved: Any) -> Tensor:
        now = self.save(module, name)
        try:
            self.restore(module, name, saved)
            return self.read(module, name)
        finally:
            self.restore(module, name, now)


class Fixed(Packed):
    """The base of back ends whose weights cannot be written, so that there is nothing to bring back. See `unwritable`."""

    why: ClassVar[str] = "its numbers are chosen and packed by a tool of its own"

    def unwritable(self, module: nn.Module, name: str) -> str | None:
        return (
            f"{self.why}; merge with dequantize=True, or merge into the model that it was made from and quantise that"
        )

    def save(self, module: nn.Module, name: str) -> None:
        return None

    def restore(self, module: nn.Module, name: str, saved: None) -> None:
        pass


class Wrapped(Packed):
    """A weight that is one tensor of a class of the back end's own. A subclass gives `backend` and `requantised`."""

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        return self.tensor(module, name).dtype

    def read(self, module: nn.Module, name: str) -> Tensor:
        return _dense(self.tensor(module, name))

    def requantised(self, module: nn.Module, like: Any, value: Tensor) -> Tensor:
        """`value` quantised as the tensor `like` of the back end's class is."""
        raise NotImplementedError

    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        like = self.tensor(module, name)
        given = value.detach().to(like.device, like.dtype).contiguous()
        with torch.no_grad():
            self._hold(module, name, self.requantised(module, like, given))

    def save(self, module: nn.Module, name: str) -> Any:
        return cloned(self.tensor(module, name).detach())

    def restore(self, module: nn.Module, name: str, saved: Any) -> None:
        self._hold(module, name, cloned(saved.to(self.tensor(module, name).device)))

    def recall(self, module: nn.Module, name: str, saved: Any) -> Tensor:
        return _dense(saved)

    def _hold(self, module: nn.Module, name: str, value: Tensor) -> None:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)


def _dense(tensor: Any) -> Tensor:
    with torch.no_grad():
        return tensor.detach().dequantize()


def cloned(tensor: Any) -> Any:
    """A copy of a tensor of a special class, part by part: such classes need not know how to be copied themselves."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.detach().clone()
    names, context = tensor.__tensor_flatten__()
    parts: Any = {n: None if (part := getattr(tensor, n)) is None else cloned(part) for n in names}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())


def rounded(meant: Tensor, half: float, block: int = 0, slack: float = 0.0) -> Tensor:
    """How far rounding may move each element of a matrix `[out, in]`.

    half: half the widest gap between two neighbouring levels, as a share of the largest number that shares a scale.
    block: how many numbers in a row share a scale, a whole row for 0; runs that do not divide a row go on in the next.
    slack: for the rounding of scales, and of the number type computed in, as a share of the largest number of all.
    """
    block = block or meant.shape[-1]
    flat = meant.detach().abs().flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    peaks = padded.amax(1, keepdim=True).expand_as(padded).flatten()[: len(flat)]
    return peaks.view(meant.shape) * half + flat.max() * slack


PLAIN = Storage()

_BNB, _TORCHAO, _QUANTO, _GPTQ, _AWQ, _FP8, _EXPERTS = (
    f"graftlet.weights.{file}" for file in ("bnb", "torchao", "quanto", "gptq", "awq", "fp8", "experts")
)

BACKENDS: dict[str, str] = {
    "bitsandbytes.nn.modules.Linear4bit": f"{_BNB}:FOUR_BIT",
    "bitsandbytes.nn.modules.Params4bit": f"{_BNB}:FOUR_BIT",
    "bitsandbytes.nn.modules.Linear8bitLt": f"{_BNB}:EIGHT_BIT",
    "torchao.utils.TorchAOBaseTensor": f"{_TORCHAO}:TORCHAO",
    "torchao.dtypes.affine_quantized_tensor.AffineQuantizedTensor": f"{_TORCHAO}:TORCHAO",
    "torchao.quantization.linear_activation_quantized_tensor.LinearActivationQuantizedTensor": f"{_TORCHAO}:TORCHAO",
    "optimum.quanto.nn.qmodule.QModuleMixin": f"{_QUANTO}:QUANTO",
    "optimum.quanto.tensor.qtensor.QTensor": f"{_QUANTO}:QUANTO",
    "hqq.core.quantize.HQQLinear": "graftlet.weights.hqq:HQQ_LAYERS",
    "gptqmodel.nn_modules.qlinear.BaseQuantLinear": f"{_GPTQ}:GPTQ_LAYERS",
    "gptqmodel.nn_modules.qlinear.AWQuantLinear": f"{_AWQ}:AWQ_LAYERS",
    "gptqmodel.nn_modules.qlinear.WeightOnlyQuantLinear": "graftlet.weights.probed:OTHER",
    **{f"auto_gptq.nn_modules.qlinear.qlinear_{kernel}.QuantLinear": f"{_GPTQ}:GPTQ_LAYERS" for kernel in
       ("cuda", "cuda_old", "exllama", "exllamav2", "hpu", "ipex", "marlin", "qigen", "triton", "tritonv2")},
    **{f"awq.modules.linear.{kind}": f"{_AWQ}:AWQ_LAYERS" for kind in
       ("gemm.WQLinear_GEMM", "gemv.WQLinear_GEMV", "gemv_fast.WQLinear_GEMVFast", "exllama.WQLinear_Exllama",
        "exllamav2.WQLinear_ExllamaV2", "marlin.WQLinear_Marlin")},
    "aqlm.inference.QuantizedLinear": "graftlet.weights.aqlm:AQLM_LAYERS",
    "transformers.integrations.eetq.EetqLinear": "graftlet.weights.eetq:EETQ_LAYERS",
    "eetq.modules.qlinear.EetqLinear": "graftlet.weights.eetq:EETQ_LAYERS",
    "transformers.integrations.finegrained_fp8.FP8Linear": f"{_FP8}:BLOCKS",
    "transformers.integrations.fbgemm_fp8.FbgemmFp8Linear": f"{_FP8}:SCALED",
    "transformers.integrations.compressed_tensors.CompressedTensorsFP8Linear": f"{_FP8}:SCALED",
    "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules.PatchedLinear":
        f"{_FP8}:PATCHED",
    "transformers.integrations.nvfp4.NVFP4Linear": "graftlet.weights.fp4:NVFP4_LINEAR",
    "transformers.integrations.mxfp4.Mxfp4GptOssExperts": f"{_EXPERTS}:MXFP4",
    "transformers.integrations.finegrained_fp8.FP8Experts": f"{_EXPERTS}:FP8",
    "transformers.integrations.fbgemm_fp8.FbgemmFp8Llama4TextExperts": f"{_EXPERTS}:FBGEMM",
    "compressed_tensors.quantization.quant_scheme.QuantizationScheme": "graftlet.weights.compressed:COMPRESSED",
    "graftlet.weights.unread.Unread": "graftlet.weights.unread:UNREAD",
}  # fmt: skip
"""Qualified class name (of the module, or of its weight tensor) -> 'module:attribute' of the Storage to import.

A class of modules named here that derives from no layer of torch's is a linear layer with `in_features` and `out_features`.
"""

_OFFLOADED = "graftlet.weights.offloaded:OFFLOADED"
"""What accelerate keeps elsewhere between calls."""

MARKS = ("quantization_scheme",)
"""Attributes of an ordinary layer that tell its back end, by their type, and that its wrappers do not pass on."""


def storage_of(module: nn.Module, name: str = "weight") -> Storage:
    """The storage that keeps `module`'s weight, by the type of the module or of the weight tensor."""
    if (home := _home(type(module)) or _marked(module)) is not None:
        return _load(home)
    held: Any = module._parameters.get(name)
    if type(held) is nn.Parameter:
        return _load(_OFFLOADED) if held.is_meta and "_hf_hook" in module.__dict__ else PLAIN
    home = _home(type(getattr(module, name, None) if held is None else held))
    return PLAIN if home is None else _load(home)


def packed(module: nn.Module) -> bool:
    """Whether a module is a quantised back end's own kind of layer."""
    return _home(type(module)) is not None


def unusable(module: nn.Module) -> str | None:
    """Why no adapter can stand on a back end's module, as the end of a sentence; None for any other."""
    home = _home(type(module))
    return None if home is None else _load(home).unusable(module)


def _marked(module: nn.Module) -> str | None:
    for mark in MARKS:
        if mark in module.__dict__ and (home := _home(type(module.__dict__[mark]))) is not None:
            return home
    return None


def qualified(kind: type) -> str:
    """The name by which a class is found without importing it."""
    return f"{kind.__module__}.{kind.__qualname__}"


@functools.lru_cache(maxsize=4096)
def _home(kind: type) -> str | None:
    for base in kind.__mro__:  # no generator: compilers follow this
        if (home := BACKENDS.get(qualified(base))) is not None:
            return home
    return None


@functools.cache
def _load(home: str) -> Storage:
    """A back end, imported. Raises `DependencyError` where its package is too old, or only half there."""
    place, _, attribute = home.partition(":")
    needed = REQUIREMENTS.get(place.rpartition(".")[2])
    if needed is not None:
        needed.check()
    try:
        return getattr(importlib.import_module(place), attribute)
    except ImportError as error:
        if needed is None:
            raise
        raise DependencyError(
            f"{needed.package} {needed.found} cannot be imported as {needed.feature} needs it: {error}. {needed.command}"
        ) from error
