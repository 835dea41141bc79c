"""Build the data module of an experiment without its model."""

from __future__ import annotations

from collections.abc import Sequence

from descant.cli.arguments import Request
from descant.cli.catalogue import find
from descant.cli.errors import Refusal, fail
from descant.cli.main import DescantCLI
from descant.cli.quiet import quieten
from descant.cli.trust import enforce
from descant.datamodules.base import DataModule
from descant.run.faults import explain


class _DataOnly(DescantCLI):
    """Parses and checks a configuration as ``descant check`` does, and builds only its data module."""

    def before_instantiate_classes(self) -> None:
        """Skip the run folder: nothing is run."""

    def instantiate_classes(self) -> None:
        parser = self._parser(self.subcommand)
        self.datamodule = parser.instantiate_classes(self.options.clone()).data

    def _run_subcommand(self, subcommand: str) -> None:
        """Skip the subcommand: nothing is run."""


def datamodule(configs: Sequence[str], options: Sequence[tuple[str, str]], trust: Sequence[str]) -> DataModule:
    """Build and prepare the data module of ``--config NAME ... --data.KEY value``."""
    quieten()
    enforce(list(trust))
    request = Request("check", [find(name) for name in configs], list(options), list(trust))
    try:
        data = _DataOnly(request).datamodule
        if not isinstance(data, DataModule):
            fail(f"--config {configs[0]}: {type(data).__name__} is not a Descant data module")
        data.prepare_data()
        data.setup("fit")
    except Refusal:
        raise
    except Exception as error:
        line = explain(error, building=True, trust=trust)
        if line is None:
            raise
        raise Refusal(line) from error
    return data
