"""Metadata tables of corpora: CSV, TSV, JSON and JSON Lines in UTF-8; errors name the row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import PurePosixPath

from hf_csm.errors import UserError
from hf_csm.prepare.archive import Member


DELIMITERS = {".csv": ",", ".tsv": "\t"}
KEY_COLUMN = "FileName"
"""Column with the keys of a JSON object whose values are the rows."""


def read_rows(table: Member) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a table in order, each with its location (`table.csv: row 7`); cells are stripped.

    Rows are numbered by line, including the header. Empty lines are skipped; null becomes an empty cell.

    Raises:
        UserError: not UTF-8, or not in the format of its suffix.
    """
    suffix = PurePosixPath(table.file_name).suffix.lower()
    text = read_text(table)
    readers = {".json": _json_rows, ".jsonl": _json_lines}
    rows = readers[suffix](text) if suffix in readers else _csv_rows(text, DELIMITERS[suffix])
    name, number = str(table), 0
    try:
        for number, row in rows:
            yield f"{name}: row {number}", row
    except (csv.Error, json.JSONDecodeError, _Malformed) as error:
        raise UserError(
            f"{name}: cannot be read {f'after row {number}' if number else 'from its first row on'} ({error}).",
            "Repair what follows, or get the table again.",
        ) from error


def read_text(member: Member) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark.

    Raises:
        UserError: it has another encoding.
    """
    try:
        return member.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{member}: not UTF-8 text ({error.reason} at byte {error.start:,}).", "Save it as UTF-8, or get it again."
        ) from error


class _Malformed(Exception):
    """A row or table with an invalid structure."""


def _csv_rows(text: str, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    # Not `StringIO`, which needs four bytes per character: ratings of a large corpus have a hundred megabytes.
    lines = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8", newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = [column.strip() for column in next(reader, [])]
    twice = {column for column in header if header.count(column) > 1}
    if twice:
        raise _Malformed(f"the column {min(twice)!r} is there twice")
    for cells in reader:
        if len(cells) == len(header):
            yield reader.line_num, dict(zip(header, map(str.strip, cells), strict=True))
        elif cells:
            raise _Malformed(f"{len(cells)} cells under {len(header)} columns")


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    table = json.loads(text)
    if not isinstance(table, dict):
        raise _Malformed("not an object of objects")
    for number, (key, fields) in enumerate(table.items(), start=1):
        yield number, {KEY_COLUMN: key, **_cells(fields)}


def _json_lines(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    # Not `splitlines`, which splits at U+2028 too: that is allowed in a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _cells(json.loads(line))


def _cells(fields: object) -> dict[str, str]:
    if not isinstance(fields, dict):
        raise _Malformed(f"{str(fields)[:40]!r} is not an object")
    nested = next((key for key, value in fields.items() if isinstance(value, (dict, list))), None)
    if nested is not None:
        raise _Malformed(f"{nested!r} holds more than one value")
    cells = {key.strip(): "" if value is None else str(value).strip() for key, value in fields.items()}
    try:
        "".join([*cells, *cells.values()]).encode()
    except UnicodeEncodeError as error:  # an unpaired surrogate such as \ud83d
        raise _Malformed(f"half a character, {error.object[error.start]!r}") from error
    return cells
