"""A Docker engine and an Apptainer for the tests, and functions that run and stop a job in them."""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.stores.servers import free_port, listens, wait_until

ROOT = Path(__file__).parents[2]
START_SECONDS = 60
MIRROR_DOWN = re.compile(
    r"Could not (connect|resolve)|Temporary failure|timed out|Connection (refused|reset|failed)|NewConnectionError|ReadTimeout"
    r"|Unable to connect|Hash Sum mismatch|5\d\d +\w*(Bad Gateway|Unavailable|Timeout)"
)


def fetch(command: Sequence[str | Path], what: str) -> None:
    """Run a command that downloads packages. Skips the test, also with REQUIRE_ALL=1, if the mirror fails three times."""
    for _ in range(3):
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if found.returncode == 0:
            return
        output = found.stdout + found.stderr
        if not MIRROR_DOWN.search(output):
            pytest.fail(f"{what}: {output[-2000:]}")
        time.sleep(5)
    pytest.skip(f"{what}: the mirror did not answer three times: {output.strip().splitlines()[-1]}")


@dataclass(frozen=True)
class Docker:
    """The command-line client of an engine."""

    client: str
    environment: Mapping[str, str]

    def __call__(self, *arguments: str | Path, check: bool = True) -> str:
        """The output of a command, both streams."""
        found = subprocess.run(
            [self.client, *map(str, arguments)],
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert found.returncode == 0 or not check, f"docker {' '.join(map(str, arguments))}: {found.stdout}"
        return found.stdout

    @contextlib.contextmanager
    def started(self, *arguments: str | Path) -> Iterator["Container"]:
        """A container in the background, removed at the end."""
        name = self("run", "--detach", *arguments).strip().splitlines()[-1]
        try:
            yield Container(self, name)
        finally:
            self("rm", "--force", "--volumes", name)


@dataclass(frozen=True)
class Container:
    docker: Docker
    name: str

    def lines(self) -> Iterator[str]:
        """Its output, line by line, until it ends."""
        command = [self.docker.client, "logs", "--follow", self.name]
        with subprocess.Popen(
            command, env={**os.environ, **self.docker.environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as following:
            assert following.stdout is not None
            try:
                yield from following.stdout
            finally:
                following.terminate()

    def wait_for(self, text: str) -> None:
        output = []
        for line in self.lines():
            output.append(line)
            if text in line:
                return
        pytest.fail(f"ended without {text!r}: {''.join(output)}")

    def exit_code(self) -> int:
        """Wait until it ends. 137: it was killed."""
        return int(self.docker("wait", self.name))


def interrupted(command: Sequence[str | Path], text: str) -> tuple[int, str]:
    """Exit code and output of a job that receives SIGTERM when it prints `text`."""
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        output = []
        asked = False
        for line in process.stdout:
            output.append(line)
            if text in line and not asked:
                process.terminate()
                asked = True
        return process.wait(), "".join(output)


@contextlib.contextmanager
def docker_engine(folder: Path, component: Callable[[str], str]) -> Iterator[Docker]:
    """A private engine. Without bridges and firewall rules it does not change the machine's network."""
    engine = component("dockerd")
    # Debian's client has BuildKit built in; others in PATH may need a plugin.
    client = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else component("docker")
    environment = {"DOCKER_HOST": f"unix://{folder}/d.sock", "DOCKER_BUILDKIT": "1", "DOCKER_CONFIG": str(folder)}
    command = [engine, "--iptables=false", "--ip-forward=false", "--bridge=none", "--host-gateway-ip=127.0.0.1"]
    folders = ["--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "d.pid"]
    with (folder / "d.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *map(str, folders), "-H", environment["DOCKER_HOST"]], stdout=log, stderr=log, start_new_session=True
        )
    docker = Docker(client, environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Server Version" not in docker("info", check=False):
            assert process.poll() is None, (folder / "d.log").read_text()[-2000:]
            assert time.monotonic() < deadline, (folder / "d.log").read_text()[-2000:]
            time.sleep(0.2)
        yield docker
    finally:
        process.terminate()
        process.wait()
        # dockerd mounts it for containers on the host's network and does not unmount it.
        subprocess.run(["umount", folder / "exec/netns/default"], stderr=subprocess.DEVNULL)


REGISTRY = """
version: 0.1
log: {{accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}/registry}}}}
http: {{addr: "{address}"}}
"""


@contextlib.contextmanager
def docker_registry(folder: Path, component: Callable[[str], str]) -> Iterator[str]:
    """The address of a registry on loopback, where engines take plain http. Images are kept in a folder."""
    address = f"127.0.0.1:{free_port()}"
    settings = folder / "registry.yaml"
    settings.write_text(REGISTRY.format(folder=folder, address=address))
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen([component("docker-registry"), "serve", settings], stdout=log, stderr=log)
    try:
        wait_until(lambda: listens(int(address.rpartition(":")[2])), process, "the registry")
        yield address
    finally:
        process.terminate()
        process.wait()


NOBODY = 65534


@dataclass(frozen=True)
class Apptainer:
    program: Path

    def command(self, *arguments: str | Path, **environment: str) -> list[str]:
        """A command line that runs as an ordinary user, without a home folder and with no other variables than these."""
        user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]
        variables = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment}
        return [
            *user,
            "env",
            "-i",
            *(f"{name}={value}" for name, value in variables.items()),
            *map(str, (self.program, *arguments)),
        ]

    def __call__(self, *arguments: str | Path, check: bool = True, **environment: str) -> str:
        found = subprocess.run(
            self.command(*arguments, **environment), cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert found.returncode == 0 or not check, f"apptainer {' '.join(map(str, arguments))}: {found.stdout}"
        return found.stdout
