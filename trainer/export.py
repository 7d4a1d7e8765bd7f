"""Export: a student as an ordinary ``transformers`` folder that ``AutoModel.from_pretrained`` loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from sharding.files import new_folder

_ENCODER = "encoder."  # prefix of the encoder in a ``Student``; the projections stay behind


def export(folder: Path, encoder: PreTrainedModel, weights: Mapping[str, Tensor], tokenizer: Any) -> Path:
    """Write weights (safetensors, float32), config and tokenizer; the folder appears when it is complete.

    An architecture with a pooler gets one, freshly initialised from a fixed seed, so that loading is silent
    and repeatable; general distillation does not train it, fine-tuning does.

    Args:
        folder: replaced when it exists.
        encoder: of the student; its config and its head, if it has one, count.
        weights: float32, by the names of a ``trainer.models.Student``.
        tokenizer: the teacher's.

    Raises:
        OSError: the disk is full or fails; a folder that was there before is still there.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = encoder.config
        if encoder.base_model is encoder:
            model = AutoModel.from_config(config, dtype=torch.float32)
        else:
            model = type(encoder)._from_config(config, dtype=torch.float32)
    own = {name.removeprefix(_ENCODER): value for name, value in weights.items() if name.startswith(_ENCODER)}
    missing, unexpected = model.load_state_dict(own, strict=False)
    untied = [name for name in missing if name not in model.all_tied_weights_keys]
    assert not unexpected and all("pooler" in name for name in untied), (missing, unexpected)
    with new_folder(folder) as partial:
        try:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        except SafetensorError as error:  # so comes a full disk
            raise OSError(f"{folder} cannot be written: {error}") from error
    return folder
