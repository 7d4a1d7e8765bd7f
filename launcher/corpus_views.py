"""What ``launcher/corpus.py`` shows a person: tables and rows of text."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sharding.peek import PeekedRow
from sharding.simulate import Simulation


def show_statistics(counts: dict[str, Any]) -> None:
    """Print what ``sharding.statistics.statistics`` counted."""
    console = Console()
    splits = counts["splits"]
    left_out = {f"left out, {reason.replace('_', ' ')}": f"{n:,}" for reason, n in counts["left_out"].items()}
    for key, value in {**counts, **left_out}.items():
        if key not in ("splits", "left_out") and value is not None:
            console.print(f"{key:>27}  {value}", highlight=False, soft_wrap=True, markup=False)
    table = Table()
    table.add_column("")
    for name in splits:
        table.add_column(name, justify="right")
    for key in ("documents", "rows", "tokens", "bytes", "shards", "blocks"):
        table.add_row(key, *(f"{split[key]:,}" for split in splits.values()))
    table.add_row(
        "padding", *(f"{split['padding_share']:.2%}" for split in splits.values()), end_section=True
    )
    for bucket in next(iter(splits.values()))["rows_by_length"]:
        shares = [split["rows_by_length"][bucket] / split["rows"] for split in splits.values()]
        table.add_row(f"rows of {bucket} tokens", *(f"{share:.1%}" for share in shares))
    console.print(table)


def show_rows(rows: Sequence[PeekedRow], special_tokens: Sequence[str]) -> None:
    """Print rows as text, segments A and B apart, special tokens dim."""
    console = Console(highlight=False)
    for row in rows:
        place = f"{row.shard}, block {row.block}, row {row.row}: {row.length} tokens"
        at = "" if row.position is None else f"position {row.position:,} = "
        boundary = f", segment B from token {row.segment}" if row.text_b else ", no segment B"
        console.print(Text(f"{at}{place}{boundary}", style="bold"), soft_wrap=True)
        table = Table.grid(padding=(0, 1))
        for name, text, style in (("A", row.text_a, "cyan"), ("B", row.text_b, "yellow")):
            if text:
                shown = Text(text)
                shown.highlight_words(special_tokens, "dim")
                table.add_row(Text(name, style=f"bold {style}"), shown)
        console.print(table)
        console.print()


def show_simulation(found: Simulation, epochs: int) -> None:
    """Print the legs of a simulated run, how well it shuffles, and each property as PROVED or FAILED."""
    console = Console(highlight=False)
    title = f"{found.steps:,} steps of {found.global_batch_rows} rows: {epochs} x {found.rows:,} rows"
    table = Table("ranks", "steps", "rows per rank and step", "blocks per rank", title=title)
    for leg in found.legs:
        fewest, most = leg.blocks_of_rank.min(), leg.blocks_of_rank.max()
        table.add_row(
            str(leg.world_size),
            f"{leg.first_step:,} .. {leg.first_step + leg.steps - 1:,}",
            str(found.global_batch_rows // leg.world_size),
            f"{fewest:,}" if fewest == most else f"{fewest:,} .. {most:,}",
        )
    console.print(table)
    blocks_read = sum(int(leg.blocks_of_rank.sum()) for leg in found.legs)
    of_blocks, largest = found.step_blocks, found.step_largest
    distance = found.neighbour_distance_sum / max(1, found.neighbours)
    for line in (
        f"blocks in a global batch: {min(of_blocks)} to {max(of_blocks)}, mean {_mean(of_blocks):.1f}",
        f"rows of one block in a global batch: at most {max(largest)}, mean of the most {_mean(largest):.1f}",
        f"rows that follow each other lie {distance:,.0f} rows apart in the corpus, "
        f"{distance / (found.rows / 3):.0%} of a perfect shuffle; "
        f"{found.neighbours_kept / max(1, found.neighbours):.3%} follow each other there too",
        f"blocks read, all ranks together: {blocks_read:,}, {blocks_read / found.blocks / epochs:.1f} times "
        "the corpus per epoch",
    ):
        console.print(line, soft_wrap=True)
    for name, held in found.properties().items():
        verdict = ("PROVED", "green") if held else ("FAILED", "bold red")
        console.print(Text.assemble(verdict, f"  {name}"), soft_wrap=True)


def _mean(numbers: Sequence[int]) -> float:
    return sum(numbers) / len(numbers)
