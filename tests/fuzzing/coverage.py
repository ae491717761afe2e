"""Coverage-guided fuzzing of one parser: `python -m tests.fuzzing.coverage TARGET SECONDS FOLDER`.

Inputs that reach new code are kept in the folder, from which the next run goes on. Exits with a
status other than 0 after the first input that raised what is no refusal; it is then in the folder
as `crash-...`.
"""

import os
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["service", "models"], enable_loader_override=False):
    from tests.fuzzing.targets import BYTES, outcome_of

SEEDS = 100
MAX_BYTES = 8192


def main() -> None:
    name, seconds, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    make, attempt = BYTES[name]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(SEEDS):
        (folder / f"seed-{number}").write_bytes(make(number))

    def try_one(data: bytes) -> None:
        outcome_of(lambda: attempt(data))

    os.environ["PYTHONWARNINGS"] = "ignore"
    options = [f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", "-timeout=20",
               "-rss_limit_mb=4096", f"-artifact_prefix={folder}/", "-verbosity=0",
               "-print_final_stats=1"]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(folder)], try_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
