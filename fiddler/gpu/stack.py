"""The weights in all slots of an arena at once, as strided views."""

from dataclasses import dataclass, field

from torch import Tensor

from fiddler.types import ExpertWeights

ROW_ALIGNMENT = 16
"""Bytes that a grouped matmul's rows are multiples of. Source: `check_valid_strides_and_return_transposed` in
`GroupedMMUtils.h`."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The weights in all slots of an arena, as `ExpertWeights` has those in one: strided views, nothing is copied.

    Slots that hold something else are in it all the same, and must not be visited.
    """

    up: tuple[Tensor, ...]
    """One fused or ungated matrix `[n_slots, (2)I, H]`, or gate and up `[n_slots, I, H]` each."""
    down: Tensor
    """`[n_slots, H, I]`."""
    up_bias: tuple[Tensor, ...] = ()
    """Matching `up`, `[n_slots, (2)I]` or `[n_slots, I]` each."""
    down_bias: Tensor | None = None
    """`[n_slots, H]`."""
    aligned: bool = field(init=False)
    """Whether a grouped matmul takes the matrices."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "aligned", all(_aligned(matrix) for matrix in (*self.up, self.down)))

    @classmethod
    def over(cls, slots: Tensor, first: ExpertWeights) -> "Stack":
        """Return views of `slots`, uint8 `[n_slots, slot_bytes]`, that lie in each slot as `first` does in slot 0.

        Raises `ValueError` where a part of `first` is not in slot 0, or slots are not aligned to its dtype.
        """
        up, down = [part for part in first.up if isinstance(part, Tensor)], first.down
        if len(up) != len(first.up) or not isinstance(down, Tensor):
            raise ValueError("quantised experts have no stack")
        return cls(
            up=tuple(_stacked(slots, part) for part in up),
            down=_stacked(slots, down),
            up_bias=tuple(_stacked(slots, part) for part in first.up_bias),
            down_bias=None if first.down_bias is None else _stacked(slots, first.down_bias),
        )

    def of(self, slot: int) -> ExpertWeights:
        """Return the weights in one slot."""
        return self._part(slot)

    def between(self, first: int, stop: int) -> ExpertWeights:
        """Return the weights in slots `first … stop-1`: each part has the slot as one more dimension, its first."""
        return self._part(slice(first, stop))

    def _part(self, key: int | slice) -> ExpertWeights:
        return ExpertWeights(
            up=tuple(part[key] for part in self.up),
            down=self.down[key],
            up_bias=tuple(part[key] for part in self.up_bias),
            down_bias=None if self.down_bias is None else self.down_bias[key],
        )


def _stacked(slots: Tensor, part: Tensor) -> Tensor:
    """Return the tensors in all slots that lie where `part` lies in the first one."""
    item, offset = part.element_size(), part.data_ptr() - slots.data_ptr()
    extent = sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True)) + 1
    if offset < 0 or offset + extent * item > slots.shape[1]:
        raise ValueError(
            f"a part of {tuple(part.shape)} at byte {offset} is not in a slot of {slots.shape[1]} bytes"
        )
    if offset % item or slots.stride(0) % item:
        raise ValueError(f"slots of {slots.stride(0)} bytes, or byte {offset} of one, are not aligned to {item}")
    typed = slots.view(part.dtype)
    shape, stride = (slots.shape[0], *part.shape), (typed.stride(0), *part.stride())
    return typed.as_strided(shape, stride, typed.storage_offset() + offset // item)


def _aligned(matrix: Tensor) -> bool:
    """Whether a grouped matmul takes `[n_slots, out, in]`, and rows of `in` numbers without gaps."""
    short, long = sorted(matrix.stride()[1:])
    strides = (long, matrix.stride(0), matrix.shape[2])
    addresses = (matrix.data_ptr(), *(stride * matrix.element_size() for stride in strides))
    return short == 1 and all(address % ROW_ALIGNMENT == 0 for address in addresses)
