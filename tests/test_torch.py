"""The torch connector: photos as the archive gives them, in an order to stop and go on in."""

import errno
import hashlib
import io
import itertools
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from archive_samples import commit, png, row
from conftest import REPOSITORY
from photos import pixels
from PIL import Image
from test_archive_reader import CountingFileSystem
from torch.utils.data import DataLoader

import vaestream
from vaestream import Archive, Codec
from vaestream.archive.schema import Row
from vaestream.connectors.torch import ArchiveDataset, ArchiveLoader, ArchiveSampler, BlobCache
from vaestream.connectors.torch.order import Blocks, Even, mixed, share
from vaestream.connectors.torch.transfer import pack, unpack
from vaestream.errors import ArchiveError, DamagedArchiveError, VaestreamError

PHOTOS = 23
BROKEN, NOTES = "zz/broken.png", "zz/notes.txt"


@pytest.fixture(scope="module")
def parts(codec: Codec) -> dict[str, list[Row]]:
    """Three parts: bitstreams, gray ones among them, kept sources, and two rows that are none."""
    rows = []
    for i in range(PHOTOS):
        shape = (33 + 7 * (i % 4), 40 + 5 * (i % 5))
        picture = pixels(i, *shape)
        if i % 5 == 2:
            picture = np.ascontiguousarray(picture[..., 1])
        size = {"width": shape[1], "height": shape[0]}
        if i % 6 == 4:
            made = row(f"p/{i:02}.png", png(picture), reason="smaller than 32x32", **size)
        else:
            blob = codec.encode([picture], 60)[0]
            made = row(f"p/{i:02}.png", blob, codec="vae", quality=60.0, psnr=30.0 + i, **size)
        rows.append(made)
    rows.append(row(BROKEN, b"\xff\xd8", error="truncated after 2 bytes"))
    rows.append(row(NOTES, b"hello", reason="not a format this reader knows"))
    # Keys of a part need not be neighbours.
    return {"a": rows[0:9], "b": rows[9::2], "c": rows[10::2]}


@pytest.fixture(scope="module")
def folder(
    codec: Codec, parts: dict[str, list[Row]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("torch") / "archive"
    commit(str(path), parts, row_group_bytes=8000, model=codec.weights)
    return path


@pytest.fixture(scope="module")
def archive(folder: Path) -> Archive:
    return vaestream.open(str(folder), device="cpu")


@pytest.fixture(scope="module")
def expected(archive: Archive) -> dict[str, torch.Tensor]:
    """What `Archive.read` gives, as an item shows it."""
    keys = [key for key in archive if key not in (BROKEN, NOTES)]
    found = {}
    for key, picture in zip(keys, archive.read(keys), strict=True):
        colour = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
        found[key] = torch.from_numpy(colour.transpose(2, 0, 1).copy())
    return found


@pytest.fixture(scope="module")
def dataset(archive: Archive) -> ArchiveDataset:
    return ArchiveDataset(archive, columns=["key"], block_size=4)


def keys_of(batches: Any) -> list[list[str]]:
    return [[item["key"] for item in batch] for batch in batches]


def flat(batches: Any) -> list[str]:
    return [key for batch in keys_of(batches) for key in batch]


@pytest.fixture(scope="module")
def with_workers(dataset: ArchiveDataset) -> Callable[..., ArchiveLoader]:
    """A loader with two workers, kept and made anew for other ranks."""
    made: dict[str, ArchiveLoader] = {}

    def loader(batch_size: int = 3, **options: Any) -> ArchiveLoader:
        name = repr((batch_size, options))
        if name not in made:
            made.clear()
            made[name] = ArchiveLoader(
                dataset,
                batch_size,
                shuffle=True,
                window=3,
                num_workers=2,
                multiprocessing_context="fork",
                **options,
            )
        return made[name]

    return loader


# --- photos ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 100])
@pytest.mark.parametrize("shuffle", [False, True])
def test_pixels_are_those_of_the_archive(
    dataset: ArchiveDataset, expected: dict[str, torch.Tensor], batch_size: int, shuffle: bool
) -> None:
    loader = ArchiveLoader(dataset, batch_size, shuffle=shuffle)
    items = [item for batch in loader for item in batch]
    assert sorted(item["key"] for item in items) == sorted(expected)
    for item in items:
        image = item["image"]
        assert image.dtype == torch.uint8 and image.is_contiguous()
        assert torch.equal(image, expected[item["key"]])
        # Training keeps its inputs for the backward pass.
        assert not image.is_inference()


def test_pixels_are_the_same_by_way_of_workers(
    with_workers: Callable[..., ArchiveLoader], expected: dict[str, torch.Tensor]
) -> None:
    items = [item for batch in with_workers() for item in batch]
    assert sorted(item["key"] for item in items) == sorted(expected)
    for item in items:
        assert torch.equal(item["image"], expected[item["key"]])
        assert not item["image"].is_inference()


def test_workers_may_make_the_pixels(
    dataset: ArchiveDataset,
    expected: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: Any = {"num_workers": 1, "multiprocessing_context": "fork", "synthesis": "workers"}
    items = [item for batch in ArchiveLoader(dataset, 5, **options) for item in batch]
    assert [item["key"] for item in items] == sorted(expected)
    assert all(torch.equal(item["image"], expected[item["key"]]) for item in items)
    monkeypatch.setattr(dataset.archive.codec, "device", torch.device("meta"))
    with pytest.raises(ValueError, match="workers have no meta"):
        ArchiveLoader(dataset, 5, **options)


def test_a_dataset_is_a_sequence(archive: Archive, expected: dict[str, torch.Tensor]) -> None:
    dataset = ArchiveDataset(archive)
    assert dataset.keys == sorted(expected) and len(dataset) == len(expected)
    assert torch.equal(dataset[3], expected[dataset.keys[3]])
    assert torch.equal(dataset[-1], expected[dataset.keys[-1]])
    batch = dataset.__getitems__([7, 0, 7])
    for image, at in zip(batch, (7, 0, 7), strict=True):
        assert torch.equal(image, expected[dataset.keys[at]])
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    keys = dataset.keys[::-3]
    assert ArchiveDataset(archive, keys=keys).keys == keys
    with pytest.raises(ArchiveError, match="no photo 'nowhere'"):
        ArchiveDataset(archive, keys=["nowhere"])


def test_columns_make_items_dicts(archive: Archive) -> None:
    assert set(ArchiveDataset(archive, columns=[])[0]) == {"image"}
    free = ArchiveDataset(archive, columns=["key", "width", "sha256", "num_bytes"])
    read = ArchiveDataset(archive, columns=["psnr", "key", "sha256", "source_url"])
    for dataset in (free, read):
        for item in dataset.__getitems__(range(len(dataset))):
            info = archive.row(item["key"])
            assert set(item) == {"image", *(dataset.columns or ())}
            assert all(item[name] == getattr(info, name) for name in dataset.columns or ())
    with pytest.raises(ValueError, match=r"no column 'colour'.*width"):
        ArchiveDataset(archive, columns=["colour"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_less_than_a_photo_is_decoded(archive: Archive, num_workers: int) -> None:
    for view in ({"max_size": 24}, {"region": (3, 5, 20, 10)}):
        dataset = ArchiveDataset(archive, columns=["key"], **view)
        loader = ArchiveLoader(
            dataset, batch_size=4, num_workers=num_workers, multiprocessing_context="fork"
        )
        for batch in loader:
            for item in batch:
                (array,) = archive.read([item["key"]], **view)
                colour = array if array.ndim == 3 else np.repeat(array[..., None], 3, 2)
                assert np.array_equal(item["image"].permute(1, 2, 0).numpy(), colour)
    outside = ArchiveDataset(archive, region=(5000, 0, 8, 8), on_error="skip")
    assert list(ArchiveLoader(outside, batch_size=4)) == []


def test_a_transform_sees_the_image_and_collate_the_items(archive: Archive) -> None:
    dataset = ArchiveDataset(archive, columns=["width"], transform=lambda image: image.shape[2])
    loader = ArchiveLoader(dataset, 6, collate_fn=lambda items: [i["image"] for i in items])
    assert list(chain.from_iterable(loader)) == [dataset[at]["width"] for at in range(len(dataset))]


def test_a_plain_dataloader_takes_dataset_and_sampler(
    dataset: ArchiveDataset, expected: dict[str, torch.Tensor]
) -> None:
    sampler = ArchiveSampler(dataset, 4, shuffle=True, rank=0, world_size=1)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=1,
        collate_fn=list,
        multiprocessing_context="fork",
    )
    items = [item for batch in loader for item in batch]
    assert [item["key"] for item in items] == flat(ArchiveLoader(dataset, 4, shuffle=True))
    assert all(torch.equal(item["image"], expected[item["key"]]) for item in items)


def test_spawned_workers_get_nothing_of_the_caller(
    folder: Path, expected: dict[str, torch.Tensor]
) -> None:
    """Neither functions, which may not pickle, nor a device, which they must not touch."""
    dataset = ArchiveDataset(
        str(folder),
        transform=lambda image: image.float().mean().item(),
        on_error=lambda key, error: torch.zeros(3, 1, 1, dtype=torch.uint8),
    )
    means = list(chain.from_iterable(ArchiveLoader(dataset, 8, num_workers=1)))
    assert means == [image.float().mean().item() for _, image in sorted(expected.items())]
    dataset.archive.device = "cuda"
    assert dataset.reader.on_cpu().archive.device == "cpu"
    assert dataset.archive.device == "cuda"


# --- order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("even", ["none", "pad", "drop"])
@pytest.mark.parametrize("world_size", [1, 2, 5, 40])
def test_ranks_share_the_photos(
    dataset: ArchiveDataset, world_size: int, even: Even, shuffle: bool
) -> None:
    shares = []
    for rank in range(world_size):
        sampler = ArchiveSampler(
            dataset, 3, shuffle=shuffle, rank=rank, world_size=world_size, even=even
        )
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(len(batch) == 3 for batch in batches[:-1])
        shares.append(list(chain.from_iterable(batches)))
    sizes = {len(one) for one in shares}
    counts = Counter(chain.from_iterable(shares))
    if even == "none":
        assert max(sizes) - min(sizes) <= 1
        assert counts == Counter(range(PHOTOS))
    else:
        assert len(sizes) == 1
    if even == "pad":
        assert set(counts) == set(range(PHOTOS))
        assert counts.total() - PHOTOS < world_size
    if even == "drop":
        assert set(counts.values()) <= {1} and PHOTOS - counts.total() < world_size


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_with_workers_has_every_key_once(
    dataset: ArchiveDataset,
    with_workers: Callable[..., ArchiveLoader],
    expected: dict[str, torch.Tensor],
    world_size: int,
) -> None:
    found = []
    for rank in range(world_size):
        options: Any = {"rank": rank, "world_size": world_size, "even": "none"}
        alone = ArchiveLoader(dataset, 3, shuffle=True, window=3, **options)
        loader = with_workers(**options)
        assert keys_of(loader) == keys_of(alone)
        found += flat(alone)
        loader.set_epoch(0)
        alone.set_epoch(0)
        assert flat(loader) == flat(alone)
        found += flat(alone)
    assert Counter(found) == dict.fromkeys(expected, 2)


def test_each_epoch_and_seed_has_an_order_of_its_own(dataset: ArchiveDataset) -> None:
    loader = ArchiveLoader(dataset, 4, shuffle=True, seed=1)
    orders = [tuple(flat(loader)) for _ in range(3)]
    assert loader.epoch == 3 and len(set(orders)) == 3
    loader.set_epoch(1)
    assert tuple(flat(loader)) == orders[1]
    other = ArchiveLoader(dataset, 7, shuffle=True, seed=2)
    assert tuple(flat(other)) not in orders
    same = ArchiveLoader(dataset, 7, shuffle=True, seed=1)
    assert tuple(flat(same)) == orders[0]
    # An iteration that was left goes back to the epoch's beginning.
    same.set_epoch(0)
    next(iter(same))
    assert tuple(flat(same)) == orders[0]


def test_the_order_is_the_same_for_ever() -> None:
    """A state that was saved with one version is gone on with in another."""
    blocks = Blocks.cut(np.array([0] * 7 + [1] * 3), np.zeros(10, np.int64), np.arange(10)[::-1], 3)
    assert blocks.bounds.tolist() == [0, 3, 6, 7, 10]
    assert blocks.positions.tolist() == [6, 5, 4, 3, 2, 1, 0, 9, 8, 7]
    shuffled = blocks.shuffled(7, 2)
    assert shuffled.tolist() == [6, 5, 4, 3, 2, 1, 9, 8, 7, 0]
    assert mixed(shuffled, 5, 7, 2, 0).tolist() == [4, 5, 2, 6, 3, 0, 8, 9, 1, 7]


def test_a_shuffle_reads_a_few_blocks_at_a_time() -> None:
    rng = np.random.default_rng(0)
    parts, rows = rng.integers(0, 9, 1000), rng.permutation(1000)
    blocks = Blocks.cut(parts, rows // 50, rows % 50, 10)
    numbers = blocks.numbers()
    for number, block in enumerate(blocks[at] for at in range(len(blocks))):
        assert len(set(parts[block])) == 1 and 1 <= len(block) <= 10
        assert (np.diff(rows[block]) > 0).all()
        assert (numbers[block] == number).all()
    shuffled = blocks.shuffled(0, 0)
    order = mixed(shuffled, 80, 0, 0, 0)
    assert sorted(order) == list(range(1000))
    for start in range(0, 1000, 80):
        assert len(set(numbers[order[start : start + 80]])) <= 20
        assert sorted(order[start : start + 80]) == sorted(shuffled[start : start + 80])
    first = [mixed(blocks.shuffled(0, epoch), 80, 0, epoch, 0)[0] for epoch in range(200)]
    assert len(set(first)) > 100


def test_ranks_are_those_of_the_process_group(
    dataset: ArchiveDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    found = list(ArchiveSampler(dataset, 4))
    assert found == list(ArchiveSampler(dataset, 4, rank=2, world_size=3))
    assert share(PHOTOS, 2, 3, "pad") == (16, 8)


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"window": 0}, {"seed": -1}, {"even": "odd"}, {"rank": 2, "world_size": 2}],
)
def test_what_makes_no_sense_is_refused(dataset: ArchiveDataset, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ArchiveSampler(dataset, **{"batch_size": 2, "rank": 0, "world_size": 1, **wrong})


# --- stopping and going on ---------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0 to 0", "0 to 2", "2 to 0"])
def test_an_epoch_goes_on_where_it_was_stopped(
    dataset: ArchiveDataset, with_workers: Callable[..., ArchiveLoader], workers: str
) -> None:
    """20 stops, each after some batches of some epoch; the state passes through JSON."""
    dice = random.Random(workers)
    loaders: dict[str, Callable[[], ArchiveLoader]] = {
        "0": lambda: ArchiveLoader(dataset, 3, shuffle=True, window=3),
        "2": lambda: with_workers(3),
    }
    before, after = (loaders[name] for name in workers.split(" to "))
    for _ in range(20 if workers == "0 to 0" else 7):
        epoch = dice.randrange(5)
        whole = loaders["0"]()
        whole.set_epoch(epoch)
        uninterrupted = [*keys_of(whole), *keys_of(whole)]
        length = len(whole)
        stop = dice.randint(0, length)
        first = before()
        first.set_epoch(epoch + 7)
        first.set_epoch(epoch)
        received = keys_of(itertools.islice(first, stop))
        state = json.loads(json.dumps(first.state_dict()))
        # Not what workers have prepared.
        assert state["taken"] == min(3 * stop, PHOTOS)
        second = after()
        second.load_state_dict(state)
        assert second.state_dict() == state and second.epoch == epoch
        second.set_epoch(epoch)
        received += keys_of(second)
        assert second.epoch == epoch + 1
        received += keys_of(second)
        assert received == uninterrupted


def test_a_batch_that_could_not_be_collated_comes_again(dataset: ArchiveDataset) -> None:
    def collate(items: list[Any]) -> list[Any]:
        if dataset.keys[4] in [item["key"] for item in items]:
            raise RuntimeError("out of memory")
        return items

    loader = ArchiveLoader(dataset, 3, collate_fn=collate)
    received: list[str] = []
    with pytest.raises(RuntimeError, match="out of memory"):
        for batch in loader:
            received += [item["key"] for item in batch]
    assert received
    other = ArchiveLoader(dataset, 3)
    other.load_state_dict(loader.state_dict())
    assert received + flat(other) == flat(ArchiveLoader(dataset, 3))


def test_a_state_may_be_gone_on_with_in_other_batches(dataset: ArchiveDataset) -> None:
    order = flat(ArchiveLoader(dataset, 1, shuffle=True))
    loader = ArchiveLoader(dataset, 3, shuffle=True)
    received = flat(itertools.islice(loader, 2))
    other = ArchiveLoader(dataset, 5, shuffle=True)
    other.load_state_dict(loader.state_dict())
    received += flat(itertools.islice(other, 1))
    third = ArchiveLoader(dataset, 100, shuffle=True)
    third.load_state_dict(other.state_dict())
    assert received + flat(third) == order


def test_a_state_of_another_order_is_refused(dataset: ArchiveDataset, archive: Archive) -> None:
    state = ArchiveLoader(dataset, 3, shuffle=True).state_dict()
    fewer = ArchiveDataset(archive, keys=dataset.keys[1:], columns=["key"])
    others = {
        "photos_sha256": ArchiveLoader(fewer, 3, shuffle=True),
        "shuffle": ArchiveLoader(dataset, 3),
        "seed": ArchiveLoader(dataset, 3, shuffle=True, seed=1),
        "window": ArchiveLoader(dataset, 3, shuffle=True, window=7),
        "world_size": ArchiveLoader(dataset, 3, shuffle=True, rank=0, world_size=2),
        "even": ArchiveLoader(dataset, 3, shuffle=True, even="drop"),
    }
    for name, loader in others.items():
        with pytest.raises(ValueError, match=f"another {name}"):
            loader.load_state_dict(state)
    with pytest.raises(ValueError, match="not a state of a loader: it has no 'shuffle'"):
        ArchiveLoader(dataset, 3).load_state_dict({"model": {}, "loader": state})


# --- broken photos -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A copy with a byte of a bitstream and a byte of a kept source changed; their keys."""
    path = tmp_path_factory.mktemp("damaged") / "archive"
    shutil.copytree(folder, path)
    victims = {"p/03.png", "p/16.png"}
    for entry in vaestream.open(str(folder)).index.to_pylist():
        if entry["key"] in victims:
            with (path / entry["part"]).open("r+b") as file:
                file.seek(entry["offset"] + entry["length"] // 2)
                byte = file.read(1)
                file.seek(-1, 1)
                file.write(bytes([byte[0] ^ 1]))
    return path, victims


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_photos_do_as_the_caller_says(
    damaged: tuple[Path, set[str]], expected: dict[str, torch.Tensor], workers: int
) -> None:
    path, victims = damaged
    keys = sorted([*expected, BROKEN, NOTES])
    broken = {*victims, BROKEN, NOTES}
    errors: dict[str, VaestreamError] = {}

    def replacement(key: str, error: VaestreamError) -> torch.Tensor:
        errors[key] = error
        return torch.zeros(3, 2, 2, dtype=torch.uint8)

    dataset = ArchiveDataset(str(path), keys=keys, columns=["key", "width"], on_error=replacement)
    loader = ArchiveLoader(
        dataset, 4, num_workers=workers, multiprocessing_context="fork", shuffle=True
    )
    items = {item["key"]: item for batch in loader for item in batch}
    assert set(items) == set(keys) and set(errors) == broken
    for key, item in items.items():
        if key in broken:
            assert item["image"].shape == (3, 2, 2)
        else:
            assert torch.equal(item["image"], expected[key]) and item["width"] is not None
    assert "truncated after 2 bytes" in str(errors[BROKEN])
    assert "not a format this reader knows" in str(errors[NOTES])
    assert all(isinstance(errors[key], DamagedArchiveError) for key in victims)
    assert all(key in str(error) for key, error in errors.items())

    dataset.on_error = "skip"
    loader.set_epoch(0)
    assert sorted(flat(loader)) == sorted(set(keys) - broken)
    assert loader.epoch == 1

    dataset.on_error = "raise"
    loader.set_epoch(0)
    received: list[str] = []
    with pytest.raises(ArchiveError):
        for batch in loader:
            received += [item["key"] for item in batch]
    # The state is that of before the batch that could not be had.
    assert loader.state_dict()["taken"] == len(received)
    dataset.on_error = "skip"
    state = loader.state_dict()
    loader.load_state_dict(state)
    assert sorted(received + flat(loader)) == sorted(set(keys) - broken)


def test_a_skipped_photo_counts_in_the_state(damaged: tuple[Path, set[str]]) -> None:
    dataset = ArchiveDataset(str(damaged[0]), columns=["key"], on_error="skip")
    whole = flat(ArchiveLoader(dataset, 1))
    assert len(whole) == PHOTOS - 2
    for stop in range(len(whole) + 1):
        loader = ArchiveLoader(dataset, 1)
        received = flat(itertools.islice(loader, stop))
        other = ArchiveLoader(dataset, 1)
        other.load_state_dict(loader.state_dict())
        assert received + flat(other) == whole


def test_one_item_that_is_broken_raises(damaged: tuple[Path, set[str]]) -> None:
    path, victims = damaged
    dataset = ArchiveDataset(str(path), on_error="skip")
    at = dataset.keys.index(min(victims))
    with pytest.raises(DamagedArchiveError, match=min(victims)):
        dataset[at]
    assert len(dataset.__getitems__(range(at, at + 3))) == 2


def test_a_lost_part_is_its_photos_damage(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    shutil.copytree(folder, path)
    (path / "part-b.parquet").unlink()
    dataset = ArchiveDataset(str(path), columns=["key", "psnr"], on_error="skip")
    index = dataset.archive.index.to_pylist()
    lost = {entry["key"] for entry in index if entry["part"] == "part-b.parquet"}
    assert sorted(flat(ArchiveLoader(dataset, 6))) == sorted(set(dataset.keys) - lost)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_model_that_is_missing_is_no_photos_fault(
    folder: Path, tmp_path: Path, num_workers: int
) -> None:
    path = tmp_path / "archive"
    shutil.copytree(folder, path)
    shutil.rmtree(path / "models")
    dataset = ArchiveDataset(str(path), on_error="skip")
    loader = ArchiveLoader(dataset, 6, num_workers=num_workers, multiprocessing_context="fork")
    with pytest.raises(DamagedArchiveError, match="the model is missing"):
        list(loader)


def test_kept_sources_need_no_model(tmp_path: Path) -> None:
    picture = pixels(1, 40, 50)
    commit(str(tmp_path), {"a": [row("a.png", png(picture), width=50, height=40, channels=3)]})
    (model,) = (tmp_path / "models").iterdir()
    model.unlink()
    assert np.array_equal(ArchiveDataset(tmp_path)[0].permute(1, 2, 0), picture)


def test_a_kept_source_without_8_bit_levels_does_as_the_caller_says(tmp_path: Path) -> None:
    with Image.open(REPOSITORY / "examples" / "photos" / "piazza-gray.jpg") as photo:
        gray = photo.crop((400, 300, 496, 372))
    file = io.BytesIO()
    gray.convert("F").save(file, "TIFF")
    kept = [
        row("depth.tif", file.getvalue(), reason="floating point", width=96, height=72),
        row("small.png", png(pixels(1)), reason="smaller than 32x32", width=96, height=72),
    ]
    commit(str(tmp_path), {"a": kept})
    skipping = ArchiveDataset(str(tmp_path), columns=["key"], on_error="skip")
    assert flat(ArchiveLoader(skipping, 4)) == ["small.png"]
    raising = ArchiveDataset(str(tmp_path))
    with pytest.raises(ArchiveError, match=r"depth.tif.*floating point has no 8-bit levels"):
        list(ArchiveLoader(raising, 4))


@pytest.mark.parametrize("region", [(0, 0, 10), (0, 0, 0, 5), (-1, 0, 5, 5), (0, 0, 1.5, 5)])
def test_a_region_that_no_photo_can_have_is_refused_at_once(folder: Path, region: Any) -> None:
    with pytest.raises(ValueError, match="region"):
        ArchiveDataset(str(folder), region=region, on_error="skip")


def test_a_store_that_fails_is_no_photos_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ArchiveDataset(str(folder), on_error="skip")

    def fail(keys: Any) -> Any:
        raise ArchiveError("the store does not answer")

    monkeypatch.setattr(dataset.archive, "blobs", fail)
    with pytest.raises(ArchiveError, match="does not answer"):
        list(ArchiveLoader(dataset, 6))


# --- cache -------------------------------------------------------------------------------------


@pytest.fixture
def reads() -> Iterator[list[tuple[str, int]]]:
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    CountingFileSystem.reads.clear()
    yield CountingFileSystem.reads


def stored(cache: BlobCache) -> int:
    return sum(path.stat().st_size for path in (cache.folder / "blobs").glob("*/*"))


def test_with_a_cache_blocks_are_read_whole_and_once(
    folder: Path, tmp_path: Path, reads: list[tuple[str, int]], expected: dict[str, torch.Tensor]
) -> None:
    cache = BlobCache(tmp_path / "cache", 10 << 20)
    dataset = ArchiveDataset(
        f"counting://{folder}", columns=["key"], cache=cache, block_size=4, device="cpu"
    )
    assert dataset.archive.codec
    loader = ArchiveLoader(dataset, 2, shuffle=True)
    reads.clear()
    for batch in loader:
        assert all(torch.equal(item["image"], expected[item["key"]]) for item in batch)
    # Blobs of a block lie together, but for a row group's other columns between two groups.
    assert len(dataset.reader.blocks) <= len(reads) <= 2 * len(dataset.reader.blocks)
    blobs = sum(archive_row["length"] for archive_row in dataset.archive.index.to_pylist())
    assert stored(cache) <= sum(length for _, length in reads)
    assert stored(cache) <= blobs
    reads.clear()
    assert sorted(flat(loader)) == sorted(expected)
    # Another dataset, and other blocks: the same bytes.
    other = ArchiveDataset(f"counting://{folder}", cache=cache, block_size=9)
    assert len(other.__getitems__(range(PHOTOS))) == PHOTOS
    assert [read for read in reads if "part-" in read[0]] == []


def test_a_cache_keeps_to_its_limit(
    folder: Path, tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    index = vaestream.open(str(folder)).index
    limit = sum(index["length"].to_pylist()) // 3
    cache = BlobCache(tmp_path / "cache", limit)
    dataset = ArchiveDataset(str(folder), columns=["key"], cache=cache, block_size=3)
    loader = ArchiveLoader(dataset, 4, shuffle=True, num_workers=2, multiprocessing_context="fork")
    for _ in range(3):
        for batch in loader:
            assert 0 < stored(cache) <= limit
            assert all(torch.equal(item["image"], expected[item["key"]]) for item in batch)


def test_a_full_disk_is_not_counted_time_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, counted = BlobCache(tmp_path, 1000), list[int]()
    blobs = [bytes([i]) * 30 for i in range(6)]
    digests = [hashlib.sha256(blob).digest() for blob in blobs]
    cache.put(digests[0], blobs[0])

    def full(path: Path, data: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    files = BlobCache._files

    def count(cache: BlobCache) -> Any:
        counted.append(1)
        return files(cache)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        patch.setattr(BlobCache, "_files", count)
        for digest, blob in zip(digests[1:], blobs[1:], strict=True):
            cache.put(digest, blob)
    assert not counted and not (tmp_path / ".writing").exists()
    assert [digest in cache for digest in digests] == [True] + [False] * 5
    cache.put(digests[1], blobs[1])
    assert cache.get(digests[1]) == blobs[1]


def test_what_was_used_last_stays(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 100)
    blobs = [bytes([i]) * 30 for i in range(6)]
    digests = [hashlib.sha256(blob).digest() for blob in blobs]
    for at in range(3):
        cache.put(digests[at], blobs[at])
        # Clocks of file systems are coarse.
        os.utime(cache._path(digests[at]), ns=(at, at))
    assert cache.get(digests[0]) == blobs[0]
    cache.put(digests[3], blobs[3])
    assert [digest in cache for digest in digests] == [True, False, True, True, False, False]
    assert stored(cache) <= 100
    # Larger than all of it: not kept, and nothing else goes.
    cache.put(hashlib.sha256(b"x" * 101).digest(), b"x" * 101)
    assert stored(cache) == 90
    # What is damaged on the disk is not there, and can be put again.
    cache._path(digests[0]).write_bytes(b"y" * 30)
    assert cache.get(digests[0]) is None
    cache.put(digests[0], blobs[0])
    assert cache.get(digests[0]) == blobs[0]
    # A process that ended while it counted.
    (tmp_path / ".lock").write_text("")
    again = BlobCache(tmp_path, 100)
    again.put(digests[4], blobs[4])
    assert stored(again) <= 100 and again.get(digests[4]) == blobs[4]


def test_a_damaged_blob_is_not_kept(damaged: tuple[Path, set[str]], tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 10 << 20)
    dataset = ArchiveDataset(
        str(damaged[0]), columns=["key"], cache=cache, on_error="skip", block_size=5
    )
    for _ in range(2):
        assert sorted(flat(ArchiveLoader(dataset, 4))) == sorted(set(dataset.keys) - damaged[1])
    assert len(list((cache.folder / "blobs").glob("*/*"))) == PHOTOS - 2


# --- processes and stores ----------------------------------------------------------------------


def test_many_tensors_travel_as_one() -> None:
    rng = np.random.default_rng(0)
    kinds = [torch.uint8, torch.int16, torch.int32, torch.float32]
    tensors = [
        torch.from_numpy(rng.integers(0, 100, rng.integers(0, 5, dims))).to(kinds[i % 4])
        for i, dims in enumerate([0, 1, 2, 3, 4] * 5)
    ]
    tensors.append(tensors[2].t())
    value = {"tensors": tensors, "rest": ("text", None, 3.5)}
    packed = pack(value)
    assert packed.data.dtype == torch.uint8 and packed.data.ndim == 1
    back = unpack(packed)
    assert back["rest"] == value["rest"]
    for one, other in zip(tensors, back["tensors"], strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_from_s3(
    s3: Any, codec: Codec, parts: dict[str, list[Row]], expected: dict[str, torch.Tensor]
) -> None:
    fs = fsspec.filesystem("s3", **s3.options)
    fs.mkdir("test-torch")
    url = "s3://test-torch/archive"
    commit(url, parts, row_group_bytes=8000, model=codec.weights, storage_options=s3.options)
    # The parent has a connection before it forks.
    dataset = ArchiveDataset(url, columns=["key"], storage_options=s3.options)
    assert torch.equal(dataset[0]["image"], expected[dataset.keys[0]])
    loader = ArchiveLoader(dataset, 4, shuffle=True, num_workers=2, multiprocessing_context="fork")
    items = [item for batch in loader for item in batch]
    assert sorted(item["key"] for item in items) == sorted(expected)
    assert all(torch.equal(item["image"], expected[item["key"]]) for item in items)
