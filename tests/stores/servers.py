"""Real S3 servers on loopback, as processes: moto, which starts quickly, and Ceph's radosgw, a production server.

Only radosgw checks signatures and Content-MD5; it gives no checksums. Both know ranges, If-Match on GET, If-None-Match on PUT,
pages, multipart uploads and versions. moto is too slow for measurements of clients.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

REGION = "us-east-1"
START_SECONDS = 20
"""The longest time that a server takes to start."""


@dataclass(frozen=True)
class S3Server:
    """The address of a server, and the credentials for it."""

    endpoint_url: str
    access_key: str
    secret_key: str

    def environment(self) -> dict[str, str]:
        """Variables with which a job reaches the server. They hide the credentials of the person who runs the tests."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_SESSION_TOKEN": "",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, **settings: Any) -> Any:
        """Plain boto3 with two tries and without the checksums that many servers do not support."""
        config = {
            "retries": {"total_max_attempts": 2},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "s3": {"addressing_style": "path"},
        }
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=Config(**{**config, **settings}),
        )

    def new_bucket(self) -> str:
        """The name of an empty bucket that no other test has."""
        name = f"songs-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name


MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def moto_server() -> Iterator[S3Server]:
    """moto in a process of its own. It ends with this process, which closes its standard input."""
    with subprocess.Popen(
        [sys.executable, "-c", MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "AWS_EC2_METADATA_DISABLED": "true"},
    ) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            assert port, f"moto did not start: exit code {process.wait()}"
            yield S3Server(f"http://127.0.0.1:{port}", "moto-access-key", "moto-secret-key")
        finally:
            process.kill()


CEPH = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd pool default pg autoscale mode = off
osd pool default pg num = 4
osd pool default pgp num = 4
mon max pg per osd = 1000
osd crush chooseleaf type = 0
paxos propose interval = 0.05
osd objectstore = memstore
memstore device bytes = 6442450944
mon data = {folder}/mon
osd data = {folder}/osd
run dir = {folder}
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
"""
CEPH_PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "monmaptool")
"""Of Debian's packages radosgw, ceph-mon, ceph-osd and ceph-common."""
CEPH_TRIES = 8


@contextmanager
def radosgw_server() -> Iterator[S3Server]:
    """A Ceph cluster of one monitor and one OSD in memory (about 170 MB) with its S3 gateway. It takes seconds to start."""
    for remaining in reversed(range(CEPH_TRIES)):
        with ExitStack() as running:
            folder = Path(tempfile.mkdtemp(prefix="radosgw-"))
            running.callback(shutil.rmtree, folder)
            try:
                server = _start_radosgw(folder, running)
            except (AssertionError, subprocess.SubprocessError):
                # Ceph's programs fail or hang if they ask the monitor before it knows the cluster's id.
                if not remaining:
                    raise
                continue
            yield server
            return


def _start_radosgw(folder: Path, running: ExitStack) -> S3Server:
    fsid, osd, mon_port, port = str(uuid.uuid4()), str(uuid.uuid4()), free_port(), free_port()
    (folder / "ceph.conf").write_text(CEPH.format(fsid=fsid, mon_port=mon_port, port=port, folder=folder))
    environment = {**os.environ, "CEPH_CONF": str(folder / "ceph.conf")}

    def run(*command: str) -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=START_SECONDS)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def start(*command: str) -> subprocess.Popen[bytes]:
        # Tied to this process, so that it ends with a killed test run.
        tied = ["setpriv", "--pdeathsig", "SIGKILL", *command, "-f"]
        process = subprocess.Popen(tied, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        running.callback(process.wait)
        running.callback(process.kill)
        return process

    (folder / "mon").mkdir()
    (folder / "osd").mkdir()
    monmap = str(folder / "monmap")
    run("monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{mon_port}]", "--fsid", fsid, monmap)
    run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
    start("ceph-mon", "-i", "a")
    run("ceph", "osd", "new", osd)
    run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
    objects = start("ceph-osd", "-i", "0")
    wait_until(lambda: "1 up" in run("ceph", "osd", "stat"), objects, "the OSD")
    server = S3Server(f"http://127.0.0.1:{port}", "radosgw-access-key", "radosgw-secret-key")
    keys = ("--access-key", server.access_key, "--secret", server.secret_key)
    run("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test", *keys)
    gateway = start("radosgw", "-n", "client.rgw")
    wait_until(lambda: listens(port), gateway, "the gateway")
    return server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(happens: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not happens():
        assert process.poll() is None, f"{what} ended with {process.returncode}"
        assert time.monotonic() < deadline, f"waited {START_SECONDS} s for {what}"
        time.sleep(0.02)
