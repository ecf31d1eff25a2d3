"""What a run gave: the quantized network, its encodings, what was found, and the files."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pow2quant import run_folder
from pow2quant.artifact import Agreement, Table
from pow2quant.backends.state import keep
from pow2quant.frontends.returned import returning
from pow2quant.report import summary
from pow2quant.runs import exporting
from pow2quant.runs.simulating import Simulated


@dataclass(frozen=True)
class Verdict:
    """What a run came to, in one sentence; true when nothing is wrong.

    agrees: no executor differs in a single element. kept: the quality is that of the float network, as far as the data
    can tell; None: that was not judged.
    """

    agrees: bool
    kept: bool | None
    text: str

    def __str__(self) -> str:
        return self.text

    def __bool__(self) -> bool:
        return self.agrees and self.kept is not False


@dataclass(frozen=True, repr=False)
class Result:
    """A finished run.

    folder: with its files; of `quantize` without an output a temporary one, which goes with this object. report: what
    report.json holds. simulation: the quantized network, which can be trained, calibrated again and exported.
    """

    folder: Path
    report: dict[str, Any]
    agreements: tuple[Agreement, ...]
    simulation: Simulated
    keeps: Any = None

    @property
    def agrees(self) -> bool:
        """Whether not a single element differs."""
        return all(a.agrees for a in self.agreements)

    @property
    def verdict(self) -> Verdict:
        """Whether executors agree, and whether the quality was kept."""
        found = self.report["verdict"]
        return Verdict(found["agrees"], {"kept": True, "lost": False}.get(found["quality"]), found["text"])

    @property
    def model(self) -> nn.Module:
        """The quantized network as a module: it takes float32 tensors and computes what the files do.

        It returns what the float network does: a dictionary, a named tuple, the same tensor twice. Its `state_dict()`
        holds the encodings, too.
        """
        keep(self.simulation.model)
        return returning(self.simulation.model)

    @property
    def encodings(self) -> Table:
        """Every tensor's encoding, by name."""
        return self.simulation.encodings()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Copies the run's files into a folder of their own; returns it.

        Raises OutputError for a folder that holds something, unless it is a run and `overwrite` is set.
        """
        target = run_folder.path_of(folder)
        with run_folder.staged(target, overwrite) as staging:
            shutil.copytree(self.folder, staging, dirs_exist_ok=True)
        return target

    def export(self, form: str, folder: str | Path | None = None, *, overwrite: bool = False) -> Path:
        """Writes a further format, such as "c" or "aimet-2.0.0", into a folder (default: `export/<form>` of the run's).

        Returns what was written. Raises ConfigError, with the known formats, for another one.
        """
        (written,) = exporting.export(self.folder, form, folder, overwrite=overwrite)
        return written

    def __repr__(self) -> str:
        return summary.text(self.report, self.folder)

    def _repr_html_(self) -> str:
        return summary.html(self.report, self.folder)
