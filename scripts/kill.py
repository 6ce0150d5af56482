"""Kill fits, saves, overwriting fits and studies of the packaged encoder at random moments, and look what is left.

After each kill what was there before must still be read whole, and the same command again (or `fit --resume`) must come
to the result of a process that nobody killed, to the last digit::

    python scripts/kill.py --kills 20 --seed 0

Prints a line a kill and exits with 1 if anything is lost or other than it should be.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import load_file

from bayeslora.record import whole_record
from bayeslora.store import steady

RUN = ["--base", "demo", "--task", "demo", "--train-size", "48", "--set", "epochs=6", "--set", "batch_size=4"]
RUN += ["--set", "lora.dropout=0.1", "--set", "cpu=true"]
CLI = [sys.executable, "-m", "bayeslora.app.cli"]
SAVE = """
import sys
from bayeslora.inference import load
posterior = load(sys.argv[1])
for _ in range(40):
    posterior.save(sys.argv[2])
"""
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
#: Results, without times.
TENSORS = ("adapter_model.safetensors", "posterior.safetensors")


def commands(kind: str, folder: Path, source: Path) -> list[list[str]]:
    """What is killed, and what is called after it to come to the same result."""
    fit = [*CLI, "fit", *RUN, "--output", str(folder)]
    compare = [*CLI, "compare", *RUN, "--backends", "map,svi", "--seeds", "0", "--draws", "2", "--output", str(folder)]
    save = [sys.executable, "-c", SAVE, str(source), str(folder)]
    return {
        "fit": [fit, [*fit, "--resume"]],
        "overwrite": [[*fit, "--overwrite"]] * 2,
        "compare": [compare] * 2,
        "save": [save] * 2,
    }[kind]


def results(folder: Path) -> dict[str, bytes]:
    """Tensors of posteriors and of predictions, by file and name."""
    paths = [
        path for path in folder.rglob("*.safetensors") if path.name in TENSORS or path.parent.name == "evaluations"
    ]
    return {
        f"{path.relative_to(folder)}: {name}": value.tobytes()
        for path in paths
        for name, value in load_file(path).items()
    }


def writing(command: list[str], room: Path, seconds: float = float("inf")) -> float:
    """Seconds of a command from its first lock to its end, or to its being killed after so many."""
    start = None
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if start is None and any(room.rglob(".*bayeslora-lock")):
                start = time.monotonic()
            elif start is not None and time.monotonic() - start > seconds:
                process.kill()
            time.sleep(0.001)
    return 0.0 if start is None else time.monotonic() - start


def try_once(kind: str, seconds: float, expected: dict[str, bytes], old: Path, source: Path, folder: Path) -> list[str]:
    """Kill a command, call it again, and say what is wrong then."""
    wrong = []
    replaces = kind in ("overwrite", "save")
    if replaces:
        shutil.copytree(old if kind == "overwrite" else old / "posterior", folder)
    first, again = commands(kind, folder, source)
    writing(first, folder.parent, seconds)
    if replaces and not steady(folder, whole_record).record.finished:
        wrong.append("no finished posterior after the kill")
    found = subprocess.run(again, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if found.returncode:
        wrong.append(f"called again it ended with {found.returncode}: {found.stderr.strip()}")
    if results(folder) != expected:
        wrong.append("another result")
    return wrong + [f"left: {path.name}" for path in folder.parent.rglob(".*")]


def main() -> None:
    """Kill, and say what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--kinds", nargs="+", default=["fit", "save", "overwrite", "compare"])
    options = parser.parse_args()
    moments = random.Random(options.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        room = Path(scratch)
        old, source = room / "old", room / "source"
        for folder, seed in ((old, "5"), (source, "0")):
            subprocess.run([*CLI, "fit", *RUN, "--seed", seed, "--output", str(folder)], env=ENVIRONMENT, check=True)
        expected, durations = {}, {}
        for kind in options.kinds:
            whole = room / "whole" / kind
            whole.parent.mkdir(exist_ok=True)
            durations[kind] = writing(commands(kind, whole, source)[0], whole.parent)
            expected[kind] = results(whole)
        for number in range(options.kills):
            kind = options.kinds[number % len(options.kinds)]
            seconds = durations[kind] * moments.random()
            folder = room / str(number) / "run"
            folder.parent.mkdir()
            wrong = try_once(kind, seconds, expected[kind], old, source, folder)
            failed += bool(wrong)
            moment = f"{seconds:6.3f} s of {durations[kind]:6.3f}"
            print(f"{number + 1:3} {kind:9} killed after {moment}: {'; '.join(wrong) or 'whole'}", flush=True)
    print(f"{options.kills - failed} of {options.kills} kills lost nothing and came to the same result.")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
