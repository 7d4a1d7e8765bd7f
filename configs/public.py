"""What may be shown and kept: texts without the secrets that URIs and the environment hold.

Everything that a run writes passes through here: its files, checkpoints, terminal lines and what MLflow gets.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

MIN_SECRET_CHARS = 8
"""A shorter value is no secret worth the name, and would be found in innocent words."""
_SECRET_NAME = re.compile(r"(?i)(?:^|_)(?:token|password|passwd|secret|apikey|key)(?:_|$)")
_USER_OF_URI = re.compile(r'(\w://)[^/\s"?#]*@')
_SECRET_OF_QUERY = re.compile(r'(?i)([?&][\w.-]*(?:token|password|passwd|secret|key|sig|signature)=)[^&\s"]+')


def public(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return ``text`` without secrets.

    Left out are the user and password of a URI (``http://user:password@host``) and what its query names as a
    secret (``?password=...``). The value of every environment variable whose name says that it is one
    (``HF_TOKEN``, ``AWS_SECRET_ACCESS_KEY``, ``MLFLOW_TRACKING_PASSWORD``) becomes ``***``.
    """
    text = _SECRET_OF_QUERY.sub(r"\1***", _USER_OF_URI.sub(r"\1", text))
    secrets = [value for name, value in environment.items() if _SECRET_NAME.search(name)]
    for secret in sorted(secrets, key=len, reverse=True):  # one may be part of another
        if len(secret) >= MIN_SECRET_CHARS:
            text = text.replace(secret, "***")
    return text


def public_values(value: Any) -> Any:
    """Return a tree of mappings and lists with every text in it made public."""
    if isinstance(value, Mapping):
        return {public_values(key): public_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public_values(item) for item in value]
    return public(value) if isinstance(value, str) else value


def log_publicly(level: int, line: str = "%(levelname)s %(name)s: %(message)s") -> None:
    """Log to stderr without secrets, and print so what nobody catches: errors of packages quote much."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(line, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler])
    sys.excepthook = _print_uncaught


class _Formatter(logging.Formatter):
    """Lines without secrets, their tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return public(super().format(record))


def _print_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(
        public("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="", flush=True
    )
