"""The codec: 8-bit pictures to bitstreams and back. Runs where ray is not installed."""

from .bitstream import Header, check, read_header
from .codec import Codec, Encoded

__all__ = ["Codec", "Encoded", "Header", "check", "read_header"]
