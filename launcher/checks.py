"""What can be checked of a run before weights are loaded and ranks meet: all problems together."""

from configs.load import ConfigError
from configs.schema import Placement, RunConfig
from configs.validate import check_batch
from sharding.corpora import Corpora, open_corpora
from sharding.tokens import check_tokenizer
from trainer import encoders, memory, models, shapes
from trainer.capture import Need
from trainer.memory import Memory
from trainer.probes import open_probes
from trainer.teacher import check_machine
from trainer.transfer import teacher_need
from trainer.world import World


def check(config: RunConfig, place: World) -> Corpora:
    """Return the corpora, after everything that can be checked before weights are loaded and ranks meet.

    Raises:
        ConfigError: all problems together.
    """
    problems = check_batch(config.train, place.size)
    problems += check_machine(config, place.device)
    corpora = teacher_config = None
    try:
        corpora = open_corpora(config.data)
        corpora.mixture(config.train.global_batch_rows)
    except ValueError as error:
        problems.append(f"data: {error}")
    try:
        teacher_config = encoders.load_teacher_config(config.teacher)
        encoders.check_sha256(config.teacher)
    except ValueError as error:
        problems.append(str(error))
    try:
        open_probes(config.probes, config.teacher)
    except ValueError as error:
        problems.append(f"probes: {error}")
    for corpus in corpora.corpora if corpora is not None else ():
        if config.evaluation.every_steps and "heldout" not in corpus.manifest.splits:
            problems.append(
                f"evaluation.every_steps={config.evaluation.every_steps}, but {corpus.store.location} has no "
                "held-out split; build it with heldout_share above 0, or set evaluation.every_steps=null"
            )
    if corpora is not None and teacher_config is not None:
        try:
            check_tokenizer(corpora.corpora[0].manifest, encoders.load_tokenizer(config.teacher))
        except ValueError as error:
            problems.append(str(error))
        seq_len = max(corpus.manifest.seq_len for corpus in corpora.corpora)
        problems += shapes.check_students(
            config.students, teacher_config, seq_len, corpora.task
        ) or models.check_starts(config.students, teacher_config, corpora.task)
    if problems:
        raise ConfigError(problems)
    assert corpora is not None
    return corpora


def needed(config: RunConfig, corpora: Corpora) -> Need:
    """Return what the run needs of its teacher; ``Need()`` where students learn from labels alone."""
    shape = encoders.load_teacher_config(config.teacher)
    return teacher_need([shapes.transfer(student, shape, corpora.task) for student in config.students])


def teacher_memory(config: RunConfig, place: World, corpora: Corpora) -> dict[Placement, Memory]:
    """Return what every placement of the run's teacher takes."""
    shape, need = encoders.load_teacher_config(config.teacher), needed(config, corpora)
    seq_len = max(corpus.manifest.seq_len for corpus in corpora.corpora)
    return memory.placements(config.teacher, shape, need, place, config.train.micro_batch_rows, seq_len)


def check_memory(config: RunConfig, place: World, corpora: Corpora) -> None:
    """Refuse a teacher that the run needs and that does not fit as it is placed.

    Raises:
        ConfigError: names what would fit.
    """
    if needed(config, corpora) == Need():
        return
    found, free = teacher_memory(config, place, corpora), memory.free_memory(place.device)
    if problems := memory.check_fits(config.teacher, found, place, free):
        raise ConfigError(problems)
