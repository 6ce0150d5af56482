"""What PEFT was told to do with its adapters: values put in place of parameters count only while it still does it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from bayeslora.errors import AdapterError
from bayeslora.observations.soft_prompts import virtual_tokens

__all__ = ["Switches"]

CHANGED = "The network was changed through PEFT after the program was made"


class Switches:
    """The modules that PEFT can tell to use another adapter or none, and what it had told them when this was made.

    Args:
        network: a `peft.PeftModel`, or a network without PEFT, of which there is nothing to check.
        adapter: name of the active adapter; None without PEFT.
    """

    def __init__(self, network: nn.Module, adapter: str | None) -> None:
        self._network: Any = network
        self._adapter = adapter
        self._switches = [_Switch(network, path, module, adapter) for path, module in _modules(network)]

    def check(self) -> None:
        """Make sure that nothing has changed.

        Raises:
            AdapterError: PEFT was told to use another adapter or none, or has merged this one.
        """
        for switch in self._switches:
            switch.check()
        # A learned prompt is read by the whole network, and no module switches it.
        if virtual_tokens(self._network) and self._network.active_adapter != self._adapter:
            raise AdapterError(
                f"{CHANGED}: it reads the prompt of '{self._network.active_adapter}': call "
                f"network.set_adapter('{self._adapter}')."
            )


def _modules(network: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for path, module in network.named_modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            yield path, module


class _Switch:
    """A module of PEFT, and what it did with its adapters."""

    def __init__(self, network: nn.Module, path: str, module: Any, adapter: str | None) -> None:
        self.path, self.adapter = path, adapter
        self.module: Any = module
        owner, _, self.leaf = path.rpartition(".")
        self.siblings: Any = network.get_submodule(owner)._modules
        self.active = self.module._active_adapter
        self.scaling = dict(getattr(self.module, "scaling", {}))

    def check(self) -> None:
        """Make sure that it still does.

        Raises:
            AdapterError: it does not.
        """
        module, found = self.module, None
        if module._disable_adapters:
            found = "has its adapters disabled: call network.base_model.enable_adapter_layers()"
        elif self.siblings.get(self.leaf) is not module:
            found = "is not part of it any more (unload)"
        elif getattr(module, "merged_adapters", None):
            found = "has an adapter merged into its base weight: call network.unmerge_adapter()"
        elif module._active_adapter is not self.active and _names(module._active_adapter) != _names(self.active):
            found = f"uses {_names(module._active_adapter)}: call network.set_adapter('{self.adapter}')"
        elif self.scaling and module.scaling.get(self.adapter) != self.scaling.get(self.adapter):
            found = f"multiplies by {module.scaling.get(self.adapter)}, and did by {self.scaling[self.adapter]}"
        if found:
            raise AdapterError(f"{CHANGED}: layer '{self.path}' {found}.")


def _names(active: Any) -> list[str]:
    return [active] if isinstance(active, str) else list(active)
