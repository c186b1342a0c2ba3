"""A file from the web is whole and the right one under its name, or not there at all."""

import contextlib
import hashlib
import http.server
import io
import logging
import os
import pty
import re
import resource
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.logging import MMLogger
from test_checkpointing import wait_for
from tiny import Tool
from web import Site

import mmseg_resnest.download
from mmseg_resnest.download import DownloadError, download, verified

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SIZE = len(CONTENT)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
CUT = 1_000_000


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(mmseg_resnest.download, '_WAITS', (0.01, 0.01, 0.01))


@pytest.fixture
def site():
    with Site(CONTENT) as site:
        yield site


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'cache' / 'file.bin'


def part_of(path, content=None):
    """Returns the partial file's path; with ``content``, writes it."""
    part = path.with_name('file.bin.part')
    if content is not None:
        part.parent.mkdir()
        part.write_bytes(content)
    return part


def failure(site, path, sha256=DIGEST):
    """Downloads what cannot be had; returns the message, which names the URL and the fix."""
    with pytest.raises(DownloadError) as error:
        download(f'{site.url}/file', path, sha256)
    assert not path.exists()
    message = str(error.value)
    assert message.startswith(f'{site.url}/file could not be downloaded: {error.value.reason}')
    assert message.endswith(f'Run this again, or get the file otherwise and save it as {path}')
    return message


def is_whole(path):
    return path.read_bytes() == CONTENT and os.listdir(path.parent) == [path.name]


# --------------------------------------------------------------------------------------------------------- at rest


@pytest.mark.parametrize('sha256', [DIGEST, DIGEST[:8], ''])
def test_whole_file(site, path, sha256):
    assert download(f'{site.url}/file', path, sha256) == path
    assert is_whole(path)
    assert path.stat().st_mtime == site.modified
    assert site.sent == [(None, SIZE)]
    assert download(f'{site.url}/file', path, sha256) == path
    assert len(site.sent) == 1  # it was there


def test_a_wrong_file_under_the_name_is_the_users(site, path):
    path.parent.mkdir()
    path.write_bytes(b'mine')
    with pytest.raises(
        ValueError, match=rf'{path}: .* SHA-256 begins with 3fd3, expected {DIGEST[:4]}. Delete it and get it again'
    ):
        download(f'{site.url}/file', path, DIGEST[:4])
    assert path.read_bytes() == b'mine'
    assert site.sent == []


@pytest.mark.parametrize('url', ['example.org/file', 'file:///etc/passwd', 'ftp://example.org/file', ''])
def test_other_addresses(url, path):
    with pytest.raises(ValueError, match=f'^{url}: cannot be downloaded; expected an address that begins with http://'):
        download(url, path)
    assert not path.parent.exists()


def test_verified(path):
    part_of(path, CONTENT).rename(path)
    assert verified(path, DIGEST) == verified(path, DIGEST[:8]) == verified(path, '') == path
    with pytest.raises(ValueError, match=f'begins with {DIGEST}, expected {"0" * 64}'):
        verified(path, '0' * 64)


def test_redirection_and_proxy(site, path, monkeypatch):
    site.moved = True
    part_of(path, CONTENT[:CUT])
    monkeypatch.setattr(urllib.request, '_opener', None)  # made once, with the proxies of then
    monkeypatch.setenv('http_proxy', site.url)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    download('http://weights.invalid/file', path, DIGEST)
    assert is_whole(path)
    assert site.sent == [(f'bytes={CUT}-', SIZE - CUT)]


# ------------------------------------------------------------------------------------------------ broken connections


@pytest.mark.parametrize('sha256', [DIGEST, ''])
def test_going_on_after_a_break(site, path, sha256):
    site.cuts = [CUT]
    download(f'{site.url}/file', path, sha256)
    assert is_whole(path)
    assert site.sent == [(None, CUT), (f'bytes={CUT}-', SIZE - CUT)]


def test_a_server_without_ranges_begins_anew(site, path):
    site.cuts, site.ranges = [CUT], False
    download(f'{site.url}/file', path, DIGEST)
    assert is_whole(path)
    assert site.sent == [(None, CUT), (f'bytes={CUT}-', SIZE)]


@pytest.mark.parametrize('ranges', [True, False])
def test_the_next_run_goes_on(site, path, ranges):
    site.cuts, site.ranges = [1000] * 4, ranges
    message = failure(site, path)
    came = 4000 if ranges else 1000
    assert f'the connection ended after {came} of {SIZE} bytes; {part_of(path)} keeps what has come, and' in message
    assert part_of(path).read_bytes() == CONTENT[:came]
    download(f'{site.url}/file', path, DIGEST)
    assert is_whole(path)
    assert site.sent[-1] == (f'bytes={came}-', SIZE - 4000 if ranges else SIZE)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 5000), cuts=st.lists(st.integers(0, 5000), max_size=3), known=st.booleans())
def test_no_byte_is_sent_twice(size, cuts, known, tmp_path_factory):
    path = tmp_path_factory.mktemp('cuts') / 'file.bin'
    content = CONTENT[:size]
    with Site(content, cuts=list(cuts)) as site:
        download(site.url, path, hashlib.sha256(content).hexdigest() if known else '')
    assert path.read_bytes() == content
    assert sum(sent for _, sent in site.sent) == size


@pytest.mark.parametrize('status', [429, 500, 503])
def test_a_busy_server_is_asked_again(site, path, status):
    site.statuses = [status] * 3
    download(f'{site.url}/file', path, DIGEST)
    assert is_whole(path)
    site.statuses = [status] * 4
    path.unlink()
    assert f': HTTP status {status} (' in failure(site, path)
    assert os.listdir(path.parent) == []


def test_no_server(path):
    with socket.socket() as closed:
        closed.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{closed.getsockname()[1]}'
    with pytest.raises(DownloadError, match=r'/file could not be downloaded: \[Errno \d+\] Connection refused. Run'):
        download(f'{url}/file', path, DIGEST)
    assert os.listdir(path.parent) == []


def test_a_silent_server(site, path, monkeypatch):
    monkeypatch.setattr(mmseg_resnest.download, '_TIMEOUT', 0.3)
    site.open.clear()
    assert 'timed out; ' in failure(site, path)
    wait_for(lambda: len(site.sent) == 4)
    came = part_of(path).read_bytes()
    assert SIZE // 2 <= len(came) < SIZE
    assert CONTENT.startswith(came)


# --------------------------------------------------------------------------------------------------- the wrong bytes


def test_a_tampered_file_is_deleted(site, path):
    site.content = CONTENT[:-1] + b'x'
    found = hashlib.sha256(site.content).hexdigest()
    message = failure(site, path, DIGEST[:8])
    assert f'{SIZE} bytes came whose SHA-256 begins with {found[:8]}, expected {DIGEST[:8]}. Run' in message
    assert os.listdir(path.parent) == []
    assert len(site.sent) == 1  # nothing was put together from pieces: once more would be the same


def test_a_wrong_part_is_thrown_away_once(site, path):
    part_of(path, b'x' * CUT)
    download(f'{site.url}/file', path, DIGEST)
    assert is_whole(path)
    assert site.sent == [(f'bytes={CUT}-', SIZE - CUT), (None, SIZE)]


def test_a_wrong_part_of_a_tampered_file(site, path):
    part_of(path, b'x' * CUT)
    site.content = CONTENT[:-1] + b'x'
    assert hashlib.sha256(site.content).hexdigest() in failure(site, path)
    assert os.listdir(path.parent) == []
    assert [sent for _, sent in site.sent] == [SIZE - CUT, SIZE]


def test_without_a_hash_two_versions_are_not_mixed(site, path):
    site.cuts = [CUT, 0, 0, 0]
    failure(site, path, '')
    assert part_of(path).stat().st_size == CUT
    site.content, site.modified = CONTENT[::-1], site.modified + 1
    download(f'{site.url}/file', path)
    assert path.read_bytes() == CONTENT[::-1]
    assert site.sent[-1] == (f'bytes={CUT}-', SIZE)


@pytest.mark.parametrize('size', [SIZE, SIZE + 5])
def test_nothing_is_lacking(site, path, size):
    """A part that was whole when a run was killed, and one that is longer than the file."""
    part_of(path, CONTENT.ljust(size, b'x'))
    download(f'{site.url}/file', path, DIGEST)
    assert is_whole(path)
    assert site.sent == [(f'bytes={size}-', 0)] + [(None, SIZE)] * (size != SIZE)


@pytest.mark.parametrize('span', [f'bytes {CUT - 1}-{SIZE - 1}/{SIZE}', f'bytes {CUT}-{SIZE - 1}/*', 'nonsense'])
def test_a_range_that_was_not_asked_for(site, path, span):
    part_of(path, CONTENT[:CUT])
    site.span = span
    download(f'{site.url}/file', path, DIGEST)
    assert is_whole(path)
    assert [asked for asked, _ in site.sent] == [f'bytes={CUT}-', None]


def test_missing_page(site, path):
    site.statuses = [404]
    assert ': HTTP status 404 (Not Found), expected 200. Run' in failure(site, path)
    assert site.sent == [(None, 0)]
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize(
    ('kind', 'page'),
    [
        ('text/html; charset=utf-8', b'Please log in'),
        ('application/octet-stream', b'<!DOCTYPE html><html></html>'),
        ('application/zip', b'\xef\xbb\xbf\r\n <HTML lang="en">'),
    ],
)
@pytest.mark.parametrize('before', [b'', CONTENT[:CUT]])
@pytest.mark.parametrize('sha256', [DIGEST, ''])
def test_web_page(site, path, kind, page, before, sha256):
    site.kind, site.content, site.ranges = kind, page, False
    part = part_of(path, before)
    assert f': a web page came (Content-Type {kind.split(";")[0]}), expected the file' in failure(site, path, sha256)
    assert len(site.sent) == 1
    assert part.exists() == bool(before)
    assert not before or part.read_bytes() == before  # not lost to a hotel's login


def test_too_long_a_content_length(site, path):
    site.length = SIZE + 7
    download(f'{site.url}/file', path, DIGEST)  # the hash tells that it is whole, and the server that no more comes
    assert is_whole(path)
    path.unlink()
    site.ranges = False
    assert f': the connection ended after {SIZE} of {SIZE + 7} bytes; ' in failure(site, path, '')


def test_too_short_a_content_length(site, path):
    site.length = SIZE - 7
    assert f'{SIZE - 7} bytes came whose SHA-256 begins with ' in failure(site, path)
    assert os.listdir(path.parent) == []


def test_no_content_length(site, path):
    site.length = -1
    assert 'the server does not say how long the file is' in failure(site, path, '')
    download(f'{site.url}/file', path, DIGEST)
    assert is_whole(path)
    path.unlink()
    site.cuts = [CUT]
    assert f'{CUT} bytes came whose SHA-256' in failure(site, path)


class Chunked(http.server.BaseHTTPRequestHandler):
    """Sends 2000 bytes in chunks of 1000; a path that ends in /cut lacks the last one."""

    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        self.send_response(200)
        self.send_header('Transfer-Encoding', 'chunked')
        self.send_header('Last-Modified', 'Mon, 99 Jan 2020 25:61:00 GMT')
        self.end_headers()
        self.wfile.write(b'3E8\r\n' + CONTENT[:1000] + b'\r\n')
        if not self.path.endswith('/cut'):
            self.wfile.write(b'3E8\r\n' + CONTENT[1000:2000] + b'\r\n0\r\n\r\n')
        self.close_connection = True

    def log_message(self, *_):
        pass


def test_chunked(path):
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Chunked) as server:
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}'
        with pytest.raises(DownloadError, match=r'IncompleteRead\(0 bytes read\); .*part keeps what has come'):
            download(f'{url}/cut', path)
        assert part_of(path).read_bytes() == CONTENT[:1000]
        download(f'{url}/whole', path)
        assert path.read_bytes() == CONTENT[:2000]
        server.shutdown()


# --------------------------------------------------------------------------------------------------------- the disk


def test_a_disk_without_room(site, path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CUT, limits[1]))
    try:
        assert 'File too large; ' in failure(site, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(site.sent) == 1
    download(f'{site.url}/file', path, DIGEST)
    assert is_whole(path)
    assert site.sent[1] == (f'bytes={CUT}-', SIZE - CUT)


def test_a_folder_that_cannot_be_made(site, path):
    path.parent.write_bytes(b'')
    assert f"File exists: '{path.parent}'" in failure(site, path)
    assert site.sent == []


# ----------------------------------------------------------------------------------------------------- two processes


def start_download(url, path):
    """Starts a process that downloads."""
    process = Tool._context.Process(target=download, args=(url, path, DIGEST))
    process.start()
    return process


@pytest.fixture
def waiting():
    """Set when somebody in this process waits for another one."""
    event, handler = threading.Event(), logging.Handler()
    handler.emit = lambda record: event.set() if 'Waiting for another process' in record.getMessage() else None
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield event
    logger.removeHandler(handler)


@pytest.fixture
def two(site, path, waiting):
    """A process in the middle of a download, and the same download here, which waits for it."""
    site.open.clear()
    process = start_download(f'{site.url}/file', path)
    assert site.arrived.wait(60)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(download, f'{site.url}/file', path, DIGEST)
        assert waiting.wait(10)
        assert not second.done()
        yield process, second
        site.open.set()
        process.join()


def test_the_second_waits_and_finds_the_file(two, site, path):
    process, second = two
    site.open.set()
    assert second.result() == path
    process.join()
    assert process.exitcode == 0
    assert is_whole(path)
    assert site.sent == [(None, SIZE)]


def test_the_second_goes_on_for_one_that_was_killed(two, site, path):
    process, second = two
    deadline = time.monotonic() + 10
    while part_of(path).stat().st_size < SIZE // 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    site.open.set()
    assert second.result() == path
    assert is_whole(path)
    [(asked, sent)] = site.sent[1:]
    assert asked == f'bytes={SIZE - sent}-'
    assert SIZE // 2 <= sent <= SIZE * 3 // 4


class TestGivenUp:
    @pytest.fixture
    def site(self):
        with Site(CONTENT, statuses=[404]) as site:
            yield site

    def test_the_second_is_told(self, two, site, path):
        process, second = two
        site.open.set()
        with pytest.raises(FileNotFoundError) as error:
            second.result()
        assert str(error.value) == (
            f'{site.url}/file: the process that was downloading this file has given up; its message says why'
        )
        process.join()
        assert process.exitcode == 1
        assert os.listdir(path.parent) == []


# ------------------------------------------------------------------------------------------------------ what is seen


def _on_terminal(terminal, url, path):
    os.environ['TERM'] = 'xterm'
    os.dup2(os.open(terminal, os.O_WRONLY), 2)
    download(url, path, DIGEST)


def test_bar_on_a_terminal(site, path):
    ours, theirs = pty.openpty()
    process = Tool._context.Process(target=_on_terminal, args=(os.ttyname(theirs), site.url, path))
    process.start()
    seen = io.BytesIO()
    reader = threading.Thread(target=_read_all, args=(ours, seen))
    reader.start()
    process.join()
    os.close(theirs)  # the last end: the reader's read fails
    reader.join()
    os.close(ours)
    assert process.exitcode == 0
    lines = re.sub(r'\x1b\[[\d;?]*[a-zA-Z]', '', seen.getvalue().decode())
    assert re.search(r'file\.bin ━+ 3\.0/3\.0 MB (\?|[\d.]+ [kMG]B/s) 0:00:00', lines), lines
    assert is_whole(path)


def _read_all(descriptor, into):
    with contextlib.suppress(OSError):
        while block := os.read(descriptor, 1 << 16):
            into.write(block)


def test_one_line_elsewhere(site, path, capsys):
    logger, lines = MMLogger.get_current_instance(), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    with patch.object(logger, 'handlers', [handler]):
        download(f'{site.url}/file', path, DIGEST)
    assert lines == [f'Downloading {site.url}/file to {path}']
    assert capsys.readouterr() == ('', '')
