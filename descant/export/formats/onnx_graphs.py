"""ONNX: a graph for each modality of a contrastive run, from preprocessed inputs to embeddings of unit length.

The same folder has ``preprocessing.json``, which describes how images and texts become inputs, and ``tokenizer.json``.
Letters: N inputs, D width, S pixels of a side, T tokens.
"""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.cli.errors import one_line
from descant.export.formats.base import ImageSteps, ModelFormat, Parts, tokenizer_of
from descant.export.formats.fast_tokenizers import fast
from descant.modules.core.batch import Batch
from descant.modules.core.dtype import promote
from descant.modules.tokenizers.text import EOS, SPECIAL, NgramTokenizer, Tokenizer
from descant.recipes.base.recipe import Recipe
from descant.recipes.base.shared_space import SharedSpace

#: Operator set version: the oldest that torch writes, which runtimes since 2023 read.
OPSET = 18
#: Bytes of weights above which they are in a file beside the graph, since a graph is limited to 2 GiB.
INSIDE = 1 << 30
DESCRIPTION, FILE = "preprocessing.json", "tokenizer.json"
#: Modality -> name of its graph's input, as in transformers; the outputs are ``image_embeds`` and ``text_embeds``.
INPUTS = {"image": "pixel_values", "text": "input_ids"}


class OnnxFormat(ModelFormat):
    """``image.onnx`` and ``text.onnx``, tested in onnxruntime with two numbers of inputs other than the exporter's."""

    near = 1e-4  # kernels of another runtime

    def __init__(self) -> None:
        self.tokenizer: Tokenizer | None = None

    def write(self, recipe: Recipe, parts: Parts, folder: Path) -> None:
        space = _space(recipe)
        # refuse before the graphs are made, which takes seconds
        graphs = {modality: describe_graph(parts, modality) for modality in space.towers}
        if "text" in graphs:
            self.tokenizer = tokenizer_of(parts)
            if not isinstance(self.tokenizer, NgramTokenizer):
                _tokenizer(self.tokenizer).save(str(folder / FILE))
        for modality, graph in graphs.items():
            _export(ModalityGraph(space, modality), modality, example(graph, 2), folder / graph["file"])
        content = {"opset": OPSET, "graphs": graphs, "similarity": _similarity(space)}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")

    def outputs(self, recipe: Recipe, folder: Path) -> tuple[Tensor, Tensor]:
        import onnxruntime

        space, options = _space(recipe), onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # the default ignores limits of the process
        ours, theirs = [], []
        for modality, graph in json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["graphs"].items():
            session = onnxruntime.InferenceSession(str(folder / graph["file"]), options)
            for rows in (1, 3):
                x = example(graph, rows)
                batch = Batch({modality: x}, {modality: torch.ones(rows, dtype=torch.bool)})
                ours.append(space.embed(batch)[modality])
                (z_ND,) = session.run([graph["output"]], {graph["input"]: x.numpy()})
                theirs.append(torch.from_numpy(z_ND))
        return torch.cat(ours), torch.cat(theirs)

    def weights(self, folder: Path) -> list[Path]:
        return sorted([*folder.glob("*.onnx"), *folder.glob("*.onnx.data")])

    def usage(self, folder: str) -> str:
        texts, made = '["a red apple", "the sun"]', self.tokenizer
        lines = {
            "import": "import numpy as np, onnxruntime",
            "read": f'tokenizer = tokenizers.Tokenizer.from_file("{folder}/{FILE}")',
            "ids": f"input_ids = np.array([row.ids for row in tokenizer.encode_batch({texts})])",
        }
        if isinstance(made, NgramTokenizer):
            settings = {"SPECIAL": SPECIAL, "SIZE": made.n, "BUCKETS": made.vocabulary, "LENGTH": made.length}
            lines["read"] = _NGRAMS
            for name, value in settings.items():
                lines["read"] = lines["read"].replace(name, str(value))
            lines["ids"] = f"input_ids = np.array([ids(text) for text in {texts}])"
        else:
            lines["import"] += ", tokenizers"
        return (
            f"{lines['import']}\n\n{lines['read']}\n{lines['ids']}\n"
            f'text = onnxruntime.InferenceSession("{folder}/text.onnx")\n'
            '(z_ND,) = text.run(["text_embeds"], {"input_ids": input_ids})  # unit length: z @ z.T are cosines\n'
            f"# image.onnx: pixel_values, as {DESCRIPTION} describes them -> image_embeds"
        )


#: Code for the ids of NgramTokenizer, which the tokenizers package cannot represent.
_NGRAMS = """\
import hashlib, re

def ids(text):
    pieces = []
    for word in re.findall(r"\\w+|[^\\w\\s]", text.lower()):
        pieces.append(f"word {word}")
        if len(word) >= SIZE:
            pieces += [f"<{word}>"[k : k + SIZE] for k in range(len(word) + 3 - SIZE)]
    hashes = [int.from_bytes(hashlib.blake2b(piece.encode(), digest_size=8).digest(), "little") for piece in pieces]
    row = [1, *dict.fromkeys(SPECIAL + h % (BUCKETS - SPECIAL) for h in hashes), 2][:LENGTH]
    return row + [0] * (LENGTH - len(row))
"""


class ModalityGraph(nn.Module):
    """``x -> z_ND``: tower, pool and head of one modality, for inputs without missing samples."""

    def __init__(self, space: SharedSpace, modality: str) -> None:
        super().__init__()
        self.tower, self.pool, self.head = space.towers[modality], space.pools[modality], space.heads[modality]

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(promote(self.head(self.pool(self.tower(x)))), dim=-1)


def _space(recipe: Recipe) -> SharedSpace:
    """Return the recipe as a SharedSpace.

    Raises ValueError if its towers have no shared space of their own, or if it has towers that the format cannot hold.
    """
    if not isinstance(recipe, SharedSpace) or recipe.before_pools is not None:
        kind = type(recipe).__name__
        raise ValueError(f"{kind}: --to onnx holds towers, pools and heads of one shared space, as of Contrastive")
    if others := [name for name in recipe.towers if name not in INPUTS]:
        kept = [name for name in recipe.towers if name in INPUTS]
        first = f"; export --towers {','.join(kept)} first, and that export then" if kept else ""
        raise ValueError(f"towers.{others[0]}: --to onnx holds image and text{first}")
    return recipe


def describe_graph(parts: Parts, modality: str) -> dict[str, Any]:
    """Describe a graph: file, names, shapes without N, and preprocessing; raise ValueError if that is not known.

    >>> from descant.modules.tokenizers.text import ByteTokenizer
    >>> describe_graph({"text": [ByteTokenizer(24)]}, "text")["shape"]
    ['N', 24]
    """
    graph = {"file": f"{modality}.onnx", "input": INPUTS[modality], "output": f"{modality}_embeds"}
    if modality == "text":
        if (tokenizer := tokenizer_of(parts)) is None:
            raise ValueError("text: its tokenizer is not known, such as of data that is not here")
        row: dict[str, Any] = {
            "tokenizer": None if isinstance(tokenizer, NgramTokenizer) else FILE,
            "vocabulary": tokenizer.vocabulary,
            "padding": tokenizer.pad,
        }
        if isinstance(tokenizer, NgramTokenizer):
            row |= {"ngrams": tokenizer.n, "ids": "by the function in README.md"}
        return {**graph, "type": "int64", "shape": ["N", tokenizer.length], "preprocessing": row}
    if (steps := ImageSteps.of(parts)) is None:
        raise ValueError("image: its preprocessing is not known, such as of data that is not here")
    sides = "the shorter side, then the central square" if steps.square else "both sides, whatever their ratio"
    pixels = {
        "colours": "RGB, in this order; transparency over white",
        "resize": {"to": steps.size, "sides": sides, "filter": steps.filter, "antialias": True},
        "scale": "1 / 255, then (x - mean) / std of each colour",
        "mean": list(steps.mean),
        "std": list(steps.std),
    }
    return {**graph, "type": "float32", "shape": ["N", 3, steps.size, steps.size], "preprocessing": pixels}


def example(graph: dict[str, Any], rows: int) -> Tensor:
    """Return random inputs of a graph, with texts of several lengths."""
    shape = (rows, *graph["shape"][1:])
    if graph["type"] == "float32":
        return torch.randn(shape)
    x_NT = torch.randint(1, graph["preprocessing"]["vocabulary"], shape)
    length_N1 = torch.randint(2, shape[1] + 1, (rows, 1))
    return x_NT.masked_fill(torch.arange(shape[1]) >= length_N1, graph["preprocessing"]["padding"])


def _similarity(space: SharedSpace) -> dict[str, dict[str, float]]:
    """Return scale and bias of each pair with a scale: logits are ``scale * cosine + bias``."""
    pairs = {name: loss for name, loss in getattr(space, "losses", {}).items() if hasattr(loss, "log_scale")}
    return {
        name: {"scale": loss.log_scale.exp().item(), "bias": loss.bias.item() if hasattr(loss, "bias") else 0.0}
        for name, loss in pairs.items()
    }


def _tokenizer(tokenizer: Tokenizer | None) -> Any:
    """Return a tokenizer of the tokenizers package that makes whole rows; raise ValueError if its ids differ."""
    import tokenizers

    assert tokenizer is not None
    whole = fast(tokenizer, tokenizer.vocabulary, tokenizer.length, eos=EOS)
    made = tokenizers.Tokenizer.from_str(whole.backend_tokenizer.to_str())
    made.enable_truncation(tokenizer.length)
    made.enable_padding(length=tokenizer.length, pad_id=tokenizer.pad, pad_token=made.id_to_token(tokenizer.pad))
    text = "Two naïve foxes, 7"
    theirs, ours = made.encode(text).ids, tokenizer([text])[0].tolist()
    if len(tokenizer.ids(text)) < tokenizer.length - 2 and theirs != ours:
        raise ValueError(f"text: {type(tokenizer).__name__}: a text has ids {theirs} there, and {ours} here")
    return made


# from a module to a graph -------------------------------------------------------------------------------------------


def program_of(module: nn.Module, modality: str, x: Tensor) -> Any:
    """Trace a module as torch's graph for any number of inputs; raise ValueError with the layer that it cannot hold."""
    with _quiet(), torch.no_grad():
        try:
            return torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("N")},), strict=False)
        except Exception as error:  # towers and torch raise errors of any type
            place = _place(module, _layer(error, module), modality)
            raise ValueError(f"{place} cannot be exported: {_reason(error)}") from error


def _export(module: nn.Module, modality: str, x: Tensor, file: Path) -> None:
    """Write a graph; raise ValueError with the layer, and the operator, that it cannot hold."""
    program = program_of(module, modality, x)
    with _quiet():
        names: dict[str, Any] = {"input_names": [INPUTS[modality]], "output_names": [f"{modality}_embeds"]}
        try:
            made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, **names)
        except Exception as error:
            operator, layer = _operator(error, program)
            reason = _reason(error) if operator is None else f"ONNX has no operator {operator}"
            raise ValueError(f"{_place(module, layer, modality)} cannot be exported: {reason}") from error
        assert made is not None
        for graph in (made.model.graph, *made.model.functions.values()):
            for node in graph.all_nodes():
                node.metadata_props.clear()  # they hold source lines and paths of this machine
        size = sum(p.numel() * p.element_size() for p in [*module.parameters(), *module.buffers()])
        made.save(str(file), external_data=size > INSIDE)


def _reason(error: Exception) -> str:
    """Describe what a tower does that a graph cannot represent."""
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return "it branches on a value of its inputs"
    if "specialized it to be a constant" in str(error):
        return "it is made for one number of inputs, such as by len() of a tensor; its shape[0] is not"
    if "numpy" in str(error):
        return "it computes outside of torch"
    return one_line(error, 160)


def _place(module: nn.Module, layer: str | None, modality: str) -> str:
    """Return ``towers.text.layers.0: Block`` for ``tower.layers.0``."""
    part, _, rest = (layer or "tower").partition(".")
    name = f"{part}s.{modality}" + (f".{rest}" if rest else "")
    return f"{name}: {type(module.get_submodule(layer or 'tower')).__name__}"


def _layer(error: BaseException, module: nn.Module) -> str | None:
    """Return the innermost layer whose ``forward`` raised an error."""
    names, found = {id(part): name for name, part in module.named_modules() if name}, None
    trace = error.__traceback__
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found


def _operator(error: BaseException | None, program: Any) -> tuple[str | None, str | None]:
    """Return the operator that an error names because ONNX lacks it, and the layer that calls it."""
    while error is not None:
        if match := re.search(r"OpOverload\(op='([\w.]+)'", str(error)):
            operator = match[1]
            stacks = (node.meta.get("nn_module_stack") for node in program.graph.nodes if _is_operator(node, operator))
            layers = [path for stack in stacks if stack for path, _ in stack.values()]
            return operator, layers[-1].removeprefix("L['self'].") if layers else None
        error = error.__cause__ or error.__context__
    return None, None


def _is_operator(node: Any, operator: str) -> bool:
    return node.op == "call_function" and operator.rpartition(".")[2] in str(node.target)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's prints, logs and warnings; failures are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
