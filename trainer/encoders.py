"""Encoders as ``transformers`` gives them: their configs, tokenizers and weights, without a pooler."""

import hashlib
import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from configs.schema import Precision, TeacherConfig
from sharding.files import sha256
from trainer.capture import Head, enable_capture

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


def load_teacher_config(config: TeacherConfig) -> PreTrainedConfig:
    """Return the teacher's ``transformers`` config.

    Raises:
        ValueError: the folder or hub name cannot be read.
    """
    return read_config("teacher.model", config.model, revision=config.revision)


def load_tokenizer(config: TeacherConfig) -> Any:
    """Return the teacher's fast tokenizer; the students use the same one.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(config.model, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher.model={config.model!r} has no tokenizer to read: {error}") from error


def load_whole_teacher(config: TeacherConfig, head: Head) -> PreTrainedModel:
    """Return all of the teacher on CPU in float32, for students that start from its weights.

    Raises:
        ValueError: the weights cannot be read, some are missing, or the attention cannot be captured.
    """
    teacher = load_encoder(config.model, head=head, revision=config.revision, dtype=torch.float32)
    enable_capture(teacher)
    return teacher


def load_encoder(
    model: str, head: Head = Head.none, new_head: bool = False, **settings: Any
) -> PreTrainedModel:
    """Load an encoder without a pooler, quietly, unless weights are missing.

    Heads in the file that an encoder does not have are left unread; a weight that the file lacks would be
    random, and nothing should learn from that unknowingly. Only safetensors are read: weights in PyTorch's
    own format are a pickle. Code that a model brings with it is never run.

    Args:
        model: folder or hub name.
        head: with this one on top.
        new_head: it need not be in the file: what lacks is made from torch's random numbers.
        settings: of ``AutoModel.from_pretrained``, and of the encoder's config, where they replace its own.

    Raises:
        ValueError: the weights cannot be read, or some are missing.
    """
    config = read_config("model", model, revision=settings.get("revision"))
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        encoder, report = _auto(head).from_pretrained(
            model,
            **settings,
            **_no_pooler(config, head),
            use_safetensors=True,
            weights_only=True,  # should its index lead to another kind of file all the same
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the weights of {model} cannot be read: {error} They must be a model.safetensors: save a model "
            "that you trust as one with transformers (save_pretrained)"
        ) from error
    finally:
        hf_logging.set_verbosity(verbosity)
    inside = f"{encoder.base_model_prefix}."
    missing = sorted(
        key
        for key in report["missing_keys"]
        if not new_head or (key.startswith(inside) and ".pooler." not in key)
    )
    if missing:
        with_head, way_out = _HEADS[head]
        raise ValueError(
            f"{model} lacks {len(missing)} weights of a {config.model_type} encoder{with_head}, such as "
            f"{missing[0]}; they would be random. {way_out}"
        )
    return encoder


def new_encoder(config: PreTrainedConfig, head: Head = Head.none) -> PreTrainedModel:
    """Return an encoder with random float32 weights and this head on top, ready to be captured.

    Raises:
        ValueError: an architecture without an encoder to capture, or a setting that it cannot use.
    """
    try:
        encoder = _auto(head).from_config(config, dtype=torch.float32, **_no_pooler(config, head))
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"no {config.model_type} encoder can be made of these settings: {error}") from error
    enable_capture(encoder)
    return encoder


def empty_encoder(config: PreTrainedConfig, head: Head = Head.none) -> PreTrainedModel:
    """Return an encoder whose weights are memory that nobody has written to, ready to be captured.

    Host memory of that size is reserved, and taken only where it is written to.
    """
    with no_init_weights():
        encoder = new_encoder(config, head)
    encoder.tie_weights()  # initialising weights does it otherwise
    return encoder


def read_config(key: str, model: str, **settings: Any) -> PreTrainedConfig:
    """Return the ``transformers`` config of a folder or hub name; ``key`` is the setting that names it."""
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False, **settings)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}={model!r} cannot be read as the folder or hub name of an encoder: {error}"
        ) from error


def attention_dropout(config: PreTrainedConfig) -> str | None:
    """Return the setting that drops out attention probabilities, None where nothing does."""
    keys = ("attention_probs_dropout_prob", "attention_dropout")
    return next((key for key in keys if getattr(config, key, 0.0)), None)


def check_sha256(config: TeacherConfig) -> None:
    """Raise ValueError unless the weights file is the one that ``teacher.sha256`` names, if it names one."""
    if config.sha256 is None:
        return
    path = _weights_files(config)[0]
    if not path.is_file():
        raise ValueError(
            f"teacher.sha256 is set, but {path} does not exist; unset it or name another teacher"
        )
    digest = sha256(path)
    if digest != config.sha256:
        raise ValueError(
            f"teacher.sha256={config.sha256} does not match {path} ({digest}): the file is damaged or "
            "another model; fetch it again, or correct the checksum"
        )


def weights_sha256(config: TeacherConfig) -> str:
    """SHA-256 (hex) of the teacher's weights: of the file's content, or of those of several files together.

    Raises:
        ValueError: there are none.
    """
    digests = [sha256(path) for path in _weights_files(config) if path.is_file()]
    if not digests:
        raise ValueError(f"teacher.model={config.model!r} has no model.safetensors to read")
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode("ascii")).hexdigest()


def _weights_files(config: TeacherConfig) -> list[Path]:
    """Where the weights are, in a folder or in the hub's cache; they need not exist."""
    folder = Path(config.model)
    if folder.is_dir():
        return sorted(folder.glob("*.safetensors")) or [folder / "model.safetensors"]
    return [Path(str(cached_file(config.model, "model.safetensors", revision=config.revision)))]


_FINE_TUNE = "Fine-tune it on the task first (launcher/task.py stage=teacher), or name one that is"
_HEADS = {  # what an error says of each, and the way out
    Head.none: ("", "Use a complete pretrained encoder"),
    Head.masked_lm: (
        " with a masked-language-model head",
        "Use a complete pretrained encoder, or set losses.prediction=0",
    ),
    Head.sequence: (" with a head that classifies", _FINE_TUNE),
    Head.spans: (" with a head that answers", _FINE_TUNE),
}


def _auto(head: Head) -> Any:
    return {
        Head.none: AutoModel,
        Head.masked_lm: AutoModelForMaskedLM,
        Head.sequence: AutoModelForSequenceClassification,
        Head.spans: AutoModelForQuestionAnswering,
    }[head]


def _no_pooler(config: PreTrainedConfig, head: Head) -> dict[str, bool]:
    if head is not Head.none:
        return {}  # a class with a head makes the pooler that it needs
    model_class: Any = MODEL_MAPPING[type(config)]
    has_pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
    return {"add_pooling_layer": False} if has_pooler else {}
