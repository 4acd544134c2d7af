"""Messages between the processes of one run. Uses ``torch.distributed``, and neither Lightning nor checkpoints."""

from lightning_memload.distributed.checksums import (
    CombinedChecksum,
    PartChecksum,
    combine_parts,
    gather_checksums,
    merge_parts,
)
from lightning_memload.distributed.companions import Companions, LostCompanion
from lightning_memload.distributed.writer import WriterRank

__all__ = [
    "CombinedChecksum",
    "Companions",
    "LostCompanion",
    "PartChecksum",
    "WriterRank",
    "combine_parts",
    "gather_checksums",
    "merge_parts",
]
