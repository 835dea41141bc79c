"""``descant data make|look|select|encode``: shards of your own files; statistics, best rows and codes of a data set."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from descant.cli.errors import fail, hint, one_line
from descant.cli.options import Options

_TOP = """\
descant data: shards from your own files, or statistics, best rows or codes of a data set

usage: descant data make FOLDER --out DIR [options]
       descant data look WHAT [options]
       descant data select --run RUN --score NAME --out FILE [options]
       descant data encode --config NAME --out FILE [options]

  make    WebDataset shards from a folder of images (or recordings) with captions, verified byte by byte
  look    counts, missing modalities, captions, duplicates across splits, and a contact sheet of images
  select  ids of the samples that score highest, or by quotas; --data.selected FILE trains on them
  encode  codes of drawings and speech, by the tokenizers of an experiment; --data.codes FILE reads them

Options: descant data make --help, and so on."""


def main(args: Sequence[str]) -> int:
    """Run ``descant data ARGS`` and return the exit code."""
    if not args or args[0] in ("--help", "-h"):
        print(_TOP)
        return 0
    commands = {"make": _make, "look": _look, "select": _select, "encode": _encode}
    if args[0] not in commands:
        fail(f"data {args[0]}: no such command{hint(args[0], commands)}")
    try:
        return commands[args[0]](args[1:])
    except (ValueError, OSError) as error:  # sources and data modules raise these for a wrong request
        fail(one_line(error))


def _make(args: Sequence[str]) -> int:
    parser = Options(
        "descant data make",
        description="WebDataset shards from a folder of images or recordings, with captions in a table or in text "
        "files beside them. Bytes are copied unchanged; every member is read back and compared. Splits follow a "
        "column (or sub-folders) named train, val and test; without one, a fixed share is held out as val.",
        epilog="example: descant data make photos --csv captions.csv --out shards",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path)
    add("--out", metavar="DIR", type=Path, required=True, help="new folder; nothing is overwritten")
    add("--csv", metavar="FILE", type=Path, help="CSV, TSV or JSON lines; default: the folder's own")
    add("--caption", metavar="COLUMN", help="text field written as .txt; default: the only one")
    size = parser.add_mutually_exclusive_group()
    samples_help = "most samples of a shard; default: by --size"
    size.add_argument("--samples-per-shard", dest="samples", metavar="N", type=_positive(int), help=samples_help)
    size_help = "most megabytes of a shard (256)"
    size.add_argument("--size", dest="megabytes", metavar="MB", type=_positive(float), default=256.0, help=size_help)
    add("--resize", metavar="PX", type=_positive(int), help="resize larger images to this shorter side, as JPEG")
    add("--holdout", metavar="SHARE", type=_share, default=0.05, help="share held out as val (0.05)")
    add("--seed", metavar="N", type=int, default=0, help="seed of the order of samples (0)")
    options = parser.parse_args(list(args))
    from descant.data.make import make

    print(make(**vars(options)).report())
    return 0


def _look(args: Sequence[str]) -> int:
    parser = Options(
        "descant data look",
        description="Statistics of a data set: counts, missing modalities, lengths of captions and how many the "
        "tokenizer cuts, sizes of images, duplicates within and across splits, and a contact sheet of images.",
        epilog="examples: descant data look photos; descant data look 'shards/*.tar'; "
        "descant data look --config contrastive/emoji --data.size 64",
    )
    add = parser.add_argument
    add("what", metavar="WHAT", nargs="*", help="a folder, a saved dataset, parquet files or shards (patterns too)")
    add("--config", dest="configs", metavar="NAME", action="append", default=[], help="data of an experiment")
    add("--trust", metavar="MODULE", action="append", default=[], help="allow class paths of MODULE in --config")
    add("--csv", metavar="FILE", type=Path, help="table of a folder; default: its own")
    add("--caption", metavar="COLUMN", help="text field with the captions; default: the only one")
    add("--holdout", metavar="SHARE", type=_share, default=0.05, help="share held out as val, as in training (0.05)")
    add("--all", dest="every", action="store_true", help="read and decode all samples")
    add("--out", dest="sheet", metavar="PNG", type=Path, help="contact sheet (look-NAME.png)")
    add("--json", dest="numbers", metavar="FILE", type=Path, help="also write the statistics there")
    data, rest = _data_options(parser, args)
    options = parser.parse_args(rest)
    if bool(options.what) == bool(options.configs):
        fail("data look: give either a folder, parquet files or shards, or --config NAME")
    if data and not options.configs:
        fail(f"data look: --{data[0][0]}: only with --config")
    from descant.data.look import look

    look(options=data, **vars(options))
    return 0


def _select(args: Sequence[str]) -> int:
    parser = Options(
        "descant data select",
        description="Ids of the rows that score highest, or by equal quotas over scores and groups, from a table with "
        "a column index. A score is a column of numbers, or image,text: the cosine of two embeddings. Rows of equal "
        "scores are taken by the seed, not by their order.",
        epilog="examples: descant predict --run clip/001 --sets train; descant data select --run clip/001 "
        "--score image,text --share 0.5 --out ids.parquet; descant fit --config contrastive/emoji "
        "--data.selected ids.parquet",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    run_help = "a run, such as NAME/002, whose training samples `descant predict` embedded"
    source.add_argument("--run", metavar="RUN", help=run_help)
    source.add_argument("--table", metavar="FILE", type=Path, help="a parquet file with index and scores")
    score_help = "column, or two modalities; several with --quota, of which ScoreFilter takes the mean"
    add("--score", dest="scores", metavar="NAME", action="append", required=True, help=score_help)
    add("--out", metavar="FILE", type=Path, required=True, help="new parquet file of ids")
    add("--share", metavar="SHARE", type=float, default=1.0, help="of all rows, or of their cost (1)")
    add("--least", metavar="SCORE", type=float, help="lowest score that is taken")
    add("--quota", action="store_true", help="equal quotas over scores and groups, not the best of all")
    add("--group", metavar="COLUMN", help="column of groups, such as styles")
    add("--cost", metavar="COLUMN", help="column of costs, such as tokens; 1 a row by default")
    graded_help = "few rows with grades 0, 1, ... in the columns of --score (and --group), from which all get theirs"
    add("--graded", metavar="FILE", type=Path, help=graded_help)
    own_help = "the same of a random share of the table's own rows, which has these columns"
    add("--graded-share", metavar="SHARE", type=float, help=own_help)
    features_help = "embeddings that grades are learned from, such as image,text,image*text (image,text)"
    add("--features", metavar="NAMES", default="image,text", help=features_help)
    add("--seed", metavar="N", type=int, default=0, help="seed by which rows of equal scores go (0)")
    add("--sham", action="store_true", help="the control: scores permuted within groups")
    add("--runs", metavar="DIR", type=Path, default=Path("runs"), help="folder of the runs (runs)")
    options = parser.parse_args(list(args))
    from descant.data.select import select

    print(select(**vars(options)))
    return 0


def _encode(args: Sequence[str]) -> int:
    parser = Options(
        "descant data encode",
        description="Codes of the samples of a data set, by the tokenizers that its experiment names, as a parquet "
        "file: index, content key, set and name of each, a column of codes a modality, and the digests of the "
        "tokenizers. Training that reads it builds and fits none.",
        epilog="example: descant data encode --config staged/emoji-codes --out codes.parquet; "
        "descant fit --config staged/emoji-codes --data.stages.tune.data.codes codes.parquet",
    )
    add = parser.add_argument
    add("--config", dest="configs", metavar="NAME", action="append", required=True, help="an experiment")
    add("--trust", metavar="MODULE", action="append", default=[], help="allow class paths of MODULE")
    add("--out", metavar="FILE", type=Path, required=True, help="new parquet file; nothing is overwritten")
    data, rest = _data_options(parser, args)
    options = parser.parse_args(rest)
    from descant.data.encode import encode

    print(encode(options=data, **vars(options)))
    return 0


def _data_options(parser: Options, args: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Separate ``--data.KEY VALUE`` and ``--data.KEY=VALUE``, as pairs, from the other arguments."""
    pairs, rest, left = [], [], list(args)
    while left:
        token = left.pop(0)
        if not token.startswith("--data."):
            rest.append(token)
            continue
        key, equals, value = token[2:].partition("=")
        if not equals:
            if not left or left[0].startswith("--"):
                parser.error(f"--{key}: its value is missing")
            value = left.pop(0)
        pairs.append((key, value))
    return pairs, rest


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    number.__name__ = "number"
    return number


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: 0 <= share < 1")
    return value
