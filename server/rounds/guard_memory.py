"""What a policy remembers from round to round: norms of updates, numbers of examples, and the strikes of each site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

MOST_NORMS = 100


@dataclass(frozen=True)
class GuardMemory:
    """The last norms of admitted updates, oldest first; and by site the examples of its last reply, the number of its
    offences, and the first round in which it takes part again after a quarantine.
    """

    norms: tuple[float, ...] = ()
    examples: Mapping[str, float] = field(default_factory=dict)
    strikes: Mapping[str, int] = field(default_factory=dict)
    until: Mapping[str, int] = field(default_factory=dict)

    def quarantined(self, number: int) -> frozenset[str]:
        """Return the sites that are left out of round `number`."""
        return frozenset(node for node, until in self.until.items() if number < until)

    def after_admitting(self, norms: Iterable[float], examples: Mapping[str, float]) -> GuardMemory:
        """Return the memory after a round with admitted replies of these norms and numbers of examples."""
        return replace(self, norms=(*self.norms, *norms)[-MOST_NORMS:], examples={**self.examples, **examples})

    def after_offences(self, nodes: Iterable[str], number: int, most: int, rounds: int) -> GuardMemory:
        """Return the memory after offences by `nodes` in round `number`.

        A site with `most` offences is left out of the next `rounds` rounds, and then begins anew.
        """
        strikes, until = dict(self.strikes), dict(self.until)
        for node in nodes:
            strikes[node] = strikes.get(node, 0) + 1
            if strikes[node] >= most:
                del strikes[node]
                until[node] = number + 1 + rounds
        return replace(self, strikes=strikes, until=until)
