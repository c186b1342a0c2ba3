"""A web server on this machine that serves one file, as well or as badly as a test says."""

import email.utils
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What the server does with every request for any path; ``with Site(content) as site:`` starts it at ``site.url``.

    Attributes:
        content: The file.
        ranges: Whether a request for a range is honoured.
        statuses: HTTP statuses of the first requests, instead of an answer.
        cuts: After how many bytes of their bodies the first answers end; None: whole.
        length: What it says of the file's length; None: the truth; -1: nothing.
        kind: Content-Type.
        span: Content-Range of ranges, if it is not to be the true one.
        modified: Last-Modified, in seconds.
        moved: Whether it redirects to another path first.
        open: Cleared, every answer stops in its middle (an error before it begins) until it is set again.
        arrived: Set when an answer has come to that middle.
        sent: Range and number of bytes sent of every answer.
    """

    content: bytes
    ranges: bool = True
    statuses: list[int] = field(default_factory=list)
    cuts: list[int | None] = field(default_factory=list)
    length: int | None = None
    kind: str = 'application/octet-stream'
    span: str = ''
    modified: int = 1_500_000_000
    moved: bool = False
    open: threading.Event = field(default_factory=threading.Event)
    arrived: threading.Event = field(default_factory=threading.Event)
    sent: list[tuple[str | None, int]] = field(default_factory=list)

    def __enter__(self) -> 'Site':
        self.open.set()
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
        self.server.site = self
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.open.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        site = self.server.site
        if site.moved and not self.path.endswith('/moved'):
            return self.answer(302, Location=f'{self.path}/moved')
        if site.statuses:
            site.arrived.set()
            site.open.wait(60)
            site.sent.append((self.headers['Range'], 0))
            return self.answer(site.statuses.pop(0))
        date = email.utils.formatdate(site.modified, usegmt=True)
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers['Range'] or '')
        start = int(asked[1]) if asked and site.ranges and self.headers['If-Range'] in (None, date) else 0
        size = len(site.content)
        if start >= size:
            site.sent.append((self.headers['Range'], 0))
            return self.answer(416, Content_Range=f'bytes */{size}')
        headers = dict(Content_Type=site.kind, Last_Modified=date)
        if site.length != -1:
            headers['Content_Length'] = str((site.length or size) - start)
        if start:
            headers['Content_Range'] = site.span or f'bytes {start}-{size - 1}/{size}'
        self.answer(206 if start else 200, **headers)
        self.send_body(site, site.content[start:])

    def answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()

    def send_body(self, site: Site, body: bytes) -> None:
        body = body[: site.cuts.pop(0) if site.cuts else None]
        site.sent.append((self.headers['Range'], len(body)))
        self.wfile.write(body[: len(body) // 2])
        site.arrived.set()
        site.open.wait(60)
        self.wfile.write(body[len(body) // 2 :])

    def log_message(self, *_) -> None:
        """Prints nothing."""
