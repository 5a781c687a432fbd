"""All targets against what this machine does: `make bench`.

    python bench/targets.py [--quick]

Runs the benchmarks that have targets, one after the other, and prints every target with its measurement last.
Exits with 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Target, machine

HERE = Path(__file__).parent
SCRIPTS = ("train.py", "scaling.py", "sample.py", "end_to_end.py", "interleave.py", "fairness.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and runs")
    quick = ["--quick"] if parser.parse_args().quick else []
    targets: list[Target] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for script in SCRIPTS:
            print(f"== {script}\n", flush=True)
            out = Path(folder) / f"{script}.json"
            command = [sys.executable, str(HERE / script), "--json", str(out), *quick]
            if subprocess.run(command).returncode or not out.exists():
                failed.append(script)
            else:
                targets += [Target(**t) for t in json.loads(out.read_text())]
            print(flush=True)
    print(f"{machine()}\n\n{Target.table(sorted(targets, key=lambda t: t.number))}")
    for script in failed:
        print(f"\n{script} failed: its targets are missing above")
    return 1 if failed or not all(t.met for t in targets) else 0


if __name__ == "__main__":
    sys.exit(main())
