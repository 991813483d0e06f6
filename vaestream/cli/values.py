"""Values of arguments, as argparse wants them: from text, or an error that says what is wanted."""

import argparse
import json
import math
from typing import Any


def at_least_1(text: str) -> int:
    """A whole number."""
    return _whole_number(text, 1)


def at_least_0(text: str) -> int:
    """A whole number."""
    return _whole_number(text, 0)


def more_than_0(text: str) -> float:
    """A finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"a number of more than 0 is wanted, not {text!r}")
    return number


def qualities(text: str) -> list[float]:
    """Q,Q,...: numbers from 0 to 100."""
    found = _numbers(text)
    if not all(0 <= quality <= 100 for quality in found):
        raise argparse.ArgumentTypeError(f"qualities lie between 0 and 100, not {text!r}")
    return found


def window(text: str) -> tuple[float, float]:
    """LOW,HIGH: two numbers, in dB, that rise."""
    found = _numbers(text)
    if len(found) != 2 or not -math.inf < found[0] < found[1] < math.inf:
        raise argparse.ArgumentTypeError(f"two numbers that rise are wanted, not {text!r}")
    return found[0], found[1]


def region(text: str) -> tuple[int, int, int, int]:
    """X,Y,W,H: whole numbers."""
    try:
        x, y, width, height = map(int, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            "four numbers with commas are wanted: left, top, width, height"
        ) from error
    if min(x, y) < 0 or min(width, height) < 1:
        raise argparse.ArgumentTypeError(
            f"a region that a picture can have is wanted, not {text!r}"
        )
    return x, y, width, height


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("a JSON object is wanted")
    return value


def _whole_number(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(
            f"a whole number of at least {least} is wanted, not {text!r}"
        )
    return number


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no numbers with commas: {error}") from error
