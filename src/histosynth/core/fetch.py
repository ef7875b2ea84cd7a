"""Download one file over HTTP so that nothing is lost: dropped, slow, busy and changing servers, killed runs.

The bytes go to `<file>.part`; `<file>.part.json` says which file they belong to. A repeated download asks for the
rest (Range) on the condition that the file is still the same (If-Range; RFC 9110, sections 13 and 14).
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from histosynth.core.errors import DataError, HistosynthError, RunError
from histosynth.core.files import explain_os_error, read_json, sha256_file, write_json
from histosynth.core.progress import Tick, bar, say
from histosynth.core.web import REMEDY, PassingError, Patience, open_url, pause, retry_after

_CHUNK = 1 << 20
_MEGA = 1_000_000


def fetch(url: str, path: Path, *, size: int | None, digest: str, patience: Patience = Patience()) -> Path:
    """Download `url` to `path`, going on with what an earlier, interrupted call left.

    Args:
        url: https, or http to this machine; redirects are followed, but not away from https.
        path: appears only when complete and verified; meanwhile the bytes are in `<path>.part`.
        size: bytes that the file has; None: what the server says.
        digest: the MD5 of the file, in hexadecimal; or "sha256:" and how its SHA-256 begins; or "" where nobody
            published a checksum.

    Raises:
        RunError: the server refuses or cannot be reached; another process downloads the same file; disk full.
        DataError: not the right file: another length or checksum, a web page, a redirect away from https.
    """
    part, note = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as stream:
            _lock(stream, part)
            _Download(url, part, note, stream, size, digest, patience).run()
            os.fsync(stream.fileno())
        kind, found = _checksum(part, path.name, digest)
        if not found.startswith(digest.removeprefix("sha256:")):
            bad = path.with_name(path.name + ".bad")
            os.replace(part, bad)
            raise DataError(
                f"{url} gave a file with the {kind} {found} where {digest} is expected; it was set aside as {bad}.",
                "Repeat the command to download it again. If that does not help, the file on the server, or a "
                "proxy between, is at fault: take it from elsewhere (--mirror URL).",
            )
        os.replace(part, path)
        note.unlink(missing_ok=True)
    except OSError as error:
        raise explain_os_error(error, f"Cannot write {part}") from error
    return path


def md5_file(path: Path, name: str) -> str:
    """Hexadecimal MD5 of a file, with a bar: against damage on the way, which is what repositories list it for."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as stream, bar(f"Check {name} (MB)", _megabytes(path.stat().st_size)) as tick:
        while chunk := stream.read(8 * _MEGA):
            digest.update(chunk)
            tick(_megabytes(len(chunk)))
    return digest.hexdigest()


def _checksum(path: Path, name: str, wanted: str) -> tuple[str, str]:
    """(kind, value) of the checksum that `wanted` asks for."""
    if wanted.startswith("sha256:"):
        return "SHA-256", sha256_file(path)
    return "MD5", md5_file(path, name) if wanted else ""


def _megabytes(size: int) -> int:
    return -(-size // _MEGA) or 1


def _lock(stream: IO[bytes], part: Path) -> None:
    """Let one process at a time write; the system frees the lock when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows; the checksum would tell
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"Another process is downloading to {part}.", "Wait for it, or stop it.") from error


class _Download:
    """The attempts to complete one part file."""

    def __init__(
        self, url: str, part: Path, note: Path, stream: IO[bytes], size: int | None, digest: str, patience: Patience
    ) -> None:
        self.url, self.part, self.note, self.stream = url, part, note, stream
        self.size, self.patience = size, patience
        self.identity = {"md5": digest, "host": urlsplit(url).netloc}
        self.validator: str | None = None
        self.total = size
        self._ticked = 0
        self._tick: Tick | None = None

    def run(self) -> None:
        self._take_up()
        best, failures = self._have(), 0
        if best:
            say(f"Going on with {self.part.name} at {best / _MEGA:.1f} MB.")
        self._ticked = best // _MEGA
        with bar(f"Download {self.part.stem} (MB)", _megabytes(self.total or 0), self._ticked) as self._tick:
            while not self._complete():
                try:
                    if self._attempt():
                        break
                except PassingError as error:
                    useful = self._have() > best and not error.useless
                    best, failures = max(best, self._have()), 0 if useful else failures + 1
                    pause(self.url, error, failures, self.patience)
            self._show(whole=True)

    def _take_up(self) -> None:
        """Keep the bytes of an earlier call when they belong to the same file."""
        try:
            note = read_json(self.note)
        except HistosynthError:
            note = None
        known = isinstance(note, dict) and note.get("md5") == self.identity["md5"]
        if not known or (self.size is not None and self._have() > self.size):
            self._restart()
        elif note.get("host") == self.identity["host"]:  # another mirror has other ETags; the checksum decides
            self.validator = note.get("validator")
            self.total = self.size or note.get("total")

    def _have(self) -> int:
        return os.fstat(self.stream.fileno()).st_size

    def _complete(self) -> bool:
        return self.total is not None and self._have() == self.total

    def _restart(self) -> None:
        self.stream.truncate(0)
        self.validator = None
        self._show()

    def _show(self, whole: bool = False) -> None:
        step = (_megabytes(self._have()) if whole else self._have() // _MEGA) - self._ticked
        if self._tick is not None and step:
            self._ticked += step
            self._tick(step)

    def _attempt(self) -> bool:
        """Make one connection and take what it brings; True when the file is complete."""
        have = self._have()
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and self.validator:
            headers["If-Range"] = self.validator
        with open_url(self.url, headers, self.patience.timeout) as response:
            self._check_answer(response, have)
            self._remember(response)
            return self._take(response)

    def _check_answer(self, response: Any, have: int) -> None:
        """Put the part file where the answer begins, or refuse the answer."""
        if response.status == 416:
            total = (response.headers.get("Content-Range") or "").rpartition("/")[2]
            self._restart()  # complete files never ask, so the bytes here are not of that file
            raise PassingError(f"the server has only {total or '?'} bytes, not more than {have}", useless=True)
        if response.status not in (200, 206):
            raise PassingError(f"the server answered {response.status}", retry_after(response.headers))
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise DataError(f"{self.url} answers with compressed bytes, which was not asked for.", REMEDY)
        if response.headers.get_content_type() == "text/html":
            raise DataError(
                f"{self.url} answers with a web page instead of the file.",
                "Open the address in a browser: it may be the login page of your network. Or give --mirror URL.",
            )
        start, total = 0, _number(response.headers.get("Content-Length"))
        if response.status == 206:
            start, total = _content_range(response.headers.get("Content-Range"))
            changed = self.validator is not None and _validator(response.headers) not in (None, self.validator)
            changed |= None not in (total, self.total) and total != self.total
            if start != have or changed:
                self._restart()
                raise PassingError("the file on the server changed" if changed else "the server sent another range")
        elif have:
            self._restart()  # the server cannot go on in the middle, or the file changed
        if self.size is not None and total is not None and total != self.size:
            raise DataError(
                f"{self.url} has {total:,} bytes where {self.size:,} are expected.",
                f"The file there is another one. {REMEDY}",
            )
        self.total = self.size or total

    def _remember(self, response: Any) -> None:
        self.validator = _validator(response.headers)
        write_json(self.note, self.identity | {"validator": self.validator, "total": self.total, "url": self.url})

    def _take(self, response: Any) -> bool:
        """Append what comes, until the file is whole or the connection fails."""
        slow_at, slow_from = time.monotonic() + self.patience.timeout, self._have()
        have = slow_from
        while self.total is None or have < self.total:
            try:
                # one system call a read: a full chunk of a trickling server would take for ever
                chunk = response.read1(_CHUNK if self.total is None else min(_CHUNK, self.total - have))
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
                raise PassingError(f"the connection failed at byte {have:,} ({reason})") from error
            if not chunk:
                if self.total is None:  # nobody said how long the file is: this is its end
                    return True
                raise PassingError(f"the connection ended at byte {have:,} of {self.total:,}")
            self.stream.write(chunk)
            self.stream.flush()
            have += len(chunk)
            self._show()
            if time.monotonic() >= slow_at:
                if have - slow_from < self.patience.slowest * self.patience.timeout:
                    reason = f"below {self.patience.slowest:g} bytes a second at byte {have:,}"
                    raise PassingError(reason, useless=True)
                slow_at, slow_from = time.monotonic() + self.patience.timeout, have
        return True


def _number(text: str | None) -> int | None:
    return int(text) if text and text.strip().isdecimal() and len(text) < 20 else None


def _content_range(text: str | None) -> tuple[int, int | None]:
    """(first byte, length of the whole file); (-1, None) when the header is missing or nonsense."""
    unit, _, rest = (text or "").strip().partition(" ")
    span, _, total = rest.partition("/")
    start = _number(span.partition("-")[0])
    if unit != "bytes" or start is None:
        return -1, None
    return start, _number(total)


def _validator(headers: Any) -> str | None:
    """What proves that the file is still the same: a strong ETag, else the date of its last change."""
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
