"""The Dockerfile, read: what can be checked without building it (``make image`` does that)."""

import re
from pathlib import Path

from setuptools import find_packages

from tests.image import ARGUMENTS, ROOT, host_pip

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_what_the_build_sets_can_be_set() -> None:
    declared = set(re.findall(r"^ARG (\w+)=", DOCKERFILE, re.MULTILINE))
    assert ARGUMENTS.keys() <= declared
    used = set(re.findall(r"\$\{(\w+)", DOCKERFILE)) - {"PATH", "holder"}
    assert used <= declared


def test_the_context_holds_what_is_copied_and_installed_and_nothing_else() -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    assert "*" in rules and all((ROOT / name).exists() for name in kept)
    packages = {name for name in find_packages(str(ROOT)) if "." not in name}
    assert packages - {"tests", "benchmarks"} <= kept
    assert not kept & {".git", "tests", "benchmarks", ".demo", ".venv"}


def test_the_container_is_not_root_and_has_an_init() -> None:
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE) == ["${UID}"]
    assert DOCKERFILE.index("USER ${UID}") < DOCKERFILE.index("COPY")
    assert re.search(r'^ENTRYPOINT \["tini"', DOCKERFILE, re.MULTILINE)


def test_pip_settings_of_the_host_name_what_they_need(tmp_path: Path, monkeypatch) -> None:
    wheels, index = tmp_path / "wheels", tmp_path / "index/simple"
    for folder in (wheels, index):
        folder.mkdir(parents=True)
    (tmp_path / "pip.conf").write_text(f"[global]\nfind-links = {wheels}\nextra-index-url = file://{index}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    settings, paths = host_pip()
    assert f"find-links = {wheels}\n" in settings and f"extra-index-url = file://{index}\n" in settings
    assert {str(wheels), str(index.parent)} <= {*paths}
