"""Task distillation's stages: what is wrong with a ``TaskConfig``, and the ``RunConfig`` of each stage."""

from configs.task_schema import TaskConfig


def check_task(config: TaskConfig) -> list[str]:
    """Return every problem of a task's config, each with key, value, rule and way out."""
    return []
