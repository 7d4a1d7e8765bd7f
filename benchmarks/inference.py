"""What a student saves at inference: BERT-base's shape against 4x312, side by side on one machine.

    python benchmarks/inference.py [--json PATH] [--quick] [--threads N] [--calls N] [--rows 1,32]

Classifiers of random weights, 12 layers x 768 (feed-forward 3072) and 4 layers x 312 (1200), 12 heads each,
with BERT's vocabulary; weights do not change what a call costs. Both run in PyTorch (float32, bfloat16), as
ONNX and as ONNX int8 in ONNX Runtime, on CPU; with a GPU also in PyTorch there. All take turns, call by call,
on rows without padding, after calls to warm up. ``speed-up`` is against BERT-base in the same runtime,
``against pytorch`` against BERT-base in PyTorch float32 on the same device. The paper has 9.4x, on a K80.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configs  # noqa: F401  before transformers, which finds torchao and makes it talk

# isort: split
import copy
import os
from collections.abc import Sequence

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from benchmarks.harness import Report, benchmark_parser
from trainer.latency import Latency, measure
from trainer.models import parameters
from trainer.onnx_export import export_onnx, quantize_int8
from trainer.served import Forward, onnx_forward, open_session, torch_forward

SHAPES = {"bert-base": (12, 768, 3072), "4x312": (4, 312, 1200)}
PAPER = 9.4


def classifier(layers: int, hidden_size: int, intermediate_size: int) -> PreTrainedModel:
    """Return a classifier of random weights."""
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=12,
    )
    return BertForSequenceClassification(config).eval()


def moved(model: PreTrainedModel, device: str, dtype: torch.dtype) -> Forward:
    """Return a copy of the model there."""
    apart: torch.nn.Module = copy.deepcopy(model)
    apart.to(device=device, dtype=dtype)
    assert isinstance(apart, PreTrainedModel)
    return torch_forward(apart)


def runtimes(model: PreTrainedModel, folder: Path, threads: int) -> dict[str, Forward]:
    """Return the model in every runtime, by name; files go into ``folder``."""
    folder.mkdir()
    export_onnx(model, folder / "model.onnx")
    quantize_int8(folder / "model.onnx", folder / "model-int8.onnx")
    found = {
        "pytorch": torch_forward(model),
        "pytorch bf16": moved(model, "cpu", torch.bfloat16),
        "onnx": onnx_forward(open_session(folder / "model.onnx", threads=threads)),
        "onnx int8": onnx_forward(open_session(folder / "model-int8.onnx", threads=threads)),
    }
    if torch.cuda.is_available():
        for name, dtype in (("", torch.float32), (" bf16", torch.bfloat16)):
            found[f"cuda pytorch{name}"] = moved(model, "cuda", dtype)
    return found


def timed(rows: Sequence[int], seq_len: int, threads: int, calls: int) -> tuple[list[Latency], str]:
    """Return the latencies of ``MODEL, RUNTIME`` pairs, and how much smaller the student is."""
    models = {name: classifier(*shape) for name, shape in SHAPES.items()}
    with tempfile.TemporaryDirectory() as temporary:
        forwards = {
            f"{name}, {runtime}": forward
            for name, model in models.items()
            for runtime, forward in runtimes(model, Path(temporary, name), threads).items()
        }
        found = measure(forwards, rows=rows, seq_len=seq_len, vocab_size=30522, calls=calls)
        large, small = (
            Path(temporary, *file).stat().st_size
            for file in (("bert-base", "model.onnx"), ("4x312", "model-int8.onnx"))
        )
    fewer = parameters(models["bert-base"]) / parameters(models["4x312"])
    return found, (
        f"4x312 has {fewer:.1f}x fewer parameters than bert-base; its int8 file is {large / small:.0f}x "
        "smaller than bert-base's in float32"
    )


def main() -> None:
    """Measure and print the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a call on CPU")
    parser.add_argument("--calls", type=int, default=30, help="timed calls of each, after those to warm up")
    parser.add_argument("--rows", default="1,32", help="rows in a call")
    parser.add_argument("--seq-len", type=int, default=128)
    arguments = parser.parse_args()
    rows = [1] if arguments.quick else [int(count) for count in arguments.rows.split(",")]
    calls = 3 if arguments.quick else arguments.calls
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    found, smaller = timed(rows, arguments.seq_len, arguments.threads, calls)

    report = Report(f"rows of {arguments.seq_len} tokens, {arguments.threads} threads, {calls} calls")
    p50_ms = {(own.runtime, own.rows): own.p50_ms for own in found}
    speedups = []
    for own in found:
        model, runtime = own.runtime.split(", ")
        pytorch = "cuda pytorch" if runtime.startswith("cuda") else "pytorch"
        speedup = p50_ms[f"bert-base, {runtime}", own.rows] / own.p50_ms
        against = p50_ms[f"bert-base, {pytorch}", own.rows] / own.p50_ms
        report.add(
            **{"model": model, "runtime": runtime, "rows": own.rows},
            **{"p50_ms": own.p50_ms, "p90_ms": own.p90_ms, "p99_ms": own.p99_ms},
            **{"rows_per_s": own.rows_per_s, "speed-up": speedup, "against pytorch": against},
        )
        if model == "4x312":
            speedups.append(f"{runtime} {speedup:.1f}x ({against:.0f}x) at {own.rows}")
    report.finish(
        f"{smaller}; faster in the same runtime (than bert-base in PyTorch float32), paper: {PAPER}x: "
        + ", ".join(speedups),
        arguments.json,
    )


if __name__ == "__main__":
    main()
