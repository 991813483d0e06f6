"""The codec: 8-bit pictures to bitstreams and back. Runs where ray is not installed."""

from .bitstream import Header, check, read_header
from .codec import Codec, Latents
from .encoder import Encoded

__all__ = ["Codec", "Encoded", "Header", "Latents", "check", "read_header"]
