"""Files from the web: resumed, verified, and never half a file under the final name."""

import contextlib
import email.utils
import fcntl
import hashlib
import http.client
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mmengine.logging import print_log
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_WAITS = (1, 2, 4)  # seconds before each further attempt
_TIMEOUT = 30  # seconds in which a server must say something
_CHUNK = 1 << 20  # bytes
_TRY_LATER = (408, 429, 500, 502, 503, 504)  # HTTP statuses


class DownloadError(FileNotFoundError):
    """A file that could not be had: ``reason`` says why, the message also what to do."""

    def __init__(self, message: str, reason: str = '') -> None:
        super().__init__(message)
        self.reason = reason


class _Refused(Exception):
    """What a server gives is not the file; asking again would not help."""


class _BrokenOff(Exception):
    """A connection that failed: worth another attempt, from where it stopped."""


def download(url: str, path: Path, sha256: str = '') -> Path:
    """Returns ``path``, downloaded if it is not there: the whole file, verified, or an error.

    The bytes go to ``PATH.part``, which is renamed when it is whole; where a download ends early, the next one goes on
    from there. Of several processes that want the file, one downloads it and the others wait.

    Args:
        url: An ``http`` or ``https`` address; proxies are taken from the environment.
        path: Where the file is to be.
        sha256: Its SHA-256 in lowercase hexadecimal digits, or the first of them; empty where none is known.

    Raises:
        DownloadError: The file cannot be had, or what is given for it is another one, which is deleted.
        FileNotFoundError: The process that this one waited for has given up.
        ValueError: The file is there with another SHA-256, or the address is of another kind.
    """
    if not url.startswith(('http://', 'https://')):
        raise ValueError(f'{url}: cannot be downloaded; expected an address that begins with http:// or https://')
    path = Path(path)
    part = path.with_name(f'{path.name}.part')
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(part) as file:
                if _is_at(part, file) and not path.exists():
                    print_log(f'Downloading {url} to {path}', logger='current')
                    _fetch(url, file, part, sha256)
                    part.rename(path)
                    return path
    except (OSError, _Refused, _BrokenOff) as error:
        kept = f'; {part} keeps what has come, and the next run goes on from there' if os.path.exists(part) else ''
        raise DownloadError(
            f'{url} could not be downloaded: {error}{kept}. Run this again, or get the file otherwise and save it as '
            f'{path}',
            reason=str(error),
        ) from error
    if not path.exists():
        raise FileNotFoundError(f'{url}: the process that was downloading this file has given up; its message says why')
    return verified(path, sha256)


def verified(path: Path, sha256: str) -> Path:
    """Returns ``path``, a file whose SHA-256 begins with ``sha256``.

    Raises:
        ValueError: It does not.
    """
    found = _sha256(path) if sha256 else ''
    if not found.startswith(sha256):
        raise ValueError(
            f'{path}: the file is damaged or another one: its SHA-256 begins with {found[: len(sha256)]}, '
            f'expected {sha256}. Delete it and get it again.'
        )
    return path


def _sha256(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """Opens a partial file for this process alone, after those that had it before; deletes it if it ends up empty."""
    with part.open('ab') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print_log(f'Waiting for another process that downloads {part}', logger='current')
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield file
        finally:
            if _is_at(part, file) and not os.fstat(file.fileno()).st_size:
                part.unlink()


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether an open file is still the one of that name: who had the lock before may have renamed or deleted it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _fetch(url: str, file: BinaryIO, part: Path, sha256: str) -> None:
    """Fills the partial file; once more from nothing if one that was put together from pieces has a wrong hash."""
    for _ in range(2):
        in_one_piece = _collect(url, file, sha256)
        found = _sha256(part) if sha256 else ''
        if found.startswith(sha256):
            return
        size = file.tell()
        file.truncate(0)
        if in_one_piece:
            break
        print_log(f'{part}: pieces with a wrong SHA-256; starting anew', 'current', logging.WARNING)
    raise _Refused(f'{size} bytes came whose SHA-256 begins with {found[: len(sha256)]}, expected {sha256}')


def _collect(url: str, file: BinaryIO, sha256: str) -> bool:
    """Requests what the file lacks until it is whole; returns whether it came in one piece."""
    waits = list(_WAITS)
    while True:
        try:
            return _receive(url, file, sha256)
        except _BrokenOff as error:
            if not waits:
                raise
            print_log(f'{url}: {error}; trying again in {waits[0]} s', 'current', logging.WARNING)
            time.sleep(waits.pop(0))


def _receive(url: str, file: BinaryIO, sha256: str) -> bool:
    """Makes one request for what the file lacks and appends the answer; returns whether that was the whole file."""
    start = file.seek(0, os.SEEK_END)
    with _ask(url, file, start, sha256) as response:
        status, span = response.status, response.headers.get('Content-Range', '')
        if start and (status, span) == (416, f'bytes */{start}'):  # nothing is lacking
            return False
        rest = re.fullmatch(rf'bytes {start}-\d+/(\d+)', span) if start and status == 206 else None
        if status != 200 and not rest:
            file.truncate(0)
            raise _BrokenOff(f'HTTP status {status}, Content-Range {span!r} for the bytes from {start} on')
        total = int(rest[1]) if rest else response.length
        if total is None and not response.chunked and not sha256:
            raise _Refused('the server does not say how long the file is: nothing would tell whether it is whole')
        with _network():
            head = response.read(512)
        _refuse_web_page(response, b'' if rest else head)
        if not rest:
            file.truncate(0)
        _append(response, head, file, total)
    if total is not None and file.tell() != total:
        raise _BrokenOff(f'the connection ended after {file.tell()} of {total} bytes')
    return not rest


def _ask(url: str, file: BinaryIO, start: int, sha256: str) -> http.client.HTTPResponse | urllib.error.HTTPError:
    """Requests the bytes from ``start`` on; returns the answer, also the one that there are none (status 416)."""
    headers = {'User-Agent': 'mmseg_resnest'}
    if start:
        headers['Range'] = f'bytes={start}-'
        if not sha256:  # nothing would tell a mixture of two versions; the file has the date of its own
            headers['If-Range'] = email.utils.formatdate(os.fstat(file.fileno()).st_mtime, usegmt=True)
    try:
        with _network():
            return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error
        kind = _BrokenOff if error.code in _TRY_LATER else _Refused
        raise kind(f'HTTP status {error.code} ({error.reason}), expected 200') from error


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """Tells what goes wrong on the network from what goes wrong on the disk."""
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOff(str(getattr(error, 'reason', error)) or type(error).__name__) from error


def _refuse_web_page(response: http.client.HTTPResponse, head: bytes) -> None:
    """Refuses what says of itself that it is HTML, or begins like it: a login, a licence or an error page."""
    kind = response.headers.get_content_type()
    if kind == 'text/html' or re.match(rb'(\xef\xbb\xbf)?\s*<(!doctype html|html)', head, re.IGNORECASE):
        raise _Refused(f'a web page came (Content-Type {kind}), expected the file')


def _append(response: http.client.HTTPResponse, chunk: bytes, file: BinaryIO, total: int | None) -> None:
    """Appends ``chunk`` and what the server still sends, under a progress bar; gives the file the server's date."""
    console = Console(stderr=True)
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(
        TextColumn('{task.description}'),
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(Path(file.name).stem, total=total, completed=file.seek(0, os.SEEK_END))
        try:
            while chunk:
                file.write(chunk)
                bar.advance(task, len(chunk))
                with _network():
                    chunk = response.read1(_CHUNK)
        finally:
            file.flush()
            with contextlib.suppress(ValueError):  # there is none, or not a date
                date = email.utils.parsedate_to_datetime(response.headers['Last-Modified']).timestamp()
                os.utime(file.fileno(), (date, date))
            os.fsync(file.fileno())
