"""Items whose pickle makes something other than it seems to, by names, states and numbers that torch's reader takes."""

from __future__ import annotations

import pickle

from attacks.archives import item_with, name_of
from attacks.corpus import attack


@attack(foreign=True)
def item_of_copies_by_an_old_name(workshop):
    """Counters of one list of 100,000 numbers, hundreds of them, by the name of a module of Python 2."""
    numbers = b"".join(pickle.BININT + number.to_bytes(4, "little") for number in range(100_000))
    listed = pickle.EMPTY_LIST + pickle.MARK + numbers + pickle.APPENDS + pickle.BINPUT + b"\0"
    name = name_of("UserDict", "Counter") + pickle.BINPUT + b"\1"
    again = (pickle.BINGET + b"\1" + pickle.BINGET + b"\0" + pickle.TUPLE1 + pickle.REDUCE) * 300
    item_with(workshop, pickle.EMPTY_LIST + pickle.MARK + listed + name + again + pickle.APPENDS)
