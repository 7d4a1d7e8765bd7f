"""Runs that read their corpus from servers: the weights are those from a disk, and failures are clear."""

from pathlib import Path
from typing import Any

import pytest

from sharding.manifest import open_corpus
from tests.launcher.conftest import Launch
from tests.launcher.test_general import assert_equal, final_weights
from tests.sharding.servers import nginx, s3

pytestmark = pytest.mark.network_of_ranks


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one of the standard places; the server takes any."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-printed")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def test_a_run_reads_from_s3_what_it_reads_from_disk(
    run_config: dict[str, Any],
    general: Launch,
    tiny_corpus: Path,
    tmp_path: Path,
    credentials: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Begun on the server, gone on with from disk: it is the same corpus wherever it lies."""
    run_config["students"][0]["optimizer"]["decay"] = "constant"
    local, remote = str(tmp_path / "local"), str(tmp_path / "remote")
    assert general(run_config, f"output={local}", ranks=2, by="torchrun").returncode == 0
    with s3(tiny_corpus.parent, "corpora") as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        cache = tmp_path / "cache"
        overrides = [f"data.corpus=s3://corpora/{tiny_corpus.name}", f"data.cache.folder={cache}"]
        done = general(run_config, f"output={remote}", "train.steps=4", *overrides, ranks=2, by="torchrun")
        assert done.returncode == 0, done.stderr
    assert f"corpus s3://corpora/{tiny_corpus.name}: " in done.stderr
    assert "not-to-be-printed" not in done.stderr + done.stdout
    assert "not-to-be-printed" not in "".join(
        path.read_text() for path in Path(remote).rglob("*") if path.suffix in (".yaml", ".json", ".diff")
    )
    shards = {shard.sha256 for shard in open_corpus(tiny_corpus).split("train").shards}
    assert {path.name.split("-")[0] for path in cache.iterdir()} & shards, "nothing was cached"

    done = general(run_config, f"output={remote}", ranks=2, by="torchrun")
    assert done.returncode == 0 and "resumed at step 4" in done.stderr
    assert_equal(final_weights(remote), final_weights(local))


def test_a_mixture_of_a_disk_and_a_web_server(
    run_config: dict[str, Any], general: Launch, tiny_corpus: Path, tmp_path: Path
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    with nginx(tiny_corpus.parent, served) as port:
        url = f"http://127.0.0.1:{port}/{tiny_corpus.name}"
        corpora = [{"corpus": str(tiny_corpus), "name": "disk"}, {"corpus": url, "name": "web"}]
        run_config["data"] = {"mixture": corpora, "cache": {"folder": str(tmp_path / "cache")}}
        done = general(run_config)
        assert done.returncode == 0, done.stderr
        assert "disk " in done.stderr and "web " in done.stderr

        run_config["data"] = {"corpus": f"{url}/nothing"}
        done = general(run_config)
        assert done.returncode == 2 and f"{url}/nothing/manifest.json does not exist" in done.stderr
        run_config["data"] = {"corpus": url.replace("http://", "http://me:secret@")}
        done = general(run_config)
        assert done.returncode == 2 and "a corpus's URL holds no user, password" in done.stderr
        assert "secret" not in done.stderr
