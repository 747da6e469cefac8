"""Raw records out of .jsonl, .json and .parquet files, also gzipped, with the place of each."""

import gzip
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

from specforge_exp.errors import InputError

SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
COLUMNS = "id conversations messages task_id prompt question".split()
RAW_CHARACTERS = 2000
INSTALL_DATA = "pip install -c constraints.txt datasets pyarrow"


@dataclass(frozen=True)
class Rejected:
    """A raw record that is no conversation."""

    where: str
    """file:line, or file#index where there are no lines."""
    reason: str
    """Why; what stands before a colon or semicolon is the kind, for counting."""
    raw: str
    """The record as it was found; a long one is cut at RAW_CHARACTERS."""


Raw = tuple[str, Any]
"""Where a record stands, and its parsed content."""


def parse(name: str, file: IO[bytes]) -> Iterator[Raw | Rejected]:
    """The records of one file; its name tells the format.

    Raises:
        InputError: the file as a whole is broken.
    """
    if not name.endswith(SUFFIXES):
        raise InputError(f"{name} is not one of: {', '.join(SUFFIXES)}")
    try:
        if name.endswith(".gz"):
            name, file = name.removesuffix(".gz"), cast(IO[bytes], gzip.GzipFile(fileobj=file))
        if name.endswith(".parquet"):
            yield from parse_parquet(name, file)
        elif name.endswith(".jsonl"):
            yield from parse_lines(name, file)
        else:
            yield from parse_json(name, file.read())
    except (EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{name} is a broken gzip file: {error}; fetch it again") from None


def parse_lines(name: str, lines: Iterable[bytes]) -> Iterator[Raw | Rejected]:
    """One record per line; blank lines are none."""
    for number, line in enumerate(lines, 1):
        where = f"{name}:{number}"
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace").strip()
        if not text:
            continue
        try:
            line.decode()
            yield where, json.loads(text)
        except UnicodeDecodeError as error:
            yield Rejected(where, f"not UTF-8: {error.reason}", text[:RAW_CHARACTERS])
        except (ValueError, RecursionError) as error:
            yield Rejected(where, f"not JSON: {error}", text[:RAW_CHARACTERS])


def parse_json(name: str, data: bytes) -> Iterator[Raw | Rejected]:
    """A list of records, an object of records by name, one record, or lines after all."""
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):  # JSON lines under the name .json are common
            yield from parse_lines(name, data.splitlines())
            return
        raise InputError(f"{name} is not JSON: {error}; a file of lines is named .jsonl") from None
    if isinstance(content, dict):
        by_name = content and all(isinstance(value, dict) for value in content.values())
        content = list(content.values()) if by_name else [content]
    if not isinstance(content, list):
        raise InputError(f"{name} holds a {type(content).__name__}, not a list of records")
    for number, record in enumerate(content):
        yield f"{name}#{number}", record


def parse_parquet(name: str, file: IO[bytes]) -> Iterator[Raw]:
    """The rows of a Parquet file, only the columns that matter."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{name} needs: {INSTALL_DATA}") from None
    try:
        table = parquet.ParquetFile(file)
        columns = wanted_columns(name, table.schema_arrow.names)
        number = itertools.count()
        for batch in table.iter_batches(columns=columns):
            for row in batch.to_pylist():
                yield f"{name}#{next(number)}", without_nulls(row)
    except pyarrow.ArrowException as error:
        raise InputError(f"{name} is not a readable Parquet file: {error}") from None


def wanted_columns(name: str, columns: list[str]) -> list[str]:
    """The columns that any format reads, or an InputError that lists what there is."""
    wanted = [column for column in columns if column in COLUMNS]
    if not wanted or wanted == ["id"]:
        raise InputError(
            f"{name} has the columns {', '.join(columns)}; expected `conversations` or `messages`"
        )
    return wanted


def without_nulls(value: Any) -> Any:
    """A row without the nulls that columns put where a record has no such key."""
    if isinstance(value, dict):
        return {key: without_nulls(v) for key, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(v) for v in value]
    return value
