"""The method: models, capture, losses, engine, loop, checkpoints, tracking, evaluation, export."""
