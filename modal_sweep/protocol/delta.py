"""Compression against something alike: the jobs of a sweep differ in a few bytes of many thousands.

zlib looks back 32 KiB at most, so a stretch of the data is compressed against the stretch of the
other one around the same place.
"""

import struct
import zlib

STRETCH = 12_000
AROUND = 10_000
LEVEL = 6


def window(alike: bytes, number: int) -> bytes:
    """What a stretch is compressed against."""
    start = number * STRETCH
    return alike[max(0, start - AROUND) : start + STRETCH + AROUND]


def pack(data: bytes, alike: bytes) -> bytes:
    """Compress `data`; `unpack` needs the same `alike`."""
    packed = b""
    for number, start in enumerate(range(0, len(data), STRETCH)):
        packer = zlib.compressobj(LEVEL, zdict=window(alike, number))
        part = packer.compress(data[start : start + STRETCH]) + packer.flush()
        packed += struct.pack("<I", len(part)) + part
    return packed


def unpack(packed: bytes, alike: bytes) -> bytes:
    """The opposite of `pack`."""
    data, at, number = b"", 0, 0
    while at < len(packed):
        (size,) = struct.unpack_from("<I", packed, at)
        unpacker = zlib.decompressobj(zdict=window(alike, number))
        data += unpacker.decompress(packed[at + 4 : at + 4 + size]) + unpacker.flush()
        at, number = at + 4 + size, number + 1
    return data
