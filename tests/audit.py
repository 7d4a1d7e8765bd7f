"""Which pinned versions have known vulnerabilities, offline: ``make audit ADVISORIES=FOLDER``.

The folder is a clone of github.com/pypa/advisory-database: YAML files in the OSV schema,
``vulns/<package>/<id>.yaml``.
"""

import sys
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


def pins(constraints: Path) -> dict[str, str]:
    """Return the pinned versions by canonical name."""
    lines = constraints.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def affects(advisory: dict[str, Any], version: str) -> bool:
    """Return whether an advisory, unless it was withdrawn, names this version: in its list or in a range."""
    if advisory.get("withdrawn"):
        return False
    return any(
        version in affected.get("versions", ())
        or any(
            _within(entry["events"], Version(version))
            for entry in affected.get("ranges", ())
            if entry["type"] == "ECOSYSTEM"
        )
        for affected in advisory["affected"]
    )


def _within(events: list[dict[str, str]], version: Version) -> bool:
    inside = False
    for event in events:  # in the order of versions
        [(kind, value)] = event.items()
        if kind == "introduced" and (value == "0" or version >= Version(value)):
            inside = True
        elif (
            kind == "fixed"
            and version >= Version(value)
            or kind == "last_affected"
            and version > Version(value)
        ):
            inside = False
    return inside


def main(folder: Path) -> int:
    """Print what is found; return the exit code: 0 nothing, 1 vulnerabilities, 2 this is no database."""
    if not (folder / "vulns").is_dir():
        print(f"{folder} has no folder vulns: give a clone of pypa/advisory-database", file=sys.stderr)
        return 2
    read = found = 0
    for package, version in pins(ROOT / "constraints.txt").items():
        for path in sorted((folder / "vulns" / package).glob("*.yaml")):
            advisory = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)  # versions stay texts
            read += 1
            if affects(advisory, version):
                found += 1
                print(f"{package}=={version}: {path.stem} {advisory['details'].splitlines()[0]}")
    print(f"{read} advisories on pinned packages, {found} on pinned versions")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
