"""The length of a video file by its own account, so that one that was cut short can be told from a short one.

ffmpeg reads what is there, and takes a file that breaks off for a shorter video. MP4 and its kin, Matroska and WebM, AVI, and GIF
say where they end; formats that are made to be cut anywhere (MPEG streams) do not.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

BOXES = {b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"uuid", b"meta", b"sidx", b"styp", b"mfra", b"pnot", b"udta"}
NEEDED_BOXES = {b"moov", b"mdat", b"moof"}
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
GIF_PADDING, GIF_END = b"\0\r\n ", b";"


def promised_bytes(path: Path) -> int:
    """Bytes that a file must have by its own header; 0 where it does not say."""
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(0)
        if head[4:] in BOXES:
            return _of_boxes(file, path.stat().st_size)
        if head[:4] == EBML:
            return _of_ebml(file)
        if head[:4] == b"RIFF":
            return _of_riff(file)
        if head[:3] == b"GIF":
            return _of_gif(file, path.stat().st_size)
    return 0


def _of_boxes(file: BinaryIO, size: int) -> int:
    """End of the last box of MP4's kind that pictures need; what follows the known boxes is not looked at."""
    at = end = 0
    while at + 8 <= size:
        file.seek(at)
        length = int.from_bytes(file.read(4), "big")
        kind = file.read(4)
        if length == 1:  # stands behind
            length = int.from_bytes(file.read(8), "big")
        if kind not in BOXES or length < 8:  # 0: up to the end of the file
            break
        at += length
        if kind in NEEDED_BOXES:
            end = at
    return end


def _of_ebml(file: BinaryIO) -> int:
    """End of Matroska's segment, which holds everything; 0 where its length was not known when it was written."""
    file.seek(len(EBML))
    file.seek(_vint(file) or 0, os.SEEK_CUR)
    if file.read(len(SEGMENT)) != SEGMENT:
        return 0
    length = _vint(file)
    return 0 if length is None else file.tell() + length


def _vint(file: BinaryIO) -> int | None:
    """A whole number in EBML's form: the zeros that it begins with say how many bytes it has; all ones: unknown."""
    first = file.read(1)
    n_more = 8 - first[0].bit_length() if first else 0
    digits = first + file.read(n_more)
    n_bits = 7 * len(digits)
    value = int.from_bytes(digits, "big") & ((1 << n_bits) - 1)
    return None if value == (1 << n_bits) - 1 else value


def _of_riff(file: BinaryIO) -> int:
    """End of the last part of an AVI, which has one for each gigabyte; 0 where one does not say how long it is."""
    at = end = 0
    while True:
        file.seek(at)
        head = file.read(8)
        if head[:4] != b"RIFF":
            return end
        length = int.from_bytes(head[4:], "little")
        if length in (0, 0xFFFFFFFF):
            return 0
        end = at + 8 + length
        at = end + length % 2


def _of_gif(file: BinaryIO, size: int) -> int:
    """One byte more than there are where the byte that ends a GIF is missing."""
    file.seek(max(0, size - 64))
    return size if file.read().rstrip(GIF_PADDING).endswith(GIF_END) else size + 1
