"""FactoredLinear, PivotedLinear and AtomLinear: the modules that layershare adds to a model."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from layershare.errors import TieError

_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
FACTORS = ("base", "up", "down", "diagonal", "atoms", "mix")
ORDER = "order"
GATE = "layershare_gate"


class FactoredLinear(nn.Linear):
    """A linear map ``x @ (base + up @ down + diagonal).T + bias`` whose factors may be shared with other positions.

    With a base it is a tied weight plus a private correction; without, a shared basis (one factor tied, the other
    private) or a plain low-rank factorisation (both private).

    Shapes: ``base`` (out, in) or None, ``up`` (out, rank), ``down`` (rank, in), ``diagonal`` (min(out, in)) or None,
    ``bias`` (out) or None.
    ``weight`` is computed on each access, for code that reads it. It is no parameter: assigning one is a TieError.
    ``transposed`` tells that the module stands for a ``Conv1D``, whose ``weight`` is (in, out).
    """

    # transformers must not initialise it: the factors come from ``share`` or from a checkpoint, never from chance.
    _is_hf_initialized = True
    base: Tensor | None
    diagonal: Tensor | None
    down: Tensor
    up: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, base: bool, bias: bool, transposed: bool = False,
        diagonal: bool = False, device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.transposed = rank, transposed

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.register_parameter("base", parameter(out_features, in_features) if base else None)
        self.down = parameter(rank, in_features)
        self.up = parameter(out_features, rank)
        self.register_parameter("diagonal", parameter(min(out_features, in_features)) if diagonal else None)
        self.register_parameter("bias", parameter(out_features) if bias else None)

    @classmethod
    def standing_for(
        cls, module: nn.Module, rank: int, *, base: bool, diagonal: bool = False
    ) -> "FactoredLinear":
        """A factored module, its factors not yet set, in place of a Linear or Conv1D. It takes over the bias itself."""
        weight, transposed = module.get_parameter("weight"), isinstance(module, Conv1D)
        out_features, in_features = reversed(weight.shape) if transposed else weight.shape
        factored = cls(
            in_features, out_features, rank, base=base, bias=False, transposed=transposed, diagonal=diagonal,
            device=weight.device, dtype=weight.dtype,
        ).requires_grad_(weight.requires_grad)  # fmt: skip
        factored.bias = module.bias  # type: ignore[assignment]
        return factored.train(module.training)

    @property
    def factor(self) -> Tensor:
        """One of the factors that every such map has: they are of one kind of number, on one device."""
        return self.up

    def reset_parameters(self) -> None:
        """Nothing, for the same reason."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        # While a model is loaded, some factors are on the meta device until the ties are made.
        if any(factor.is_meta for factor in self.parameters(recurse=False)):
            shape = (self.out_features, self.in_features)
            return torch.empty(
                shape[::-1] if self.transposed else shape, dtype=self.factor.dtype, device="meta"
            )
        rows = self.rows()
        return rows.T if self.transposed else rows

    def rows(self) -> Tensor:
        """The matrix (out, in) that it stands for."""
        dense = self.up @ self.down
        if self.base is not None:
            dense = dense + self.base
        if self.diagonal is not None:
            dense = torch.diagonal_scatter(dense, dense.diagonal() + self.diagonal)
        return dense

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif not self._is_own(value):  # PEFT assigns the weight that was there when it takes an adapter off
            raise TieError(
                "the weight of a factored map is computed from its factors, so no other can be assigned.",
                "Leave modules of the class FactoredLinear out, or call layershare.unshare(model) first.",
            )

    def _is_own(self, value: Any) -> bool:
        weight = self.weight
        if type(value) not in (Tensor, nn.Parameter) or value.shape != weight.shape:
            return False
        return value.is_meta or torch.equal(value, weight)

    def read_by(self, leaf: str, x: Tensor) -> Tensor:
        """What a factor multiplies when the map gets ``x`` (..., in)."""
        return F.linear(x, self.down) if leaf == "up" else x

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(self.read_by("up", x), self.up, self.bias)
        if self.base is not None:
            low = low + F.linear(x, self.base)
        if self.diagonal is not None:
            side = len(self.diagonal)
            low = low + F.pad(x[..., :side] * self.diagonal, (0, self.out_features - side))
        return low

    def dense(self) -> nn.Module:
        """The equivalent ``nn.Linear`` or ``Conv1D`` with a weight of its own."""
        weight = self.weight.detach().clone()
        if self.transposed:
            module: nn.Module = Conv1D(self.out_features, self.in_features).to(weight)
        else:
            module = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None).to(weight)
        module.weight = nn.Parameter(weight.contiguous(), requires_grad=self.factor.requires_grad)
        module.bias = self.bias
        return module.train(self.training)

    def extra_repr(self) -> str:
        base = "base + " if self.base is not None else ""
        return (
            f"{self.in_features}, {self.out_features}, {base}rank={self.rank}, bias={self.bias is not None}"
        )


class PivotedLinear(FactoredLinear):
    """A low-rank map ``up @ [1, down]`` of inputs put in ``order``: as many of them as its rank, the pivots, are taken
    as they are, which spares rank² numbers of the same product (PIFA: Zhao et al., 2025, 2501.19090).

    Shapes: ``up`` (out, rank), ``down`` (rank, in - rank), ``order`` (in), int32, the pivots first. Otherwise as
    :class:`FactoredLinear`.
    """

    order: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool, transposed: bool = False,
        device: Any = None, dtype: torch.dtype | None = None, **_: bool,
    ) -> None:  # fmt: skip
        super().__init__(
            in_features,
            out_features,
            rank,
            base=False,
            bias=bias,
            transposed=transposed,
            device=device,
            dtype=dtype,
        )
        self.down = nn.Parameter(torch.empty(rank, in_features - rank, device=device, dtype=dtype))
        self.register_buffer(ORDER, torch.arange(in_features, device=device, dtype=torch.int32))

    def rows(self) -> Tensor:
        return unpivoted(self.up, self.down, self.order)

    def read_by(self, leaf: str, x: Tensor) -> Tensor:
        pivots, others = self.order.long().split([self.rank, self.in_features - self.rank])
        rest = _some(x, others)
        return _some(x, pivots) + F.linear(rest, self.down) if leaf == "up" else rest

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pivoted"


def orders_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and order of each pivoted map: which inputs are pivots is stored as well."""
    for name, module in model.named_modules():
        if isinstance(module, PivotedLinear):
            yield f"{name}.{ORDER}", module.order


def _some(x: Tensor, order: Tensor) -> Tensor:
    """These entries of the last axis. Of more than two axes torch takes up to 20 times as long."""
    if x.dim() < 3 or _exporting():
        return x.index_select(-1, order)
    return x.flatten(0, -2).index_select(-1, order).unflatten(0, x.shape[:-1])


def unpivoted(up: Tensor, down: Tensor, order: Tensor) -> Tensor:
    """The matrix (out, in) of a :class:`PivotedLinear`."""
    dense = torch.cat([up, up @ down], dim=1)
    return torch.empty_like(dense).index_copy(1, order.long(), dense)


class AtomLinear(FactoredLinear):
    """A linear map ``x @ (sum_s mix_s atoms_s).T + bias``: atoms are shared with other positions, the mix is private
    (MASA: 2508.04581).

    Shapes: ``atoms`` (count * out, in), one below the other, ``mix`` (count), ``bias`` (out) or None. Otherwise as
    :class:`FactoredLinear`.
    """

    atoms: Tensor
    mix: Tensor

    def __init__(
        self, in_features: int, out_features: int, count: int, *, bias: bool, transposed: bool = False,
        device: Any = None, dtype: torch.dtype | None = None, **_: bool,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.transposed = count, transposed
        self.atoms = nn.Parameter(torch.empty(count * out_features, in_features, device=device, dtype=dtype))
        self.mix = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))

    @property
    def factor(self) -> Tensor:
        return self.atoms

    def rows(self) -> Tensor:
        return (self.mix @ self.atoms.view(self.rank, -1)).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if not _exporting():
            return F.linear(x, self.rows(), self.bias)
        # In a graph the sum over atoms would be computed beforehand, and stored for every position.
        each = F.linear(x, self.atoms).unflatten(-1, (self.rank, self.out_features))
        mixed = self.mix @ each
        return mixed if self.bias is None else mixed + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, atoms={self.rank}, bias={self.bias is not None}"


def kind_of(module: nn.Module) -> str:
    """``linear`` or ``conv1d`` for a plain linear map that can be factored, ``other`` for everything else."""
    if type(module) is Conv1D:
        return "conv1d"
    if isinstance(module, FactoredLinear):
        return "conv1d" if module.transposed else "linear"
    # Only the exact class: a subclass may read its weight in a way of its own.
    return "linear" if type(module) is nn.Linear else "other"
