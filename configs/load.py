"""Defaults < YAML < command line, merged into the schema; every problem is reported at once.

OmegaConf does the typing (structured configs), but stops at the first error. A person with five typing
errors should see five, so the merge here walks the user's tree leaf by leaf and collects them.
"""

import difflib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.corpus_schema import CorpusConfig
from configs.evaluate_schema import EvaluateConfig
from configs.public import public_values
from configs.schema import RunConfig
from configs.sweep_schema import SweepConfig
from configs.task import check_task
from configs.task_schema import TaskConfig
from configs.validate import check_corpus, check_evaluate, check_run

Config = TypeVar("Config", RunConfig, CorpusConfig, TaskConfig, EvaluateConfig, SweepConfig)


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one problem a line."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(f"  - {line}" for line in problems))


def load_config(schema: type[Config], path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Return the resolved config: the schema's defaults, then the YAML at ``path``, then ``key=value``.

    Args:
        schema: ``RunConfig``, ``CorpusConfig``, ``TaskConfig``, ``EvaluateConfig`` or ``SweepConfig``.
        path: YAML file, or None for defaults and overrides alone.
        overrides: ``section.key=value``, the value read as YAML; list items by index,
            ``students.0.optimizer.lr=3e-4``.

    Raises:
        ConfigError: unknown keys, wrong types, missing values and impossible combinations, together.
    """
    problems: list[str] = []
    user = _read_yaml(path, problems) if path is not None else {}
    for override in overrides:
        _apply_override(user, override, problems)

    _register_resolvers()
    try:
        user = OmegaConf.to_container(OmegaConf.create(user), resolve=True)  # type: ignore[assignment]
    except (OmegaConfBaseException, FileNotFoundError) as error:
        problems.append(_first_line(error).rpartition("interpolation: ")[2])

    return from_dict(schema, user, problems)


def from_dict(schema: type[Config], tree: Any, problems: Sequence[str] = ()) -> Config:
    """Return the config of a tree of plain values, such as ``to_dict`` makes; what it lacks has its default.

    Raises:
        ConfigError: what is wrong with it, together with the ``problems`` that are known already.
    """
    problems = list(problems)
    _require_known_and_typed(schema, tree, "", problems)
    if problems:
        raise ConfigError(problems)
    config: Config = OmegaConf.to_object(OmegaConf.merge(_structured(schema), tree))  # type: ignore[assignment]
    problems = _check(config)
    if problems:
        raise ConfigError(problems)
    return config


def _check(config: RunConfig | CorpusConfig | TaskConfig | EvaluateConfig | SweepConfig) -> list[str]:
    if isinstance(config, SweepConfig):
        return []  # ``configs.sweep`` checks it together with the configs of its trials
    if isinstance(config, TaskConfig):
        return check_task(config)
    if isinstance(config, EvaluateConfig):
        return check_evaluate(config)
    return check_run(config) if isinstance(config, RunConfig) else check_corpus(config)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the config as plain YAML-ready values (enums by name), without secrets (``configs.public``)."""
    container = public_values(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))
    assert isinstance(container, dict)
    return container


def to_yaml(config: Any) -> str:
    """Return the config as YAML that ``load_config`` reads back to an equal config, but for secrets."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _read_yaml(path: str | Path, problems: list[str]) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError([f"config file {path} does not exist; configs/ holds ones to start from"]) from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError([f"config file {path} cannot be read as YAML: {error}"]) from error
    if not isinstance(loaded, DictConfig):
        problems.append(f"config file {path} holds a list; a config is a mapping of keys to values")
        return {}
    return OmegaConf.to_container(loaded, resolve=False)  # type: ignore[return-value]


def _apply_override(user: dict[str, Any], override: str, problems: list[str]) -> None:
    """Set one ``section.key=value`` in the user's tree; numbers in the path index lists."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(f"argument {override!r} is not of the form section.key=value")
        return
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problems.append(f"{override}: the value cannot be read as YAML: {_first_line(error)}")
        return
    node: Any = user
    path = key.split(".")
    for depth, name in enumerate(path):
        here = ".".join(path[:depth])
        if isinstance(node, list) and not (name.isdigit() and int(name) < len(node)):
            problems.append(f"{override}: {here} has {len(node)} items, numbered from 0; {name!r} is not one")
            return
        if not isinstance(node, list | dict):
            problems.append(f"{override}: {here}={node!r} is a value, it has no keys below it")
            return
        index: Any = int(name) if isinstance(node, list) else name
        if depth == len(path) - 1:
            node[index] = value
        else:
            if isinstance(node, dict) and node.get(index) is None:
                node[index] = {}
            node = node[index]


def _require_known_and_typed(schema: Any, user: Any, prefix: str, problems: list[str]) -> None:
    """Collect unknown keys, wrong types and missing values of ``user`` against a dataclass."""
    if not isinstance(user, Mapping):
        problems.append(f"{prefix or 'config'}={user!r} is not a mapping of keys to values")
        return
    hints = get_type_hints(schema)
    for key in user:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {_join(prefix, close[0])}?" if close else f"known here: {', '.join(hints)}"
            problems.append(f"unknown key {_join(prefix, key)}; {hint}")
    for entry in fields(schema):
        name, hint = _join(prefix, entry.name), hints[entry.name]
        item = get_args(hint)[0] if get_origin(hint) is list else None
        value = user.get(entry.name)
        if is_dataclass(hint):
            _require_known_and_typed(hint, user.get(entry.name, {}), name, problems)
        elif item is not None and is_dataclass(item):
            if value or entry.default_factory is not list:  # which may be empty
                _require_items(item, value, name, problems)
        elif entry.name not in user or value == MISSING:
            if value == MISSING or OmegaConf.is_missing(_structured(schema), entry.name):
                problems.append(f"{name} is missing; set it in the YAML or as {name}=...")
        else:
            try:
                OmegaConf.merge(_structured(schema), {entry.name: value})
            except OmegaConfBaseException as error:
                problems.append(f"{name}={value!r}: {_first_line(error)}")


def _require_items(item: Any, value: Any, name: str, problems: list[str]) -> None:
    if not isinstance(value, list) or not value:
        problems.append(f"{name} must be a list with at least one entry, not {value!r}")
        return
    for index, entry in enumerate(value):
        _require_known_and_typed(item, entry, f"{name}.{index}", problems)


def _structured(schema: Any) -> DictConfig:
    return OmegaConf.structured(schema)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else str(name)


def _first_line(error: Exception) -> str:
    lines: Iterator[str] = iter(str(error).splitlines())
    return next(lines, type(error).__name__).strip()


def _package_file(package: str, relative: str = "") -> str:
    """Return the path of a file that an installed package ships, without importing the package."""
    if "." in package:  # to find a part, Python imports the whole, and a config must execute nothing
        raise FileNotFoundError(
            f"${{package:{package}}}: {package} is no package but a part of one; name the package, then the "
            f"path in it: ${{package:{package.replace('.', ',', 1).replace('.', '/')}}}"
        )
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"${{package:{package}}}: package {package} is not installed; pip install it")
    path = Path(next(iter(spec.submodule_search_locations)), relative)
    if not path.exists():
        raise FileNotFoundError(f"${{package:{package},{relative}}}: {path} does not exist in the package")
    return str(path)


def _register_resolvers() -> None:
    """``${package:NAME,relative/path}``: a file of an installed package, such as an embedded teacher."""
    OmegaConf.register_resolver("package", _package_file, replace=True)
    OmegaConf.clear_resolver("oc.coerce")  # it imports what it is told to, and a config must execute nothing
