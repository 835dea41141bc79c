"""Change the training or eval mode of a model's parts temporarily."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def eval_mode(model: object) -> Iterator[None]:
    """Switch a model to eval mode; afterwards restore the mode of every part, so frozen parts stay in eval mode.

    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with eval_mode(model):
    ...     inside = [part.training for part in model]
    >>> inside, [part.training for part in model]
    ([False, False], [True, False])
    """
    parts = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [part.training for part in parts]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
