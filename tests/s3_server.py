"""A real S3 server on this machine: OpenStack Swift with its S3 API, in an environment of its own.

`python tests/s3_server.py` makes that environment, so that tests need no network later.
"""

import getpass
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

ENVIRONMENT = Path(__file__).parent.parent / ".venv-swift"
REQUIREMENT = "swift==2.38.3"
KEY, SECRET = "photos:writer", "e8sYt-0nly-f0r-tests"
_SERVERS = ("account", "container", "object", "proxy")
_START_SECONDS = 60.0

# Runs in Swift's environment: a ring of one device for each kind of server.
_RINGS = """
import sys
from swift.common.ring import RingBuilder
for argument in sys.argv[1:]:
    path, port = argument.rsplit(":", 1)
    builder = RingBuilder(part_power=4, replicas=1, min_part_hours=1)
    place = {"ip": "127.0.0.1", "port": int(port)}
    place |= {f"replication_{name}": value for name, value in place.items()}
    builder.add_dev({"region": 1, "zone": 1, "device": "disk", "weight": 1.0, "meta": "", **place})
    builder.rebalance()
    builder.get_ring().save(path)
"""

_PIPELINE: dict[str, dict[str, str]] = {
    "catch_errors": {},
    # Swift wants the filter; nothing listens at that address, so nothing is cached.
    "cache": {"use": "egg:swift#memcache", "memcache_servers": "127.0.0.1:1"},
    "listing_formats": {},
    "bulk": {},
    "s3api": {"s3_acl": "false", "location": "us-east-1"},
    "tempauth": {f"user_{KEY.replace(':', '_')}": f"{SECRET} .admin"},
    "slo": {},
    "copy": {},
}


class UnavailableError(Exception):
    """The server's environment cannot be made here; the message says why."""


def prepare() -> Path:
    """The folder of the environment's programs, made once. Raises UnavailableError."""
    programs, stamp = ENVIRONMENT / "bin", ENVIRONMENT / ".ready"
    if stamp.is_file() and stamp.read_text() == REQUIREMENT:
        return programs
    try:
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError(f"no virtual environment can be made: {error}") from error
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet"]
    options = ["--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
    done = subprocess.run([*pip, *options, REQUIREMENT], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnavailableError(f"pip cannot install {REQUIREMENT}: {last}")
    stamp.write_text(REQUIREMENT)
    return programs


class S3Server:
    """A context manager: in it the server answers at `url`, with its files below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._programs = prepare()
        self._ports = dict(zip(_SERVERS, _free_ports(len(_SERVERS)), strict=True))
        self._processes: list[subprocess.Popen[bytes]] = []
        self.url = f"http://127.0.0.1:{self._ports['proxy']}"

    @property
    def options(self) -> dict[str, Any]:
        """Storage options for s3fs."""
        return options_for(self.url)

    def __enter__(self) -> Self:
        try:
            self._configure()
            for name in _SERVERS:
                self._start(name)
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the servers, and those only."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def _configure(self) -> None:
        (self._folder / "disks" / "disk").mkdir(parents=True)
        _write(
            self._folder / "swift.conf",
            {
                "swift-hash": {"swift_hash_path_suffix": "tests"},
                "storage-policy:0": {"name": "only", "default": "yes"},
            },
        )
        rings = [f"{self._folder / name}.ring.gz:{self._ports[name]}" for name in _SERVERS[:3]]
        python = str(self._programs / "python")
        subprocess.run([python, "-c", _RINGS, *rings], check=True, stderr=subprocess.DEVNULL)
        for name, port in self._ports.items():
            sections: dict[str, dict[str, Any]] = {
                "DEFAULT": {
                    "bind_ip": "127.0.0.1",
                    "bind_port": port,
                    "workers": 0,
                    "user": getpass.getuser(),
                    "swift_dir": self._folder,
                    "devices": self._folder / "disks",
                    "mount_check": "false",
                    "fallocate_reserve": 0,
                    "log_level": "ERROR",
                },
                f"app:{name}-server": {"use": f"egg:swift#{name}"},
            }
            filters = []
            if name == "proxy":
                sections["app:proxy-server"]["account_autocreate"] = "true"
                for part, settings in _PIPELINE.items():
                    sections[f"filter:{part}"] = {"use": f"egg:swift#{part}", **settings}
                    filters.append(part)
            sections["pipeline:main"] = {"pipeline": " ".join([*filters, f"{name}-server"])}
            _write(self._folder / f"{name}.conf", sections)

    def _start(self, name: str) -> None:
        command = [str(self._programs / f"swift-{name}-server"), f"{self._folder / name}.conf"]
        # It reads swift.conf from there.
        environment = {**os.environ, "SWIFT_DIR": str(self._folder)}
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    cwd=self._folder,
                )
            )

    def _wait(self) -> None:
        """Until the proxy answers and the servers behind it can be reached."""
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            for name, process in zip(_SERVERS, self._processes, strict=True):
                if process.poll() is not None:
                    log = (self._folder / f"{name}.log").read_text(errors="replace")
                    raise UnavailableError(f"the {name} server ended: {log[-1000:]}")
            if all(_listens(port) for port in self._ports.values()):
                return
            time.sleep(0.1)
        raise UnavailableError(f"no answer at {self.url} within {_START_SECONDS:g} s")


def options_for(url: str, **config: Any) -> dict[str, Any]:
    """Storage options for an s3fs that talks to `url`; config: of botocore."""
    return {
        "key": KEY,
        "secret": SECRET,
        "endpoint_url": url,
        "client_kwargs": {"region_name": "us-east-1"},
        **({"config_kwargs": config} if config else {}),
    }


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _listens(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _write(path: Path, sections: Mapping[str, Mapping[str, Any]]) -> None:
    lines: list[str] = []
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {value}" for key, value in values.items()), ""]
    path.write_text("\n".join(lines))


if __name__ == "__main__":
    try:
        prepare()
    except UnavailableError as error:
        sys.exit(f"tests of S3 will be skipped: {error}")
