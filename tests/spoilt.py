"""Files with something wrong, for tests of what reads them."""

import os
from pathlib import Path

from hypothesis import strategies as st


class Evil:
    """Pickled, it makes the folder `target` when it is loaded by code that trusts it."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.target,)


def spoilt(data: st.DataObject, whole: bytes, least: int = 0) -> bytes:
    """`whole` with bytes replaced, left out or put in after its first `least` bytes, or cut short."""
    found = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(min(least, len(found)), len(found)))
        how = data.draw(st.sampled_from(["replace", "drop", "insert", "cut"]))
        if how == "replace":
            found[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
        elif how == "drop":
            del found[at : at + data.draw(st.integers(1, 40))]
        elif how == "insert":
            found[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        else:
            del found[at:]
    return bytes(found)
