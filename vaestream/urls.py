"""URLs as people write them, and as they may be told."""

import os
import re

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CHAIN = re.compile(rf"::{_SCHEME.pattern}")
_USER = re.compile(
    r"^(https?://(?=[^/?#]*@)|[A-Za-z][A-Za-z0-9+.-]*://(?=[^/?#@:]*:[^/?#]*@))[^/?#]*@",
    re.IGNORECASE,
)
_SECRET = re.compile(
    r"(?<![a-z])sig(?![a-z])|signature|token|credential|policy|expires|secret|password|key(?!word)",
    re.IGNORECASE,
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def protocol_of(url: str) -> str:
    """The protocol in front of `://`; "file" where there is none."""
    match = _SCHEME.match(url)
    return match[1].lower() if match else "file"


def public_url(url: str) -> str:
    """`url` without what must not be told: a user with a password in front of the host, of http(s)
    any user, which may be a token, and the parameters that sign a request (a name with signature,
    token, credential, policy, expires, secret, password or key, or with sig as a word)."""
    return "::".join(map(_public, url.split("::"))) if is_chained(url) else _public(url)


def _public(url: str) -> str:
    url = _USER.sub(r"\1", url)
    head, mark, query = url.partition("?")
    if not mark or protocol_of(url) not in ("http", "https"):
        return url
    told = [one for one in query.split("&") if not _SECRET.search(one.partition("=")[0])]
    return f"{head}?{'&'.join(told)}" if told else head


def public_text(text: str) -> str:
    """`text`, each URL in it as `public_url` tells it: what a store says may hold one."""
    return _URL.sub(lambda match: public_url(match[0]), text)


def is_chained(url: str) -> bool:
    """Whether `url` is a store inside another, as zip://a::s3://b; "::" alone is part of a name."""
    return _CHAIN.search(url) is not None


def absolute(url: str) -> str:
    """`url`; a relative path made absolute, so that it means the same in any folder."""
    if _SCHEME.match(url) or is_chained(url):
        return url
    return os.path.abspath(os.path.expanduser(url))
