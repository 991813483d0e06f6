"""The job on Ray clusters of several nodes, all of them on this machine."""

import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import hooked_processes
from photos import files, fill, png
from waiting import parent_of, wait_for
from without_ray import without_ray

import vaestream
from vaestream.archive.verify import verify


@dataclass
class Nodes:
    """A cluster whose processes run tests/worker_hooks. marks: where these leave their marks."""

    cluster: Any
    marks: Path

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, **resources: Any) -> Any:
        """A node more."""
        return self.cluster.add_node(
            include_dashboard=False, object_store_memory=80 << 20, **resources
        )

    def of_worker(self, pid: int) -> Any:
        """The node on which a worker runs: it is a child of that node's raylet."""
        parent = parent_of(pid)
        (found,) = (
            node
            for node in self.cluster.worker_nodes
            if node.all_processes["raylet"][0].process.pid == parent
        )
        return found


@pytest.fixture(scope="module")
def head(local_ray: Path) -> Iterator[Nodes]:
    """A cluster that has only a head, without a core for workers."""
    from ray.cluster_utils import Cluster

    fast = {
        # A killed node is found missing in seconds, not in half a minute.
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "4",
    }
    with hooked_processes(**fast) as folder, pytest.MonkeyPatch.context() as patch:
        # Else the address stands where address="auto" of other programs finds it.
        patch.setenv("RAY_TMPDIR", str(folder / "ray"))
        cluster: Any = Cluster(shutdown_at_exit=True)
        try:
            made = Nodes(cluster, folder)
            made.add(num_cpus=0)
            yield made
        finally:
            cluster.shutdown()


@pytest.fixture
def nodes(head: Nodes) -> Iterator[Nodes]:
    """The head, and no marks; what a test adds goes with it."""
    yield head
    for node in list(head.cluster.worker_nodes):
        head.cluster.remove_node(node, allow_graceful=False)
    for mark in head.marks.iterdir():
        if mark.is_file():
            mark.unlink()


@pytest.fixture
def in_peace(weights: Path) -> Callable[[Path, Path], None]:
    """Does the same job in this process, where it has not to wait."""

    @without_ray()
    def compress(source: Path, archive: Path) -> None:
        vaestream.compress(source, archive, weights=weights, min_psnr=0.0, shard_images=1)

    return compress


@pytest.fixture
def start(nodes: Nodes, weights: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `vaestream compress` on the cluster, with the small model and a shard a photo."""
    started: list[subprocess.Popen[str]] = []

    def compress(source: Path, archive: Path, *options: str) -> subprocess.Popen[str]:
        command = command_line(source, archive, weights, "--address", nodes.address, *options)
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield compress
    for process in started:
        process.kill()
        process.communicate()


def command_line(source: Path, archive: Path, weights: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "vaestream", "compress", str(source), str(archive)]
    small = ["--weights", str(weights), "--min-psnr", "0", "--shard-images", "1"]
    return [*command, *small, *options]


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for its end in peace; what it has told on stderr."""
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return told


def waiting(marks: Path) -> list[int]:
    """Process ids of the workers that wait in mid shard."""
    return sorted(int(path.name.removeprefix("waiting-")) for path in marks.glob("waiting-*"))


def ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def photos(folder: Path, count: int, wait: Sequence[int]) -> Path:
    """Photos of which some make their worker wait."""
    fill(folder, [f"{i}.png" for i in range(count)])
    for i in wait:
        (folder / f"{i}.png").write_bytes(png(i, "WAIT HERE"))
    return folder


def test_a_node_that_is_lost_in_mid_job_changes_nothing(
    nodes: Nodes,
    start: Callable[..., subprocess.Popen[str]],
    in_peace: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    for _ in range(2):
        nodes.add(num_cpus=1)
    source = photos(tmp_path / "source", 6, wait=[1])
    driver = start(source, tmp_path / "disturbed")
    (worker,) = wait_for(lambda: waiting(nodes.marks), driver)
    nodes.cluster.remove_node(nodes.of_worker(worker), allow_graceful=False)
    wait_for(partial(ended, worker))
    (nodes.marks / "go").touch()
    finish(driver)
    in_peace(source, tmp_path / "peaceful")
    assert files(tmp_path / "disturbed") == files(tmp_path / "peaceful")
    assert verify(str(tmp_path / "disturbed")) == []
    assert len(vaestream.open(str(tmp_path / "disturbed"))) == 6


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.slow
def test_a_submitted_job_uses_the_cluster_it_runs_in(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp_cors", reason="ray[default] is not installed")
    ray = str(Path(sys.executable).with_name("ray"))
    source = photos(tmp_path / "source", 2, wait=[1])
    ports = ["port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port"]
    chosen = {name: free_port() for name in ports}
    # The token as docs/cluster.md has it, but in the environment: tests write to no home folder.
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with hooked_processes(**secret) as folder:
        command = [ray, "start", "--head", "--block", "--num-cpus=1", "--disable-usage-stats"]
        options = [f"--{name}={port}" for name, port in chosen.items()]
        store = ["--object-store-memory=100000000", f"--temp-dir={folder / 'ray'}"]
        with (tmp_path / "head").open("w") as log:
            head = subprocess.Popen([*command, *options, *store], stdout=log, stderr=log)
        try:
            dashboard = f"http://127.0.0.1:{chosen['dashboard-port']}"
            wait_for(lambda: "Ray runtime started" in (tmp_path / "head").read_text(), head)
            submit = [ray, "job", "submit", f"--address={dashboard}", "--"]
            compress = command_line(source, tmp_path / "archive", weights, "--json")
            job = subprocess.Popen(
                [*submit, *compress], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            (worker,) = wait_for(lambda: waiting(folder), job)
            # A Ray of its own would have a raylet of its own.
            raylet = Path(f"/proc/{parent_of(worker)}/cmdline").read_bytes()
            assert str(chosen["port"]).encode() in raylet
            (folder / "go").touch()
            told, _ = job.communicate(timeout=300)
            assert job.returncode == 0 and '"objects": 2' in told, told
        finally:
            head.terminate()
            try:
                head.wait(60)
            except subprocess.TimeoutExpired:
                head.kill()
    assert verify(str(tmp_path / "archive")) == []


@pytest.mark.slow
def test_a_node_that_joins_in_mid_job_takes_work(
    nodes: Nodes, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    nodes.add(num_cpus=1)
    source = photos(tmp_path / "source", 8, wait=range(8))
    driver = start(source, tmp_path / "archive")
    (first,) = wait_for(lambda: waiting(nodes.marks), driver)
    joined = nodes.add(num_cpus=1)
    both = wait_for(lambda: len(found := waiting(nodes.marks)) == 2 and found, driver)
    (second,) = set(both) - {first}
    assert nodes.of_worker(second) is joined
    (nodes.marks / "go").touch()
    finish(driver)
    assert len(vaestream.open(str(tmp_path / "archive"))) == 8


@pytest.mark.slow
def test_cpus_and_gpus_work_on_one_job(
    nodes: Nodes, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (nodes.marks / "fake-gpus").touch()
    on_gpu = nodes.add(num_cpus=1, num_gpus=1)
    on_cpu = nodes.add(num_cpus=1)
    source = photos(tmp_path / "source", 6, wait=[0, 5])
    driver = start(source, tmp_path / "archive")
    workers = wait_for(lambda: len(found := waiting(nodes.marks)) == 2 and found, driver)
    found = {str(nodes.of_worker(pid).node_id): pid for pid in workers}
    assert (nodes.marks / f"cuda-{found[str(on_gpu.node_id)]}").exists()
    assert (nodes.marks / f"cpu-{found[str(on_cpu.node_id)]}").exists()
    (nodes.marks / "go").touch()
    finish(driver)
    assert verify(str(tmp_path / "archive")) == []
    assert len(vaestream.open(str(tmp_path / "archive"))) == 6


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [0, 1])
def test_a_stopped_driver_leaves_the_cluster_and_its_parts(
    nodes: Nodes,
    start: Callable[..., subprocess.Popen[str]],
    in_peace: Callable[[Path, Path], None],
    tmp_path: Path,
    gpus: int,
) -> None:
    (nodes.marks / "fake-gpus").touch()
    nodes.add(num_cpus=1 + gpus, num_gpus=gpus)
    source = photos(tmp_path / "source", 4, wait=[2])
    archive = tmp_path / "archive"
    driver = start(source, archive, "--gpus-per-worker", "1")
    # With a GPU one pool comes from the first photo and one from the last: all but one are done.
    wait_for(lambda: len(list(archive.glob("part-*"))) == 2 + gpus, driver)
    stopped = wait_for(lambda: len(found := waiting(nodes.marks)) == 1 + gpus and found, driver)
    driver.send_signal(signal.SIGINT)
    _, told = driver.communicate(timeout=300)
    assert driver.returncode == 130
    # Not always the last: Ray may have a word about an object whose owner it has lost.
    assert "vaestream: stopped; run the same command again to go on" in told.splitlines()
    assert "Traceback" not in told
    for pid in stopped:
        wait_for(partial(ended, pid))
    kept = files(archive)
    assert not [name for name in kept if "drivers" in name or "manifest" in name]
    (nodes.marks / "go").touch()
    assert "3/3" not in finish(start(source, archive))
    in_peace(source, tmp_path / "peaceful")
    assert files(archive) == files(tmp_path / "peaceful")
