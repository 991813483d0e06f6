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
    skip = int(index[symbols != 0].min(initial=len(tables)))
    order, ends = _coding_order(index, skip, len(tables))
    ordered = symbols[order]
    encoder = GroupEncoder()
    for table, start, end in zip(tables, ends[:-1], ends[1:], strict=True):
        if end > start:
            encoder.add(ordered[start:end], table)
    return bytes([skip]) + encoder.finish()


def decode_tile(data: bytes, index: NDArray[np.uint8], tables: list[Table]) -> NDArray[np.int32]:
    """Inverse of `encode_tile`: flat int32 symbols."""
    if not data or data[0] > len(tables):
        raise BitstreamError("a tile's stream has no valid first byte")
    skip = data[0]
    symbols = np.zeros(len(index), np.int32)
    order, ends = _coding_order(index, skip, len(tables))
    ordered = np.empty(len(order), np.int32)
    decoder = GroupDecoder(data[1:])
    for table, start, end in zip(tables, ends[:-1], ends[1:], strict=True):
        if end > start:
            ordered[start:end] = decoder.take(end - start, table)
    symbols[order] = ordered
    return symbols


def _coding_order(
    index: NDArray[np.uint8], skip: int, tables: int
) -> tuple[NDArray[np.intp], list[int]]:
    """Positions of the coded symbols, by table and within a table as they stand.

    With them, where each table's run begins, and the end of the last: tables + 1 numbers.
    """
    coded = np.flatnonzero(index >= skip)
    used = index[coded]
    order = np.argsort(used, kind="stable")  # a radix sort, for bytes
    ends = np.searchsorted(used[order], np.arange(tables + 1))
    return coded[order], ends.tolist()
