"""Raw records out of .jsonl, .json and .parquet files, also gzipped, with the place of each."""

import gzip
import io
import itertools
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from specforge_exp.data.conversations import IDS
from specforge_exp.errors import InputError, first_line

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
BESIDE = (
    ".md .rst .cff .yaml .yml .toml .py .ipynb .sh .lock .html .pdf .png .jpg .jpeg .gif .webp .svg"
)
"""What lies beside data and is none, as names without a dot and hidden ones are none either."""
RAW_CHARACTERS = 2000
CHUNK_CHARACTERS = 2**20
BATCH_ROWS = 1000
SPACE = re.compile(r"[ \t\r\n]*")
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

    @property
    def kind(self) -> str:
        """The reason without its details."""
        return re.split("[:;]", self.reason)[0]


Raw = tuple[str, Any]
"""Where a record stands, and its parsed content."""


class Columns(NamedTuple):
    """What is read of a table; a .jsonl or .json record is read whole."""

    needed: str
    """A table has at least one of these."""
    optional: str = ""
    """Also read where it has them, like ids."""

    def among(self, names: list[str], read: bool = True) -> list[str]:
        """Those of the names that are read, or are not."""
        known = {*self.needed.split(), *self.optional.split(), *IDS}
        return [name for name in names if (name in known) == read]

    def of(self, name: str, names: list[str]) -> list[str]:
        """The columns to read, or an InputError that lists what there is."""
        needed = set(self.needed.split())
        if not needed.intersection(names):
            expected = " or ".join(f"`{column}`" for column in sorted(needed))
            raise InputError(f"{name} has the columns {', '.join(names)}; expected {expected}")
        return self.among(names)


def shown(folder: Path) -> list[Path]:
    """The files of a folder and below it, sorted, but for hidden ones and those in hidden folders,
    where editors and notebooks keep older copies."""
    inside = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    kept = [file for file in inside if not any(part.startswith(".") for part in file.parts)]
    return [folder / file for file in sorted(kept)]


def passed_over(path: str, suffixes: tuple[str, ...]) -> str:
    """Which files of a folder may be data and have none of these suffixes; "" when none is, or it
    is no folder."""
    folder = Path(path).expanduser()
    found = [
        str(file.relative_to(folder))
        for file in shown(folder)
        if file.suffix.lower() not in ("", *BESIDE.split())
        and not file.name.endswith((*suffixes, ".rejected.jsonl"))
    ]
    return ", ".join(found[:3]) + f" and {len(found) - 3} more" * (len(found) > 3)


def tell_passed_over(path: str, suffixes: tuple[str, ...]) -> None:
    """Warn of them."""
    if others := passed_over(path, suffixes):
        log.warning("%s: not read: %s; what is read ends in %s", path, others, ", ".join(suffixes))


def parse(name: str, file: IO[bytes], columns: Columns) -> Iterator[Raw | Rejected]:
    """The records of one file; its name tells the format.

    Raises:
        InputError: the file as a whole is broken.
    """
    if not name.endswith(SUFFIXES):
        raise InputError(f"{name} is not one of: {', '.join(SUFFIXES)}")
    kind = name.removesuffix(".gz")
    try:
        if kind != name:
            file = cast(IO[bytes], gzip.GzipFile(fileobj=file))
        if kind.endswith(".parquet"):
            yield from parse_parquet(name, file, columns)
        elif kind.endswith(".jsonl"):
            yield from parse_lines(name, file)
        else:
            yield from parse_json(name, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
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


def parse_json(name: str, file: IO[bytes]) -> Iterator[Raw | Rejected]:
    """A list of records, an object of records by name, one record, or lines after all."""
    if file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        file.seek(0)
        yield from parse_list(name, file)
        return
    file.seek(0)
    first = file.readline()
    try:
        json.loads(first)
        second = file.readline()
    except (ValueError, RecursionError):
        second = b""
    if second.strip():  # JSON lines under the name .json are common
        yield from parse_lines(name, itertools.chain([first, second], file))
        return
    try:
        content = json.loads((first + second + file.read()).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON: {error}; a file of lines is named .jsonl") from None
    if not isinstance(content, dict):
        raise InputError(f"{name} holds a {type(content).__name__}, not a list of records")
    by_name = content and all(isinstance(value, dict) for value in content.values())
    for number, record in enumerate(content.values() if by_name else [content]):
        yield f"{name}#{number}", record


def parse_list(name: str, file: IO[bytes]) -> Iterator[Raw]:
    """The records of a JSON list one by one: the file may be larger than memory.

    Bytes that are no UTF-8 become what no JSON file can hold, so that only their record is lost.
    """
    decode = json.JSONDecoder().raw_decode
    reader = io.TextIOWrapper(cast(Any, file), encoding="utf-8-sig", errors="surrogateescape")
    text, place, number, mark = "", 0, 0, "["
    while True:
        try:
            start = after_space(text, place)
            if text[start] == "]" and mark == ",":
                break
            if text[start] != mark:
                raise InputError(f"{name} is not JSON: no `{mark}` after {number} records")
            start = after_space(text, start + 1)
            if text[start] == "]" and mark == "[":
                break
            record, end = decode(text, start)
            text[end]  # a list goes on after a record; at the end of the text it may be half of one
        except (ValueError, IndexError, RecursionError) as error:
            more = reader.read(max(CHUNK_CHARACTERS, len(text) - place))
            if not more:
                why = f"broken after {number} records: {error}"
                raise InputError(f"{name} is not JSON: {why}; fetch it again") from None
            text, place = text[place:] + more, 0
            continue
        yield f"{name}#{number}", record
        number, mark, place = number + 1, ",", end
    if (text[start + 1 :] + reader.read()).strip():
        raise InputError(f"{name} is not JSON: it goes on after its list of {number} records")


def after_space(text: str, place: int) -> int:
    """Where the white space at `place` ends."""
    return cast(re.Match[str], SPACE.match(text, place)).end()


def parse_parquet(name: str, file: IO[bytes], columns: Columns) -> Iterator[Raw]:
    """The rows of a Parquet file, only the columns that matter."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{name} needs: {INSTALL_DATA}") from None
    try:
        table = parquet.ParquetFile(file)
        names = columns.of(name, table.schema_arrow.names)
        batches = table.iter_batches(BATCH_ROWS, columns=names)
        for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            yield f"{name}#{number}", without_nulls(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        why = first_line(error)
        raise InputError(f"{name} is not a readable Parquet file: {why}; fetch it again") from None


def without_nulls(value: Any) -> Any:
    """A row without the nulls that columns put where a record has no such key."""
    if isinstance(value, dict):
        return {key: without_nulls(v) for key, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(v) for v in value]
    return value
