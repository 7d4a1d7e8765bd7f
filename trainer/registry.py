"""The MLflow model registry: an exported folder as a version of a registered model, and back.

A version is an MLflow model of the flavour ``transformers``: weights as safetensors, tokenizer and card, and
beside the weights the ONNX files. No part of it is a pickle, and nothing is asked of the hub.
"""

import importlib.metadata
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import mlflow.artifacts
import mlflow.transformers
from huggingface_hub import ModelCard
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from transformers import AutoTokenizer, PreTrainedModel

from configs.public import public
from trainer.served import load_served
from trainer.tracking import Run
from trainer.tracking_store import TrackingError

ARTIFACTS = "model"
CARD = "README.md"
REQUIREMENTS = ("torch", "transformers", "safetensors")


def register(
    run: Run, name: str, folder: Path, pipeline: str, tags: Mapping[str, str], description: str = ""
) -> str:
    """Store an exported folder as artifacts of ``run`` and register it; return its ``models:/NAME/VERSION``.

    Unlike what a run logs, this waits for the store.

    Args:
        run: open; the version links to it.
        name: of the registered model, made when it is new.
        folder: with config, safetensors, tokenizer and model card.
        pipeline: what ``transformers.pipeline`` calls the model's use, ``text-classification``.
        tags: of the version.
        description: of the version, Markdown.

    Raises:
        TrackingError: the store did not take it.
    """
    run_id = run.opened()
    client = MlflowClient(run.uri, registry_uri=run.uri)
    with tempfile.TemporaryDirectory() as temporary:
        saved = Path(temporary) / ARTIFACTS
        path = str(folder.resolve())  # no hub name, so that MLflow looks none up
        mlflow.transformers.save_model(
            {
                "model": load_served(path),
                "tokenizer": AutoTokenizer.from_pretrained(path, trust_remote_code=False),
            },
            saved,
            task=pipeline,
            model_card=ModelCard.load(folder / CARD),
            pip_requirements=[f"{package}=={_release(package)}" for package in REQUIREMENTS],
        )
        (saved / "LICENSE.txt").unlink(missing_ok=True)  # advice to look for one on the hub
        for file in folder.glob("*.onnx"):
            shutil.copy(file, saved / ARTIFACTS)
        try:
            client.log_artifacts(run_id, str(saved), ARTIFACTS)
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                    raise
            version = client.create_model_version(
                name,
                f"{client.get_run(run_id).info.artifact_uri}/{ARTIFACTS}",
                run_id,
                tags={key: public(value) for key, value in tags.items()},
                description=public(description),
            )
        except Exception as error:  # every store fails in its own way
            happened = public(str(error)).rstrip(".")
            raise TrackingError(
                f"model {name} could not be registered in {public(run.uri)}: {happened}. {folder} is "
                "complete: register it later with the same command, or leave it out (--no-registry)"
            ) from error
    return f"models:/{name}/{version.version}"


def load_registered(uri: str, model: str) -> PreTrainedModel:
    """Return a registered model as MLflow's own loader makes it, in evaluation mode.

    Args:
        uri: of the tracking store.
        model: ``models:/NAME/VERSION``.
    """
    client = MlflowClient(uri, registry_uri=uri)
    # MLflow finds ``models:/...`` in the store of the process alone; an artifact's own place, in any.
    source = client.get_model_version_download_uri(*model.removeprefix("models:/").split("/"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = mlflow.artifacts.download_artifacts(source, dst_path=temporary, tracking_uri=uri)
        components = mlflow.transformers.load_model(folder, return_type="components")
    loaded: PreTrainedModel = components["model"]
    return loaded.eval()


def _release(package: str) -> str:
    return importlib.metadata.version(package).partition("+")[0]  # 2.13.0+cpu: of that build, on no registry
