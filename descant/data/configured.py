"""The data module of an experiment, built without its model."""

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
    """Parsed and checked as ``descant check`` does; of what is configured, only the data is built."""

    def before_instantiate_classes(self) -> None:
        """No run folder: nothing is run."""

    def instantiate_classes(self) -> None:
        parser = self._parser(self.subcommand)
        self.datamodule = parser.instantiate_classes(self.options.clone()).data

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing to run."""


def datamodule(configs: Sequence[str], options: Sequence[tuple[str, str]], trust: Sequence[str]) -> DataModule:
    """The data module that ``--config NAME ... --data.KEY value`` means, ready to be read.

    Raises:
        Refusal: in one line, for whatever is wrong with the configuration.
    """
    quieten()
    enforce(list(trust))
    request = Request("check", [find(name) for name in configs], list(options), list(trust))
    try:
        data = _DataOnly(request).datamodule
        if not isinstance(data, DataModule):
            fail(f"--config {configs[0]}: its data is a {type(data).__name__}, which cannot be read by position")
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
