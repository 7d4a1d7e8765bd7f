"""The method: models, capture, losses, engine, loop, checkpoints, tracking, evaluation, export."""

import logging
import os

# MLflow reads it on import. A training job calls nobody but the servers that it was given.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# transformers imports torchao where it finds it, whose build for CUDA warns on every machine without.
for chatty in ("torchao", "torch.utils._pytree"):
    logging.getLogger(chatty).setLevel(logging.ERROR)
