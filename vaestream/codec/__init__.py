"""The codec: 8-bit pictures to bitstreams and back. Runs where ray is not installed."""

from .bitstream import Header, check, read_header
from .codec import Codec, Encoded, Latents

__all__ = ["Codec", "Encoded", "Header", "Latents", "check", "read_header"]
