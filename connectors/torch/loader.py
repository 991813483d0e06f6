"""Batches of photos, entropy-decoded in worker processes and synthesised in this one."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

from torch.utils.data import DataLoader, Dataset

from vaestream.codec import Latents

from .dataset import ArchiveDataset
from .order import Even
from .reader import Coded, PhotoReader
from .sampler import ArchiveSampler
from .transfer import Packed, pack, unpack


class ArchiveLoader:
    """Iterates over an `ArchiveDataset` in batches, and can stop and go on anywhere.

    Workers read bytes and decode them to latents, on CPUs; this process makes pixels of them on
    the dataset's device, and applies `on_error`, `transform` and `collate_fn`, none of which need
    pickle. Workers never touch that device. The pixels are those of `Archive.read` in this process.

    An iteration is one epoch, the next one the epoch after it. It begins where `load_state_dict`
    has put it, else at the epoch's first photo. One iteration at a time.

    batch_size, shuffle, seed, window, rank, world_size, even, drop_last: as `ArchiveSampler` has
        them. A batch from which `on_error="skip"` leaves nothing does not come.
    num_workers: processes; with 0 all happens in this one. prefetch_factor: batches that each
        prepares in advance; they lie in shared memory, with about 3 bytes a pixel.
    synthesis: where pixels are made, in the "main" process or in "workers", which is faster where
        the device is the CPU: each has one thread and needs no other. With more threads in the main
        process, a float32 convolution may have another last bit there, and a pixel another level.
    multiprocessing_context: how workers are started. "spawn" and "forkserver" are safe in any
        program, which keeps its own work below `if __name__ == "__main__"`; "fork" starts faster
        and is safe where the program has no other threads by then.
    collate_fn: from the list of items to the batch; by default the list.

    Raises ValueError for values that make no sense. An iteration raises as the dataset does.
    """

    def __init__(
        self,
        dataset: ArchiveDataset,
        batch_size: int = 1,
        *,
        shuffle: bool = False,
        seed: int = 0,
        window: int = 64,
        rank: int | None = None,
        world_size: int | None = None,
        even: Even = "pad",
        drop_last: bool = False,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        synthesis: Literal["main", "workers"] = "main",
        multiprocessing_context: str = "spawn",
        collate_fn: Callable[[list[Any]], Any] = list,
    ) -> None:
        if synthesis not in ("main", "workers"):
            raise ValueError(f"synthesis {synthesis!r}: one of main, workers")
        if synthesis == "workers" and dataset.archive.codec.device.type != "cpu":
            raise ValueError(
                f"workers have no {dataset.archive.codec.device.type}: synthesis there"
            )
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.sampler = ArchiveSampler(
            dataset,
            batch_size,
            shuffle=shuffle,
            seed=seed,
            window=window,
            rank=rank,
            world_size=world_size,
            even=even,
            drop_last=drop_last,
        )
        self._packed: DataLoader[Any]
        if num_workers:
            self._packed = DataLoader(
                _Photos(dataset.reader.on_cpu(), render=synthesis == "workers"),
                batch_sampler=self.sampler,
                num_workers=num_workers,
                prefetch_factor=prefetch_factor,
                multiprocessing_context=multiprocessing_context,
                persistent_workers=True,
                collate_fn=pack,
            )
        else:
            self._packed = DataLoader(
                _Photos(dataset.reader, render=False), batch_sampler=self.sampler, collate_fn=list
            )
        self._taken = 0
        self._loaded = False

    @property
    def epoch(self) -> int:
        """The epoch that the current or else the next iteration belongs to, from 0."""
        return self.sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of `epoch`; where it is that already, nothing changes."""
        if epoch != self.epoch:
            self.sampler.set_epoch(epoch)
            self._taken, self._loaded = 0, False

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        if not self._loaded:
            self._taken = 0
        self._loaded = False
        self.sampler.start = self._taken
        for batch in self._packed:
            photos: list[Coded] = unpack(batch) if isinstance(batch, Packed) else batch
            items = self.dataset.items(photos)
            made = self.collate_fn(items) if items else None
            # Once it is made, so that a batch that fails comes again; and before the caller has it,
            # so that it counts as received in a state taken then.
            self._taken += len(photos)
            if items:
                yield made
        self.sampler.set_epoch(self.epoch + 1)
        self._taken = 0

    def state_dict(self) -> dict[str, Any]:
        """Where the caller is: plain values, for JSON or `torch.save`.

        Counts the photos of the batches that were handed over, not what workers have prepared. In
        lockstep it is the same on every rank.
        """
        return {"epoch": self.epoch, "taken": self._taken, **self.sampler.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, with the next iteration, after the last batch of before the state was taken.

        Batch size, workers and all else that the order does not follow from may be others now.
        Raises ValueError, naming it, where something differs that the order follows from.
        """
        wanted = self.sampler.fingerprint()
        if missing := [name for name in (*wanted, "epoch", "taken") if name not in state]:
            raise ValueError(f"not a state of a loader: it has no {missing[0]!r}")
        for name, value in wanted.items():
            if state.get(name) != value:
                raise ValueError(f"the state is of a loader with another {name}: {state.get(name)}")
        self.sampler.set_epoch(state["epoch"])
        self._taken, self._loaded = state["taken"], True


class _Photos(Dataset[Any]):
    """What a worker holds."""

    def __init__(self, reader: PhotoReader, *, render: bool) -> None:
        self._reader = reader
        self._render = render

    def __getitems__(self, positions: list[int]) -> list[Coded]:
        photos = self._reader.read(positions)
        if self._render:
            codec = self._reader.archive.codec
            for at, photo in enumerate(photos):
                if isinstance(photo.content, Latents):
                    photos[at] = replace(photo, content=codec.render(photo.content))
        return photos
