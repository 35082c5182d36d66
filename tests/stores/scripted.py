"""An S3 server with scripted faults. It keeps everything in memory and records every request.

    with ScriptedS3() as s3:
        s3.objects["songs/1.mp3"] = Object(b"...")
        s3.on("GetObject", "songs/1.mp3", reset_at(1000), times=2)     # the first two requests only
        ...
        assert [request.operation for request in s3.requests] == [...]

Every bucket name means the same bucket. Signatures are ignored. Like many servers, it does not support aws-chunked.
"""

import base64
import fnmatch
import hashlib
import re
import socket
import ssl
import struct
import threading
import time
import urllib.parse
import uuid
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tests.stores.servers import S3Server

PIECE = 8 << 10
XMLNS = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
STORED_HEADERS = ("x-amz-meta-", "x-amz-checksum-sha256", "x-amz-checksum-crc32", "content-type")


@dataclass
class Object:
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    etag: str = ""
    """Of an object uploaded in parts; for others the MD5 is used."""
    modified: float = 1_700_000_000.0

    @property
    def tag(self) -> str:
        return self.etag or hashlib.md5(self.body).hexdigest()


@dataclass
class Request:
    operation: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    """By names in lower case."""
    body: bytes = b""
    status: int = 0
    sent: int = 0
    """Bytes of the answer's body that were written to the socket."""


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    stop_at: int | None = None
    """The connection ends after this many bytes of the body."""
    reset: bool = False
    """The connection ends with a reset."""
    bytes_a_second: float | None = None
    silent: bool = False
    """Nothing is sent. The connection stays open unless it is reset."""


Fault = Callable[[Request, Callable[[], Answer]], Answer]
"""The answer to a request. The second argument does what was asked and returns the right answer."""


def error(status: int, code: str, message: str = "scripted", **headers: str) -> Fault:
    return lambda request, honest: _error(status, code, message, **headers)


def _error(status: int, code: str, message: str = "scripted", **headers: str) -> Answer:
    text = f"<Error><Code>{code}</Code><Message>{message}</Message><RequestId>1</RequestId></Error>"
    return Answer(status, text.encode(), {"Content-Type": "application/xml", **headers})


def reset_at(byte: int) -> Fault:
    return lambda request, honest: replace(honest(), stop_at=byte, reset=True)


def reset_unheard(request: Request, honest: Callable[[], Answer]) -> Answer:
    """The connection is reset before the request is carried out."""
    return Answer(silent=True, reset=True)


def end_at(byte: int) -> Fault:
    """The connection is closed in order, with fewer bytes than announced."""
    return lambda request, honest: replace(honest(), stop_at=byte)


def flip_bit(byte: int) -> Fault:
    def flipped(request: Request, honest: Callable[[], Answer]) -> Answer:
        answer = honest()
        body = bytearray(answer.body)
        body[byte] ^= 1
        return replace(answer, body=bytes(body))

    return flipped


def with_headers(**headers: str) -> Fault:
    """Other headers; underscores stand for hyphens."""
    new = {name.replace("_", "-"): value for name, value in headers.items()}

    def changed(request: Request, honest: Callable[[], Answer]) -> Answer:
        answer = honest()
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in map(str.lower, new)}
        return replace(answer, headers={**kept, **new})

    return changed


def answer_with(body: bytes = b"", content_type: str = "", status: int = 200) -> Fault:
    """An answer that is none to the request, which is not carried out: as of a captive portal, a proxy, another service."""
    headers = {"Content-Type": content_type} if content_type else {}
    return lambda request, honest: Answer(status, body, headers)


PAGE = answer_with(b"<html><head><title>Sign in</title></head><body>\x1b[2J</body></html>", "text/html; charset=utf-8")
"""Of a captive portal."""
NOT_ANSWERS = {
    "page": PAGE,
    "page that is no XML": answer_with(b"<!DOCTYPE html><p>Sign in<br>", "text/html"),
    "nothing": answer_with(),
    "other XML": answer_with(b'<?xml version="1.0"?><Services/>', "application/xml"),
    "JSON": answer_with(b"{}", "application/json"),
}


def without_etag(request: Request, honest: Callable[[], Answer]) -> Answer:
    """What was asked is done, and the answer has no ETag."""
    answer = honest()
    headers = {name: value for name, value in answer.headers.items() if name != "ETag"}
    return replace(answer, headers=headers, body=re.sub(rb"<ETag>.*?</ETag>", b"", answer.body))


def lost(request: Request, honest: Callable[[], Answer]) -> Answer:
    """What was asked is done, and the connection is reset before the answer."""
    honest()
    return Answer(silent=True, reset=True)


def slowly(bytes_a_second: float) -> Fault:
    return lambda request, honest: replace(honest(), bytes_a_second=bytes_a_second)


def never(request: Request, honest: Callable[[], Answer]) -> Answer:
    return Answer(silent=True)


def redirect(url: str) -> Fault:
    return error(307, "TemporaryRedirect", Location=url)


@dataclass
class Rule:
    operation: str
    key: str
    fault: Fault
    passed: int
    """Matching requests that are served before the fault begins."""
    times: float
    """Matching requests that get the fault."""


class ScriptedS3:
    """All attributes may be changed at any time.

    refuses: lower-case names of request headers, and the status with which a request that has one is refused.
    bytes_a_second: of every answer. encrypts: objects are encrypted with a key of the server, so that an ETag is not an MD5.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.objects: dict[str, Object] = {}
        self.decoys: list[str] = []
        """Keys of further objects, sorted, which are listed and have no content."""
        self.uploads: dict[str, tuple[str, dict[int, bytes], dict[str, str]]] = {}
        self.began: dict[str, float] = {}
        """When each upload was begun."""
        self.requests: list[Request] = []
        self.refuses: dict[str, int] = {}
        self.sends_checksums = False
        self.bytes_a_second: float | None = None
        self.encrypts = False
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        handler = type("Bound", (_Handler,), {"s3": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.tls = tls
        self._tls = tls

    def __enter__(self) -> "ScriptedS3":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def address(self) -> S3Server:
        scheme = "https" if self._tls else "http"
        return S3Server(f"{scheme}://127.0.0.1:{self._server.server_port}", "scripted-access-key", "scripted-secret-key")

    def on(self, operation: str, key: str, fault: Fault, passed: int = 0, times: float = 1) -> None:
        """Operation and key are patterns of fnmatch."""
        self._rules.append(Rule(operation, key, fault, passed, times))

    def stop_failing(self) -> None:
        self._rules.clear()

    def asked(self, operation: str = "*", key: str = "*") -> list[Request]:
        """Requests so far."""
        return [one for one in list(self.requests) if _matches(one, operation, key)]

    def sent(self, operation: str = "GetObject", key: str = "*") -> int:
        return sum(one.sent for one in self.asked(operation, key))

    def answer(self, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            fault = self._due(request)
        if fault is not None:
            return fault(request, lambda: self._honest(request))
        return self._honest(request)

    def _due(self, request: Request) -> Fault | None:
        for rule in self._rules:
            if not _matches(request, rule.operation, rule.key):
                continue
            if rule.passed > 0:
                rule.passed -= 1
            elif rule.times > 0:
                rule.times -= 1
                return rule.fault
        return None

    def _honest(self, request: Request) -> Answer:
        with self._lock:
            for name, status in self.refuses.items():
                if name in request.headers:
                    return _error(status, "NotImplemented" if status == 501 else "InvalidArgument", f"unexpected header {name}")
            if request.headers.get("content-encoding") == "aws-chunked":
                return _error(501, "NotImplemented", "aws-chunked")
            return OPERATIONS[request.operation](self, request)

    # What S3 does

    def _list(self, request: Request) -> Answer:
        query = request.query
        prefix, most = query.get("prefix", ""), int(query.get("max-keys", 1000))
        after = query.get("continuation-token") or query.get("start-after", "")
        spell = urllib.parse.quote if query.get("encoding-type") == "url" else escape
        keys = sorted([*self.objects, *self.decoys]) if self.decoys else sorted(self.objects)
        keys = keys[bisect_right(keys, after) if after else 0 :]
        found = []
        for key in keys:
            if key.startswith(prefix):
                found.append(key)
            if len(found) > most:
                break
        page = found[:most]
        text = "".join(self._listed(key, spell(key)) for key in page)
        more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if len(found) > most and page else ""
        return _xml(
            "ListBucketResult",
            f"<EncodingType>url</EncodingType><IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}{text}",
        )

    def _listed(self, key: str, spelt: str) -> str:
        found = self.objects.get(key, Object(b""))
        return (
            f"<Contents><Key>{spelt}</Key><Size>{len(found.body)}</Size><ETag>&quot;{found.tag}&quot;</ETag>"
            f"<LastModified>{_iso(found.modified)}</LastModified></Contents>"
        )

    def _get(self, request: Request) -> Answer:
        found = self.objects.get(request.key)
        if found is None:
            return _error(404, "NoSuchKey")
        wanted = request.headers.get("if-match")
        if wanted is not None and wanted.strip('"') != found.tag:
            return _error(412, "PreconditionFailed")
        headers = {
            "ETag": f'"{found.tag}"',
            "Last-Modified": formatdate(found.modified, usegmt=True),
            "Accept-Ranges": "bytes",
            **{name: value for name, value in found.headers.items() if not name.startswith("x-amz-checksum")},
        }
        if self.encrypts:
            headers["x-amz-server-side-encryption"] = "aws:kms"
        if "range" in request.headers:
            first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or len(found.body)), len(found.body) - 1) + 1
            if begin >= len(found.body):
                return _error(416, "InvalidRange")
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(found.body)}"
            return Answer(206, found.body[begin:end], headers)
        if self.sends_checksums and request.headers.get("x-amz-checksum-mode") == "ENABLED":
            headers.update({name: text for name, text in found.headers.items() if name.startswith("x-amz-checksum")})
        return Answer(200, found.body, headers)

    def _put(self, request: Request) -> Answer:
        if request.headers.get("if-none-match") == "*" and request.key in self.objects:
            return _error(412, "PreconditionFailed")
        if not _has_its_digests(request):
            return _error(400, "BadDigest")
        self.objects[request.key] = written = Object(request.body, _stored(request.headers), modified=time.time())
        return Answer(headers={"ETag": f'"{written.tag}"'})

    def _copy(self, request: Request) -> Answer:
        source = urllib.parse.unquote(request.headers["x-amz-copy-source"]).lstrip("/")
        _, _, key = source.partition("/object/" if source.startswith("arn:") else "/")
        if key not in self.objects:
            return _error(404, "NoSuchKey")
        self.objects[request.key] = written = replace(self.objects[key], modified=time.time())
        return _xml("CopyObjectResult", f"<ETag>{written.tag}</ETag><LastModified>{_iso(written.modified)}</LastModified>")

    def _delete(self, request: Request) -> Answer:
        self.objects.pop(request.key, None)
        return Answer(204)

    def _delete_many(self, request: Request) -> Answer:
        for one in ElementTree.fromstring(request.body).iter():
            if one.tag.endswith("Key"):
                self.objects.pop(one.text or "", None)
        return _xml("DeleteResult", "")

    def _begin(self, request: Request) -> Answer:
        upload = uuid.uuid4().hex
        self.uploads[upload] = (request.key, {}, _stored(request.headers))
        self.began[upload] = time.time()
        return _xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")

    def _part(self, request: Request) -> Answer:
        if request.query["uploadId"] not in self.uploads:
            return _error(404, "NoSuchUpload")
        if not _has_its_digests(request):
            return _error(400, "BadDigest")
        self.uploads[request.query["uploadId"]][1][int(request.query["partNumber"])] = request.body
        return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    def _complete(self, request: Request) -> Answer:
        if request.query["uploadId"] not in self.uploads:
            return _error(404, "NoSuchUpload")
        if request.headers.get("if-none-match") == "*" and request.key in self.objects:
            return _error(412, "PreconditionFailed")
        key, parts, headers = self.uploads.pop(request.query["uploadId"])
        named = [one.text for one in ElementTree.fromstring(request.body).iter() if one.tag.endswith("PartNumber")]
        bodies = [parts[int(number or 0)] for number in named]
        digests = b"".join(hashlib.md5(body).digest() for body in bodies)
        etag = f"{hashlib.md5(digests).hexdigest()}-{len(bodies)}"
        self.objects[key] = Object(b"".join(bodies), headers, etag, time.time())
        return _xml("CompleteMultipartUploadResult", f"<ETag>{etag}</ETag>")

    def _abort(self, request: Request) -> Answer:
        self.uploads.pop(request.query["uploadId"], None)
        return Answer(204)

    def _list_uploads(self, request: Request) -> Answer:
        text = "".join(
            f"<Upload><Key>{escape(key)}</Key><UploadId>{upload}</UploadId><Initiated>{_iso(self.began[upload])}</Initiated></Upload>"
            for upload, (key, _, _) in self.uploads.items()
            if key.startswith(request.query.get("prefix", ""))
        )
        return _xml("ListMultipartUploadsResult", f"<IsTruncated>false</IsTruncated>{text}")

    def _list_parts(self, request: Request) -> Answer:
        if request.query["uploadId"] not in self.uploads:
            return _error(404, "NoSuchUpload")
        _, parts, _ = self.uploads[request.query["uploadId"]]
        text = "".join(f"<Part><PartNumber>{number}</PartNumber></Part>" for number in sorted(parts))
        return _xml("ListPartsResult", f"<IsTruncated>false</IsTruncated>{text}")

    # How it is sent

    def send(self, handler: "_Handler", request: Request, answer: Answer) -> None:
        if answer.reset:
            handler.close_connection = True
            # Closing is then a reset.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if answer.silent:
            if not answer.reset:
                self._ended.wait()
            handler.close_connection = True
            return
        request.status = answer.status
        handler.send_response_only(answer.status)
        if "Date" not in answer.headers:
            handler.send_header("Date", handler.date_time_string())
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        if answer.status != 204:
            handler.send_header("Content-Length", str(len(answer.body)))
        handler.end_headers()
        if request.operation == "HeadObject":
            return
        limit = len(answer.body) if answer.stop_at is None else answer.stop_at
        rate = answer.bytes_a_second or self.bytes_a_second
        piece = len(answer.body) if rate is None else max(1, min(PIECE, int(rate / 20)))
        started = time.monotonic()
        while request.sent < limit and not self._ended.is_set():
            block = answer.body[request.sent : min(limit, request.sent + piece)]
            handler.wfile.write(block)
            request.sent += len(block)
            if rate is not None:
                self._ended.wait(max(0.0, started + request.sent / rate - time.monotonic()))
        if answer.stop_at is not None:
            handler.close_connection = True


def _matches(request: Request, operation: str, key: str) -> bool:
    return fnmatch.fnmatchcase(request.operation, operation) and fnmatch.fnmatchcase(request.key, key)


def _xml(name: str, content: str) -> Answer:
    return Answer(200, f"<{name} {XMLNS}>{content}</{name}>".encode(), {"Content-Type": "application/xml"})


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


def _stored(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith(STORED_HEADERS)}


def _has_its_digests(request: Request) -> bool:
    """Whether the body has the digests that its headers say."""
    body = request.body
    digests = {
        "content-md5": hashlib.md5(body).digest(),
        "x-amz-checksum-sha256": hashlib.sha256(body).digest(),
        "x-amz-checksum-crc32": zlib.crc32(body).to_bytes(4, "big"),
    }
    return all(request.headers.get(name) in (None, base64.b64encode(digest).decode()) for name, digest in digests.items())


OPERATIONS: dict[str, Callable[[ScriptedS3, Request], Answer]] = {
    "ListObjectsV2": ScriptedS3._list,
    "HeadObject": ScriptedS3._get,
    "GetObject": ScriptedS3._get,
    "PutObject": ScriptedS3._put,
    "CopyObject": ScriptedS3._copy,
    "DeleteObject": ScriptedS3._delete,
    "DeleteObjects": ScriptedS3._delete_many,
    "CreateMultipartUpload": ScriptedS3._begin,
    "UploadPart": ScriptedS3._part,
    "CompleteMultipartUpload": ScriptedS3._complete,
    "AbortMultipartUpload": ScriptedS3._abort,
    "ListMultipartUploads": ScriptedS3._list_uploads,
    "ListParts": ScriptedS3._list_parts,
    "HeadBucket": lambda s3, request: Answer(),
    "CreateBucket": lambda s3, request: Answer(),
}


def _operation(method: str, key: str, query: dict[str, str], headers: Iterable[str]) -> str:
    if not key:
        if method == "GET":
            return "ListMultipartUploads" if "uploads" in query else "ListObjectsV2"
        return {"HEAD": "HeadBucket", "PUT": "CreateBucket", "POST": "DeleteObjects"}[method]
    if method == "POST":
        return "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload"
    if method == "PUT":
        return "UploadPart" if "partNumber" in query else "CopyObject" if "x-amz-copy-source" in headers else "PutObject"
    if method == "DELETE":
        return "AbortMultipartUpload" if "uploadId" in query else "DeleteObject"
    if method == "GET" and "uploadId" in query:
        return "ListParts"
    return {"GET": "GetObject", "HEAD": "HeadObject"}[method]


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    tls: ssl.SSLContext | None = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may disconnect at any time."""

    def finish_request(self, request: Any, client_address: Any) -> None:
        # In the connection's own thread: a client that refuses the certificate does not block others.
        if self.tls is not None:
            with self.tls.wrap_socket(request, server_side=True) as wrapped:
                super().finish_request(wrapped, client_address)
        else:
            super().finish_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        # Without the orderly end that would come before a reset.
        self.close_request(request)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 0
    s3: ScriptedS3

    def setup(self) -> None:
        if self.s3.bytes_a_second is not None:
            # So that little is sent before it arrives.
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
        super().setup()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def handle_s3(self) -> None:
        path, _, text = self.path.partition("?")
        query = dict(urllib.parse.parse_qsl(text, keep_blank_values=True))
        _, _, key = urllib.parse.unquote(path).lstrip("/").partition("/")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(_operation(self.command, key, query, headers), key, query, headers)
        request.body = self.rfile.read(int(headers.get("content-length", 0)))
        self.s3.send(self, request, self.s3.answer(request))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_s3  # noqa: N815  http.server's names
