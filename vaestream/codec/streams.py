"""Entropy-coded streams of a photo: z, whole, and y, a tile at a time."""

import numpy as np
from numpy.typing import NDArray

from vaestream.errors import BitstreamError

from .entropy import GroupDecoder, GroupEncoder, Table


def encode_z(z_hat: NDArray[np.int32], tables: list[Table]) -> bytes:
    """z_hat (hyper, h, w) int32, one table a channel."""
    encoder = GroupEncoder()
    for channel, table in zip(z_hat, tables, strict=True):
        encoder.add(channel.reshape(-1), table)
    return encoder.finish()


def decode_z(data: bytes, tables: list[Table], height: int, width: int) -> NDArray[np.int32]:
    """Inverse of `encode_z`: (hyper, height, width) int32."""
    decoder = GroupDecoder(data)
    channels = [decoder.take(height * width, table) for table in tables]
    return np.stack(channels).reshape(len(tables), height, width)


def encode_tile(symbols: NDArray[np.int32], index: NDArray[np.uint8], tables: list[Table]) -> bytes:
    """Symbols and the table index of each, both flat and in the order (row, column, channel).

    The first byte is the number of tables, from the narrowest, that the tile does not use: all
    its symbols there are zero and are not coded.
    """
    nonzero = index[symbols != 0]
    skip = int(nonzero.min()) if len(nonzero) else len(tables)
    order = _coding_order(index, skip)
    ordered = symbols[order]
    encoder = GroupEncoder()
    at = 0
    for number, count in _groups(index, skip, len(tables)):
        encoder.add(ordered[at : at + count], tables[number])
        at += count
    return bytes([skip]) + encoder.finish()


def decode_tile(data: bytes, index: NDArray[np.uint8], tables: list[Table]) -> NDArray[np.int32]:
    """Inverse of `encode_tile`: flat int32 symbols."""
    if not data or data[0] > len(tables):
        raise BitstreamError("a tile's stream has no valid first byte")
    skip = data[0]
    symbols = np.zeros(len(index), np.int32)
    decoder = GroupDecoder(data[1:])
    parts = [
        decoder.take(count, tables[number]) for number, count in _groups(index, skip, len(tables))
    ]
    if parts:
        symbols[_coding_order(index, skip)] = np.concatenate(parts)
    return symbols


def _groups(index: NDArray[np.uint8], skip: int, tables: int) -> list[tuple[int, int]]:
    """(table, number of symbols) of every table in use, in coding order."""
    counts = np.bincount(index, minlength=tables)
    return [(t, int(counts[t])) for t in range(skip, tables) if counts[t]]


def _coding_order(index: NDArray[np.uint8], skip: int) -> NDArray[np.intp]:
    """Positions of the coded symbols: by table, within a table as they stand."""
    coded = np.flatnonzero(index >= skip)
    return coded[np.argsort(index[coded], kind="stable")]
