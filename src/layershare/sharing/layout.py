"""Layout: a plan resolved on the stacks of one model. Names, shapes and counts, no tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from layershare.errors import PlanError, nearest
from layershare.plan import Gate, Group, SharingPlan, StackPlan
from layershare.sharing.embedding import TableJob
from layershare.sharing.kv import belongs, is_map
from layershare.stacks import PARTS, Stack, Weight, same_stack


@dataclass(frozen=True)
class Job:
    """One parameter of a group: the same name inside the layer, over several positions."""

    stack: str
    group: Group
    weight: Weight
    layers: tuple[int, ...]
    """Indices into the stack as it is now, after any drop."""
    source: int = 0
    """With merge ``pick``: which of ``sources`` gives its weights."""
    lender: int | None = None
    """A layer outside of ``layers`` that gives its weights."""
    kv: bool = False
    """Keys or values depend on it, and the first layer alone computes them."""

    @property
    def factored(self) -> bool:
        return self.group.rank > 0 or self.group.method == "atoms"

    @property
    def full_rank(self) -> bool:
        """Whether the factors could hold any matrix."""
        return self.group.rank > 0 and self.group.rank >= min(self.weight.shape)

    @property
    def saves(self) -> bool:
        """Whether less is stored than without the job."""
        return not self.full_rank and self.stored < self.weight.size * len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of the original parameters, one a layer; the first one owns."""
        return tuple(f"{self.stack}.{layer}.{self.weight.name}" for layer in self.layers)

    @property
    def sources(self) -> tuple[str, ...]:
        """Full names of the parameters that the values are made of: ``names``, and the lender's if there is one."""
        lent = () if self.lender is None else (f"{self.stack}.{self.lender}.{self.weight.name}",)
        return (*self.names, *lent)

    @property
    def uses_activations(self) -> bool:
        """Whether the values depend on what the maps see."""
        return self.weight.kind != "other" and (self.factored or self.group.merge == "regmean")

    @property
    def private(self) -> bool:
        """Whether each position has factors of its own."""
        return self.factored and set(self.tied_leaves) != {"down", "up"}

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of the modules that hold them."""
        return tuple(name.rpartition(".")[0] for name in self.names)

    @property
    def tied_leaves(self) -> tuple[str, ...]:
        """The parameters that the modules share: the weight itself, or factors of it."""
        if not self.factored:
            return (self.weight.name.rpartition(".")[2],)
        if self.group.method != "basis":
            return ("base",) if self.group.method == "tie" else ("atoms",)
        return {"input": ("down",), "output": ("up",), "both": ("down", "up")}[self.group.side]

    @property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Full names of the parameters that are one object after sharing, one tuple an object; the first name owns."""
        return tuple(tuple(f"{module}.{leaf}" for module in self.modules) for leaf in self.tied_leaves)

    @property
    def stored(self) -> int:
        """Numbers stored for all the layers of the job."""
        return self.stored_at(self.group.rank)

    def stored_at(self, rank: int) -> int:
        """The same at another rank."""
        if not self.factored:
            return self.weight.size
        if self.group.method == "atoms":
            return self.group.atoms * (self.weight.size + len(self.layers))
        rows, columns = self.weight.shape
        out_features, in_features = (columns, rows) if self.weight.kind == "conv1d" else (rows, columns)
        up, down = out_features * rank, rank * in_features
        if self.group.pivots:
            down += self.indices - rank * rank
        if self.group.method == "tie":
            diagonal = min(self.weight.shape) if self.group.diagonal else 0
            return self.weight.size + len(self.layers) * (up + down + diagonal)
        times = len(self.layers)
        return sum(
            size * (1 if leaf in self.tied_leaves else times) for leaf, size in (("up", up), ("down", down))
        )

    @property
    def indices(self) -> int:
        """How many of the numbers are integers of 32 bits: which inputs are the pivots."""
        return self.weight.shape[0 if self.weight.kind == "conv1d" else 1] if self.group.pivots else 0


@dataclass(frozen=True)
class Layout:
    """Everything that sharing does to one model, in its own names."""

    jobs: tuple[Job, ...]
    gates: tuple[tuple[str, Gate], ...]
    """Full name of the layer module, and its gate."""
    notes: tuple[str, ...] = ()
    """What was left private although the plan names its part, and why."""
    tables: tuple[TableJob, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether the model needs layershare to load."""
        return bool(self.jobs or self.gates or self.tables)

    @property
    def lent(self) -> list[tuple[str, ...]]:
        """Maps to keys, and to values, that give what the first of them gave: full names of modules, a tuple a kind."""
        return [job.modules for job in self.jobs if job.kv and len(job.weight.shape) > 1]

    @property
    def ties(self) -> Iterator[tuple[str, ...]]:
        yield from (tie for job in self.jobs if len(job.layers) > 1 for tie in job.ties)
        yield from (tie for table in self.tables if len(table.modules) > 1 for tie in table.ties)


def drop(stack: Stack, positions: Sequence[int]) -> Stack:
    """The stack without some positions."""
    kept = [i for i in range(stack.length) if i not in positions]
    return Stack(
        stack.name, tuple(stack.classes[i] for i in kept), tuple(stack.layers[i] for i in kept), stack.tied
    )


def find(stacks: Sequence[Stack], name: str) -> Stack:
    """The stack called ``name``. A base model and the same model under a head differ by a prefix, which may be missing.

    Raises PlanError naming the nearest stack.
    """
    exact = [stack for stack in stacks if stack.name == name]
    akin = [stack for stack in stacks if same_stack(stack.name, name)]
    if len(found := exact or akin) != 1:
        raise PlanError(f"the model has no stack {name!r}.", nearest(name, [stack.name for stack in stacks]))
    return found[0]


def present(stacks: Sequence[Stack], plan: SharingPlan) -> SharingPlan:
    """``plan`` without what it says of stacks that the model does not have; all of it if it has none of them."""
    exact = {stack.name for stack in stacks} & {one.name for one in plan.stacks}
    left = [stack.name for stack in stacks if stack.name not in exact]
    kept = tuple(
        one for one in plan.stacks if one.name in exact or any(same_stack(name, one.name) for name in left)
    )
    return plan.model_copy(update={"stacks": kept or plan.stacks})


def resolve(stacks: Sequence[Stack], plan: SharingPlan) -> Layout:
    """Bring ``plan`` and the ``stacks`` of a model, its dropped positions already gone, together.

    Raises :class:`~layershare.errors.PlanError` when a stack is missing, has another length, a part matches nothing,
    a parameter would be in two groups, or a rank is not below the size of its matrix.
    """
    jobs: list[Job] = []
    gates: list[tuple[str, Gate]] = []
    notes: list[str] = []
    done: dict[str, str] = {}
    for one in plan.stacks:
        stack = find(stacks, one.name)
        if done.setdefault(stack.name, one.name) != one.name:
            raise PlanError(
                f"stack {stack.name!r} is planned twice, as {done[stack.name]!r} and as {one.name!r}."
            )
        if stack.length != len(one.kept):
            after = " after dropping" if one.drop else ""
            raise PlanError(
                f"stack {one.name!r} has {stack.length} layers, the plan is for {len(one.kept)}{after}.",
                "Was it made for another model?",
            )
        index = {position: i for i, position in enumerate(one.kept)}
        taken: dict[str, Group] = {}
        for group in one.groups:
            found = list(_jobs(stack, one, group, index, notes))
            jobs += found
            for name in (name for job in found for name in job.names):
                if name in taken:
                    raise PlanError(f"{name} is in two groups: {_words(taken[name])} and {_words(group)}.")
                taken[name] = group
        gates += [(f"{stack.name}.{index[gate.position]}", gate) for gate in one.gates]
    return Layout(tuple(jobs), tuple(gates), tuple(dict.fromkeys(notes)))


def _jobs(
    stack: Stack, plan: StackPlan, group: Group, index: dict[int, int], notes: list[str]
) -> Iterator[Job]:
    likes: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    weights: dict[tuple[str, tuple[int, ...]], Weight] = {}
    own = list(_keys_and_values(stack, plan, group, [index[p] for p in group.positions])) if group.kv else []
    yield from own
    for layer in (index[position] for position in group.positions):
        for weight in stack.layers[layer]:
            if not (group.kv and belongs(weight.name)) and any(matches(weight, part) for part in group.parts):
                likes.setdefault((weight.name, weight.shape), []).append(layer)
                weights[weight.name, weight.shape] = weight
    for part in group.parts:
        if not any(matches(weight, part) for weight in (*weights.values(), *(job.weight for job in own))):
            names = {w.name for layer in stack.layers for w in layer}
            present = [p for p in PARTS if any(w.part == p for layer in stack.layers for w in layer)]
            raise PlanError(
                f"part {part!r} matches no parameter at positions {list(group.positions)} of {plan.name!r}.",
                nearest(part, [*present, *names]) if "*" not in part else f"Parts: {', '.join(present)}.",
            )
    # A rank that suits the large matrices of a basis may be more than all that a small one has.
    saving = group.method == "basis" and any(
        weights[key].factorable and Job(stack.name, group, weights[key], tuple(layers)).saves
        for key, layers in likes.items()
    )
    for key, layers in likes.items():
        weight = weights[key]
        source, lender = _source(stack, group, index, layers, weight, notes)
        if len(layers) < len(group.positions) and len(group.positions) > 1:
            where = [plan.kept[layer] for layer in layers]
            fate = "shared among these" if len(where) > 1 else "it stays private"
            notes.append(f"{weight.name} {list(weight.shape)} stands at positions {where} only: {fate}")
        if (group.rank or group.atoms) and not weight.factorable:
            if group.method != "tie":
                has = "basis" if group.method == "basis" else "atoms"
                notes.append(f"{weight.name} is no plain linear map: it has no {has}, it stays private")
                continue
            notes.append(f"{weight.name} is no plain linear map: tied without a private correction")
            group_without = group.model_copy(update={"rank": 0, "diagonal": False})
            if len(layers) > 1:
                yield Job(stack.name, group_without, weight, tuple(layers), source, lender)
        elif (job := Job(stack.name, group, weight, tuple(layers), source, lender)).full_rank and not saving:
            raise PlanError(
                f"rank {group.rank} is not below the smaller side of {weight.name} {list(weight.shape)}.",
                f"Take at most {min(weight.shape) - 1}, or leave the parameter out of the group.",
            )
        elif saving and not job.saves:
            notes.append(
                f"{weight.name} {list(weight.shape)}: factors of rank {group.rank} save nothing, it stays private"
            )
        elif len(layers) > 1 or group.method != "tie":
            yield job


def _keys_and_values(stack: Stack, plan: StackPlan, group: Group, layers: list[int]) -> Iterator[Job]:
    """Jobs of all that the keys and values of ``layers`` depend on: the first one's serves all, without corrections."""
    where = f"positions {list(group.positions)} of {plan.name!r}"
    found = [{w.name: w for w in stack.layers[layer] if belongs(w.name)} for layer in layers]
    maps = [name for name, weight in found[0].items() if is_map(name) and len(weight.shape) > 1]
    if len(maps) != 2:
        why = "have more than one attention" if maps else "have no maps to keys and to values of their own"
        raise PlanError(f"kv = true: {where} {why}.", "Leave kv out of this group.")
    if any(one != found[0] for one in found):
        raise PlanError(
            f"kv = true: keys and values of {where} are not alike.", "Group positions of one kind."
        )
    plain = group.model_copy(update={"merge": "first", "source": None, "rank": 0, "diagonal": False})
    for weight in found[0].values():
        yield Job(stack.name, plain, weight, tuple(layers), kv=True)


def _source(
    stack: Stack, group: Group, index: dict[int, int], layers: list[int], weight: Weight, notes: list[str]
) -> tuple[int, int | None]:
    """Which of the sources gives its weights, and the lender, if the source is not in the group."""
    if group.source is None:
        return 0, None
    if (layer := index[group.source]) in layers:
        return layers.index(layer), None
    if any(
        (one.name, one.shape, one.kind) == (weight.name, weight.shape, weight.kind)
        for one in stack.layers[layer]
    ):
        return len(layers), layer
    notes.append(
        f"{weight.name} does not stand like this at position {group.source}: its first user gives it"
    )
    return 0, None


def matches(weight: Weight, part: str) -> bool:
    """Whether ``part``, a part's name or a glob over names inside the layer, means this parameter."""
    return weight.part == part if part in PARTS else fnmatchcase(weight.name, part)


def factors(weight: Weight, part: str) -> bool:
    """Whether a rank on ``part`` factors this parameter."""
    return weight.factorable and matches(weight, part)


def _words(group: Group) -> str:
    return f"{'+'.join(group.parts)} of positions {list(group.positions)}"
