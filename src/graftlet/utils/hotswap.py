# SPDX-License-Identifier: Apache-2.0
"""The reference's place of hotswapping; `graftlet.serve.hotswap` has it."""

from ..serve.hotswap import check_hotswap_configs_compatible as check_hotswap_configs_compatible
from ..serve.hotswap import hotswap_adapter as hotswap_adapter
from ..serve.hotswap import hotswap_adapter_from_state_dict as hotswap_adapter_from_state_dict
from ..serve.hotswap import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap
