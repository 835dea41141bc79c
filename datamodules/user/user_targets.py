"""Targets of user data: classes by their names, and numbers in their own unit.

Letters: N samples of a source, C classes, P prompts per class, T tokens.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.fields.fields import LabelField, NumberField, mean_and_deviation
from descant.datamodules.user.user_table import UserTable


class UserTargets(UserTable):
    """Base of :class:`UserData` for targets, which its fields call labels."""

    @property
    def _labels(self) -> dict[str, LabelField]:
        return self.given.labels if self.given is not None else {}

    @property
    def _numbers(self) -> dict[str, NumberField]:
        return self.given.numbers if self.given is not None else {}

    @cached_property
    def classes(self) -> dict[str, list[str]]:
        """Return target -> its classes in the order of their numbers."""
        classes = {}
        for target, field in self._labels.items():
            names = {text.strip() for source in self.sources.values() for text in source.texts(field.field) if text}
            classes[target] = field.classes or sorted(names)
        return classes

    @cached_property
    def target_values(self) -> dict[str, dict[str, np.ndarray]]:
        """Return target -> source -> class number (int64, -1: none) or number (float32, nan: none) of each sample."""
        values: dict[str, dict[str, np.ndarray]] = {}
        for name, source in self.sources.items():
            for target, label in self._labels.items():
                texts = source.texts(label.field)
                values.setdefault(target, {})[name] = label.numbers(texts, self.classes[target], source.place)
            for target, number in self._numbers.items():
                values.setdefault(target, {})[name] = number.numbers(source.texts(number.field), source.place)
        return values

    def number_scale(self, target: str) -> tuple[float, float] | None:
        """Measure the mean and standard deviation of a number over the training split; None without number or split."""
        if target not in self._numbers or "train" not in self.splits:
            return None
        name, row_N = self.splits["train"]
        place = f"{self.sources[name].place(0)}: {self._numbers[target].field}"
        return mean_and_deviation(self.target_values[target][name][row_N], place)

    def prompts(self, target: str) -> tuple[Tensor, list[str]]:
        if target not in self._labels:
            raise ValueError(
                f"target: {target!r} is not one of {', '.join(self._labels) or 'the labels: there are none'}"
            )
        if self.tokenizer is None:
            raise ValueError(f"target: {target!r}: prompts are texts, and this data has no text field")
        forms, names = self._labels[target].prompts, self.classes[target]
        words = [name.replace("_", " ").replace("-", " ") for name in names]
        return torch.stack([self.tokenizer([form.format(name) for form in forms]) for name in words]), names
