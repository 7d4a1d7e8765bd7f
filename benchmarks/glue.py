"""A general student on GLUE: teacher, student, the same without its parts, with seeds; then one report.

    python benchmarks/glue.py --data GLUE --teacher MODEL --general EXPORT --output FOLDER
        [--tasks rte,mrpc] [--seeds 3] [--other-seeds 1] [--ablate cola] [--vectors FILE] [--jobs 2]
        [--json PATH] [--quick]

Of every task: ``launcher/task.py`` builds the corpus, fine-tunes the teacher, and trains per seed

    student           the general student, layers then predictions (TinyBERT's two steps)
    without_general   the same from random weights: no stage one
    finetuned         the same shape on labels alone, from the pretrained teacher's own layers (for 6 of 12
                      every second), without any distillation, for as many steps as the student has in both

and, for the first seed of tasks in ``--ablate``, the student without one part each: without_attention,
without_hidden, without_embedding (terms of the layers' step), without_intermediate (predictions alone),
without_prediction (layers, then labels), and with_augmentation by word vectors where ``--vectors`` is given.
Steps of the same kind are as many in all of them. ``launcher/evaluate.py`` then scores and times everything.
Stages that are done are not done again: an interrupted benchmark goes on. ``--jobs`` stages at a time share
the cores.

``EXPORT`` is what ``launcher/general.py`` exported of a student of the teacher's hidden size.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import OmegaConf

from benchmarks.harness import Report, benchmark_parser

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Recipe:
    """How a task is trained: 16 rows a step (the teacher 32); lengths that a CPU can do."""

    folder: str
    seq_len: int = 128
    micro_rows: int = 8
    teacher: dict[str, float] = field(default_factory=lambda: {"epochs": 3})
    intermediate: dict[str, float] = field(default_factory=lambda: {"epochs": 1})
    heads: dict[str, float] = field(default_factory=lambda: {"epochs": 2})
    """Prediction stage."""

    @property
    def finetuned(self) -> dict[str, float]:
        """The fine-tuned arm: as long as both stages of the student."""
        return {key: value + self.intermediate[key] for key, value in self.heads.items()}


SHORT = {"steps": 600}
RECIPES = {
    "rte": Recipe("RTE"),
    "mrpc": Recipe("MRPC"),
    "stsb": Recipe("STS-B"),
    "cola": Recipe("CoLA", seq_len=64, micro_rows=16, intermediate={"epochs": 2}),
    "sst2": Recipe("SST-2", 64, 16, teacher={"steps": 500}, intermediate=SHORT, heads=SHORT),
}
TERMS = ("attention", "hidden", "embedding")
MAIN = {"student": "prediction", "without_general": "random/prediction", "finetuned": "baseline"}
"""Arms of every table, and where their exports lie under a seed's folder."""
COPIES = 3
"""Augmented copies of an example; as many steps as without are too few for the paper's 20 and 30."""


def main() -> None:
    """Train what is missing, evaluate, print."""
    parser = benchmark_parser(__doc__)
    for name in ("data", "teacher", "general", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--other-seeds", type=int, help="without_general, finetuned; not given: as --seeds")
    parser.add_argument("--ablate", default="", help="tasks, separated by commas")
    parser.add_argument("--vectors", type=Path, help="GloVe file, to ablate with augmentation")
    parser.add_argument("--attention", type=float, default=0.01, help="weight of the attention term")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    arguments.other_seeds = arguments.other_seeds or arguments.seeds
    tasks = arguments.tasks.split(",")
    if unknown := set(tasks + [t for t in arguments.ablate.split(",") if t]) - set(RECIPES):
        parser.error(f"unknown tasks: {', '.join(sorted(unknown))}; known: {', '.join(RECIPES)}")
    bench = Bench(arguments)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(bench.teach, tasks))
        list(pool.map(lambda pair: bench.distil(*pair), [(t, s) for s in bench.seeds for t in tasks]))
        list(pool.map(bench.ablate, [task for task in arguments.ablate.split(",") if task]))
    bench.evaluate(tasks)
    bench.report()


class Bench:
    """The runs of one benchmark, under one folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Take the arguments of ``main``."""
        self.arguments = arguments
        self.seeds = range(1, arguments.seeds + 1)
        self.output: Path = arguments.output.resolve()
        self.shape = json.loads((arguments.general / "config.json").read_text(encoding="utf-8"))

    def teach(self, task: str) -> None:
        """Build a task's corpus and fine-tune its teacher."""
        config = self.config(task, self.output / task, seed=0)
        self.stage("data", config)
        self.stage("teacher", config)

    def distil(self, task: str, seed: int) -> None:
        """Train the three arms of every table."""
        folder = self.output / task / f"seed-{seed}"
        config = self.config(task, folder, seed)
        config["students"] = [self.student("student")]
        self.stage("intermediate", config)
        self.stage("prediction", config)
        if seed > self.arguments.other_seeds:
            return
        config["students"] = [self.student("finetuned", init="teacher")]
        self.stage("baseline", config)
        config = self.config(task, folder / "random", seed)
        config["students"] = [self.student("without_general", init="random")]
        self.stage("intermediate", config)
        self.stage("prediction", config)

    def ablate(self, task: str) -> None:
        """Train the student without one of its parts each."""
        folder = self.output / task / "ablations"
        config = self.config(task, folder / "terms", seed=1)
        config["students"] = [self.student(f"without_{term}", losses={term: 0.0}) for term in TERMS]
        self.stage("intermediate", config)
        self.stage("prediction", config)
        config = self.config(task, folder / "direct", seed=1) | {"start": "init"}
        config["students"] = [self.student("without_intermediate")]
        self.stage("prediction", config)
        config = self.config(task, folder / "labels", seed=1) | {"start": "init"}
        layers = self.output / task / "seed-1/intermediate/export/student"
        config["students"] = [self.student("without_prediction", init=str(layers))]
        config["prediction"]["losses"] = {"logits": 0.0, "labels": 1.0}
        self.stage("prediction", config)
        if self.arguments.vectors is not None:
            config = self.config(task, folder / "augmentation", seed=1)
            config["students"] = [self.student("with_augmentation")]
            config["augmentation"] = {
                "vectors": str(self.arguments.vectors.resolve()),
                "per_example": COPIES,
            }
            self.stage("augment", config)
            for stage in ("intermediate", "prediction"):
                config[stage] |= {"augmented": True}
                if config[stage]["epochs"] is not None:  # of the task's own corpus: as many steps
                    config[stage]["epochs"] /= COPIES + 1
                self.stage(stage, config)

    def config(self, task: str, folder: Path, seed: int) -> dict[str, Any]:
        """Return the task's config, without students."""
        recipe, own = RECIPES[task], self.output / task
        lengths = {
            "fine_tuning": recipe.teacher if seed == 0 else recipe.finetuned,
            "intermediate": recipe.intermediate,
            "prediction": recipe.heads,
        }
        lr = {"fine_tuning": 5e-5, "intermediate": 1e-4, "prediction": 5e-5}
        rows = {"global_batch_rows": 16, "micro_batch_rows": recipe.micro_rows, "augmented": False}
        teacher_rows = {"global_batch_rows": 32} if seed == 0 else {}
        return {
            "task": task,
            "output": str(folder),
            "corpus": None if folder == own else str(own / "data"),
            "finetuned": str(own / "teacher/export/teacher"),
            "source": {"path": str(self.arguments.data / recipe.folder)},
            "seq_len": recipe.seq_len,
            "seed": seed,
            "teacher": {
                "model": str(self.arguments.teacher),
                "precision": "bf16",
                "logits_folder": str(own / "teacher_logits"),
            },
            "teacher_overrides": {"attention_probs_dropout_prob": 0.0},
            **{
                stage: {
                    **rows,
                    "epochs": None,  # in the place of the default
                    **({"steps": 2} if self.arguments.quick else length),
                    "optimizer": {"lr": lr[stage]},
                    **(teacher_rows if stage == "fine_tuning" else {}),
                }
                for stage, length in lengths.items()
            },
            "deepspeed": {"zero_stage": 1, "precision": "bf16"},
            "evaluation": {"every_steps": 500, "rows": 2000},
            "checkpoint": {"keep_last": 1},
            "tracking": {"enabled": False},
        }

    def student(
        self, name: str, init: str | None = None, losses: dict[str, float] | None = None
    ) -> dict[str, Any]:
        """Return a student of the general student's shape."""
        return {
            "name": name,
            "layers": self.shape["num_hidden_layers"],
            "hidden_size": self.shape["hidden_size"],
            "heads": self.shape["num_attention_heads"],
            "intermediate_size": self.shape["intermediate_size"],
            "init": init or str(self.arguments.general.resolve()),
            "losses": {"attention": self.arguments.attention} | (losses or {}),
            "overrides": {"attention_probs_dropout_prob": 0.0},
        }

    def stage(self, stage: str, config: dict[str, Any]) -> None:
        """Run one stage to its end, unless it was done before."""
        folder = Path(config["output"])
        done = {"data": "data/manifest.json", "augment": "augmented/manifest.json"}
        if (folder / done.get(stage, f"{stage}/summary.json")).is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        settings = folder / f"{stage}.yaml"
        OmegaConf.save(config, settings)
        self.call(folder / f"{stage}.log", "launcher/task.py", "--config", settings, f"stage={stage}")

    def call(self, log: Path, *command: object) -> None:
        """Run a launcher on this job's share of the cores, its messages in a file."""
        print(f"{' '.join(str(part) for part in command[2:])}", flush=True)
        threads = max(1, len(os.sched_getaffinity(0)) // self.arguments.jobs)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        with log.open("w", encoding="utf-8") as messages:
            code = subprocess.run(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=environment,
                stdout=messages,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if code != 0:
            raise RuntimeError(f"{command[0]} ended with {code}; see {log}")

    def evaluate(self, tasks: list[str]) -> None:
        """Score and time everything that was trained."""
        config = {
            "name": "glue",
            "output": str(self.output / "report"),
            "tasks": [
                {
                    "corpus": str(self.output / task / "data"),
                    "teacher": str(self.output / task / "teacher/export/teacher"),
                    "arms": dict(self.arms(task)),
                }
                for task in tasks
            ],
            "latency": {"repeats": 2 if self.arguments.quick else 50},
            "tracking": {"enabled": False},
        }
        settings = self.output / "evaluate.yaml"
        OmegaConf.save(config, settings)
        self.call(self.output / "evaluate.log", "launcher/evaluate.py", "--config", settings)

    def arms(self, task: str) -> Iterator[tuple[str, list[str]]]:
        """Yield the arms of a task, and the folders of their models by seed."""
        for arm, stage in MAIN.items():
            found = [self.output / task / f"seed-{seed}" / stage / "export" / arm for seed in self.seeds]
            yield arm, [str(folder) for folder in found if folder.is_dir()]
        for folder in sorted((self.output / task / "ablations").glob("*/prediction/export/*")):
            yield folder.name, [str(folder)]

    def report(self) -> None:
        """Print the table that the evaluation wrote, and what the student keeps."""
        found = json.loads((self.output / "report/results.json").read_text(encoding="utf-8"))
        columns = {column["task"]: column["metric"] for column in found["columns"]}
        table = Report("scores on dev data, as a share of the teacher's in brackets")
        teacher = found["teacher"]["scores"]["pytorch"]
        kept = {}
        for arm in [found["teacher"], *found["arms"]]:
            scores, shares, cells = arm["scores"]["pytorch"], [], {}
            for column, metric in columns.items():
                if not (seeds := [seed[metric] for seed in scores.get(column, [])]):
                    cells[f"{column} ({metric})"] = "-"
                    continue
                mean = sum(seeds) / len(seeds)
                shares.append(mean / teacher[column][0][metric])
                spread = f" ± {statistics.stdev(seeds):.3f}" if len(seeds) > 1 else ""
                cells[f"{column} ({metric})"] = f"{mean:.3f}{spread} ({shares[-1]:.1%})"
            kept[arm["name"]] = sum(shares) / len(shares)
            table.add(arm=arm["name"], **cells, mean=f"{kept[arm['name']]:.1%}")
        headline = (
            f"the student keeps {kept['student']:.1%} of its teacher's scores as a mean over {len(columns)} "
            f"tasks; without general distillation {kept['without_general']:.1%}, fine-tuned alone "
            f"{kept['finetuned']:.1%}"
        )
        table.finish(headline, self.arguments.json)


if __name__ == "__main__":
    main()
