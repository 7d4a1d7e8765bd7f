"""Two hosts with networks of their own: launched over real ssh and pdsh, cut off, different, killed."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import pytest
import yaml

from sharding.manifest import read_manifest
from tests.launcher.conftest import ROOT, Launch, evaluations
from tests.launcher.hosts import Hosts, hosts
from trainer import exits

PORT = "29500"
HOSTS = ("node1", "node2")

MEET = """
import os, sys
from configs.schema import TimeoutConfig
from trainer import exits, meeting, world
try:
    meeting.connect(world.find(os.environ), os.environ, TimeoutConfig(start_s=float(sys.argv[1])))
    print("met", os.environ["GLOO_SOCKET_IFNAME"])
except (ValueError, OSError) as error:
    print(type(error).__name__, error)
exits.leave(0)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(tmp_path_factory.mktemp("hosts") / "etc", HOSTS) as found:
        yield found


@pytest.fixture
def deepspeed_over_ssh(pair: Hosts, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start ``deepspeed launcher/general.py`` on node1 for a rank on each host."""
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\n")

    def start(config: dict[str, Any], *overrides: str) -> subprocess.Popen[str]:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(tmp_path / "hosts")]
        script = [str(ROOT / "launcher/general.py"), "--config", str(tmp_path / "config.yaml"), *overrides]
        env = {**os.environ, "DS_ACCELERATOR": "cpu"}
        return pair.start("node1", *deepspeed, "--master_addr", "node1", *script, cwd=tmp_path, env=env)

    return start


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output of a launcher."""
    output, _ = job.communicate(timeout=300)
    return job.returncode, output


def ranks_of(pair: Hosts, host: str) -> list[psutil.Process]:
    """The processes that deepspeed's launcher has started on a host."""
    return pair.processes(host, "--local_rank=0", parent="deepspeed.launcher.launch")


def training(output: str, step: int) -> None:
    """Wait until a run has done a step."""
    deadline = time.monotonic() + 200
    while not (Path(output) / f"checkpoints/step-{step:08d}").is_dir():
        assert time.monotonic() < deadline, "the run does not train"
        time.sleep(0.1)


def meet(pair: Hosts, start_s: float, **changes: dict[str, str]) -> list[str]:
    """Let a rank on each host connect, with changes to its environment by host; what they say."""
    processes = []
    for rank, host in enumerate(HOSTS):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        place |= {"MASTER_ADDR": "node1", "MASTER_PORT": PORT, "DS_ACCELERATOR": "cpu"}
        env = {**os.environ, **place, **changes.get(host, {})}
        command = [sys.executable, "-c", MEET, str(start_s)]
        processes.append(pair.start(host, *command, env={**env, "PYTHONPATH": str(ROOT)}))
    return [process.communicate(timeout=120)[0] for process in processes]


def test_deepspeed_over_ssh_trains_what_two_ranks_on_one_host_train(
    deepspeed_over_ssh, run_config: dict[str, Any], general: Launch, tmp_path: Path
) -> None:
    """Held-out losses and exported weights are bitwise the same."""
    code, output = ended(deepspeed_over_ssh(run_config))
    assert code == exits.DONE, output
    alone = {**run_config, "output": str(tmp_path / "alone")}
    assert general(alone, ranks=2, by="deepspeed").returncode == 0
    assert evaluations(run_config["output"]) == evaluations(alone["output"])
    weights = "export/small/model.safetensors"
    assert Path(run_config["output"], weights).read_bytes() == Path(alone["output"], weights).read_bytes()
    events = [json.loads(line) for line in Path(run_config["output"], "events.jsonl").open()]
    assert events[0]["event"] == "started" and "finished" in [event["event"] for event in events]


def test_torchrun_meets_over_two_hosts(pair: Hosts, run_config: dict[str, Any], tmp_path: Path) -> None:
    """One torchrun on each host, which keep the store themselves."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += [
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        f"node1:{PORT}",
        str(ROOT / "launcher/general.py"),
    ]
    command += ["--config", str(tmp_path / "config.yaml"), "train.steps=2"]
    jobs = [pair.start(host, *command, env={**os.environ, "DS_ACCELERATOR": "cpu"}) for host in HOSTS]
    outputs = [ended(job) for job in jobs]
    assert [code for code, _ in outputs] == [0, 0], outputs
    assert evaluations(run_config["output"])[-1]["step"] == 2


def test_hosts_that_differ_are_named(
    pair: Hosts, deepspeed_over_ssh, run_config: dict[str, Any], tiny_corpus: Path, tmp_path: Path
) -> None:
    """On node2 a source file, a package and the corpus are others."""
    source = tmp_path / "clock.py"
    source.write_text((ROOT / "trainer/clock.py").read_text() + "\n# another revision\n")
    [packages] = [Path(path).parent for path in deepspeed.__path__]
    [metadata] = packages.glob("deepspeed-*.dist-info/METADATA")
    package = tmp_path / "METADATA"
    package.write_text(re.sub(r"^Version: .*$", "Version: 0.0.1", metadata.read_text(), count=1, flags=re.M))
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, corpus)
    manifest = read_manifest(tiny_corpus).manifest
    other = replace(manifest, source=replace(manifest.source, names=("made elsewhere",)))
    (corpus / "manifest.json").write_text(other.to_json())
    with contextlib.ExitStack() as stack:
        for what, by in ((ROOT / "trainer/clock.py", source), (metadata, package), (tiny_corpus, corpus)):
            stack.enter_context(pair.replaced("node2", what, by))
        code, output = ended(deepspeed_over_ssh(run_config))
    assert code == exits.WRONG, output
    assert re.search(r"- code trainer/clock.py: node1 [0-9a-f]{12}; node2 [0-9a-f]{12}\n", output), output
    assert f"- deepspeed: node1 {deepspeed.__version__.partition('+')[0]}; node2 0.0.1\n" in output
    assert re.search(r"- corpus tiny fingerprint: node1 [0-9a-f]{12}; node2 [0-9a-f]{12}\n", output)
    assert output.count("error:") == 1  # said once
    assert not Path(run_config["output"]).exists()


def test_what_fails_on_one_host_alone_is_said_for_all(
    pair: Hosts, deepspeed_over_ssh, run_config: dict[str, Any], tiny_corpus: Path, tmp_path: Path
) -> None:
    """node2 does not see the corpus; node1 does not wait for it."""
    (tmp_path / "empty").mkdir()
    with pair.replaced("node2", tiny_corpus, tmp_path / "empty"):
        code, output = ended(deepspeed_over_ssh(run_config))
    assert code == exits.WRONG, output
    assert "manifest.json does not exist" in output and "(met by node2 (rank 1))" in output
    assert output.count("error:") == 1


def test_a_blocked_port_is_named(pair: Hosts) -> None:
    """A firewall on node1 drops what comes to the store; each side says what it sees."""
    rules = f"add table inet f; add chain inet f in {{ type filter hook input priority 0; }}; \
        add rule inet f in iifname eth0 tcp dport {PORT} drop"
    pair.run("node1", "nft", rules, check=True)
    try:
        first, second = meet(pair, 12)
    finally:
        pair.run("node1", "nft", "delete table inet f", check=True)
    assert "UnreachableError 1 of 2 ranks came within timeouts.start_s=12 s; missing: ranks 1" in first
    assert "node1 (rank 0): eth0 10.99.0.1" in first
    assert f"UnreachableError rank 1 on node2 has not reached rank 0 at node1:{PORT}" in second
    assert "timed out (node1 is 10.99.0.1 here)" in second and "firewall" in second


def test_a_wrong_interface_is_named(pair: Hosts) -> None:
    """One that is not there, one that leads to the host itself, one that leads nowhere."""
    first, second = meet(pair, 20, node2={"GLOO_SOCKET_IFNAME": "ib0"})
    assert "MeetingError GLOO_SOCKET_IFNAME=ib0 names an interface that node2 does not have" in first
    assert "eth0 10.99.0.2" in first and "(met by node2 (rank 1))" in first and second == ""
    first, second = meet(pair, 20, node2={"GLOO_SOCKET_IFNAME": "lo"})
    assert "MeetingError GLOO_SOCKET_IFNAME=lo leads to node2 itself alone" in first and second == ""
    other = "link add other0 type bridge; address add 10.98.0.{}/24 dev other0; link set other0 up"
    for number, host in enumerate(HOSTS, start=1):
        for command in other.format(number).split("; "):
            pair.run(host, "ip", *command.split(), check=True)
    apart = {"GLOO_SOCKET_IFNAME": "other0"}
    outputs = meet(pair, 3, node1=apart, node2=apart)
    said = next(output for output in outputs if "Error" in output)
    assert "UnreachableError all 2 ranks have met, but cannot reach each other over gloo" in said
    assert "node1 (rank 0): other0 10.98.0.1\n  node2 (rank 1): other0 10.98.0.2\n" in said


def test_a_name_that_leads_to_the_host_itself_does_no_harm(pair: Hosts, tmp_path: Path) -> None:
    """Debian's installer gives a host's own name 127.0.1.1; the others know its address."""
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 node1\n10.99.0.2 node2\n")
    with pair.replaced("node1", Path("/etc/hosts"), tmp_path / "hosts"):
        outputs = meet(pair, 20)
    assert [output.strip() for output in outputs] == ["met eth0", "met eth0"]


def test_an_unknown_name_is_named(pair: Hosts) -> None:
    unknown = {"MASTER_ADDR": "node7"}
    for output in meet(pair, 20, node1=unknown, node2=unknown):
        assert re.match(r"MeetingError MASTER_ADDR=node7 is no host that node[12] knows", output)


def test_a_link_that_goes_down_is_noticed(
    pair: Hosts, deepspeed_over_ssh, run_config: dict[str, Any]
) -> None:
    """Nothing tells either side: both watchdogs end their rank after ``step_s`` and print where it was."""
    job = deepspeed_over_ssh(run_config, "train.steps=100000", "timeouts.step_s=4")
    training(run_config["output"], 2)
    ranks = [rank for host in HOSTS for rank in ranks_of(pair, host)]
    pair.link("node2", up=False)
    try:
        gone_by = time.monotonic() + 60
        while any(process.is_running() for process in ranks) and time.monotonic() < gone_by:
            time.sleep(0.1)
        assert not [process for process in ranks if process.is_running()]
    finally:
        pair.link("node2", up=True)
    code, output = ended(job)
    assert code == exits.LOST, output
    for rank, host in enumerate(HOSTS):
        assert re.search(rf"hung: rank {rank} of 2 \({host}, process \d+\) has not moved for 4 s", output)
    assert output.count(", in _train\n") == 2


def test_a_killed_rank_ends_the_run_on_all_hosts(
    pair: Hosts, deepspeed_over_ssh, run_config: dict[str, Any]
) -> None:
    """The other rank says so and leaves with its code; nothing is left on either host."""
    job = deepspeed_over_ssh(run_config, "train.steps=100000")
    training(run_config["output"], 2)
    [victim] = ranks_of(pair, "node2")
    victim.kill()
    code, output = ended(job)
    assert code not in (exits.DONE, exits.FAILED, exits.WRONG, exits.STOPPED), output
    assert "error: rank 0 (node1) lost contact with another rank" in output
    assert [p for host in HOSTS for p in pair.processes(host, "launcher/general.py")] == []
