"""Requests to save that come from outside the training loop: one mailbox per process.

Two threads meet here. The training thread looks into the mailbox at every step boundary (`save_requested`); when all
ranks have agreed to save, and have saved and reported, each of them waits to be taken down (`hold`), because whatever
it trained from here on would be thrown away. The other thread is the worker actor's own: Ray's controller runs `ask`
and `wait_until_held` on it (see `ray_stateful.ray_callbacks`).

Imports neither ray nor torch.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

logger = logging.getLogger(__name__)

# Seconds. For a rank that knows of the request from its peers, and has not received it itself yet.
DEFAULT_HOLD_S = 600.0


@dataclass(frozen=True, slots=True)
class Held:
    """A rank waits to be taken down.

    `saved` names the checkpoint that it saved and reported, `None` if the save failed. `is_counted`: Ray knows of it.
    """

    number: int
    saved: str | None
    is_counted: bool = True


@dataclass(slots=True)
class _Mailbox:
    requested: int = 0
    served: int = 0
    why: str = ""
    hold_s: float = DEFAULT_HOLD_S
    listening: bool = False
    held: Held | None = None


_mailbox = _Mailbox()
_changed = threading.Condition()


def save_requested() -> int:
    """The number of the newest request that this rank has not served; 0 if there is none.

    Local, and cheap enough for every step. A request may reach different ranks between different steps: what counts is
    the largest number that any rank has, which the caller finds out by a collective.
    """
    # Without the lock: it does no harm if a request is seen one step later.
    _mailbox.listening = True
    return _mailbox.requested if _mailbox.requested > _mailbox.served else 0


def stop_listening() -> None:
    """Say that this rank will not look for requests any more, so that nobody waits for it."""
    _mailbox.listening = False


def hold(number: int, saved: str | None, *, is_counted: bool = True) -> None:
    """Say that request `number` is served, and wait for the end of this process.

    Called on every rank, after its report. Returns if nobody takes the process down: then training goes on.

    Args:
        number: The largest that any rank had.
        saved: The name of the checkpoint that was saved and reported, `None` if that failed.
        is_counted: Whether it was Ray that was told of it.
    """
    began, mailbox = time.monotonic(), _mailbox
    with _changed:
        mailbox.held = Held(number, saved, is_counted)
        mailbox.served = max(mailbox.served, number)
        _changed.notify_all()
        logger.info("saved %s before a resize; waiting to be taken down", saved)
        # The limit may change while this waits: the request itself may arrive only now.
        while (left := began + mailbox.hold_s - time.monotonic()) > 0:
            _changed.wait(left)
        mailbox.held = None
    logger.warning("the resize (%s) did not come in %.0f s; training goes on", mailbox.why, mailbox.hold_s)


def ask(number: int, why: str, hold_s: float) -> bool:
    """Ask this rank to save at its next step boundary, and to wait there for at most `hold_s` seconds.

    Args:
        number: Larger than that of every earlier request, at least 1.
        why: For the log.

    Returns:
        Whether the training loop looks for requests: if it never did, or has ended, there is nothing to wait for.
    """
    with _changed:
        _mailbox.requested, _mailbox.why, _mailbox.hold_s = number, why, hold_s
        _changed.notify_all()
    return _mailbox.listening


def wait_until_held(number: int, timeout_s: float) -> Held | None:
    """What this rank says about request `number` or a later one, once served; `None` if that takes over `timeout_s`."""
    with _changed:
        _changed.wait_for(lambda: _mailbox.held is not None and _mailbox.held.number >= number, timeout_s)
        held = _mailbox.held
    return held if held is not None and held.number >= number else None
