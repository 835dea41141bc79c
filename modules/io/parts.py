"""A checkpoint of several parts: one safetensors file for each rank, and a JSON index that puts them together.

The index is the checkpoint's file, ``step-0000500.ckpt``. It holds plain values (:mod:`descant.modules.io.plain_json`),
and the name of each tensor in its place. A folder beside it holds one file per rank, ``rank-00000.safetensors``. The
header of a part lists the box of the whole tensor that its elements fill, so any number of ranks can read it::

    box of a rank = offset .. offset + shape of its elements,    boxes of all ranks = the whole, each element once

torch's distributed checkpoint has such boxes too, but lists them in a pickle.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from descant.modules.core.compat.dtensor import local_shape_and_offset
from descant.modules.io import plain_json
from descant.modules.io.part_files import fault_of_parts

#: Version of the layout; an index begins with it.
FORMAT = 1
#: Key in a part's header that holds the boxes of its tensors: name -> [offset, shape of the whole].
_BOXES = "boxes"
_DTYPES = {
    **dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, C64=torch.complex64),
    **dict(I64=torch.int64, I32=torch.int32, I16=torch.int16, I8=torch.int8, BOOL=torch.bool),
    **dict(U64=torch.uint64, U32=torch.uint32, U16=torch.uint16, U8=torch.uint8),
    **dict(F8_E4M3=torch.float8_e4m3fn, F8_E5M2=torch.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Box = tuple[tuple[int, ...], tuple[int, ...]]


class Piece(NamedTuple):
    """This rank's elements of a tensor.

    Attributes:
        tensor: the elements. shape: of the whole tensor. offset: of the first element, in each dimension.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


class Name(str):
    """Name of a tensor, in its place in the content of an index."""


def name_of(rank: int) -> str:
    """Return the file name of a rank's part.

    >>> name_of(3)
    'rank-00003.safetensors'
    """
    return f"rank-{rank:05d}.safetensors"


def split(state: Mapping[str, Any], first: bool = True) -> tuple[Any, dict[str, Piece], set[str]]:
    """Split a checkpoint into plain values, this rank's pieces of its tensors, and the names of all tensors.

    A tensor that is split over ranks (DTensor) has a piece on each rank that holds elements; of replicas, only on the
    first. Any other tensor has one piece, on the first rank. Tensors that share memory share a name.

    Args:
        first: whether this is rank 0, which writes the tensors that are not split.

    >>> tree, pieces, names = split({"w": torch.ones(2, 3), "step": 4})
    >>> tree, pieces["w"].offset, names
    ({'w': {'$tensor': 'w'}, 'step': 4}, (0, 0), {'w'})
    """
    pieces: dict[str, Piece] = {}
    by_memory: dict[object, str] = {}
    names: set[str] = set()

    def key_of(tensor: Tensor, place: str) -> str:
        piece, mine = _piece(tensor, place, first)
        local = piece.tensor
        memory = (local.device, local.data_ptr(), local.dtype, local.shape, local.stride(), piece.shape, piece.offset)
        if local.numel() and memory in by_memory:
            return by_memory[memory]
        while place in names:
            place += "'"
        names.add(place)
        if local.numel():
            by_memory[memory] = place
        if mine and (local.numel() or (first and not math.prod(piece.shape))):
            pieces[place] = piece
        return place

    return plain_json.encode(dict(state), key_of), pieces, names


def _piece(tensor: Tensor, place: str, first: bool) -> tuple[Piece, bool]:
    """Return this rank's piece, and whether this rank writes it."""
    mine = first
    piece = Piece(tensor.detach(), tuple(tensor.shape), (0,) * tensor.ndim)
    if isinstance(tensor, DTensor):
        mesh, placements = tensor.device_mesh, tensor.placements
        odd = next((p for p in placements if type(p) not in (Shard, Replicate)), None)
        if odd is not None:
            raise ValueError(f"{place}: placed as {odd}: only whole and evenly split tensors are saved in parts")
        _, offset = local_shape_and_offset(tensor.shape, mesh, placements)
        at = mesh.get_coordinate()
        mine = at is not None and not any(c for c, p in zip(at, placements, strict=True) if isinstance(p, Replicate))
        piece = Piece(tensor.to_local().detach(), tuple(tensor.shape), tuple(offset))
    local = piece.tensor
    if type(local) not in (Tensor, nn.Parameter) or local.layout != torch.strided or local.dtype not in _NAMES:
        raise ValueError(f"{place}: {type(local).__name__} of {local.dtype}, {local.layout}: not saved in parts")
    return piece, mine


def write(stream: Any, pieces: Mapping[str, Piece]) -> None:
    """Write pieces in CPU memory as a safetensors file, without the copy of them that ``safetensors.save`` makes."""
    boxes = {name: [list(piece.offset), list(piece.shape)] for name, piece in pieces.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _BOXES: json.dumps(boxes)}}
    order = sorted(pieces, key=lambda name: -pieces[name].tensor.element_size())  # aligns each to its element size
    end = 0
    for name in order:
        tensor = pieces[name].tensor
        begin, end = end, end + tensor.numel() * tensor.element_size()
        dtype = _NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)
    for name in order:
        if pieces[name].tensor.numel():
            stream.write(pieces[name].tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def index(tree: Any, files: Sequence[Mapping[str, Any]]) -> bytes:
    """Return an index: ``tree`` of :func:`split`, and ``name`` (relative), ``sha256`` and ``size`` of each part."""
    return json.dumps({"descant_parts": FORMAT, "files": list(files), "content": tree}).encode()


class PartTable:
    """Table of the tensors in the parts of a checkpoint.

    Args:
        files: the files of the parts.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._parts: list[Any] = []
        self._boxes: dict[str, list[tuple[int, Box]]] = {}  # name -> (part, offset and shape) of its pieces
        self._whole: dict[str, tuple[tuple[int, ...], str]] = {}  # name -> shape and dtype
        for n, file in enumerate(files):
            try:
                part = safe_open(file, "pt")
                boxes = json.loads(part.metadata()[_BOXES])
                self._parts.append(part)
                for name in part.keys():  # noqa: SIM118  # not a mapping
                    piece = part.get_slice(name)
                    self._add(n, name, boxes[name], tuple(piece.get_shape()), piece.get_dtype())
            except (OSError, SafetensorError, TypeError, KeyError, ValueError, RecursionError) as error:
                raise ValueError(f"{file}: not a part of a checkpoint ({str(error)[:200]})") from None

    def _add(self, n: int, name: str, box: Any, size: tuple[int, ...], dtype: str) -> None:
        offset, shape = (tuple(map(int, numbers)) for numbers in box)
        whole = self._whole.setdefault(name, (shape, dtype))
        if whole != (shape, dtype) or not len(offset) == len(shape) == len(size):
            raise ValueError(f"{name} is {list(shape)} of {dtype} here and {list(whole[0])} of {whole[1]} elsewhere")
        if any(a < 0 or a + b > c for a, b, c in zip(offset, size, shape, strict=True)):
            raise ValueError(f"{name}: a box outside of {list(shape)}")
        self._boxes.setdefault(name, []).append((n, (offset, size)))

    def require_whole(self, names: Iterable[str]) -> None:
        """Raise ValueError for a tensor whose elements are missing or in two parts, and for parts of other tensors.

        Only sizes are added up. Boxes could overlap unnoticed only if others leave a gap, which no split over a mesh
        makes.
        """
        names = set(names)
        for name in sorted(names | self._whole.keys()):
            if name not in self._whole:
                raise ValueError(f"{name} is in no part")
            if name not in names:
                raise ValueError(f"{name} is in a part, and not in the index")
            held = sum(math.prod(size) for _, (_, size) in self._boxes[name])
            if held != math.prod(self._whole[name][0]):
                raise ValueError(f"{name}: the parts hold {held:,} of {math.prod(self._whole[name][0]):,} numbers")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._whole[name][0]

    def assemble(self, name: str) -> Tensor:
        """Assemble the whole tensor of a name."""
        shape = self.shape(name)
        return self.box(name, (0,) * len(shape), shape)

    def box(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Read a box of a tensor, and only its elements."""
        pieces, dtype = self._boxes[name], _DTYPES[self._whole[name][1]]
        for n, (begin, size) in pieces:
            if begin == tuple(offset) and size == tuple(shape):
                found: Tensor = self._parts[n].get_tensor(name)
                return found
        result = torch.empty(tuple(shape), dtype=dtype)
        for n, (begin, size) in pieces:
            low = [max(a, b) for a, b in zip(offset, begin, strict=True)]
            high = [min(a + s, b + t) for a, s, b, t in zip(offset, shape, begin, size, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                there = tuple(slice(a - b, c - b) for a, b, c in zip(low, begin, high, strict=True))
                here = tuple(slice(a - b, c - b) for a, b, c in zip(low, offset, high, strict=True))
                result[here] = self._parts[n].get_slice(name)[there]
        return result


class Parted:
    """An open checkpoint of several parts: plain values with a :class:`Name` in place of each tensor, and the parts.

    Args:
        path: of the index. :mod:`descant.modules.io.manifest` checks whether its bytes and those of the parts are as
            written.
    """

    def __init__(self, path: Path) -> None:
        names: set[str] = set()

        def named(name: Any) -> Name:
            names.add(str(name))
            return Name(name)

        self.path = path
        try:
            record = json.loads(path.read_bytes())
            if record["descant_parts"] != FORMAT:
                raise ValueError(f"layout {record['descant_parts']}, and this version reads {FORMAT}")
            self.content: dict[str, Any] = plain_json.decode(record["content"], named)
            self.files: list[dict[str, Any]] = record["files"]
            places = [place_of(path, file["name"]) for file in self.files]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read as a checkpoint of several parts ({str(error)[:200]})") from None
        if (why := fault_of_parts(path, {"facts": {"parts": self.files}}, read=False)) is not None:
            raise ValueError(f"{path}: {why}")
        self.table = PartTable(places)
        try:
            self.table.require_whole(names)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def fill(self, value: Any, device: Any = "cpu") -> Any:
        """Return ``value`` of the content with its tensors, whole; equal names share one tensor."""
        read: dict[str, Tensor] = {}

        def tensor_of(name: str) -> Tensor:
            if name not in read:
                read[name] = self.table.assemble(name).to(device)
            return read[name]

        return fill_names(value, tensor_of)

    def fault(self, rank: int = 0, world: int = 1) -> str | None:
        """Return the first fault of a part against the index; without a manifest, only the index confirms parts."""
        return fault_of_parts(self.path, {"facts": {"parts": self.files}}, share=(rank, world))


def fill_names(value: Any, tensor_of: Callable[[Name], Any]) -> Any:
    """Replace each :class:`Name` in ``value`` by its ``tensor_of(name)``, in dicts, lists and tuples."""
    if isinstance(value, Name):
        return tensor_of(value)
    if type(value) in (dict, OrderedDict):
        result = type(value)((key, fill_names(item, tensor_of)) for key, item in value.items())
        if hasattr(value, "_metadata"):
            result._metadata = value._metadata
        return result
    if type(value) in (list, tuple):
        return type(value)(fill_names(item, tensor_of) for item in value)
    return value


def place_of(path: Path, name: object) -> Path:
    """Return the path of a part by its name in the index ``path``.

    >>> place_of(Path("resume/a.ckpt"), "a.ckpt.parts-1/rank-00000.safetensors").parts[-3:]
    ('resume', 'a.ckpt.parts-1', 'rank-00000.safetensors')
    """
    parts = str(name).split("/")
    if len(parts) != 2 or any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"{name}: not the name of a part")
    return path.resolve().parent / parts[0] / parts[1]


def which(rank: int, world: int, place: Path) -> str:
    """Describe a part in words.

    >>> which(2, 4, Path("resume/a.ckpt.parts-1/rank-00002.safetensors"))
    'part of rank 2 of 4, a.ckpt.parts-1/rank-00002.safetensors'
    """
    return f"part of rank {rank} of {world}, {place.parent.name}/{place.name}"


def load(path: Path, leave_out: Iterable[str] = (), device: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint of several parts, except the keys to leave out, as ``torch.load`` loads one of one file."""
    parted = Parted(path)
    content: dict[str, Any] = parted.fill({k: v for k, v in parted.content.items() if k not in leave_out}, device)
    return content
