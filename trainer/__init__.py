"""The method: models, capture, losses, engine, loop, checkpoints, tracking, evaluation, export."""

import os

# MLflow reads it on import. A training job calls nobody but the servers that it was given.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
