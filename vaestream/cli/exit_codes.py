"""How a command ended."""

import signal

OK, ERROR, USAGE, SOME_FAILED = 0, 1, 2, 3
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
