"""Read conversations from wherever a `Source` points: files, the hub, templates.

Every raw record becomes a conversation or a `Rejected` that says where it stands and why, so
that one bad line neither stops the reading nor disappears.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from specforge_exp.config import Source
from specforge_exp.data import synthetic
from specforge_exp.data.files import (
    INSTALL_DATA,
    SUFFIXES,
    Raw,
    Rejected,
    parse,
    passed_over,
    shown,
    tell_passed_over,
    without_nulls,
)
from specforge_exp.data.formats import FORMATS, Record, convert
from specforge_exp.errors import InputError, first_line, naming
from specforge_exp.offline import offline

log = logging.getLogger(__name__)

SCHEMES = "hub:<id>[/<configuration>][:<split>], hub:<id>/<file>, synthetic:<split>[/<category>]"


def read(source: Source) -> Iterator[Record | Rejected]:
    """The conversations of a source and what had to be set aside, in order.

    With `shuffle` all records are read before the first is yielded. `skip` and `limit` count
    conversations. What is rejected among the skipped ones is not yielded; reading stops at the
    limit.

    Raises:
        InputError: the source cannot be found or read, or `skip` leaves nothing of it.
    """
    adapt = FORMATS[source.format].adapt
    accepted = 0
    skipped_over: Counter[str] = Counter()
    items = (
        item if isinstance(item, Rejected) else convert(item, adapt) for item in raw_records(source)
    )
    if source.shuffle is not None:
        import numpy as np

        shuffled = list(items)
        # The order of `Dataset.shuffle(seed)`, so that `limit` takes the records that others take.
        order = np.random.default_rng(source.shuffle).permutation(len(shuffled))
        items = (shuffled[index] for index in order)
    for result in items:
        if isinstance(result, Rejected):
            if accepted >= source.skip:
                yield result
            else:
                skipped_over[result.kind] += 1
            continue
        accepted += 1
        if accepted > source.skip:
            yield result
        if source.limit is not None and accepted == source.skip + source.limit:
            return
    if source.skip and accepted <= source.skip:
        raise InputError(
            f"{source.path} has {accepted} conversations, so skip={source.skip} leaves none"
            + (f" (set aside: {reasons(skipped_over)})" if skipped_over else "")
        )


def load(source: Source, what: str) -> list[Record]:
    """All conversations of a source, each from its first user message on.

    Args:
        source: where they come from.
        what: what they are for, e.g. "bench data set gsm8k"; for messages.

    Raises:
        InputError: the source cannot be read or holds no conversation.
    """
    items = list(read(source))
    records = [from_first_user(item) for item in items if not isinstance(item, Rejected)]
    rejected = [item for item in items if isinstance(item, Rejected)]
    why = reasons(Counter(item.kind for item in rejected))
    if not records:
        first = f": {why}; first {rejected[0].where}" if rejected else ""
        raise InputError(f"{what}: {source.path} (format {source.format}) is empty{first}")
    if rejected:
        log.warning("%s: %s: set aside %s", what, source.path, why)
    return records


def reasons(kinds: Counter[str]) -> str:
    """How many were rejected for what, e.g. `3 not JSON, 1 no user message`."""
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def from_first_user(record: Record) -> Record:
    """The conversation without answers that stand before anyone asked; itself if there are none."""
    messages = record["conversations"]
    first = next(number for number, m in enumerate(messages) if m["role"] == "user")
    turns = [m for m in messages[:first] if m["role"] == "system"] + messages[first:]
    return record if len(turns) == len(messages) else {**record, "conversations": turns}


def local_files(source: Source) -> list[Path]:
    """The files that a source reads on this machine, sorted; none for the other schemes.

    Raises:
        InputError: there is no such file or folder, or nothing in it can be read.
    """
    scheme, colon, _ = source.path.partition(":")
    path = Path(source.path).expanduser()
    if colon and scheme in ("hub", "synthetic"):
        return []
    if path.is_dir():
        inside = [file for file in shown(path) if known(file.name)]
        if inside:
            return inside
        others = passed_over(source.path, SUFFIXES)
        what = f"{path} holds no {' or '.join(SUFFIXES)} file"
        raise InputError(what + (f", only {others}" if others else ""))
    if not path.exists():
        raise InputError(
            f"{source.path} does not exist; a data path is a {', '.join(SUFFIXES)} file, "
            f"a folder of them, {SCHEMES}"
        )
    if not known(path.name):
        raise InputError(f"{path} is not one of: {', '.join(SUFFIXES)}")
    return [path]


def unread(source: Source) -> list[str]:
    """What the first record of a source's files has and its format does not read."""
    columns = FORMATS[source.format].columns
    for path in local_files(source)[:1]:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return columns.among(parquet.read_schema(path).names, read=False)
        with naming(path), path.open("rb") as file:
            match next(parse(str(path), file, columns), None):
                case (_, dict() as first):
                    return columns.among(list(first), read=False)
    return []


def stand_ins(path: str) -> list[Path]:
    """The files here that are read in the place of a data set of the hub, `path` being of a source;
    none where the hub's own are, or it is of another scheme."""
    scheme, _, rest = path.partition(":")
    if scheme != "hub":
        return []
    name, part, _ = hub_name(rest)
    folder = Path(name)
    if known(part):
        return [folder / member for member in spelt_out(part) if (folder / member).exists()]
    return shown(folder)


def depends_on(source: Source) -> list[Path]:
    """The files of this machine that a source is made of; InputError as `local_files`."""
    return local_files(source) or stand_ins(source.path)


def known(name: str) -> bool:
    """True for a file name that `parse` can read."""
    return name.endswith(SUFFIXES) and not name.endswith(".rejected.jsonl")


def raw_records(source: Source) -> Iterator[Raw | Rejected]:
    """Parsed records, before their format is looked at."""
    scheme, _, rest = source.path.partition(":")
    files = local_files(source)
    if not files:
        yield from read_hub(rest, source) if scheme == "hub" else read_synthetic(rest, source)
    else:
        tell_passed_over(source.path, SUFFIXES)
    for path in files:
        try:
            with naming(path), path.open("rb") as file:
                yield from parse(str(path), file, FORMATS[source.format].columns)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error}") from None


def read_hub(rest: str, source: Source) -> Iterator[Raw | Rejected]:
    """A split of a hub data set, streamed, or one file of it, downloaded to the hub cache.

    A local folder in the hub's layout stands in for the hub: one of the same name here, or any by
    its whole path.
    """
    columns = FORMATS[source.format].columns
    name, part, split = hub_name(rest)
    try:
        if known(part):
            for member in spelt_out(part):
                with hub_file(name, member).open("rb") as file:
                    yield from parse(source.path.replace(part, member), file, columns)
            return
        from datasets import load_dataset

        # What is read whole anyway is kept in the cache of `datasets`, which works offline.
        stream = source.shuffle is None
        rows = load_dataset(name, part or None, split=split or "train", streaming=stream)
        if rows.column_names:  # JSON has none before it is read
            rows = rows.select_columns(columns.of(source.path, rows.column_names))
        for number, row in enumerate(rows):
            names = columns.of(source.path, list(row))
            yield f"{source.path}#{number}", without_nulls({key: row[key] for key in names})
    except InputError:
        raise
    except ModuleNotFoundError:
        raise InputError(f"{source.path} needs: {INSTALL_DATA}") from None
    except Exception as error:  # the hub client raises dozens of types, also in mid-stream
        if not Path(name).exists() and (why := offline()):
            raise InputError(
                f"{why}, and {source.path} cannot be read from its cache ({first_line(error)}); "
                "without a network: data=synthetic, or data=local data.path=<file>"
            ) from None
        raise InputError(
            f"{source.path} cannot be read: {first_line(error)} (check the id, the configuration "
            "and the split; a gated data set needs `hf auth login`; a file downloaded by hand "
            "works as data.path=<file>)"
        ) from None


def hub_name(rest: str) -> tuple[str, str, str]:
    """Data set, configuration or file, and split of `<id>[/<configuration or file>][:<split>]`.

    An id is `owner/name`; what begins with `/`, `.` or `~` is a local folder as a whole.
    """
    path, _, split = rest.partition(":")
    if path.startswith(("/", ".", "~")):
        return str(Path(path).expanduser()), "", split
    owner, _, more = path.partition("/")
    name, _, part = more.partition("/")
    if split and known(part):
        raise InputError(f"hub:{rest} names a file, which has no split; leave out `:{split}`")
    return f"{owner}/{name}" if name else owner, part, split


def spelt_out(text: str) -> list[str]:
    """`a{1,2}b` as a shell spells it out: a1b, a2b."""
    before, brace, rest = text.partition("{")
    inside, _, after = rest.partition("}")
    return [before + choice + after for choice in inside.split(",")] if brace else [text]


def hub_file(name: str, part: str) -> Path:
    """One file of a hub data set: in a local folder of that name, or in the hub cache."""
    local = Path(name) / part
    if local.exists():
        return local
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, part, repo_type="dataset"))


def read_synthetic(rest: str, source: Source) -> Iterator[Raw]:
    """Templated conversations made on the spot."""
    split, _, category = rest.partition("/")
    if source.limit is None:
        raise InputError(f"{source.path} needs a limit: how many conversations to make")
    try:
        made = synthetic.generate(split, source.skip + source.limit, category=category or None)
    except ValueError as error:
        raise InputError(f"{source.path}: {error}") from None
    for number, record in enumerate(made):
        yield f"{source.path}#{number}", record
