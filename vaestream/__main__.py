"""`python -m vaestream`, the same as the command `vaestream`."""

import sys

from vaestream.cli import main

sys.exit(main())
