"""Ways to damage a file."""

import numpy as np

INSERTED = [
    b"\0", b"\xff\xfe", b'"', b"\n", b"\r", b",", b"\t", b"{", b"}", b"-", b"9" * 12, b"e400", b"nan", b"\\ud800",
    b"\n\n", b"null", b"\xef\xbb\xbf", b"9" * 400,
]  # fmt: skip


def mutated(raw: bytes, random: np.random.Generator) -> bytes:
    """One to four of: cut off, a byte changed, bytes put in, bytes taken out, a stretch twice, a 10 MB field."""
    for _ in range(int(random.integers(1, 5))):
        at, length = int(random.integers(len(raw) + 1)), int(random.integers(1, 40))
        match random.integers(8):
            case 0:
                raw = raw[:at]
            case 1 if at < len(raw):
                raw = raw[:at] + bytes([random.integers(256)]) + raw[at + 1 :]
            case 2 | 3 | 4:
                raw = raw[:at] + INSERTED[random.integers(len(INSERTED))] + raw[at:]
            case 5:
                raw = raw[:at] + raw[at + length :]
            case 6:
                raw = raw[: at + length] + raw[at:]
            case 7 if random.integers(12) == 0:
                raw = raw[:at] + b"A" * (10 << 20) + raw[at:]
    return raw
