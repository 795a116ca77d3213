"""A difference between two checkpoints as one file that a device applies: changed rows at few bits, changed networks.

The file is safetensors; its metadata hold JSON with the ids of both checkpoints and a sha256 over the model's tensors
before and after. A device whose model has another hash than `before` refuses; one whose result has another hash than
`after` takes everything back. Rows are the bytes that the checkpoint stored, so that the device has exactly the model
that a restore of the checkpoint gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import CheckFailed, FormatError, UsageError
from edgewright.io.hashing import sha256, tensors_hash
from edgewright.io.tensors import read_tensors, save_tensors
from edgewright.systems.check_n_run.recovery import find, load_model
from edgewright.training import snapshot
from edgewright.training.checkpoint.files import Files
from edgewright.training.checkpoint.manifest import Manifest, Table, check_record, kinds_of
from edgewright.training.checkpoint.records import decode_ids, decode_values, encode_ids
from edgewright.training.checkpoint.shards import read_file

KIND, VERSION = "edgewright-update", 1
_KEY = "update"


def diff(before: str | Path, after: str | Path, to: str | Path) -> dict[str, Any]:
    """Write the update from one checkpoint's model to another's.

    Args:
        before: folder of a checkpoint.
        after: folder of a checkpoint, of the same root or another.
        to: the file.

    Returns:
        What is in the update.

    Raises:
        UsageError: models of other shapes.
        FormatError: checkpoints that cannot be used.
        OutputError: the file could not be written.
    """
    (first_files, first), (last_files, last) = find(before), find(after)
    (*_, base), old = load_model(first_files, first)
    chain, new = load_model(last_files, last)
    tip = chain[-1]
    _check_same(before, old, after, new)
    tensors: dict[str, Tensor] = {}
    records: list[dict[str, Any]] = []
    for name in tip.tables:
        changed = _differing(old[name], new[name])
        if len(changed):
            _collect(last_files, chain, name, changed, new[name], tensors, records)
    dense = sorted(name for name in new if name not in tip.tables and not _equal(old[name], new[name]))
    tensors |= {f"dense.{name}": new[name] for name in dense}
    fields = {
        "format": KIND, "version": VERSION, "base": base.id, "id": tip.id, "before": tensors_hash(old),
        "after": tensors_hash(new), "records": records, "dense": dense,
    }  # fmt: skip
    _write(Path(to), tensors, fields)
    return fields


def apply_delta(model: nn.Module | Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """Bring a model from the checkpoint that an update builds upon to the one it leads to, in place.

    Args:
        model: a module, or its tensors by name.
        path: the update.

    Returns:
        What is in the update.

    Raises:
        FormatError: no update, or a broken one.
        UsageError: the model is not the one that it builds upon.
        CheckFailed: the result is not what it should be. Nothing has been changed in any of these cases.
    """
    fields, tensors = _read(Path(path))
    held = snapshot.model_tensors(model) if isinstance(model, nn.Module) else dict(model)
    if tensors_hash(held) != fields["before"]:
        raise UsageError(
            f"{path} leads from checkpoint {fields['base']} to {fields['id']}, and the model is not that of "
            f"{fields['base']}: fetch the update that starts where this model is"
        )
    kinds = kinds_of(tensors)
    steps: list[tuple[Tensor, Tensor | None, Tensor]] = []
    for record in fields["records"]:
        table = held.get(record["table"])
        if table is None:
            raise FormatError(f"{path} changes {record['table']!r}, which the model does not have")
        check_record(record, kinds, Table(len(table), list(table.shape[1:]), str(table.dtype).removeprefix("torch.")))
        ids = decode_ids(record, tensors, len(table))
        steps.append((table, ids, decode_values(record, tensors, tuple(table.shape[1:]), table.dtype)))
    for name in fields["dense"]:
        tensor, value = held.get(name), tensors.get(f"dense.{name}")
        if tensor is None or value is None or value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise FormatError(f"{path} changes {name!r}, which the model does not have in that shape")
        steps.append((tensor, None, value))
    with torch.no_grad():
        undo = [(t, ids, (t if ids is None else t[ids.to(t.device)]).detach().clone()) for t, ids, _ in steps]
        _put(steps)
        if tensors_hash(held) != fields["after"]:
            _put(undo)
            raise CheckFailed(f"{path} did not lead to {fields['id']}; the model is as it was")
    return fields


def merge(first: str | Path, second: str | Path, to: str | Path) -> dict[str, Any]:
    """Write one update in place of two that follow each other: of rows in both, the later one's.

    Args:
        first: an update.
        second: an update that builds upon what `first` leads to.
        to: the file.

    Returns:
        What is in the new update.

    Raises:
        UsageError: the second does not follow the first.
        FormatError: a broken update.
    """
    (early, a), (late, b) = _read(Path(first)), _read(Path(second))
    if early["after"] != late["before"]:
        raise UsageError(f"{second} starts at {late['base']} and {first} ends at {early['id']}: they do not follow")
    tensors: dict[str, Tensor] = {}
    records: list[dict[str, Any]] = []
    for source, fields, other in ((a, early, late), (b, late, None)):
        for record in fields["records"]:
            ids = decode_ids(record, source, 2**62)
            keep = torch.ones(len(ids), dtype=torch.bool)
            for over in other["records"] if other is not None else ():
                if over["table"] == record["table"]:
                    keep &= ~torch.isin(ids, decode_ids(over, b, 2**62))
            if bool(keep.any()):
                _add(tensors, records, record, source, ids, keep)
    dense = sorted({*early["dense"], *late["dense"]})
    tensors |= {f"dense.{n}": (b if n in late["dense"] else a)[f"dense.{n}"] for n in dense}
    fields = {**late, "base": early["base"], "before": early["before"], "records": records, "dense": dense}
    _write(Path(to), tensors, fields)
    return fields


def _collect(
    files: Files, chain: list[Manifest], name: str, changed: Tensor, values: Tensor,
    tensors: dict[str, Tensor], records: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Of each changed row the stored bytes of the last record that has it."""
    wanted = torch.zeros(len(values), dtype=torch.bool)
    wanted[changed] = True
    for link in reversed(chain):
        for record in reversed(link.records):
            if record["table"] != name or not bool(wanted.any()):
                continue
            source = read_file(files, link.id, record["file"])
            ids = decode_ids(record, source, len(values))
            keep = wanted[ids]
            if bool(keep.any()):
                _add(tensors, records, record, source, ids, keep)
                wanted[ids] = False


def _add(
    tensors: dict[str, Tensor], records: list[dict[str, Any]], record: dict[str, Any], source: Mapping[str, Tensor],
    ids: Tensor, keep: Tensor,
) -> None:  # fmt: skip
    """The rows `keep` of a record, as a record of its own."""
    key, old = len(records), f"emb.{record['key']}"
    places = keep.nonzero().squeeze(1)
    chosen = ids[places]
    fields = {
        "key": key,
        "table": record["table"],
        "rows": len(chosen),
        "first": int(chosen[0]),
        "bits": record["bits"],
    }
    fields["ids"], tensors[f"emb.{key}.ids"] = encode_ids(chosen)
    tensors[f"emb.{key}.codes"] = source[f"{old}.codes"][places]
    if record["bits"] is not None:
        at = source.get(f"{old}.raw_at", torch.empty(0, dtype=torch.int32)).long()
        stays = keep[at]
        fields["raw"] = int(stays.sum())
        if fields["raw"]:
            tensors[f"emb.{key}.raw_at"] = (keep.cumsum(0) - 1)[at[stays]].to(torch.int32)
            tensors[f"emb.{key}.raw"] = source[f"{old}.raw"][stays]
    records.append(fields)


def _write(path: Path, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    fields["sha256"] = _seal(fields, tensors)
    save_tensors(path, tensors, {_KEY: json.dumps(fields)})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(fields, tensors) of an update, checked. Raises UsageError, FormatError."""
    tensors, texts = read_tensors(path)
    try:
        fields = json.loads(texts.get(_KEY, "null"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read ({str(error)[:120]})") from error
    if not isinstance(fields, dict) or fields.get("format") != KIND:
        raise FormatError(f"{path} is no update; `edgewright checkpoint diff A B --to {path.name}` writes one")
    if fields.get("version") != VERSION:
        raise FormatError(f"{path} has format version {str(fields.get('version'))[:20]}; this version reads {VERSION}")
    if fields.pop("sha256", None) != _seal(fields, tensors):
        raise FormatError(f"{path} was changed after it was written (sha256)")
    try:
        for record in fields["records"]:
            whole = all(type(record[n]) is int and 0 <= record[n] < 2**62 for n in ("key", "rows", "first"))
            if not whole or not record["rows"] or record["ids"] not in ("delta", "bitmap"):
                raise FormatError(f"{path} has a record without rows")
            if not isinstance(record["table"], str):
                raise FormatError(f"{path} has a record without a table")
            if not (record["bits"] is None or (record["bits"] in (2, 3, 4, 8) and type(record["raw"]) is int)):
                raise FormatError(f"{path} has a record of {str(record['bits'])[:20]} bits")
        if not all(isinstance(fields[n], str) for n in ("base", "id", "before", "after")):
            raise FormatError(f"{path} does not say from where it leads to where")
        if not all(isinstance(name, str) for name in fields["dense"]):
            raise FormatError(f"{path} names a tensor by something that is no text")
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} lacks a field, or has one of another type ({error!r})") from error
    return fields, tensors


def _seal(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over everything that the file says."""
    text = json.dumps({name: value for name, value in fields.items() if name != "sha256"}, sort_keys=True)
    return sha256(text, tensors_hash(tensors))


def _put(steps: list[tuple[Tensor, Tensor | None, Tensor]]) -> None:
    for tensor, ids, value in steps:
        if ids is None:
            tensor.copy_(value)
        else:
            tensor[ids.to(tensor.device)] = value.to(tensor.device)


def _differing(a: Tensor, b: Tensor) -> Tensor:
    """Rows whose bits differ."""
    words = [t.reshape(len(t), -1).contiguous().view(torch.uint8) for t in (a, b)]
    return (words[0] != words[1]).any(1).nonzero().squeeze(1)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def _check_same(before: Any, old: Mapping[str, Tensor], after: Any, new: Mapping[str, Tensor]) -> None:
    for name in sorted({*old, *new}):
        shapes = [f"{m[name].dtype}{list(m[name].shape)}" if name in m else "absent" for m in (old, new)]
        if shapes[0] != shapes[1]:
            raise UsageError(f"{name} is {shapes[0]} in {before} and {shapes[1]} in {after}: no update leads there")
