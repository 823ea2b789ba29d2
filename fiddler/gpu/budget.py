"""Divides a GPU's memory budget: the dense part, keys and values and the workspace first, slots get the rest."""

from dataclasses import dataclass, replace

from fiddler.errors import ConfigError

LEFT_FREE_BYTES = 2**29
"""Free GPU memory the engine does not take unless told: allocations are rounded up, and a screen may be drawn in
the same memory. Assumed, not measured."""

GIVEN_UP = 8
"""On out-of-memory, free at least 1/8 of the slots (assumed). Six times in a row leaves about 45 %."""


@dataclass(frozen=True, slots=True)
class Division:
    """Parts of a budget; bytes, but for `slots`."""

    budget: int
    dense: int
    """Dense weights."""
    kv: int
    """Keys and values of all running requests."""
    workspace: int
    """Bytes that a step needs beside: activations, rows on their way, the libraries' own buffers."""
    slots: int
    """Number of slots."""
    slot_bytes: int
    """Bytes of each slot."""

    @property
    def free(self) -> int:
        """Bytes left over."""
        return self.budget - self.dense - self.kv - self.workspace - self.slots * self.slot_bytes

    def table(self) -> str:
        """Return the parts as a table, a line each."""
        return _table(self, "free", self.free)


def budget(asked: int | None, free_bytes: int) -> int:
    """Return the bytes the engine may take of a GPU that has `free_bytes`: all that was asked for, or nearly all.

    Raises `ConfigError` where more was asked for than is free.
    """
    if asked is None:
        return max(free_bytes - LEFT_FREE_BYTES, 0)
    if asked > free_bytes:
        raise ConfigError(
            f"vram_budget={asked} is more than the {free_bytes} bytes of GPU memory that are free; "
            f"set it to at most {free_bytes}, or end what else uses the GPU"
        )
    return asked


def divide(
    budget_bytes: int,
    *,
    dense_bytes: int,
    kv_token_bytes: int,
    kv_tokens: int,
    workspace_bytes: int,
    slot_bytes: int,
    n_experts: int,
    asked_slots: int | None,
) -> Division:
    """Divide a budget; slots are as many as fit, but no more than there are experts or were asked for.

    `kv_token_bytes` are the bytes of one token's keys and values over all layers. Raises `ConfigError`, with a
    table of needs and budget, where not even one slot fits or, if none was asked for, where the parts before slots
    do not fit.
    """
    most = n_experts if asked_slots is None else min(asked_slots, n_experts)
    least = min(most, 1)
    wanted = Division(budget_bytes, dense_bytes, kv_tokens * kv_token_bytes, workspace_bytes, least, slot_bytes)
    if wanted.free < 0:
        raise ConfigError(_too_small(wanted, kv_token_bytes))
    return replace(wanted, slots=min(most, least + wanted.free // slot_bytes))


def shrunk(room: Division, by_bytes: int) -> Division:
    """Return the room after memory ran out by `by_bytes`: slots are given up, and the workspace has their bytes.

    At least one of `GIVEN_UP` slots goes, and all go where that is not enough. Without slots there is nothing to
    give, and the room comes back as it is.
    """
    n_given = min(room.slots, max(-(-by_bytes // room.slot_bytes), -(-room.slots // GIVEN_UP)))
    return replace(room, slots=room.slots - n_given, workspace=room.workspace + n_given * room.slot_bytes)


def _too_small(wanted: Division, kv_token_bytes: int) -> str:
    missing = -wanted.free
    what = "one slot" if wanted.slots else "a model without slots"
    return "\n".join(
        [
            f"GPU memory is too small for {what}:",
            _table(wanted, "missing", missing),
            f"set {_advice(wanted, missing, kv_token_bytes)}",
        ]
    )


def _advice(wanted: Division, missing: int, kv_token_bytes: int) -> str:
    """Return which options to change, and to what; only changes that would help."""
    ways = [f"vram_budget to at least {wanted.budget + missing}, if the GPU has as much free"]
    slot_bytes = wanted.slots * wanted.slot_bytes
    fewer = "kv_tokens (or max_context, where kv_tokens is left out) to at most"
    if (n_tokens := _tokens(wanted.kv - missing, kv_token_bytes)) > 0:
        ways.append(f"{fewer} {n_tokens}")
    if missing <= slot_bytes:
        ways.append("slots=0")
    elif n_tokens <= 0 and (n_tokens := _tokens(wanted.kv - missing + slot_bytes, kv_token_bytes)) > 0:
        ways.append(f"slots=0 and {fewer} {n_tokens}")
    return "; or ".join(ways)


def _tokens(n_bytes: int, token_bytes: int) -> int:
    return n_bytes // token_bytes if token_bytes else 0


def _table(room: Division, left: str, left_bytes: int) -> str:
    rows = [
        ("budget", room.budget, ""),
        ("dense weights", room.dense, ""),
        ("keys and values", room.kv, ""),
        ("workspace", room.workspace, ""),
        ("slots", room.slots * room.slot_bytes, f"  {room.slots} of {room.slot_bytes} bytes"),
        (left, left_bytes, ""),
    ]
    return "\n".join(f"  {name:<16}{n_bytes / 2**20:>12,.1f} MiB{note}" for name, n_bytes, note in rows)
