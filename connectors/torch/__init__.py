"""An archive as torch datasets, samplers and loaders: docs/connectors.md.

>>> from vaestream.connectors.torch import ArchiveDataset, ArchiveLoader
>>> dataset = ArchiveDataset("s3://bucket/archive", device="cuda")             # doctest: +SKIP
>>> loader = ArchiveLoader(dataset, batch_size=8, shuffle=True, num_workers=8) # doctest: +SKIP
>>> for photos in loader: ...                                                  # doctest: +SKIP
"""

from .cache import BlobCache
from .dataset import ArchiveDataset
from .loader import ArchiveLoader
from .sampler import ArchiveSampler

__all__ = ["ArchiveDataset", "ArchiveLoader", "ArchiveSampler", "BlobCache"]
