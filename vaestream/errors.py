"""The exceptions that vaestream raises on purpose; everything else is a bug."""


class VaestreamError(Exception):
    """Base of all errors below: catch it to catch any of them."""


class BitstreamError(VaestreamError, ValueError):
    """A blob is not a whole vaestream bitstream: wrong magic, version, size or CRC."""


class ModelMismatchError(BitstreamError):
    """A whole bitstream that was written with another model than the one at hand."""


class WeightsError(VaestreamError, ValueError):
    """A weights file is missing, damaged, or of a shape this version cannot use."""


class SourceError(VaestreamError):
    """A source cannot be listed or read."""


class ArchiveError(VaestreamError):
    """An archive cannot be opened, written, or asked for a photo it does not hold."""


class DamagedArchiveError(ArchiveError):
    """Bytes of an archive are not those that were written."""


class SettingsMismatchError(ArchiveError):
    """The destination holds an archive made with other settings or another model."""
