"""What the processes of one run tell each other. Knows ``torch.distributed``, and neither Lightning nor checkpoints."""

from lightning_memload.distributed.companions import Companions, LostCompanion

__all__ = ["Companions", "LostCompanion"]
