"""Entropy coding gives back what it was given."""

import numpy as np
import pytest

from vaestream.codec.entropy import (
    GroupDecoder,
    GroupEncoder,
    Table,
    TableSet,
    read_varint,
    write_varint,
)
from vaestream.codec.streams import SymbolCoding, TileDecoder, TileEncoder
from vaestream.errors import BitstreamError

TABLES = [Table(-r, np.full(2 * r + 2, 100 + r, np.int32)) for r in (1, 2, 5, 30)]
PLAIN = SymbolCoding(TABLES, len(TABLES))


def encode_tile(*passes: tuple[np.ndarray, np.ndarray]) -> bytes:
    encoder = TileEncoder(PLAIN)
    for symbols, index in passes:
        encoder.add(symbols, index)
    return encoder.finish()


@pytest.mark.parametrize("seed", range(5))
def test_tiles_come_back_with_outliers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    index = rng.integers(0, 4, 5000).astype(np.uint8)
    symbols = np.round(rng.laplace(0, 1 + 3 * index)).astype(np.int32)
    symbols[rng.integers(0, 5000, 5)] = [2**31 - 1, -(2**31), 10**6, -5000, 31]
    parts = [slice(0, 700), slice(700, 5000)]
    data = encode_tile(*((symbols[part], index[part]) for part in parts))
    decoder = TileDecoder(data, PLAIN)
    for part in parts:
        assert np.array_equal(decoder.take(index[part]), symbols[part])


def test_tables_without_symbols_cost_nothing() -> None:
    index = np.zeros(10000, np.uint8)
    index[:100] = 3
    symbols = np.zeros(10000, np.int32)
    symbols[:100] = np.arange(100) - 50
    data = encode_tile((symbols, index))
    assert data[0] == 3  # the narrower tables are skipped
    assert np.array_equal(TileDecoder(data, PLAIN).take(index), symbols)
    assert len(encode_tile((np.zeros(10000, np.int32), index))) < 4


def test_size_is_near_the_entropy() -> None:
    rng = np.random.default_rng(0)
    counts = np.array([1, 10, 100, 1000, 100, 10, 1, 1], np.int32)
    mass = counts / counts.sum()
    symbols = (rng.choice(8, 20000, p=mass) - 3).clip(-3, 3).astype(np.int32)
    encoder = GroupEncoder()
    encoder.add(symbols, TableSet([Table(-3, counts)]), [0, len(symbols)])
    ideal = -np.log2(mass[symbols + 3]).sum() / 8
    assert len(encoder.finish()) < ideal * 1.001 + 16


def test_varints() -> None:
    for value in (0, 1, 127, 128, 300, 2**20, 2**40):
        assert read_varint(write_varint(value) + b"rest", 0) == (value, len(write_varint(value)))
    for endless in (b"", b"\x80", b"\xff" * 20):
        with pytest.raises(BitstreamError):
            read_varint(endless, 0)


def test_missing_escapes_are_noticed() -> None:
    encoder = GroupEncoder()
    encoder.add(np.array([1000, 2000], np.int32), TableSet(TABLES[:1]), [0, 2])
    data = bytearray(encoder.finish())
    with pytest.raises(BitstreamError):
        GroupDecoder(b"\x00" + bytes(data[5:])).take(TableSet(TABLES[:1]), [0, 2])
