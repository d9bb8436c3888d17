"""The options that several commands share, those of a corpus, and how configurations take them.

A parameter of a command has the name of the configuration's field that it sets, so that
`settings` can collect them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

DEVICES = ["auto", "cpu", "cuda"]
DTYPES = ["auto", "float32", "bfloat16", "float16"]
SPLITS = ["train", "dev", "test"]


def choices(values: list[str]) -> Callable[[], list[str]]:
    """Return what shell completion offers for an option."""
    return lambda: values


def unescape(template: str | None) -> str | None:
    r"""Replace a typed ``\n`` or ``\t`` by the character; shells do not.

    >>> unescape(r"Question: {question}\nAnswer: ")
    'Question: {question}\nAnswer: '
    """
    return None if template is None else template.replace("\\n", "\n").replace("\\t", "\t")


def settings(ctx: typer.Context, config: type, *, typed_only: bool = False) -> dict[str, Any]:
    """Return the command's values for the fields of a configuration, by name.

    Args:
        ctx: the command's context.
        config: the dataclass. Fields without an option, and options without a value, are left out.
        typed_only: whether to leave out options that were not typed, whatever their defaults.
    """
    return {
        field.name: value
        for field in fields(config)
        if (value := ctx.params.get(field.name)) not in (None, [], ())
        if not typed_only or was_typed(ctx, field.name)
    }


def was_typed(ctx: typer.Context, name: str) -> bool:
    """Return whether a parameter was given on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


# Every command

AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result, or an error, as JSON on stdout.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
]

# The base

BASE = "Base"

Device = Annotated[
    str,
    typer.Option(
        help="auto (CUDA where there is a GPU), cpu, cuda or cuda:N.",
        autocompletion=choices(DEVICES),
    ),
]
BaseDevice = Annotated[
    str,
    typer.Option(
        help="Where the base runs: auto (CUDA where there is a GPU), cpu, cuda or cuda:N.",
        autocompletion=choices(DEVICES),
        rich_help_panel=BASE,
    ),
]
BaseDtype = Annotated[
    str,
    typer.Option(
        help="Precision of the base: auto (bfloat16 where it is fast, else float32), float32, "
        "bfloat16 or float16.",
        autocompletion=choices(DTYPES),
        rich_help_panel=BASE,
    ),
]
MovedBase = Annotated[
    str | None,
    typer.Option(
        help="Where the base is now: a hub id, folder, GGUF file or builtin:NAME.",
        show_default="the name that was recorded",
        rich_help_panel=BASE,
    ),
]
ExtractBase = Annotated[
    str,
    typer.Option(
        help="The base: a hub id (org/name), a local folder, a GGUF file, or builtin:NAME.",
        rich_help_panel=BASE,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Revision of a hub id: a branch, tag or commit.", rich_help_panel=BASE),
]
ForwardTokens = Annotated[
    int | None,
    typer.Option(
        help="Padded tokens of one forward pass.",
        show_default="2048; 16384 on CUDA",
        rich_help_panel=BASE,
    ),
]

# What is stored

STORED = "What is stored"

StoredTaps = Annotated[
    str,
    typer.Option(
        help="Taps to store, separated by commas. A tap is a place in the base: final is the input "
        "of the LM head, a number k the input of decoder layer k. Carry-ons that read deeper taps "
        "(final,22,15) learn more, and the cache grows by each.",
        metavar="TAPS",
        rich_help_panel=STORED,
    ),
]
Codec = Annotated[
    str,
    typer.Option(
        help="How train is stored: bf16 (lossless), int8, or transform (about 1.5 bits a value). "
        "Dev and test are always lossless.",
        autocompletion=choices(["bf16", "int8", "transform"]),
        rich_help_panel=STORED,
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        help="Bits per value, for --codec transform.", show_default="1.5", rich_help_panel=STORED
    ),
]
Quality = Annotated[
    float | None,
    typer.Option(
        help="Instead of --bits: the largest rise of the base's cross-entropy that --codec "
        "transform may cause, in nats per token.",
        rich_help_panel=STORED,
    ),
]
TopIds = Annotated[
    int,
    typer.Option(
        help="Store this many of the base's likeliest tokens at each position. Training with the "
        "shortlist loss then samples 256 tokens instead of 2048. Use 8 to train many carry-ons on "
        "a CPU; extraction takes longer, because it computes logits. 0 stores none.",
        rich_help_panel=STORED,
    ),
]
BlockTokens = Annotated[
    int,
    typer.Option(
        help="Tokens of a block, the unit that is written, verified and repaired.",
        rich_help_panel=STORED,
    ),
]
MaxQuarantined = Annotated[
    float,
    typer.Option(
        help="Largest share of sequences that may be quarantined because the base gives values "
        "that are not finite.",
        rich_help_panel=STORED,
    ),
]

# The corpus: sources and splits

SPLIT = "Splits"

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        help="Text files, folders, glob patterns, .jsonl, .csv or .parquet files, hf:org/name (a "
        "data set), or stdlib: (the Python standard library).",
        metavar="CORPUS",
        show_default=False,
    ),
]
DevSources = Annotated[
    list[str] | None,
    typer.Option(
        "--dev",
        help="A corpus that is all dev; repeatable.",
        metavar="CORPUS",
        rich_help_panel=SPLIT,
    ),
]
TestSources = Annotated[
    list[str] | None,
    typer.Option(
        "--test",
        help="A corpus that is all test; repeatable.",
        metavar="CORPUS",
        rich_help_panel=SPLIT,
    ),
]
SplitFile = Annotated[
    Path | None,
    typer.Option(
        help='JSON file of document names: {"train": [...], "dev": [...], "test": [...]}. Other '
        "documents are left out.",
        rich_help_panel=SPLIT,
    ),
]
DevFraction = Annotated[
    float, typer.Option(help="Share of the documents for dev.", rich_help_panel=SPLIT)
]
TestFraction = Annotated[
    float, typer.Option(help="Share of the documents for test.", rich_help_panel=SPLIT)
]
SplitSeed = Annotated[
    int, typer.Option(help="Seed of the choice of documents.", rich_help_panel=SPLIT)
]

# The corpus: records and encodings

RECORDS = "Records and encodings"

TextField = Annotated[
    str | None,
    typer.Option(help="Field of a record that holds its text.", rich_help_panel=RECORDS),
]
PromptTemplate = Annotated[
    str | None,
    typer.Option(
        help=r"Template of the prompt over a record's fields: 'Question: {question}\nAnswer: '.",
        callback=unescape,
        metavar="TEMPLATE",
        rich_help_panel=RECORDS,
    ),
]
CompletionTemplate = Annotated[
    str | None,
    typer.Option(
        help="Template of the completion, such as '{answer}'. Only completions are trained on and "
        "scored.",
        callback=unescape,
        metavar="TEMPLATE",
        rich_help_panel=RECORDS,
    ),
]
MessagesField = Annotated[
    str | None,
    typer.Option(
        help="Field of a record that holds a list of chat messages.", rich_help_panel=RECORDS
    ),
]
DatasetConfig = Annotated[
    str | None,
    typer.Option(help="Configuration of an hf: data set.", rich_help_panel=RECORDS),
]
DatasetSplit = Annotated[
    str, typer.Option(help="Split of an hf: data set to read.", rich_help_panel=RECORDS)
]
Encoding = Annotated[str, typer.Option(help="Encoding of text files.", rich_help_panel=RECORDS)]
Undecodable = Annotated[
    str,
    typer.Option(
        help="What to do with a file in another encoding: error or skip.",
        autocompletion=choices(["error", "skip"]),
        rich_help_panel=RECORDS,
    ),
]

# The corpus: lengths and limits

LENGTHS = "Lengths and limits"

Context = Annotated[
    int,
    typer.Option(
        help="Longest sequence, in tokens; longer documents are cut.", rich_help_panel=LENGTHS
    ),
]
MinTokens = Annotated[
    int, typer.Option(help="Drop shorter sequences of plain text.", rich_help_panel=LENGTHS)
]
LimitDocuments = Annotated[
    int | None, typer.Option(help="Stop after this many documents.", rich_help_panel=LENGTHS)
]
LimitTokens = Annotated[
    int | None, typer.Option(help="Stop after this many tokens.", rich_help_panel=LENGTHS)
]
MaxTokensPerDocument = Annotated[
    int | None,
    typer.Option(help="Keep only the first tokens of each document.", rich_help_panel=LENGTHS),
]
