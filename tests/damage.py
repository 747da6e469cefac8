"""What can happen to a file after it was written."""

DAMAGES = ("truncated", "emptied", "zeroed", "flipped", "{}", "[]")


def damaged(content: bytes, how: str) -> bytes:
    """The content of a file after it happened."""
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return {
        "truncated": content[:middle],
        "emptied": b"",
        "zeroed": bytes(len(content)),
        "flipped": flipped,
    }.get(how, how.encode())
