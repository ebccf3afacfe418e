"""The tree of roles of an anatomy: what the steps of a selector walk through. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from surgery.core.site import Site


def split_role(role: str) -> list[tuple[str, int | None]]:
    """``encoder.layers[3].attn.q`` as (name, index) pairs; a role in quotes is one name."""
    if role.startswith('"'):
        end = role.find('"', 1)
        rest = role[end + 1 :].lstrip(".")
        return [(role[: end + 1], None), *(split_role(rest) if rest else [])]
    parts: list[tuple[str, int | None]] = []
    for word in role.split("."):
        name, bracket, number = word.partition("[")
        parts.append((name, int(number.rstrip("]")) if bracket else None))
    return parts


@dataclass(eq=False)
class RoleNode:
    """One step of some roles; ``site`` is the site whose role ends here, ``order`` its rank in the model."""

    name: str
    index: int | None
    parent: RoleNode | None = None
    site: Site | None = None
    order: int = 0
    children: dict[tuple[str, int | None], RoleNode] = field(default_factory=dict)
    _by_name: dict[str, list[RoleNode]] = field(default_factory=dict)

    @property
    def role(self) -> str:
        word = self.name if self.index is None else f"{self.name}[{self.index}]"
        above = self.parent.role if self.parent is not None else ""
        return f"{above}.{word}" if above else word

    def named(self, name: str) -> list[RoleNode]:
        """The children of a name: one without index, or all of its indices in order."""
        return self._by_name.get(name, [])

    def names(self) -> list[str]:
        return list(self._by_name)

    def child(self, name: str, index: int | None) -> RoleNode:
        found = self.children.get((name, index))
        if found is None:
            found = self.children[name, index] = RoleNode(name, index, self)
            siblings = self._by_name.setdefault(name, [])
            siblings.append(found)
            siblings.sort(key=lambda n: -1 if n.index is None else n.index)
        return found

    def below(self) -> Iterator[RoleNode]:
        """The node itself and all below it, parents first, in model order of insertion."""
        yield self
        for child in self.children.values():
            yield from child.below()

    def sites(self) -> list[Site]:
        """The site here, else the topmost sites below."""
        if self.site is not None:
            return [self.site]
        return [s for child in self.children.values() for s in child.sites()]

    def leaves(self) -> list[Site]:
        """The sites at and below the node that are parts, not regions."""
        return [n.site for n in self.below() if n.site is not None and not n.site.is_region]


def role_tree(sites: Iterable[Site]) -> RoleNode:
    """All sites by role. A part that only one of several trunks has is found with the trunk's name in front too."""
    root = RoleNode("", None)
    listed = list(sites)
    for order, site in enumerate(listed):
        node = root
        for name, index in split_role(site.role):
            node = node.child(name, index)
        node.site, node.order = site, order
    for order, site in enumerate(listed):
        trunk = site.facts.get("trunk")
        if not isinstance(trunk, str) or not trunk or site.role.startswith(f"{trunk}."):
            continue
        node = root
        for name, index in [(trunk, None), *split_role(site.role)]:
            node = node.child(name, index)
        if node.site is None:
            node.site, node.order = site, order
    return root
