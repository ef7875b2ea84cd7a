"""HTTP as the downloads use it: https only, polite about busy servers, patient with bad connections."""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from histosynth.core.errors import DataError, RunError
from histosynth.core.progress import duration, say

_JSON_LIMIT = 20_000_000
_BUSY = {408, 425, 429}  # besides 5xx: the same request may succeed later
REMEDY = "Check the address in a browser, or take the file from elsewhere (--mirror URL)."
_sleep = time.sleep


@dataclass(frozen=True)
class Patience:
    """How long a download puts up with a bad connection."""

    timeout: float = 30.0
    """Seconds without a byte, or below `slowest`, after which the connection is made anew."""
    attempts: int = 8
    """Connections in a row that bring nothing new before giving up."""
    slowest: float = 1000.0
    """Bytes a second; a connection below this is dropped and made anew."""
    longest_wait: float = 600.0
    """Seconds; a server that asks for a longer pause ends the download (it can be repeated later)."""


class PassingError(Exception):
    """Something that may go away: worth another attempt."""

    def __init__(self, reason: str, wait: float | None = None, useless: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.useless = wait, useless


def check_url(url: str) -> str:
    """Return the URL when it may be used: https, or http to this machine.

    Raises:
        DataError: another scheme, or http to another machine.
    """
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return url
    if parts.scheme == "http" and _is_loopback(parts.hostname or ""):
        return url
    raise DataError(f"{url} is not an https address.", "Use an address that begins with https://.")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but never away from https."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        new = urljoin(req.full_url, newurl)
        try:
            check_url(new)
        except DataError as error:
            raise DataError(f"{req.full_url} redirects to {new}, which is not https.", REMEDY) from error
        if urlsplit(req.full_url).scheme == "https" and urlsplit(new).scheme != "https":
            raise DataError(f"{req.full_url} redirects from https to {new}.", REMEDY)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any) -> Any:
        target = headers.get("location") or headers.get("uri") or ""
        scheme = urlsplit(target).scheme
        if scheme not in ("", "http", "https"):  # the base class would only say "HTTP error 302"
            raise DataError(f"{req.full_url} redirects to {target}, which is not https.", REMEDY)
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def open_url(url: str, headers: dict[str, str], timeout: float) -> Any:
    """Send a GET; proxies and certificates come from the environment, as urllib takes them.

    Only http and https are known here, so that no redirect can reach a local file. The answer may have the status
    416 (nothing to send beyond the range), besides those of success.

    Raises:
        PassingError: busy, unreachable or broken: worth another attempt.
        RunError: refused. DataError: an address, or a redirect, that is not https.
    """
    import histosynth

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    # some repositories refuse the default name of urllib
    agent = {"User-Agent": f"histosynth/{histosynth.__version__}", "Accept-Encoding": "identity"}
    try:
        return opener.open(urllib.request.Request(check_url(url), headers=agent | headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error
        with error:
            raise _refusal(url, error) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise RunError(
                f"The certificate of {url} cannot be verified ({error.reason.verify_message}).",
                "If your network has its own certificates, name their file in the variable SSL_CERT_FILE.",
            ) from error
        reason = getattr(error.reason, "strerror", None) or error.reason
        raise PassingError(f"{urlsplit(url).netloc} cannot be reached: {reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise PassingError(str(error) or type(error).__name__) from error


def _refusal(url: str, error: urllib.error.HTTPError) -> Exception:
    if error.code in _BUSY or error.code >= 500:
        return PassingError(f"the server answered {error.code} {error.reason}", retry_after(error.headers))
    return RunError(f"{url}: the server answered {error.code} {error.reason}.", REMEDY)


def retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait; None when it does not say, or not understandably."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdecimal() and len(value) < 10:
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def fetch_json(url: str, patience: Patience = Patience(attempts=3)) -> Any:
    """Fetch a JSON document of at most 20 MB.

    Raises:
        RunError: the server refuses, or cannot be reached.
        DataError: the answer is not JSON, or the address is not https.
    """
    failures = 0
    while True:
        try:
            with open_url(url, {"Accept": "application/json"}, patience.timeout) as response:
                body = response.read(_JSON_LIMIT + 1)
                missing = (response.length or 0) > 0  # what is left of the Content-Length
            if not missing or len(body) > _JSON_LIMIT:
                break
            reason = PassingError("the connection ended early")
        except PassingError as error:
            reason = error
        except (OSError, http.client.HTTPException) as error:
            reason = PassingError(str(error) or type(error).__name__)
        failures += 1
        pause(url, reason, failures, patience)
    try:
        if len(body) > _JSON_LIMIT:
            raise ValueError("it is larger than 20 MB")
        return json.loads(body, parse_constant=_refuse_constant)
    except ValueError as error:
        raise DataError(f"{url} does not answer with JSON ({error}).", REMEDY) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def pause(url: str, error: PassingError, failures: int, patience: Patience) -> None:
    """Wait before the next attempt, or give up."""
    again = "Repeat the command to go on from here."
    if failures >= patience.attempts:
        raise RunError(
            f"{url}: {failures} attempts in a row brought nothing (last: {error}).",
            f"Check the connection (proxy: the variable https_proxy). {again}",
        ) from error
    wait = min(2.0**failures, 60.0) if error.wait is None else error.wait
    if wait > patience.longest_wait:
        raise RunError(f"{url}: the server asks to wait {duration(wait)} ({error}).", f"Wait. {again}") from error
    say(f"{error}; trying again in {duration(wait)}.")
    _sleep(wait)
