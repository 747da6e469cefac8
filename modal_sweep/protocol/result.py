"""What a call returns: one small compressed JSON document, the same bytes as on the Volume."""

import base64
import json
import math
import zlib
from pathlib import Path
from typing import Any

from modal_sweep.errors import JobFailed
from modal_sweep.protocol.outputs import files_below

# Above 8 KiB Modal moves a result through an extra upload and download.
MOST_BYTES = 7000
MOST_PLAIN = 16 * MOST_BYTES
PLAIN = (str, int, float, bool, type(None))


def pack_whole(envelope: dict[str, Any], folder: Path, log: Path) -> bytes | None:
    """Compress an envelope with all of a job's outputs and its log inside; None when too large."""
    paths = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
    logs = [log] if log.exists() else []
    if sum(path.stat().st_size for path in [*paths.values(), *logs]) > MOST_PLAIN:
        return None
    files = {name: path.read_bytes().decode("latin-1") for name, path in paths.items()}
    text = "".join(path.read_bytes().decode("latin-1") for path in logs)
    packed = compress({**envelope, "files": files, "log": text})
    return packed if len(packed) <= MOST_BYTES else None


def pack(envelope: dict[str, Any], manifest: dict[str, Any]) -> bytes:
    """Compress an envelope without the outputs, which lie on the Volume.

    Args:
        envelope: status, value, error and so on.
        manifest: the files, as `outputs.save` returns it; left out when it is too large.
    """
    small = compress({**envelope, "manifest": listed(manifest)})
    if len(small) <= MOST_BYTES:
        return small
    if error := envelope.get("error"):  # the whole text is in the job's log
        envelope = {**envelope, "error": {**error, "message": error["message"][-2000:]}}
    return compress({**envelope, "manifest": None})


def listed(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a result says of files."""
    keys = ("size", "sha256")
    return {name: {key: entry[key] for key in keys} for name, entry in manifest.items()}


def failed(kind: str, message: str, status: str = "failed") -> dict[str, Any]:
    """The envelope of a job without a result."""
    return {"status": status, "error": {"type": kind, "message": message}}


def compress(envelope: dict[str, Any]) -> bytes:
    """JSON, compressed."""
    return zlib.compress(json.dumps(envelope, separators=(",", ":")).encode())


def unpack(data: bytes) -> dict[str, Any]:
    """The envelope of `pack`."""
    return dict(json.loads(zlib.decompress(data)))


def pack_value(value: Any) -> dict[str, Any]:
    """A return value: as JSON where that says it exactly, else pickled.

    A number is a plain number, whatever library it came from: it outlives its call, and NaN is NaN.

    Raises:
        JobFailed: it cannot be pickled.
    """
    try:
        value = without_library(value)
        if is_plain(value):
            return {"json": value}
        if type(value) is tuple and is_plain(list(value)):
            return {"json": list(value), "tuple": True}
        import cloudpickle

        return {"pickle": base64.b64encode(cloudpickle.dumps(value)).decode()}
    except Exception as error:
        kind = type(value).__name__
        raise JobFailed(f"the return value, a {kind}, cannot be sent: {error}") from None


def without_library(value: Any) -> Any:
    """Scalars and zero-dimensional arrays of NumPy, torch and their like as Python's own values.

    Also inside lists, tuples and dicts. They are known by an empty `shape`, so nothing is imported.
    """
    if type(value) in (list, tuple):
        return type(value)(map(without_library, value))
    if type(value) is dict:
        return {key: without_library(item) for key, item in value.items()}
    scalar = getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if scalar else value


def is_plain(value: Any) -> bool:
    """Whether JSON brings the value back as it was."""
    if type(value) in PLAIN:
        return True
    if type(value) is list:
        return all(is_plain(item) for item in value)
    if type(value) is dict:
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    return False


def without_pickle(envelope: dict[str, Any]) -> dict[str, Any]:
    """An envelope that lay on a disk: nothing of it is ever unpickled."""
    pickled = "pickle" in (envelope.get("value") or {})
    return {**envelope, "value": {"other": True}} if pickled else envelope


def unpack_value(packed: dict[str, Any]) -> Any:
    """What `pack_value` was given.

    Raises:
        JobFailed: it was pickled and has not come from the call itself, or is of something that is
            not here.
    """
    if "json" in packed:
        return tuple(packed["json"]) if packed.get("tuple") else packed["json"]
    if "pickle" not in packed:
        raise JobFailed("its return value was kept in its call, which has expired")
    import pickle

    try:
        return pickle.loads(base64.b64decode(packed["pickle"]))
    except Exception as error:
        raise JobFailed(f"its return value cannot be read here: {error!r}") from None


def is_nan(packed: dict[str, Any] | None) -> bool:
    """Whether a job returned NaN, alone or among several: that is no number to minimise."""
    value = (packed or {}).get("json")
    values = value if isinstance(value, list) else [value]
    return any(isinstance(item, float) and math.isnan(item) for item in values)
