"""What of a URL may be stored and shown: everything but user names, passwords, tokens and signatures."""

from __future__ import annotations

import re
import traceback
from urllib.parse import SplitResult, parse_qsl, quote, quote_plus, unquote, unquote_plus, urlsplit

# Schemes in which what stands before @ is part of the place: a container, or an owner and a repository.
_NAMED_BEFORE_AT = frozenset({"abfs", "abfss", "wasb", "wasbs", "github"})
_SECRET_PREFIXES = ("x-amz-", "x-goog-", "x-oss-")
_SECRET_ENDS = (
    *("key", "token", "secret", "password", "passwd", "pwd", "passphrase", "signature", "credential", "credentials"),
    *("credentials_base64", "auth", "authorization", "bearer", "jwt"),
)
_SECRET_NAMES = frozenset(
    {"sig", "code", "session", "pass", "keyid", "accesskeyid", "awsaccesskeyid", "googleaccessid"}
)
# A database's settings within one value: what of them names the place, and may be shown.
_SETTINGS = "odbc_connect"
_SETTING = re.compile(r"\s*([^;={}]+?)\s*=\s*(\{(?:[^}]|\}\})*\}|[^;]*)")
_PLACE_SETTINGS = frozenset({"driver", "dsn", "server", "addr", "address", "host", "hostname", "port", "database"})
# The rest of a shared access signature (Azure), which means nothing without its `sig`.
_SIGNED_NAMES = frozenset({"sv", "se", "st", "sp", "spr", "sr", "ss", "srt", "sip", "skoid", "sktid", "ske", "skv"})
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+(?:@[^/\s@]*)*@")
_HIDDEN = "***"


def public_url(url: str) -> str:
    """Return `url` without credentials and without a fragment: the name under which its content is stored.

    The same object has the same name whoever signs for it, so it is recognised when it is read again.
    """
    parts = _split(url)
    host = parts.netloc
    if parts.scheme.lower() not in _NAMED_BEFORE_AT:
        host = host.rpartition("@")[2]
    pairs = _pairs(parts.query)
    signed = any(name.casefold() == "sig" for name, _ in pairs)
    kept = [
        (name, _place(value) if name.casefold() == _SETTINGS else value)
        for name, value in pairs
        if not _is_secret(name) and not (signed and name.casefold() in _SIGNED_NAMES)
    ]
    query = "&".join(f"{quote_plus(name)}={quote_plus(value)}" for name, value in kept)
    return f"{parts.scheme}://{host}{parts.path}" + (f"?{query}" if query else "")


def without_credentials(message: str, url: str) -> str:
    """Return a foreign message on one line without any credentials of `url` that it repeats."""
    for secret in sorted(_secrets(url), key=len, reverse=True):
        message = message.replace(secret, _HIDDEN)
    return " ".join(_USER_INFO.sub(f"{_HIDDEN}@", message).split())


def safe_cause(error: BaseException, url: str) -> BaseException | None:
    """Return `error` to be raised from, or None where a traceback of it would show credentials of `url`."""
    text = "".join(traceback.format_exception(error))
    return None if any(secret in text for secret in _secrets(url)) else error


def _secrets(url: str) -> set[str]:
    """Return what must not be shown, as it stands in the URL and as a driver may have decoded it."""
    parts = _split(url)
    found: set[str] = set()
    if parts.scheme.lower() not in _NAMED_BEFORE_AT and "@" in parts.netloc:
        info = parts.netloc.rpartition("@")[0]
        user, _, password = info.partition(":")
        found |= {info, password, unquote(password)}
        if not password:  # a token alone
            found |= {user, unquote(user)}
    for name, value in _pairs(parts.query):
        if _is_secret(name):
            found |= {value, quote(value, safe=""), quote_plus(value), unquote_plus(value)}
        elif name.casefold() == _SETTINGS:
            hidden = {one for key, one in _SETTING.findall(value) if key.casefold() not in _PLACE_SETTINGS}
            found |= {value, quote(value, safe=""), quote_plus(value), *hidden, *(one.strip("{}") for one in hidden)}
    return {secret for secret in found if len(secret) > 2}


def _split(url: str) -> SplitResult:
    """Return the parts of a URL, of which a password may hold characters that should have been escaped."""
    parts = urlsplit(url)
    _, colon, port = parts.netloc.rpartition("]")[2].partition(":")
    scheme, _, rest = url.partition("://")
    if "@" in parts.netloc or "@" not in rest or not colon or not port or port.isdigit():
        return parts
    info, _, place = rest.partition("@")  # what looks like a port is the beginning of a password
    return urlsplit(f"{scheme}://{quote(info, safe=':%')}@{place}")


def _place(settings: str) -> str:
    return ";".join(f"{key}={value}" for key, value in _SETTING.findall(settings) if key.casefold() in _PLACE_SETTINGS)


def _pairs(query: str) -> list[tuple[str, str]]:
    return parse_qsl(query, keep_blank_values=True)


def _is_secret(name: str) -> bool:
    folded = name.casefold()
    return folded in _SECRET_NAMES or folded.startswith(_SECRET_PREFIXES) or folded.endswith(_SECRET_ENDS)
