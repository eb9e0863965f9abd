"""Arrange plans as a trie of the steps they execute, so that common beginnings are executed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from workers.runtime.gaps import gaps
from workers.runtime.plan import Action, SkipPlan


@dataclass(frozen=True)
class Execute:
    """A decoder layer is run, under an action that leaves some of it."""

    layer: int
    action: Action


@dataclass(frozen=True)
class ApplyMap:
    """The state behind the kept layer ``after`` is mapped, at the end of the run of skips behind it, if any.

    ``prefix`` is the plan's text up to the end of that run (``"RRFSS"``): it names what was executed and mapped
    before, so it identifies the map among those of all plans.
    """

    after: int
    prefix: str


Step = Execute | ApplyMap


def steps_of(plan: SkipPlan, *, maps: bool = False, drift: bool = False) -> tuple[Step, ...]:
    """List the steps of a plan, in order. Skips do nothing, unless ``maps`` compensate for their runs.

    With ``drift`` the states behind all kept layers above the first mapped one are mapped too.
    """
    steps: list[Step] = []
    ends = {gap.layer: gap.end + 1 for gap in gaps(plan, drift=drift)} if maps else {}
    for layer in plan.kept:
        steps.append(Execute(layer, plan[layer]))
        if layer in ends:
            steps.append(ApplyMap(layer, plan.text[: ends[layer]]))
    return tuple(steps)


@dataclass
class Node:
    """A state that some plans reach; ``path`` are the steps to it."""

    path: tuple[Step, ...]
    parent: Node | None = None
    children: dict[Step, Node] = field(default_factory=dict)
    plans: list[str] = field(default_factory=list)
    """Plans that end here."""

    @property
    def step(self) -> Step:
        """The last step of the path; the root has none."""
        return self.path[-1]

    @property
    def map_follows(self) -> bool:
        """Whether some plan maps the state of this node, which then needs what the map acts on."""
        return any(isinstance(step, ApplyMap) for step in self.children)

    @property
    def branching(self) -> bool:
        """Whether more than one continuation starts here."""
        return len(self.children) + bool(self.plans) > 1

    def walk(self) -> Iterator[Node]:
        """Yield this node and all below it, depth first."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    def ancestry(self) -> list[Node]:
        """Return the nodes from the root to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


def build_trie(plans: Iterable[SkipPlan], *, maps: bool = False, drift: bool = False) -> Node:
    """Return the root of the trie of ``plans``; equal plans are one. On ``maps`` and ``drift``: :func:`steps_of`."""
    root = Node(())
    for plan in sorted(set(plans)):
        node = root
        for step in steps_of(plan, maps=maps, drift=drift):
            if step not in node.children:
                node.children[step] = Node((*node.path, step), node)
            node = node.children[step]
        node.plans.append(plan.text)
    return root
