# SPDX-License-Identifier: Apache-2.0
"""Breaks real files in random ways and sends them through ``scan`` and ``protect``, for as long as one likes.

    python tests/fuzz/fuzz_files.py --seconds 600 --seed 1 --findings build/fuzz [FOLDER ...]

Starts from the files that pydicom brings, and those of the folders that are named. Whatever makes the program fail, or
lets anything out unprotected, is kept in the folder of findings, with the traceback. Exit code 1 when there are any.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutations import mutants, run, sources

BATCH = 100


def main() -> int:
    """Run until the time is over; the number of findings, as an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz"))
    options = parser.parse_args()
    missing = [folder for folder in options.folders if not folder.is_dir()]
    if missing:
        parser.error(f"there is no folder {missing[0]}")
    originals = sources(*options.folders)
    broken = mutants(originals, np.random.default_rng(options.seed))
    outcome: Counter[str] = Counter()
    findings, files, end = 0, 0, time.monotonic() + options.seconds
    while time.monotonic() < end:
        with tempfile.TemporaryDirectory() as folder:
            export = Path(folder, "in")
            export.mkdir()
            for number, content in enumerate(islice(broken, BATCH)):
                (export / f"{number:03d}").write_bytes(content)
            files += BATCH
            try:
                dims = 3 if files // BATCH % 4 == 0 else 2
                outcome += run(export, Path(folder, "out"), dims, np.random.default_rng(options.seed))
            except Exception:
                findings += 1
                kept = options.findings / f"seed{options.seed}-{files}"
                shutil.copytree(folder, kept, dirs_exist_ok=True)
                (kept / "traceback.txt").write_text(traceback.format_exc())
                print(f"finding in {kept}", file=sys.stderr, flush=True)
    print(f"{files} files from {len(originals)}, {findings} findings")
    for reason, count in outcome.most_common():
        print(f"{count:7d} {reason}")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
