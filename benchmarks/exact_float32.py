"""Which float32 numbers from 0 to 1 change when their shortest decimal is read as a double and rounded? Tries them all.

    python -m benchmarks.exact_float32      # about five minutes on one core

The table is read that way (`clcnet.data.table_csv`), and mends the numbers that this prints.
"""

import numpy as np
import pyarrow as pa
from tqdm import tqdm

NUMBERS_A_STEP = 1 << 22


def changed_numbers(first: int, stop: int) -> list[tuple[str, str]]:
    """The bits and the decimal of every changed number among those with bits from `first` to `stop` - 1."""
    bits = np.arange(first, stop, dtype=np.uint32)
    decimals = pa.array(bits.view(np.float32)).cast(pa.string())
    through_double = decimals.cast(pa.float64()).to_numpy().astype(np.float32)
    changed = np.flatnonzero(through_double.view(np.uint32) != bits)
    return [(hex(bits[index]), decimals[int(index)].as_py()) for index in changed]


def main() -> None:
    stop = int(np.float32(1).view(np.uint32)) + 1
    changed = []
    for first in tqdm(range(0, stop, NUMBERS_A_STEP), unit_scale=NUMBERS_A_STEP, unit="number"):
        changed += changed_numbers(first, min(first + NUMBERS_A_STEP, stop))
    print(f"{len(changed)} of {stop} float32 numbers from 0 to 1 change: {changed}")


if __name__ == "__main__":
    main()
