"""How memory and time of a CCT step grow with the auxiliary decoders and with the domains.

python benchmarks/memory.py [--decoders 1 7 15 30] [--domains 1 2 4 8] [--images 64] [any option of benchmarks/step.py]
[--json]

Two tables. With K auxiliary decoders of one domain: seconds and peak memory, over those of the smallest K. With D
domains that share the same number of images per step, half of them labelled: seconds per image, over those of the
smallest D. The processes that are compared take turns step by step, as in benchmarks/step.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import step as step_benchmark
from rich.console import Console
from rich.table import Table


def arguments() -> tuple[argparse.Namespace, list[int], list[int], int]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("--decoders", type=int, nargs="+", default=[1, 7, 15, 30])
    parser.add_argument("--domains", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--images",
        type=int,
        default=64,
        help="per step, over all domains; twice the largest number of domains divides it",
    )
    own, rest = parser.parse_known_args()
    if own.images % (2 * max(own.domains)):
        parser.error(f"--images is {own.images}, which twice the {max(own.domains)} domains do not divide.")
    return step_benchmark.arguments(rest), own.decoders, own.domains, own.images


def compare(options: argparse.Namespace, variants: list[dict[str, int]]) -> list[dict[str, float]]:
    """Median seconds of a step and peak memory of each variant, and of both the ratio to the first one."""
    workers = [step_benchmark.Worker("ours", argparse.Namespace(**(vars(options) | variant))) for variant in variants]
    seconds: list[list[float]] = [[] for _ in workers]
    for number in range(options.steps + 1):
        for place in range(len(workers))[:: 1 if number % 2 else -1]:
            taken = workers[place].step(number)
            if number:
                seconds[place].append(taken)
    peaks = [worker.stop()[1] for worker in workers]
    ratios = [statistics.median(own / first for own, first in zip(taken, seconds[0], strict=True)) for taken in seconds]
    return [
        variant | {"s": statistics.median(taken), "mib": peak, "time_ratio": ratio, "memory_ratio": peak / peaks[0]}
        for variant, taken, peak, ratio in zip(variants, seconds, peaks, ratios, strict=True)
    ]


def print_table(title: str, first: str, rows: list[dict[str, float]], images: int) -> None:
    table = Table(title=title)
    for column in (first, "ms per image", "ratio", "peak MiB", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row[first]),
            f"{1000 * row['s'] / images:.0f}",
            f"{row['time_ratio']:.2f}",
            f"{row['mib']:.0f}",
            f"{row['memory_ratio']:.2f}",
        )
    Console().print(table)


def main() -> None:
    options, decoders, domains, images = arguments()
    by_decoders = compare(options, [{"decoders": number} for number in decoders])
    by_domains = compare(options, [{"domains": number, "batch": images // (2 * number)} for number in domains])
    result: dict[str, Any] = step_benchmark.circumstances(options) | {
        "images": images,
        "by_decoders": by_decoders,
        "by_domains": by_domains,
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return
    what = (
        f"{options.encoder}, {options.context}, {options.crop}x{options.crop}, C = {options.classes}, "
        f"{result['date']}, {result['machine']}"
    )
    print_table(
        f"Auxiliary decoders, {options.batch} + {options.batch} images, {what}",
        "decoders",
        by_decoders,
        2 * options.batch,
    )
    print_table(f"Domains, {images} images a step, K = {options.decoders}, {what}", "domains", by_domains, images)


if __name__ == "__main__":
    main()
