"""Text files in other encodings than UTF-8, which is all that the engine reads: written in it before they are read."""

import codecs
from pathlib import Path

from pipelines.prepare.engine import decompressed

UTF_8 = "utf-8"
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""How a file begins that says its encoding itself."""
BINARY = {
    b"\x1f\x8b": "gzip, .gz",
    b"\x28\xb5\x2f\xfd": "zstd, .zst",
    b"\xfd7zXZ": "xz, .xz",
    b"PK\x03\x04": "zip, .zip",
    b"PAR1\x15": "Parquet, .parquet",
    b"Obj\x01": "Avro, which is not read: write Parquet",
}
"""How files begin that are no text, whatever their names say; what they are, with the suffix that says so."""
PIECE_BYTES = 1 << 20
ENCODING = "--encoding (encoding in a schema file)"
"""How messages name what says it."""


def check_encoding(name: str) -> None:
    """Raise ValueError unless Python knows text in this encoding."""
    try:
        "".encode(name)
    except LookupError as error:
        raise ValueError(
            f"the encoding {name!r} is not known: give one of Python's, such as latin-1, cp1252 or utf-16-le"
        ) from error


def encoding_of(path: Path, stated: str) -> str:
    """What a file of text says of itself, else what is stated of the log.

    Raises:
        ValueError: it begins as files of another kind do.
    """
    with decompressed(path) as stream:
        begins = stream.read(max(map(len, BINARY)))
    kind = next((kind for mark, kind in BINARY.items() if begins.startswith(mark)), None)
    if kind is not None:
        raise ValueError(f"{path} is no text, it begins as files of another kind do ({kind}): give it its own suffix")
    return next((encoding for mark, encoding in MARKS.items() if begins.startswith(mark)), stated)


def file_in_utf_8(path: Path, encoding: str, scratch: Path) -> Path:
    """A copy in `scratch` of the text of a file, compressed or not, without its mark.

    Raises ValueError, with file and line, if the file holds bytes that are no text in this encoding.
    """
    copy, line = scratch / "plain" / f"{path.name}.{UTF_8}", 1
    copy.parent.mkdir(exist_ok=True)
    with decompressed(path) as content, copy.open("w", encoding=UTF_8, newline="") as plain:
        pieces = iter(lambda: content.read(PIECE_BYTES), b"")
        try:
            for text in codecs.iterdecode(pieces, encoding):
                plain.write(text)
                line += text.count("\n")
        except UnicodeDecodeError as error:
            line += error.object[: error.start].decode(encoding, errors="ignore").count("\n")
            wrong = error.object[error.start : error.end].hex(" ")
            raise ValueError(
                f"{path}, line {line}: the bytes {wrong} are no text in {encoding}: say which {ENCODING} it has"
            ) from error
    return copy
