"""Extensions of qcgraph from other distributions, by entry points: known by name, imported only when used.

A name that qcgraph has itself, or that several distributions offer, cannot be used; asking for it names these
distributions. A broken extension affects only its users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from qcgraph.errors import QcgraphError, UsageError


@dataclass(frozen=True)
class Offer:
    """An object that a distribution offers under a name.

    Attributes:
        name: the name to ask for.
        distribution: the distribution, with its version.
        value: the object that the entry point names, ``package.module:object``.
    """

    name: str
    distribution: str
    value: str


@dataclass(frozen=True)
class Extensions:
    """The entry points of one group.

    Attributes:
        group: the name of the group, ``qcgraph.passes`` for example.
        noun: the word for one of them in errors.
        own: returns the names that qcgraph has itself, which cannot be taken.
        problem_of: returns the problem of an object with a name, or an empty string if it has none.
    """

    group: str
    noun: str
    own: Callable[[], Iterable[str]]
    problem_of: Callable[[str, Any], str]

    def offers(self) -> dict[str, Offer]:
        """Return the usable offers by name; nothing is imported."""
        own = set(self.own())
        return {name: offers[0] for name, offers in self._all().items() if name not in own and len(offers) == 1}

    def problems(self) -> tuple[str, ...]:
        """Return a sentence for every name that is offered but cannot be used."""
        own = set(self.own())
        found = []
        for name, offers in self._all().items():
            if name in own:
                found += [
                    f"{offer.distribution} offers the {self.noun} {name!r}, which is qcgraph's" for offer in offers
                ]
            elif len(offers) > 1:
                found.append(self._clash(name, offers))
        return tuple(found)

    def load(self, name: str) -> Any:
        """Import the object of a name; return None where no distribution offers the name.

        Raises:
            UsageError: several distributions offer the name, it cannot be imported, or its object is not valid.
        """
        offers = self._all().get(name, [])
        if not offers or name in set(self.own()):
            return None
        if len(offers) > 1:
            raise UsageError(self._clash(name, offers), hint="uninstall all but one of them")
        offer = offers[0]
        where = f"{self.noun} {name} of {offer.distribution}"
        try:
            found = metadata.EntryPoint(name, offer.value, self.group).load()
            problem = self.problem_of(name, found)
        except QcgraphError:
            raise  # a refusal of qcgraph itself, which says what is wrong
        except (Exception, SystemExit) as error:  # noqa: BLE001 - any code of the distribution may run
            said = str(error).strip().splitlines() or ["nothing"]
            problem = f"cannot be imported: {type(error).__name__}: {said[0]}"
        if problem:
            raise UsageError(
                problem, where=where, hint=f"{offer.value} is not qcgraph's: mend, upgrade or uninstall it"
            )
        return found

    def _all(self) -> dict[str, list[Offer]]:
        """Return all offers of all distributions, by name."""
        found: dict[str, list[Offer]] = {}
        for entry in sorted(metadata.entry_points(group=self.group)):
            of = entry.dist
            distribution = "an unknown distribution" if of is None else f"{of.name} {of.version}"
            found.setdefault(entry.name, []).append(Offer(entry.name, distribution, entry.value))
        return found

    def _clash(self, name: str, offers: Iterable[Offer]) -> str:
        return f"{' and '.join(offer.distribution for offer in offers)} both offer the {self.noun} {name!r}"
