"""Results that lack unreadable samples, which may be repaired: the same command then completes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..runs.inputs import file_sizes, inputs_of, read_entries
from ..runs.parts import recorded_settings
from ..runs.records import read_record, record_of
from ..runs.resumable import Result
from ..runs.settings import differences, digest_of
from ..runs.shards import Shard
from .pairs import SAMPLES, STARTS


@dataclass(frozen=True)
class SampleResult(Result):
    """A result computed from the samples of starting images at one time.

    Its settings have the digest of the names and sizes of the samples, "samples_digest". That of a result which lacks
    unreadable samples is of the broken files.

    Attributes:
        data_dir: folder of the samples.
    """

    data_dir: str = ""

    def is_finished(self, shard: Shard) -> bool:
        return not self._only_lacks_repaired_samples() and super().is_finished(shard)

    def _only_lacks_repaired_samples(self) -> bool:
        """Whether the result is unfinished, and the samples that differ from those on record were unreadable."""
        record = read_record(record_of(self.path), {"settings": dict, "finished": bool}, self.path)
        if record is None or record["finished"]:
            return False
        current = {**self.settings, "samples_digest": record["settings"].get("samples_digest")}
        if differences(record["settings"], current):
            return False
        samples, starts = self.files[SAMPLES], self.files[STARTS]
        listed = (read_entries(inputs_of(self.path)) or {}).get(SAMPLES, {})
        read = {path: entry.size for path, entry in listed.items() if entry.sha256}
        unreadable = record.get("images", {}).get("unreadable", {})
        start_of = {path: starts[i * len(starts) // len(samples)] for i, path in enumerate(samples)}
        sizes = file_sizes(self.data_dir, samples)
        return read.keys() <= start_of.keys() and all(
            read[path] == sizes.get(path) if path in read else path in unreadable or start in unreadable
            for path, start in start_of.items()
        )


def digest_for_parts(
    folder: str, digests: Mapping[int, str], results: Mapping[int, Result], times: Sequence[int]
) -> str:
    """SHA-256 of the names of all samples at these times, for the settings of parts.

    The sizes, which change if an unreadable sample is repaired, are in the lists of files of the parts. Parts of
    earlier versions have the `digests` of names and sizes: these are used to resume them.
    """
    of_files = digest_of(digests[k] for k in times)
    if recorded_settings(folder).get("samples_digest") == of_files:
        return of_files
    return digest_of(path for k in times for path in results[k].files[SAMPLES])
