"""Move the values of a model's tensors to the other side, by the rules of an architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from toolkit.architectures import Constant, Rule, Shapes, Transposed

Side = Literal["ours", "theirs"]
PADDED = ("embed.weight", "unembed.weight")  # tables of ours, whose last rows may pad the vocabulary
SHOWN = 6  # names in a message


def move(rules: Sequence[Rule | Constant], source: Mapping[str, Tensor], to: Side, shapes: Shapes) -> dict[str, Tensor]:
    """Return the tensors of side ``to``, which has these ``shapes``, made of those of the other side.

    Rows of our tables that pad the vocabulary are left out, or filled with zeros. Raises ValueError if a tensor is
    missing or surplus on either side, if a shape differs, if a part of a tensor is left out, or if a tensor that only
    one side has does not have the value that the other side implies."""
    check_names(rules, to, source, shapes)
    target = {name: torch.zeros(shape, dtype=_dtype(source)) for name, shape in shapes.items()}
    read = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in source.items()}
    written = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for rule in rules:
        if isinstance(rule, Constant):
            if rule.owner == to:
                target[rule.name].fill_(rule.value)
                written[rule.name].fill_(True)
            else:
                _check_constant(rule, source[rule.name])
                read[rule.name].fill_(True)
            continue
        first, second = (rule.ours, rule.theirs) if to == "theirs" else (rule.theirs, rule.ours)
        piece = _changed(rule, _view(rule, source[first], "ours" if to == "theirs" else "theirs"), to)
        place = _view(rule, target[second], to)
        if piece.shape != place.shape:
            raise ValueError(
                f"{first} gives {tuple(piece.shape)}, but {second} takes {tuple(place.shape)}: the sizes do not fit"
            )
        place.copy_(piece)
        _view(rule, read[first], "ours" if to == "theirs" else "theirs").fill_(True)
        marks = _view(rule, written[second], to)
        if marks.any():
            raise ValueError(f"two rules write {second}; correct the architecture's rules")
        marks.fill_(True)
    for marks_of, verb in ((read, "read"), (written, "written")):
        for name, marks in marks_of.items():
            _check_whole(name, marks, verb)
    return target


def check_names(
    rules: Sequence[Rule | Constant], to: Side, source: Mapping[str, Tensor] | Shapes, shapes: Shapes
) -> None:
    """Raise ValueError, naming the tensors, if one that a rule reads or writes is missing, or one is in no rule."""
    for side, names in (("theirs" if to == "ours" else "ours", source.keys()), (to, shapes.keys())):
        ruled = names_of(rules, side)
        owner = "our model" if side == "ours" else "the transformers model"
        if missing := sorted(ruled - names):
            raise ValueError(f"{owner} lacks {len(missing)} tensors: {_listed(missing)}")
        if surplus := sorted(names - ruled):
            raise ValueError(f"{owner} has {len(surplus)} tensors too many: {_listed(surplus)}")


def check_shapes(rules: Sequence[Rule | Constant], ours: Shapes, theirs: Shapes) -> None:
    """Raise ValueError if a rule's piece of our tensors does not have the shape of its piece of theirs. On the meta
    device, so that no memory is used."""
    for rule in rules:
        if isinstance(rule, Rule):
            mine, other = (torch.empty(shape, device="meta") for shape in (ours[rule.ours], theirs[rule.theirs]))
            piece, place = _view(rule, mine, "ours"), _view(rule, other, "theirs")
            shape = piece.T.shape if any(isinstance(change, Transposed) for change in rule.changes) else piece.shape
            if shape != place.shape:
                raise ValueError(f"{rule.ours} is {tuple(piece.shape)}, but {rule.theirs} is {tuple(place.shape)}")


def names_of(rules: Sequence[Rule | Constant], side: str) -> set[str]:
    """The tensors of a side that rules are about."""
    return {name for rule in rules if (name := _name(rule, side)) is not None}


def _name(rule: Rule | Constant, side: str) -> str | None:
    """The tensor of a side that a rule is about; None if there is none."""
    if isinstance(rule, Constant):
        return rule.name if rule.owner == side else None
    return rule.ours if side == "ours" else rule.theirs


def _view(rule: Rule, tensor: Tensor, side: str) -> Tensor:
    """The piece of a side's tensor that a rule is about."""
    if side == "theirs" and rule.their_index is not None:
        tensor = tensor[rule.their_index]
    rows = rule.rows if side == "ours" else rule.their_rows
    if rows is None:
        return tensor
    if rows[1] > len(tensor):
        raise ValueError(f"{_name(rule, side)} has {len(tensor)} rows, but needs {rows[1]}: the sizes do not fit")
    return tensor[rows[0] : rows[1]]


def _changed(rule: Rule, piece: Tensor, to: Side) -> Tensor:
    """Apply the changes of a rule."""
    if to == "theirs":
        for change in rule.changes:
            piece = change.out(piece)
    else:
        for change in reversed(rule.changes):
            piece = change.back(piece)
    return piece


def _check_constant(rule: Constant, tensor: Tensor) -> None:
    if not bool((tensor == rule.value).all()):
        side, other = ("our model", "theirs") if rule.owner == "ours" else ("the transformers model", "ours")
        raise ValueError(
            f"{rule.name} of {side} has values other than {rule.value:g} (up to {float(tensor.abs().max()):.3g}), but "
            f"{other} has no such tensor"
        )


def _check_whole(name: str, marks: Tensor, verb: str) -> None:
    """Raise ValueError if a part of a tensor is left out, except for last rows that pad a table of ours."""
    if bool(marks.all()):
        return
    rows = marks.flatten(1).all(1)
    count = int(rows.sum())
    if name not in PADDED or not bool(rows[:count].all()) or bool(marks[count:].any()):
        raise ValueError(f"{int((~marks).sum())} of {marks.numel()} numbers of {name} are not {verb}")


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    return next(iter(tensors.values())).dtype


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
