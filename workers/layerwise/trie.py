"""Plans as a trie of the steps they execute, so that what plans have in common is executed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from workers.runtime.gaps import gaps
from workers.runtime.plan import Action, SkipPlan


@dataclass(frozen=True)
class Execute:
    """A decoder layer is run, frozen or bypassed."""

    layer: int
    action: Action


@dataclass(frozen=True)
class Repair:
    """The state behind the kept layer ``after`` is transformed, at the end of the run of skips behind it, if any.

    ``prefix`` is the plan's text up to the end of that run (``"RRFSS"``): it names what was executed and repaired
    before, so it identifies the transformation among all plans. ``last`` tells that no executed layer follows.
    """

    after: int
    prefix: str
    last: bool

    @property
    def skipped(self) -> range:
        """The skipped layers."""
        return range(self.after + 1, len(self.prefix))


Step = Execute | Repair


def steps_of(plan: SkipPlan, *, repairs: bool = False, drift: bool = False) -> tuple[Step, ...]:
    """What a plan does to the hidden states, in order. Skips do nothing, unless their runs are repaired.

    With ``drift`` the states behind all kept layers above the first repaired one are repaired too.
    """
    steps: list[Step] = []
    ends = {gap.layer: gap.end + 1 for gap in gaps(plan, drift=drift)} if repairs else {}
    for layer in plan.kept:
        steps.append(Execute(layer, plan[layer]))
        if layer in ends:
            end = ends[layer]
            steps.append(Repair(layer, plan.text[:end], last=end == len(plan)))
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
    def reached_by_repair(self) -> bool:
        """Whether some plan repairs the state of this node, which then needs the MLP's part apart."""
        return any(isinstance(step, Repair) for step in self.children)

    @property
    def branching(self) -> bool:
        """Whether more than one continuation starts here."""
        return len(self.children) + bool(self.plans) > 1

    def walk(self) -> Iterator[Node]:
        """This node and all below it, depth first."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    def ancestry(self) -> list[Node]:
        """The nodes from the root to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


def build_trie(plans: Iterable[SkipPlan], *, repairs: bool = False, drift: bool = False) -> Node:
    """The root of the trie of ``plans``; equal plans are one. What ``repairs`` and ``drift`` say: :func:`steps_of`."""
    root = Node(())
    for plan in sorted(set(plans)):
        node = root
        for step in steps_of(plan, repairs=repairs, drift=drift):
            if step not in node.children:
                node.children[step] = Node((*node.path, step), node)
            node = node.children[step]
        node.plans.append(plan.text)
    return root


def executions(root: Node) -> int:
    """Layer executions that the trie takes for each sample: its edges, repairs apart."""
    return sum(isinstance(node.step, Execute) for node in root.walk() if node.path)
