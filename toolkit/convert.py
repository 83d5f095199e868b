"""``python -m toolkit.convert RUN --to hf --out DIR``: write a trained model for the transformers library.
``python -m toolkit.convert RUN --to gguf --out FILE.gguf``: write one for llama.cpp.
``python -m toolkit.convert DIR --from hf --name NAME``: make a run of a model of that library."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from pathlib import Path

from toolkit.command import add_import_flags, run_command

OUT_FLAGS = ("out", "tier", "dtype", "architecture", "no_tokenizer", "no_code")  # names of the flags of --to


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code; raises ValueError for an error that the user can correct."""
    arguments = _arguments(argv)  # before the slow imports, so that --help is quick
    if arguments.list or arguments.tiers:
        return _list(arguments) if arguments.list else _tiers(arguments)
    if arguments.to == "gguf":
        return _export_gguf(arguments)
    return _export(arguments) if arguments.to else _import(arguments)


def _export(arguments: argparse.Namespace) -> int:
    """Write a model for transformers."""
    from toolkit.exchange import library, outgoing

    library.require()
    outgoing.check_free(Path(arguments.out))
    from toolkit.compose import open_run

    run = open_run(arguments.source, device="cpu", imports=arguments.imports, code=not arguments.no_code)
    result = outgoing.export(
        run,
        Path(arguments.out),
        arguments.dtype,
        not arguments.no_tokenizer,
        arguments.architecture,
        tier=arguments.tier,
    )
    if result.reason:
        print(result.reason)
    written = f"{result.folder} as {result.model_type}, in {arguments.dtype} (tier {result.tier})"
    print(f"{run.checkpoint} is written to {written}")
    if result.tier == "code":
        others = "".join(f", {package}" for package in result.packages)
        print(
            f"it has the source of its parts, which trust_remote_code=True runs; it needs torch, transformers{others}"
        )
    for computed, proof in result.proofs.items():
        print(f"loaded by transformers in a new process, computed in {computed}: {proof}")
    return 0


def _export_gguf(arguments: argparse.Namespace) -> int:
    """Write a model for llama.cpp."""
    from toolkit.exchange import library
    from toolkit.exchange.gguf import outgoing, package

    library.require()
    package.require()
    outgoing.check_free(Path(arguments.out))
    from toolkit.compose import open_run

    run = open_run(arguments.source, device="cpu", imports=arguments.imports, code=not arguments.no_code)
    result = outgoing.export(
        run, Path(arguments.out), arguments.dtype, not arguments.no_tokenizer, arguments.architecture
    )
    print(f"{run.checkpoint} is written to {result.file} as GGUF's {result.name}, in {arguments.dtype}")
    for line in result.proofs:
        print(line)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    """Make a run of a model of transformers."""
    from toolkit.exchange import incoming, library

    library.require()
    result = incoming.bring_in(
        arguments.source,
        Path(arguments.runs),
        arguments.name,
        seq_len=arguments.seq_len,
        pickle=arguments.pickle,
        imports=arguments.imports,
    )
    print(f"{arguments.source} ({result.model_type}) is now the run {result.folder}")
    print(f"compared with transformers in a new process: {result.proof}")
    print(f"next: python -m toolkit.generate {result.folder}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    """Print the architectures of the tier native."""
    from toolkit.architectures import ARCHITECTURES
    from toolkit.compose import load_shelf

    load_shelf(arguments.imports)
    width = shutil.get_terminal_size((120, 24)).columns
    for name, architecture in ARCHITECTURES.items():
        about = " ".join((type(architecture).__doc__ or "").split())
        print(textwrap.fill(about, width, initial_indent=f"{name:12} ", subsequent_indent=" " * 13))
    return 0


def _tiers(arguments: argparse.Namespace) -> int:
    """Print the tier of each part."""
    from toolkit.compose import load_shelf
    from toolkit.exchange import library, tiers
    from toolkit.registry import CATALOG

    library.require()
    load_shelf(arguments.imports)
    width = shutil.get_terminal_size((120, 24)).columns
    about = "How the default model (gin/default.gin) with each part, or each other overlay, goes out with --to hf:"
    print(textwrap.fill(about, width))
    kind = ""
    for row in tiers.rows(CATALOG.values()):
        if row.kind != kind:
            print(f"\n{row.kind}")
        kind = row.kind
        print(_wrapped(row.name, row.tier, width))
    print("\ntokenizer")
    for name, file in tiers.tokenizers(CATALOG.values()).items():
        print(_wrapped(name, file, width))
    return 0


def _wrapped(name: str, text: str, width: int) -> str:
    """A line of a name and a text, which goes on below itself."""
    return textwrap.fill(text, width, initial_indent=f"  {name:36} ", subsequent_indent=" " * 39)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.convert",
        description="Convert a model to the transformers library (--to hf), or make a run of a model of that library "
        "(--from hf). Each result is compared with its source in a new process, and kept only if it computes the same.",
        epilog="Exit codes: 0 done, 2 bad input, or a result that does not compute the same, 4 storage.",
    )
    add = parser.add_argument
    add(
        "source",
        metavar="RUN|CHECKPOINT|DIR",
        nargs="?",
        help="--to: folder of a run (its best checkpoint is used) or of a checkpoint; --from: folder with a "
        "transformers model, or the name of one on the Hub, OWNER/NAME",
    )
    add("--to", choices=("hf", "gguf"), help="write a model for transformers, or one file for llama.cpp")
    add("--from", dest="from_format", choices=("hf",), help="make a run of a model of transformers")
    add("--out", metavar="DIR|FILE.gguf", help="--to: the new folder, or for gguf the new file")
    add(
        "--tier",
        choices=("native", "code"),
        help="--to: native: an architecture that transformers has, see --list; code: the source of the model's parts, "
        "in files beside the weights (default: native if the model is one, else code)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="--to: type of the weights (default: float32)",
    )
    add("--architecture", metavar="TYPE", help="--to: a model type of --list (default: the first that the model is)")
    add("--no-tokenizer", action="store_true", help="--to: leave out the tokenizer files")
    add("--name", help="--from: name of the run's folder")
    add("--runs", metavar="DIR", default="runs", help="--from: folder that holds the runs (default: runs)")
    add("--seq-len", metavar="N", type=int, help="--from: context of the run in tokens (default: the model's own)")
    add("--pickle", action="store_true", help="--from: accept weights in pickle files, which are read as weights only")
    add("--list", action="store_true", help="list the architectures of the tier native, and stop")
    add("--tiers", action="store_true", help="list the tier in which a model with each part goes out, and stop")
    add_import_flags(parser)
    arguments = parser.parse_args(argv)
    if arguments.list or arguments.tiers:
        return arguments
    if arguments.source is None or bool(arguments.to) == bool(arguments.from_format):
        parser.error(
            "give a run and --to hf --out DIR or --to gguf --out FILE.gguf, or a folder and --from hf --name NAME"
        )
    required, flag = ("out", "--to") if arguments.to else ("name", "--from")
    if getattr(arguments, required) is None:
        parser.error(f"{flag} needs --{required}")
    others = ["name", "runs", "seq_len", "pickle"] if arguments.to else [*OUT_FLAGS]
    others += ["tier"] if arguments.to == "gguf" else []
    if unused := [each for each in others if getattr(arguments, each) != parser.get_default(each)]:
        given = ", ".join("--" + each.replace("_", "-") for each in unused)
        direction = f"--to {arguments.to}" if arguments.to else "--from"
        parser.error(f"without effect with {direction}: {given}; leave out what has no effect")
    if arguments.tier == "code" and arguments.architecture is not None:
        parser.error("--architecture names an architecture of the tier native; leave it out, or write --tier native")
    if arguments.seq_len is not None and arguments.seq_len < 2:
        parser.error("--seq-len must be 2 or more")
    return arguments


if __name__ == "__main__":
    run_command(main)
