"""A part of a state that is whatever it was given, and what a save made of it."""

from ray_stateful.storage import opening
from ray_stateful.storage.uris import resolve


class Part:
    def __init__(self, value=None):
        self.value = value

    def state_dict(self):
        return self.value

    def load_state_dict(self, value):
        self.value = value


def opened(report):
    """The checkpoint that a `SaveReport` tells of, read and checked."""
    return opening.parse(opening.fetch(*resolve(report.uri)))
