"""`prepare.py --engine ray` on two local nodes gives the local index though a worker and a node are killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from safetensors.torch import save_file

from ldm.data.preparing.preparation import Preparation
from ldm.data.shards import PreparedSet
from ldm.errors import UserError
from ldm.video import write_mp4
from tests.data.preparing.test_prepare import prepare
from tests.made_clips import SETTINGS, the_set
from tests.made_footage import draw_drive, write_truncated
from tests.tiny_checkpoint import config_for, image_state

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")
ray_workers = pytest.importorskip("ldm.data.preparing.ray")
RayActorError, OwnerDiedError, RayTaskError = (
    getattr(ray.exceptions, name) for name in ("RayActorError", "OwnerDiedError", "RayTaskError")
)

MEMORY = 80 * 2**20  # bytes of each node's object store


def write_footage(folder: Path, num_videos: int) -> Path:
    """Videos of about a second; the third one is truncated."""
    folder.mkdir()
    for number in range(num_videos):
        path = folder / f"v{number:02d}.mp4"
        if number == 2:
            write_truncated(path)
        else:
            write_mp4(path, draw_drive(8 + number % 5, 64, number), fps=10)
    return folder


def write_config(folder: Path) -> Path:
    save_file(image_state(), folder / "image.safetensors")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**config_for(folder / "image.safetensors"), "prepare": {"fps": 5, "size": 64}}))
    return path


def worker_processes() -> list[int]:
    """Process ids of this test's Ray workers that prepare a video now."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
            is_ours = f"RAY_TEST_MARK={os.getpid()}".encode() in path.with_name("environ").read_bytes()
        except OSError:
            continue
        if command.startswith(b"ray::VideoWorker") and is_ours:
            found.append(int(path.parent.name))
    return found


class Saboteur(threading.Thread):
    """Kills a worker after `after[0]` finished videos and the second node after `after[1]`."""

    def __init__(self, out: Path, cluster, node, after: tuple[int, int]) -> None:
        super().__init__(daemon=True)
        self.out, self.cluster, self.node, self.after = out, cluster, node, after
        self.done: list[str] = []

    def run(self) -> None:
        deadline = time.monotonic() + 540
        while time.monotonic() < deadline and len(self.done) < 2:
            num_parts = len(list((self.out / ".unfinished").glob("*.tar")))
            if not self.done and num_parts >= self.after[0] and (found := worker_processes()):
                os.kill(found[0], signal.SIGKILL)
                self.done.append("worker")
            elif self.done and num_parts >= self.after[1]:
                self.cluster.remove_node(self.node, allow_graceful=False)
                self.done.append("node")
            time.sleep(0.02)


def show(folder: Path, num_videos: int, after: tuple[int, int], capsys) -> dict[str, float]:
    """Prepare with a worker and a node killed on the way, then again; returns the seconds of each part."""
    footage, config, seconds = write_footage(folder / "footage", num_videos), write_config(folder), {}
    words = [str(footage), "--config", str(config), "--prompt", "a drive"]
    begin = time.monotonic()
    prepare.main([*words, "--out", str(folder / "here")])
    seconds["local"] = time.monotonic() - begin
    os.environ["RAY_TEST_MARK"] = str(os.getpid())
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = cluster_utils.Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": MEMORY, "include_dashboard": False},
    )
    try:
        node = cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        saboteur = Saboteur(folder / "there", cluster, node, after)
        saboteur.start()
        begin = time.monotonic()
        prepare.main([*words, "--out", str(folder / "there"), "--engine", "ray", "--address", cluster.address])
        seconds["ray"] = time.monotonic() - begin
        saboteur.join(60)
        assert saboteur.done == ["worker", "node"]
        capsys.readouterr()
        begin = time.process_time()  # CPU time: other work on this machine does not count
        prepare.main([*words, "--out", str(folder / "there"), "--engine", "ray", "--address", cluster.address])
        seconds["again"] = time.process_time() - begin
    finally:
        if ray.is_initialized():
            ray.shutdown()
        cluster.shutdown()
        del os.environ["RAY_TEST_MARK"]
    return seconds


@pytest.mark.slow
@pytest.mark.timeout(600)  # three workers import torch on a busy machine
def test_a_worker_and_a_node_are_killed_and_the_index_is_the_local_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    seconds = show(tmp_path, 10, (2, 4), capsys)
    again = capsys.readouterr().out
    assert the_set(tmp_path / "there") == the_set(tmp_path / "here")
    prepared = PreparedSet(tmp_path / "there", verify=True)
    assert prepared.info.num_videos == 9
    broken = [json.loads(line) for line in (tmp_path / "there" / "broken.jsonl").read_text().splitlines()]
    assert [entry["source"] for entry in broken] == ["v02.mp4"] and "corrupted or truncated" in broken[0]["reason"]
    assert "Videos: 0 prepared, 9 done before, 1 dropped." in again
    assert "an earlier run found this; --retry-broken tries again" in again
    assert seconds["again"] < 5


def test_invalid_options_for_many_machines(tmp_path):
    words = ["v", "--out", str(tmp_path), "--config", "c.yaml"]
    for more, message in [
        (["--engine", "ray", "--shard", "1/2"], "--shard requires the local engine; omit --engine ray"),
        (["--world", "3", "--engine", "ray", "--processes", "2"], "--processes requires the local engine"),
        (["--address", "auto"], "--address requires --engine ray"),
        (["--worker-cpus", "2"], "--worker-cpus requires --engine ray"),
        (["--engine", "ray", "--worker-cpus", "0"], "--worker-cpus: expected at least 1, found 0"),
    ]:
        start = words[1:] if "--world" in more else words
        with pytest.raises(UserError, match=message):
            prepare.parse_arguments([*start, *more])


# ---- failures of a cluster, by a fake one


class FakeRay:
    """Replaces the package: actors return or raise at once what `act(number of the actor, method, argument)` does."""

    def __init__(self, act, nodes):
        self.act, self.found, self.started, self.killed = act, nodes, [], []

    def is_initialized(self):
        return True

    def nodes(self):
        return self.found

    def remote(self, kind):
        return self

    def options(self, **options):
        self.started.append(options)
        number = len(self.started)
        call = lambda method: SimpleNamespace(remote=lambda *words: partial(self.act, number, method, *words))  # noqa: E731
        actor = SimpleNamespace(number=number, **{name: call(name) for name in ("begin", "check_captions", "prepare")})
        return SimpleNamespace(remote=lambda work: actor)

    def wait(self, refs, timeout):
        return refs[:1], refs[1:]

    def get(self, ref):
        return ref() if callable(ref) else ref

    def kill(self, actor):
        self.killed.append(actor.number)


HERE = {"NodeID": "here", "Alive": True, "Resources": {"CPU": 4}}
GPUS = {"NodeID": "gpus", "Alive": True, "Resources": {"CPU": 4, "GPU": 2}}


def part_of(source) -> ray_workers.RemotePart:
    video = {"source": source.name, "sha256": source.sha256, "captions": [], "num_scenes": 0, "num_frames": 0}
    return ray_workers.RemotePart(json.dumps({"video": {**video, "dropped": []}, "scenes": []}), [b"ta", b"r"])


@pytest.fixture
def played(monkeypatch, tmp_path):
    """`played(act, nodes)` -> (report, reason) of three videos, the `FakeRay` and the preparation."""
    monkeypatch.setattr(ray_workers, "POLL_SECONDS", 0.01)

    def run(act, nodes=(HERE,)):
        stage = FakeRay(act, list(nodes))
        monkeypatch.setattr(ray_workers, "ray", stage)
        preparation = Preparation(tmp_path / "out", SETTINGS)
        pool = ray_workers.WorkerPool(ray_workers.WorkerOptions({}, SETTINGS, False, 2))
        sources = [SimpleNamespace(name=f"v{number}", sha256=str(number) * 64) for number in range(3)]
        found = {source.name: (report, why) for source, report, why in pool.prepare(sources, preparation)}
        pool.close()
        return found, stage, preparation

    return run


def acting(prepare_video):
    return lambda number, method, *words: "here" if method == "begin" else prepare_video(number, *words)


def test_one_worker_per_gpu_or_per_num_cpus(played):
    _, stage, preparation = played(acting(lambda number, source: part_of(source)))
    assert stage.started == [{"num_cpus": 2, "num_gpus": 0, "max_restarts": 0, "scheduling_strategy": "SPREAD"}] * 2
    assert sorted(preparation.reports) == ["0" * 64, "1" * 64, "2" * 64]
    assert (preparation.work / f"{'0' * 64}.tar").read_bytes() == b"tar"
    assert sorted(stage.killed) == [1, 2]
    preparation.leave()
    _, stage, _ = played(acting(lambda number, source: part_of(source)), (HERE, GPUS))
    assert [options["num_gpus"] for options in stage.started] == [1, 1]


def test_only_a_video_that_kills_three_workers_is_given_up(played):
    def prepare_video(number, source):
        if source.name == "v1":
            raise RayActorError(None, "The actor is dead because its worker process has died.")
        return part_of(source)

    found, stage, preparation = played(acting(prepare_video))
    assert found["v1"][0] is None and "its worker died 3 times; it may crash ffmpeg" in found["v1"][1]
    assert found["v0"][0] is not None and found["v2"][0] is not None
    assert len(stage.started) == 3
    assert "1" * 64 not in preparation.reports


def test_losing_a_node_is_not_a_failure_of_its_videos(played):
    left = [10]

    def prepare_video(number, source):
        left[0] -= 1
        if left[0] >= 0:
            raise RayActorError(None, "The actor died because its node has died. Node Id: 5e")
        return part_of(source)

    found, _, _ = played(acting(prepare_video))
    assert all(report is not None for report, _ in found.values())


def test_lost_parts_are_prepared_again(played):
    left = [2]

    def lost():
        left[0] -= 1
        if left[0] >= 0:
            raise OwnerDiedError("0" * 56, None, "")
        return b"found"

    found, _, _ = played(acting(lambda number, source: ray_workers.RemotePart(part_of(source).note, [lost])))
    assert all(report is not None for report, _ in found.values())


def test_an_error_in_a_worker_is_reported_after_three_tries(played):
    def prepare_video(number, source):
        if source.name == "v2":
            raise RayTaskError("prepare", "trace", ValueError("CUDA is upset"))
        return part_of(source)

    found, _, _ = played(acting(prepare_video))
    assert found["v2"] == (None, "preparing it failed 3 times, the last time with: ValueError: CUDA is upset")


def test_broken_footage_is_reported(played):
    found, _, _ = played(acting(lambda number, source: f"{source.name}: cut short"))
    assert found["v0"] == (None, "v0: cut short")


def test_workers_with_other_weights(played):
    def refusing(number, method, *words):
        raise RayTaskError("begin", "trace", UserError("the encoders' weights on the node 10.0.0.2 are not those"))

    with pytest.raises(UserError, match=r"--engine ray: the encoders' weights on the node 10.0.0.2 are not those"):
        played(refusing)


def test_workers_that_die_at_once(played):
    def dying(number, method, *words):
        raise RayActorError(None, "worker process has died.")

    with pytest.raises(UserError, match="no worker can start, the last of 3 ended with: RayActorError: worker process"):
        played(dying)


def test_a_cluster_without_room(played, monkeypatch):
    monkeypatch.setattr(ray_workers, "GIVE_UP_AFTER", 0.05)
    small = {"NodeID": "small", "Alive": True, "Resources": {"CPU": 1}}
    gone = {"NodeID": "gone", "Alive": False, "Resources": {"CPU": 64}}
    message = "expected a worker within 0 s, found none; the cluster has 0 GPUs and 1 CPUs, a worker asks for 2 CPUs"
    with pytest.raises(UserError, match=message):
        played(acting(lambda number, source: part_of(source)), (small, gone))


def test_an_address_without_a_cluster():
    with pytest.raises(UserError, match=r"--address nowhere:x: expected a Ray cluster there, as host:port, found none"):
        ray_workers.WorkerPool(ray_workers.WorkerOptions({}, SETTINGS, False, 1), "nowhere:x")


def test_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ldm.data.preparing.ray", raising=False)
    with pytest.raises(UserError, match=r'--engine ray: the package ray is missing; pip install -e ".\[ray\]"'):
        prepare.import_ray_workers()
