"""The progress bar of a run on several ranks."""

from __future__ import annotations

from tqdm import tqdm

from .. import dist_util


class SharedBar(tqdm):
    """Progress of all ranks on the items that they claim, shown by rank 0. Every rank updates it for its own work.

    Attributes:
        own: work that this rank has done.
    """

    own: float = 0

    def update(self, n: float = 1) -> bool | None:
        """Add work of this rank and, on rank 0, what the others are known to have done."""
        self.own += n
        return super().update(n + dist_util.note_work(n))

    def finish(self) -> None:
        """Wait for all ranks to finish their work, and close the bar. All ranks must call this."""
        done = dist_util.gather_objects(self.own, meanwhile=lambda: self.update(0))
        super().update(sum(done) - self.n)
        self.close()
