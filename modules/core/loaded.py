"""Whether a part of a model has loaded weights or still its initial ones."""

from __future__ import annotations

from typing import Any

from torch import nn


class Loadable(nn.Module):
    """Base of towers and language models. It remembers whether weights were loaded, alone or with its recipe.

    >>> class Part(Loadable): ...
    >>> part = Part()
    >>> has_loaded_weights(part), str(part.load_state_dict({})), has_loaded_weights(part)
    (False, '<All keys matched successfully>', True)
    """

    loaded = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.loaded = True


def has_loaded_weights(module: nn.Module) -> bool:
    """Return whether weights were loaded into a module or a part of it. If not, only this run trains them."""
    return any(getattr(part, "loaded", False) is True for part in module.modules())
