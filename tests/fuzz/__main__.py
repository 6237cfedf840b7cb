"""Run many random programs: python -m tests.fuzz --programs 2000 --seed 0."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from tests.fuzz.check import check, describe, simplest
from tests.fuzz.programs import draw


def main() -> int:
    """Run programs, print those that are wrong, and return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Run random programs.")
    parser.add_argument("--programs", type=int, default=200, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--shrink", action="store_true", help="leave out of a wrong program what it does not need")
    given = parser.parse_args()
    torch.set_num_threads(1)
    wrong, start = 0, time.perf_counter()
    for seed in range(given.seed, given.seed + given.programs):
        program = draw(seed)
        if faults := check(program):
            wrong += 1
            print(describe(program, faults), flush=True)
            if given.shrink:
                small = simplest(program)
                print("simplest:", describe(small, check(small)), flush=True)
    print(f"{given.programs} programs from seed {given.seed}, {wrong} wrong, {time.perf_counter() - start:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
