"""The main job on real input, start to finish, on this machine: ``make demo``.

Builds a corpus from a Wikipedia dump piece, distils a pretrained teacher into a tiny student on two ranks,
and compares the result with what one has without distillation. Interrupted and started again, it goes on
where it was. Real runs use ``launcher/corpus.py`` and ``launcher/general.py``, as this does.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import configs  # noqa: F401  before transformers, which finds torchao and makes it talk

import argparse
import json
import logging
import os
import re
import socket
import subprocess
import time
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from configs.load import ConfigError, load_config
from configs.public import public
from configs.schema import RunConfig
from configs.student_schema import StudentConfig
from launcher.wording import by_kind, duration
from sharding.manifest import Corpus, open_corpus
from trainer import encoders, meeting, models, shapes, world
from trainer.capture import Captured, Head
from trainer.evaluation import evaluate
from trainer.models import Inputs
from trainer.teacher import load_teacher
from trainer.transfer import teacher_need

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
Losses = dict[str, float]


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", help="hub name or folder of another teacher, such as bert-base-uncased")
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where everything goes")
    parser.add_argument("overrides", nargs="*", help="key=value for the run, such as train.epochs=1")
    arguments = parser.parse_args()
    logging.getLogger("deepspeed").setLevel(logging.WARNING)
    folder, settings = choose(arguments.teacher, arguments.folder)
    overrides = [
        *settings,
        f"output={folder / 'run'}",
        f"data.corpus={folder / 'corpus'}",
        *arguments.overrides,
    ]
    seconds: dict[str, float] = {}
    try:
        config = load_config(RunConfig, ROOT / "configs/demo.yaml", overrides)
        started_s = time.perf_counter()
        build_corpus(config, folder)
        seconds["corpus"] = time.perf_counter() - started_s
        started_s = time.perf_counter()
        distil(overrides)
        seconds["distillation"] = time.perf_counter() - started_s
        started_s = time.perf_counter()
        table, fall = compare(config)
        seconds["comparison"] = time.perf_counter() - started_s
    except ConfigError as error:
        print(public(f"error: {error}"), file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return int(error.returncode)  # it has said why
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    conclude(config, table, fall, seconds)
    return 0


def choose(teacher: str | None, folder: Path) -> tuple[Path, list[str]]:
    """Return where the demo works and the settings that another teacher needs."""
    if teacher is None:
        return folder, []
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", teacher).strip("-")
    return folder / slug, [f"teacher.model={teacher}", "teacher.sha256=null"]


def build_corpus(config: RunConfig, folder: Path) -> None:
    """Build the corpus unless it is there; a build that was interrupted leaves nothing under its name."""
    if (folder / "corpus" / "manifest.json").is_file():
        return
    overrides = [f"output={folder / 'corpus'}", f"tokenizer={config.teacher.model}"]
    build = [sys.executable, str(ROOT / "launcher/corpus.py"), "build"]
    subprocess.run([*build, "--config", str(ROOT / "configs/corpus_demo.yaml"), *overrides], check=True)


def distil(overrides: list[str]) -> None:
    """Run ``launcher/general.py`` under DeepSpeed's launcher: two ranks, on CPU or on as many devices."""
    ranks = min(RANKS, torch.cuda.device_count()) if torch.cuda.is_available() else RANKS
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    launch += ["--master_addr", "127.0.0.1", "--master_port", str(port), "--log_level", "warning"]
    run = [str(ROOT / "launcher/general.py"), "--config", str(ROOT / "configs/demo.yaml")]
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    subprocess.run([*launch, *run, *overrides], check=True, env={"DS_ACCELERATOR": accelerator, **os.environ})


def compare(config: RunConfig) -> tuple[Table, float]:
    """Return the table of held-out losses, parameters and speed, and the share by which the loss fell."""
    student, corpus = config.students[0], open_corpus(config.data.corpus or "")
    untrained, distilled = recorded_losses(Path(config.output) / "evaluations.jsonl")
    teacher_config = encoders.load_teacher_config(config.teacher)
    layered, layered_losses = teacher_layers(config, student, corpus)
    teacher = encoders.load_whole_teacher(config.teacher, head=Head.none).eval()
    exported = encoders.load_encoder(str(Path(config.output) / "export" / student.name)).eval()
    seq_len = corpus.manifest.seq_len
    teacher_speed, student_speed = rows_per_s([teacher, exported], seq_len)

    name = "/".join(config.teacher.model.rstrip("/").split("/")[-2:])  # a hub name, or the end of a path
    columns = ("", "parameters", "embedding", "hidden", "attention", "held-out loss", "rows/s", "speed-up")
    table = Table(*columns, title=f"{name} -> {student.name}")
    depth = f"{teacher_config.num_hidden_layers} layers x {teacher_config.hidden_size}"
    shape = f"{student.layers} layers x {student.hidden_size}"
    table.add_row(f"teacher, {depth}", millions(teacher), "", "", "", "", f"{teacher_speed:.0f}", "1.0x")
    table.add_row(f"student {shape}, untrained", millions(exported), *cells(untrained))
    kept = f"{student.layers} of the teacher's layers"
    table.add_row(kept, millions(layered), *cells(layered_losses))
    speed = f"{student_speed:.0f}", f"{student_speed / teacher_speed:.1f}x"
    table.add_row(f"student {shape}, distilled", millions(exported), *cells(distilled), *speed)
    return table, 1 - distilled["total"] / untrained["total"]


def recorded_losses(path: Path) -> tuple[Losses, Losses]:
    """Return the run's held-out losses at step 0 and at its last step."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return entries[0]["losses"], max(entries, key=lambda entry: entry["step"])["losses"]


def teacher_layers(config: RunConfig, student: StudentConfig, corpus: Corpus) -> tuple[nn.Module, Losses]:
    """Return a student made of the teacher's embeddings and mapped layers, and its held-out losses.

    It is as wide as the teacher, so it needs no projection; the layers below those that it keeps are gone.
    """
    place = world.World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    meeting.connect(place, {})
    try:
        hf_config = encoders.load_teacher_config(config.teacher)
        wide = replace(
            student,
            hidden_size=hf_config.hidden_size,
            heads=hf_config.num_attention_heads,
            intermediate_size=hf_config.intermediate_size,
            init="teacher",
        )
        learned = shapes.transfer(wide, hf_config)
        load = partial(encoders.load_whole_teacher, config.teacher)
        module = models.build_student(wide, load, hf_config, config.train.seed).eval()

        def learn(inputs: Inputs) -> Captured:
            return Captured(**module(inputs.ids_BS, inputs.attention_mask, inputs.token_type_BS))

        losses = evaluate(
            load_teacher(config.teacher, teacher_need([learned]), place),
            [(learn, learned)],
            hf_config.hidden_size,
            corpus,
            config.evaluation.rows,
            config.train.micro_batch_rows,
            place,
        )
    finally:
        torch.distributed.destroy_process_group()
    return module.encoder, losses[0]


@torch.no_grad()
def rows_per_s(
    encoders: list[nn.Module], seq_len: int, batch_rows: int = 32, repeats: int = 5
) -> list[float]:
    """Return each encoder's inference speed on this CPU in float32: the median of interleaved repeats."""
    ids_BS = torch.randint(1000, 2000, (batch_rows, seq_len))
    mask_BS = torch.ones_like(ids_BS)
    taken_s: list[list[float]] = [[] for _ in encoders]
    for turn in range(repeats + 1):
        for encoder, own_s in zip(encoders, taken_s, strict=True):
            started_s = time.perf_counter()
            encoder(input_ids=ids_BS, attention_mask=mask_BS)
            if turn > 0:  # the first turn warms up
                own_s.append(time.perf_counter() - started_s)
    return [batch_rows / sorted(own_s)[repeats // 2] for own_s in taken_s]


def cells(losses: Losses) -> list[str]:
    """Return the table's four loss columns: the mean of each kind over layers, and the total."""
    kinds = dict(zip(*[iter(by_kind(losses, "").split())] * 2, strict=True))
    return [kinds.get(kind, "") for kind in ("embedding", "hidden", "attention")] + [f"{losses['total']:.3f}"]


def millions(module: nn.Module) -> str:
    """Return a module's number of parameters, readably."""
    return f"{models.parameters(module) / 1e6:.1f}M"


def conclude(config: RunConfig, table: Table, fall: float, seconds: dict[str, float]) -> None:
    """Print the table and where to look."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print()
    console.print(table)
    export = Path(config.output) / "export" / config.students[0].name
    console.print(f"The held-out distillation loss fell by {fall:.0%} from its value at step 0.")
    console.print("Time: " + ", ".join(f"{phase} {duration(spent)}" for phase, spent in seconds.items()))
    store = (Path(config.output).parent / "mlflow/mlflow.db").resolve()
    own = store == (ROOT / ".demo/mlflow/mlflow.db").resolve()  # where ``make ui`` looks by itself
    places = {
        "in MLflow": "make ui" if own else f"make ui STORE=sqlite:///{store}",
        "report": f"{config.output}/report.html",
        "run folder": f"{config.output}/",
        "student": f"AutoModel.from_pretrained({str(export)!r})",
    }
    console.print("\nWhere to look:")
    for name, place in places.items():
        console.print(f"  {name:10}  {place}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
