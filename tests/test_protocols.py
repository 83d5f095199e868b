"""toolkit/protocols.py has every attribute that the toolkit reads from a part, as required or as optional."""

import ast
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from toolkit import protocols

ROOT = Path(__file__).parent.parent
PROTOCOLS = {
    name: cls for name, cls in vars(protocols).items() if inspect.isclass(cls) and cls.__module__ == protocols.__name__
}

# getattr and hasattr on objects that are no parts, by the source text of their first argument.
NOT_PARTS = {
    "os": "a module of Python: systems differ",
    "signal": "a module of Python: systems differ",
    "torch": "a module: its types by name",
    "network": "a model of transformers",
    "config": "a config of transformers: architectures differ",
    "loaded": "a library or a module that was loaded",
    "ctypes.CDLL(None)": "the C library",
    "torch.ops.mkldnn": "operations that some builds of torch lack",
    "torch.ops": "the libraries of operations; toolkit/cpu/operation.py has defined one",
    "getattr(torch.ops, LIBRARY)": "the operations of this library",
    "statement": "a statement of Python: kinds differ",
    "tensor": "a tensor that transformers may have marked",
    "sys.modules.get('toolkit.registry')": "a module",
    "sys.modules.get(cls.__module__)": "a module",
    "error": "an exception: kinds differ",
    "arguments": "what argparse has read",
    "ablation": "a dataclass of the toolkit, field by field",
    "self.ablation": "a dataclass of the toolkit, field by field",
    "task": "a task of lm-evaluation-harness",
    "arm": "a dataclass of the toolkit, field by field",
    "base": "a dataclass of the toolkit, field by field",
    "m": "a dataclass of the toolkit, field by field",
}
MODULE_ATTRIBUTES = {"__file__", "__path__", "__spec__"}
# getattr and hasattr on parts with a name that is no constant, by the source text of the call.
COMPUTED = {
    "getattr(self.logger, method)": "the required methods of Logger",
    "getattr(cls, method, None)": "the required methods of the kind that is registered",
    "hasattr(cls, name)": "the members of toolkit.architectures.Architecture",
    "hasattr(bench.entry.cls, method)": "embed, rotate and score_bias",
    "hasattr(e.cls, method)": "embed, rotate and score_bias",
}
# Plain reads of attributes, by the variable that holds the part: its protocol, and an object of torch for the rest.
HOLDERS = {
    "model": ("Model", nn.Module()),
    "head": ("Head", None),
    "mixer": ("Mixer", nn.Module()),
    "kernel": ("Attention", nn.Module()),
    "tokenizer": ("Tokenizer", None),
    "optimizer": ("Optimizer", torch.optim.SGD([nn.Parameter(torch.zeros(1))])),
}
# Files in which these variables hold other objects.
OTHER_OBJECTS = {
    "toolkit/conformance/optimizers.py": "builds a model of its own, with layers of its own",
    "toolkit/text/tokenizerjson.py": "reads a tokenizer.json, with objects of the library tokenizers",
    "toolkit/exchange/gguf/vocab.py": "reads a tokenizer.json, as entries of JSON",
}


def required(cls: type) -> set[str]:
    """The methods, properties and attributes in the body of a protocol."""
    return {
        name for name, value in vars(cls).items() if inspect.isfunction(value) or isinstance(value, property)
    } | set(inspect.get_annotations(cls))


def optional(cls: type) -> set[str]:
    """The names under "Optional" in a protocol's docstring. ``parameter.lr_scale`` counts as lr_scale."""
    lines = inspect.getdoc(cls).partition("\nOptional:\n")[2].splitlines()
    return {line.split()[0].rpartition(".")[2] for line in lines if line and not line.startswith(" ")}


OPTIONAL = {name: names for name, cls in PROTOCOLS.items() if (names := optional(cls))}
KNOWN = set().union(*OPTIONAL.values(), *(required(cls) for cls in PROTOCOLS.values()))


def trees(*folders: str) -> Iterator[tuple[str, ast.AST]]:
    """Each file of the folders, as (path, syntax tree)."""
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def lookups(tree: ast.AST) -> Iterator[tuple[ast.Call, str, str | None]]:
    """Each getattr and hasattr of a file: (call, source text of the object, name or None for a computed name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
            yield node, ast.unparse(node.args[0]), name


def reads(tree: ast.AST) -> Iterator[tuple[ast.Attribute, str]]:
    """Each plain read ``holder.name`` of an attribute: (node, last word of the holder)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node, ast.unparse(node.value).rpartition(".")[2]


def undocumented_lookups(files: Iterable[tuple[str, ast.AST]]) -> list[str]:
    """getattr and hasattr on a part with a name that protocols.py does not have."""
    return [
        f"{path}:{call.lineno}: {ast.unparse(call)}"
        for path, tree in files
        for call, holder, name in lookups(tree)
        if holder not in NOT_PARTS and name not in MODULE_ATTRIBUTES
        if (ast.unparse(call) not in COMPUTED if name is None else name not in KNOWN)
    ]


def undocumented_reads(files: Iterable[tuple[str, ast.AST]]) -> list[str]:
    """Plain reads from a variable of HOLDERS that neither its protocol nor the object of torch has."""
    return [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path, tree in files
        for node, holder in reads(tree)
        if holder in HOLDERS
        for kind, of_torch in [HOLDERS[holder]]
        if node.attr not in required(PROTOCOLS[kind]) | optional(PROTOCOLS[kind]) and not hasattr(of_torch, node.attr)
    ]


def test_every_attribute_that_the_toolkit_looks_for_is_documented():
    assert undocumented_lookups(trees("toolkit")) == []


def test_every_attribute_that_the_toolkit_reads_from_a_part_is_documented():
    assert undocumented_reads((path, tree) for path, tree in trees("toolkit") if path not in OTHER_OBJECTS) == []


def test_an_undocumented_attribute_is_found():
    code = (
        "getattr(model, 'mixers', [])\nhasattr(part, 'rotates')\ngetattr(part, name)\nparts.model.layers[0].attention"
    )
    assert undocumented_lookups([("f.py", ast.parse(code))]) == [
        "f.py:2: hasattr(part, 'rotates')",
        "f.py:3: getattr(part, name)",
    ]
    assert undocumented_reads([("f.py", ast.parse(code))]) == ["f.py:4: parts.model.layers"]


@pytest.mark.parametrize("kind", OPTIONAL)
def test_every_optional_attribute_is_read_somewhere(kind):
    """By the toolkit, or by a part on the shelf from another part."""
    read = set()
    for _, tree in trees("toolkit", "components"):
        read |= {name for _, _, name in lookups(tree)}
        read |= {node.attr for node, holder in reads(tree) if holder != "self"}
    assert OPTIONAL[kind] - read == set()
