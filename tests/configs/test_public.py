"""What may be shown: secrets go, everything else stays as it is."""

import subprocess
import sys

import pytest

from configs.public import public, public_values

ENVIRONMENT = {
    "HF_TOKEN": "hf_abcdefgh",
    "AWS_SECRET_ACCESS_KEY": "wJalr/XUtn+FEMI",
    "MLFLOW_TRACKING_PASSWORD": "correct horse",
    "LONGER_KEY": "hf_abcdefgh-and-more",
    "TOKENIZER_PATH": "/models/tokenizer",
    "SHORT_KEY": "run",
    "HOME": "/home/somebody",
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tracking.uri=https://me:pa%40ss@host:5000/x", "tracking.uri=https://host:5000/x"),
        ("postgresql+psycopg://u:p@ss@db/mlflow?sslmode=on", "postgresql+psycopg://db/mlflow?sslmode=on"),
        ("git clone https://ghp_123@github.com/a/b.git", "git clone https://github.com/a/b.git"),
        ("mysql://db/x?user=me&password=hunter2&charset=u", "mysql://db/x?user=me&password=***&charset=u"),
        ("https://b/x.tar?X-Amz-Signature=ab12&b=1", "https://b/x.tar?X-Amz-Signature=***&b=1"),
        ("a hf_abcdefgh, b hf_abcdefgh-and-more", "a ***, b ***"),
        ("key: wJalr/XUtn+FEMI; correct horse", "key: ***; ***"),
    ],
)
def test_secrets_go(text: str, shown: str) -> None:
    assert public(text, ENVIRONMENT) == shown


@pytest.mark.parametrize(
    "text",
    [
        "/models/tokenizer run /home/somebody",
        "s3://bucket/a@b.tar, https://host/path?a=1#b@c, mail a@b.c",
        '{"uri": "https://host", "mail": "a@b.c"}',
        "sqlite:////folder/mlflow.db",
        "keys=3 monkey=4 ?tokens=1",
    ],
)
def test_everything_else_stays(text: str) -> None:
    assert public(text, ENVIRONMENT) == text


def test_trees_keep_their_shape_and_types() -> None:
    tree = {"a": [1, 2.5, None, True, {"uri": "http://u:p@h"}], "b": "x"}
    assert public_values(tree) == {"a": [1, 2.5, None, True, {"uri": "http://h"}], "b": "x"}


LOGS = """
import logging
from configs.public import log_publicly
log_publicly(logging.INFO)
logging.info("to %s", "http://me:swordfish@host")
try:
    raise ValueError("http://me:swordfish@host")
except ValueError:
    logging.exception("it failed")
raise OSError("http://me:swordfish@host at last")
"""


def test_log_lines_and_tracebacks_show_none() -> None:
    done = subprocess.run([sys.executable, "-c", LOGS], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "swordfish" not in done.stderr and done.stderr.count("http://host") == 3
    assert "INFO root: to http://host\n" in done.stderr
    assert done.stderr.endswith("OSError: http://host at last\n")
