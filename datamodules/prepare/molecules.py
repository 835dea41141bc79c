"""Read the molecules of the National Cancer Institute's list that rdkit ships, and describe each one.

rdkit (the extra ``molecules``) is imported when a molecule is described. Letters: N molecules, K spellings, W bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

#: The list, below rdkit's folder of data.
_LIST = Path("NCI") / "first_5K.smi"


@dataclass(frozen=True)
class Described:
    """N molecules, each once.

    Attributes:
        smiles: the canonical spelling. spellings: K random ones of each.
        scaffold: Murcko's, the rings and the links between them; for a molecule without a ring, its own spelling.
        bits_NW: uint8, Morgan's fingerprint. numbers: name -> float32 ``[N]``.
        unread: lines of the list that are no molecule.
    """

    smiles: list[str]
    spellings: list[list[str]]
    scaffold: list[str]
    bits_NW: np.ndarray
    numbers: dict[str, np.ndarray]
    unread: list[str]


def require_rdkit() -> None:
    """Raise ValueError if rdkit is not installed."""
    if find_spec("rdkit") is None:
        raise ValueError("Molecules: the package rdkit is missing; pip install 'descant[molecules]'")


def list_file() -> Path:
    """Return the file of about 5,000 molecules in rdkit's own folder of data."""
    require_rdkit()
    from rdkit import RDConfig

    return Path(RDConfig.RDDataDir) / _LIST


def read_list(file: Path) -> list[str]:
    """Read the first word of each line, a SMILES."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
    return [line.split()[0] for line in lines if line.strip()]


def describe(smiles: Sequence[str], spellings: int, bits: int, radius: int = 2) -> Described:
    """Compute spellings, fingerprint, scaffold and numbers of each different molecule, in the order of the list.

    ``logp`` is Crippen's estimate of the octanol-water partition coefficient (Wildman 1999), a sum over atoms;
    ``tpsa`` is the topological polar surface in square angstroms (Ertl 2000). Random spellings have a fixed seed.
    """
    require_rdkit()
    from rdkit import Chem
    from rdkit.Chem import rdFingerprintGenerator, rdMolDescriptors
    from rdkit.Chem.Scaffolds import MurckoScaffold
    from rdkit.rdBase import BlockLogs

    with BlockLogs():  # rdkit prints each line that is no molecule
        read = [(text, Chem.MolFromSmiles(text)) for text in smiles]
    unread = [text for text, molecule in read if molecule is None]
    molecules = {Chem.MolToSmiles(molecule): molecule for _, molecule in reversed(read) if molecule is not None}
    names = list(molecules)[::-1]
    each = [molecules[name] for name in names]
    morgan = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=bits)
    return Described(
        smiles=names,
        spellings=[list(Chem.MolToRandomSmilesVect(m, spellings, randomSeed=1)) if spellings else [] for m in each],
        scaffold=[MurckoScaffold.MurckoScaffoldSmiles(mol=m) or name for m, name in zip(each, names, strict=True)],
        bits_NW=np.stack([morgan.GetFingerprintAsNumPy(m) for m in each]).astype(np.uint8),
        numbers={
            "logp": np.array([rdMolDescriptors.CalcCrippenDescriptors(m)[0] for m in each], dtype=np.float32),
            "tpsa": np.array([rdMolDescriptors.CalcTPSA(m) for m in each], dtype=np.float32),
        },
        unread=unread,
    )
