"""A sweep of 8 trials as the students of one run against 8 runs, one after the other: time, equal results.

    python benchmarks/sweep.py [--json PATH] [--quick] [--steps N]

Real sweeps (``launcher/sweep.py``), from their start to their end, all cores for every run. A teacher of
BERT-base's shape and students of 4 x 312, random, in float32, 32 rows of 32 tokens a step; the trials differ
in the learning rate. What trials apart repeat is the start of a process and the teacher's pass.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configs  # noqa: F401  before transformers, which finds torchao and makes it talk

# isort: split
import yaml
from transformers import AutoTokenizer, BertConfig, BertModel

from benchmarks.harness import Report, benchmark_parser
from benchmarks.tiny_run import ROOT, tiny_config, write_material

TRIALS = 8
SHAPE = {"layers": 4, "hidden_size": 312, "heads": 12, "intermediate_size": 1200}


def write_base(folder: Path, steps: int, quick: bool) -> None:
    """Write the run that all trials vary, with its corpus and its teacher; the tiny ones when it is quick."""
    write_material(folder)
    config = tiny_config(folder, steps)
    config["students"] = [{**config["students"][0], "name": "student"}]
    if not quick:
        teacher = folder / "teacher"
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64)).save_pretrained(teacher)
        config["students"] = [{"name": "student", **SHAPE}]
    config["train"] |= {"global_batch_rows": 32, "micro_batch_rows": 32, "threads": None}
    config |= {"checkpoint": {"every_steps": None}, "evaluation": {"every_steps": steps, "rows": 64}}
    config["timeouts"] = {"start_s": 600.0, "step_s": 600.0}
    config["output"] = str(folder / "base")
    (folder / "base.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def swept(folder: Path, trials: int, packed: int) -> tuple[float, list[dict[str, Any]]]:
    """Run a sweep of so many trials, ``packed`` in a run; return its seconds and its trials."""
    rates = [1e-4 * 2**power for power in range(trials)]
    output = folder / f"packed-{packed}"
    sweep = {
        "name": f"packed-{packed}",
        "output": str(output),
        "base": str(folder / "base.yaml"),
        "space": {"students.0.optimizer.lr": {"values": rates}},
        "sampler": "grid",
        "objectives": [{"metric": "heldout/total"}],
        "packed": packed,
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    started_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "launcher/sweep.py"), "--config", str(path)],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - started_s
    if done.returncode:
        raise RuntimeError(f"the sweep ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return seconds, json.loads((output / "trials.json").read_text(encoding="utf-8"))["trials"]


def main() -> None:
    """Measure both and print the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a trial")
    arguments = parser.parse_args()
    trials, steps = (2, 2) if arguments.quick else (TRIALS, arguments.steps)
    report = Report(f"{trials} trials: packed, and apart")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(folder, steps, arguments.quick)
        found = {}
        for packed in (trials, 1):
            seconds, told = swept(folder, trials, packed)
            found[packed] = seconds, [(trial["settings"], trial["values"]) for trial in told]
            report.add(**{"trials in a run": packed, "runs": trials // packed, "seconds": seconds})
    (together_s, packed_values), (apart_s, values) = found[trials], found[1]
    equal = "equal" if packed_values == values else "DIFFERENT"
    report.finish(
        f"{trials} trials packed on one teacher pass take {together_s / apart_s:.0%} of the time of "
        f"{trials} runs ({apart_s / together_s:.1f} times faster), with {equal} held-out losses",
        arguments.json,
    )


if __name__ == "__main__":
    main()
