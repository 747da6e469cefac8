"""Orders to a process that forks: a line of JSON, and files. Standard library only."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any


def give(connection: socket.socket, order: dict[str, Any], files: Sequence[int]) -> None:
    """Send an order, once; an OSError means that nobody has read all of it."""
    text = json.dumps(order).encode() + b"\n"
    sent = socket.send_fds(connection, [text], files)
    if sent < len(text):  # nothing more is an error where who reads it has answered and gone on
        connection.sendall(text[sent:])


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """An order and its files; nothing, if who writes it is killed."""
    text, files, _, _ = socket.recv_fds(connection, 2**22, 64)
    while not text.endswith(b"\n"):
        piece = connection.recv(2**22)
        if not piece:
            return {}, files
        text += piece
    return json.loads(text), files
